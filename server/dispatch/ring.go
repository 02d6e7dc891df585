package dispatch

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/window"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// quantum is how many attempts a lane starts at most before the next lane has its turn.
	quantum = 8
	// inlineTurns bounds how long the goroutine that brought a result goes on with the lane.
	inlineTurns = 4
	// nobodys is the standing of turns that are not paid for, because there are slots for all.
	nobodys = standings
	// weighEvery is how often the weight of a namespace is looked up that has turns.
	weighEvery = time.Second
)

// ring holds the lanes that may have something to start, in the order of their turns: by standing, so that lanes which
// have no slots to hope for do not stand in the way of others, then namespace after namespace, by what they have had and
// their weights, so that one with ten thousand lanes, or whose receivers take long, gets one namespace's share, then lane
// after lane likewise. It decides who comes first where there is less than all want, and costs nothing else.
type ring struct {
	mu     sync.Mutex
	rounds [standings]round
	turn   standing // whose turn it is
	wake   chan struct{}
	// weight says how heavy a namespace is.
	weight func(delivery.NamespaceKey) int
}

// round is the turns of lanes of one standing.
type round struct {
	spaces turns[*space]
	n      atomic.Int64 // lanes
}

// push takes a lane whose mutex is held. Where it stands already for an older standing, it stands there, too: a turn too
// many does no harm, and one that has proven itself must not wait among those that hang.
func (r *ring) push(l *lane) {
	st := l.standing
	if !l.queued[st].CompareAndSwap(false, true) {
		return
	}
	r.mu.Lock()
	r.rounds[st].push(l, st)
	r.mu.Unlock()
	signal(r.wake)
}

func (r *round) push(l *lane, st standing) {
	s := &l.tenant.spaces[st]
	l.seats[st].born = l.born.Load()
	s.seat.born = max(s.seat.born, l.seats[st].born)
	s.lanes.add(&l.seats[st])
	r.spaces.add(&s.seat)
	r.n.Add(1)
}

// pop returns nil when no lane may have a slot, and when to ask again: 0 means when a slot is released or a lane comes.
func (r *round) pop(slots *slots, st standing, now time.Time) (*lane, time.Duration) {
	var again time.Duration
	seat := r.spaces.take(func(s *space) bool {
		ok, wait := slots.roomFor(s.tenant, st, now)
		again = sooner(again, wait)
		return ok
	})
	if seat == nil {
		return nil, again
	}
	s := seat.of
	l := s.lanes.take(nil).of
	if s.lanes.n > 0 {
		r.spaces.back(seat)
	}
	r.n.Add(-1)
	l.queued[st].Store(false)
	return l, 0
}

// sooner is the shorter of two waits, of which 0 is none.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// next takes the lane whose turn it is among those that may get a slot, and says as which it has its turn, or when to ask
// again: 0 means when a slot is released or a lane comes.
func (r *ring) next(s *slots, now time.Time) (*lane, standing, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var again time.Duration
	for range standings {
		st := r.turn
		r.turn = (r.turn + 1) % standings
		if r.rounds[st].spaces.n == 0 {
			continue
		}
		if s.room(st, now) {
			l, wait := r.rounds[st].pop(s, st, now)
			if l != nil {
				return l, st, 0
			}
			again = sooner(again, wait)
		}
		again = sooner(again, s.wait(st, now))
	}
	return nil, 0, again
}

// charge has a lane and its namespace pay for a turn.
func (r *ring) charge(l *lane, st standing, cost int64, now time.Time) {
	if cost == 0 {
		return
	}
	t := l.tenant
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(t.weighed) >= weighEvery {
		t.weighed = now
		heavy := int64(r.weight(t.key))
		for i := range t.spaces {
			t.spaces[i].seat.heavy = heavy
		}
	}
	s := &t.spaces[st]
	s.lanes.charge(&l.seats[st], cost)
	r.rounds[st].spaces.charge(&s.seat, cost)
}

func (r *ring) waiting() int64 {
	n := int64(0)
	for i := range r.rounds {
		n += r.rounds[i].n.Load()
	}
	return n
}

