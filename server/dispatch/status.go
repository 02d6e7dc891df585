package dispatch

import (
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/dispatch/window"
)

// Status says how a lane stands.
type Status struct {
	// Open: attempts may start. Otherwise Reason says why not, in words for people, and Until when that ends by itself;
	// zero when it does not.
	Open   bool
	Reason string
	Until  time.Time
	// Parked: Reason is a plugin that was not ready when last an attempt went there. Until is when the next looks whether it is,
	// and what is in flight does.
	Parked bool
	// FailingSince is when the run of failures without a success began; zero when there is none.
	FailingSince time.Time
	// Disable is when the subscription is disabled if nothing succeeds until then; zero when it is not failing, or never.
	Disable time.Time
	// LastSuccess is when the target last took a delivery; zero when that was never or long ago.
	LastSuccess time.Time
	// Slow: the lane holds fewer slots, because its target hangs or takes long. Latency is how long attempts take, on a
	// moving average; 0 when that is not known.
	Slow    bool
	Latency time.Duration
	// Limit is how many attempts may be in flight, and LimitReason says in words for people what that is due to; 0 when there
	// is no subscription.
	Limit       int
	LimitReason string
	// Breaker is where the breaker stands; unless that is closed, BreakerSince is when it opened, BreakerReason says for
	// what, and NextProbe is when the next attempt may start, which has come when it is half open.
	Breaker                 health.BreakerState
	BreakerSince, NextProbe time.Time
	BreakerReason           string
	// Gathers is until when what waits in memory waits for others to be sent with, at most; zero without batching.
	Gathers time.Time
	// HostDown is since when the host is down that the lane shares with others, and HostProbe when one of them may look next
	// whether it is back, which has come while one looks; zero while it is not down, or the lane does not mind, because its own
	// last attempt there was answered.
	HostDown, HostProbe time.Time
	// InFlight attempts, and Waiting deliveries in memory; more may wait on disk.
	InFlight, Waiting int
	// OldestDue is the age of the oldest delivery that is due; see Engine.OldestDue.
	OldestDue time.Duration
}

// Status of a lane; of one that nothing is open in, too.
func (e *Engine) Status(key delivery.LaneKey) Status {
	now := e.now()
	l := e.peek(key)
	defer l.mu.Unlock()
	g, h := l.gate(now), &l.health
	s := Status{
		Open: g.open(), Reason: g.reason, Until: g.until,
		FailingSince: h.FailingSince(), LastSuccess: h.LastSuccess(),
		Slow: h.Standing() == suspect, Latency: h.Latency(),
		InFlight: l.inFlight(), Waiting: l.waiting(), OldestDue: l.oldestDue(now),
	}
	s.HostDown, s.HostProbe = l.hostState(now)
	var trip health.Trip
	if s.Breaker, s.BreakerSince, s.NextProbe, trip = h.Breaker(now); s.Breaker != health.BreakerClosed {
		s.BreakerReason = trip.String()
	}
	if g.open() && g.sub.Batching != nil {
		if lead := l.next(g.sub); lead != nil {
			s.Gathers = l.gathersUntil(g.sub, l.withRepeats(lead, g.sub), now)
		}
	}
	if g.sub != nil {
		most := maxInFlight(g.sub)
		s.Limit, s.LimitReason = h.Limit(most), h.LimitReason(most).String()
		if !s.FailingSince.IsZero() && g.sub.DisableAfter > 0 {
			s.Disable = s.FailingSince.Add(g.sub.DisableAfter)
		}
	}
	switch {
	case g.reason == closedBreaker:
		s.Reason = l.breakerWords(now)
	case g.hostDown:
		s.Reason = l.hostWords(now)
	case g.open() && h.Parked():
		s.Open, s.Reason = false, l.closed(health.ByPlugin)
	case g.open() && l.stranger(now):
		s.Open, s.Reason = false, closedStranger
	case g.open() && g.isolated && !l.health.Isolated():
		s.Open, s.Reason = false, l.hostWords(now)
	case g.open() && g.isolated:
		s.Open, s.Reason = false, l.breakerWords(now)
	}
	s.Parked = h.Parked() && s.Reason == l.closed(health.ByPlugin)
	return s
}

