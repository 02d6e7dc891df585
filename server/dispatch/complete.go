package dispatch

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/dispatch/window"
	"github.com/grapnel/grapnel/server/subscription"
)

// disableAgain is how long a lane stays closed after its subscription could not be disabled.
const disableAgain = 5 * time.Second

// Complete implements delivery.Sink. It settles the delivery and goes on with the lane's next one. A
// second call, and one after the attempt has been abandoned, does nothing.
func (x *entry) Complete(_ *delivery.Job, r delivery.Result) {
	if x.carries() {
		x.completeAll(r)
		return
	}
	l := x.lane
	e := l.e
	now := e.now()
	l.mu.Lock()
	if x.stage != window.Flying || x.gone {
		l.mu.Unlock()
		return
	}
	if r.Cause == delivery.CauseUnspent {
		l.health.Unspent(now, r.Error)
		l.back(x)
		e.metrics.parked.Inc()
		l.kick(now)
		l.mu.Unlock()
		return
	}
	if r.Cause == delivery.CauseDropped {
		x.dropped(&r, now)
		return
	}
	took := now.Sub(x.at.time())
	a := &r.Attempt
	step, since := x.end(&r, now, took), x.since(now)
	l.land(x)
	v := l.learn(x, &r, step, took, now)
	x.square(x.cost(took))
	down := x.visit.ended(l.key, &r, x.at.time(), now)
	l.count(now, r.Outcome, step.State, since)
	l.mu.Unlock()

	e.trace(x, a, step)
	e.metrics.settled(x.Event, a.Outcome, step.State, since)
	e.metrics.keyBlocked(&x.Job, step)
	e.metrics.learnt(v)
	if down {
		e.metrics.down.Inc()
	}
	if v.Noted {
		l.note()
	}
	if v.Half {
		l.warn(x.sub)
	}
	x.tellHealth(v, a, now)
	e.tellEnd(x.sub, &x.Job, step, now)
	// The slot is held until then: Stop waits for it before the journal may close.
	e.journal.Settle(&x.Job, step, a, x)
	e.release()

	l.mu.Lock()
	l.proceed(now)
	l.mu.Unlock()
}

// dropped ends a delivery of which nothing is to be sent, which says nothing of the target. l.mu is held, and let go of.
func (x *entry) dropped(r *delivery.Result, now time.Time) {
	l := x.lane
	e := l.e
	step := delivery.Next(policy(x.sub), &x.Job, *r, now, 0)
	l.land(x)
	l.returned(x)
	x.stage = window.Settling
	l.countEnd(now, step.State)
	l.mu.Unlock()

	e.metrics.ended(step.State)
	e.journal.Settle(&x.Job, step, nil, x)
	e.release()

	l.mu.Lock()
	l.proceed(now)
	l.mu.Unlock()
}

func policy(sub *subscription.Subscription) delivery.Policy {
	return delivery.Policy{Schedule: sub.Schedule, Jitter: sub.Jitter, IgnoreGone: sub.IgnoreGone}
}

// learn draws the lane's conclusions from an attempt, unless it was made to an older target. l.mu is held.
func (l *lane) learn(x *entry, r *delivery.Result, step delivery.Step, took time.Duration, now time.Time) health.Verdict {
	if x.target != l.target {
		return health.Verdict{}
	}
	first := l.health.Latency() == 0
	v := l.health.Ended(&health.End{
		Mark: x.mark, Signal: health.SignalOf(r), Started: x.at.time(), Took: took, Served: r.Duration, RetryAfter: r.RetryAfter,
		Most: maxInFlight(x.sub), DisableAfter: x.sub.DisableAfter, Disables: step.Disable, Random: rand.Float64(),
		Quiet: x.quiet(),
	}, now)
	l.reclass()
	if first && l.health.Latency() != 0 {
		answered := l.health.Answers()
		if l.e.slots.tried(l.tenant, answered); answered && l.pool != nil {
			l.pool.last.due.Store(0)
			l.pool.freed(now)
		}
	}
	switch {
	case step.Disable:
		l.disableFor(x.sub, step.Reason, !v.Loud && x.quiet())
	case v.Disable:
		l.disableFor(x.sub, "failing without a success for "+x.sub.DisableAfter.String(), !v.Loud)
	}
	return v
}

// warn says that a subscription is on its way to be disabled.
func (l *lane) warn(sub *subscription.Subscription) {
	l.mu.Lock()
	since := l.health.FailingSince()
	l.mu.Unlock()
	l.e.log.Warn("a receiver has been failing for half of the time after which its subscription is disabled",
		l.attrs("namespace_id", sub.Namespace, "subscription_id", sub.ID,
			"failing_since", since, "disable_time", since.Add(sub.DisableAfter))...)
}

// proceed goes on with the lane on this goroutine, unless others wait for their turn.
func (l *lane) proceed(now time.Time) {
	if l.e.ring.contended(l.standing) {
		l.kick(now)
		return
	}
	l.run(inlineTurns, nobodys)
}

// disableFor closes the lane at once and has the subscription disabled, and tells of it unless quiet.
func (l *lane) disableFor(sub *subscription.Subscription, reason string, quiet bool) {
	e := l.e
	if l.disabling || e.disable == nil {
		return
	}
	l.disabling = e.background(e.work, func(ctx context.Context) {
		select {
		case e.disables <- struct{}{}:
			defer func() { <-e.disables }()
		case <-ctx.Done():
		}
		err := e.disable(ctx, sub, reason)
		if err != nil {
			e.log.Warn("subscription not disabled", l.attrs("subscription_id", sub.ID, "err", err)...)
		}
		now := e.now()
		if err == nil && !quiet && e.tell != nil {
			e.tell(Incident{Kind: Disabled, Subscription: sub, Time: now, Reason: reason})
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.disabling = false
		if err != nil {
			l.health.Close(health.ByDisable, now.Add(disableAgain))
		}
		l.kick(now)
	})
}

// expire settles an entry without an attempt. It stands in no queue and holds no slot.
func (e *Engine) expire(x *entry) {
	l := x.lane
	step := delivery.Step{State: delivery.Exhausted, Reason: reasonMaxAge, Block: l.blocksKeys()}
	if x.Event.Purged != nil { // a purge was cut short
		step = delivery.Step{State: delivery.Cancelled, Reason: delivery.ReasonPurged}
	}
	now, sub := e.now(), e.subs.Subscription(l.key)
	if sub != nil && x.Letter == nil && step.State == delivery.Exhausted {
		step.DeadLetter = e.subs.DeadLetter(sub)
	}
	l.mu.Lock()
	l.countEnd(now, step.State)
	l.mu.Unlock()
	e.metrics.ended(step.State)
	e.metrics.keyBlocked(&x.Job, step)
	e.tellEnd(sub, &x.Job, step, now)
	e.journal.Settle(&x.Job, step, nil, x)
}

// trace writes the line about an attempt that is being settled, at debug level only.
func (e *Engine) trace(x *entry, a *delivery.Attempt, step delivery.Step) {
	ctx := context.Background()
	if !e.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	e.log.LogAttrs(ctx, slog.LevelDebug, "attempt settled",
		slog.String("delivery_id", x.ID.String()),
		slog.String("subscription_id", x.sub.ID),
		slog.String("namespace_id", x.sub.Namespace),
		slog.Int("attempt", a.Number),
		slog.Int("outcome", int(a.Outcome)),
		slog.Int("response_code", a.ResponseCode),
		slog.Duration("duration", a.Duration),
		slog.Int("state", int(step.State)))
}
