package delivery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// replay stores a replay of acme.
func (b *bench) replay(id string, spec ReplaySpec) *Replay {
	b.t.Helper()
	r, err := b.CreateReplay(context.Background(), &Replay{Namespace: acme, ID: id, Spec: spec}, 3)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

// deadTo selects what ended without success, for one subscription, or each for its own with 0.
func deadTo(sub int) *Picker {
	return &Picker{Namespace: acme, To: SubscriptionKey(sub), States: []State{Exhausted, Rejected, Skipped}, Delivery: func(d *Delivery) (Target, Verdict) {
		to := Target{Subscription: d.Subscription, UID: d.SubscriptionUID, MaxAttempts: 4, MaxAge: time.Hour}
		if sub != 0 {
			to.Subscription, to.UID = fmt.Sprint("sub-", sub), uid(sub)
		}
		return to, Take
	}}
}

// advance makes steps until the replay has nothing left.
func (b *bench) advance(r *Replay, pick *Picker, limit int) (sum ReplayCounts) {
	b.t.Helper()
	for p := range uint16(b.Partitions()) {
		for done := false; !done; {
			a, err := b.AdvanceReplay(context.Background(), r, p, pick, limit)
			if err != nil {
				b.t.Fatal(err)
			}
			sum.add(a.ReplayCounts)
			done = a.Done
		}
	}
	return sum
}

// kill ends n events for subscription 1 without success.
func (b *bench) kill(n int) (events []*Event) {
	b.t.Helper()
	for i := range n {
		pub := publication(fmt.Sprint("dead-", i), 1)
		b.append(pub)
		events = append(events, pub.Event)
	}
	for _, job := range b.backlog(1) {
		b.exhaust(job)
	}
	b.flush()
	return events
}

func (b *bench) count(pick *Picker) (ReplayCounts, error) {
	return b.CountReplay(context.Background(), pick, func(look func() error) error { return look() })
}

func (b *bench) all(q Query) []*Delivery {
	b.t.Helper()
	q.Namespace = acme
	return all(b.t, b, q)
}

// A replay makes a delivery of its own for each that it selects: another sequence in the event's partition, the event's
// webhook-id, and all that a delivery has.
func TestReplayMakesEachDeliveryOnce(t *testing.T) {
	b := newBench(t)
	events := b.kill(20)
	r := b.replay("incident-42", ReplaySpec{})
	if got := b.advance(r, deadTo(0), 3); got != (ReplayCounts{20, 20, 0}) {
		t.Fatalf("counts %+v", got)
	}
	if got := b.advance(r, deadTo(0), 3); got.Created != 0 {
		t.Fatalf("it makes more afterwards: %+v", got)
	}
	if n := b.ReplayOpen(acme, r.Key); n != 20 || b.OpenOf(lane(1)) != 20 {
		t.Fatalf("%d and %d open", n, b.OpenOf(lane(1)))
	}
	b.reopen()
	waitFor(t, b.Counted)
	if n := b.ReplayOpen(acme, r.Key); n != 20 {
		t.Fatalf("%d open after a restart", n)
	}
	jobs := b.timers(1, b.clock.now().Add(time.Hour))
	if len(jobs) != 20 {
		t.Fatalf("%d jobs", len(jobs))
	}
	for i := range jobs {
		job := &jobs[i]
		d := b.delivery(job.ID)
		if job.Event.Seq == job.ID.Seq || job.Event.Partition != job.ID.Partition || d.EventUID != job.Event.UID || d.EventID != job.Event.ID ||
			d.Trigger != ByReplay || d.ReplayJob != "incident-42" || d.MaxAttempts != 4 || d.State != Pending || d.Subscription != "sub-1" || d.Attempts != 0 {
			t.Fatalf("%+v", d)
		}
		switch i {
		case 0:
			b.failed(*job, time.Minute)
		case 1:
			b.exhaust(*job)
		default:
			b.succeed(*job)
		}
	}
	b.flush()
	if n := b.ReplayOpen(acme, r.Key); n != 1 {
		t.Errorf("%d open", n)
	}
	if got := len(b.all(Query{})); got != 40 {
		t.Errorf("%d deliveries of the namespace", got)
	}
	if got := len(b.all(Query{Subscription: 1})); got != 40 {
		t.Errorf("%d deliveries of the subscription", got)
	}
	if got := len(b.all(Query{States: []State{Exhausted}})); got != 21 {
		t.Errorf("%d dead", got)
	}
	of := b.all(Query{EventID: events[7].ID})
	if len(of) != 2 || of[0].Trigger != ByReplay || of[1].Trigger != ByPublish {
		t.Errorf("of one event: %+v", of)
	}
	// What failed again is selected by the next replay, each event once.
	next := b.replay("again", ReplaySpec{})
	if got := b.advance(next, deadTo(0), 100); got.Created != 20 || got.Skipped != 1 {
		t.Errorf("second: %+v", got)
	}
}

func TestReplayToAnotherSubscription(t *testing.T) {
	b := newBench(t, onePartition)
	b.kill(5)
	if got := b.advance(b.replay("move", ReplaySpec{Subscription: "sub-9", UID: uid(9)}), deadTo(9), 2); got.Created != 5 {
		t.Fatalf("%+v", got)
	}
	jobs := b.timers(9, b.clock.now().Add(time.Hour))
	if len(jobs) != 5 {
		t.Fatalf("%d jobs", len(jobs))
	}
	for i := 1; i < len(jobs); i++ {
		if jobs[i].ID.Seq <= jobs[i-1].ID.Seq || jobs[i].Event.Seq <= jobs[i-1].Event.Seq {
			t.Error("they do not come in the order of their events")
		}
	}
	b.succeed(jobs[0])
	b.flush()
	if d := b.delivery(jobs[0].ID); d.State != Succeeded || d.Subscription != "sub-9" {
		t.Errorf("%+v", d)
	}
}

// missing selects events that a subscription has had no delivery of.
func missing(sub int) *Picker {
	return &Picker{Namespace: acme, Missing: SubscriptionKey(sub), Event: func(e *Event) (Target, Verdict) {
		if e.Subject == "no" {
			return Target{}, Pass
		}
		return Target{Subscription: fmt.Sprint("sub-", sub), UID: uid(sub), MaxAttempts: 3}, Take
	}}
}

func TestReplayOfWhatIsMissing(t *testing.T) {
	b := newBench(t)
	other := publication("other", 1)
	other.Event.Subject = "no"
	had, skipped := publication("had", 2), publication("skipped", 2)
	skipped.Targets[0].Skip = true
	b.append(publication("a", 1), publication("b"), other, had, skipped)
	spec := ReplaySpec{Subscription: "sub-2", UID: uid(2), Missing: true}
	if got, err := b.count(missing(2)); err != nil || got != (ReplayCounts{5, 3, 0}) {
		t.Fatalf("count %+v, %v", got, err)
	}
	if got := b.advance(b.replay("backfill", spec), missing(2), 1); got != (ReplayCounts{5, 3, 0}) {
		t.Fatalf("%+v", got)
	}
	if got := ids(b.timers(2, b.clock.now().Add(time.Hour))); !slices.Equal(got, []string{"a", "b", "skipped"}) {
		t.Errorf("made for %v", got)
	}
	if got := b.advance(b.replay("again", spec), missing(2), 10); got.Created != 0 {
		t.Errorf("nothing is missing any more: %+v", got)
	}
}

// What is counted is what a replay then makes, also where one event is selected more than once, or is there no longer.
func TestCountIsWhatAReplayMakes(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("a", 1, 2, 3), publication("b", 1, 2), publication("gone", 1))
	end := func() {
		for _, sub := range []int{1, 2, 3, 9} {
			for _, job := range append(b.backlog(sub), b.timers(sub, b.clock.now().Add(time.Hour))...) {
				b.exhaust(job)
			}
		}
		b.flush()
	}
	end()
	again := deadTo(0)
	again.Again = true
	for i, c := range []struct {
		pick *Picker
		made int64
	}{
		{deadTo(9), 3}, // one of each event
		{deadTo(0), 9}, // six that were published, three that the first has made
		{deadTo(0), 9},
		{deadTo(9), 3},
		{again, 30},
	} {
		count, err := b.count(c.pick)
		if err != nil {
			t.Fatal(err)
		}
		got := b.advance(b.replay(fmt.Sprint("r", i), ReplaySpec{}), c.pick, 2)
		if count != got || got.Created != c.made {
			t.Errorf("%d: counted %+v, made %+v, want %d", i, count, got, c.made)
		}
		if _, err := b.EndReplay(context.Background(), acme, b.replay(fmt.Sprint("r", i), ReplaySpec{}).Key, ReplaySucceeded, ""); err != nil {
			t.Fatal(err)
		}
		b.clock.add(time.Second)
		end()
	}
	// Of an event that has gone its replay is still on record.
	b.append(publication("late", 1))
	b.succeed(b.backlog(1)[0])
	b.flush()
	b.clock.add(50 * time.Hour)
	all := &Picker{Namespace: acme, Delivery: deadTo(0).Delivery}
	for _, d := range b.all(Query{EventID: "late"}) {
		if _, err := b.Resend(context.Background(), lane(1), d.ID, Target{Subscription: "sub-1", UID: uid(1), MaxAttempts: 1}, -1); err != nil {
			t.Fatal(err)
		}
	}
	for _, job := range b.timers(1, b.clock.now().Add(time.Hour)) {
		b.succeed(job)
	}
	b.flush()
	b.clock.add(24 * time.Hour)
	b.retain(49 * time.Hour)
	count, err := b.count(all)
	if got := b.advance(b.replay("all", ReplaySpec{}), all, 2); err != nil || count != got || got != (ReplayCounts{1, 0, 1}) {
		t.Errorf("counted %+v, %v, made %+v", count, err, got)
	}
}

