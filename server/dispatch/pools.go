package dispatch

import (
	"slices"
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
	// waiting are lanes that found what those of their standing may hold taken. Of those on trial the last one is the next, which
	// is the youngest, unless it has been added first.
	waiting [standings][]*lane
	// called is whose trial the next one of the last eighth is, until a time.
	called      *lane
	calledUntil time.Time
}

// wait puts a lane in the queue of its standing, whose mutex is held, if it stands in none, and says when it is to ask again.
func (p *pool) wait(l *lane, now time.Time) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := &p.waiting[l.standing]
	if l.poolQueued.CompareAndSwap(false, true) {
		at := len(*q)
		if l.standing == unknown && at > 0 && l.born.Load() < (*q)[at-1].born.Load() {
			at = 0
		}
		*q = slices.Insert(*q, at, l)
	}
	if n := len(*q); l.standing == unknown && n > 0 && (*q)[n-1] == l && p.nearlyTaken() && !p.taken(unknown) {
		return now.Add(min(slowAfter, max(p.last.wait(now, 0), time.Millisecond)))
	}
	return now.Add(slowAfter) // who was woken before may have made no use of it
}

// trial reports whether a lane may have a trial of the last eighth now. If another is next, that one is called.
func (p *pool) trial(l *lane, now time.Time) bool {
	if p.last.wait(now, 0) > 0 {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.called != nil && now.Before(p.calledUntil) {
		return p.called == l
	}
	p.called = nil
	q := p.waiting[unknown]
	if len(q) == 0 || q[len(q)-1].born.Load() <= l.born.Load() {
		return true
	}
	p.called, p.calledUntil = p.pop(unknown, len(q)-1), now.Add(turnFor)
	l.e.alarms.set(p.called, now)
	return false
}

// pop takes one of those that wait out. p.mu is held.
func (p *pool) pop(st standing, at int) *lane {
	l := p.waiting[st][at]
	if at == 0 {
		p.waiting[st][0], p.waiting[st] = nil, p.waiting[st][1:]
	} else {
		p.waiting[st] = slices.Delete(p.waiting[st], at, at+1)
	}
	l.poolQueued.Store(false)
	return l
}

// enter takes what a lane needs to start, beside a place. l.mu is held.
func (p *pool) enter(l *lane, hang time.Duration, now time.Time) bool {
	if l.standing != unknown {
		return true
	}
	if p.nearlyTaken() && !p.last.start(now, 0, hang/time.Duration(part8(p.total, 1))) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.called == l {
		p.called = nil
	}
	if l.poolQueued.Load() {
		if at := slices.Index(p.waiting[unknown], l); at >= 0 {
			p.pop(unknown, at)
		}
	}
	return true
}

// freed has lanes look again for which there is a place now.
func (p *pool) freed(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for st := range standings {
		if n := len(p.waiting[st]); n > 0 && !p.taken(st) {
			next, wait := 0, time.Duration(0)
			if st == unknown {
				if next = n - 1; p.nearlyTaken() {
					wait = p.last.wait(now, 0)
				}
			}
			l := p.waiting[st][next]
			l.e.alarms.set(l, now.Add(wait))
			if wait > 0 {
				continue
			}
			if p.pop(st, next); st == unknown {
				p.called, p.calledUntil = l, now.Add(turnFor)
			}
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
func (l *lane) crowded(now time.Time) bool {
	p := l.pool
	return p != nil && (p.taken(l.standing) || l.standing == unknown && p.nearlyTaken() && !p.trial(l, now))
}

// queueUp waits for others of the plugin to hold less. l.mu is held.
func (l *lane) queueUp(now time.Time) { l.arm(l.pool.wait(l, now)) }

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
	if l.pool != nil && was == unknown {
		l.pool.freed(l.e.now())
	}
}
