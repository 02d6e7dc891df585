package delivery

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

func TestSettleMovesDeliveryThroughItsStates(t *testing.T) {
	b := newBench(t)
	b.append(publication("ok", 1), publication("retry", 1), publication("dead", 1))
	byID := map[string]Job{}
	for _, j := range b.jobs() {
		byID[j.Event.ID] = j
	}
	now := b.clock.now()
	b.succeed(byID["ok"])
	due := now.Add(5 * time.Second)
	b.failed(byID["retry"], 5*time.Second)
	b.settle(byID["dead"], Step{State: Rejected, Reason: "gone"}, attemptAt(1, OutcomePermanent, 410, now))
	b.flush()
	if d := b.delivery(byID["ok"].ID); d.State != Succeeded || d.Attempts != 1 || d.Last.ResponseCode != 200 || d.CompleteTime.IsZero() {
		t.Errorf("ok: %+v", d)
	}
	if d := b.delivery(byID["retry"].ID); d.State != Scheduled || !d.NextAttempt.Equal(due) || d.Last.ResponseBody != nil {
		t.Errorf("retry: %+v", d)
	}
	if d := b.delivery(byID["dead"].ID); d.State != Rejected || d.StateReason != "gone" {
		t.Errorf("dead: %+v", d)
	}
	if n := b.OpenOf(lane(1)); n != 1 {
		t.Errorf("%d open, want 1", n)
	}
	b.reopen()
	if got := b.backlog(1); len(got) != 0 {
		t.Errorf("backlog %v", ids(got))
	}
	if got := b.timers(1, due.Add(-time.Microsecond)); len(got) != 0 {
		t.Errorf("early timers %v", ids(got))
	}
	again := b.timers(1, due)
	if len(again) != 1 || again[0].Attempts != 1 || again[0].Due != InstantOf(due) || again[0].Epoch != 2 || again[0].Kind != Timer {
		t.Fatalf("timers %+v", again)
	}
	b.settle(again[0], Step{State: Succeeded}, attemptAt(2, OutcomeSucceeded, 204, due))
	b.flush()
	if got := b.timers(1, due.Add(time.Hour)); len(got) != 0 {
		t.Errorf("timers after success %v", ids(got))
	}
	attempts, err := b.Attempts(acme, again[0].ID)
	if err != nil || len(attempts) != 2 || attempts[0].ResponseCode != 500 || attempts[1].ResponseCode != 204 {
		t.Fatalf("attempts %+v, %v", attempts, err)
	}
	if string(attempts[0].ResponseBody) != "body" || len(attempts[0].RequestHeaders) != 1 || len(attempts[0].ResponseHeaders) != 1 {
		t.Errorf("bodies lost: %+v", attempts)
	}
	waitFor(t, b.Counted)
	if n := b.OpenIn(acme); n != 0 {
		t.Errorf("%d open at the end", n)
	}
	if got := b.lanes(); len(got) != 0 {
		t.Errorf("lanes %+v", got)
	}
}

func TestSettlesBecomeVisibleByThemselves(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1))
	job := b.jobs()[0]
	b.succeed(job)
	waitFor(t, func() bool { return b.delivery(job.ID).State == Succeeded })
	waitFor(t, func() bool {
		return b.syncs.synced.Load() == b.syncs.written.Load() && b.syncs.written.Load() > 0
	})
}

// Who settles learns of it, before the row that follows, and each in the order of commits.
func TestFollowerIsToldInOrder(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("e", 1))
	job := b.jobs()[0]
	b.failed(job, time.Minute)
	b.flush()
	want := []string{"offer 1", "settled 1", "timed 2"}
	if got := b.heard(); !slices.Equal(got, want) {
		t.Errorf("a retry: %v, want %v", got, want)
	}
	if _, err := b.Retry(t.Context(), lane(1), job.ID, -1); err != nil {
		t.Fatal(err)
	}
	if got, want := b.heard(), []string{"edited 2", "timed 3"}; !slices.Equal(got, want) {
		t.Errorf("an edit: %v, want %v", got, want)
	}
	stale := job
	stale.Kind, stale.Epoch, stale.Due = Timer, 2, InstantOf(b.clock.now().Add(time.Minute))
	b.failed(stale, time.Hour)
	b.flush()
	if got, want := b.heard(), []string{"edited 3", "settled 2", "timed 4"}; !slices.Equal(got, want) {
		t.Errorf("a settle that came too late: %v, want %v", got, want)
	}
	again := b.timers(1, b.clock.now().Add(time.Minute))
	b.succeed(again[0])
	b.flush()
	if got, want := b.heard(), []string{"settled 4"}; !slices.Equal(got, want) {
		t.Errorf("a success: %v, want %v", got, want)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	last := Commit(0)
	for _, c := range b.calls {
		if c.commit < last {
			t.Errorf("commit %d after %d", c.commit, last)
		}
		last = c.commit
	}
}

// The caller may use the job again as soon as Settle has returned.
func TestSettleTakesACopyOfTheJob(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1), publication("f", 1))
	jobs := b.jobs()
	kept := jobs[0]
	b.Settle(&jobs[0], Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()), nil)
	jobs[0] = jobs[1]
	b.flush()
	if d := b.delivery(kept.ID); d.State != Succeeded {
		t.Errorf("%+v", d)
	}
	if d := b.delivery(jobs[1].ID); d.State != Pending {
		t.Errorf("%+v", d)
	}
}

