package dispatch

import (
	"net/http"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

const (
	// slowAfter is how long an attempt may take, on the average and without any answer, before its lane counts as
	// slow.
	slowAfter = time.Second
	// trialFor is how long the first attempt may be in flight before its lane is a suspect, until it answers.
	trialFor = 100 * time.Millisecond
	// weight is the share of an attempt in the average.
	weight = 8
	// maxClosed bounds for how long a target's Retry-After closes its lane.
	maxClosed = time.Hour
	firstPark = 100 * time.Millisecond
	maxPark   = 5 * time.Second
	// healthKept is how long after the last attempt what was learnt is still worth something.
	healthKept = time.Hour
)

// health is what a lane has learnt of its target. It is pure, as delivery.Next is. Breaker, adaptive limits and retry
// budget take their place here. A new target begins a new health.
type health struct {
	// latency is the moving average of what attempts took; 0 when none has ended.
	latency time.Duration
	// answers: the target has said something, soon or late.
	answers bool
	// hangs: attempts have been in flight for too long, and nothing was answered meanwhile.
	hangs bool
	// answered is when it last answered, succeeded when it last took a delivery, learnt when anything was learnt.
	answered, succeeded, learnt time.Time
	// failing is when the run of failures without a success began.
	failing time.Time
	// closed is the time before which no attempt starts, and why says what for.
	closed time.Time
	why    closure
	// waits is what a lane that was closed by its plugin waits for, if the plugin's host said.
	waits string
	park  time.Duration
}

// closure is what closes a lane for a time.
type closure uint8

const (
	byNobody closure = iota
	byTarget
	byPlugin
	byRate
	byDisable // its subscription could not be disabled yet
)

// standing says how much a lane is trusted with.
type standing uint8

const (
	// unknown: no attempt has ended yet.
	unknown standing = iota
	// proven: it answers in time.
	proven
	// suspect: it hangs, or is slow, or was failing when the server ended.
	suspect
	standings
)

func (h *health) standing() standing {
	switch {
	case h.hangs || h.latency > slowAfter:
		return suspect
	case h.latency == 0 && !h.failing.IsZero():
		return suspect // all that is known, from before the server's start, is that it has been failing
	case h.latency == 0:
		return unknown
	}
	return proven
}

// patience is how long attempts may be in flight without an answer.
func (h *health) patience() time.Duration {
	if h.latency == 0 {
		return trialFor
	}
	return max(slowAfter, 2*h.latency)
}

// look judges by the oldest attempt in flight, and says when to look again; the zero time: not before another starts.
func (h *health) look(oldest, now time.Time) time.Time {
	if h.hangs {
		return time.Time{}
	}
	until := laterOf(oldest, h.answered).Add(h.patience())
	if now.Before(until) {
		return until
	}
	h.hangs = true
	return time.Time{}
}

// verdict is what follows for the lane from an attempt that has ended.
type verdict struct {
	// noted: failing has changed.
	noted bool
	// disable is the reason to disable the subscription, if there is one.
	disable string
}

// ended learns from an attempt. A plugin's faults are not the target's.
func (h *health) ended(r *delivery.Result, step delivery.Step, took, disableAfter time.Duration, now time.Time) verdict {
	h.park = 0
	h.learnt = now
	if r.Cause == delivery.CausePlugin || r.Outcome == delivery.OutcomePluginError || r.Outcome == delivery.OutcomeInterrupted {
		return verdict{}
	}
	h.observe(r.Outcome, max(took, time.Microsecond), now)
	if wait := min(r.RetryAfter, maxClosed); wait > 0 &&
		(r.ResponseCode == http.StatusTooManyRequests || r.ResponseCode == http.StatusServiceUnavailable) {
		h.close(byTarget, now.Add(wait))
	}
	was := h.failing
	switch {
	case r.Outcome == delivery.OutcomeSucceeded:
		h.failing, h.succeeded = time.Time{}, now
	case step.Disable:
		return verdict{disable: step.Reason}
	case h.failing.IsZero():
		h.failing = now
	}
	v := verdict{noted: h.failing != was}
	if !h.failing.IsZero() && disableAfter > 0 && now.Sub(h.failing) >= disableAfter {
		v.disable = "failing without a success for " + disableAfter.String()
	}
	return v
}

func (h *health) observe(o delivery.Outcome, took time.Duration, now time.Time) {
	if h.latency == 0 {
		h.latency = took
	} else {
		h.latency += (took - h.latency) / weight
	}
	switch {
	case o == delivery.OutcomeSucceeded, o == delivery.OutcomeRetryable, o == delivery.OutcomePermanent, took < slowAfter:
		h.answers, h.hangs, h.answered = true, false, now
	}
}

// unspent parks the lane: its plugin is not ready, or this machine has nothing left to try with, which says nothing about
// the target. Several that were in flight at
// once count as one.
func (h *health) unspent(now time.Time, waits string) {
	h.hangs = false
	h.waits = waits
	if now.Before(h.closed) {
		return
	}
	h.park = min(max(2*h.park, firstPark), maxPark)
	h.close(byPlugin, now.Add(h.park))
}

func (h *health) close(why closure, until time.Time) {
	if until.After(h.closed) {
		h.closed, h.why = until, why
	}
}

func (h *health) open() { h.closed, h.why, h.waits, h.park = time.Time{}, byNobody, "", 0 }

// fresh reports whether what is known is not worth keeping.
func (h *health) fresh(now time.Time) bool {
	return h.failing.IsZero() && !now.Before(h.closed) && now.Sub(h.learnt) > healthKept
}

func laterOf(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