// contended reports whether others wait whom a lane of this standing would keep waiting by going on.
func (r *ring) contended(st standing) bool {
	if st == proven {
		return r.rounds[proven].n.Load()+r.rounds[unknown].n.Load() > 0
	}
	return r.waiting() > 0
}

// dispatch gives the lanes on the ring their turns until the engine stops. A lane that finds no slot
// goes back to the ring's end; who releases one wakes this loop.
func (e *Engine) dispatch() {
	e.whenDue(e.ring.wake, func() (time.Duration, bool) {
		now := e.now()
		l, st, wait := e.ring.next(&e.slots, now)
		if l != nil {
			l.mu.Lock()
			as := nobodys
			if e.slots.scarce(st, e.ring.rounds[st].n.Load()) {
				as = st
			}
			cost := l.run(1, as)
			l.mu.Unlock()
			e.ring.charge(l, st, cost, now)
		}
		return wait, l != nil
	})
}

const (
	reasonMaxAge    = "max_age"
	reasonCancelled = "cancelled by a caller"
)

// batch is what one turn starts, or ends because it has expired.
type batch struct {
	n       int
	entries [quantum]*entry
	expired [quantum]bool
	// as is the standing whose turn it is, and pays for what is started. cost is what that is taken to cost.
	as   standing
	cost int64
}

// run gives the lane up to so many turns, and leaves the rest to the ring. They are turns of lanes of
// that standing, or of nobody, and it returns what the lane has to pay for them. l.mu is held, but not while
// attempts are handed over; l.running keeps others from starting attempts of this lane in the meantime,
// which keeps their order, and an attempt that ends at once from nesting.
func (l *lane) run(turns int, as standing) (cost int64) {
	if l.running {
		return 0
	}
	l.running = true
	for ; turns > 0; turns-- {
		b := batch{as: as}
		l.take(&b, l.e.now())
		if b.n == 0 {
			break
		}
		cost += b.cost
		l.mu.Unlock()
		l.start.Lock()
		for i := range b.n {
			if b.expired[i] {
				l.e.expire(b.entries[i])
			} else {
				l.begin(b.entries[i])
			}
		}
		l.start.Unlock()
		l.mu.Lock()
		if l.e.ring.contended(l.standing) {
			break
		}
	}
	l.running = false
	l.kick(l.e.now())
	return cost
}

// take picks the jobs of one turn.
func (l *lane) take(b *batch, now time.Time) {
	g := l.gate(now)
	if !g.open() {
		return
	}
	if g.sub.Batching != nil {
		l.takeTogether(b, g, now)
		return
	}
	for b.n < quantum {
		x := l.next(g.sub)
		if x == nil {
			return
		}
		var v visit
		expired, ok := x.expired(now), true
		if !expired {
			if v, ok = l.mayStart(g, now); !ok {
				return
			}
		}
		l.pick(b, x, expired, v, g, now)
	}
}

// pick takes an entry out of where it waits.
func (l *lane) pick(b *batch, x *entry, expired bool, v visit, g gate, now time.Time) {
	l.queueOf(x).remove(x)
	l.timerTurn = x.Kind == delivery.FIFO
	if expired {
		x.stage = window.Settling
		if g.isolated { // only the first ones come to memory
			l.sweepAt = now
		}
	} else {
		l.set(b, x, v, g, now)
	}
	b.entries[b.n], b.expired[b.n] = x, expired
	b.n++
}

// set has an entry take off in a turn that pays for it.
func (l *lane) set(b *batch, x *entry, v visit, g gate, now time.Time) {
	x.visit = v
	if b.as != nobodys {
		x.bill = l.toPay(x, b.as)
		b.cost += x.bill.cost()
	}
	l.takeOff(x, now)
	x.sub = g.sub
}

// next is the entry whose turn it is: fresh ones and retries alternate, so that neither waits for the
// other, as far as the budget for repeats allows. A repeat that it holds back holds back no first attempt behind it.
func (l *lane) next(sub *subscription.Subscription) *entry {
	x, fresh := l.firstFree(&l.timers, true), l.firstFree(&l.fresh, true)
	switch {
	case x == nil, fresh != nil && !l.timerTurn:
		return fresh
	case !x.repeats(), l.mayRepeat(true, sub): // whoever waits
		return x
	}
	first := l.firstFree(&l.timers, false)
	switch {
	case l.mayRepeat(first != nil || fresh != nil, sub):
		return x
	case first != nil:
		return first
	}
	return fresh
}

