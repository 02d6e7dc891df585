package delivery

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestNext(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	policy := Policy{Schedule: []time.Duration{5 * time.Second, 5 * time.Minute, time.Hour}, Jitter: 0.2}
	fresh := Job{MaxAttempts: 10, Expire: now.Add(96 * time.Hour)}
	failed := func(code int) Result { return Result{Attempt: Attempt{Outcome: OutcomeRetryable, ResponseCode: code}} }
	crash := func(g Guilt) Result {
		return Result{Attempt: Attempt{Outcome: OutcomeInterrupted, Error: "plugin lost"}, Cause: CausePlugin, Indeterminate: true, Guilt: g}
	}
	with := func(j Job, change func(*Job)) Job { change(&j); return j }
	tests := []struct {
		name   string
		policy Policy
		job    Job
		result Result
		rnd    float64
		want   Step
	}{
		{"2xx", policy, fresh, Result{Attempt: Attempt{Outcome: OutcomeSucceeded, ResponseCode: 204}}, 0.5, Step{State: Succeeded}},
		{"unspent", policy, fresh, Result{Cause: CauseUnspent}, 0.5, Step{State: Pending}},
		{"first failure", policy, fresh, failed(500), 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"jitter low", policy, fresh, failed(500), 0, Step{State: Scheduled, Due: now.Add(4 * time.Second)}},
		{"second failure", policy, with(fresh, func(j *Job) { j.Attempts = 1 }), failed(500), 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Minute)}},
		{"past the schedule", policy, with(fresh, func(j *Job) { j.Attempts = 8 }), failed(500), 0.5, Step{State: Scheduled, Due: now.Add(time.Hour)}},
		{"used up", policy, with(fresh, func(j *Job) { j.Attempts = 9 }), failed(500), 0.5, Step{State: Exhausted, Reason: "all 10 attempts failed"}},
		{"manual extra", policy, with(fresh, func(j *Job) { j.Attempts, j.MaxAttempts, j.Manual = 10, 11, true }), failed(500), 0.5, Step{State: Exhausted, Reason: "all 11 attempts failed"}},
		{"expired", policy, with(fresh, func(j *Job) { j.Expire = now.Add(time.Second) }), failed(500), 0.5, Step{State: Exhausted, Reason: "expired: the next attempt would start after the maximum age"}},
		{"gone", policy, fresh, failed(410), 0.5, Step{State: Rejected, Reason: "the target answered 410 Gone", Disable: true}},
		{"gone ignored", Policy{Schedule: policy.Schedule, IgnoreGone: true}, fresh, failed(410), 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"policy", policy, fresh, Result{Attempt: Attempt{Outcome: OutcomeUnreachable, Error: "address not allowed"}, Cause: CausePolicy}, 0.5, Step{State: Rejected, Reason: "refused by policy: address not allowed"}},
		{"permanent", policy, fresh, Result{Attempt: Attempt{Outcome: OutcomePermanent}}, 0.5, Step{State: Rejected, Reason: "permanent failure"}},
		{"plugin", policy, fresh, Result{Attempt: Attempt{Outcome: OutcomePluginError}, Cause: CausePlugin}, 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"first crash", policy, fresh, Result{Attempt: Attempt{Outcome: OutcomeInterrupted}, Cause: CausePlugin, Indeterminate: true}, 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"crash of the last attempt", policy, with(fresh, func(j *Job) { j.Attempts = 9 }), Result{Attempt: Attempt{Outcome: OutcomeInterrupted}, Cause: CausePlugin, Indeterminate: true}, 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"crashes use up no attempts", policy, with(fresh, func(j *Job) { j.Attempts, j.Indeterminate = 4, 3 }), failed(500), 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Minute)}},
		{"fourth crash in company", policy, with(fresh, func(j *Job) { j.Indeterminate, j.Suspicion = 3, 3 }), crash(GuiltShared), 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"hundredth kill", policy, with(fresh, func(j *Job) { j.Indeterminate, j.Suspicion = 99, 1 }), crash(GuiltNone), 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"first crash, alone", policy, fresh, crash(GuiltProven), 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"second crash, alone", policy, with(fresh, func(j *Job) { j.Indeterminate, j.Suspicion = 1, 1 }), crash(GuiltProven), 0.5, Step{State: Rejected, Reason: "quarantined: in flight at 2 plugin crashes, alone at the last one: plugin lost"}},
		{"cleared in between", policy, with(fresh, func(j *Job) { j.Indeterminate = 3 }), crash(GuiltProven), 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"fourth crash, alone, of a plugin that answers nothing", policy, with(fresh, func(j *Job) { j.Indeterminate, j.Suspicion = 3, 3 }), crash(GuiltAlone), 0.5, Step{State: Scheduled, Due: now.Add(time.Hour)}},
		{"fifth crash, alone, of a plugin that answers nothing", policy, with(fresh, func(j *Job) { j.Indeterminate, j.Suspicion = 4, 4 }), crash(GuiltAlone), 0.5, Step{State: Rejected, Reason: "quarantined: in flight at 5 plugin crashes, alone at the last one: plugin lost"}},
		{"retry after", policy, fresh, Result{Attempt: Attempt{Outcome: OutcomeRetryable, ResponseCode: 429, RetryAfter: time.Minute}}, 0.5, Step{State: Scheduled, Due: now.Add(time.Minute)}},
		{"retry after too short", policy, fresh, Result{Attempt: Attempt{Outcome: OutcomeRetryable, RetryAfter: -time.Minute}}, 0.5, Step{State: Scheduled, Due: now.Add(5 * time.Second)}},
		{"retry after a year", policy, fresh, Result{Attempt: Attempt{Outcome: OutcomeRetryable, RetryAfter: 9000 * time.Hour}}, 0.5, Step{State: Scheduled, Due: now.Add(24 * time.Hour)}},
		{"retry after beyond the end", policy, with(fresh, func(j *Job) { j.Expire = now.Add(time.Hour) }), Result{Attempt: Attempt{Outcome: OutcomeRetryable, RetryAfter: 2 * time.Hour}}, 0.5, Step{State: Scheduled, Due: now.Add(time.Hour)}},
		{"no schedule", Policy{}, fresh, failed(500), 0.5, Step{State: Scheduled, Due: now.Add(time.Second)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := Next(tt.policy, &tt.job, tt.result, now, tt.rnd); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func FuzzNext(f *testing.F) {
	f.Add(int64(5e9), int64(0), 0.2, 0.5, 0, 10, int64(1e12), int64(0), uint8(2), uint8(0), 500, false, 0)
	f.Add(int64(-5), int64(math.MaxInt64), math.NaN(), 2.0, -3, -10, int64(-1), int64(math.MaxInt64), uint8(9), uint8(7), 410, true, 1)
	f.Fuzz(func(t *testing.T, d1, d2 int64, jitter, rnd float64, attempts, most int, left, after int64, outcome, cause uint8, code int, ind bool, crashes int) {
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		job := &Job{Attempts: attempts, MaxAttempts: most, Expire: now.Add(time.Duration(left)), Indeterminate: crashes, Suspicion: crashes}
		r := Result{
			Attempt: Attempt{Outcome: Outcome(outcome), ResponseCode: code, RetryAfter: time.Duration(after)},
			Cause:   Cause(cause), Indeterminate: ind, Guilt: Guilt(code % 4),
		}
		step := Next(Policy{Schedule: []time.Duration{time.Duration(d1), time.Duration(d2)}, Jitter: jitter}, job, r, now, rnd)
		switch {
		case step.State == Scheduled && (!step.Due.After(now) || step.Due.After(job.Expire)):
			t.Errorf("due %v with now %v and expire %v", step.Due, now, job.Expire)
		case step.State == Pending != (r.Cause == CauseUnspent):
			t.Errorf("%+v", step)
		case (step.State == Exhausted || step.State == Rejected) == (strings.TrimSpace(step.Reason) == ""):
			t.Errorf("reason of %+v", step)
		}
	})
}

func TestWatch(t *testing.T) {
	crash := func(g Guilt) Result { return Result{Cause: CausePlugin, Indeterminate: true, Guilt: g} }
	for _, tt := range []struct {
		name   string
		before int
		result Result
		want   int
	}{
		{"killed from outside", 0, crash(GuiltNone), 1},
		{"killed from outside again and again", 1, crash(GuiltNone), 1},
		{"killed from outside, much suspected", 3, crash(GuiltNone), 3},
		{"a crash in company", 0, crash(GuiltShared), 1},
		{"a crash alone", 1, crash(GuiltAlone), 2},
		{"nothing tried", 2, Result{Cause: CauseUnspent}, 2},
		{"answered", 4, Result{}, 0},
		{"a failure of the plugin that it survives", 4, Result{Cause: CausePlugin}, 0},
	} {
		if got := Watch(&Job{Suspicion: tt.before}, tt.result); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
		}
	}
}

func TestIDText(t *testing.T) {
	ids := []ID{{}, {1, 0, 0}, {1 << 16, 3, 4}, {uint64(time.Now().UnixMilli()) << 16, 15, 65535}, {^uint64(0), 65535, ^SubscriptionKey(0)}}
	last := ""
	for _, id := range ids {
		text := id.String()
		if got, err := ParseID(text); err != nil || got != id || len(text) != 29 {
			t.Errorf("%+v: %q, %+v, %v", id, text, got, err)
		}
		if text <= last && last != "" {
			t.Errorf("%q does not sort after %q", text, last)
		}
		last = text
	}
	for _, bad := range []string{"", "x", strings.Repeat("0", 30), strings.Repeat("w", 29), strings.ToUpper(ids[4].String()), strings.Repeat("0", 28) + "1", strings.Repeat("\n", 29)} {
		if _, err := ParseID(bad); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add(ID{12345, 6, 7}.String())
	f.Fuzz(func(t *testing.T, text string) {
		if id, err := ParseID(text); err == nil && id.String() != text {
			t.Errorf("%q became %q", text, id)
		}
	})
}
