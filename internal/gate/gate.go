// Package gate bounds how much of this process's time work may take whose amount a stranger chooses: handshakes,
// signatures with large keys, floods. Without it the scheduler, which serves goroutines in the order in which they
// became ready, has everybody else wait behind all of it.
package gate

import (
	"runtime"
	"sync"
	"time"
)

// short is work behind which a gate need not close at once: it closes when as much of it has come together.
const short = time.Millisecond

// Gate is for such work. It has a place for every two processors, and each stays closed for as long as it was taken
// before: all of the work together takes a quarter of the processors, and what others do waits for a moment of it, not for
// as much as there is. Those who wait are let in in their order. Safe for concurrent use.
type Gate struct {
	// places holds those that are free, each with how long it was taken since it was last closed.
	places chan time.Duration
}

// New returns an open Gate.
func New() *Gate {
	g := &Gate{places: make(chan time.Duration, max(1, runtime.GOMAXPROCS(0)/2))}
	for range cap(g.places) {
		g.places <- 0
	}
	return g
}

// Enter waits for a place and returns how to leave it, or false when given was closed before. leave may be called again,
// and concurrently. A turn that lasts longer than most, if that is not zero, ends by itself.
func (g *Gate) Enter(given <-chan struct{}, most time.Duration) (leave func(), entered bool) {
	var taken time.Duration
	select {
	case taken = <-g.places:
	default:
		select {
		case taken = <-g.places:
		case <-given:
			return nil, false
		}
	}
	var once sync.Once
	began := time.Now()
	end := func() { once.Do(func() { g.give(taken + time.Since(began)) }) }
	if most > 0 {
		late := time.AfterFunc(most, end)
		return func() { late.Stop(); end() }, true
	}
	return end, true
}

func (g *Gate) give(taken time.Duration) {
	if taken < short {
		g.places <- taken
		return
	}
	time.AfterFunc(taken, func() { g.places <- 0 })
}
