package delivery

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

func TestCancel(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	b.append(publication("fifo", 1), publication("timer", 1), publication("done", 1))
	byID := map[string]Job{}
	for _, j := range b.jobs() {
		byID[j.Event.ID] = j
	}
	now := b.clock.now()
	b.failed(byID["timer"], time.Minute)
	b.succeed(byID["done"])
	for _, name := range []string{"fifo", "timer", "timer"} {
		d, err := b.Cancel(ctx, lane(1), byID[name].ID, "no longer wanted")
		if err != nil || d.State != Cancelled || d.StateReason != "no longer wanted" || d.Subscription != "sub-1" || d.CompleteTime.IsZero() {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	if _, err := b.Cancel(ctx, lane(1), byID["done"].ID, ""); !errors.Is(err, ErrFinal) {
		t.Errorf("done: %v", err)
	}
	if _, err := b.Cancel(ctx, lane(1), ID{Seq: 1, Subscription: 1}, ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	if _, err := b.Cancel(ctx, lane(2), byID["fifo"].ID, ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("another lane's: %v", err)
	}
	if _, err := b.Cancel(ctx, LaneKey{other, 1}, byID["fifo"].ID, ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("another namespace's: %v", err)
	}
	// An attempt that was in flight ends afterwards: kept, but changes nothing.
	b.failed(byID["fifo"], time.Minute)
	b.flush()
	if d := b.delivery(byID["fifo"].ID); d.State != Cancelled || d.Attempts != 1 {
		t.Errorf("resurrected: %+v", d)
	}
	if attempts, _ := b.Attempts(acme, byID["fifo"].ID); len(attempts) != 1 || attempts[0].ResponseCode != 500 {
		t.Errorf("late attempt lost: %+v", attempts)
	}
	if got := b.timers(1, now.Add(time.Hour)); len(got) != 0 {
		t.Errorf("timers left: %v", ids(got))
	}
	if n := b.OpenIn(acme); n != 0 {
		t.Errorf("%d open", n)
	}
}

func TestRetry(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	pub := publication("e", 1, 2)
	pub.Targets[0].MaxAttempts = 1
	b.append(pub)
	jobs := b.jobs()
	b.exhaust(jobs[0])
	b.succeed(jobs[1])
	b.flush()
	b.clock.add(3 * time.Hour) // beyond Expire
	if _, err := b.Retry(ctx, lane(2), jobs[1].ID, -1); !errors.Is(err, ErrInvalidState) {
		t.Errorf("succeeded: %v", err)
	}
	if _, err := b.Retry(ctx, lane(1), jobs[0].ID, 7); !errors.Is(err, ErrInvalidState) {
		t.Errorf("guard: %v", err)
	}
	d, err := b.Retry(ctx, lane(1), jobs[0].ID, 1)
	if err != nil || d.State != Scheduled || d.MaxAttempts != 2 || !d.Expire.After(b.clock.now()) || !d.CompleteTime.IsZero() {
		t.Fatalf("%+v, %v", d, err)
	}
	if n := b.OpenOf(lane(1)); n != 1 {
		t.Errorf("%d open", n)
	}
	again := b.timers(1, b.clock.now())
	if len(again) != 1 || !again[0].Manual || again[0].Attempts != 1 {
		t.Fatalf("%+v", again)
	}
	b.succeed(again[0])
	b.flush()
	if d := b.delivery(jobs[0].ID); d.State != Succeeded || d.Attempts != 2 {
		t.Errorf("%+v", d)
	}
	if got := all(t, b, Query{States: []State{Exhausted, Scheduled}}); len(got) != 0 {
		t.Errorf("index not clean: %+v", got)
	}
}

// A delivery of the FIFO is due anyway; asked for again and again it keeps its place, and so do those behind it (A2).
func TestRetryLeavesTheFIFOAsItIs(t *testing.T) {
	b := newBench(t, onePartition)
	for i := range 5 {
		b.append(publication(fmt.Sprint(i), 1))
	}
	jobs := b.jobs()
	b.heard()
	for _, i := range []int{3, 0, 3} {
		d, err := b.Retry(t.Context(), lane(1), jobs[i].ID, -1)
		if err != nil || d.State != Pending {
			t.Errorf("%+v, %v", d, err)
		}
	}
	if got := b.heard(); len(got) != 0 {
		t.Errorf("told %v", got)
	}
	b.reopen()
	got := b.backlog(1)
	for i, job := range got {
		if job.ID != jobs[i].ID {
			t.Errorf("%d is %v, want %v", i, job.ID, jobs[i].ID)
		}
	}
	if len(got) != 5 {
		t.Errorf("%d wait", len(got))
	}
}

// A deferred delivery is due at once when a caller asks for it.
func TestRetryOfADeferredDelivery(t *testing.T) {
	b := newBench(t)
	pub := publication("e", 1)
	pub.Event.DeliverTime = b.clock.now().Add(time.Hour)
	b.append(pub)
	id := idOf(pub.Event, 1)
	if d, err := b.Retry(t.Context(), lane(1), id, 0); err != nil || d.State != Scheduled || d.NextAttempt.After(b.clock.now().Add(time.Millisecond)) {
		t.Errorf("%+v, %v", d, err)
	}
	// Twice in one microsecond, and still no row is overwritten.
	for range 3 {
		if _, err := b.Retry(t.Context(), lane(1), id, 0); err != nil {
			t.Error(err)
		}
	}
	jobs := b.timers(1, pub.Event.DeliverTime)
	if len(jobs) != 1 || jobs[0].Epoch != 5 {
		t.Fatalf("%+v", jobs)
	}
	b.succeed(jobs[0])
	b.flush()
	if got := b.lanes(); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

func TestRetryFreesFromQuarantine(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1))
	job := b.jobs()[0]
	now := b.clock.now()
	job.Indeterminate, job.Suspicion = 2, 2
	b.settle(job, Step{State: Scheduled, Due: now.Add(time.Minute)}, attemptAt(2, OutcomeInterrupted, 0, now))
	b.flush()
	b.clock.add(time.Minute)
	again := b.timers(1, b.clock.now())
	if len(again) != 1 || again[0].Indeterminate != 2 || again[0].Suspicion != 2 {
		t.Fatalf("%+v", again)
	}
	again[0].Indeterminate, again[0].Suspicion = 3, 3
	b.settle(again[0], Step{State: Rejected, Reason: "quarantined"}, attemptAt(3, OutcomeInterrupted, 0, now))
	b.flush()
	if d, err := b.Retry(t.Context(), lane(1), job.ID, -1); err != nil || d.State != Scheduled || d.StateReason != "" {
		t.Fatalf("%+v, %v", d, err)
	}
	freed := b.timers(1, b.clock.now())
	if len(freed) != 1 || freed[0].Indeterminate != 0 || freed[0].Suspicion != 1 {
		t.Errorf("want it free, and tried apart from others: %+v", freed)
	}
}

func TestCancelLaneEndsItsOwn(t *testing.T) {
	b := newBench(t)
	now := b.clock.now()
	const n = 3000 // some partition's share is more than a batch of edits
	var pubs []Publication
	for i := range n {
		p := publication(fmt.Sprint(i), 1)
		if i%3 == 0 {
			p.Event.DeliverTime = now.Add(time.Hour)
		}
		if i%10 == 9 {
			p.Targets[0].UID = uid(9)
		}
		pubs = append(pubs, p)
	}
	b.append(pubs...)
	jobs := b.jobs()
	for i, job := range jobs[:100] {
		b.failed(job, time.Duration(i+1)*time.Minute)
	}
	b.flush()
	b.heard()
	got, err := b.CancelLane(context.Background(), lane(1), "subscription deleted", nil)
	if err != nil || got != n-n/10 {
		t.Errorf("cancelled %d, %v", got, err)
	}
	if log := b.heard(); len(log) != got {
		t.Errorf("%d rows were cancelled, %d told", got, len(log))
	}
	if mine, others := b.OpenOf(lane(1)), b.OpenOf(lane(9)); mine != 0 || others != n/10 {
		t.Errorf("%d and %d open", mine, others)
	}
	left := len(b.backlog(9)) + len(b.timers(9, now.Add(48*time.Hour)))
	if left != n/10 || len(b.backlog(1))+len(b.timers(1, now.Add(48*time.Hour))) != 0 {
		t.Errorf("%d left", left)
	}
	// What was in memory is settled later and stays cancelled.
	for _, job := range jobs[100:200] {
		b.failed(job, time.Minute)
	}
	b.flush()
	for _, job := range jobs[100:200] {
		if d := b.delivery(job.ID); (d.State == Cancelled) != (job.ID.Subscription == 1) {
			t.Errorf("%+v", d)
		}
	}
	if again, err := b.CancelLane(context.Background(), lane(1), "", nil); again != 0 || err != nil {
		t.Errorf("again %d, %v", again, err)
	}
}

func TestDropNamespace(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1), publication("gone", 1))
	beside := publication("e", 1)
	beside.Event.Namespace = other
	b.append(beside)
	jobs := b.jobs()
	if err := b.DropNamespace(t.Context(), acme); err != nil {
		t.Fatal(err)
	}
	for i, job := range jobs {
		switch i {
		case 0:
			b.failed(job, time.Minute)
		default:
			b.succeed(job)
		}
	}
	b.flush()
	if _, err := b.Event(acme, "e"); !errors.Is(err, ErrNotFound) {
		t.Errorf("event is still there: %v", err)
	}
	for _, q := range []Query{{Namespace: acme, Subscription: 1}, {Namespace: acme}, {Namespace: acme, EventUID: jobs[0].Event.UID}} {
		if page, err := b.Deliveries(q); err != nil || len(page.Deliveries) != 0 {
			t.Errorf("%+v, %v", page, err)
		}
	}
	if d, err := b.Delivery(other, idOf(beside.Event, 1)); err != nil || d.State != Succeeded {
		t.Errorf("other namespace: %+v, %v", d, err)
	}
	if b.OpenIn(acme) != 0 || b.OpenIn(other) != 0 || len(b.lanes()) != 0 {
		t.Error("something is open")
	}
	settled := 0
	for _, line := range b.heard() {
		if line == "settled 1" {
			settled++
		}
	}
	if settled != len(jobs) {
		t.Errorf("%d of %d settles told", settled, len(jobs))
	}
	b.reopen()
	again := publication("e", 1)
	if r := b.append(again)[0]; r.Duplicate {
		t.Error("id of a dropped namespace is still taken")
	}
	if first := jobs[0].ID; again.Event.Partition == first.Partition && again.Event.Seq <= first.Seq {
		t.Error("sequence was given twice")
	}
}

