package dispatch

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// lane is the queue of one subscription.
type lane struct {
	e   *Engine
	key delivery.LaneKey
	// queued says that the lane is on the ring.
	queued atomic.Bool

	// io is held while the lane's deliveries are read from the journal, and while a caller's change of
	// one of them is written: what was read cannot be out of date when it arrives in memory.
	io sync.Mutex
	// start is held from the last look at the snapshot until the attempt has been handed over. Changed
	// passes through it, so that no attempt to an old target starts after Changed has returned.
	start sync.Mutex

	mu    sync.Mutex
	parts []*part // by partition; nil where nothing was seen
	// fresh and retries wait, flying holds slots.
	fresh, retries, flying queue
	retryTurn              bool // the next one is a retry, if there is any
	running                bool // a goroutine is starting attempts and will look again before it leaves
	backlogs               int  // parts with a read position
	due                    int64
	queuedRead             bool // asked for a read
	readAt                 time.Time
	armed                  time.Time
	evicted                bool
	dirty                  bool

	// What keeps the lane closed, beside the subscription's state.
	closed    time.Time // no attempt before this
	park      time.Duration
	cancels   int  // CancelLane is at work
	disabling bool // Disable is at work
	sweepAt   time.Time

	limiter *rate.Limiter
	limit   float64
	// failing is when the run of failures without a success began.
	failing time.Time
	stats   *series
}

// lane returns the lane with its mutex held, and makes it when needed.
func (e *Engine) lane(key delivery.LaneKey) *lane {
	for {
		e.mu.RLock()
		l := e.lanes[key]
		e.mu.RUnlock()
		if l == nil {
			l = e.addLane(key)
		}
		l.mu.Lock()
		if !l.evicted {
			return l
		}
		l.mu.Unlock()
	}
}

func (e *Engine) addLane(key delivery.LaneKey) *lane {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.lanes[key]
	if l == nil {
		l = &lane{e: e, key: key}
		e.lanes[key] = l
	}
	return l
}

// allLanes is a copy: a lane's mutex must not be taken under the engine's.
func (e *Engine) allLanes() []*lane {
	e.mu.RLock()
	defer e.mu.RUnlock()
	all := make([]*lane, 0, len(e.lanes))
	for _, l := range e.lanes {
		all = append(all, l)
	}
	return all
}

// gate says whether attempts may start now. When not, until is when to look again; zero means that
// something else will call.
type gate struct {
	sub   *subscription.Subscription
	open  bool
	until time.Time
	// sweep: the lane is closed for so long that deliveries expire, or for good.
	sweep bool
}

func (l *lane) gate(now time.Time) gate {
	if l.e.stopping.Load() || l.cancels > 0 || l.disabling {
		return gate{}
	}
	sub := l.e.subs.Subscription(l.key.Namespace, l.key.Subscription)
	switch {
	case sub == nil || !active(sub):
		return gate{sub: sub, sweep: true}
	case now.Before(l.closed):
		return gate{sub: sub, until: l.closed}
	}
	return gate{sub: sub, open: true}
}

func active(sub *subscription.Subscription) bool {
	switch sub.Proto.GetState() {
	case grapnelv1.Subscription_STATE_PAUSED, grapnelv1.Subscription_STATE_DISABLED:
		return false
	}
	return true
}

// close keeps the lane from starting attempts until a time.
func (l *lane) closeUntil(now, until time.Time) {
	if until.After(l.closed) {
		l.closed = until
	}
	if until.Sub(now) > shedAfter {
		l.shed()
	}
}

const (
	// shedAfter is how long a lane may be closed and keep its window.
	shedAfter = 5 * time.Second
	// sweepEvery is how often a closed lane is looked through for what has expired.
	sweepEvery = time.Minute
	readJobs   = 512
	readBytes  = 1 << 20
)

// window is how much may wait in memory. It is wide while there is room, so that a burst need not be
// read back from disk, and narrow when all lanes together hold much.
func (l *lane) window(sub *subscription.Subscription) (jobs int, bytes int64) {
	used, total := l.e.memory.Load(), l.e.windowBytes
	least := 2 * maxInFlight(sub)
	switch {
	case used < total/2 && (sub == nil || sub.MaxRate == 0):
		return max(8192, least), min(8<<20, total-used)
	case used < total:
		return max(256, least), min(1<<20, total-used)
	}
	return 4, 16 << 10
}

