package health_test

import (
	"fmt"
	"testing"
	"time"
	"unsafe"

	"github.com/grapnel/grapnel/server/dispatch/health"
)

// lane drives a Health in step: each round trip as many attempts as may be, which all end alike.
type lane struct {
	h    health.Health
	now  time.Time
	most int
}

func newLane(most int) *lane {
	return &lane{now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), most: most}
}

// round makes a round trip and returns how many attempts were in flight, which end with the signals by turns.
func (l *lane) round(took time.Duration, signals ...health.Signal) int {
	var marks []health.Mark
	started := l.now
	if why, _ := l.h.Closed(l.now); why != health.Open {
		return 0
	}
	for !l.h.Full(len(marks), l.most) {
		marks = append(marks, l.h.Started(false, len(marks)+1, l.now))
	}
	l.now = l.now.Add(took)
	for i, m := range marks {
		l.h.Ended(&health.End{
			Mark: m, Signal: signals[i%len(signals)], Started: started, Took: took, Served: took, Most: l.most, Random: 0.5,
		}, l.now)
	}
	return len(marks)
}

func (l *lane) rounds(n int, took time.Duration, signals ...health.Signal) (sizes []int) {
	for range n {
		sizes = append(sizes, l.round(took, signals...))
	}
	return sizes
}

func wantSizes(t *testing.T, what string, got []int, want ...int) {
	t.Helper()
	for i := range want {
		if i >= len(got) || got[i] != want[i] {
			t.Errorf("%s: %v, want %v", what, got, want)
			return
		}
	}
}

func TestLimitGrowsAndHalves(t *testing.T) {
	l := newLane(100)
	const rtt = 200 * time.Millisecond
	wantSizes(t, "slow start", l.rounds(9, rtt, health.Taken), 1, 2, 4, 8, 16, 32, 64, 100, 100)
	if l.h.LimitReason(100) != health.ForSubscription {
		t.Errorf("the limit is due to: %v", l.h.LimitReason(100))
	}
	wantSizes(t, "halved once a round trip", append(l.rounds(2, rtt, health.Taken, health.Overloaded, health.Taken), l.h.Limit(100)), 100, 50, 25)
	if l.h.LimitReason(100) != health.ForOverload {
		t.Errorf("the limit is due to: %v", l.h.LimitReason(100))
	}
	sizes := l.rounds(6, rtt, health.Taken)
	for i := range sizes[1:] {
		if d := sizes[i+1] - sizes[i]; d < 0 || d > 8 {
			t.Errorf("behind the threshold: %v", sizes)
		}
	}
}

func TestALimitThatIsNotUsedStays(t *testing.T) {
	l := newLane(100)
	l.rounds(4, time.Second, health.Taken)
	limit := l.h.Limit(100)
	for range 1000 {
		m := l.h.Started(false, 1, l.now)
		l.now = l.now.Add(time.Second)
		l.h.Ended(&health.End{Mark: m, Signal: health.Taken, Started: l.now.Add(-time.Second), Took: time.Second, Most: 100}, l.now)
	}
	if got := l.h.Limit(100); limit < 4 || got != limit {
		t.Errorf("the limit has grown from %d to %d", limit, got)
	}
}

// TestGradient has a receiver that serves ten at a time, 100 ms each: what comes beyond that waits there.
func TestGradient(t *testing.T) {
	l := newLane(500)
	most := 0
	for i := range 3000 {
		n := l.h.Limit(500)
		took := 100 * time.Millisecond * time.Duration(max(n, 10)) / 10
		if l.round(took, health.Taken); i > 100 {
			most = max(most, l.h.Limit(500))
		}
	}
	if most > 40 || l.h.Limit(500) < 10 {
		t.Errorf("limits up to %d, in the end %d, of a receiver that serves 10 at once", most, l.h.Limit(500))
	}
	// It answers slowly for good, whatever is in flight: that is how it is now.
	for range 3000 {
		l.round(400*time.Millisecond, health.Taken)
	}
	if n := l.h.Limit(500); n < 100 {
		t.Errorf("the limit is %d of a receiver that has become slower for good", n)
	}
}

