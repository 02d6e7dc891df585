package garbage_test

import (
	"testing"

	"github.com/grapnel/grapnel/internal/garbage"
)

// TestPercent: a small heap is let pile up some garbage, within bounds, and a large one no more than a share.
func TestPercent(t *testing.T) {
	p := garbage.Pace{Least: 48 << 20, Floor: 60, Most: 200}
	for live, want := range map[uint64]int{0: 200, 12 << 20: 200, 24 << 20: 200, 32 << 20: 150, 60 << 20: 80, 80 << 20: 60, 4 << 30: 60} {
		if got := p.Percent(live); got != want {
			t.Errorf("%d bytes: %d %%, want %d", live, got, want)
		}
	}
}
