package dispatch

import (
	"container/list"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/dispatch/window"
	"github.com/grapnel/grapnel/server/subscription"
)

// lane is the queue of one subscription.
type lane struct {
	e      *Engine
	key    delivery.LaneKey
	tenant *tenant

	// start is held from the last look at the snapshot until the attempt has been handed over. Changed
	// passes through it, so that no attempt to an old target starts after Changed has returned.
	start sync.Mutex
	// noting is held while it is written down since when the target has been failing.
	noting sync.Mutex

	mu sync.Mutex
	// parts are the windows that are not idle, sorted by partition; held is what they hold.
	parts []part
	held  map[place]*entry
	// fresh and timers wait, in the order of their rows; flying holds slots, in the order of their start; strays hold slots,
	// too, but fly to an older target, and say nothing about this one.
	fresh, timers, flying, strays queue
	// orders are the ordering keys of which an attempt is in flight; nil while there are none.
	orders    map[delivery.OrderKey]int
	bytes     int64 // of all that is held
	timerTurn bool  // the next one is a timer, if there is any
	running   bool  // a goroutine is starting attempts and will look again before it leaves
	// reading: the lane waits for a read, or for room for one, or is being read.
	reading bool
	readAt  time.Time // no read before this
	sweepAt time.Time // when a closed lane is to be looked through; zero while it is open
	idle    time.Time // since when nothing is open; zero while something is
	evicted bool

	// What keeps the lane closed, beside the subscription's state and its health.
	cancels   int  // CancelLane is at work
	disabling bool // Disable is at work

	health    health.Health
	standing  standing     // of the health, as slots and budget know it
	retrying  int          // attempts among flying that are repeats
	born      atomic.Int64 // when its subscription was created, in nanoseconds since 1970
	target    uint32       // rises when the target changes: ends of older attempts say nothing about it
	pool      *pool        // of its plugin; nil where that has no bound of its own
	poolAt    time.Time
	pacer     *pacer // nil: its subscription has no max_rate
	gathering gathering
	origin    *origin
	originOf  *subscription.Subscription // that it was looked up for
	guest     bool                       // it may wait for its turn at the origin, or be called
	relieved  time.Time                  // when the host was up again for which its own breaker has given way
	series    *series

	// Places in queues of the engine.
	queued   [standings]atomic.Bool       // on the ring, among those of a standing
	inPool   atomic.Pointer[list.Element] // its place in the queue of a pool, a waiter; nil: it has none
	seats    [standings]seat[*lane]       // ring.mu
	hungry   bool                         // budget.mu, and so the next one
	hungryAs standing
	alarm    alarm // alarms.mu
	// Its place among those of its namespace that wait at the origin, counted from 1, below 0 of those that wait again; 0: it
	// does not. looked: it has been called there. Both origin.mu.
	atHost int
	looked bool
}

// part is a lane's window of one partition.
type part struct {
	number uint16
	window.Window
}

// idleFor is how long a lane is kept that has nothing to do.
const idleFor = 10 * time.Second

// lane returns the lane with its mutex held, and makes it when needed.
func (e *Engine) lane(key delivery.LaneKey) *lane {
	for {
		if l := e.find(key); l != nil {
			return l
		}
		e.mu.Lock()
		if e.lanes[key] == nil {
			l := &lane{e: e, key: key, health: e.healths[key], alarm: alarm{index: -1}, tenant: e.tenants[key.Namespace]}
			if l.tenant == nil {
				l.tenant = newTenant(key.Namespace)
				e.tenants[key.Namespace] = l.tenant
			}
			l.tenant.lanes++
			for st := range l.seats {
				l.seats[st].of = l
			}
			l.standing = l.health.Standing()
			delete(e.healths, key)
			e.lanes[key] = l
		}
		e.mu.Unlock()
	}
}

