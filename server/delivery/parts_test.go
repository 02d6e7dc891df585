package delivery

import (
	"context"
	"errors"
	"fmt"
	"runtime"
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
			b.append(carrying("done", 1, 2), carrying("dead", 1), carrying("open", 1, 2), carrying("again", 1), carrying("late", 3), carrying("echo", 1))
			jobs := map[string]Job{}
			for _, job := range b.jobs() {
				jobs[fmt.Sprint(job.Event.ID, job.ID.Subscription)] = job
			}
			now := b.clock.now()
			for _, at := range []string{"done1", "done2", "open1", "again1", "echo1"} {
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
			// What was made again has a later sequence, and has ended before its event is purged.
			b.clock.add(20 * time.Minute)
			echo, err := b.Resend(t.Context(), lane(1), jobs["echo1"].ID, Target{Subscription: "sub-1", UID: uid(1), MaxAttempts: 2, MaxAge: time.Hour}, -1)
			if err != nil {
				t.Fatal(err)
			}
			for _, job := range b.timers(1, b.clock.now().Add(time.Hour)) {
				if job.ID == echo.ID {
					b.settle(job, Step{State: Rejected, Reason: "permanent failure: " + canary}, quoting(1, OutcomePermanent, now))
				}
			}
			b.flush()
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
				for _, id := range []string{"done", "dead", "open", "again", "late", "new", "echo"} {
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
			if a, err := b.Attempts(acme, echo.ID); err != nil || len(a) != 1 || a[0].Error != "" || len(a[0].ResponseBody) > 0 {
				t.Errorf("what was made again of a purged event has attempts %+v, %v", a, err)
			}
			if a, err := b.Attempts(acme, jobs["open1"].ID); err != nil || len(a) != 1 || a[0].Error == "" {
				t.Errorf("the sibling of what is open has attempts %+v, %v", a, err)
			}
			if n := len(all(t, b, Query{})); n != 11 {
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
	// Those of a retry long after the day was gone through go, too, when that has ended.
	b.append(carrying("again", 3))
	job = b.jobs()[0]
	b.exhaust(job)
	b.flush()
	for range 2 {
		b.clock.add(3 * time.Hour)
		b.retainParts(keepParts(Parts{Attempts: time.Hour}))
		if a, err := b.Attempts(acme, job.ID); err != nil || len(a) != 1 || len(a[0].ResponseBody) > 0 { // the last, in short
			t.Errorf("attempts %+v, %v", a, err)
		}
		if _, err := b.Retry(t.Context(), lane(3), job.ID, -1); err != nil {
			t.Fatal(err)
		}
		b.exhaust(b.timers(3, b.clock.now())[0])
		b.flush()
	}
}

// A sweep that was cut short, before whichever of its commits, is made up for by later ones.
func TestPayloadsGoAfterAll(t *testing.T) {
	for cut := 1; cut < 9; cut++ {
		refuseAt := -1
		b := newBench(t, onePartition, func(o *Options) {
			o.refuse = func(uint16) bool {
				refuseAt--
				return refuseAt == 0
			}
		})
		b.append(carrying("done", 1, 2), carrying("open", 1), carrying("kept", 2))
		now := b.clock.now()
		for _, job := range b.jobs() {
			step, a := Step{State: Rejected, Reason: "permanent failure: " + canary}, quoting(1, OutcomePermanent, now)
			if job.Event.ID != "done" {
				step, a = Step{State: Scheduled, Due: now.Add(30 * time.Hour)}, quoting(1, OutcomeRetryable, now)
			}
			b.settle(job, step, a)
		}
		b.flush()
		ends := func(sub int) {
			for _, job := range b.timers(sub, now.Add(100*time.Hour)) {
				b.succeed(job)
			}
			b.flush()
		}
		keep := keepParts(Parts{Payloads: time.Hour})
		sweep := func() {
			refuseAt = cut
			if err := b.Retain(t.Context(), keep); err != nil && !errors.Is(err, ErrRefused) {
				t.Error(err)
			}
			refuseAt = -1
			b.flush()
			b.reopen()
		}
		b.clock.add(2 * time.Hour)
		sweep()
		ends(1)
		b.clock.add(2 * time.Hour)
		sweep()
		// What is open then outlives its day in kept.
		keep.Of = func(NamespaceKey) time.Duration { return 2 * time.Hour }
		keep.Shortest = 2 * time.Hour
		sweep()
		ends(2)
		keep.Of, keep.Shortest = func(NamespaceKey) time.Duration { return 0 }, 0
		b.clock.add(2 * time.Hour)
		sweep()
		b.retainParts(keep)
		b.clock.add(2 * time.Hour)
		b.retainParts(keep)
		if found := b.quoted(); len(found) > 0 {
			t.Errorf("cut before commit %d: quoted by %q", cut, found)
		}
		b.close()
	}
}

// A day that a wrong clock has been in, and that was swept then, is swept again when it comes.
func TestPayloadsGoWhereAClockWasAhead(t *testing.T) {
	b := newBench(t, onePartition)
	b.wasAhead(70 * time.Hour)
	keep := keepParts(Parts{Payloads: time.Hour})
	for h := range 100 {
		b.clock.add(time.Hour)
		b.append(carrying(fmt.Sprint("h-", h), 1))
		for _, job := range b.jobs() {
			b.succeed(job)
		}
		b.flush()
		b.retainParts(keep)
		if h >= 3 {
			if e, err := b.Event(acme, fmt.Sprint("h-", h-3)); err != nil || e.Purged == nil {
				t.Fatalf("%d hours later: %v, %v", h, e, err)
			}
		}
	}
	if found := b.quoted(); len(found) > 20 {
		t.Errorf("quoted by %d", len(found))
	}
}

// A sweep reads what it has gone through once, also over restarts, and makes no commit where nothing is to go.
func TestPartsAreSweptOnce(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(carrying("e", 1))
	b.succeed(b.jobs()[0])
	b.flush()
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

// A retry beside a sweep, or a delivery that is made again, is either refused, since the payload has gone, or keeps it.
func TestRetryMeetsTheEndOfPayloads(t *testing.T) {
	retry := func(b *bench, job Job) error {
		_, err := b.Retry(context.Background(), lane(1), job.ID, -1)
		return err
	}
	resend := func(b *bench, job Job) error {
		_, err := b.Resend(context.Background(), lane(1), job.ID, Target{Subscription: "sub-1", UID: uid(1), MaxAttempts: 1, MaxAge: time.Hour}, -1)
		return err
	}
	var many []int // whose event is purged by itself
	for i := range 40 {
		many = append(many, i+1)
	}
	for _, subs := range [][]int{{1}, many} {
		for kind, edit := range map[string]func(*bench, Job) error{"retry": retry, "resend": resend} {
			for after := range 9 {
				var m meddler
				b := newBench(t, onePartition, m.use)
				b.append(carrying("e", subs...))
				jobs := b.jobs()
				for _, job := range jobs {
					b.exhaust(job)
				}
				b.flush()
				b.clock.add(2 * time.Hour)
				first := jobs[slices.IndexFunc(jobs, func(job Job) bool { return job.ID.Subscription == 1 })]
				var refused error
				m.sweep(b, after, keepParts(Parts{Payloads: time.Hour}), func() { refused = edit(b, first) })
				b.flush()
				e, err := b.Event(acme, "e")
				if err != nil {
					t.Fatal(err)
				}
				open := len(b.timers(1, b.clock.now()))
				switch {
				case refused == nil && (open != 1 || e.Purged != nil):
					t.Errorf("%d targets, %s after %d commits: made, and %d open of %+v", len(subs), kind, after, open, e)
				case refused != nil && (!errors.Is(refused, ErrPurged) || open != 0 || e.Purged == nil):
					t.Errorf("%d targets, %s after %d commits: %v, and %d open of %+v", len(subs), kind, after, refused, open, e)
				}
				b.close()
			}
		}
	}
}

// A sweep by a clock that was ahead, during which nothing was published, has nothing stay that is published once it is set right.
func TestPayloadsGoAfterASweepByAClockThatWasAhead(t *testing.T) {
	for _, ahead := range []time.Duration{10 * time.Hour, 5 * 24 * time.Hour} {
		b := newBench(t, onePartition)
		keep := keepParts(Parts{Payloads: time.Hour})
		b.append(carrying("before", 1))
		b.succeed(b.jobs()[0])
		b.flush()
		b.clock.add(ahead)
		b.reopen()
		b.retainParts(keep)
		b.clock.add(-ahead)
		b.reopen()
		b.clock.add(time.Minute)
		b.append(carrying("after", 1))
		b.succeed(b.jobs()[0])
		b.flush()
		b.clock.add(2 * time.Hour)
		b.retainParts(keep)
		if found := b.quoted(); len(found) > 0 {
			t.Errorf("%v ahead: quoted by %q", ahead, found)
		}
	}
}

// What a crash has left of changes that nobody could go on with quotes nothing for good.
func TestChangesThatACrashHasLeftGo(t *testing.T) {
	cut := powerCut{at: 2}
	b := newBench(t, onePartition, cut.options)
	w := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	b.append(carrying("e", 1))
	b.settle(b.jobs()[0], Step{State: Rejected, Reason: "permanent failure: " + canary}, quoting(1, OutcomePermanent, b.clock.now()))
	b.flush()
	w.Close()
	disk := cut.during(t, func() {
		if err := b.watches.trim(t.Context(), time.Now().Add(2*newsKept)); err != nil {
			t.Fatal(err)
		}
	})
	after := newBench(t, onePartition, func(o *Options) { o.fs, o.now = disk, b.clock.now })
	b.clock.add(2 * time.Hour)
	after.retainParts(keepParts(Parts{Payloads: time.Hour}))
	if found := after.quoted(); len(found) > 0 {
		t.Errorf("quoted by %q", found)
	}
}

// What lies between events that are purged together costs nothing: deliveries that were made again, by the thousand, and events
// that have been purged before.
func TestPurgePassesByWhatLiesBetween(t *testing.T) {
	b := newBench(t, onePartition)
	first, many := carrying("first", 1), carrying("many", 1)
	b.append(first, many)
	for _, job := range b.jobs() {
		b.settle(job, Step{State: Succeeded}, quoting(1, OutcomeSucceeded, b.clock.now()))
	}
	b.flush()
	for range 50 {
		if _, err := b.Resend(t.Context(), lane(1), idOf(many.Event, 1), many.Targets[0], -1); err != nil {
			t.Fatal(err)
		}
	}
	for _, job := range b.timers(1, b.clock.now().Add(time.Hour)) {
		b.exhaust(job)
	}
	b.flush()
	b.purge(many.Event)
	last := carrying("last", 1)
	b.append(last)
	b.settle(b.jobs()[0], Step{State: Rejected, Reason: "permanent failure: " + canary}, quoting(1, OutcomePermanent, b.clock.now()))
	b.flush()
	seqs := []uint64{first.Event.Seq, last.Event.Seq}
	if err := b.partitions[0].do(t.Context(), func(c *commit) error {
		for _, kind := range []byte{kindEvent, kindDelivery, kindAttempt} {
			prefix := appendKind(nil, 0, dayOf(seqs[0]), acme, kind)
			if kind != kindEvent {
				prefix = appendU64(prefix, 1)
			}
			var visited []uint64
			if err := c.along(prefix, seqs, func(seq uint64, key, _ []byte) error {
				if got, ok := recordSeq(kind, key[recordPrefix:]); !ok || got != seq {
					t.Errorf("%s is visited as of %d", keyText(key), seq)
				}
				visited = append(visited, seq)
				return nil
			}); err != nil {
				return err
			}
			if want := map[byte][]uint64{kindEvent: seqs, kindDelivery: seqs, kindAttempt: seqs[1:]}[kind]; !slices.Equal(visited, want) {
				t.Errorf("%c: visited %d, want %d", kind, visited, want)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	b.clock.add(2 * time.Hour)
	b.retainParts(keepParts(Parts{Payloads: time.Hour}))
	if found := b.quoted(); len(found) > 0 {
		t.Errorf("quoted by %q", found)
	}
}

// A sweep whose context ends leaves commits that go on behind it as they began: nothing that they read is changed.
func TestSweepIsLeftToItsCommits(t *testing.T) {
	b := newBench(t, onePartition)
	keep := keepParts(Parts{Payloads: time.Hour})
	keep.Dead = func(NamespaceKey) time.Duration { return 60 * 24 * time.Hour }
	for round := range 80 {
		var pubs []Publication
		for i := range 40 {
			pubs = append(pubs, carrying(fmt.Sprint("e", round, "-", i), 1, 2, 3))
		}
		b.append(pubs...)
		for _, job := range b.jobs() {
			b.exhaust(job)
		}
		b.flush()
		b.clock.add(2 * time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			for range round * 20 {
				runtime.Gosched()
			}
			cancel()
		}()
		_ = b.Retain(ctx, keep)
		cancel()
	}
	b.clock.add(2 * time.Hour)
	b.retainParts(keep)
	if found := b.quoted(); len(found) > 0 {
		t.Errorf("quoted by %d", len(found))
	}
}

// A purge that was cut short, before whichever of its commits, is completed by a sweep, also where nothing has payloads go any more.
func TestPurgeThatWasCutShortIsCompleted(t *testing.T) {
	var many []int
	for i := range 300 {
		many = append(many, i+1)
	}
	for _, keep := range []Retention{keepParts(Parts{Payloads: time.Hour}), keepFor(30 * 24 * time.Hour)} {
		for cut := 1; cut < 7; cut++ {
			refuseAt := -1
			b := newBench(t, onePartition, func(o *Options) {
				o.refuse = func(uint16) bool {
					refuseAt--
					return refuseAt == 0
				}
			})
			b.append(carrying("e", many...))
			for _, job := range b.jobs() {
				b.settle(job, Step{State: Rejected, Reason: "permanent failure: " + canary}, quoting(1, OutcomePermanent, b.clock.now()))
			}
			b.flush()
			b.clock.add(2 * time.Hour)
			e, err := b.Event(acme, "e")
			if err != nil {
				t.Fatal(err)
			}
			refuseAt = cut
			if keep.Parts == nil {
				_, err = b.PurgeEvent(t.Context(), acme, e.Partition, e.Seq)
			} else {
				err = b.Retain(t.Context(), keep)
			}
			if err != nil && !errors.Is(err, ErrRefused) {
				t.Fatal(err)
			}
			refuseAt = -1
			b.reopen()
			b.retainParts(keepFor(30 * 24 * time.Hour))
			if e, err = b.Event(acme, "e"); err != nil {
				t.Fatal(err)
			}
			if found := b.quoted(); e.Purged != nil && (len(found) > 0 || !e.Purged.done) || e.Purged == nil && len(found) < 300 {
				t.Errorf("cut before commit %d: %+v, quoted by %d", cut, e.Purged, len(found))
			}
			b.clock.add(100 * 24 * time.Hour)
			b.retainParts(keepFor(30 * 24 * time.Hour))
			if n := b.records(); n != 0 {
				t.Errorf("cut before commit %d: %d records are left", cut, n)
			}
			b.close()
		}
	}
}
