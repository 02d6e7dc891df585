package delivery

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

// keepParts keeps all for thirty days but for parts of acme.
func keepParts(parts Parts) Retention {
	keep := keepFor(30 * 24 * time.Hour)
	keep.Parts = map[NamespaceKey]Parts{acme: parts}
	return keep
}

func (b *bench) retainParts(keep Retention) {
	b.t.Helper()
	if err := b.Retain(context.Background(), keep); err != nil {
		b.t.Fatal(err)
	}
	b.flush()
}

// What events carry goes before their history does, once nothing of them is open; what was sent again counts, and so does what
// ended without success, however long that is kept.
func TestPayloadsGoBeforeTheRest(t *testing.T) {
	for _, keep := range []time.Duration{time.Hour, 5 * 24 * time.Hour} {
		t.Run(keep.String(), func(t *testing.T) {
			b := newBench(t)
			b.append(carrying("done", 1, 2), carrying("dead", 1), carrying("open", 1, 2), carrying("again", 1), carrying("late", 3))
			jobs := map[string]Job{}
			for _, job := range b.jobs() {
				jobs[fmt.Sprint(job.Event.ID, job.ID.Subscription)] = job
			}
			now := b.clock.now()
			for _, at := range []string{"done1", "done2", "open1", "again1"} {
				job := jobs[at]
				b.keepMade(&job, canary)
				b.settle(job, Step{State: Succeeded}, quoting(1, OutcomeSucceeded, now))
			}
			b.settle(jobs["dead1"], Step{State: Rejected, Reason: "permanent failure: " + canary}, quoting(1, OutcomePermanent, now))
			b.settle(jobs["open2"], Step{State: Scheduled, Due: now.Add(400 * time.Hour)}, quoting(1, OutcomeRetryable, now))
			b.flush()
			again, err := b.Resend(t.Context(), lane(1), jobs["again1"].ID, Target{Subscription: "sub-1", UID: uid(1), MaxAttempts: 2, MaxAge: 1000 * time.Hour}, -1)
			if err != nil {
				t.Fatal(err)
			}
			b.clock.add(keep + 25*time.Hour)
			pub := carrying("new", 1)
			b.append(pub)
			parts := keepParts(Parts{Payloads: keep})
			parts.Dead = func(NamespaceKey) time.Duration { return 60 * 24 * time.Hour }
			for range 2 {
				b.retainParts(parts)
				b.reopen()
			}
			carries := func(when string, want ...string) {
				t.Helper()
				for _, id := range []string{"done", "dead", "open", "again", "late", "new"} {
					e, err := b.Event(acme, id)
					if err != nil {
						t.Errorf("%s: event %s: %v", when, id, err)
						continue
					}
					if there := e.Purged == nil; there != slices.Contains(want, id) || there != (len(e.Payload) > 0) || e.Purged != nil && e.Purged.Bytes == 0 {
						t.Errorf("%s: event %s: %s, %+v", when, id, e.Payload, e.Purged)
					}
				}
			}
			carries("swept", "open", "again", "late", "new")
			if n := len(all(t, b, Query{})); n != 9 {
				t.Errorf("%d deliveries", n)
			}
			d := b.delivery(jobs["dead1"].ID)
			if d.State != Rejected || d.StateReason != "permanent failure" || d.Attempts != 1 || d.Last.ResponseCode != 400 {
				t.Errorf("%+v", d)
			}
			if _, err := b.Retry(t.Context(), lane(1), jobs["dead1"].ID, -1); !errors.Is(err, ErrPurged) {
				t.Errorf("sent again without its payload: %v", err)
			}
			if a, err := b.Attempts(acme, jobs["open2"].ID); err != nil || len(a) != 1 || len(a[0].ResponseBody) == 0 {
				t.Errorf("what is open has attempts %+v, %v", a, err)
			}
			timers := b.timers(2, b.clock.now().Add(1000*time.Hour))
			if len(timers) != 1 || string(timers[0].Event.Payload) != string(pub.Event.Payload) {
				t.Fatalf("%+v", timers)
			}
			// What outlived it goes within an hour of its end.
			b.succeed(timers[0])
			for _, job := range append(b.timers(1, b.clock.now().Add(1000*time.Hour)), b.backlog(3)...) {
				if job.ID == again.ID || job.Event.ID == "late" {
					b.settle(job, Step{State: Succeeded}, quoting(1, OutcomeSucceeded, b.clock.now()))
				}
			}
			b.flush()
			b.clock.add(61 * time.Minute)
			b.retainParts(parts)
			carries("ended", "new")
			for _, job := range b.backlog(1) {
				b.succeed(job)
			}
			b.clock.add(keep + 25*time.Hour)
			b.retainParts(parts)
			carries("at last")
			if found := b.quoted(); len(found) > 0 {
				t.Errorf("still quoted by %q", found)
			}
			b.clock.add(100 * 24 * time.Hour)
			b.retainParts(parts)
			if n := b.records(); n != 0 {
				t.Errorf("%d records are left", n)
			}
		})
	}
}