// find returns the lane with its mutex held, or nil when there is none.
func (e *Engine) find(key delivery.LaneKey) *lane {
	for {
		e.mu.RLock()
		l := e.lanes[key]
		e.mu.RUnlock()
		if l == nil {
			return nil
		}
		l.mu.Lock()
		if !l.evicted {
			return l
		}
		l.mu.Unlock()
	}
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

// rest drops the lane when nothing has been open in it for a while. What it has learnt is kept apart.
func (l *lane) rest(now time.Time) {
	if l.idle.IsZero() {
		l.idle = now
	}
	if wait := l.idle.Add(idleFor); now.Before(wait) {
		l.arm(wait)
		return
	}
	e := l.e
	l.leaveOrigin(now)
	keep := !l.health.Worthless(now) && !e.subs.Deleted(l.key)
	l.evicted = true
	e.alarms.remove(l)
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.lanes, l.key)
	if l.tenant.lanes--; l.tenant.lanes == 0 {
		delete(e.tenants, l.key.Namespace)
	}
	if keep && (len(e.healths) < maxHealths || !l.health.FailingSince().IsZero()) {
		e.healths[l.key] = l.health
	}
}

// maxHealths bounds what is kept of lanes that are not failing.
const maxHealths = 32_768

// busy reports whether something is open or under way.
func (l *lane) busy() bool {
	for st := range l.queued {
		if l.queued[st].Load() {
			return true
		}
	}
	return len(l.parts) > 0 || l.inFlight() > 0 || l.running || l.reading || l.cancels > 0 || l.disabling
}

// window returns the window of a partition. It is valid until the lane's parts change.
func (l *lane) window(partition uint16) *window.Window {
	i, ok := l.partAt(partition)
	if !ok {
		l.parts = slices.Insert(l.parts, i, part{number: partition})
		l.idle = time.Time{}
	}
	return &l.parts[i].Window
}

func (l *lane) partAt(partition uint16) (int, bool) {
	for i := range l.parts { // there are few
		if n := l.parts[i].number; n >= partition {
			return i, n == partition
		}
	}
	return len(l.parts), false
}

// tidy throws the window of a partition away when it is idle.
func (l *lane) tidy(partition uint16) {
	if i, ok := l.partAt(partition); ok && l.parts[i].Idle() {
		l.parts = slices.Delete(l.parts, i, i+1)
		if len(l.parts) == 0 {
			l.held = nil
		}
	}
}

// heldIn looks up what is held of a partition.
func (l *lane) heldIn(partition uint16) window.Held {
	return func(seq uint64) (delivery.Row, window.Stage, bool) {
		x := l.held[place{seq, partition}]
		if x == nil {
			return delivery.Row{}, 0, false
		}
		return x.Row(), x.stage, true
	}
}

// admit takes a job to memory that its window has taken, and whose event is held. near is nil or an entry that was
// admitted before it, of the same read.
func (l *lane) admit(j *delivery.Job, near *entry, now time.Time) *entry {
	x := &entry{Job: *j, lane: l, at: momentOf(now), weight: weight(j.Event)}
	if l.held == nil {
		l.held = make(map[place]*entry)
	}
	l.held[x.place()] = x
	l.charge(1, x.size())
	l.queueOf(x).add(x, near)
	l.joins(x)
	return x
}

// forget gives up an entry that stands in no queue any more and that its window holds no more.
func (l *lane) forget(x *entry) {
	x.gone = true
	if delete(l.held, x.place()); len(l.held) == 0 {
		l.held = nil // a map keeps the room that it has had
	}
	l.e.journal.Release(x.Event)
	l.charge(-1, -x.size())
}

// queueOf is where a waiting entry stands.
func (l *lane) queueOf(x *entry) *queue {
	if x.Kind == delivery.FIFO {
		return &l.fresh
	}
	return &l.timers
}

func (l *lane) inFlight() int { return l.flying.n + l.strays.n }

func (l *lane) waiting() int { return l.fresh.n + l.timers.n }

// shed gives what waits in memory back to the disk, the last ones first.
func (l *lane) shed() {
	for _, q := range []*queue{&l.timers, &l.fresh} {
		for x := q.tail; x != nil; x = q.tail {
			q.remove(x)
			l.window(x.ID.Partition).Shed(x.Row())
			l.forget(x)
		}
	}
}

