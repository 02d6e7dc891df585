package delivery

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// retain sweeps once, with one retention for all.
func (b *bench) retain(keep time.Duration) {
	b.t.Helper()
	if err := b.Retain(context.Background(), keepFor(keep)); err != nil {
		b.t.Fatal(err)
	}
}

func keepFor(d time.Duration) Retention {
	return Retention{Of: func(NamespaceKey) time.Duration { return d }, Shortest: d}
}

func TestRetainKeepsWhatIsOpen(t *testing.T) {
	for _, keep := range []time.Duration{72 * time.Hour, 30 * time.Hour} {
		t.Run(keep.String(), func(t *testing.T) {
			b := newBench(t)
			states := map[string]Step{
				"succeeded": {State: Succeeded}, "exhausted": {State: Exhausted, Reason: "x"},
				"scheduled": {State: Scheduled, Due: b.clock.now().Add(200 * time.Hour)},
			}
			for _, id := range []string{"succeeded", "pending", "exhausted", "scheduled", "deferred", "half"} {
				pub := publication(id, 1)
				switch id {
				case "deferred":
					pub.Event.DeliverTime = b.clock.now().Add(150 * time.Hour)
				case "half": // one target done, one open
					pub = publication(id, 1, 2)
				}
				b.append(pub)
				b.clock.add(time.Millisecond)
			}
			jobs := map[string]ID{}
			for _, job := range b.jobs() {
				jobs[job.Event.ID+fmt.Sprint(job.ID.Subscription)] = job.ID
				if step, ok := states[job.Event.ID]; ok {
					b.settle(job, step, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
				} else if job.Event.ID == "half" && job.ID.Subscription == 1 {
					b.succeed(job)
				}
			}
			b.flush()
			if keep > 48*time.Hour {
				b.clock.add(100 * time.Hour)
			} else {
				b.clock.add(35 * time.Hour) // within the day that follows
			}
			b.append(publication("new", 1))
			for range 2 { // twice: a sweep must not depend on what another one left
				b.retain(keep)
			}
			b.reopen()
			for id, there := range map[string]bool{
				"succeeded": false, "exhausted": false, "pending": true, "scheduled": true, "deferred": true, "half": true, "new": true,
			} {
				_, err := b.Event(acme, id)
				if there != (err == nil) || err != nil && !errors.Is(err, ErrNotFound) {
					t.Errorf("%s: %v", id, err)
				}
			}
			if attempts, err := b.Attempts(acme, jobs["scheduled1"]); err != nil || len(attempts) != 1 || len(attempts[0].ResponseBody) == 0 {
				t.Errorf("history of an open delivery: %v, %v", attempts, err)
			}
			if _, err := b.Delivery(acme, jobs["succeeded1"]); !errors.Is(err, ErrNotFound) {
				t.Errorf("succeeded: %v", err)
			}
			if d := b.delivery(jobs["half2"]); d.Subscription != "sub-2" || d.State != Pending {
				t.Errorf("%+v", d)
			}
			if got := all(t, b, Query{States: []State{Exhausted}}); len(got) != 0 {
				t.Errorf("index of what is gone: %+v", got)
			}
			if got := all(t, b, Query{Subscription: 1}); len(got) != 4 {
				t.Errorf("%d deliveries of the lane", len(got))
			}
			if got := ids(b.backlog(1)); fmt.Sprint(got) != "[new pending]" {
				t.Errorf("backlog %v", got)
			}
			timers := b.timers(1, b.clock.now().Add(1000*time.Hour))
			if got := ids(timers); fmt.Sprint(got) != "[deferred scheduled]" {
				t.Errorf("timers %v", got)
			}
			waitFor(t, b.Counted)
			if n := b.OpenIn(acme); n != 5 {
				t.Errorf("%d open", n)
			}
			// All that was kept goes on, ends and goes.
			for _, job := range append(timers, append(b.backlog(1), b.backlog(2)...)...) {
				b.succeed(job)
			}
			b.flush()
			if got := all(t, b, Query{}); len(got) != 5 {
				t.Errorf("%d deliveries", len(got))
			}
			b.clock.add(200 * time.Hour)
			b.retain(keep)
			if n := b.records(); n != 0 {
				t.Errorf("%d records are left", n)
			}
		})
	}
}

// records counts what the journal has of events.
func (b *bench) records() (n int) {
	b.t.Helper()
	for _, p := range b.partitions {
		prefix := appendTag(nil, p.number, tagRecord)
		if err := b.scan(b.db, prefix, prefixEnd(prefix), func(_, _ []byte) error { n++; return nil }); err != nil {
			b.t.Fatal(err)
		}
	}
	return n
}

// What is erased by a range leaves no range behind, which every iterator would have to read: nor do those of neighbours.
func TestErasedRangesLeaveNothing(t *testing.T) {
	b := newBench(t, func(o *Options) { o.Partitions = 2 })
	subs := make([]int, eraseByKey)
	for i := range subs {
		subs[i] = i + 1
	}
	for i := range 8 {
		b.append(publication(fmt.Sprint("e", i), subs...))
	}
	for _, job := range b.jobs() {
		b.succeed(job)
	}
	b.flush()
	b.clock.add(100 * time.Hour)
	b.append(publication("new", 1))
	b.retain(72 * time.Hour)
	if m := b.db.Metrics(); m.Keys.TombstoneCount != 0 {
		t.Errorf("%d tombstones are left", m.Keys.TombstoneCount)
	}
	if n := len(all(t, b, Query{})); n != 1 {
		t.Errorf("%d deliveries are left", n)
	}
}

// Targets are the same to everybody, few in their event's record or many apart from it: in lists, by id, after a start,
// where retention keeps them, and when it erases them.
func TestTargetsAreFoundWhereverTheyLie(t *testing.T) {
	for name, n := range map[string]int{"none": 0, "few": 3, "many": 100} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, onePartition)
			subs := make([]int, n)
			for i := range subs {
				subs[i] = i + 1
			}
			e := b.append(publication("e", subs...))[0].Event
			b.append(publication("none"))
			check := func(when string) {
				t.Helper()
				for _, q := range []Query{{}, {EventID: "e"}, {EventUID: e.UID}} {
					got := all(t, b, q)
					if len(got) != n {
						t.Fatalf("%s, %+v: %d deliveries of %d", when, q, len(got), n)
					}
					for i, d := range got {
						if d.Subscription != fmt.Sprint("sub-", i+1) || d.SubscriptionUID != uid(i+1) || *b.delivery(d.ID) != *d {
							t.Fatalf("%s: %+v", when, d)
						}
					}
				}
			}
			check("new")
			b.reopen()
			check("opened again")
			if n == 0 {
				return
			}
			b.clock.add(100 * time.Hour)
			b.retain(72 * time.Hour)
			check("kept")
			for _, job := range b.backlog(1) {
				b.succeed(job)
			}
			b.flush()
			for _, sub := range subs[1:] {
				if _, err := b.CancelLane(t.Context(), lane(sub), "x", nil); err != nil {
					t.Fatal(err)
				}
			}
			b.clock.add(7 * time.Hour)
			b.retain(72 * time.Hour)
			if got := all(t, b, Query{}); len(got) != 0 {
				t.Errorf("%d deliveries stay", len(got))
			}
		})
	}
}

