// Package health holds what a lane knows of its receiver and what follows from it: how many attempts may be in flight
// at once, whether any may start at all, and which share of them may be repeats. It is pure: no clock, no I/O, no locks,
// and random numbers are passed in, so that a property test can hold it. What it promises:
//
//  1. The limit of attempts in flight lies within 1 and what the subscription allows. It doubles each round trip from 1 on,
//     then grows by one; it is halved at most once a round trip, for a timeout, a 429 or a 503, and lowered when answers
//     take longer the more there are in flight. After a long run of successes that use it, it is what the subscription allows.
//  2. The breaker opens after 5 attempts in a row that found no connection or timed out, 20 in a row that failed, or 30
//     seconds in which 20 and at least half of them failed. While it is open there is one time, that of the next probe:
//     no attempt starts before, and then one. If the receiver answers it, slow start follows; if not, the next wait is drawn
//     from a range twice as wide, 1 s to 15 min.
//  3. While first attempts wait, repeats are a fifth of what starts; else, beyond that, they hold a fifth of the limit.
//  4. What a plugin, or this machine, does wrong changes none of this.
//  5. The zero Health knows nothing, as of a new receiver.
//  6. That a receiver fails is told once a run of failures, when its breaker opens or after 5 minutes, and then once that it
//     is well again; what a quiet attempt finds, the next one tells that is not.
//
// Beside that it says how far a lane is trusted with what all lanes share: see Standing.
package health

import (
	"net/http"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

const (
	// SlowAfter is how long an attempt may take, on the average and without any answer, before its lane counts as slow.
	SlowAfter = time.Second
	// trialFor is how long the first attempt may be in flight before its lane is a suspect, until it answers.
	trialFor = 100 * time.Millisecond
	// weight is the share of an attempt in the average.
	weight = 8
	// maxRest bounds for how long a receiver's Retry-After closes its lane.
	maxRest   = time.Hour
	firstPark = 100 * time.Millisecond
	maxPark   = 5 * time.Second
	// failingAfter is how long a receiver may fail without a success before that is told, unless its breaker opens first.
	failingAfter = 5 * time.Minute
	// keptFor is how long after the last attempt what was learnt is still worth something.
	keptFor = time.Hour
)

// instant is in nanoseconds since 1970; 0 is never.
type instant int64

func at(t time.Time) instant {
	if t.IsZero() {
		return 0
	}
	return instant(t.UnixNano())
}

func (i instant) time() time.Time {
	if i == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(i))
}

func (i instant) add(d time.Duration) instant { return i + instant(d) }

func (i instant) since(j instant) time.Duration { return time.Duration(i - j) }

// Health is what is known of one receiver. The zero value is that of a new one. It is not safe for concurrent use, and may
// be copied.
type Health struct {
	// latency is the moving average of what attempts took; 0 when none has ended.
	latency time.Duration
	// answered is when the receiver last said something, succeeded when it last took a delivery, learnt when anything was
	// learnt, failing when the run of failures without a success began.
	answered, succeeded, learnt, failing instant
	// closed is the time before which no attempt starts, and why says what for; the breaker has a time of its own.
	closed instant
	// waits is what a lane that was closed by its plugin waits for, if the plugin's host said.
	waits string
	park  time.Duration

	limit   limit
	breaker breaker
	budget  budget

	why Closure
	// answers: the receiver has said something, soon or late. reached: it has to the last attempt that says anything.
	answers, reached bool
	// hangs: attempts have been in flight for too long, and nothing was answered meanwhile.
	hangs bool
	// halfway: half of the time has been found over after which the subscription is disabled. warned: by an attempt that was
	// not quiet. loud: one of those that have failed was not, or that is not known, from before the server's start.
	halfway, warned, loud bool
	// told: of this run of failures. owed: that it is over, or one before it that was ended by no success. before: it began
	// before the server's start, and whether it was told is not known.
	told, owed, before bool
}

// Closure is what closes a lane for a time.
type Closure uint8

// What closes a lane for a time.
const (
	Open Closure = iota
	ByTarget
	ByPlugin
	ByDisable // its subscription could not be disabled yet
	ByBreaker
)

// Standing says how much a lane is trusted with of what all lanes share.
type Standing uint8

// Standings of a lane.
const (
	// Unknown: no attempt has ended yet.
	Unknown Standing = iota
	// Proven: it answers in time.
	Proven
	// Suspect: it hangs, or is slow, or was failing when the server ended.
	Suspect
	// Standings is how many there are.
	Standings
)