func TestOpenCountsSurviveReopen(t *testing.T) {
	b := newBench(t)
	var pubs []Publication
	for i := range 60 {
		p := publication(fmt.Sprint(i), 1, 2)
		if i%4 == 0 {
			p.Event.DeliverTime = b.clock.now().Add(time.Hour)
		}
		pubs = append(pubs, p)
	}
	b.append(pubs...)
	for i, job := range b.jobs() {
		switch i % 3 {
		case 0:
			b.succeed(job)
		case 1:
			b.failed(job, time.Minute)
		}
	}
	b.flush()
	waitFor(t, b.Counted)
	want, want1 := b.OpenIn(acme), b.OpenOf(lane(1))
	if want != 90 {
		t.Errorf("%d open", want)
	}
	b.reopen()
	waitFor(t, b.Counted)
	if got, got1 := b.OpenIn(acme), b.OpenOf(lane(1)); got != want || got1 != want1 {
		t.Errorf("%d, %d after reopen, want %d, %d", got, got1, want, want1)
	}
}

// A caller that goes away parts no change from what follows of it (A7): the follower is told, and the change is
// durable.
func TestEditGoesOnWithoutItsCaller(t *testing.T) {
	log := newHeldLog()
	b := newBench(t, onePartition, log.use)
	b.append(publication("e", 1), publication("f", 1))
	jobs := b.jobs()
	b.exhaust(jobs[0])
	b.flush()
	b.heard()
	log.hold(b)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := b.Retry(ctx, lane(1), jobs[0].ID, -1); !errors.Is(err, context.Canceled) {
			t.Errorf("retry: %v", err)
		}
	})
	wg.Go(func() {
		if _, err := b.Cancel(ctx, lane(1), jobs[1].ID, "x"); !errors.Is(err, context.Canceled) {
			t.Errorf("cancel: %v", err)
		}
	})
	p := b.partitions[0]
	waitFor(t, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(p.edits) == 2 })
	cancel()
	wg.Wait()
	log.release()
	b.flush()
	told := map[string]int{}
	for _, line := range b.heard() {
		told[line]++
	}
	if told["timed 2"] != 1 || told["edited 1"] != 1 || len(told) != 2 {
		t.Errorf("told %v", told)
	}
	b.reopen()
	if got := b.timers(1, b.clock.now()); len(got) != 1 || len(b.backlog(1)) != 0 {
		t.Errorf("%v are due", ids(got))
	}
}