func TestRetainErasesIDsOfPastDays(t *testing.T) {
	b := newBench(t)
	first := publication("e", 1)
	b.append(first)
	b.succeed(b.jobs()[0])
	b.flush()
	b.clock.add(20 * time.Hour)
	b.retain(time.Hour)
	if _, err := b.Event(acme, "e"); !errors.Is(err, ErrNotFound) {
		t.Errorf("event: %v", err)
	}
	// The event is gone, its id is not.
	r := b.append(publication("e", 1))[0]
	if !r.Duplicate || r.Event.Seq != first.Event.Seq || r.Event.UID != first.Event.UID {
		t.Errorf("%+v", r)
	}
	b.clock.add(80 * time.Hour)
	b.retain(time.Hour)
	if n := b.records(); n != 0 {
		t.Errorf("%d records are left", n)
	}
	// Nothing is left, and still no sequence is given twice, even if the clock goes back.
	b.clock.add(-200 * time.Hour)
	b.reopen()
	again := publication("e", 1)
	b.append(again)
	b.clock.add(100 * time.Hour) // when the first one was accepted
	later := publication("e", 1)
	b.append(later)
	seqs := []uint64{first.Event.Seq, again.Event.Seq, later.Event.Seq}
	slices.Sort(seqs)
	if len(slices.Compact(seqs)) != 3 {
		t.Error("sequence was given twice")
	}
}

