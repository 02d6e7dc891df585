package health_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
)

const (
	second     = time.Second
	longestGap = 15 * time.Minute
	longest    = time.Hour // a pause that a receiver asks for
)

// flight is an attempt of the trace.
type flight struct {
	mark    health.Mark
	started time.Time
	ends    time.Time
	signal  health.Signal
	probe   bool
	life    int // how often the breaker had opened before
}

// said is what an attempt of the present era told about the receiver.
type said struct {
	at           time.Time
	failed, slow bool
}

// trace is a lane that does at random what a lane may do, with what it has done kept apart from the Health to judge it by.
type trace struct {
	t      *testing.T
	rnd    *rand.Rand
	h      health.Health
	now    time.Time
	most   int
	flying []flight
	mode   int
	said   []said
	opened time.Time // zero: the breaker is closed
	lives  int       // how often it has opened
	cut    time.Time

	firsts, retries float64 // since the receiver was new, while the breaker was closed
}

// TestRandomTraces holds the promises of the package over random traces with faults.
func TestRandomTraces(t *testing.T) {
	seeds := uint64(300)
	if testing.Short() {
		seeds = 60
	}
	for seed := range seeds {
		tr := &trace{
			t: t, rnd: rand.New(rand.NewPCG(seed, 1)), now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		}
		tr.most = 1 + tr.rnd.IntN(64)
		if tr.rnd.IntN(4) == 0 {
			tr.h.Failed(tr.now.Add(-time.Hour))
		}
		for step := range 3000 {
			tr.step()
			tr.check()
			if t.Failed() {
				t.Fatalf("seed %d, step %d: %+v", seed, step, tr.h)
			}
		}
		tr.heal()
		if t.Failed() {
			t.Fatalf("seed %d, afterwards: %+v", seed, tr.h)
		}
	}
}

func (tr *trace) step() {
	switch op := tr.rnd.IntN(1000); {
	case op < 4:
		tr.mode = tr.rnd.IntN(9)
	case op < 6:
		tr.h.Open(tr.now) // a caller resumes it
	case op < 7: // a new target knows nothing of the old one, whose attempts say nothing any more
		tr.h, tr.flying, tr.said, tr.opened, tr.cut = health.Health{}, nil, nil, time.Time{}, time.Time{}
		tr.firsts, tr.retries = 0, 0
		if tr.h.Limit(tr.most) != 1 || tr.h.Isolated() || tr.h.Standing() != health.Unknown {
			tr.t.Errorf("a new target begins with %+v", tr.h)
		}
	case op < 10:
		tr.most = 1 + tr.rnd.IntN(64)
	case op < 60:
		tr.now = tr.now.Add(time.Duration(tr.rnd.Int64N(int64(20 * second))))
		tr.end(false)
	case op < 500:
		tr.start()
	default:
		tr.end(true)
	}
}

// may reports whether the lane lets an attempt start, of a delivery that was tried before or not.
func (tr *trace) may(retry, first bool) bool {
	why, _ := tr.h.Closed(tr.now)
	return why == health.Open && !tr.h.Full(len(tr.flying), tr.most) &&
		(!retry || tr.h.MayRetry(first, tr.retrying(), tr.most))
}

func (tr *trace) retrying() int {
	n := 0
	for _, f := range tr.flying {
		if f.mark.Retry() {
			n++
		}
	}
	return n
}

func (tr *trace) start() {
	for range 1 + tr.rnd.IntN(8) {
		retry := tr.rnd.IntN(3) == 0
		if !tr.may(retry, true) {
			continue
		}
		state, _, probe, _ := tr.h.Breaker(tr.now)
		if state == health.BreakerOpen || state == health.BreakerHalfOpen && probe.After(tr.now) {
			tr.t.Errorf("an attempt may start while the breaker is open until %v, now %v", probe, tr.now)
		}
		f := flight{mark: tr.h.Started(retry, len(tr.flying)+1, tr.now), started: tr.now, probe: !tr.opened.IsZero(), life: tr.lives}
		f.signal, f.ends = tr.answer()
		if !f.probe {
			if retry {
				tr.retries++
			} else {
				tr.firsts++
			}
		}
		tr.flying = append(tr.flying, f)
		if tr.rnd.IntN(50) == 0 { // it was not made
			tr.flying = tr.flying[:len(tr.flying)-1]
			tr.h.Returned(f.mark)
			if retry && !f.probe {
				tr.retries--
			}
			if tr.rnd.IntN(2) == 0 {
				tr.h.Unspent(tr.now, "")
			}
		}
	}
}