// An edit whose context has ended before is not made.
func TestEditOfAGoneCallerIsNotBegun(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Cancel(ctx, lane(1), b.jobs()[0].ID, "x"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	b.flush()
	if got := b.backlog(1); len(got) != 1 {
		t.Error("cancelled")
	}
}

// A delivery that is looked up costs what it is, however many namespaces there are, and is seen in its own only (A14).
func TestDeliveryIsFoundInItsNamespaceOnly(t *testing.T) {
	b := newBench(t)
	var events []*Event
	for ns := range 50 {
		p := publication("e", 1)
		p.Event.Namespace = NamespaceKey(ns + 100)
		events = append(events, b.append(p)[0].Event)
	}
	for _, e := range events {
		for ns := range NamespaceKey(50) {
			_, err := b.Delivery(ns+100, idOf(e, 1))
			if found := err == nil; found != (ns+100 == e.Namespace) {
				t.Fatalf("event of %d in %d: %v", e.Namespace, ns+100, err)
			}
		}
	}
}

// However many deliveries a lane has, of whatever kind, and whatever waits for whom: all are cancelled, each counted once, in
// as many commits as they need.
func TestCancelLaneOfMany(t *testing.T) {
	b := newBench(t, onePartition)
	const n = 2*editBatch + 100
	for i := range n {
		key := ""
		if i%3 == 0 {
			key = fmt.Sprint("key-", i%5) // of which all but one wait
		}
		pub := keyed(fmt.Sprint("e", i), key, 1)
		if i%7 == 0 {
			pub.Event.DeliverTime = b.clock.now().Add(time.Duration(1+i) * time.Minute)
		}
		b.append(pub)
	}
	blocks := b.wantTurn("key-0", "e0")
	b.settle(blocks, Step{State: Exhausted, Block: true}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
	b.flush()
	before := b.partitions[0].index
	if got, err := b.CancelLane(context.Background(), lane(1), "deleted", nil); got != n-1 || err != nil {
		t.Errorf("%d of %d cancelled, %v", got, n-1, err)
	}
	if made := b.partitions[0].index - before; made > n/editBatch+2 {
		t.Errorf("%d commits", made)
	}
	b.reopen()
	waitFor(t, b.Counted)
	if open := b.OpenOf(lane(1)); open != 0 || len(b.lanes()) != 0 {
		t.Errorf("%d are open, lanes %v", open, b.lanes())
	}
	b.append(keyed("after", "key-0", 1))
	b.wantTurn("key-0", "after")
}

// All keys of a lane that are blocked are let go of, however many there are.
func TestUnblockOfMany(t *testing.T) {
	b := newBench(t, onePartition)
	const n = editBatch + 50
	for i := range n {
		key := fmt.Sprint("key-", i)
		b.append(keyed(fmt.Sprint(i), key, 1), keyed(fmt.Sprint(i, "-next"), key, 1))
	}
	for _, job := range b.jobs() {
		b.settle(job, Step{State: Exhausted, Block: true}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
	}
	b.flush()
	if got, err := b.Unblock(context.Background(), lane(1), nil); got != n || err != nil {
		t.Errorf("%d of %d unblocked, %v", got, n, err)
	}
	if jobs := b.backlog(1); len(jobs) != n {
		t.Errorf("%d of %d go on", len(jobs), n)
	}
}