// Each namespace has its own retention; what is to stay stays, also between two that go.
func TestRetentionIsByNamespace(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	for _, n := range []int{3, 800} { // erased one by one, and by range
		b := newBench(t, onePartition)
		for ns := range NamespaceKey(5) {
			for i := range n {
				pub := publication(fmt.Sprint(i), 1)
				pub.Event.Namespace = ns + 1
				b.append(pub)
			}
		}
		for _, job := range b.jobs() {
			b.exhaust(job)
		}
		b.flush()
		b.clock.add(6 * 24 * time.Hour)
		keep := Retention{Of: func(ns NamespaceKey) time.Duration {
			return []time.Duration{72 * time.Hour, 72 * time.Hour, 0, 72 * time.Hour, 30 * 24 * time.Hour}[ns-1]
		}}
		if err := b.Retain(t.Context(), keep); err != nil {
			t.Fatal(err)
		}
		for ns, want := range map[NamespaceKey]int{1: 0, 2: 0, 3: n, 4: 0, 5: n} {
			for _, q := range []Query{{}, {Subscription: 1}, {States: []State{Exhausted}}} {
				q.Namespace, q.Limit = ns, 1000
				if got := all(t, b, q); len(got) != want {
					t.Errorf("%d events each: %+v: %d of %d", n, q, len(got), want)
				}
			}
		}
		if err := b.Retain(t.Context(), Retention{Of: func(NamespaceKey) time.Duration { return 0 }}); err != nil || len(all(t, b, Query{Namespace: 3})) != n {
			t.Error("no retention keeps everything", err)
		}
	}
}

// Retries in any namespace hold no sweep up (A9), and none of what they reopen is lost.
func TestRetriesDoNotStopRetention(t *testing.T) {
	b := newBench(t, onePartition)
	for i := range 2000 {
		b.append(publication(fmt.Sprint("e", i), i%100+1))
	}
	for _, job := range b.jobs() {
		b.exhaust(job)
	}
	b.flush()
	b.clock.add(100 * time.Hour)
	beside := publication("r", 1)
	beside.Event.Namespace = other
	b.append(beside)
	job := b.jobs()[0]
	stop, stopped, begun := make(chan struct{}), make(chan int), make(chan struct{})
	go func() {
		n := 0
		defer func() { stopped <- n }()
		for ; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := b.Cancel(context.Background(), job.Lane(), job.ID, "x"); err != nil {
				t.Error(err)
			}
			if _, err := b.Retry(context.Background(), job.Lane(), job.ID, -1); err != nil {
				t.Error(err)
			}
			if n == 0 {
				close(begun)
			}
		}
	}()
	<-begun
	b.retain(72 * time.Hour)
	close(stop)
	retries := <-stopped
	page, err := b.Events(EventQuery{Namespace: acme})
	if err != nil || len(page.Events) != 0 {
		t.Errorf("%d events are left, %v", len(page.Events), err)
	}
	if d, err := b.Delivery(other, job.ID); err != nil || d.State != Scheduled {
		t.Errorf("%+v, %v after %d retries", d, err, retries)
	}
}