// mayRepeat reports whether the budget lets a repeat start. first: a first attempt waits.
func (l *lane) mayRepeat(first bool, sub *subscription.Subscription) bool {
	return l.health.MayRetry(first, l.retrying, maxInFlight(sub))
}

// mayStart checks the limits and takes a slot.
func (l *lane) mayStart(g gate, now time.Time) (v visit, ok bool) {
	if l.full(g.sub) || !l.e.slots.acquire(l, g.sub.AttemptTimeout, now) {
		return v, false
	}
	if !l.crowded(now) {
		v, ok = l.visit(now)
	}
	if ok && (l.pool != nil && !l.pool.enter(l, g.sub.AttemptTimeout, now) || !l.allow(g.sub, now)) {
		v.returned(l.key.Namespace, now)
		ok = false
	}
	if !ok {
		l.e.slots.returned(l)
	}
	return v, ok
}

// begin hands an attempt over. l.start is held, l.mu is not.
func (l *lane) begin(x *entry) {
	sub := l.e.subs.Subscription(l.key)
	if sub == nil || l.closedBy(sub) != "" || x.carries() && (sub.Batching == nil || *sub.Batching != *x.sub.Batching) {
		// It changed since the job was taken: back, for the next look to decide.
		l.mu.Lock()
		l.back(x)
		l.mu.Unlock()
		return
	}
	x.sub = sub
	if x.carries() {
		l.e.attempter.AttemptBatch(sub, x.parcel.jobs(), x)
		return
	}
	l.e.attempter.Attempt(sub, &x.Job, x)
}

// takeOff and land keep flying and the slots of standings in step. l.mu is held.
func (l *lane) takeOff(x *entry, now time.Time) {
	x.stage, x.at, x.target, x.pool = window.Flying, momentOf(now), l.target, l.pool
	x.mark = l.health.Started(x.repeats(), l.flying.n+1, now)
	if x.mark.Retry() {
		l.retrying++
	}
	x.pooled(l.standing, 1)
	l.keyInFlight(x, 1)
	l.flying.push(x)
}

func (l *lane) land(x *entry) {
	if x.carries() {
		l.unload(x)
	}
	l.keyInFlight(x, -1)
	if x.target != l.target {
		l.strays.remove(x)
		l.e.slots.countStrays(l, -1)
		x.leavePool(suspect)
		return
	}
	l.flying.remove(x)
	if x.mark.Retry() {
		l.retrying--
	}
	x.leavePool(l.standing)
	l.e.slots.count(l, -1)
}

// retarget begins anew, for another target. What flies to the old one is not waited for.
func (l *lane) retarget() {
	l.e.slots.count(l, -int64(l.flying.n))
	l.e.slots.countStrays(l, int64(l.flying.n))
	l.repooled(l.standing, suspect)
	l.pool, l.poolAt = nil, time.Time{}
	for x := l.flying.head; x != nil; x = l.flying.head {
		l.flying.remove(x)
		l.strays.push(x)
	}
	l.target++
	l.health, l.retrying = l.health.Replaced(), 0
	l.reclass()
}

// returned tells the health that nothing came of an attempt.
func (l *lane) returned(x *entry) {
	x.visit.returned(l.key.Namespace, l.e.now())
	x.square(0)
	if x.target == l.target {
		l.health.Returned(x.mark)
		l.e.slots.regain(l.standing, l.tenant)
	}
}

// back returns an entry that was to be tried, or of which nothing was tried, to where it waited. If a caller has
// ended or replaced it meanwhile, that was it.
func (l *lane) back(x *entry) {
	if x.stage != window.Flying || x.gone {
		return
	}
	l.land(x)
	l.returned(x)
	l.e.release()
	if !x.carries() {
		l.putBack(x)
		return
	}
	x.gone = true
	for _, p := range x.parcel.all {
		if p.parcel == x.parcel {
			l.putBack(p)
		}
	}
}
