package delivery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
)

// clock is the time that a journal under test goes by.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// bench is a journal in memory with what its onCommit was given.
type bench struct {
	*Journal
	t     testing.TB
	fs    vfs.FS
	clock *clock
	opts  Options

	mu     sync.Mutex
	handed []*Job
}

func newBench(t testing.TB, change ...func(*Options)) *bench {
	t.Helper()
	b := &bench{t: t, clock: newClock(), fs: vfs.NewMem()}
	b.opts = Options{Dir: "journal", Partitions: 4, CacheBytes: 8 << 20, fs: b.fs, now: b.clock.now, BallastBytes: -1}
	for _, f := range change {
		f(&b.opts)
	}
	b.open()
	t.Cleanup(func() { b.close() })
	return b
}

func (b *bench) open() {
	b.t.Helper()
	j, err := Open(b.opts)
	if err != nil {
		b.t.Fatal(err)
	}
	b.Journal, b.handed = j, nil
	j.Start(func(jobs []*Job) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.handed = append(b.handed, jobs...)
	})
}

func (b *bench) close() {
	b.t.Helper()
	if err := b.Close(); err != nil {
		b.t.Error(err)
	}
}

func (b *bench) reopen() {
	b.t.Helper()
	b.close()
	b.open()
}

// jobs takes what onCommit was given so far.
func (b *bench) jobs() []*Job {
	b.mu.Lock()
	defer b.mu.Unlock()
	jobs := b.handed
	b.handed = nil
	return jobs
}

func (b *bench) append(events ...*Event) []AppendResult {
	b.t.Helper()
	results := b.Append(context.Background(), events)
	for i, r := range results {
		if r.Err != nil {
			b.t.Fatalf("append %s: %v", events[i].ID, r.Err)
		}
	}
	return results
}

func (b *bench) flush() {
	b.t.Helper()
	if err := b.Flush(context.Background()); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) delivery(id ID) *Delivery {
	b.t.Helper()
	d, err := b.Delivery(id)
	if err != nil {
		b.t.Fatalf("delivery %s: %v", id, err)
	}
	return d
}

// backlog reads a lane's whole FIFO in all partitions.
func (b *bench) backlog(lane LaneKey, step int) []*Job {
	b.t.Helper()
	var all []*Job
	for p := range uint16(b.Partitions()) {
		for from := uint64(1); from != 0; {
			jobs, next, err := b.Backlog(lane, p, from, step, 1<<20)
			if err != nil {
				b.t.Fatal(err)
			}
			all, from = append(all, jobs...), next
		}
	}
	return all
}

func (b *bench) timers(lane LaneKey, until time.Time) []*Job {
	b.t.Helper()
	var all []*Job
	for p := range uint16(b.Partitions()) {
		jobs, _, err := b.Timers(lane, p, until, 1000, 1<<30)
		if err != nil {
			b.t.Fatal(err)
		}
		all = append(all, jobs...)
	}
	return all
}

func testUID(n byte) UID { return UID{0: n, 15: n} }

func event(id string, subs ...string) *Event {
	e := &Event{
		Namespace: "acme", ID: id, Source: "//test", Type: "order.created", ContentType: "application/json",
		Attributes: map[string]string{"tenant": "t1"}, Payload: []byte(`{"id":"` + id + `"}`),
	}
	copy(e.ContentHash[:], id)
	for i, s := range subs {
		e.Targets = append(e.Targets, Target{Subscription: s, UID: testUID(byte(i + 1)), MaxAttempts: 3, MaxAge: time.Hour})
	}
	return e
}

func lane(sub string) LaneKey { return LaneKey{"acme", sub} }

func ids(jobs []*Job) []string {
	var out []string
	for _, j := range jobs {
		out = append(out, j.Event.ID)
	}
	slices.Sort(out)
	return out
}