// answer is how the receiver answers, as it is now.
func (tr *trace) answer() (health.Signal, time.Time) {
	soon := tr.now.Add(time.Duration(tr.rnd.Int64N(int64(200 * time.Millisecond))))
	pick := func(s ...health.Signal) health.Signal { return s[tr.rnd.IntN(len(s))] }
	switch tr.mode {
	case 1:
		return health.TimedOut, tr.now.Add(15 * second)
	case 2:
		return health.Unreachable, soon
	case 3:
		return health.Failed, soon
	case 4:
		return pick(health.Taken, health.Taken, health.Overloaded), soon
	case 5:
		return pick(health.Taken, health.Failed, health.TimedOut), soon
	case 6:
		return pick(health.Ignored, health.Ignored, health.Taken, health.Forbidden), soon
	case 7:
		return pick(health.Refused, health.Taken), tr.now.Add(5 * second)
	case 8:
		return health.Signal(tr.rnd.IntN(8)), soon
	}
	return health.Taken, soon
}

// end ends what is over, or with next, the first that ends, for which it waits.
func (tr *trace) end(next bool) {
	slices.SortStableFunc(tr.flying, func(a, b flight) int { return a.ends.Compare(b.ends) })
	for len(tr.flying) > 0 && (next || !tr.flying[0].ends.After(tr.now)) {
		f := tr.flying[0]
		if f.ends.After(tr.now) {
			tr.now = f.ends
		}
		next = false
		tr.ended(f)
		tr.flying = tr.flying[1:]
	}
	if len(tr.flying) == 0 { // it waits until something may start again
		if _, until := tr.h.Closed(tr.now); until.After(tr.now) && tr.rnd.IntN(3) == 0 {
			tr.now = until
		}
	}
}

func (tr *trace) ended(f flight) {
	e := health.End{
		Mark: f.mark, Signal: f.signal, Started: f.started, Took: tr.now.Sub(f.started), Served: tr.now.Sub(f.started),
		Most: tr.most, Random: tr.rnd.Float64(),
	}
	if f.signal == health.Overloaded && tr.rnd.IntN(2) == 0 {
		e.RetryAfter = time.Duration(tr.rnd.Int64N(int64(2 * longest)))
	}
	before := tr.h.Limit(tr.most)
	wasOpen := tr.h.Isolated()
	v := tr.h.Ended(&e, tr.now)
	after := tr.h.Limit(tr.most)
	if v.Cut && (f.signal == health.TimedOut || f.signal == health.Overloaded) {
		if tr.cut.After(f.started) {
			tr.t.Errorf("halved for an attempt that started at %v, before it was last halved at %v", f.started, tr.cut)
		}
		if after < before/2 {
			tr.t.Errorf("halved from %d to %d", before, after)
		}
		tr.cut = tr.now
	}
	if !v.Cut && !v.Opened && after < before {
		tr.t.Errorf("the limit fell from %d to %d for %d", before, after, f.signal)
	}
	if f.signal == health.Ignored && (after != before || v != health.Verdict{} || tr.h.Isolated() != wasOpen) {
		tr.t.Errorf("a plugin's fault counts: %+v", v)
	}
	tr.judge(f, e, v, wasOpen)
}

// judge says whether the breaker was right to open, or not to.
func (tr *trace) judge(f flight, e health.End, v health.Verdict, wasOpen bool) {
	isOpen := tr.h.Isolated()
	failed := f.signal != health.Taken && f.signal != health.Refused
	switch {
	case wasOpen && !isOpen:
		if !f.probe || failed {
			tr.t.Errorf("closed by %+v", f)
		}
		tr.opened, tr.said = time.Time{}, nil
		if n := tr.h.Limit(64); n != 2 {
			tr.t.Errorf("the limit is %d after the probe", n)
		}
		return
	case wasOpen:
		if f.probe && !failed {
			tr.t.Errorf("still open after a probe that ended with %d", f.signal)
		}
		return
	case f.life != tr.lives, f.signal == health.Ignored, f.signal == health.Forbidden, f.signal == health.Overloaded && e.RetryAfter > 0:
		if isOpen {
			tr.t.Errorf("opened by %+v", f)
		}
		return
	}
	tr.said = append(tr.said, said{tr.now, failed, f.signal == health.TimedOut || f.signal == health.Unreachable})
	inARow := func(n int, is func(said) bool) bool {
		if len(tr.said) < n {
			return false
		}
		for _, s := range tr.said[len(tr.said)-n:] {
			if !is(s) {
				return false
			}
		}
		return true
	}
	slow := inARow(5, func(s said) bool { return s.slow })
	all := inARow(20, func(s said) bool { return s.failed })
	// Spans of ten seconds begin at fixed times, so what counts is 20 to 30 seconds, which may or may not be half.
	may := slow || all || failed && tr.half()
	if isOpen && !may {
		tr.t.Errorf("opened after %d, of which the last ones: %+v", len(tr.said), tr.said[max(0, len(tr.said)-25):])
	}
	if must := slow || all; must && !isOpen {
		tr.t.Errorf("not opened: 5 in a row %v, 20 in a row %v", slow, all)
	}
	if isOpen != v.Opened {
		tr.t.Errorf("opened: %v, told as %v", isOpen, v.Opened)
	}
	if isOpen {
		tr.opened = tr.now
		tr.lives++
	}
}