// With Retry the deliveries themselves are opened again.
func TestReplayRetries(t *testing.T) {
	b := newBench(t)
	b.kill(9)
	r := b.replay("redrive", ReplaySpec{Retry: true})
	pick := deadTo(0)
	pick.Again = true
	if got := b.advance(r, pick, 4); got.Created != 9 {
		t.Fatalf("%+v", got)
	}
	if n := b.ReplayOpen(acme, r.Key); n != 9 {
		t.Errorf("%d open", n)
	}
	if dead := b.all(Query{States: []State{Exhausted}}); len(dead) != 0 {
		t.Errorf("still dead: %v", dead)
	}
	jobs := b.timers(1, b.clock.now().Add(time.Hour))
	if len(jobs) != 9 || len(b.all(Query{})) != 9 {
		t.Fatalf("%d jobs", len(jobs))
	}
	for _, job := range jobs {
		b.succeed(job)
	}
	b.flush()
	if n := b.ReplayOpen(acme, r.Key); n != 0 || len(b.all(Query{States: []State{Succeeded}})) != 9 {
		t.Errorf("%d open", n)
	}
}

func TestReplaysAreKept(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	r := b.replay("one", ReplaySpec{Filter: "state = EXHAUSTED", MaxRate: 12.5, Since: b.clock.now().Add(-time.Hour)})
	if same := b.replay("one", ReplaySpec{}); same.Key != r.Key {
		t.Error("the same id makes another replay")
	}
	if _, err := b.CreateReplay(ctx, &Replay{Namespace: acme, ID: "one", ContentHash: [16]byte{1}}, 3); !errors.Is(err, ErrReplayExists) {
		t.Errorf("other content: %v", err)
	}
	b.replay("two", ReplaySpec{})
	b.replay("three", ReplaySpec{})
	if _, err := b.CreateReplay(ctx, &Replay{Namespace: acme, ID: "four"}, 3); !errors.Is(err, ErrTooManyReplays) {
		t.Errorf("a fourth: %v", err)
	}
	b.kill(3)
	b.advance(r, deadTo(0), 2)
	if _, err := b.EndReplay(ctx, acme, r.Key, ReplaySucceeded, ""); err != nil {
		t.Fatal(err)
	}
	b.reopen()
	all, err := b.Replays(acme)
	if err != nil || len(all) != 3 {
		t.Fatalf("%v, %v", all, err)
	}
	got := all[0]
	if got.State != ReplaySucceeded || got.Counts.Created != 3 || got.Spec.Filter != "state = EXHAUSTED" || got.Spec.MaxRate != 12.5 || got.DoneTime.IsZero() {
		t.Errorf("%+v", got)
	}
	b.clock.add(time.Hour)
	if err := b.EraseReplays(ctx, func(NamespaceKey) time.Time { return b.clock.now() }); err != nil {
		t.Fatal(err)
	}
	if all, _ = b.Replays(0); len(all) != 2 {
		t.Errorf("%d are left", len(all))
	}
	if err := b.DropNamespace(ctx, acme); err != nil {
		t.Fatal(err)
	}
	if all, _ = b.Replays(0); len(all) != 0 {
		t.Errorf("%d are left of a namespace that is gone", len(all))
	}
}

