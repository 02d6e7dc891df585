package delivery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

func TestAppendIsIdempotent(t *testing.T) {
	b := newBench(t)
	first := b.append(publication("e1", 1))[0].Event
	again := b.append(publication("e1", 1, 2))[0]
	if !again.Duplicate || again.Event.Seq != first.Seq || !again.Event.AcceptTime.Equal(first.AcceptTime) || again.Event.Matched != 1 {
		t.Errorf("duplicate %+v", again)
	}
	changed := publication("e1", 1)
	changed.Event.ContentHash[0]++
	if r := b.Append(t.Context(), []Publication{changed})[0]; !errors.Is(r.Err, ErrEventConflict) {
		t.Errorf("conflict: %+v", r)
	}
	elsewhere := publication("e1", 1)
	elsewhere.Event.Namespace = other
	if r := b.append(elsewhere)[0]; r.Duplicate {
		t.Error("namespaces are mixed up")
	}
	b.reopen()
	b.clock.add(23 * time.Hour)
	if r := b.append(publication("e1", 1))[0]; !r.Duplicate || r.Event.UID != first.UID {
		t.Errorf("after reopen on the next day: %+v", r)
	}
	b.clock.add(2 * time.Hour)
	if r := b.append(publication("e1", 1))[0]; r.Duplicate {
		t.Errorf("after the window: %+v", r)
	}
	if e, err := b.Event(acme, "e1"); err != nil || e.Seq == first.Seq {
		t.Errorf("latest event: %+v, %v", e, err)
	}
	if got := all(t, b, Query{EventID: "e1"}); len(got) != 2 {
		t.Errorf("both have deliveries, got %d", len(got))
	}
}

// CloudEvents has source and id make an identity: the same id of another source is another event.
func TestSourcesHaveTheirOwnIDs(t *testing.T) {
	b := newBench(t)
	one, two := publication("e", 1), publication("e", 1)
	two.Event.Source = "//elsewhere"
	for _, r := range b.append(one, two) {
		if r.Duplicate {
			t.Errorf("%+v", r)
		}
	}
	b.reopen()
	for _, pub := range []Publication{publication("e", 1), {Event: &Event{Namespace: acme, ID: "e", Source: "//elsewhere", ContentHash: two.Event.ContentHash}}} {
		if r := b.append(pub)[0]; !r.Duplicate || r.Event.Source != pub.Event.Source {
			t.Errorf("%+v", r)
		}
	}
	if got := all(t, b, Query{EventID: "e"}); len(got) != 2 {
		t.Errorf("%d deliveries of the id", len(got))
	}
}

func TestAppendResolvesDuplicatesInOneBatch(t *testing.T) {
	b := newBench(t)
	conflict := publication("a", 1)
	conflict.Event.ContentHash[5]++
	twice := publication("c", 1, 1)
	batch := []Publication{publication("a", 1), publication("b", 1), publication("a", 1), conflict, {Event: &Event{Namespace: acme}}, twice}
	r := b.Append(t.Context(), batch)
	if r[0].Duplicate || r[1].Duplicate || !r[2].Duplicate || r[2].Event != batch[0].Event {
		t.Errorf("results %+v", r)
	}
	if !errors.Is(r[3].Err, ErrEventConflict) || !errors.Is(r[4].Err, ErrInvalidEvent) || !errors.Is(r[5].Err, ErrInvalidEvent) {
		t.Errorf("errors %v, %v, %v", r[3].Err, r[4].Err, r[5].Err)
	}
	if got := b.jobs(); len(got) != 2 {
		t.Errorf("%d jobs", len(got))
	}
}

// A duplicate of an event that retention has erased says what the event itself was told, not what it would match now.
func TestDuplicateOfWhatWasErased(t *testing.T) {
	b := newBench(t)
	first := publication("a", 1, 2, 3)
	first.Targets[1].Skip = true
	first.Event.FaultCount = 4
	r := b.Append(t.Context(), []Publication{first})[0]
	for _, job := range b.jobs() {
		b.succeed(job)
	}
	b.flush()
	b.clock.add(20 * time.Hour)
	b.retain(time.Hour)
	if _, err := b.Event(acme, "a"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("it is still there: %v", err)
	}
	again := b.Append(t.Context(), []Publication{publication("a")})[0]
	if e := again.Event; again.Err != nil || !again.Duplicate || e.Matched != 3 || e.Skipped != 1 || e.FaultCount != 4 || e.UID != r.Event.UID {
		t.Errorf("the duplicate: %+v, of %+v", again.Event, r.Event)
	}
}