// meddler has an edit made between two commits of a sweep. It is for one partition.
type meddler struct {
	b    *bench
	left int    // commits of the sweep
	edit func() // queues one edit and waits for it
	done chan struct{}
}

func (m *meddler) use(o *Options) {
	o.refuse = func(uint16) bool {
		if m.edit == nil {
			return false
		}
		if m.left--; m.left == 0 {
			m.start()
			p := m.b.partitions[0] // it comes before the next step of the sweep
			waitFor(m.b.t, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(p.edits) > 0 })
		}
		return false
	}
}

func (m *meddler) start() {
	edit := m.edit
	m.edit = nil
	go func() {
		defer close(m.done)
		edit()
	}()
}

// sweep runs a sweep and the edit after so many of its commits; when it makes fewer, afterwards.
func (m *meddler) sweep(b *bench, after int, keep Retention, edit func()) {
	b.t.Helper()
	m.b, m.left, m.edit, m.done = b, after, edit, make(chan struct{})
	if after == 0 {
		m.start()
		<-m.done
	}
	if err := b.Retain(context.Background(), keep); err != nil {
		b.t.Fatal(err)
	}
	if m.edit != nil {
		m.start()
	}
	<-m.done
}

// An idle sweep erases nothing and says nothing to anybody.
func TestIdleRetentionCommitsNothing(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("e", 1))
	b.succeed(b.jobs()[0])
	b.flush()
	index := b.partitions[0].index
	for range 3 {
		b.retain(72 * time.Hour)
		b.clock.add(10 * time.Minute)
	}
	b.flush()
	if got := b.partitions[0].index; got != index {
		t.Errorf("%d commits", got-index)
	}
}

