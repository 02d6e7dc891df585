package delivery

import (
	"fmt"
	"net/http"
	"time"
)

const (
	// maxRetryAfter bounds what a target may ask for.
	maxRetryAfter = 24 * time.Hour
	// quarantineAt is how many plugin crashes in a row, the last of them with the delivery alone in flight,
	// put it aside when the plugin does answer others.
	quarantineAt = 2
	// unprovenAt is the same when the plugin has answered nothing else since it started: then it may be the
	// plugin that is broken, and a plugin must cost no event.
	unprovenAt = 5
)

// Policy is a subscription's retry policy in the form Next needs.
type Policy struct {
	// Schedule holds the delays before attempt 2, 3, …; past its end the last one repeats.
	Schedule []time.Duration
	// Jitter is the half-width of the random spread as a fraction of the delay, 0 to 1.
	Jitter float64
	// IgnoreGone keeps the subscription enabled when the target answers 410.
	IgnoreGone bool
}

// ReasonDropped begins the reason of a delivery that ended as Skipped because its transformer wants nothing to be sent.
const ReasonDropped = "dropped by the transformer"

// Step is what follows an attempt.
type Step struct {
	State State
	// Due is set when State is Scheduled.
	Due time.Time
	// Reason is set for final states other than Succeeded.
	Reason string
	// Disable asks for the subscription to be disabled, with Reason.
	Disable bool
	// DeadLetter, where set on a final State other than Succeeded, is the subscription that gets the event next, in
	// the same commit. Next does not set it.
	DeadLetter *DeadLetter
	// Block: an ordered delivery that has ended without success keeps its ordering key busy.
	Block bool
}

// DeadLetter is who gets what a subscription could not be given.
type DeadLetter struct {
	// From is the last segment of the subscription's name that could not be given it.
	From string
	To   Target
}

// Next is the rule that says what follows an attempt. It is pure: the same arguments give the same
// step. job is as it was before the attempt (Attempts, Indeterminate and Suspicion do not count it yet), rnd
// is uniform in [0, 1). Due lies after now and never after job.Expire. An unspent result keeps the
// delivery Pending, which is never settled. An attempt lost to a plugin's death uses up none of
// MaxAttempts and is repeated after the schedule's first delay.
//
// A delivery whose attempts the plugin dies of must not do so for ever. Everything that was in flight at a
// crash is a suspect (Job.Suspicion, see Watch), and suspects are tried in processes of their own: first all
// of them together, and those that were in flight when such a process crashed one by one. A delivery is
// quarantined, which is Rejected with a reason, when the plugin
//
//   - ended by its own doing with nothing but this delivery in flight, and
//   - has crashed with it in flight before, without an attempt between that ended otherwise, and
//   - answers other attempts; if it has answered none since it started, the fifth crash is needed, and the
//     delays grow along the schedule.
//
// So neither a crowd nor a killer convicts: a process that was killed from outside (SIGKILL above all, which
// is also how the kernel's out-of-memory killer ends it) makes suspects and no culprits. A delivery that has
// every process it is tried in killed for want of memory is therefore never quarantined; it costs only
// processes for suspects, and ends at its maximum age. A plugin with a memory limit of its own fails by
// itself, which counts.
func Next(p Policy, job *Job, r Result, now time.Time, rnd float64) Step {
	if r.Cause == CauseUnspent {
		return Step{State: Pending}
	}
	if r.Cause == CauseDropped {
		return Step{State: Skipped, Reason: reasonOr(ReasonDropped, r.Error)}
	}
	if r.Outcome == OutcomeSucceeded {
		return Step{State: Succeeded}
	}
	if step, ok := rejected(p, job, r); ok {
		return step
	}
	made := job.Attempts + 1 - job.Indeterminate
	if r.Indeterminate {
		made = 1
		if r.Guilt >= GuiltAlone {
			made = job.Suspicion + 1
		}
	} else if made >= job.MaxAttempts {
		return Step{State: Exhausted, Reason: fmt.Sprintf("all %d attempts failed", made)}
	}
	delay, left := p.delay(made, rnd), job.Expire.Sub(now)
	if asked := min(r.RetryAfter, maxRetryAfter, left); asked > delay {
		// What the target asks for may not make a delivery miss its last chance, hence left above.
		delay = asked
	}
	due := now.Add(delay)
	if due.After(job.Expire) {
		return Step{State: Exhausted, Reason: "expired: the next attempt would start after the maximum age"}
	}
	return Step{State: Scheduled, Due: due}
}

// rejected reports whether trying again is useless.
func rejected(p Policy, job *Job, r Result) (Step, bool) {
	switch {
	case r.Indeterminate && convicted(job, r.Guilt):
		return Step{State: Rejected, Reason: reasonOr(fmt.Sprintf(
			"quarantined: in flight at %d plugin crashes, alone at the last one", job.Suspicion+1), r.Error)}, true
	case r.Cause == CausePolicy:
		return Step{State: Rejected, Reason: reasonOr("refused by policy", r.Error)}, true
	case r.Cause == CauseEndpoint && r.ResponseCode == http.StatusGone && !p.IgnoreGone:
		return Step{State: Rejected, Reason: "the target answered 410 Gone", Disable: true}, true
	case r.Outcome == OutcomePermanent && r.ResponseCode != http.StatusGone:
		return Step{State: Rejected, Reason: reasonOr("permanent failure", r.Error)}, true
	}
	return Step{}, false
}

func convicted(job *Job, guilt Guilt) bool {
	limit := unprovenAt
	if guilt == GuiltProven {
		limit = quarantineAt
	}
	return guilt >= GuiltAlone && job.Suspicion+1 >= limit
}

// Watch is job.Suspicion after an attempt. A crash of the plugin's own doing raises it; a process that was
// killed makes a suspect, but no one more suspect; any other end clears the delivery.
func Watch(job *Job, r Result) int {
	switch {
	case r.Cause == CauseUnspent, r.Cause == CauseDropped:
		return job.Suspicion
	case !r.Indeterminate:
		return 0
	case r.Guilt == GuiltNone:
		return max(1, job.Suspicion)
	}
	return job.Suspicion + 1
}

func reasonOr(what, detail string) string {
	if detail == "" {
		return what
	}
	return what + ": " + detail
}

// delay before the attempt that follows the made'th, spread by jitter and never below a millisecond,
// so that a failing target is not hammered without pause.
func (p Policy) delay(made int, rnd float64) time.Duration {
	if len(p.Schedule) == 0 {
		return time.Second
	}
	i := min(max(made, 1), len(p.Schedule)) - 1
	base := max(p.Schedule[i], time.Millisecond)
	spread := min(max(p.Jitter, 0), 1) * (2*rnd - 1)
	if !(spread >= -1 && spread <= 1) { // also catches NaN
		spread = 0
	}
	delay := float64(base) * (1 + spread)
	const longest = 10 * 365 * 24 * time.Hour
	if delay > float64(longest) {
		return longest
	}
	return max(time.Duration(delay), time.Millisecond)
}