func TestAppendByManyStoresEachEventOnce(t *testing.T) {
	b := newBench(t)
	const writers, each = 8, 200
	var mu sync.Mutex
	fresh := map[string]int{}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for range each {
				pub := publication(fmt.Sprint(rng.IntN(300)), 1)
				r := b.Append(context.Background(), []Publication{pub})[0]
				if r.Err != nil {
					t.Error(r.Err)
					return
				}
				if !r.Duplicate {
					mu.Lock()
					fresh[pub.Event.ID]++
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	for id, n := range fresh {
		if n != 1 {
			t.Errorf("%s stored %d times", id, n)
		}
	}
	if got := len(b.jobs()); got != len(fresh) {
		t.Errorf("%d jobs of %d events", got, len(fresh))
	}
}

// An Append whose caller has gone is made all the same, with all that follows from it.
func TestAppendGoesOnWithoutItsCaller(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	gone := b.Append(ctx, []Publication{publication("e", 1, 2), publication("f", 1)})
	waitFor(t, func() bool { return b.metrics.stored.Load() == 2 })
	for _, r := range gone {
		if r.Err == nil && r.Event == nil || r.Err != nil && !errors.Is(r.Err, context.Canceled) {
			t.Errorf("%+v", r)
		}
	}
	waitFor(t, func() bool { return b.OpenIn(acme) == 3 })
	b.flush()
	if got := b.jobs(); len(got) != 3 {
		t.Errorf("%d jobs offered", len(got))
	}
	if r := b.append(publication("e", 1, 2))[0]; !r.Duplicate {
		t.Error("stored twice")
	}
}

func TestSkippedTargetIsRecordedOnly(t *testing.T) {
	b := newBench(t)
	pub := publication("e", 1, 2)
	pub.Targets[1].Skip = true
	b.append(pub)
	if pub.Event.Matched != 2 || pub.Event.Skipped != 1 {
		t.Errorf("%+v", pub.Event)
	}
	if jobs := b.jobs(); len(jobs) != 1 || jobs[0].ID.Subscription != 1 {
		t.Errorf("%+v", jobs)
	}
	d := b.delivery(idOf(pub.Event, 2))
	if d.State != Skipped || d.StateReason == "" || d.CompleteTime.IsZero() || d.Subscription != "sub-2" {
		t.Errorf("%+v", d)
	}
	if n := b.OpenIn(acme); n != 1 {
		t.Errorf("%d open", n)
	}
	if got := b.backlog(2); len(got) != 0 {
		t.Error("skipped delivery is in the backlog")
	}
	// A caller may ask for it all the same.
	if d, err := b.Retry(t.Context(), lane(2), d.ID, 0); err != nil || d.State != Scheduled {
		t.Errorf("%+v, %v", d, err)
	}
	if got := b.timers(2, b.clock.now()); len(got) != 1 || !got[0].Manual {
		t.Errorf("%+v", got)
	}
}

func TestDeferredEventWaitsForItsTimer(t *testing.T) {
	b := newBench(t)
	pub := publication("later", 1)
	e := pub.Event
	e.DeliverTime = b.clock.now().Add(time.Hour)
	b.append(pub)
	if got := b.heard(); len(got) != 1 || got[0] != "timed 1" {
		t.Errorf("told %v", got)
	}
	if got := b.backlog(1); len(got) != 0 {
		t.Errorf("in the backlog: %v", ids(got))
	}
	d := b.delivery(idOf(e, 1))
	if d.State != Pending || !d.NextAttempt.Equal(e.DeliverTime) || !d.Expire.Equal(e.DeliverTime.Add(time.Hour)) {
		t.Errorf("%+v", d)
	}
	b.reopen()
	if got := b.lanes(); len(got) != 1 || got[0].Timer.Due != InstantOf(e.DeliverTime) || got[0].FIFO.Some || got[0].Lane != lane(1) {
		t.Errorf("lanes %+v", got)
	}
	if early := b.timers(1, e.DeliverTime.Add(-time.Microsecond)); len(early) != 0 {
		t.Errorf("early %v", ids(early))
	}
	jobs := b.timers(1, e.DeliverTime)
	if len(jobs) != 1 || jobs[0].Attempts != 0 {
		t.Fatalf("timers %+v", jobs)
	}
	b.settle(jobs[0], Step{State: Scheduled, Due: e.DeliverTime.Add(time.Minute)}, attemptAt(1, OutcomeRetryable, 500, e.DeliverTime))
	b.flush()
	jobs = b.timers(1, e.DeliverTime.Add(time.Hour))
	if len(jobs) != 1 || jobs[0].Attempts != 1 {
		t.Fatalf("timers %+v", jobs)
	}
	b.exhaust(jobs[0])
	b.flush()
	if got := b.lanes(); len(got) != 0 {
		t.Errorf("open rows are left: %+v", got)
	}
}
