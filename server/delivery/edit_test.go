package delivery

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestDeferredEventWaitsForItsTimer(t *testing.T) {
	b := newBench(t)
	b.close()
	j, err := Open(b.opts)
	if err != nil {
		t.Fatal(err)
	}
	b.Journal = j
	told := make(chan time.Time, 1)
	j.OnTimer(func(_ LaneKey, _ uint16, due time.Time) { told <- due })
	j.Start(func(jobs []*Job) { t.Errorf("%d jobs handed over", len(jobs)) })
	e := event("later", "s")
	e.DeliverTime = b.clock.now().Add(time.Hour)
	b.append(e)
	if due := <-told; !due.Equal(e.DeliverTime) {
		t.Errorf("told of %v", due)
	}
	if got := b.backlog(lane("s"), 10); len(got) != 0 {
		t.Errorf("in the backlog: %v", ids(got))
	}
	d := b.delivery(ID{e.Seq, e.Partition, 0})
	if d.State != Pending || !d.NextAttempt.Equal(e.DeliverTime) || !d.Expire.Equal(e.DeliverTime.Add(time.Hour)) {
		t.Errorf("%+v", d)
	}
	b.reopen()
	due := 0
	for state, err := range b.Lanes() {
		if err != nil {
			t.Fatal(err)
		}
		if state.NextDue.Equal(e.DeliverTime) && state.Lane == lane("s") {
			due++
		}
	}
	if due != 1 {
		t.Errorf("%d lanes with the timer", due)
	}
	jobs := b.timers(lane("s"), e.DeliverTime)
	if len(jobs) != 1 || jobs[0].Attempts != 0 {
		t.Fatalf("timers %+v", jobs)
	}
	b.Settle(jobs[0], Step{State: Scheduled, Due: e.DeliverTime.Add(time.Minute)}, attemptAt(1, OutcomeRetryable, 500, e.DeliverTime))
	b.flush()
	jobs = b.timers(lane("s"), e.DeliverTime.Add(time.Hour))
	if len(jobs) != 1 || jobs[0].Attempts != 1 {
		t.Fatalf("timers %+v", jobs)
	}
	b.Settle(jobs[0], Step{State: Exhausted, Reason: "enough"}, attemptAt(2, OutcomeRetryable, 500, e.DeliverTime))
	b.flush()
	for _, state := range []State{Pending, Scheduled} {
		n := 0
		_ = b.eachOpen(b.db, e.Partition, lane("s"), ^uint64(0), func(uint64) error { n++; return nil })
		if n != 0 {
			t.Errorf("%d open entries left as %d", n, state)
		}
	}
}

func TestTimersComeInPieces(t *testing.T) {
	b := newBench(t, func(o *Options) { o.Partitions = 1 })
	now := b.clock.now()
	for i := range 5 {
		b.append(event(fmt.Sprint(i), "s"))
	}
	for i, job := range b.jobs() {
		b.Settle(job, Step{State: Scheduled, Due: now.Add(time.Duration(5-i) * time.Second)}, attemptAt(1, OutcomeTimedOut, 0, now))
	}
	jobs, next, err := b.Timers(lane("s"), 0, now.Add(3*time.Second), 2, 1<<20) // sees queued settles
	if err != nil || len(jobs) != 2 || jobs[0].Event.ID != "4" || !next.Equal(now.Add(3*time.Second)) {
		t.Fatalf("%v next %v, %v", ids(jobs), next, err)
	}
	jobs, next, err = b.Timers(lane("s"), 0, now.Add(3*time.Second), 10, 1<<20)
	if err != nil || len(jobs) != 3 || !next.Equal(now.Add(4*time.Second)) {
		t.Errorf("%v next %v, %v", ids(jobs), next, err)
	}
	if jobs, _, _ = b.Timers(lane("s"), 0, now.Add(time.Minute), 10, 1); len(jobs) != 1 {
		t.Errorf("%d jobs over the byte bound", len(jobs))
	}
}

func TestSkippedTargetIsRecordedOnly(t *testing.T) {
	b := newBench(t)
	e := event("e", "on", "off")
	e.Targets[1].Skip = true
	b.append(e)
	if jobs := b.jobs(); len(jobs) != 1 || jobs[0].Subscription != "on" {
		t.Errorf("%+v", jobs)
	}
	d := b.delivery(ID{e.Seq, e.Partition, 1})
	if d.State != Skipped || d.StateReason == "" || d.CompleteTime.IsZero() {
		t.Errorf("%+v", d)
	}
	if n := b.OpenIn("acme"); n != 1 {
		t.Errorf("%d open", n)
	}
	if got := b.backlog(lane("off"), 10); len(got) != 0 {
		t.Error("skipped delivery is in the backlog")
	}
}