func attemptAt(n int, o Outcome, code int, now time.Time) *Attempt {
	return &Attempt{
		Number: n, Start: now, Duration: time.Millisecond, Outcome: o, ResponseCode: code, Error: "e" + fmt.Sprint(n),
		ResponseBody: []byte("body"), ResponseHeaders: []Header{{"x", "1"}}, RequestHeaders: []Header{{"y", "2"}},
	}
}

func TestJournalKeepsEventsAndDeliveriesOverReopen(t *testing.T) {
	b := newBench(t)
	e := event("e1", "orders", "audit")
	e.Time, e.TTL = b.clock.now().Add(-time.Minute), 30*time.Minute
	r := b.append(e)[0]
	if r.Duplicate || r.Event != e || e.Seq == 0 || len(e.UID) != 28 {
		t.Fatalf("unexpected result %+v of %+v", r, e)
	}
	jobs := b.jobs()
	if len(jobs) != 2 || jobs[0].Event != e || jobs[1].Event != e {
		t.Fatalf("handed over %v", jobs)
	}
	b.reopen()
	got, err := b.Event("acme", "e1")
	if err != nil {
		t.Fatal(err)
	}
	want := *e
	want.Targets = []Target{{Subscription: "orders", UID: testUID(1)}, {Subscription: "audit", UID: testUID(2)}}
	if diff := cmp.Diff(&want, got); diff != "" {
		t.Error(diff)
	}
	d := b.delivery(ID{e.Seq, e.Partition, 1})
	wantD := &Delivery{
		ID: ID{e.Seq, e.Partition, 1}, Namespace: "acme", EventID: "e1", EventType: "order.created", Subscription: "audit",
		SubscriptionUID: testUID(2), State: Pending, MaxAttempts: 3, Expire: e.AcceptTime.Add(30 * time.Minute), CreateTime: e.AcceptTime,
	}
	if diff := cmp.Diff(wantD, d); diff != "" {
		t.Error(diff)
	}
	again := b.backlog(lane("audit"), 10)
	if len(again) != 1 || again[0].ID != d.ID || !bytes.Equal(again[0].Event.Payload, e.Payload) || again[0].Event.UID != e.UID {
		t.Errorf("backlog %+v", again)
	}
	if b.OpenIn("acme") == 0 {
		waitFor(t, b.Counted)
	}
}

func waitFor(t testing.TB, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); {
		if time.Now().After(end) {
			t.Fatal("condition not met in time")
		}
		timer := time.NewTimer(time.Millisecond)
		<-timer.C
	}
}

func TestSettleMovesDeliveryThroughItsStates(t *testing.T) {
	b := newBench(t)
	b.append(event("ok", "s"), event("retry", "s"), event("dead", "s"))
	byID := map[string]*Job{}
	for _, j := range b.jobs() {
		byID[j.Event.ID] = j
	}
	now := b.clock.now()
	b.Settle(byID["ok"], Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, now))
	due := now.Add(5 * time.Second)
	b.Settle(byID["retry"], Step{State: Scheduled, Due: due}, attemptAt(1, OutcomeRetryable, 500, now))
	b.Settle(byID["dead"], Step{State: Rejected, Reason: "gone"}, attemptAt(1, OutcomePermanent, 410, now))
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
	if n := b.OpenOf(lane("s")); n != 1 {
		t.Errorf("%d open, want 1", n)
	}
	b.reopen()
	if got := b.backlog(lane("s"), 10); len(got) != 0 {
		t.Errorf("backlog %v", ids(got))
	}
	if got := b.timers(lane("s"), due.Add(-1)); len(got) != 0 {
		t.Errorf("early timers %v", ids(got))
	}
	again := b.timers(lane("s"), due)
	if len(again) != 1 || again[0].Attempts != 1 || !again[0].Due.Equal(due) {
		t.Fatalf("timers %+v", again)
	}
	b.Settle(again[0], Step{State: Succeeded}, attemptAt(2, OutcomeSucceeded, 204, due))
	b.flush()
	if got := b.timers(lane("s"), due.Add(time.Hour)); len(got) != 0 {
		t.Errorf("timers after success %v", ids(got))
	}
	attempts, err := b.Attempts(again[0].ID)
	if err != nil || len(attempts) != 2 || attempts[0].ResponseCode != 500 || attempts[1].ResponseCode != 204 {
		t.Fatalf("attempts %+v, %v", attempts, err)
	}
	if string(attempts[0].ResponseBody) != "body" || len(attempts[1].RequestHeaders) != 1 {
		t.Errorf("bodies lost: %+v", attempts)
	}
	waitFor(t, b.Counted)
	if n := b.OpenIn("acme"); n != 0 {
		t.Errorf("%d open at the end", n)
	}
	for state, err := range b.Lanes() {
		if err != nil || state.From != 0 || !state.NextDue.IsZero() {
			t.Errorf("lane %+v, %v", state, err)
		}
	}
}