// half reports whether half of those within some time between 20 and 30 seconds have failed.
func (tr *trace) half() bool {
	n, bad := 0, 0
	for _, s := range slices.Backward(tr.said) {
		if tr.now.Sub(s.at) > 30*second {
			return false
		}
		n++
		if s.failed {
			bad++
		}
		if n >= 20 && 2*bad >= n {
			return true
		}
	}
	return false
}

// check holds what is true at every step.
func (tr *trace) check() {
	if n := tr.h.Limit(tr.most); n < 1 || n > tr.most {
		tr.t.Errorf("the limit is %d of %d", n, tr.most)
	}
	probes := 0
	for _, f := range tr.flying {
		if f.probe && !f.started.Before(tr.opened) {
			probes++
		}
	}
	state, since, probe, why := tr.h.Breaker(tr.now)
	switch state {
	case health.BreakerClosed:
		if !tr.opened.IsZero() {
			tr.t.Error("closed without a probe")
		}
	case health.BreakerOpen:
		if probes > 0 || !probe.After(tr.now) || probe.Sub(tr.now) > longest || why == health.NoTrip || !since.Equal(tr.opened) {
			tr.t.Errorf("open since %v (%v) for %q: next probe %v, %d in flight", since, tr.opened, why, probe.Sub(tr.now), probes)
		}
		if closed, until := tr.h.Closed(tr.now); closed == health.Open || !until.Equal(probe) {
			tr.t.Errorf("open, but closed for %d until %v and not %v", closed, until, probe)
		}
	case health.BreakerHalfOpen:
		if probes > 1 || probe.IsZero() {
			tr.t.Errorf("half open with %d probes, next %v", probes, probe)
		}
	}
	if why, until := tr.h.Closed(tr.now); (why == health.Open) != until.IsZero() || until.Sub(tr.now) > longest {
		tr.t.Errorf("closed for %d until %v", why, until)
	} else if why == health.Open && len(tr.flying) == 0 && (!tr.may(false, true) || !tr.may(true, false)) {
		tr.t.Error("stuck: nothing is in flight, and nothing may start")
	}
	if tr.retries > tr.firsts/4+10 {
		tr.t.Errorf("%v repeats beside %v first attempts", tr.retries, tr.firsts)
	}
}

// heal has the receiver be well for long, with as much in flight as may be.
func (tr *trace) heal() {
	tr.mode = 0
	for i := 0; i < 100_000 && (tr.h.Limit(tr.most) < tr.most || tr.h.Isolated()); i++ {
		for tr.may(false, true) {
			f := flight{mark: tr.h.Started(false, len(tr.flying)+1, tr.now), started: tr.now, signal: health.Taken, probe: !tr.opened.IsZero(), life: tr.lives}
			f.ends = tr.now.Add(100 * time.Millisecond)
			tr.flying = append(tr.flying, f)
		}
		if len(tr.flying) == 0 {
			_, until := tr.h.Closed(tr.now)
			if !until.After(tr.now) {
				tr.t.Errorf("stuck at %v", tr.now)
				return
			}
			tr.now = until
			continue
		}
		tr.end(true)
	}
	if n := tr.h.Limit(tr.most); n != tr.most || tr.h.Isolated() {
		tr.t.Errorf("the limit is %d of %d after a long run of successes", n, tr.most)
	}
}

func TestSignals(t *testing.T) {
	for _, tt := range []struct {
		result delivery.Result
		want   health.Signal
	}{
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeSucceeded, ResponseCode: 200}}, health.Taken},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable, ResponseCode: 500}}, health.Failed},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable, ResponseCode: 404}}, health.Failed},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable}}, health.Failed},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable, ResponseCode: 422}}, health.Refused},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable, ResponseCode: 429}}, health.Overloaded},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable, ResponseCode: 503}}, health.Overloaded},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeTimedOut}}, health.TimedOut},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeUnreachable}}, health.Unreachable},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeUnreachable}, Cause: delivery.CausePolicy}, health.Forbidden},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomePluginError}, Cause: delivery.CausePlugin}, health.Ignored},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeInterrupted}}, health.Ignored},
		{delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeTimedOut}, Cause: delivery.CausePlugin}, health.Ignored},
	} {
		if got := health.SignalOf(&tt.result); got != tt.want {
			t.Errorf("%+v: %d, want %d", tt.result, got, tt.want)
		}
	}
}

func ExampleHealth() {
	var h health.Health
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for range 5 {
		m := h.Started(false, 1, now)
		h.Ended(&health.End{Mark: m, Signal: health.TimedOut, Started: now, Took: second, Most: 16, Random: 0.5}, now)
	}
	why, until := h.Closed(now)
	_, _, _, trip := h.Breaker(now)
	fmt.Println(why == health.ByBreaker, until.Sub(now), trip)
	// Output: true 1.5s 5 attempts in a row found no connection or timed out
}
