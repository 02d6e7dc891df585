package dispatch

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	firstPark = 100 * time.Millisecond
	maxPark   = 5 * time.Second
	// maxClosed bounds for how long a target's Retry-After closes its lane.
	maxClosed = time.Hour
	// disableAgain is how long a lane stays closed after its subscription could not be disabled.
	disableAgain = 5 * time.Second
)

// Complete takes the result of an attempt. Attempters use the sink they were given, which is faster.
func (e *Engine) Complete(job *delivery.Job, r delivery.Result) {
	if x := e.index.get(job.ID); x != nil {
		x.Complete(job, r)
	}
}

// Complete implements delivery.Sink. It settles the delivery and goes on with the lane's next one. A
// second call, and one after the attempt has been abandoned, does nothing.
func (x *entry) Complete(_ *delivery.Job, r delivery.Result) {
	cancelled := false
	if !x.state.CompareAndSwap(inFlight, settling) {
		if !x.state.CompareAndSwap(cancelling, settling) {
			return
		}
		cancelled = true
	}
	l, job := x.lane, x.job
	now := time.Now()
	if r.Cause == delivery.CauseUnspent {
		if cancelled {
			l.e.settleCancelled(x)
			return
		}
		l.unspent(x, now)
		return
	}
	a := &r.Attempt
	a.Number, a.Manual = job.Attempts+1, job.Manual
	if a.Start.IsZero() {
		a.Start = x.started
	}
	if a.Duration == 0 {
		a.Duration = now.Sub(x.started)
	}
	var step delivery.Step
	if cancelled {
		step = delivery.Step{State: delivery.Cancelled, Reason: x.reason}
	} else {
		step = delivery.Next(policy(x.sub), job, r, now, rand.Float64())
	}
	job.Suspicion = delivery.Watch(job, r)
	if r.Indeterminate {
		job.Indeterminate++
	}
	l.e.trace(x, a, step)
	since := now.Sub(laterOf(job.Event.AcceptTime, job.Event.DeliverTime))
	// Before the entry is forgotten: the low-water mark must not pass what is not on its way to the disk.
	l.e.journal.Settle(job, step, a)
	l.e.metrics.settled(a.Outcome, step.State, since)

	l.mu.Lock()
	l.finish(x, &r, step, now, since)
	l.mu.Unlock()
}

func laterOf(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func policy(sub *subscription.Subscription) delivery.Policy {
	return delivery.Policy{Schedule: sub.Schedule, Jitter: sub.Jitter, IgnoreGone: sub.IgnoreGone}
}

// finish draws the lane's conclusions from an attempt that has been settled. l.mu is held.
func (l *lane) finish(x *entry, r *delivery.Result, step delivery.Step, now time.Time, since time.Duration) {
	l.flying.remove(x)
	l.forget(x, true)
	l.park = 0
	l.count(now, r.Outcome, step.State, since)
	if step.State == delivery.Scheduled {
		l.lower(x.part, step.Due.UnixNano())
	}
	if wait := min(r.RetryAfter, maxClosed); wait > 0 &&
		(r.ResponseCode == http.StatusTooManyRequests || r.ResponseCode == http.StatusServiceUnavailable) {
		l.closeUntil(now, now.Add(wait))
	}
	l.judgeHealth(x.sub, r, step, now)
	l.e.release()
	l.proceed(now)
}

// proceed goes on with the lane on this goroutine, unless others wait for their turn.
func (l *lane) proceed(now time.Time) {
	if l.e.ring.waiting.Load() > 0 {
		l.kick(now)
		return
	}
	l.run(inlineTurns)
}

// judgeHealth keeps track of how long the target has been failing. The breaker and adaptive limits take
// their place here.
func (l *lane) judgeHealth(sub *subscription.Subscription, r *delivery.Result, step delivery.Step, now time.Time) {
	switch {
	case r.Outcome == delivery.OutcomeSucceeded:
		l.failing = time.Time{}
		return
	case step.Disable:
		l.disableFor(sub, step.Reason, now)
		return
	case r.Cause == delivery.CausePlugin,
		r.Outcome == delivery.OutcomePluginError, r.Outcome == delivery.OutcomeInterrupted:
		return
	}
	if l.failing.IsZero() {
		l.failing = now
	}
	if after := sub.DisableAfter; after > 0 && now.Sub(l.failing) >= after {
		l.disableFor(sub, "failing without a success for "+after.String(), now)
	}
}

// disableFor closes the lane at once and has the subscription disabled.
func (l *lane) disableFor(sub *subscription.Subscription, reason string, now time.Time) {
	e := l.e
	if l.disabling || e.disable == nil {
		return
	}
	l.disabling = e.background(e.work, func(ctx context.Context) {
		err := e.disable(ctx, sub, reason)
		if err != nil {
			e.log.Warn("subscription not disabled",
				"namespace_id", l.key.Namespace, "subscription_id", l.key.Subscription, "err", err)
		}
		now := time.Now()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.disabling = false
		if err != nil {
			l.closeUntil(now, now.Add(disableAgain))
		} else {
			l.failing = time.Time{}
		}
		l.kick(now)
	})
}

// unspent puts a job back and parks the lane: its plugin is not ready.
func (l *lane) unspent(x *entry, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wait(x)
	if !now.Before(l.closed) { // several that were in flight at once count as one
		l.park = min(max(2*l.park, firstPark), maxPark)
		l.closeUntil(now, now.Add(l.park))
	}
	l.e.metrics.parked.Inc()
	l.e.release()
	l.kick(now)
}

// settleUntried ends a delivery without an attempt. Its entry stands in no queue and holds no slot.
func (e *Engine) settleUntried(x *entry, v verdict) {
	step := v.step()
	e.journal.Settle(x.job, step, nil)
	e.metrics.ended(step.State)
	l := x.lane
	l.mu.Lock()
	defer l.mu.Unlock()
	l.forget(x, true)
	l.countEnd(time.Now(), step.State)
}

// settleCancelled ends a delivery that was cancelled in flight, without anything having been tried.
func (e *Engine) settleCancelled(x *entry) {
	e.journal.Settle(x.job, delivery.Step{State: delivery.Cancelled, Reason: x.reason}, nil)
	e.metrics.ended(delivery.Cancelled)
	l := x.lane
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flying.remove(x)
	l.forget(x, true)
	e.release()
	l.kick(time.Now())
}

// trace writes the line about a settled attempt, at debug level only.
func (e *Engine) trace(x *entry, a *delivery.Attempt, step delivery.Step) {
	ctx := context.Background()
	if !e.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	e.log.LogAttrs(ctx, slog.LevelDebug, "attempt settled",
		slog.String("delivery_id", x.id.String()),
		slog.String("subscription_id", x.lane.key.Subscription),
		slog.String("namespace_id", x.lane.key.Namespace),
		slog.Int("attempt", a.Number),
		slog.Int("outcome", int(a.Outcome)),
		slog.Int("response_code", a.ResponseCode),
		slog.Duration("duration", a.Duration),
		slog.Int("state", int(step.State)))
}
