package dispatch

import (
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/subscription"
)

// IncidentKind is what has happened in a lane.
type IncidentKind uint8

// Kinds of incidents.
const (
	// Failing: the receiver fails, which is told once a run of failures, or is about to have its subscription disabled.
	Failing IncidentKind = iota + 1
	// Recovered: a receiver of which Failing was told has taken a delivery.
	Recovered
	// Disabled: the subscription has been disabled by its failure policy, after a run of failures that were not all of
	// operational events.
	Disabled
	// GivenUp: a delivery has ended without success, or is about to have.
	GivenUp
)

// Incident is something that has happened in a lane and that its operators may want to hear of. What comes of the
// delivery of an operational event is none, lest telling of it make the next.
type Incident struct {
	Kind         IncidentKind
	Subscription *subscription.Subscription
	Time         time.Time
	// Reason is for people. It may hold what a receiver has said, without secrets.
	Reason string
	// FailingSince is when the run of failures began, of Failing and Recovered; zero where that is not known. DisableTime is
	// when the subscription is disabled if nothing succeeds; zero: never.
	FailingSince, DisableTime time.Time
	// Outcome and ResponseCode are those of the attempt, of Failing.
	Outcome      delivery.Outcome
	ResponseCode int
	// Delivery and State are those of GivenUp.
	Delivery delivery.ID
	State    delivery.State
}

// Why a receiver counts as failing, for people.
const (
	failingBreaker = "breaker open"
	failingLong    = "no success for some minutes"
	failingHalf    = "no success for half of the time after which the subscription is disabled"
)

// quiet reports whether what comes of an attempt is not told: all that it carries are operational events.
func (x *entry) quiet() bool {
	if !x.carries() {
		return subscription.Operational(x.Event.Type)
	}
	for _, p := range x.parcel.all {
		if !subscription.Operational(p.Event.Type) {
			return false
		}
	}
	return true
}

// tellHealth tells what an attempt says of the receiver. No lock is held.
func (x *entry) tellHealth(v health.Verdict, a *delivery.Attempt, now time.Time) {
	l, sub := x.lane, x.sub
	if l.e.tell == nil || !v.Failing && !v.Recovered && !v.Warn {
		return
	}
	in := Incident{Kind: Recovered, Subscription: sub, Time: now, FailingSince: v.Since}
	if !v.Recovered {
		l.mu.Lock()
		since, open := l.health.FailingSince(), l.health.Isolated()
		l.mu.Unlock()
		in.Kind, in.Outcome, in.ResponseCode, in.Reason = Failing, a.Outcome, a.ResponseCode, failingLong
		switch {
		case v.Warn:
			in.Reason = failingHalf
		case open:
			in.Reason = failingBreaker
		}
		if in.FailingSince = since; sub.DisableAfter > 0 && !since.IsZero() {
			in.DisableTime = since.Add(sub.DisableAfter)
		}
	}
	l.e.tell(in)
}

// tellEnd tells of a delivery that is given up. No lock of a lane is held.
func (e *Engine) tellEnd(sub *subscription.Subscription, job *delivery.Job, step delivery.Step, now time.Time) {
	if step.State != delivery.Exhausted && step.State != delivery.Rejected {
		return
	}
	if e.tell == nil || sub == nil || subscription.Operational(job.Event.Type) {
		return
	}
	e.tell(Incident{Kind: GivenUp, Subscription: sub, Time: now, Reason: step.Reason, Delivery: job.ID, State: step.State})
}
