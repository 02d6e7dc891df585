package dispatch

import (
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// turnFor is how long the lane may take that is called to start an attempt, before the next one is.
	turnFor = 250 * time.Millisecond
	// answerStep is how exactly it is known when a host has last answered that is well.
	answerStep = time.Millisecond
)

// origins are the hosts that lanes deliver to, each as long as one of them does.
type origins struct {
	mu  sync.Mutex
	all map[subscription.Origin]*origin
}

// origin is a host, with what its lanes have learnt of it. Lanes whose own last attempt was answered pass by; the others
// are admitted, and wait for their turn where they are not. Whoever is called has a moment to start, so that nobody keeps the
// others waiting who cannot. While lanes wait, one of them has an alarm for the time from which it may be its turn, unless
// that is when a probe ends.
type origin struct {
	name subscription.Origin
	refs int // origins.mu

	// calm: nothing is held against the host. Answers are then just noted in answered, nanoseconds since 1970.
	calm     atomic.Bool
	answered atomic.Int64

	mu     sync.Mutex
	health health.Origin
	guests map[delivery.NamespaceKey]*guests
	// waiting are those of them with lanes that wait, next the lane of them that is next, once it is chosen.
	waiting []*guests
	next    *lane
	turn    int // where among waiting the last one was chosen
	// flying are the attempts in flight of lanes that were admitted, busy the namespaces that have some.
	flying, busy int
	called       *lane
	calledUntil  time.Time
	// shut are the lanes whose own breakers opened for want of a connection while it was not known to be down.
	shut map[*lane]struct{}
}

// guests are the lanes of one namespace at an origin.
type guests struct {
	key    delivery.NamespaceKey
	flying int
	// waiting are lanes that wait for their first turn, or their next since all had one, again the others that wait.
	waiting, again []*lane
	place          int // among those of the origin with lanes that wait
}

// visit is what an attempt has of its origin from start to end.
type visit struct {
	origin *origin // nil: none, or told
	entry  health.Entry
	era    uint32
}

func (os *origins) join(name subscription.Origin) *origin {
	if name == (subscription.Origin{}) {
		return nil
	}
	os.mu.Lock()
	defer os.mu.Unlock()
	o := os.all[name]
	if o == nil {
		o = &origin{name: name}
		if os.all == nil {
			os.all = make(map[subscription.Origin]*origin)
		}
		os.all[name] = o
	}
	o.refs++
	return o
}

func (os *origins) leave(o *origin) {
	os.mu.Lock()
	defer os.mu.Unlock()
	if o.refs--; o.refs == 0 {
		delete(os.all, o.name)
	}
}

// states counts them by the state of their breaker.
func (os *origins) states(now time.Time) (n [health.BreakerHalfOpen + 1]int) {
	os.mu.Lock()
	n[health.BreakerClosed] = len(os.all)
	all := make([]*origin, 0, len(os.all))
	for _, o := range os.all {
		if !o.calm.Load() {
			all = append(all, o)
		}
	}
	os.mu.Unlock()
	for _, o := range all {
		o.mu.Lock()
		s, _, _ := o.health.State(now)
		o.mu.Unlock()
		n[health.BreakerClosed]--
		n[s]++
	}
	return n
}

// lookOrigin follows the subscription: another target may be on another host. l.mu is held.
func (l *lane) lookOrigin(sub *subscription.Subscription, now time.Time) {
	if sub == l.originOf {
		return
	}
	l.originOf = sub
	name := sub.Origin()
	if l.origin != nil && l.origin.name == name {
		return
	}
	l.leaveOrigin(now)
	l.origin = l.e.origins.join(name)
}

// leaveOrigin has the lane be none of its origin's any more. l.mu is held.
func (l *lane) leaveOrigin(now time.Time) {
	if o := l.origin; o != nil {
		l.goOn(now)
		o.mu.Lock()
		l.looked = false
		delete(o.shut, l)
		o.mu.Unlock()
		l.e.origins.leave(o)
		l.origin = nil
	}
}