func TestCancel(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	b.append(event("fifo", "s"), event("timer", "s"), event("done", "s"))
	byID := map[string]*Job{}
	for _, j := range b.jobs() {
		byID[j.Event.ID] = j
	}
	now := b.clock.now()
	b.Settle(byID["timer"], Step{State: Scheduled, Due: now.Add(time.Minute)}, attemptAt(1, OutcomeRetryable, 503, now))
	b.Settle(byID["done"], Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, now))
	for _, name := range []string{"fifo", "timer", "timer"} {
		d, err := b.Cancel(ctx, byID[name].ID, "no longer wanted")
		if err != nil || d.State != Cancelled || d.StateReason != "no longer wanted" {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	if _, err := b.Cancel(ctx, byID["done"].ID, ""); !errors.Is(err, ErrFinal) {
		t.Errorf("done: %v", err)
	}
	if _, err := b.Cancel(ctx, ID{Seq: 1}, ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	// An attempt that was in flight ends afterwards: kept, but changes nothing.
	b.Settle(byID["fifo"], Step{State: Scheduled, Due: now.Add(time.Minute)}, attemptAt(1, OutcomeRetryable, 500, now))
	b.flush()
	if d := b.delivery(byID["fifo"].ID); d.State != Cancelled || d.Attempts != 1 {
		t.Errorf("resurrected: %+v", d)
	}
	if attempts, _ := b.Attempts(byID["fifo"].ID); len(attempts) != 1 || attempts[0].ResponseCode != 500 {
		t.Errorf("late attempt lost: %+v", attempts)
	}
	if got := b.timers(lane("s"), now.Add(time.Hour)); len(got) != 0 {
		t.Errorf("timers left: %v", ids(got))
	}
	if n := b.OpenIn("acme"); n != 0 {
		t.Errorf("%d open", n)
	}
}

func TestRetry(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	e := event("e", "s", "ok")
	e.Targets[0].MaxAttempts = 1
	b.append(e)
	jobs := b.jobs()
	now := b.clock.now()
	b.Settle(jobs[0], Step{State: Exhausted, Reason: "enough"}, attemptAt(1, OutcomeRetryable, 500, now))
	b.Settle(jobs[1], Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, now))
	b.flush()
	b.clock.add(3 * time.Hour) // beyond Expire
	if _, err := b.Retry(ctx, jobs[1].ID, -1); !errors.Is(err, ErrInvalidState) {
		t.Errorf("succeeded: %v", err)
	}
	if _, err := b.Retry(ctx, jobs[0].ID, 7); !errors.Is(err, ErrInvalidState) {
		t.Errorf("guard: %v", err)
	}
	d, err := b.Retry(ctx, jobs[0].ID, 1)
	if err != nil || d.State != Scheduled || d.MaxAttempts != 2 || !d.Expire.After(b.clock.now()) || !d.CompleteTime.IsZero() {
		t.Fatalf("%+v, %v", d, err)
	}
	if n := b.OpenOf(lane("s")); n != 1 {
		t.Errorf("%d open", n)
	}
	again := b.timers(lane("s"), b.clock.now())
	if len(again) != 1 || !again[0].Manual || again[0].Attempts != 1 {
		t.Fatalf("%+v", again)
	}
	b.Settle(again[0], Step{State: Succeeded}, attemptAt(2, OutcomeSucceeded, 200, b.clock.now()))
	b.flush()
	if d := b.delivery(jobs[0].ID); d.State != Succeeded || d.Attempts != 2 {
		t.Errorf("%+v", d)
	}
	page, err := b.Deliveries(Query{Namespace: "acme", States: []State{Exhausted, Scheduled}})
	if err != nil || len(page.Deliveries) != 0 {
		t.Errorf("index not clean: %+v, %v", page, err)
	}
}

func TestRetryFreesFromQuarantine(t *testing.T) {
	b := newBench(t)
	b.append(event("e", "s"))
	job := b.jobs()[0]
	now := b.clock.now()
	job.Indeterminate, job.Suspicion = 2, 2
	b.Settle(job, Step{State: Scheduled, Due: now.Add(time.Minute)}, attemptAt(2, OutcomeInterrupted, 0, now))
	b.flush()
	b.clock.add(time.Minute)
	again := b.timers(lane("s"), b.clock.now())
	if len(again) != 1 || again[0].Indeterminate != 2 || again[0].Suspicion != 2 {
		t.Fatalf("%+v", again)
	}
	again[0].Indeterminate, again[0].Suspicion = 3, 3
	b.Settle(again[0], Step{State: Rejected, Reason: "quarantined"}, attemptAt(3, OutcomeInterrupted, 0, now))
	b.flush()
	if d, err := b.Retry(t.Context(), job.ID, -1); err != nil || d.State != Scheduled || d.StateReason != "" {
		t.Fatalf("%+v, %v", d, err)
	}
	freed := b.timers(lane("s"), b.clock.now())
	if len(freed) != 1 || freed[0].Indeterminate != 0 || freed[0].Suspicion != 1 {
		t.Errorf("want it free, and tried apart from others: %+v", freed)
	}
}

func TestCancelLaneEndsOneIncarnation(t *testing.T) {
	b := newBench(t)
	now := b.clock.now()
	const n = 1200
	var events []*Event
	for i := range n {
		e := event(fmt.Sprint(i), "s")
		if i%3 == 0 {
			e.DeliverTime = now.Add(time.Hour)
		}
		if i%10 == 9 {
			e.Targets[0].UID = testUID(9)
		}
		events = append(events, e)
	}
	b.append(events...)
	jobs := b.jobs()
	for i, job := range jobs[:100] {
		b.Settle(job, Step{State: Scheduled, Due: now.Add(time.Duration(i+1) * time.Minute)}, attemptAt(1, OutcomeRetryable, 500, now))
	}
	got, err := b.CancelLane(context.Background(), lane("s"), testUID(1), "subscription deleted")
	if err != nil || got != n-n/10 {
		t.Errorf("cancelled %d, %v", got, err)
	}
	if open := b.OpenOf(lane("s")); open != n/10 {
		t.Errorf("%d open", open)
	}
	left := len(b.backlog(lane("s"), 1000)) + len(b.timers(lane("s"), now.Add(48*time.Hour)))
	if left != n/10 {
		t.Errorf("%d left", left)
	}
	// What was in memory is settled later and stays cancelled.
	for _, job := range jobs[100:200] {
		b.Settle(job, Step{State: Scheduled, Due: now.Add(time.Minute)}, attemptAt(1, OutcomeRetryable, 500, now))
	}
	b.flush()
	if d := b.delivery(jobs[150].ID); jobs[150].SubscriptionUID == testUID(1) && d.State != Cancelled {
		t.Errorf("%+v", d)
	}
	if again, err := b.CancelLane(context.Background(), lane("s"), testUID(1), ""); again != 0 || err != nil {
		t.Errorf("again %d, %v", again, err)
	}
}

func TestDropNamespace(t *testing.T) {
	b := newBench(t)
	b.append(event("e", "s"))
	other := event("e", "s")
	other.Namespace = "acme2"
	b.append(other)
	jobs := b.jobs()
	if err := b.DropNamespace(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	for _, job := range jobs {
		b.Settle(job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()))
	}
	b.flush()
	if _, err := b.Event("acme", "e"); !errors.Is(err, ErrNotFound) {
		t.Errorf("event is still there: %v", err)
	}
	if page, err := b.Deliveries(Query{Namespace: "acme", Subscription: "s"}); err != nil || len(page.Deliveries) != 0 {
		t.Errorf("%+v, %v", page, err)
	}
	if d := b.delivery(ID{other.Seq, other.Partition, 0}); d.State != Succeeded {
		t.Errorf("other namespace: %+v", d)
	}
	if b.OpenIn("acme") != 0 || b.OpenIn("acme2") != 0 {
		t.Error("counters")
	}
	b.reopen()
	again := event("e", "s")
	if r := b.append(again)[0]; r.Duplicate {
		t.Error("id of a dropped namespace is still taken")
	}
	if first := jobs[0].ID; again.Partition == first.Partition && again.Seq <= first.Seq {
		t.Error("sequence was given twice")
	}
}

func TestOpenCountsSurviveReopen(t *testing.T) {
	b := newBench(t)
	var events []*Event
	for i := range 60 {
		e := event(fmt.Sprint(i), "a", "b")
		if i%4 == 0 {
			e.DeliverTime = b.clock.now().Add(time.Hour)
		}
		events = append(events, e)
	}
	b.append(events...)
	for i, job := range b.jobs() {
		switch i % 3 {
		case 0:
			b.Settle(job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()))
		case 1:
			b.Settle(job, Step{State: Scheduled, Due: b.clock.now().Add(time.Minute)}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
		}
	}
	b.flush()
	waitFor(t, b.Counted)
	want, wantA := b.OpenIn("acme"), b.OpenOf(lane("a"))
	if want != 90 {
		t.Errorf("%d open", want)
	}
	b.reopen()
	waitFor(t, b.Counted)
	if got, gotA := b.OpenIn("acme"), b.OpenOf(lane("a")); got != want || gotA != wantA {
		t.Errorf("%d, %d after reopen, want %d, %d", got, gotA, want, wantA)
	}
}

func TestLowWaterMovesRecoveryOn(t *testing.T) {
	b := newBench(t, func(o *Options) { o.Partitions = 1 })
	var last *Job
	for i := range 20 {
		b.append(event(fmt.Sprint(i), "s"))
	}
	jobs := b.jobs()
	for _, job := range jobs[:15] {
		b.Settle(job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()))
		last = job
	}
	b.SetLowWater(lane("s"), 0, last.ID.Seq+1)
	b.flush()
	b.reopen()
	for state, err := range b.Lanes() {
		if err != nil || state.From != jobs[15].ID.Seq {
			t.Errorf("%+v, %v; want from %d", state, err, jobs[15].ID.Seq)
		}
	}
}
