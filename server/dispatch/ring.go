package dispatch

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/dispatch/window"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// quantum is how many attempts a lane starts before the next lane has its turn. Fairness by cost
	// takes its place here: a lane would get a deficit to spend instead of a number of attempts.
	quantum = 8
	// inlineTurns bounds how long the goroutine that brought a result goes on with the lane.
	inlineTurns = 4
)

// ring holds the lanes that may have something to start, in the order of their turns: by standing, so that lanes which
// have no slots to hope for do not stand in the way of others, then namespace after namespace, so that one with
// ten thousand lanes gets one namespace's turns, then lane after lane.
type ring struct {
	mu     sync.Mutex
	rounds [standings]round
	turn   standing // whose turn it is
	wake   chan struct{}
}

// round is the turns of lanes of one standing.
type round struct {
	spaces     map[delivery.NamespaceKey]*space
	head, tail *space
	n          atomic.Int64
}

// space is a namespace with lanes that wait for their turn.
type space struct {
	key        delivery.NamespaceKey
	tenant     *tenant
	next       *space
	head, tail *lane // linked by lane.ringNext
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
	s := r.spaces[l.key.Namespace]
	if s == nil {
		s = &space{key: l.key.Namespace, tenant: l.tenant}
		if r.spaces == nil {
			r.spaces = make(map[delivery.NamespaceKey]*space)
		}
		r.spaces[s.key] = s
		r.append(s)
	}
	if s.tail == nil {
		s.head = l
	} else {
		s.tail.ringNext[st] = l
	}
	s.tail = l
	r.n.Add(1)
}

func (r *round) append(s *space) {
	if r.tail == nil {
		r.head = s
	} else {
		r.tail.next = s
	}
	r.tail = s
}

// shift takes the first namespace off.
func (r *round) shift() *space {
	s := r.head
	r.head, s.next = s.next, nil
	if r.head == nil {
		r.tail = nil
	}
	return s
}

// pop returns nil when no lane may have a slot.
func (r *round) pop(slots *slots, st standing) *lane {
	if r.head != nil && !slots.roomFor(r.head.tenant, st) {
		r.append(r.shift()) // no two namespaces can hold all that one may hold
	}
	if r.head == nil || !slots.roomFor(r.head.tenant, st) {
		return nil
	}
	s := r.shift()
	l := s.head
	s.head, l.ringNext[st] = l.ringNext[st], nil
	if s.head == nil {
		delete(r.spaces, s.key)
	} else {
		r.append(s)
	}
	r.n.Add(-1)
	l.queued[st].Store(false)
	return l
}

// next takes the lane whose turn it is among those that may get a slot, or says when to ask again: 0 means when a slot
// is released or a lane comes.
func (r *ring) next(s *slots, now time.Time) (*lane, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var again time.Duration
	for range standings {
		st := r.turn
		r.turn = (r.turn + 1) % standings
		if r.rounds[st].head == nil {
			continue
		}
		if s.room(st, now) {
			if l := r.rounds[st].pop(s, st); l != nil {
				return l, 0
			}
		}
		if wait := s.wait(st, now); wait > 0 && (again == 0 || wait < again) {
			again = wait
		}
	}
	return nil, again
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
		l, wait := e.ring.next(&e.slots, e.now())
		if l != nil {
			l.mu.Lock()
			l.run(1)
			l.mu.Unlock()
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
}

// run gives the lane up to so many turns, and leaves the rest to the ring. l.mu is held, but not while
// attempts are handed over; l.running keeps others from starting attempts of this lane in the meantime,
// which keeps their order, and an attempt that ends at once from nesting.
func (l *lane) run(turns int) {
	if l.running {
		return
	}
	l.running = true
	for ; turns > 0; turns-- {
		var b batch
		l.take(&b, l.e.now())
		if b.n == 0 {
			break
		}
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
		expired := x.expired(now)
		if !expired && !l.mayStart(g, now) {
			return
		}
		l.pick(b, x, expired, g, now)
	}
}

// pick takes an entry out of where it waits.
func (l *lane) pick(b *batch, x *entry, expired bool, g gate, now time.Time) {
	l.queueOf(x).remove(x)
	l.timerTurn = x.Kind == delivery.FIFO
	if expired {
		x.stage = window.Settling
		if g.isolated { // only the first ones come to memory
			l.sweepAt = now
		}
	} else {
		l.takeOff(x, now)
		x.sub = g.sub
	}
	b.entries[b.n], b.expired[b.n] = x, expired
	b.n++
}

// next is the entry whose turn it is: fresh ones and retries alternate, so that neither waits for the
// other, as far as the budget for repeats allows.
func (l *lane) next(sub *subscription.Subscription) *entry {
	x, fresh := l.firstFree(&l.timers), l.firstFree(&l.fresh)
	switch {
	case x == nil, fresh != nil && !l.timerTurn:
		return fresh
	case x.repeats() && !l.health.MayRetry(fresh != nil, l.retrying, maxInFlight(sub)):
		return fresh
	}
	return x
}

// mayStart checks the limits and takes a slot.
func (l *lane) mayStart(g gate, now time.Time) bool {
	if l.full(g.sub) || !l.e.slots.acquire(l, now) {
		return false
	}
	if l.crowded() {
		l.e.slots.returned(l)
		return false
	}
	if !l.allow(g.sub, now) {
		l.e.slots.returned(l)
		return false
	}
	return true
}

// begin hands an attempt over. l.start is held, l.mu is not.
func (l *lane) begin(x *entry) {
	sub := l.e.subs.Subscription(l.key)
	if sub == nil || l.closedBy(sub) != "" || sub.Batching == nil && x.carries() {
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
	x.stage, x.started, x.target, x.pool = window.Flying, now, l.target, l.pool
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
	l.health, l.retrying = health.Health{}, 0
	l.reclass()
}

// returned tells the health that nothing came of an attempt.
func (l *lane) returned(x *entry) {
	if x.target == l.target {
		l.health.Returned(x.mark)
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