// asks is the origin that has to admit the lane's next attempt; nil: none has. l.mu is held.
func (l *lane) asks() *origin {
	if o := l.origin; o != nil && !l.health.Reached() && !o.calm.Load() {
		return o
	}
	return nil
}

// hostDown reports whether the lane's host is down and it is not the lane's turn to look whether it is back; until is when
// the next turn is, zero while a probe is in flight. turn: it is the lane's. l.mu is held.
func (l *lane) hostDown(now time.Time) (down bool, until time.Time, turn bool) {
	o := l.asks()
	if o == nil {
		return false, time.Time{}, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.health.Down(l.key.Namespace) {
		return false, time.Time{}, false
	}
	if o.called == l && o.admit(l, now) != health.Stay {
		return false, time.Time{}, true
	}
	return true, o.health.NextProbe(), false
}

// queueAtHost has the lane wait for its turn at its host, and reports whether that has come at once. l.mu is held.
func (l *lane) queueAtHost(now time.Time) bool {
	o := l.asks()
	if o == nil {
		l.goOn(now)
		return true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch e := o.mayEnter(l, now); {
	case o.calm.Load(), e == health.Enter, e == health.Probe && o.called == l:
		return true
	}
	l.guest = true
	if o.called == l { // another one has passed by meanwhile
		o.called = nil
	}
	if l.atHost == 0 {
		o.add(l)
	}
	o.serve(l, now)
	return o.called == l
}

// goOn has the lane not wait for its turn at its host any more: it has nothing to start. l.mu is held.
func (l *lane) goOn(now time.Time) {
	if !l.guest {
		return
	}
	o := l.origin
	o.mu.Lock()
	defer o.mu.Unlock()
	l.guest = false
	o.remove(l)
	o.serve(nil, now)
}

// hostState is since when the lane's host is down for it, and when the next probe may start; zero when it is not. l.mu is
// held.
func (l *lane) hostState(now time.Time) (since, probe time.Time) {
	o := l.asks()
	if o == nil {
		return since, probe
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.health.Down(l.key.Namespace) {
		_, since, probe = o.health.State(now)
	}
	return since, probe
}

// stranger reports whether the lane waits for others' attempts at its host. l.mu is held.
func (l *lane) stranger(now time.Time) bool {
	o := l.asks()
	if o == nil || !l.guest {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return l.atHost != 0 && o.admit(l, now) == health.Stay
}

// relieve has a breaker that is open for want of a connection give way to what the host's lanes have found out together.
// l.mu is held.
func (l *lane) relieve(now time.Time) {
	o := l.origin
	if o == nil || !l.health.Unconnected() {
		return
	}
	o.mu.Lock()
	called, shut := o.called == l, o.health.Shut()
	o.mu.Unlock()
	if _, since, _, _ := l.health.Breaker(now); called || shut.After(since) && shut.After(l.relieved) {
		l.relieved = laterOf(l.relieved, shut)
		l.health.Relieve(now)
	}
}

// shutsAlone has a lane that is closed by its own breaker be told when its host is down: it is looked for together from then
// on, and waits no longer than that takes. l.mu is held.
func (l *lane) shutsAlone() {
	o := l.origin
	if o == nil || !l.health.Unconnected() {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.shut == nil {
		o.shut = make(map[*lane]struct{})
	}
	o.shut[l] = struct{}{}
}

// openHost has the lane's host be looked at now, by this lane, if it is down. l.mu is held.
func (l *lane) openHost(now time.Time) {
	if sub := l.e.subs.Subscription(l.key); sub != nil {
		l.lookOrigin(sub, now)
	}
	o := l.asks()
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.health.Down(l.key.Namespace) {
		return
	}
	o.health.Open(now)
	l.guest = true
	o.remove(l)
	o.call(l, now)
	l.e.alarms.set(l, now)
}

// visit lets an attempt in, if it may start. l.mu is held.
func (l *lane) visit(now time.Time) (visit, bool) {
	v := visit{origin: l.origin}
	o := l.asks()
	if o == nil {
		return v, true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.calm.Load() {
		return v, true
	}
	if v.entry = o.mayEnter(l, now); v.entry == health.Stay {
		return visit{}, false
	}
	v.era = o.health.Started(v.entry, now)
	g := o.guestsOf(l.key.Namespace)
	if g.flying++; g.flying == 1 {
		o.busy++
	}
	o.flying++
	l.guest = false
	o.remove(l)
	o.serve(nil, now)
	return v, true
}

// left counts an attempt that was let in no more.
func (o *origin) left(ns delivery.NamespaceKey) {
	g := o.guests[ns]
	if g.flying--; g.flying == 0 {
		o.busy--
		o.tidy(g)
	}
	o.flying--
}

// returned tells the host that nothing came of an attempt.
func (v *visit) returned(ns delivery.NamespaceKey, now time.Time) {
	o := v.origin
	v.origin = nil
	if o == nil || v.entry == health.Stay {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if v.entry == health.Probe {
		o.health.Returned(v.era)
	}
	o.left(ns)
	o.serve(nil, now)
}

// ended tells the host how an attempt ended, and reports whether it is down since.
func (v *visit) ended(key delivery.LaneKey, r *delivery.Result, started, now time.Time) (down bool) {
	o := v.origin
	v.origin = nil
	if o == nil {
		return false
	}
	s := health.HostSignal(r)
	silent := s == health.TimedOut || s == health.Unreachable
	if v.entry == health.Stay {
		switch at := o.answered.Load(); {
		case s == health.Ignored || s == health.Forbidden, silent && started.UnixNano() <= at:
			return false
		case !silent && o.calm.Load():
			if n := now.UnixNano(); n-at > int64(answerStep) {
				o.answered.Store(n)
			}
			return false
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if at := o.answered.Load(); at > 0 {
		o.health.Answered(time.Unix(0, at))
	}
	down, _ = o.health.Ended(&health.Meeting{
		Lane: key, Entry: v.entry, Era: v.era, Signal: s, Started: started, Random: rand.Float64(),
	}, now)
	if !silent && s != health.Ignored && s != health.Forbidden {
		o.answered.Store(now.UnixNano())
	}
	if v.entry != health.Stay {
		o.left(key.Namespace)
	}
	if down { // who waits has it in memory no more
		for _, g := range o.waiting {
			for _, l := range slices.Concat(g.waiting, g.again) {
				l.e.alarms.set(l, now)
			}
		}
		for l := range o.shut {
			l.e.alarms.set(l, now)
		}
		o.shut = nil
	}
	o.calm.Store(o.health.Calm() && len(o.waiting) == 0 && o.called == nil)
	o.serve(nil, now)
	return down
}

// What follows is called with o.mu held.

func (o *origin) guestsOf(ns delivery.NamespaceKey) *guests {
	g := o.guests[ns]
	if g == nil {
		g = &guests{key: ns}
		if o.guests == nil {
			o.guests = make(map[delivery.NamespaceKey]*guests)
		}
		o.guests[ns] = g
	}
	return g
}

func (o *origin) tidy(g *guests) {
	if g.flying == 0 && g.wait() == 0 {
		delete(o.guests, g.key)
	}
}

// admit is what the host's health says to another attempt of a lane.
func (o *origin) admit(l *lane, now time.Time) health.Entry {
	p := health.Party{Space: l.key.Namespace, Flying: o.flying, Spaces: o.busy}
	if g := o.guests[p.Space]; g != nil {
		p.Own = g.flying
	}
	return o.health.Admit(p, now)
}

// mayEnter is admit for a lane that does not overtake others: only one whose namespace has nothing in flight passes by
// those that wait.
func (o *origin) mayEnter(l *lane, now time.Time) health.Entry {
	e := o.admit(l, now)
	if o.called == l || o.called == nil && len(o.waiting) == 0 {
		return e
	}
	if g := o.guests[l.key.Namespace]; e == health.Enter && (g == nil || g.flying == 0) {
		return e
	}
	return health.Stay
}

func (o *origin) add(l *lane) {
	g := o.guestsOf(l.key.Namespace)
	if g.wait() == 0 {
		g.place = len(o.waiting)
		o.waiting = append(o.waiting, g)
	}
	if l.looked {
		g.again = append(g.again, l)
		l.atHost = -len(g.again)
	} else {
		g.waiting = append(g.waiting, l)
		l.atHost = len(g.waiting)
		if g.flying == 0 || o.next != nil && o.next.key.Namespace == g.key {
			o.next = l
		}
	}
}

// wait is how many lanes wait.
func (g *guests) wait() int { return len(g.waiting) + len(g.again) }

// remove takes a lane out of those that wait, or that are called.
func (o *origin) remove(l *lane) {
	if o.called == l {
		o.called = nil
	}
	if o.next == l {
		o.next = nil
	}
	if l.atHost == 0 {
		return
	}
	g := o.guests[l.key.Namespace]
	from, at := &g.waiting, l.atHost
	if at < 0 {
		from, at = &g.again, -at
	}
	last := len(*from) - 1
	moved := (*from)[last]
	(*from)[at-1], moved.atHost = moved, l.atHost
	(*from)[last], *from = nil, (*from)[:last]
	l.atHost = 0
	if g.wait() > 0 {
		return
	}
	last = len(o.waiting) - 1
	o.waiting[g.place], o.waiting[last].place = o.waiting[last], g.place
	o.waiting[last], o.waiting = nil, o.waiting[:last]
	g.waiting, g.again = nil, nil
	o.tidy(g)
}

// pick chooses who is next of those that wait, if any do: namespace after namespace, so that the many of one do not keep
// others waiting, and of its lanes the newest, so that those do not which came first and hang, but none again before all
// others. One that comes has its turn next, unless its namespace has attempts in flight and another's turn it is.
//
// Those for whom the host is not down do not wait behind others' probe. It is down for fewer than health.Witnesses, or for all.
func (o *origin) pick() *lane {
	if len(o.waiting) == 0 || o.next != nil && !o.health.Down(o.next.key.Namespace) {
		return o.next
	}
	var g *guests
	for range min(len(o.waiting), health.Witnesses) {
		o.turn = (o.turn + 1) % len(o.waiting)
		if g = o.waiting[o.turn]; !o.health.Down(g.key) {
			break
		}
	}
	if o.next != nil && o.health.Down(g.key) {
		return o.next
	}
	if len(g.waiting) == 0 {
		g.waiting, g.again = g.again, nil
		for _, l := range g.waiting {
			l.atHost = -l.atHost
		}
	}
	o.next = g.waiting[len(g.waiting)-1]
	return o.next
}

// serve calls the next lane when it may start, and sees to it that it has its alarm. The one that looks itself, if any, needs
// none: woken once more, it would ask for its turn at once again where it had nothing to start.
func (o *origin) serve(looks *lane, now time.Time) {
	if o.called != nil && !now.Before(o.calledUntil) {
		o.called = nil
	}
	l := o.pick()
	switch {
	case l == nil:
	case o.called != nil:
		l.e.alarms.set(l, o.calledUntil)
	case o.admit(l, now) != health.Stay:
		o.remove(l)
		if o.call(l, now); l != looks {
			l.e.alarms.set(l, now)
		}
	case !o.health.Down(l.key.Namespace):
		l.e.alarms.set(l, o.health.NextEntry(o.flying))
	default:
		if probe := o.health.NextProbe(); !probe.IsZero() {
			l.e.alarms.set(l, probe)
		}
	}
}

// call gives a lane that does not wait any more its turn.
func (o *origin) call(l *lane, now time.Time) {
	o.called, o.calledUntil, l.looked = l, now.Add(turnFor), true
	if next := o.pick(); next != nil {
		next.e.alarms.set(next, o.calledUntil)
	}
}