// Standing is how much the lane is trusted with.
func (h *Health) Standing() Standing {
	switch {
	case h.hangs || h.latency > SlowAfter:
		return Suspect
	case h.latency == 0 && h.failing != 0:
		return Suspect // all that is known, from before the server's start, is that it has been failing
	case h.latency == 0:
		return Unknown
	}
	return Proven
}

// Answers reports whether the receiver has ever answered, soon or late, and Hangs whether attempts have been in flight for
// too long now without any answer.
func (h *Health) Answers() bool { return h.answers }

// Hangs: see Answers.
func (h *Health) Hangs() bool { return h.hangs }

// Reached reports whether the last attempt that says anything of it was answered, by a success or not.
func (h *Health) Reached() bool { return h.reached }

// Latency is the moving average of what attempts take; 0 when none has ended.
func (h *Health) Latency() time.Duration { return h.latency }

// FailingSince is when the run of failures without a success began; zero when there is none.
func (h *Health) FailingSince() time.Time { return h.failing.time() }

// LastSuccess is when the receiver last took a delivery.
func (h *Health) LastSuccess() time.Time { return h.succeeded.time() }

// patience is how long attempts may be in flight without an answer.
func (h *Health) patience() time.Duration {
	if h.latency == 0 {
		return trialFor
	}
	return max(SlowAfter, 2*h.latency)
}

// Look judges by the oldest attempt in flight, and says when to look again; the zero time: not before another starts.
func (h *Health) Look(oldest, now time.Time) time.Time {
	if h.hangs {
		return time.Time{}
	}
	until := max(at(oldest), h.answered).add(h.patience())
	if at(now) < until {
		return until.time()
	}
	h.hangs = true
	return time.Time{}
}

// Signal is what the end of an attempt says about the receiver.
type Signal uint8

// Signals of an attempt that has ended.
const (
	// Ignored: it says nothing, because the plugin or this machine was at fault.
	Ignored Signal = iota
	// Forbidden: it was not made, by policy.
	Forbidden
	// Taken: the receiver took the delivery.
	Taken
	// Refused: the receiver is well and does not want this delivery.
	Refused
	// Failed: the receiver answered that something is wrong with it, or broke off.
	Failed
	// Overloaded: it answered 429 or 503.
	Overloaded
	// TimedOut: it did not answer in time.
	TimedOut
	// Unreachable: there was no connection.
	Unreachable
)

// SignalOf reads a result that is not unspent.
func SignalOf(r *delivery.Result) Signal {
	switch {
	case r.Cause == delivery.CausePlugin:
		return Ignored
	case r.Cause == delivery.CausePolicy:
		return Forbidden
	}
	switch r.Outcome {
	case delivery.OutcomePluginError, delivery.OutcomeInterrupted:
		return Ignored
	case delivery.OutcomeSucceeded:
		return Taken
	case delivery.OutcomeTimedOut:
		return TimedOut
	case delivery.OutcomeUnreachable:
		return Unreachable
	}
	if r.ResponseCode/100 == 2 { // it took a batch, and none of what was in it
		return Refused
	}
	switch r.ResponseCode {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return Overloaded
	case http.StatusBadRequest, http.StatusConflict, http.StatusPreconditionFailed, http.StatusRequestEntityTooLarge,
		http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
		return Refused
	}
	return Failed
}

// HostSignal is what a result that is not unspent says about the host of the receiver: when only the rest of an answer is
// missing, it is there.
func HostSignal(r *delivery.Result) Signal {
	s := SignalOf(r)
	if s == TimedOut && r.ResponseCode != 0 {
		return Failed
	}
	return s
}

// Mark is kept with an attempt from its start to its end.
type Mark struct {
	era   uint32
	retry bool
}

// Retry reports whether the attempt was a repeat.
func (m Mark) Retry() bool { return m.retry }

// Closed says what closes the lane now and until when. Open with a zero time: attempts may start, as far as the limit and
// Full let them.
func (h *Health) Closed(now time.Time) (Closure, time.Time) {
	n := at(now)
	probe := h.breaker.next()
	switch {
	case probe > n && probe >= h.closed:
		return ByBreaker, probe.time()
	case h.closed > n:
		return h.why, h.closed.time()
	}
	return Open, time.Time{}
}

// Parked reports whether the plugin was not ready when last an attempt went there, also while another one looks whether it is.
func (h *Health) Parked() bool { return h.park > 0 }

// Waits is what a lane that is Parked waits for, in words of the plugin's host; it may be empty.
func (h *Health) Waits() string { return h.waits }

