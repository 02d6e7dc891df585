package gate

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// slice is how long Modestly keeps a processor from somebody who wakes.
const slice = 100 * time.Microsecond

// Modestly calls f, a long calculation, on a thread that gives way: the system lets others have its processor as soon as
// they wake, and not after the milliseconds that it grants to everybody else. It takes no less of what is idle. Before
// Linux 6.12 it just calls f.
func Modestly(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := unix.SchedGetAttr(0, 0)
	if err == nil && before.Policy == unix.SCHED_NORMAL {
		during := *before
		during.Runtime = uint64(slice)
		if unix.SchedSetAttr(0, &during, 0) == nil {
			defer unix.SchedSetAttr(0, before, 0) //nolint:errcheck // it was so a moment ago
		}
	}
	f()
}