// peek returns the lane with its mutex held, or one that stands for it and knows what it has learnt.
func (e *Engine) peek(key delivery.LaneKey) *lane {
	if l := e.find(key); l != nil {
		return l
	}
	l := &lane{e: e, key: key, alarm: alarm{index: -1}}
	e.mu.RLock()
	l.health = e.healths[key]
	e.mu.RUnlock()
	l.mu.Lock()
	return l
}

// breakerWords says since when the breaker is open and why.
func (l *lane) breakerWords(now time.Time) string {
	state, since, _, why := l.health.Breaker(now)
	what := "breaker open since "
	if state == health.BreakerHalfOpen {
		what = "breaker half open, and the next attempt decides, since "
	}
	return what + since.UTC().Format(time.RFC3339) + " (" + why.String() + ")"
}

// hostWords says since when the host is down.
func (l *lane) hostWords(now time.Time) string {
	since, _ := l.hostState(now)
	return "host down since " + since.UTC().Format(time.RFC3339) + " (" + l.origin.name.Host + ": 5 attempts in a row of several subscriptions found no connection or timed out)"
}

// WaitReason says why a delivery that is due is not tried: why its lane is closed, and until when. It is empty while its lane is
// open, or the delivery is in flight, unless that means that it waits for a plugin that was not ready before.
func (e *Engine) WaitReason(id delivery.ID, key delivery.LaneKey) string {
	s := e.Status(key)
	switch {
	case s.Parked:
		return s.Reason
	case e.InFlight(id, key):
		return ""
	}
	if s.Reason == "" && e.heldBack(id, key) {
		return closedBudget
	}
	if s.Open && s.Gathers.After(e.now()) {
		return untilWords("waits for others to be sent with, at most", s.Gathers, false)
	}
	probe := s.Breaker == health.BreakerOpen && s.Until.Equal(s.NextProbe) || s.Until.Equal(s.HostProbe)
	return untilWords(s.Reason, s.Until, probe)
}

// heldBack reports whether a delivery waits for the budget of repeats.
func (e *Engine) heldBack(id delivery.ID, key delivery.LaneKey) bool {
	l := e.find(key)
	if l == nil {
		return false
	}
	defer l.mu.Unlock()
	x, sub := l.held[place{id.Seq, id.Partition}], e.subs.Subscription(key)
	if x == nil || sub == nil || x.stage != window.Waiting || !x.repeats() {
		return false
	}
	first := l.firstFree(&l.fresh, true) != nil || l.firstFree(&l.timers, false) != nil
	return !l.mayRepeat(first, sub)
}

func untilWords(reason string, until time.Time, probe bool) string {
	switch {
	case until.IsZero():
		return reason
	case probe:
		return reason + ", next probe " + until.UTC().Format(time.RFC3339)
	}
	return reason + " until " + until.UTC().Format(time.RFC3339)
}

// HeldBy says what holds a lane back that Open lifts: an open breaker, a pause that its receiver asked for, or a plugin that
// was not ready. It is empty when none does.
func (e *Engine) HeldBy(key delivery.LaneKey) string {
	l := e.peek(key)
	defer l.mu.Unlock()
	return l.heldBy(e.now())
}

func (l *lane) heldBy(now time.Time) string {
	why, until := l.health.Closed(now)
	since, probe := l.hostState(now)
	switch {
	case !since.IsZero() && (why == health.Open || why == health.ByBreaker):
		return untilWords(l.hostWords(now), probe, true)
	case l.health.Isolated():
		return untilWords(l.breakerWords(now), until, why == health.ByBreaker)
	case why == health.Open:
		return ""
	}
	return untilWords(l.closed(why), until, false)
}

// Open lifts what holds a lane back beside its subscription's state: a pause that its receiver asked for, a plugin that was
// not ready, and an open breaker is half open at once; so is that of a host that is down.
func (e *Engine) Open(key delivery.LaneKey) {
	l := e.lane(key)
	defer l.mu.Unlock()
	l.open(e.now())
	l.kick(e.now())
}

func (l *lane) open(now time.Time) {
	l.health.Open(now)
	l.openHost(now)
}
