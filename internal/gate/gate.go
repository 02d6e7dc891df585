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
// as much as there is. Those who wait are let in by turns: one of each tenant, and of one tenant in their order. Safe for
// concurrent use.
type Gate struct {
	mu sync.Mutex // guards what follows
	// free are the places that nobody has, each with how long it was taken since it was last closed.
	free []time.Duration
	// waiting are those who wait, by tenant, and tenants who has any, the next first.
	waiting map[string][]*waiter
	tenants []string
}

// waiter is one who waits.
type waiter struct {
	place chan time.Duration // capacity 1
	gone  bool               // the gate's mutex guards it
}

// New returns an open Gate.
func New() *Gate {
	return &Gate{free: make([]time.Duration, max(1, runtime.GOMAXPROCS(0)/2)), waiting: map[string][]*waiter{}}
}

// Enter waits for a place and returns how to leave it, or false when given was closed before. leave may be called again,
// and concurrently. A turn that lasts longer than most, if that is not zero, ends by itself. The tenant is whose work it
// is; where that is not known it is empty.
func (g *Gate) Enter(given <-chan struct{}, most time.Duration, tenant string) (leave func(), entered bool) {
	taken, entered := g.take(given, tenant)
	if !entered {
		return nil, false
	}
	var once sync.Once
	began := time.Now()
	end := func() { once.Do(func() { g.leave(taken + time.Since(began)) }) }
	if most > 0 {
		late := time.AfterFunc(most, end)
		return func() { late.Stop(); end() }, true
	}
	return end, true
}

// take waits for a place.
func (g *Gate) take(given <-chan struct{}, tenant string) (taken time.Duration, entered bool) {
	g.mu.Lock()
	if last := len(g.free) - 1; last >= 0 {
		defer g.mu.Unlock()
		taken, g.free = g.free[last], g.free[:last]
		return taken, true
	}
	w := &waiter{place: make(chan time.Duration, 1)}
	if len(g.waiting[tenant]) == 0 {
		g.tenants = append(g.tenants, tenant)
	}
	g.waiting[tenant] = append(g.waiting[tenant], w)
	g.mu.Unlock()
	select {
	case taken = <-w.place:
		return taken, true
	case <-given:
	}
	g.mu.Lock()
	w.gone = true
	g.mu.Unlock()
	select {
	case taken = <-w.place: // given a moment before
		g.give(taken)
	default:
	}
	return 0, false
}

// leave closes a place that was taken for so long since it last was, or gives it away.
func (g *Gate) leave(taken time.Duration) {
	if taken < short {
		g.give(taken)
		return
	}
	time.AfterFunc(taken, func() { g.give(0) })
}

func (g *Gate) give(taken time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.tenants) > 0 {
		tenant := g.tenants[0]
		w, rest := g.waiting[tenant][0], g.waiting[tenant][1:]
		switch {
		case len(rest) == 0:
			delete(g.waiting, tenant)
			g.tenants = g.tenants[1:]
		case w.gone:
			g.waiting[tenant] = rest
		default:
			g.waiting[tenant] = rest
			g.tenants = append(g.tenants[1:], tenant)
		}
		if !w.gone {
			w.place <- taken
			return
		}
	}
	g.free = append(g.free, taken)
}