// Retention moves the event of a replay that is open, and does not erase what it needs; a replay that has ended shows
// what it was although its event is gone.
func TestReplayBesideRetention(t *testing.T) {
	b := newBench(t, onePartition)
	b.kill(3)
	b.clock.add(50 * time.Hour)
	r := b.replay("late", ReplaySpec{})
	if got := b.advance(r, deadTo(0), 10); got.Created != 3 {
		t.Fatalf("%+v", got)
	}
	jobs := b.timers(1, b.clock.now().Add(time.Hour))
	b.succeed(jobs[0])
	b.flush()
	b.clock.add(24 * time.Hour)
	b.retain(49 * time.Hour)
	open := b.timers(1, b.clock.now().Add(time.Hour))
	if len(open) != 2 || len(open[0].Event.Payload) == 0 {
		t.Fatalf("%+v", open)
	}
	if d := b.delivery(jobs[0].ID); d.State != Succeeded || d.EventID != "dead-0" {
		t.Errorf("%+v", d)
	}
	if _, err := b.Event(acme, "dead-0"); !errors.Is(err, ErrNotFound) {
		t.Errorf("the event of an ended replay: %v", err)
	}
	// All ends, and goes.
	b.succeed(open[0])
	b.exhaust(open[1])
	b.flush()
	b.clock.add(80 * time.Hour)
	b.retain(49 * time.Hour)
	b.clock.add(tidyEvery)
	b.retain(49 * time.Hour)
	if n := b.records(); n != 0 {
		t.Errorf("%d records are left", n)
	}
}

