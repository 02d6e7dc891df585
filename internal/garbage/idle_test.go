package garbage

import "testing"

// TestIdleSince: memory is returned when little goes on and much is there that is not in use, and not again for what that has left.
func TestIdleSince(t *testing.T) {
	const mib = 1 << 20
	before := heapUse{allocated: 1000 * mib}
	tests := map[string]struct {
		last, now heapUse
		want      bool
	}{
		"the first look":           {heapUse{}, heapUse{allocated: mib, live: mib, resident: 500 * mib}, false},
		"after a burst":            {before, heapUse{allocated: 1001 * mib, live: 100 * mib, resident: 300 * mib}, true},
		"in a burst":               {before, heapUse{allocated: 1100 * mib, live: 100 * mib, resident: 300 * mib}, false},
		"all is in use":            {before, heapUse{allocated: 1001 * mib, live: 100 * mib, resident: 120 * mib}, false},
		"it was returned already":  {heapUse{allocated: 1000 * mib, kept: 290 * mib}, heapUse{allocated: 1001 * mib, live: 100 * mib, resident: 300 * mib}, false},
		"more has come since then": {heapUse{allocated: 1000 * mib, kept: 290 * mib}, heapUse{allocated: 1001 * mib, live: 100 * mib, resident: 400 * mib}, true},
	}
	for name, tt := range tests {
		if got := tt.now.idleSince(tt.last); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if h := readHeap(); h.allocated == 0 || h.resident == 0 {
		t.Errorf("the runtime says %+v", h)
	}
}