// reclass follows the lane's health: what it holds counts for its new standing. What it may no longer hold waiting goes
// back to the disk.
func (l *lane) reclass() {
	is := l.health.Standing()
	if is == l.standing {
		return
	}
	was, b := l.standing, &l.e.budget
	l.e.slots.count(l, -int64(l.flying.n))
	l.standing = is
	l.e.slots.count(l, int64(l.flying.n))
	l.repooled(was, is)
	switch {
	case was == proven:
		b.slow.Add(l.bytes)
	case is == proven:
		b.slow.Add(-l.bytes)
	}
	if is == suspect && b.slow.Load() > b.limit/4 {
		l.shed()
	}
	// Others may have waited for what the lane no longer holds on trial.
	signal(l.e.ring.wake)
	if l.sated() {
		l.reading = false
	}
}

// gate says whether attempts may start now, and if not, why. until is when to look again; zero means that
// something else will call.
type gate struct {
	sub    *subscription.Subscription
	reason string
	until  time.Time
	// lasting: closed for so long that deliveries expire.
	lasting bool
	// isolated: the breaker is open, or half open, or the host is down.
	isolated bool
	// hostDown: its host is down for several lanes, and another one looks whether it is back.
	hostDown bool
	deleted  bool
}

func (g gate) open() bool { return g.reason == "" }

// expires reports whether deliveries may expire behind the first ones unseen.
func (g gate) expires() bool { return g.lasting || g.isolated }

// Why a lane is closed, for people.
const (
	closedStopping   = "the server stops"
	closedCancelling = "its deliveries are being cancelled"
	closedDisabling  = "its subscription is being disabled"
	closedAbsent     = "parked: its subscription is not in the configuration"
	closedDeleted    = "its subscription is deleted"
	closedPaused     = "its subscription is paused"
	closedDisabled   = "its subscription is disabled"
	closedRate       = "its subscription's max_rate is reached"
	closedTarget     = "its target asked for a pause (Retry-After)"
	closedBreaker    = "breaker open"
	closedHost       = "host down"
	closedBudget     = "its receiver's budget for repeats is spent: while first attempts wait a fifth of what starts are repeats, and else they hold a fifth of the limit"
	closedStranger   = "its host has not answered lately, and few attempts go there at a time"
	closedPlugin     = "parked: its plugin is not ready"
	closedWaits      = "parked: "
)

func (l *lane) gate(now time.Time) gate {
	switch {
	case l.e.stopping.Load():
		return gate{reason: closedStopping}
	case l.cancels > 0:
		return gate{reason: closedCancelling}
	case l.disabling:
		return gate{reason: closedDisabling}
	}
	sub := l.e.subs.Subscription(l.key)
	if sub == nil {
		if l.e.subs.Deleted(l.key) {
			return gate{reason: closedDeleted, lasting: true, deleted: true}
		}
		return gate{reason: closedAbsent, lasting: true}
	}
	if reason := l.closedBy(sub); reason != "" {
		return gate{sub: sub, reason: reason, lasting: true}
	}
	g := gate{sub: sub, isolated: l.health.Isolated()}
	why, until := l.health.Closed(now)
	down, probe, turn := l.hostDown(now)
	switch {
	case down && (why == health.Open || why == health.ByBreaker && l.health.Unconnected()):
		g.reason, g.until, g.isolated, g.hostDown = closedHost, probe, true, true
	case why != health.Open:
		g.reason, g.until = l.closed(why), until
	case l.pacer != nil && now.Before(l.pacer.until):
		g.reason, g.until = closedRate, l.pacer.until
	}
	g.isolated = g.isolated || turn
	return g
}

// closedBy is why the state of a subscription, or of what is above it, closes its lane, or empty.
func (l *lane) closedBy(sub *subscription.Subscription) string {
	if reason := l.e.subs.Closed(l.key); reason != "" {
		return reason
	}
	switch sub.State {
	case grapnelv1.Subscription_STATE_PAUSED:
		return closedPaused
	case grapnelv1.Subscription_STATE_DISABLED:
		return closedDisabled
	}
	return ""
}

// closed is what a closure is called.
func (l *lane) closed(why health.Closure) string {
	switch why {
	case health.ByTarget:
		return closedTarget
	case health.ByDisable:
		return closedDisabling
	case health.ByBreaker:
		return closedBreaker
	}
	if waits := l.health.Waits(); waits != "" {
		return closedWaits + waits
	}
	return closedPlugin
}