func TestRetentionEndsWithItsContext(t *testing.T) {
	b := newBench(t)
	b.append(publication("e", 1))
	b.clock.add(100 * time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Retain(ctx, keepFor(72*time.Hour)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if got := all(t, b, Query{}); len(got) != 1 {
		t.Errorf("%+v", got)
	}
}

// A sweep that ended between moving what is open and erasing the day is made again, after what was moved has gone
// on: what has happened since rules.
func TestInterruptedRetentionIsMadeAgain(t *testing.T) {
	refuseAt := -1
	b := newBench(t, onePartition, func(o *Options) {
		o.refuse = func(uint16) bool {
			refuseAt--
			return refuseAt == 0
		}
	})
	b.append(publication("e", 1))
	b.failed(b.jobs()[0], time.Minute)
	b.flush()
	b.clock.add(100 * time.Hour)
	refuseAt = 3 // begins, moves, erases
	if err := b.Retain(t.Context(), keepFor(72*time.Hour)); !errors.Is(err, ErrRefused) {
		t.Fatal(err)
	}
	job := b.timers(1, b.clock.now())[0]
	b.failed(job, time.Minute)
	b.flush()
	b.reopen()
	b.retain(72 * time.Hour)
	d := b.delivery(job.ID)
	if d.Attempts != 2 || !d.NextAttempt.Equal(b.clock.now().Add(time.Minute)) {
		t.Errorf("%+v", d)
	}
	if attempts, err := b.Attempts(acme, job.ID); err != nil || len(attempts) != 2 {
		t.Errorf("%v, %v", attempts, err)
	}
	if _, err := b.Cancel(t.Context(), lane(1), job.ID, "x"); err != nil {
		t.Error(err)
	}
	if got := b.lanes(); len(got) != 0 {
		t.Errorf("cancelled, and still waits: %+v", got)
	}
}

// What a sweep that was cut short has left in its day does not come back when what it has kept goes, as after the clock
// was set back and that day is not due any more.
func TestForgottenEventLeavesNothingInItsDay(t *testing.T) {
	refuseAt := -1
	b := newBench(t, onePartition, func(o *Options) {
		o.refuse = func(uint16) bool {
			refuseAt--
			return refuseAt == 0
		}
	})
	const years = 5 * 365 * day
	b.clock.add(years)
	b.append(publication("e", 1))
	b.failed(b.jobs()[0], time.Minute)
	b.flush()
	b.clock.add(100 * time.Hour)
	refuseAt = 3 // begins, moves, erases
	if err := b.Retain(t.Context(), keepFor(time.Hour)); !errors.Is(err, ErrRefused) {
		t.Fatal(err)
	}
	job := b.timers(1, b.clock.now())[0]
	b.clock.add(-years)
	b.reopen()
	if _, err := b.Cancel(t.Context(), lane(1), job.ID, "x"); err != nil {
		t.Fatal(err)
	}
	b.clock.add(2 * time.Hour)
	b.retain(time.Hour)
	if d, err := b.Delivery(acme, job.ID); !errors.Is(err, ErrNotFound) && (err != nil || d.State != Cancelled) {
		t.Errorf("cancelled, and now %+v, %v", d, err)
	}
	if got := all(t, b, Query{}); len(got) != 0 {
		t.Errorf("listed: %+v", got[0])
	}
}

// A delivery that is retried at any moment of a sweep is whole afterwards, or was gone before.
func TestRetryMeetsRetention(t *testing.T) {
	for n := range 12 {
		point, keep, age := n%6, 72*time.Hour, 100*time.Hour
		if n >= 6 { // erased hour by hour
			keep, age = 30*time.Hour, 35*time.Hour
		}
		t.Run(fmt.Sprintf("%v,%d", keep, point), func(t *testing.T) {
			var m meddler
			b := newBench(t, onePartition, m.use)
			pub := publication("e", 1, 2)
			b.append(pub, publication("open", 3))
			for _, job := range b.jobs() {
				if job.ID.Subscription != 3 {
					b.exhaust(job)
				}
			}
			b.flush()
			id := idOf(pub.Event, 1)
			b.clock.add(age)
			var retried bool
			m.sweep(b, point, keepFor(keep), func() {
				_, err := b.Retry(context.Background(), lane(1), id, -1)
				retried = err == nil
				if err != nil && !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
			})
			b.reopen()
			waitFor(t, b.Counted)
			d, err := b.Delivery(acme, id)
			jobs := b.timers(1, b.clock.now().Add(time.Second))
			if !retried {
				if !errors.Is(err, ErrNotFound) || len(jobs) != 0 || b.OpenOf(lane(1)) != 0 {
					t.Errorf("not retried: %+v, %v; %d jobs, %d open", d, err, len(jobs), b.OpenOf(lane(1)))
				}
				return
			}
			if err != nil || d.State != Scheduled || d.Attempts != 1 || len(jobs) != 1 || jobs[0].Event.ID != "e" || b.OpenOf(lane(1)) != 1 {
				t.Fatalf("retried: %+v, %v; %d jobs, %d open", d, err, len(jobs), b.OpenOf(lane(1)))
			}
			if attempts, err := b.Attempts(acme, id); err != nil || len(attempts) != 1 {
				t.Errorf("its history is %v, %v", attempts, err)
			}
			b.succeed(jobs[0])
			b.flush()
			if d := b.delivery(id); d.State != Succeeded || d.Attempts != 2 {
				t.Errorf("%+v", d)
			}
			if e, err := b.Event(acme, "e"); err != nil || e.Seq != pub.Event.Seq {
				t.Errorf("%v, %v", e, err)
			}
		})
	}
}

// A retry while a sweep erases another namespace's records of the day changes that delivery only.
func TestRetryBesideRetentionLeavesItsSiblings(t *testing.T) {
	var m meddler
	b := newBench(t, onePartition, m.use)
	pub := publication("e", 1, 2)
	gone := publication("gone", 1)
	gone.Event.Namespace = other
	b.append(pub, gone)
	for _, job := range b.jobs() {
		b.exhaust(job)
	}
	b.flush()
	b.clock.add(100 * time.Hour)
	keep := Retention{Of: func(ns NamespaceKey) time.Duration {
		if ns == acme {
			return 0
		}
		return 72 * time.Hour
	}}
	m.sweep(b, 1, keep, func() { // once it has begun
		if _, err := b.Retry(context.Background(), lane(1), idOf(pub.Event, 1), -1); err != nil {
			t.Error(err)
		}
	})
	if d := b.delivery(idOf(pub.Event, 1)); d.State != Scheduled {
		t.Errorf("%+v", d)
	}
	if d, err := b.Delivery(acme, idOf(pub.Event, 2)); err != nil || d.State != Exhausted {
		t.Errorf("the delivery beside it, which nobody asked for, is %+v, %v", d, err)
	}
}

// A commit of a sweep that is refused leaves nothing of it behind.
func TestRefusedRetentionLeavesNoTrace(t *testing.T) {
	refuse := false
	b := newBench(t, onePartition, func(o *Options) {
		o.refuse = func(uint16) bool { return refuse }
	})
	b.append(publication("e", 1, 2))
	for _, job := range b.jobs() {
		b.exhaust(job)
	}
	b.flush()
	b.clock.add(100 * time.Hour)
	refuse = true
	if err := b.Retain(t.Context(), keepFor(72*time.Hour)); !errors.Is(err, ErrRefused) {
		t.Fatal(err)
	}
	refuse = false
	id := all(t, b, Query{Subscription: 1})[0].ID
	if d, err := b.Retry(t.Context(), lane(1), id, -1); err != nil || d.State != Scheduled {
		t.Errorf("%+v, %v", d, err)
	}
	if d := b.delivery(id); d.State != Scheduled {
		t.Errorf("%+v", d)
	}
	if got := all(t, b, Query{}); len(got) != 2 {
		t.Errorf("%d deliveries", len(got))
	}
}

// Two events of one id, a day apart, are both open when their days go, and both are found by that id.
func TestKeptEventsOfOneID(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("e", 1))
	b.clock.add(30 * time.Hour)
	b.append(publication("e", 1))
	b.clock.add(100 * time.Hour)
	b.retain(48 * time.Hour)
	if got := all(t, b, Query{EventID: "e"}); len(got) != 2 {
		t.Errorf("%d of 2 are found", len(got))
	}
	for _, job := range b.backlog(1)[1:] {
		b.succeed(job)
	}
	b.flush()
	b.clock.add(24 * time.Hour)
	b.retain(48 * time.Hour)
	if got := all(t, b, Query{EventID: "e"}); len(got) != 1 {
		t.Errorf("%d of 1 are found", len(got))
	}
}

// A partition that cannot be swept, since something in it is damaged, holds up no other.
func TestRetentionGoesOnInOtherPartitions(t *testing.T) {
	b := newBench(t)
	for i := range 40 {
		b.append(publication(fmt.Sprint("e", i), 1))
	}
	jobs := b.jobs()
	for _, job := range jobs {
		b.succeed(job)
	}
	b.flush()
	if err := b.db.Set(append(appendDay(nil, 0, dayOf(seqAt(b.clock.now()))), 1, 2), nil, pebble.Sync); err != nil {
		t.Fatal(err)
	}
	b.clock.add(100 * time.Hour)
	var damage *CorruptError
	if err := b.Retain(t.Context(), keepFor(72*time.Hour)); !errors.As(err, &damage) {
		t.Errorf("%v", err)
	}
	for _, job := range jobs {
		if _, err := b.Delivery(acme, job.ID); job.ID.Partition != 0 && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s is left: %v", job.ID, err)
		}
	}
}