// What ended without success may stay longer than the rest, with its event, and can be sent again.
func TestDeadLettersHaveARetentionOfTheirOwn(t *testing.T) {
	b := newBench(t, onePartition)
	b.kill(2)
	b.append(publication("fine", 1))
	b.succeed(b.backlog(1)[0])
	b.flush()
	keep := keepFor(30 * time.Hour)
	keep.Dead = func(NamespaceKey) time.Duration { return 240 * time.Hour }
	b.clock.add(72 * time.Hour)
	if err := b.Retain(context.Background(), keep); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Event(acme, "fine"); !errors.Is(err, ErrNotFound) {
		t.Errorf("what succeeded: %v", err)
	}
	dead := b.all(Query{States: []State{Exhausted}})
	if len(dead) != 2 {
		t.Fatalf("%d dead", len(dead))
	}
	if got := b.advance(b.replay("late", ReplaySpec{}), deadTo(0), 10); got.Created != 2 {
		t.Errorf("%+v", got)
	}
	if _, err := b.Retry(context.Background(), lane(1), dead[0].ID, -1); err != nil {
		t.Error(err)
	}
	for _, job := range b.timers(1, b.clock.now().Add(time.Hour)) {
		b.succeed(job)
	}
	b.flush()
	b.clock.add(240 * time.Hour)
	if err := b.Retain(context.Background(), keep); err != nil {
		t.Fatal(err)
	}
	if n := b.records(); n != 0 {
		t.Errorf("%d records are left", n)
	}
}