const (
	// shedAfter is how long a lane may be closed and keep what it has in memory.
	shedAfter = 5 * time.Second
	// sweepEvery is how often a closed lane is looked through, at most, for what has expired, and sweepLatest at least.
	sweepEvery  = time.Minute
	sweepLatest = time.Hour
)

// kick starts what the lane's state calls for: a read from disk, an alarm, a place on the ring. l.mu is held.
func (l *lane) kick(now time.Time) {
	e := l.e
	if !e.ready.Load() || e.stopping.Load() || l.evicted {
		return
	}
	if !l.busy() {
		l.goOn(now)
		l.rest(now)
		return
	}
	l.idle = time.Time{}
	l.look(now)
	l.relieve(now)
	g := l.gate(now)
	if g.sub != nil && g.sub != l.originOf {
		l.born.Store(g.sub.CreateTime().UnixNano())
		l.lookOrigin(g.sub, now)
		g = l.gate(now)
	}
	if g.sub != nil {
		l.lookPool(g.sub, now)
	}
	switch {
	case !g.hostDown:
	case l.crowded(now): // a turn at the host would be lost on it
		l.goOn(now)
		l.queueUp(now)
	case l.queueAtHost(now):
		l.relieve(now)
		g = l.gate(now)
	}
	if !g.open() {
		if !g.hostDown {
			l.goOn(now)
			l.shutsAlone()
		}
		l.kickClosed(g, now)
		return
	}
	if !g.isolated {
		l.sweepAt = time.Time{}
	}
	l.wantRead(g, now)
	if l.running {
		return
	}
	if l.full(g.sub) || l.next(g.sub) == nil || g.sub.Batching != nil && l.gathers(g, now) {
		if !l.reading {
			l.goOn(now)
		}
		return
	}
	if l.crowded(now) {
		l.goOn(now)
		l.queueUp(now)
		return
	}
	if l.queueAtHost(now) {
		e.ring.push(l)
	}
}

// look judges the lane by what it has in flight.
func (l *lane) look(now time.Time) {
	if l.flying.n > 0 {
		if at := l.health.Look(l.flying.head.at.time(), now); !at.IsZero() {
			l.arm(at)
		}
	}
	l.reclass()
}

func (l *lane) kickClosed(g gate, now time.Time) {
	if !g.until.IsZero() && !g.hostDown {
		l.arm(g.until)
		if g.isolated || g.until.Sub(now) > shedAfter {
			l.shed()
		}
	}
	if !g.expires() {
		return
	}
	l.shed()
	switch {
	case g.deleted && (l.first(delivery.FIFO) != nil || l.first(delivery.Timer) != nil):
		l.e.graves.add(l.key)
	case g.lasting && g.sub == nil: // nobody tells when the deletion of one that is not there is seen
		l.arm(now.Add(sweepEvery))
	}
	switch {
	case l.reading:
	case l.sweepAt.IsZero():
		l.sweepAt = now.Add(sweepEvery)
		l.arm(l.sweepAt)
	case l.sweepAt.After(now):
		l.arm(l.sweepAt)
	default:
		l.reading = true
		l.e.reads.push(l)
	}
}

// full reports whether the lane has to wait for one of its own attempts to end.
func (l *lane) full(sub *subscription.Subscription) bool {
	if l.health.Full(l.flying.n, maxInFlight(sub)) {
		return true
	}
	share := l.e.slots.share(&l.health, l.standing, sub)
	if l.pool != nil {
		share = min(share, l.pool.share(&l.health, l.standing, sub))
	}
	return l.flying.n >= share
}

// arm asks for a kick at a time.
func (l *lane) arm(at time.Time) { l.e.alarms.set(l, at) }

// allow takes a start of the subscription's rate, or closes the lane until there is one.
func (l *lane) allow(sub *subscription.Subscription, now time.Time) bool {
	if sub.MaxRate <= 0 {
		l.pacer = nil
		return true
	}
	if l.pacer == nil {
		l.pacer = &pacer{}
	}
	return l.pacer.take(sub.MaxRate, now)
}