func TestBreakerWaitsLongerAndLonger(t *testing.T) {
	for _, random := range []float64{0, 0.25, 0.999999} {
		l := newLane(16)
		l.rounds(5, time.Second, health.Taken)
		var gaps []time.Duration
		for range 16 {
			for why, _ := l.h.Closed(l.now); why == health.Open; why, _ = l.h.Closed(l.now) {
				m := l.h.Started(false, 1, l.now)
				l.now = l.now.Add(time.Second)
				l.h.Ended(&health.End{Mark: m, Signal: health.TimedOut, Started: l.now, Took: time.Second, Most: 16, Random: random}, l.now)
			}
			_, until := l.h.Closed(l.now)
			gaps = append(gaps, until.Sub(l.now))
			l.now = until
		}
		for i, g := range gaps {
			most := min(2*time.Second<<i, 15*time.Minute)
			want := time.Second + time.Duration(random*float64(most-time.Second))
			if (g - want).Abs() > time.Millisecond {
				t.Errorf("with %v, gap %d is %v, want %v: %v", random, i, g, want, gaps)
			}
		}
		wantSizes(t, "after the probe", l.rounds(5, time.Second, health.Taken), 1, 2, 4, 8, 16)
		if since := l.h.FailingSince(); !since.IsZero() {
			t.Errorf("still failing since %v", since)
		}
	}
}

func TestABreakerThatOpensAgainSoonWaitsLonger(t *testing.T) {
	l := newLane(16)
	open := func() time.Duration {
		for !l.h.Isolated() {
			l.round(time.Second, health.TimedOut)
		}
		_, until := l.h.Closed(l.now)
		return until.Sub(l.now)
	}
	first := open()
	for range 3 { // three probes fail
		_, l.now = l.h.Closed(l.now)
		l.round(time.Second, health.TimedOut)
	}
	_, l.now = l.h.Closed(l.now)
	l.round(time.Second, health.Taken)
	if again := open(); again <= 2*first {
		t.Errorf("%v at first, and %v when it opened again at once", first, again)
	}
	_, l.now = l.h.Closed(l.now)
	l.rounds(10, time.Second, health.Taken)
	if again := open(); again > first {
		t.Errorf("%v at first, and %v when it had been well meanwhile", first, again)
	}
}

func TestDisablingIsWarnedOfOnce(t *testing.T) {
	l := newLane(1)
	warned, disabled := 0, 0
	end := func(s health.Signal) {
		m := l.h.Started(false, 1, l.now)
		v := l.h.Ended(&health.End{Mark: m, Signal: s, Started: l.now, Took: time.Second, Most: 1, DisableAfter: time.Hour, Random: 0.5}, l.now)
		if v.Warn {
			warned++
			if failed := l.now.Sub(l.h.FailingSince()); failed < 30*time.Minute || failed > 32*time.Minute {
				t.Errorf("warned after %v", failed)
			}
		}
		if v.Disable {
			disabled++
		}
		l.now = l.now.Add(time.Minute)
	}
	for range 45 {
		end(health.Failed)
		l.h.Open(l.now)
	}
	if warned != 1 || disabled != 0 {
		t.Errorf("warned %d times, disabled %d times after 45 minutes of 60", warned, disabled)
	}
	end(health.Taken)
	for range 61 {
		end(health.Failed)
		l.h.Open(l.now)
	}
	if warned != 2 || disabled != 1 {
		t.Errorf("warned %d times, disabled %d times after another hour", warned, disabled)
	}
}

// What a quiet attempt comes upon, that half of the time is over, is found at once and told by the next that is not quiet.
func TestAWarningIsOwedUntilItIsTold(t *testing.T) {
	l := newLane(1)
	found, told := "", ""
	for i := range 55 {
		quiet := i >= 20 && i < 40
		m := l.h.Started(false, 1, l.now)
		v := l.h.Ended(&health.End{
			Mark: m, Signal: health.Failed, Started: l.now, Took: time.Second, Most: 1, DisableAfter: time.Hour, Random: 0.5, Quiet: quiet,
		}, l.now)
		if v.Half {
			found += fmt.Sprint(i, " ")
		}
		if v.Warn {
			told += fmt.Sprint(i, " ")
		}
		l.now = l.now.Add(time.Minute)
		l.h.Open(l.now)
	}
	if found != "30 " || told != "40 " {
		t.Errorf("found after minutes %q and told after %q, want 30 and 40", found, told)
	}
}

