package delivery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

const canary = "canary-8f3a"

// carrying is an event that has the canary in all that may be purged.
func carrying(id string, subs ...int) Publication {
	p := publication(id, subs...)
	p.Event.Payload, p.Event.Subject = []byte(`{"who":"`+canary+`"}`), canary
	p.Event.Attributes = map[string]string{"who": canary}
	p.Event.Faults, p.Event.FaultCount = []Fault{{"sub-9", "no such field in " + canary}}, 1
	return p
}

// quoting is an attempt whose receiver repeats what it was sent.
func quoting(n int, o Outcome, now time.Time) *Attempt {
	a := attemptAt(n, o, 400, now)
	a.Error, a.ResponseBody = "the target answered 400: "+canary, []byte(canary)
	a.ResponseHeaders, a.RequestHeaders = []Header{{"x-who", canary}}, []Header{{"ce-subject", canary}}
	return a
}

// quoted are the records that hold the canary.
func (b *bench) quoted() (found []string) {
	b.t.Helper()
	b.flush()
	if err := b.scan(b.db, nil, nil, func(key, value []byte) error {
		if bytes.Contains(key, []byte(canary)) || bytes.Contains(value, []byte(canary)) {
			found = append(found, keyText(key))
		}
		return nil
	}); err != nil {
		b.t.Fatal(err)
	}
	return found
}

// wasAhead has one event delivered now, and one by a clock that is so far ahead; then it is set right, at a restart.
func (b *bench) wasAhead(wrong time.Duration) {
	b.t.Helper()
	b.append(carrying("now", 1))
	b.clock.add(wrong)
	b.append(carrying("ahead", 1))
	for _, job := range b.jobs() {
		b.succeed(job)
	}
	b.flush()
	b.close()
	b.clock.add(-wrong)
	b.open()
}

func (b *bench) purge(e *Event) PurgeCounts {
	b.t.Helper()
	n, err := b.PurgeEvent(context.Background(), acme, e.Partition, e.Seq)
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}

// No record of the journal holds what the event has carried: not its own, nor those of what became of it, of what was made
// of it, sent again, given up and told. What is open is cancelled, and what comes late brings nothing back.
func TestPurgeTakesAwayWhatAnEventCarries(t *testing.T) {
	b := newBench(t)
	w := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	b.append(carrying("e", 1, 2, 3, 4, 5), publication("other", 1))
	jobs := map[int]Job{}
	for _, job := range b.jobs() {
		if job.Event.ID == "e" {
			jobs[int(job.ID.Subscription)] = job
		}
	}
	job := jobs[1]
	e := job.Event
	b.keepMade(&job, canary)
	b.settle(jobs[1], Step{State: Scheduled, Due: b.clock.now().Add(time.Minute)}, quoting(1, OutcomeRetryable, b.clock.now()))
	to := Target{Subscription: "sub-7", UID: uid(7), MaxAttempts: 2, MaxAge: time.Hour}
	b.settle(jobs[2], Step{State: Rejected, Reason: "permanent failure: " + canary, DeadLetter: &DeadLetter{From: "sub-2", To: to}}, quoting(1, OutcomePermanent, b.clock.now()))
	b.settle(jobs[3], Step{State: Succeeded}, quoting(1, OutcomeSucceeded, b.clock.now()))
	b.flush()
	again, err := b.Resend(t.Context(), lane(3), jobs[3].ID, Target{Subscription: "sub-3", UID: uid(3), MaxAttempts: 2, MaxAge: time.Hour}, -1)
	if err != nil {
		t.Fatal(err)
	}
	letter := b.timers(7, b.clock.now().Add(time.Hour))
	if len(letter) != 1 || letter[0].Letter == nil || len(b.quoted()) < 8 {
		t.Fatalf("%d letters; quoted by %q", len(letter), b.quoted())
	}
	// 1 is scheduled, 4 and 5 are pending, of which 4 is in flight, the letter and what was sent again wait.
	if n := b.purge(e); n != (PurgeCounts{Events: 1, Bytes: int64(len(`{"who":"` + canary + `"}`)), Cancelled: 5}) {
		t.Errorf("%+v", n)
	}
	late := jobs[4]
	b.settle(late, Step{State: Scheduled, Due: b.clock.now().Add(time.Minute)}, quoting(1, OutcomeRetryable, b.clock.now()))
	if _, err := b.KeepMade(t.Context(), &late, madeAs(canary)); !errors.Is(err, ErrPurged) {
		t.Errorf("made late: %v", err)
	}
	if found := b.quoted(); len(found) > 0 {
		t.Errorf("still quoted by %q", found)
	}
	for _, sub := range []int{1, 4, 5} {
		if d := b.delivery(idOf(e, sub)); d.State != Cancelled || d.StateReason != ReasonPurged {
			t.Errorf("delivery to %d: %v, %q", sub, d.State, d.StateReason)
		}
	}
	if d := b.delivery(again.ID); d.State != Cancelled {
		t.Errorf("what was sent again is %v", d.State)
	}
	for sub, state := range map[int]State{2: Rejected, 3: Succeeded} {
		if d := b.delivery(idOf(e, sub)); d.State != state || d.Attempts != 1 || d.Last.ResponseCode != 400 {
			t.Errorf("delivery to %d: %+v", sub, d)
		}
	}
	got, err := b.Event(acme, "e")
	if err != nil || got.Purged == nil || !got.Purged.Time.Equal(b.clock.now()) || got.Type != "order.created" || got.Matched != e.Matched || len(got.Payload) > 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if b.OpenOf(lane(1)) != 1 || b.OpenOf(lane(7)) != 0 {
		t.Errorf("%d and %d open", b.OpenOf(lane(1)), b.OpenOf(lane(7)))
	}
	if n := b.purge(e); n != (PurgeCounts{}) {
		t.Errorf("a second purge: %+v", n)
	}
	if _, err := b.PurgeEvent(t.Context(), acme, e.Partition, e.Seq+1); !errors.Is(err, ErrNotFound) {
		t.Errorf("an event that is not there: %v", err)
	}
	w.Close()
	b.reopen()
	if found := b.quoted(); len(found) > 0 {
		t.Errorf("after a restart quoted by %q", found)
	}
	if len(b.backlog(1)) != 1 || len(b.timers(1, b.clock.now().Add(time.Hour))) != 0 {
		t.Error("more is open than the other event")
	}
}

