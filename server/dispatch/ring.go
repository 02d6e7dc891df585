package dispatch

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// quantum is how many attempts a lane starts before the next lane has its turn. Fairness by cost
	// takes its place here: a lane would get a deficit to spend instead of a number of attempts.
	quantum = 8
	// inlineTurns bounds how long the goroutine that brought a result goes on with the lane.
	inlineTurns = 4
)

// ring holds the lanes that may have something to start, in the order of their turns. Each is on it at
// most once.
type ring struct {
	mu    sync.Mutex
	lanes []*lane // circular
	head  int
	n     int

	waiting atomic.Int64 // n, readable without the lock
	wake    chan struct{}
}

func (r *ring) push(l *lane) {
	if !l.queued.CompareAndSwap(false, true) {
		return
	}
	r.mu.Lock()
	if r.n == len(r.lanes) {
		bigger := make([]*lane, max(64, 2*r.n))
		copied := copy(bigger, r.lanes[r.head:])
		copy(bigger[copied:], r.lanes[:r.head])
		r.lanes, r.head = bigger, 0
	}
	r.lanes[(r.head+r.n)%len(r.lanes)] = l
	r.n++
	r.waiting.Store(int64(r.n))
	r.mu.Unlock()
	signal(r.wake)
}

func (r *ring) pop() *lane {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n == 0 {
		return nil
	}
	l := r.lanes[r.head]
	r.lanes[r.head] = nil
	r.head = (r.head + 1) % len(r.lanes)
	r.n--
	r.waiting.Store(int64(r.n))
	l.queued.Store(false)
	return l
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// overShare reports whether a lane that holds so many slots must not have another one. More than its
// share it gets only while less than half of the slots are in use, so that one slow receiver leaves the
// other half to all others. It goes on when one of its own attempts ends.
func (e *Engine) overShare(held int) bool {
	return held >= e.share && e.inFlight.Load() >= int64(e.slots/2)
}

// acquire takes a slot.
func (e *Engine) acquire() bool {
	for {
		used := e.inFlight.Load()
		if used >= int64(e.slots) {
			return false
		}
		if e.inFlight.CompareAndSwap(used, used+1) {
			return true
		}
	}
}

// release gives a slot back, and the next lane its turn.
func (e *Engine) release() {
	left := e.inFlight.Add(-1)
	if left == 0 && e.stopping.Load() {
		signal(e.drained)
		return
	}
	if e.ring.waiting.Load() > 0 {
		signal(e.ring.wake)
	}
}

// dispatch gives the lanes on the ring their turns until the engine stops. A lane that finds no slot
// goes back to the ring's end; who releases one wakes this loop.
func (e *Engine) dispatch() {
	for {
		select {
		case <-e.stopped:
			return
		case <-e.ring.wake:
		}
		for e.inFlight.Load() < int64(e.slots) && !e.stopping.Load() {
			l := e.ring.pop()
			if l == nil {
				break
			}
			l.mu.Lock()
			l.run(1)
			l.mu.Unlock()
		}
	}
}

// verdict is what becomes of a job at the head of its lane.
type verdict int

const (
	attempt verdict = iota
	expire
	orphan // its subscription is gone
)

func judge(j *delivery.Job, uid delivery.UID, gone bool, now time.Time) verdict {
	switch {
	case gone || j.SubscriptionUID != uid:
		return orphan
	case !j.Expire.IsZero() && now.After(j.Expire):
		return expire
	}
	return attempt
}

// step is how a job ends that is not tried.
func (v verdict) step() delivery.Step {
	if v == orphan {
		return delivery.Step{State: delivery.Cancelled, Reason: reasonDeleted}
	}
	return delivery.Step{State: delivery.Exhausted, Reason: reasonMaxAge}
}

const (
	reasonDeleted   = "subscription deleted"
	reasonMaxAge    = "max_age"
	reasonCancelled = "cancelled by a caller"
)

// batch is what one turn starts.
type batch struct {
	n       int
	entries [quantum]*entry
	verdict [quantum]verdict
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
		l.take(&b, time.Now())
		if b.n == 0 {
			break
		}
		l.mu.Unlock()
		l.start.Lock()
		for i := range b.n {
			l.begin(b.entries[i], b.verdict[i])
		}
		l.start.Unlock()
		l.mu.Lock()
		if l.e.ring.waiting.Load() > 0 {
			break
		}
	}
	l.running = false
	l.kick(time.Now())
}

// take picks the jobs of one turn. Breaker, adaptive limits and ordering keys are further reasons to
// stop here.
func (l *lane) take(b *batch, now time.Time) {
	g := l.gate(now)
	if !g.open {
		return
	}
	for b.n < quantum {
		x := l.next()
		if x == nil {
			return
		}
		v := judge(x.job, g.sub.UID, false, now)
		if v == attempt && !l.mayStart(g, now) {
			return
		}
		l.queueOf(x).remove(x)
		l.retryTurn = x.fifo()
		if x.fifo() {
			x.part.begun = max(x.part.begun, x.id.Seq)
		}
		if v == attempt {
			l.flying.push(x)
			x.state.Store(inFlight)
		} else {
			x.state.Store(settling)
		}
		b.entries[b.n], b.verdict[b.n] = x, v
		b.n++
	}
}

// next is the entry whose turn it is: fresh ones and retries alternate, so that neither waits for the
// other. A retry budget takes its place here.
func (l *lane) next() *entry {
	if l.retries.head != nil && (l.retryTurn || l.fresh.head == nil) {
		return l.retries.head
	}
	return l.fresh.head
}

// mayStart checks the limits and takes a slot.
func (l *lane) mayStart(g gate, now time.Time) bool {
	if l.full(g.sub) || !l.e.acquire() {
		return false
	}
	if !l.allow(g.sub, now) {
		l.e.release()
		return false
	}
	return true
}

// full reports whether the lane has to wait for one of its own attempts to end.
func (l *lane) full(sub *subscription.Subscription) bool {
	return l.flying.n >= maxInFlight(sub) || l.e.overShare(l.flying.n)
}

// begin hands an attempt over, or ends what must not be tried. l.start is held, l.mu is not.
func (l *lane) begin(x *entry, v verdict) {
	e := l.e
	if v != attempt {
		e.settleUntried(x, v)
		return
	}
	sub := e.subs.Subscription(l.key.Namespace, l.key.Subscription)
	if sub == nil || !active(sub) || sub.UID != x.job.SubscriptionUID {
		// It changed since the job was taken: back, for the next look to decide.
		l.giveBack(x)
		return
	}
	x.sub = sub
	x.started = time.Now()
	e.attempter.Attempt(sub, x.job, x)
}

// giveBack returns a job to the head of its queue, unless it was cancelled meanwhile.
func (l *lane) giveBack(x *entry) {
	l.mu.Lock()
	back := x.state.CompareAndSwap(inFlight, settling)
	if back {
		l.wait(x)
	}
	l.mu.Unlock()
	if back {
		l.e.release()
	} else if x.state.CompareAndSwap(cancelling, settling) {
		l.e.settleCancelled(x)
	}
}

// wait moves an entry that was to be tried back to where it waited.
func (l *lane) wait(x *entry) {
	l.flying.remove(x)
	l.queueOf(x).putBack(x)
	x.state.Store(waiting)
}