// What an attempt says is kept, whatever bytes a receiver sent.
func TestAttemptsKeepWhatReceiversSent(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1))
	a := attemptAt(1, OutcomeRetryable, 500, b.clock.now())
	a.Error, a.ResponseBody, a.RetryAfter, a.Manual, a.Peer = "no \xff text", []byte{0xff, 0}, time.Hour, true, "[::1]:80"
	a.ResponseHeaders = []Header{{"x-\xfe", "\xff"}, {"empty", ""}}
	job := b.jobs()[0]
	b.settle(job, Step{State: Scheduled, Due: b.clock.now().Add(time.Hour)}, a)
	b.flush()
	got, err := b.Attempts(acme, job.ID)
	if err != nil || len(got) != 1 {
		t.Fatal(got, err)
	}
	g := got[0]
	if g.Error != "no � text" || string(g.ResponseBody) != "\xff\x00" || g.RetryAfter != time.Hour || !g.Manual || g.Peer != a.Peer ||
		len(g.ResponseHeaders) != 2 || g.ResponseHeaders[1].Name != "empty" || !g.Start.Equal(a.Start) || g.Duration != a.Duration {
		t.Errorf("%+v", g)
	}
}

// An end that comes without an attempt leaves the last one on record.
func TestExpiryKeepsTheLastAttempt(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1), publication("untried", 2))
	for _, job := range b.jobs() {
		if job.ID.Subscription == 2 {
			b.settle(job, Step{State: Exhausted, Reason: "time is up"}, nil)
			defer func() {
				if d := b.delivery(job.ID); d.State != Exhausted || d.Last != nil || d.Attempts != 0 {
					t.Errorf("%+v", d)
				}
			}()
			continue
		}
		b.failed(job, time.Minute)
	}
	b.flush()
	again := b.timers(1, b.clock.now().Add(time.Minute))
	b.settle(again[0], Step{State: Exhausted, Reason: "time is up"}, nil)
	b.flush()
	d := b.delivery(again[0].ID)
	if d.State != Exhausted || d.Attempts != 1 || d.Last == nil || d.Last.ResponseCode != 500 || !d.NextAttempt.IsZero() {
		t.Errorf("%+v", d)
	}
}

// A step that is none changes nothing: nothing was spent.
func TestUnspentIsNotSettled(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1))
	job := b.jobs()[0]
	b.settle(job, Step{State: Pending}, nil)
	b.flush()
	if d := b.delivery(job.ID); d.State != Pending || d.Attempts != 0 {
		t.Errorf("%+v", d)
	}
	if got := b.backlog(1); len(got) != 1 {
		t.Errorf("%v", ids(got))
	}
}

func TestFailingIsNotedDurably(t *testing.T) {
	b := newBench(t)
	since := b.clock.now().Add(-26 * time.Hour)
	b.SetFailing(lane(1), since)
	b.SetFailing(lane(2), since)
	b.SetFailing(lane(3), since.Add(time.Second))
	b.SetFailing(lane(2), time.Time{})
	b.SetFailing(LaneKey{other, 1}, since)
	b.flush()
	if err := b.DropNamespace(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		got, err := b.Failing()
		if err != nil || len(got) != 2 || !got[lane(1)].Equal(since) || !got[lane(3)].Equal(since.Add(time.Second)) {
			t.Errorf("%v, %v", got, err)
		}
		b.reopen()
	}
}

// Much that is settled at once comes in order and is told of once.
func TestSettlesOfManyAreToldOnce(t *testing.T) {
	b := newBench(t, onePartition) // a row has its sequence to itself in one only
	const n = 5000
	var pubs []Publication
	for i := range n {
		pubs = append(pubs, publication(fmt.Sprint(i), i%7+1))
	}
	b.append(pubs...)
	jobs := b.jobs()
	var wg sync.WaitGroup
	for part := range slices.Chunk(jobs, n/10) {
		wg.Go(func() {
			for _, job := range part {
				b.succeed(job)
			}
		})
	}
	wg.Wait()
	if err := b.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	told := map[Row]int{}
	for _, c := range b.calls {
		if c.what == "settled" {
			told[c.row]++
		}
	}
	for row, times := range told {
		if times != 1 {
			t.Errorf("%v is told %d times", row, times)
		}
	}
	if len(b.lanes()) != 0 || b.OpenIn(acme) != 0 {
		t.Errorf("%d lanes, %d open", len(b.lanes()), b.OpenIn(acme))
	}
}

// An attempt that was under way when another one succeeded is added to the history, which keeps the success.
func TestLateAttemptLeavesTheSuccessOnRecord(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("e", 1))
	stale := b.jobs()[0]
	b.failed(stale, time.Minute)
	b.flush()
	if _, err := b.Retry(t.Context(), lane(1), stale.ID, -1); err != nil {
		t.Fatal(err)
	}
	b.succeed(b.timers(1, b.clock.now())[0])
	b.flush()
	b.failed(stale, time.Minute)
	b.flush()
	d := b.delivery(stale.ID)
	attempts, err := b.Attempts(acme, stale.ID)
	if err != nil || len(attempts) != 3 || d.State != Succeeded || d.Attempts != 3 {
		t.Fatalf("%+v, %+v, %v", d, attempts, err)
	}
	if attempts[1].Outcome != OutcomeSucceeded || attempts[2].Outcome != OutcomeRetryable {
		t.Errorf("%+v", attempts)
	}
}