// Nothing of a purged event is sent again; a replay counts it as skipped.
func TestPurgedEventIsNotSentAgain(t *testing.T) {
	b := newBench(t)
	e := b.kill(2)[0]
	b.purge(e)
	id := idOf(e, 1)
	if _, err := b.Retry(t.Context(), lane(1), id, -1); !errors.Is(err, ErrPurged) {
		t.Errorf("retried: %v", err)
	}
	if _, err := b.Resend(t.Context(), lane(1), id, Target{Subscription: "sub-1", UID: uid(1)}, -1); !errors.Is(err, ErrPurged) {
		t.Errorf("sent again: %v", err)
	}
	for i, pick := range []*Picker{deadTo(0), deadTo(2), {Namespace: acme, Missing: 3, Event: func(*Event) (Target, Verdict) { return Target{Subscription: "sub-3", UID: uid(3)}, Take }}} {
		want := ReplayCounts{Scanned: 2, Created: 1, Skipped: 1}
		if n, err := b.count(pick); err != nil || n != want {
			t.Errorf("%d: counts %+v, %v", i, n, err)
		}
		r := b.replay(fmt.Sprint("r", i), ReplaySpec{})
		if n := b.advance(r, pick, 10); n != want {
			t.Errorf("%d: %+v", i, n)
		}
		if _, err := b.EndReplay(t.Context(), acme, r.Key, ReplaySucceeded, ""); err != nil {
			t.Fatal(err)
		}
	}
	retried := deadTo(0)
	retried.Again = true
	if n := b.advance(b.replay("again", ReplaySpec{Retry: true}), retried, 10); n.Skipped == 0 {
		t.Errorf("%+v", n)
	}
}

// The ordering keys of purged events go on: what waits for them has its turn, and is told that one is missing.
func TestPurgeGivesTheTurnOn(t *testing.T) {
	b := newBench(t)
	first, third := keyed("a1", "a", 1), keyed("a3", "a", 1)
	b.append(first, keyed("a2", "a", 1), third, keyed("a4", "a", 1))
	b.purge(third.Event)
	b.purge(first.Event)
	job := b.wantTurn("a", "a2")
	if job.Gap != 1 {
		t.Errorf("a2 tells of %d", job.Gap)
	}
	b.succeed(job)
	if job := b.wantTurn("a", "a4"); job.Gap != 1 {
		t.Errorf("a4 tells of %d", job.Gap)
	}
	// One that has failed and blocks its key is cancelled, too.
	b.settle(b.wantTurn("a", "a4"), Step{State: Exhausted, Reason: "enough", Block: true}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
	b.append(keyed("a5", "a", 1))
	b.wantTurn("a", "")
	e, err := b.Event(acme, "a4")
	if err != nil {
		t.Fatal(err)
	}
	if n := b.purge(e); n.Cancelled != 1 {
		t.Errorf("%+v", n)
	}
	b.wantTurn("a", "a5")
}

// An event that has outlived its day lies in kept, and may have been left in its day by a sweep that was cut short.
func TestPurgeFindsWhatWasKept(t *testing.T) {
	b := newBench(t, onePartition)
	pub := carrying("old", 1)
	b.append(pub)
	b.settle(b.jobs()[0], Step{State: Scheduled, Due: b.clock.now().Add(1000 * time.Hour)}, quoting(1, OutcomeRetryable, b.clock.now()))
	b.flush()
	b.clock.add(5 * 24 * time.Hour)
	day := dayOf(pub.Event.Seq)
	if err := b.partitions[0].do(t.Context(), func(c *commit) error {
		swept := c.p.memory
		swept.swept = swept.swept.with(day, false)
		c.memory, c.firm = &swept, true
		return c.keep(lane(1), pub.Event.Seq)
	}); err != nil {
		t.Fatal(err)
	}
	if n := len(b.quoted()); n < 6 {
		t.Fatalf("quoted by %d", n)
	}
	if n := b.purge(pub.Event); n.Cancelled != 1 {
		t.Errorf("%+v", n)
	}
	if found := b.quoted(); len(found) > 0 {
		t.Errorf("still quoted by %q", found)
	}
}

// Events whose changes were written together are purged at the same time: each purge takes its own out of what is kept for those who
// watch, and brings nothing of another back.
func TestPurgesAtATimeBringNothingBack(t *testing.T) {
	b := newBench(t, onePartition)
	watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	for i := range 40 {
		b.append(carrying(fmt.Sprint("e", i), 1))
	}
	jobs := b.jobs()
	for _, job := range jobs {
		b.settle(job, Step{State: Rejected, Reason: "permanent failure: " + canary}, quoting(1, OutcomePermanent, b.clock.now()))
	}
	b.flush()
	var all sync.WaitGroup
	for _, job := range jobs {
		all.Go(func() {
			if _, err := b.PurgeEvent(context.Background(), acme, 0, job.Event.Seq); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if found := b.quoted(); len(found) > 0 {
		t.Errorf("still quoted by %q", found)
	}
}