// What disables a subscription is loud unless all that has failed since the last success is quiet.
func TestDisablingIsLoud(t *testing.T) {
	for _, tt := range []struct {
		run  string // f: failed, F: failed quietly, s, S: taken, g: the subscription is changed, r: restart amid failures
		want bool
	}{{"f", true}, {"F", false}, {"FFF", false}, {"fF", true}, {"FfF", true}, {"fsF", false}, {"fSF", false}, {"fgF", false}, {"rF", true}, {"rSF", false}} {
		for _, disables := range []bool{false, true} { // by its answer, or because time is over
			l := newLane(1)
			var v health.Verdict
			for i, c := range tt.run {
				last := i == len(tt.run)-1
				switch c {
				case 'g':
					l.h.Forgive()
					continue
				case 'r':
					l.h.Failed(l.now.Add(-time.Minute))
					continue
				}
				s := health.Failed
				if c == 's' || c == 'S' {
					s = health.Taken
				}
				m := l.h.Started(false, 1, l.now)
				v = l.h.Ended(&health.End{
					Mark: m, Signal: s, Started: l.now, Took: time.Second, Most: 1, DisableAfter: time.Nanosecond, Random: 0.5,
					Quiet: c < 'a', Disables: last && disables,
				}, l.now)
				l.now = l.now.Add(time.Minute)
				l.h.Open(l.now)
			}
			if v.Loud != tt.want {
				t.Errorf("%s, disabled by the answer: %v: loud is %v", tt.run, disables, v.Loud)
			}
		}
	}
}

func TestRepeatsGoOnAlone(t *testing.T) {
	var h health.Health
	for range 1000 {
		if !h.MayRetry(false, 0, 16) {
			t.Fatal("a repeat waits for nothing")
		}
		h.Started(true, 1, time.Time{})
	}
	if h.MayRetry(true, 0, 16) || h.MayRetry(false, 1, 16) {
		t.Error("repeats take what first attempts need")
	}
}

func TestHealthIsSmall(t *testing.T) {
	if n := unsafe.Sizeof(health.Health{}); n > 240 {
		t.Errorf("a Health takes %d bytes", n)
	} else {
		t.Logf("a Health takes %d bytes", n)
	}
}

func BenchmarkHealth(b *testing.B) {
	var h health.Health
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	e := health.End{Signal: health.Taken, Took: time.Millisecond, Served: time.Millisecond, Most: 16, Random: 0.5, DisableAfter: time.Hour}
	for h.Limit(16) < 16 {
		e.Mark, e.Started = h.Started(false, 8, now), now
		h.Ended(&e, now)
	}
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(100 * time.Microsecond)
		if why, _ := h.Closed(now); why != health.Open || h.Full(7, 16) || !h.MayRetry(false, 1, 16) {
			b.Fatal("closed")
		}
		e.Mark, e.Started = h.Started(false, 8, now), now
		h.Ended(&e, now)
		h.Standing()
	}
}

// That a receiver fails is told once, when its breaker opens or after a while, and that it is well again once after that.
// What quiet attempts find is told by the next one that is not.
func TestFailingAndRecoveryAreTold(t *testing.T) {
	l := newLane(1)
	var told string
	end := func(s health.Signal, quiet bool) {
		m := l.h.Started(false, 1, l.now)
		v := l.h.Ended(&health.End{Mark: m, Signal: s, Started: l.now, Took: time.Second, Most: 1, Random: 0.5, Quiet: quiet}, l.now)
		if v.Failing {
			told += "F"
		}
		if v.Recovered {
			told += "R"
		}
		if v.Failing && !v.Since.Equal(l.h.FailingSince()) {
			t.Errorf("failing since %v is told as %v", l.h.FailingSince(), v.Since)
		}
		l.now = l.now.Add(time.Second)
		l.h.Open(l.now)
	}
	many := func(n int, s health.Signal, quiet bool) {
		for range n {
			end(s, quiet)
		}
		told += "|"
	}
	many(4, health.Unreachable, false)
	many(1, health.Taken, false)
	many(9, health.Unreachable, false) // the breaker opens at the fifth
	many(2, health.Taken, false)
	many(3, health.Failed, false)
	l.now = l.now.Add(5 * time.Minute)
	many(2, health.Failed, false)
	many(1, health.Taken, false)
	if want := "||F|R||F|R|"; told != want {
		t.Errorf("told %s, want %s", told, want)
	}

	told = ""
	many(9, health.Unreachable, true)
	many(1, health.Unreachable, false)
	many(1, health.Taken, true)
	many(2, health.Taken, false)
	if want := "|F||R|"; told != want {
		t.Errorf("with quiet ones told %s, want %s", told, want)
	}

	told = ""
	many(9, health.Unreachable, false)
	l.h.Forgive()
	many(9, health.Unreachable, false)
	l.h = l.h.Replaced()
	many(1, health.Taken, false)
	many(1, health.Taken, false)
	if want := "F|F|R||"; told != want {
		t.Errorf("forgiven, replaced and well told %s, want %s", told, want)
	}

	told = ""
	l.h = health.Health{}
	l.h.Failed(l.now.Add(-time.Hour))
	many(1, health.Taken, false)
	if want := "R|"; told != want {
		t.Errorf("failing for an hour before the start and well after it told %s, want %s", told, want)
	}
}