// Full reports whether a lane with so many attempts in flight, of which so many may be, has to wait for one of them to end:
// for the probe, while the breaker is half open.
func (h *Health) Full(inFlight, most int) bool {
	return h.breaker.probing || inFlight >= h.Limit(most)
}

// Limit is how many attempts may be in flight, of at most so many.
func (h *Health) Limit(most int) int {
	if h.breaker.open() {
		return 1
	}
	return h.limit.of(most)
}

// MayRetry reports whether a repeat may start now, beside so many others that are in flight. first: a first attempt waits.
func (h *Health) MayRetry(first bool, retrying, most int) bool {
	return h.breaker.open() || h.budget.allows(first, retrying, h.Limit(most))
}

// Started notes that an attempt starts. The caller has seen that the lane is neither closed nor full, and for a repeat that
// it may. inFlight is how many there are with it. The mark is for Ended or Returned, one of which follows unless the
// receiver is another by then.
func (h *Health) Started(retry bool, inFlight int, now time.Time) Mark {
	if h.breaker.open() {
		h.breaker.probing = true
	} else {
		h.budget.spend(retry)
		h.limit.started(inFlight, at(now))
	}
	return Mark{h.breaker.era, retry}
}

// Returned notes that nothing came of an attempt: it was not made, or its end will not be told.
func (h *Health) Returned(m Mark) {
	if h.breaker.open() {
		h.breaker.returned(m.era)
	} else if m.retry {
		h.budget.refund()
	}
}

// End is how an attempt ended.
type End struct {
	Mark   Mark
	Signal Signal
	// Started is when the attempt started, Took how long it was in flight, and Served how long of that the transport was
	// busy with it.
	Started      time.Time
	Took, Served time.Duration
	// RetryAfter is what the receiver asked for; 0 when it did not.
	RetryAfter time.Duration
	// Most is how many attempts the subscription allows at once.
	Most int
	// DisableAfter is how long the receiver may fail without a success; 0 is for ever. Disables: the subscription is going to
	// be disabled for this answer.
	DisableAfter time.Duration
	Disables     bool
	// Quiet: nothing is told that follows from it.
	Quiet bool
	// Random is uniform in [0, 1).
	Random float64
}

// Verdict is what follows for the lane.
type Verdict struct {
	// Noted: since when the receiver has been failing has changed.
	Noted bool
	// Disable: it has been failing for as long as it may. Half: for half of that, which is found once; Warn: likewise, by an
	// attempt that is not quiet. Loud: that what disables it is to be told, because not all attempts that failed were quiet.
	Disable, Half, Warn, Loud bool
	// Failing: its breaker is open, or it has been failing for 5 minutes, which is told once; Recovered: it has succeeded
	// since. Since is when that run of failures began, zero where that is not known any more.
	Failing, Recovered bool
	Since              time.Time
	// Opened: the breaker has opened. Probed: the probe has ended with a word about the receiver, and Shut: the breaker is
	// closed again.
	Opened, Probed, Shut bool
	// Cut: the limit was taken back.
	Cut bool
}

// Ended learns from an attempt.
func (h *Health) Ended(e *End, now time.Time) Verdict {
	n := at(now)
	h.park = 0
	h.learnt = n
	var v Verdict
	if e.Signal == Ignored {
		h.breaker.unclear(e.Mark.era, n, e.Random)
		return v
	}
	h.observe(e, n)
	overloaded := e.Signal == Overloaded
	if rest := min(e.RetryAfter, maxRest); rest > 0 && overloaded {
		h.close(ByTarget, n.add(rest))
	}
	current := e.Mark.era == h.breaker.era
	if e.Signal == Forbidden {
		h.breaker.unclear(e.Mark.era, n, e.Random)
	} else if current && !e.Disables {
		h.learn(e, n, &v)
	} else if current {
		h.breaker.unclear(e.Mark.era, n, e.Random)
	}
	was := h.failing
	h.loud = e.Signal != Taken && (h.loud || !e.Quiet)
	v.Loud = h.loud
	switch {
	case e.Signal == Taken:
		h.recover(e, n, &v)
		h.failing, h.succeeded, h.halfway, h.warned = 0, n, false, false
	case e.Disables:
		return v
	case h.failing == 0:
		h.failing = n
	}
	v.Noted = h.failing != was
	if h.failing != 0 && !h.told && !e.Quiet && (h.breaker.open() || n.since(h.failing) >= failingAfter) {
		h.told, v.Failing, v.Since = true, true, h.failing.time()
	}
	if h.failing != 0 && e.DisableAfter > 0 {
		failed := n.since(h.failing)
		v.Disable = failed >= e.DisableAfter
		half := !v.Disable && failed >= e.DisableAfter/2
		v.Half, v.Warn = half && !h.halfway, half && !h.warned && !e.Quiet
		h.halfway, h.warned = h.halfway || v.Half, h.warned || v.Warn
	}
	return v
}