// A delivery that ends without success makes a dead letter in the same commit, which knows why, and makes none itself.
func TestDeadLetter(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("e1", 1))
	job := b.backlog(1)[0]
	to := func(sub int) Step {
		return Step{State: Exhausted, Reason: "enough", DeadLetter: &DeadLetter{From: "sub-1", To: Target{Subscription: "sub-9", UID: uid(sub), MaxAttempts: 2}}}
	}
	b.settle(job, to(9), attemptAt(1, OutcomeRetryable, 503, b.clock.now()))
	b.flush()
	b.reopen()
	letters := b.timers(9, b.clock.now().Add(time.Hour))
	if len(letters) != 1 {
		t.Fatalf("%d letters", len(letters))
	}
	l := letters[0]
	want := Letter{From: "sub-1", State: Exhausted, Reason: "enough", Attempts: 1, ResponseCode: 503}
	if l.Letter == nil || *l.Letter != want || l.Event.UID != job.Event.UID {
		t.Errorf("%+v of %+v", l.Letter, l.Event)
	}
	if d := b.delivery(l.ID); d.Trigger != ByDeadLetter || d.ReplayJob != "" {
		t.Errorf("%+v", d)
	}
	// Retried, it is still one; ended, it makes none.
	b.failed(l, time.Minute)
	b.flush()
	l = b.timers(9, b.clock.now().Add(time.Hour))[0]
	if l.Letter == nil || *l.Letter != want {
		t.Errorf("after an attempt: %+v", l.Letter)
	}
	b.settle(l, to(1), attemptAt(2, OutcomeRetryable, 503, b.clock.now()))
	b.flush()
	if open := b.OpenIn(acme); open != 0 {
		t.Errorf("%d open: it goes in circles", open)
	}
}

func TestResend(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("e1", 1))
	job := b.backlog(1)[0]
	b.succeed(job)
	b.flush()
	d, err := b.Resend(context.Background(), lane(1), job.ID, Target{Subscription: "sub-1", UID: uid(1), MaxAttempts: 2}, 1)
	if err != nil {
		t.Fatal(err)
	}
	if d.ID == job.ID || d.State != Pending || d.EventUID != job.Event.UID || d.Trigger != ByReplay {
		t.Errorf("%+v", d)
	}
	if _, err := b.Resend(context.Background(), lane(1), job.ID, Target{UID: uid(1)}, 0); !errors.Is(err, ErrInvalidState) {
		t.Errorf("another count of attempts: %v", err)
	}
	if got := b.timers(1, b.clock.now().Add(time.Hour)); len(got) != 1 || got[0].ID != d.ID {
		t.Errorf("%+v", got)
	}
}

// Wherever the power goes, at the end each delivery that was selected has been sent again once.
func TestReplayOverPowerLosses(t *testing.T) {
	lives := 60
	if testing.Short() {
		lives = 15
	}
	for seed := range lives {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(uint64(seed), 5))
			fs := vfs.NewCrashableMem()
			var mu sync.Mutex // of what committers and the test share
			var crash *vfs.MemFS
			left, lot := 0, rand.New(rand.NewPCG(uint64(seed), 6))
			crashed := func() bool {
				mu.Lock()
				defer mu.Unlock()
				return crash != nil
			}
			arm := func(commits int) {
				mu.Lock()
				defer mu.Unlock()
				crash, left = nil, commits
			}
			b := newBench(t, func(o *Options) {
				o.fs, o.Partitions = fs, 2
				o.refuse = func(uint16) bool {
					mu.Lock()
					defer mu.Unlock()
					if left--; left == 0 {
						crash = fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: lot.IntN(101), RNG: lot})
					}
					return left > 0 && lot.IntN(10) == 0
				}
			})
			arm(-1)
			b.kill(60)
			r := b.replay("r", ReplaySpec{})
			for range 5 {
				arm(2 + rng.IntN(12))
				for p, fails := 0, 0; p < 2 && !crashed() && fails < 50; {
					a, err := b.AdvanceReplay(context.Background(), r, uint16(p), deadTo(0), 1+rng.IntN(9))
					if err != nil {
						fails++
					}
					if a.Done {
						p++
					}
				}
				b.close()
				if crash != nil {
					fs = crash
					b.opts.fs = fs
				}
				arm(-1)
				b.open()
			}
			b.advance(r, deadTo(0), 7)
			seen := map[string]int{}
			for _, d := range b.all(Query{}) {
				if d.ReplayJob == "r" {
					seen[d.EventID]++
				}
			}
			if len(seen) != 60 {
				t.Errorf("%d of 60 were sent", len(seen))
			}
			for id, n := range seen {
				if n != 1 {
					t.Errorf("%s was sent %d times", id, n)
				}
			}
			if got, err := b.Replay(acme, r.Key); err != nil || got.Counts != (ReplayCounts{60, 60, 0}) {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}