func maxInFlight(sub *subscription.Subscription) int {
	if sub == nil || sub.MaxInFlight <= 0 {
		return 16
	}
	return sub.MaxInFlight
}

// kick starts what the lane's state calls for: a read from disk, an alarm, a place on the ring.
func (l *lane) kick(now time.Time) {
	e := l.e
	if !e.ready.Load() || e.stopping.Load() {
		return
	}
	work := l.fresh.n + l.retries.n
	if work == 0 && l.backlogs == 0 && l.due == 0 {
		return
	}
	g := l.gate(now)
	if !g.open {
		l.kickClosed(g, now)
		return
	}
	l.sweepAt = time.Time{}
	if !l.queuedRead && (l.wantsFIFO(g.sub, now) || l.wantsTimers(g.sub, now)) {
		l.queuedRead = true
		e.refills.push(l)
	}
	if work > 0 && !l.running && !l.full(g.sub) {
		e.ring.push(l)
	}
}

func (l *lane) kickClosed(g gate, now time.Time) {
	if !g.until.IsZero() {
		l.arm(g.until)
	}
	if !g.sweep || l.queuedRead {
		return
	}
	if l.sweepAt.IsZero() {
		l.shed()
		l.sweepAt = now
		if g.sub != nil {
			l.sweepAt = now.Add(sweepEvery)
		}
	}
	if l.sweepAt.After(now) {
		l.arm(l.sweepAt)
		return
	}
	l.queuedRead = true
	l.e.refills.push(l)
}

// wantsFIFO reports whether the window runs low and the disk has more.
func (l *lane) wantsFIFO(sub *subscription.Subscription, now time.Time) bool {
	if l.backlogs == 0 {
		return false
	}
	if now.Before(l.readAt) {
		l.arm(l.readAt)
		return false
	}
	jobs, bytes := l.window(sub)
	return l.fresh.n <= jobs/2 && l.fresh.bytes <= bytes/2
}

// wantsTimers reports whether timers are due and there is room for them.
func (l *lane) wantsTimers(sub *subscription.Subscription, now time.Time) bool {
	if l.due == 0 {
		return false
	}
	if l.due > now.UnixNano() {
		l.arm(fromWall(now, l.due))
		return false
	}
	jobs, _ := l.retryRoom(sub)
	return jobs > 0
}

// retryRoom is how many jobs of timers may come to memory.
func (l *lane) retryRoom(sub *subscription.Subscription) (jobs int, bytes int64) {
	jobs, bytes = l.window(sub)
	jobs, bytes = min(jobs, max(256, 2*maxInFlight(sub))), min(bytes, readBytes)
	if l.retries.n > jobs/2 || l.retries.bytes > bytes/2 {
		return 0, 0
	}
	return jobs - l.retries.n, bytes - l.retries.bytes
}

// arm asks for a kick at a time.
func (l *lane) arm(at time.Time) {
	if !l.armed.IsZero() && !at.Before(l.armed) {
		return
	}
	l.armed = at
	l.e.alarms.set(l, at)
}

// fromWall turns a wall clock time into one on the clock that now also carries, which never jumps.
func fromWall(now time.Time, nanos int64) time.Time {
	left := nanos - now.UnixNano()
	return now.Add(time.Duration(left))
}

// allow takes a token of the subscription's rate, or closes the lane until there is one.
func (l *lane) allow(sub *subscription.Subscription, now time.Time) bool {
	if sub.MaxRate <= 0 {
		l.limiter = nil
		return true
	}
	if l.limiter == nil || l.limit != sub.MaxRate {
		l.limit = sub.MaxRate
		l.limiter = rate.NewLimiter(rate.Limit(sub.MaxRate), max(1, int(math.Ceil(sub.MaxRate/10))))
	}
	r := l.limiter.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait == 0 {
		return true
	}
	r.CancelAt(now)
	l.closeUntil(now, now.Add(wait))
	return false
}