func TestSettlesBecomeVisibleByThemselves(t *testing.T) {
	b := newBench(t)
	b.append(event("e", "s"))
	job := b.jobs()[0]
	b.Settle(job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()))
	waitFor(t, func() bool { return b.delivery(job.ID).State == Succeeded })
	waitFor(t, func() bool { return b.synced.Load() == b.written.Load() && b.written.Load() > 0 })
}

func TestAppendIsIdempotent(t *testing.T) {
	b := newBench(t)
	first := b.append(event("e1", "s"))[0].Event
	again := b.append(event("e1", "s", "other"))[0]
	if !again.Duplicate || again.Event.Seq != first.Seq || !again.Event.AcceptTime.Equal(first.AcceptTime) || len(again.Event.Targets) != 1 {
		t.Errorf("duplicate %+v", again)
	}
	other := event("e1", "s")
	other.ContentHash[0]++
	if r := b.Append(t.Context(), []*Event{other})[0]; !errors.Is(r.Err, ErrEventConflict) {
		t.Errorf("conflict: %+v", r)
	}
	elsewhere := event("e1", "s")
	elsewhere.Namespace = "beta"
	if r := b.append(elsewhere)[0]; r.Duplicate {
		t.Error("namespaces are mixed up")
	}
	b.reopen()
	b.clock.add(23 * time.Hour)
	if r := b.append(event("e1", "s"))[0]; !r.Duplicate || r.Event.UID != first.UID {
		t.Errorf("after reopen on the next day: %+v", r)
	}
	b.clock.add(2 * time.Hour)
	if r := b.append(event("e1", "s"))[0]; r.Duplicate {
		t.Errorf("after the window: %+v", r)
	}
	if e, err := b.Event("acme", "e1"); err != nil || e.Seq == first.Seq {
		t.Errorf("latest event: %+v, %v", e, err)
	}
}

func TestAppendResolvesDuplicatesInOneBatch(t *testing.T) {
	b := newBench(t)
	conflict := event("a", "s")
	conflict.ContentHash[5]++
	batch := []*Event{event("a", "s"), event("b", "s"), event("a", "s"), conflict, {Namespace: "acme"}}
	r := b.Append(t.Context(), batch)
	if r[0].Duplicate || r[1].Duplicate || !r[2].Duplicate || r[2].Event != batch[0] {
		t.Errorf("results %+v", r)
	}
	if !errors.Is(r[3].Err, ErrEventConflict) || !errors.Is(r[4].Err, ErrInvalidEvent) {
		t.Errorf("errors %v, %v", r[3].Err, r[4].Err)
	}
	if got := b.jobs(); len(got) != 2 {
		t.Errorf("%d jobs", len(got))
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
				e := event(fmt.Sprint(rng.IntN(300)), "s")
				r := b.Append(context.Background(), []*Event{e})[0]
				if r.Err != nil {
					t.Error(r.Err)
					return
				}
				if !r.Duplicate {
					mu.Lock()
					fresh[e.ID]++
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

func TestJobsComeInOrderOfSequence(t *testing.T) {
	b := newBench(t)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 50 {
				var batch []*Event
				for k := range 5 {
					batch = append(batch, event(fmt.Sprintf("%d-%d-%d", w, i, k), "s"))
				}
				b.Append(context.Background(), batch)
			}
		})
	}
	wg.Wait()
	last := map[uint16]uint64{}
	for _, j := range b.jobs() {
		if j.ID.Seq <= last[j.ID.Partition] {
			t.Fatalf("sequence %d after %d", j.ID.Seq, last[j.ID.Partition])
		}
		last[j.ID.Partition] = j.ID.Seq
	}
	var prev uint64
	jobs, next, err := b.Backlog(lane("s"), 0, 0, 7, 1<<20)
	if err != nil || len(jobs) != 7 || next == 0 {
		t.Fatalf("%d jobs, next %d, %v", len(jobs), next, err)
	}
	for _, j := range jobs {
		if j.ID.Seq <= prev {
			t.Fatal("backlog is not in order")
		}
		prev = j.ID.Seq
	}
}

