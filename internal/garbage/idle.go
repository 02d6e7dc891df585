package garbage

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	idleLook = 2 * time.Second
	// idleRate is how many bytes a second a process allocates at most that has nothing to do.
	idleRate = 1 << 20
	// idleWaste is how much beyond what is in use is worth a collection.
	idleWaste = 48 << 20
)

// Return gives memory back to the system, until ctx ends, when little goes on: after a burst the heap holds about
// twice what is in use, and Go itself collects again after minutes, and keeps part of what it finds.
func Return(ctx context.Context) error {
	tick := time.NewTicker(idleLook)
	defer tick.Stop()
	var last heapUse
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := readHeap()
		if now.idleSince(last) {
			debug.FreeOSMemory()
			now = readHeap()
			now.kept = now.resident // what a collection has left is no waste
		} else {
			now.kept = last.kept
		}
		last = now
	}
}

// heapUse is what the heap takes, in bytes.
type heapUse struct {
	// allocated rises with all that was ever allocated.
	allocated uint64
	// resident is what the system has given and not got back, live what the last collection has found in use.
	resident, live uint64
	// kept is what was resident when memory was returned last.
	kept uint64
}

// idleSince reports whether memory is to be returned: little was allocated since last, and much is there that is not in
// use, or was not there when memory was returned last.
func (h heapUse) idleSince(last heapUse) bool {
	return last.allocated > 0 && h.allocated-last.allocated < uint64(idleRate*idleLook/time.Second) &&
		h.resident > max(h.live, last.kept)+idleWaste
}

func readHeap() heapUse {
	samples := []metrics.Sample{
		{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
	}
	metrics.Read(samples)
	use := heapUse{allocated: samples[0].Value.Uint64(), live: samples[1].Value.Uint64()}
	for _, s := range samples[2:] {
		use.resident += s.Value.Uint64()
	}
	return use
}
