// Package garbage paces Go's collector by how much is live, and gives back what a burst has left. A fixed percentage is wrong at both ends: a heap of a few
// megabytes is collected dozens of times a second, and one that strangers have made large for a moment grows by several
// times that before it is looked at again, and stays so.
package garbage

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

// step is a change of percentage that is worth stopping all goroutines for.
const step = 10

// Pace is how much garbage may pile up before the next collection.
type Pace struct {
	// Least, in bytes, may whatever is live.
	Least uint64
	// Floor and Most bound it, as percentages of what is live; Most also what a burst on a small heap may come to.
	Floor, Most int
}

// Percent is that, as a percentage of live bytes.
func (p Pace) Percent(live uint64) int {
	return int(min(max(p.Least*100/max(live, 1), uint64(p.Floor)), uint64(p.Most)))
}

// Keep sets that percentage now and after each collection, in the whole process, until end is called.
func (p Pace) Keep() (end func()) {
	k := &keeper{Pace: p}
	k.next()
	return func() { k.ended.Store(true) }
}

type keeper struct {
	Pace
	percent int
	ended   atomic.Bool
}

// cycle is garbage from the start, so that the next collection finds it.
type cycle struct{ *keeper }

func (k *keeper) next() {
	if k.ended.Load() {
		return
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	percent := k.Percent(live[0].Value.Uint64())
	if change := percent - k.percent; change >= step || change <= -step {
		k.percent = percent
		debug.SetGCPercent(percent)
	}
	runtime.AddCleanup(&cycle{k}, (*keeper).next, k)
}
