package server

import (
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/internal/garbage"
	"github.com/grapnel/grapnel/server/pluginhost"
)

// memoryPlan divides the memory that the server and its plugins may use between them.
type memoryPlan struct {
	// total is what there is; 0 when that is unknown, and then nothing below is smaller than it has to be.
	total int64
	// heap is the soft limit of this process's garbage-collected memory, plugin that of the first-party plugins'
	// process. 0 sets none.
	heap, plugin int64
	// cache and memTable are the journal's, outside of the heap. Up to memTables of the latter are held at once.
	cache, memTable int64
	// window bounds the deliveries that wait in memory, slots the attempts in flight.
	window int64
	slots  int
}

const (
	memTables = 4
	// slotBytes is what an attempt in flight may cost in both processes, body included, as a rule.
	slotBytes = 512 << 10
)

// planMemory is the division of total bytes; where there is plenty everything has the size at which more is of no use.
func planMemory(total int64) memoryPlan {
	p := memoryPlan{total: total, cache: 64 << 20, memTable: 16 << 20, window: 32 << 20, slots: 4096}
	if total <= 0 {
		return p
	}
	p.cache = bounded(total/32, 4<<20, p.cache)
	p.memTable = bounded(total/64, 2<<20, p.memTable)
	p.window = bounded(total/32, 4<<20, p.window)
	p.slots = int(bounded(total/slotBytes, 64, int64(p.slots)))
	// An eighth is for what no limit counts: stacks of the system, code, files mapped into memory.
	rest := total - total/8 - p.cache - memTables*p.memTable
	p.plugin = max(rest*3/8, 32<<20)
	p.heap = max(rest-p.plugin, 32<<20)
	return p
}

// withFiles has no more attempts in flight than there may be sockets: an attempt that finds none would be a failure. Some
// are for everything else.
func (p memoryPlan) withFiles(most uint64) memoryPlan {
	const others, least = 256, 16
	if most > 0 && most < uint64(p.slots)+others {
		p.slots = max(least, int(most)-others)
	}
	return p
}

// confinedShare is what part of the plugins' memory a confined process, of which there are three, is told of, and leastConfined the least that it
// cannot have more than.
const (
	confinedShare = 8
	confinedParts = 3
	leastConfined = 512 << 20
)

// ofPart is what one of the first-party processes is told to keep to, and what it cannot exceed. A receiver that makes a
// library take more than that ends the process, and not the machine.
func (p memoryPlan) ofPart(confined bool) (soft uint64, limits pluginhost.Limits) {
	soft = uint64(max(0, p.plugin))
	if confined {
		soft /= confinedShare
		limits.OpenFiles = uint64(p.slots) + 1024
	} else {
		soft -= soft / confinedShare * confinedParts
	}
	if soft > 0 {
		soft = max(soft, 16<<20)
	}
	switch {
	case raceDetector: // it maps far more than it uses
	case confined:
		limits.MemoryBytes = max(2*soft, leastConfined)
	case p.plugin > 0:
		limits.MemoryBytes = max(2*soft, 2*leastConfined)
	}
	return soft, limits
}

func bounded(n, least, most int64) int64 { return min(max(n, least), most) }

// pace lets a share of what is live pile up as garbage. Its floor is lower than Go's 100: without cgo the journal's cache
// and memtables are in the heap, where they cost the collector nothing and would double what it lets pile up.
func pace() garbage.Pace { return garbage.Pace{Least: 48 << 20, Floor: 60, Most: 200} }

// apply sets this process's soft limit and has its collector paced until end, unless its environment says how.
func (p memoryPlan) apply() (end func() error) {
	if p.heap > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(p.heap)
	}
	if os.Getenv("GOGC") != "" {
		return func() error { return nil }
	}
	stop := pace().Keep()
	return func() error { stop(); return nil }
}

// availableMemory is the least of the machine's memory and the limits of the control groups that this process is in;
// 0 where the system does not say.
func availableMemory(read func(string) ([]byte, error)) int64 {
	least := int64(math.MaxInt64)
	take := func(n int64, ok bool) {
		if ok && n > 0 {
			least = min(least, n)
		}
	}
	take(machineMemory(read))
	groups, _ := read("/proc/self/cgroup")
	for line := range strings.Lines(string(groups)) {
		// hierarchy:controllers:path; version 2 has no controllers.
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		var root, file string
		switch {
		case parts[0] == "0" && parts[1] == "":
			root, file = "/sys/fs/cgroup", "memory.max"
		case strings.Contains(","+parts[1]+",", ",memory,"):
			root, file = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
		default:
			continue
		}
		// The path may be that of the host while only its end is mounted here, so the root counts in any case.
		for dir := path.Clean("/" + parts[2]); ; dir = path.Dir(dir) {
			text, err := read(path.Join(root, dir, file))
			n, parseErr := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64) // "max" is none
			take(n, err == nil && parseErr == nil)
			if dir == "/" {
				break
			}
		}
	}
	if least == math.MaxInt64 {
		return 0
	}
	return least
}

// machineMemory is all that the machine has.
func machineMemory(read func(string) ([]byte, error)) (int64, bool) {
	info, err := read("/proc/meminfo")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(info)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "MemTotal:" {
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			return kib << 10, err == nil
		}
	}
	return 0, false
}