// Failed attempts go before the rest, but for those of what is open; each is counted as before.
func TestAttemptsGoBeforeTheRest(t *testing.T) {
	b := newBench(t)
	b.append(carrying("done", 1), carrying("open", 2))
	jobs := b.jobs()
	for _, job := range jobs {
		b.failed(job, time.Minute)
	}
	b.flush()
	b.clock.add(2 * time.Minute)
	job := b.timers(1, b.clock.now())[0]
	b.succeed(job)
	b.flush()
	attempts := func(sub int) int {
		t.Helper()
		for _, job := range jobs {
			if job.ID.Subscription == SubscriptionKey(sub) {
				if d := b.delivery(job.ID); d.Attempts == 0 || d.Last == nil {
					t.Errorf("%+v", d)
				}
				a, err := b.Attempts(acme, job.ID)
				if err != nil {
					t.Fatal(err)
				}
				return len(a)
			}
		}
		return -1
	}
	before := attempts(1)
	b.retainParts(keepParts(Parts{Attempts: time.Hour}))
	if n := attempts(1); n != before {
		t.Errorf("%d attempts, of %d, while they are young", n, before)
	}
	b.clock.add(2 * time.Hour)
	b.retainParts(keepParts(Parts{Attempts: time.Hour}))
	if done, open := attempts(1), attempts(2); done >= before || open != 1 {
		t.Errorf("%d and %d attempts", done, open)
	}
	if e, err := b.Event(acme, "done"); err != nil || len(e.Payload) == 0 {
		t.Errorf("%+v, %v", e, err)
	}
	b.succeed(b.timers(2, b.clock.now())[0])
	b.flush()
	b.clock.add(2 * time.Hour)
	b.retainParts(keepParts(Parts{Attempts: time.Hour}))
	if n := attempts(2); n >= 2 {
		t.Errorf("%d attempts", n)
	}
}

// A sweep reads what it has gone through once, also over restarts, and makes no commit where nothing is to go.
func TestPartsAreSweptOnce(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(carrying("e", 1))
	b.succeed(b.jobs()[0])
	b.clock.add(2 * time.Hour)
	keep := keepParts(Parts{Payloads: time.Hour, Attempts: time.Hour})
	b.retainParts(keep)
	b.reopen()
	index := b.partitions[0].index
	for range 4 {
		b.clock.add(10 * time.Minute)
		b.retainParts(keep)
	}
	if got := b.partitions[0].index; got != index {
		t.Errorf("%d commits", got-index)
	}
}

// A retry beside a sweep is either refused, since the payload has gone, or keeps it.
func TestRetryMeetsTheEndOfPayloads(t *testing.T) {
	for after := range 9 {
		var m meddler
		b := newBench(t, onePartition, m.use)
		b.append(carrying("e", 1))
		job := b.jobs()[0]
		b.exhaust(job)
		b.flush()
		b.clock.add(2 * time.Hour)
		var refused error
		m.sweep(b, after, keepParts(Parts{Payloads: time.Hour}), func() { _, refused = b.Retry(context.Background(), lane(1), job.ID, -1) })
		b.flush()
		e, err := b.Event(acme, "e")
		if err != nil {
			t.Fatal(err)
		}
		open := len(b.timers(1, b.clock.now()))
		switch {
		case refused == nil && (open != 1 || e.Purged != nil):
			t.Errorf("after %d commits: retried, and %d open of %+v", after, open, e)
		case refused != nil && (!errors.Is(refused, ErrPurged) || open != 0 || e.Purged == nil):
			t.Errorf("after %d commits: %v, and %d open of %+v", after, refused, open, e)
		}
		b.close()
	}
}
