package dispatch

import (
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/subscription"
)

// pools are the attempts that plugins take at once, of those that take fewer than there are slots. Trials and suspects
// of a plugin hold no more of them than they may hold of the slots, so that what its other lanes start is not queued
// behind attempts that hang.
type pools struct {
	window func(*subscription.Subscription) int // nil: no plugin has a bound of its own

	mu  sync.Mutex
	all map[poolKey]*pool
}

// pool is what one plugin takes at once.
type pool struct {
	slots

	mu sync.Mutex
	// waiting are lanes that found what those of their standing may hold taken.
	waiting [standings][]*lane
}

// wait puts a lane in the queue of its standing, whose mutex is held, if it stands in none.
func (p *pool) wait(l *lane) {
	if !l.poolQueued.CompareAndSwap(false, true) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting[l.standing] = append(p.waiting[l.standing], l)
}

// freed has lanes look again for which there is a place now.
func (p *pool) freed(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for st := range standings {
		if q := p.waiting[st]; len(q) > 0 && !p.taken(st) {
			l := q[0]
			q[0], p.waiting[st] = nil, q[1:]
			l.poolQueued.Store(false)
			l.e.alarms.set(l, now)
		}
	}
}

// poolKey: a plugin that takes more, or fewer, than before has another pool.
type poolKey struct {
	plugin string
	window int
}

const (
	// poolLook is how often a lane looks how many attempts its plugin takes.
	poolLook = time.Second
	// maxPools is how many there are before those that are not in use go.
	maxPools = 64
)

// of is the pool of a subscription's transport; nil where there is no bound but that of all slots.
func (p *pools) of(sub *subscription.Subscription, total int64) *pool {
	if p.window == nil {
		return nil
	}
	n := p.window(sub)
	if n <= 0 || int64(n) >= total {
		return nil
	}
	key := poolKey{sub.Proto.GetTransport().GetPlugin(), n}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.all) >= maxPools {
		for k, s := range p.all {
			if s.used.Load() == 0 {
				delete(p.all, k)
			}
		}
	}
	s := p.all[key]
	if s == nil {
		if p.all == nil {
			p.all = make(map[poolKey]*pool)
		}
		s = &pool{slots: slots{total: int64(n)}}
		p.all[key] = s
	}
	return s
}

// lookPool finds the lane's pool. l.mu is held.
func (l *lane) lookPool(sub *subscription.Subscription, now time.Time) {
	if l.e.pools.window != nil && now.Sub(l.poolAt) >= poolLook {
		l.pool, l.poolAt = l.e.pools.of(sub, l.e.slots.total), now
	}
}

// crowded reports whether the lane has to wait until others of its plugin hold less. l.mu is held.
func (l *lane) crowded() bool { return l.pool != nil && l.pool.taken(l.standing) }

// queueUp waits for others of the plugin to hold less. l.mu is held.
func (l *lane) queueUp(now time.Time) {
	l.pool.wait(l)
	l.arm(now.Add(slowAfter)) // who was woken before may have made no use of it
}

// pooled has an attempt's place in the pool count for a standing, or no more.
func (x *entry) pooled(st standing, n int64) {
	if x.pool != nil {
		x.pool.used.Add(n)
		x.pool.tally(st, n)
	}
}

// leavePool gives the place back, and to the next lane.
func (x *entry) leavePool(st standing) {
	if p := x.pool; p != nil {
		x.pooled(st, -1)
		x.pool = nil
		p.freed(x.lane.e.now())
	}
}

// repooled has the places of attempts in flight count for another standing.
func (l *lane) repooled(was, is standing) {
	if l.pool == nil && l.poolAt.IsZero() {
		return
	}
	for x := l.flying.head; x != nil; x = x.next {
		x.pooled(was, -1)
		x.pooled(is, 1)
	}
}