// recover tells that a run of failures is over which has been told, or was long enough before the server's start. What is
// not told now, because the attempt is quiet, is told at the next success.
func (h *Health) recover(e *End, now instant, v *Verdict) {
	over := h.told || h.owed || h.before && now.since(h.failing) >= failingAfter
	h.told, h.before, h.owed = false, false, over && e.Quiet
	if over && !e.Quiet {
		v.Recovered, v.Since = true, h.failing.time()
	}
}

// learn has the breaker and the limit follow an attempt that says something about the receiver as it is now.
func (h *Health) learn(e *End, now instant, v *Verdict) {
	if h.breaker.open() {
		if h.breaker.probed(e.Signal, now, e.Random) {
			v.Probed = true
			if v.Shut = !h.breaker.open(); v.Shut {
				h.limit.n = afterProbe
			}
		}
		return
	}
	if h.breaker.ended(e.Signal, e.RetryAfter > 0, now, e.Random) {
		h.limit.reset()
		v.Opened = true
		return
	}
	switch e.Signal {
	case TimedOut:
		v.Cut = h.limit.halve(ForTimeouts, at(e.Started), now)
	case Overloaded:
		v.Cut = h.limit.halve(ForOverload, at(e.Started), now)
	case Taken, Refused:
		v.Cut = h.limit.answered(at(e.Started), e.Served, e.Most, now)
	}
}

func (h *Health) observe(e *End, now instant) {
	took := max(e.Took, time.Microsecond)
	if h.latency == 0 {
		h.latency = took
	} else {
		h.latency = max(h.latency+(took-h.latency)/weight, time.Microsecond)
	}
	silent := e.Signal == TimedOut || e.Signal == Unreachable
	if e.Signal != Forbidden {
		h.reached = !silent
	}
	if !silent || took < SlowAfter {
		h.answers, h.hangs, h.answered = true, false, now
	}
	if h.limit.n == 0 { // the first that ended
		h.limit.n = 1
	}
}

// Unspent parks the lane: its plugin is not ready, or this machine has nothing left to try with, which says nothing about
// the receiver. Several that were in flight at once count as one.
func (h *Health) Unspent(now time.Time, waits string) {
	h.hangs = false
	h.waits = waits
	if at(now) < h.closed {
		return
	}
	h.park = min(max(2*h.park, firstPark), maxPark)
	h.close(ByPlugin, at(now).add(h.park))
}

// Close closes the lane until a time, unless it is for longer.
func (h *Health) Close(why Closure, until time.Time) { h.close(why, at(until)) }

func (h *Health) close(why Closure, until instant) {
	if until > h.closed {
		h.closed, h.why = until, why
	}
}

// Open lifts what closes the lane: a pause that the receiver asked for, its plugin's, and the breaker is half open at once.
func (h *Health) Open(now time.Time) {
	h.closed, h.why, h.waits, h.park = 0, Open, "", 0
	h.breaker.halfOpen(at(now))
}

// Relieve has the breaker be half open at once if it has opened because there was no connection or no answer in time: the
// host that it shares with others is to be tried, or is up again since. The waits go on as they were.
func (h *Health) Relieve(now time.Time) {
	if b := &h.breaker; b.open() && b.why == NoConnection {
		b.probe = min(b.probe, at(now))
	}
}

// Unconnected reports whether the breaker is open because there was no connection or no answer in time.
func (h *Health) Unconnected() bool { return h.breaker.open() && h.breaker.why == NoConnection }

// Forgive forgets since when the receiver has been failing.
func (h *Health) Forgive() {
	h.owed = h.owed || h.told
	h.failing, h.halfway, h.warned, h.loud, h.told, h.before = 0, false, false, false, false, false
}

// Replaced is the Health of the receiver that takes this one's place: nothing is known of it but that it is still to be
// told when it is well.
func (h *Health) Replaced() Health { return Health{owed: h.owed || h.told} }

// Failed sets since when the receiver has been failing, as it was noted before the server's start.
func (h *Health) Failed(since time.Time) {
	h.failing, h.before = at(since), !since.IsZero()
	h.loud = h.before
}

// Worthless reports whether what is known is not worth keeping.
func (h *Health) Worthless(now time.Time) bool {
	n := at(now)
	return h.failing == 0 && n >= h.closed && !h.breaker.open() && n.since(h.learnt) > keptFor
}
