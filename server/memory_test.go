package server

import (
	"errors"
	"testing"
)

// TestAvailableMemory is the least limit that holds for the process, by either version of control groups.
func TestAvailableMemory(t *testing.T) {
	const meminfo = "MemTotal:       16777216 kB\nMemFree:        1 kB\n"
	tests := map[string]struct {
		files map[string]string
		want  int64
	}{
		"nothing is said":           {nil, 0},
		"no groups":                 {map[string]string{"/proc/meminfo": meminfo}, 16 << 30},
		"version 2":                 {map[string]string{"/proc/meminfo": meminfo, "/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "268435456\n"}, 256 << 20},
		"version 2, parent":         {map[string]string{"/proc/meminfo": meminfo, "/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n", "/sys/fs/cgroup/a/memory.max": "536870912\n"}, 512 << 20},
		"version 2, in a container": {map[string]string{"/proc/meminfo": meminfo, "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "268435456\n"}, 256 << 20},
		"version 1": {map[string]string{"/proc/meminfo": meminfo, "/proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/a\n0::/\n",
			"/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "268435456\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 256 << 20},
		"version 1, the host's path": {map[string]string{"/proc/meminfo": meminfo, "/proc/self/cgroup": "4:memory:/docker/abc\n",
			"/sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n"}, 256 << 20},
		"no limit":           {map[string]string{"/proc/meminfo": meminfo, "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "max\n"}, 16 << 30},
		"more than there is": {map[string]string{"/proc/meminfo": meminfo, "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "1099511627776\n"}, 16 << 30},
		"nonsense":           {map[string]string{"/proc/meminfo": meminfo, "/proc/self/cgroup": "x\n::\n0::../..\n"}, 16 << 30},
	}
	for name, tt := range tests {
		read := func(path string) ([]byte, error) {
			text, ok := tt.files[path]
			if !ok {
				return nil, errors.New("absent")
			}
			return []byte(text), nil
		}
		if got := availableMemory(read); got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
}

// TestMemoryPlanFits: whatever there is, from the documented floor on, the parts together are not more.
func TestMemoryPlanFits(t *testing.T) {
	for total := int64(256 << 20); total <= 64<<30; total += total / 3 {
		p := planMemory(total)
		if sum := p.heap + p.plugin + p.cache + memTables*p.memTable; sum > total-total/8 || p.window > p.heap/4 {
			t.Errorf("of %d: %+v is %d", total, p, sum)
		}
	}
	if p := planMemory(2 << 30); p.slots != 4096 || p.window != 32<<20 || p.cache != 64<<20 || p.memTable != 16<<20 {
		t.Errorf("of 2 GiB: %+v", p)
	}
	if p := planMemory(256 << 20); p.slots < 256 || p.heap < 80<<20 || p.plugin < 48<<20 {
		t.Errorf("at the floor: %+v", p)
	}
	if p := planMemory(0); p.heap != 0 || p.plugin != 0 || p.slots != 4096 {
		t.Errorf("of an unknown amount: %+v", p)
	}
}

// TestSlotsFitOpenFiles: an attempt without a socket would be charged to the delivery.
func TestSlotsFitOpenFiles(t *testing.T) {
	for files, want := range map[uint64]int{0: 4096, 1 << 20: 4096, 4096 + 256: 4096, 1024: 768, 256: 16, 64: 16} {
		if got := planMemory(0).withFiles(files).slots; got != want {
			t.Errorf("with %d files: %d slots, want %d", files, got, want)
		}
	}
}
