package server

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

const (
	// gcPercent is lower than Go's 100: without cgo the journal's cache and memtables are in the heap, where they cost the
	// collector nothing and would double what it lets pile up.
	gcPercent = 60
	// leastGarbage may pile up whatever is live: a heap of some megabytes would be collected dozens of times a second.
	// mostPercent bounds it, and so what a burst on a small heap may come to.
	leastGarbage = 48 << 20
	mostPercent  = 200
	// percentStep is a change that is worth stopping all goroutines for.
	percentStep = 10
)

// percentAt is how much garbage may pile up before the next collection, as a percentage of what is live.
func percentAt(live uint64) int {
	return int(min(max(leastGarbage*100/max(live, 1), gcPercent), mostPercent))
}

// pacer sets that percentage after each collection until it is ended.
type pacer struct {
	percent int
	ended   atomic.Bool
}

// cycle is garbage from the start, so that the next collection finds it.
type cycle struct{ *pacer }

func (p *pacer) next() {
	if p.ended.Load() {
		return
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	percent := percentAt(live[0].Value.Uint64())
	if change := percent - p.percent; change >= percentStep || change <= -percentStep {
		p.percent = percent
		debug.SetGCPercent(percent)
	}
	runtime.AddCleanup(&cycle{p}, (*pacer).next, p)
}

func (p *pacer) end() error {
	p.ended.Store(true)
	return nil
}