// turnstile is a lane that turns fresh jobs away now and then and reads them back, as dispatch does.
type turnstile struct {
	mu    sync.Mutex
	from  uint64 // where to read; 0 while fresh jobs are taken
	left  uint64 // highest sequence turned away
	read  uint64 // highest sequence taken
	taken []string
}

func (l *turnstile) take(job *Job) {
	l.taken, l.read = append(l.taken, job.Event.ID), job.ID.Seq
}

func (l *turnstile) offer(jobs []*Job) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, job := range jobs {
		switch {
		case job.ID.Seq <= l.read: // the backlog was quicker
		case l.from == 0 && i%4 != 3:
			l.take(job)
		default: // the window is full
			if l.from == 0 {
				l.from = job.ID.Seq
			}
			l.left = job.ID.Seq
		}
	}
}

// refill reads on, and reports whether anything may be left.
func (l *turnstile) refill(j *Journal, partition uint16) (bool, error) {
	l.mu.Lock()
	from := l.from
	l.mu.Unlock()
	if from == 0 {
		return false, nil
	}
	jobs, next, err := j.Backlog(lane("s"), partition, from, 16, 1<<20)
	if err != nil {
		return false, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, job := range jobs {
		l.take(job)
	}
	l.from = next
	if next == 0 && l.left > l.read {
		l.from = l.read + 1 // turned away during the read
	}
	return true, nil
}

func TestHandOverAndBacklogNeitherLoseNorDouble(t *testing.T) {
	j, err := Open(Options{Dir: "journal", Partitions: 2, CacheBytes: 8 << 20, fs: vfs.NewMem(), BallastBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	lanes := make([]turnstile, 2)
	j.Start(func(jobs []*Job) { lanes[jobs[0].ID.Partition].offer(jobs) })
	const total = 3000
	var writers, readers sync.WaitGroup
	var written atomic.Bool
	for p := range uint16(2) {
		readers.Go(func() {
			for {
				ended := written.Load()
				more, err := lanes[p].refill(j, p)
				if err != nil {
					t.Error(err)
				}
				if err != nil || ended && !more {
					return
				}
				runtime.Gosched()
			}
		})
	}
	for w := range 3 {
		writers.Go(func() {
			for i := range total / 30 {
				var batch []*Event
				for k := range 10 {
					batch = append(batch, event(fmt.Sprintf("%d-%d-%d", w, i, k), "s"))
				}
				j.Append(context.Background(), batch)
			}
		})
	}
	writers.Wait()
	written.Store(true)
	readers.Wait()
	seen := map[string]int{}
	for i := range lanes {
		for _, id := range lanes[i].taken {
			seen[id]++
		}
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("%s came %d times", id, n)
		}
	}
	if len(seen) != total {
		t.Errorf("%d of %d came", len(seen), total)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}
