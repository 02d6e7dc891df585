package dispatch

import (
	"container/list"
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
	waiting [standings]list.List
	// called is whose trial the next one of the last eighth is, until a time.
	called      *lane
	calledUntil time.Time
}

// waiter is a lane's place in the queue of a pool.
type waiter struct {
	lane *lane
	pool *pool
	as   standing
}

func waiterAt(e *list.Element) waiter { return e.Value.(waiter) } //nolint:forcetypeassert // nothing else is put in

// next is the place of the lane that is next of a standing; nil when none waits. p.mu is held.
func (p *pool) next(st standing) *list.Element {
	if st == unknown {
		return p.waiting[st].Back()
	}
	return p.waiting[st].Front()
}

// youngest reports whether no lane waits for a trial that is younger. p.mu is held.
func (p *pool) youngest(l *lane) bool {
	e := p.next(unknown)
	return e == nil || waiterAt(e).lane.born.Load() <= l.born.Load()
}

// wait puts a lane in the queue of its standing, whose mutex is held, if it stands in none, and says when it is to ask again.
func (p *pool) wait(l *lane, now time.Time) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := &p.waiting[l.standing]
	if l.inPool.Load() == nil {
		put := q.PushBack
		if l.standing == unknown && !p.youngest(l) {
			put = q.PushFront
		}
		l.inPool.Store(put(waiter{l, p, l.standing}))
	}
	if l.standing == unknown && p.next(unknown) == l.inPool.Load() && p.nearlyTaken() && !p.taken(unknown) {
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
	if p.youngest(l) {
		return true
	}
	p.called, p.calledUntil = p.leave(p.next(unknown)), now.Add(turnFor)
	l.e.alarms.set(p.called, now)
	return false
}

// leave takes one of those that wait out. p.mu is held.
func (p *pool) leave(e *list.Element) *lane {
	w := waiterAt(e)
	p.waiting[w.as].Remove(e)
	w.lane.inPool.Store(nil)
	return w.lane
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
	if e := l.inPool.Load(); e != nil && waiterAt(e).pool == p {
		p.leave(e)
	}
	return true
}

// freed has lanes look again for which there is a place now.
func (p *pool) freed(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for st := range standings {
		e := p.next(st)
		if e == nil || p.taken(st) {
			continue
		}
		l, wait := waiterAt(e).lane, time.Duration(0)
		if st == unknown && p.nearlyTaken() {
			wait = p.last.wait(now, 0)
		}
		l.e.alarms.set(l, now.Add(wait))
		if wait > 0 {
			continue
		}
		if p.leave(e); st == unknown {
			p.called, p.calledUntil = l, now.Add(turnFor)
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
	key := poolKey{sub.Proto().GetTransport().GetPlugin(), n}
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
