package delivery

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
)

// testClock is the time that a journal under test goes by.
type testClock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *testClock { return &testClock{at: time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)} }

func (c *testClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *testClock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

const (
	acme  = NamespaceKey(7)
	other = NamespaceKey(8)
)

// uid makes a UID whose key is n.
func uid(n int) (u UID) {
	binary.BigEndian.PutUint64(u[8:], uint64(n))
	u[0] = 0xaa
	return u
}

func lane(sub int) LaneKey { return LaneKey{acme, SubscriptionKey(sub)} }

// publication makes an event of acme with these subscriptions.
func publication(id string, subs ...int) Publication {
	e := &Event{
		Namespace: acme, ID: id, Source: "//test", Type: "order.created", ContentType: "application/json",
		Attributes: map[string]string{"tenant": "t1"}, Payload: []byte(`{"id":"` + id + `"}`),
	}
	copy(e.ContentHash[:], id)
	p := Publication{Event: e}
	for _, s := range subs {
		p.Targets = append(p.Targets, Target{Subscription: fmt.Sprint("sub-", s), UID: uid(s), MaxAttempts: 3, MaxAge: time.Hour})
	}
	return p
}

func idOf(e *Event, sub int) ID { return ID{e.Seq, e.Partition, SubscriptionKey(sub)} }

func attemptAt(n int, o Outcome, code int, now time.Time) *Attempt {
	return &Attempt{
		Number: n, Start: now, Duration: time.Millisecond, Outcome: o, ResponseCode: code, Error: "e" + fmt.Sprint(n),
		ResponseBody: []byte("body"), ResponseHeaders: []Header{{"x", "1"}}, RequestHeaders: []Header{{"y", "2"}},
	}
}

// told is one call of a Follower or a Settled.
type told struct {
	what      string // offer, timed, edited, settled
	commit    Commit
	lane      LaneKey
	partition uint16
	row       Row
}

// follower keeps what it is told, in order.
type follower struct {
	mu    sync.Mutex
	fresh []Job
	calls []told
	hold  func(*Event) // of each job that is offered
}

func (f *follower) Offer(c Commit, jobs []Job) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fresh = append(f.fresh, jobs...)
	for i := range jobs {
		f.calls = append(f.calls, told{"offer", c, jobs[i].Lane(), jobs[i].ID.Partition, jobs[i].Row()})
		if f.hold != nil {
			f.hold(jobs[i].Event)
		}
	}
}

func (f *follower) Timed(c Commit, lane LaneKey, partition uint16, row Row) {
	f.add(told{"timed", c, lane, partition, row})
}

func (f *follower) Edited(c Commit, lane LaneKey, partition uint16, seq uint64, epoch uint32) {
	f.add(told{"edited", c, lane, partition, Row{Seq: seq, Epoch: epoch}})
}

func (f *follower) add(t told) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, t)
}

// jobs takes the jobs that were offered so far.
func (f *follower) jobs() []Job {
	f.mu.Lock()
	defer f.mu.Unlock()
	jobs := f.fresh
	f.fresh = nil
	return jobs
}

// heard takes what was told so far, in short.
func (f *follower) heard() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var log []string
	for _, c := range f.calls {
		log = append(log, fmt.Sprint(c.what, " ", c.row.Epoch))
	}
	f.calls = nil
	return log
}

// settledBy notes that a job was settled.
type settledBy struct {
	f   *follower
	job *Job
}

func (s settledBy) Settled(c Commit) {
	s.f.add(told{"settled", c, s.job.Lane(), s.job.ID.Partition, s.job.Row()})
}

// bench is a journal in memory with its follower.
type bench struct {
	*Journal
	*follower
	t     testing.TB
	fs    vfs.FS
	clock *testClock
	opts  Options
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

func onePartition(o *Options) { o.Partitions = 1 }

func (b *bench) open() {
	b.t.Helper()
	j, err := Open(b.opts)
	if err != nil {
		b.t.Fatal(err)
	}
	b.Journal, b.follower = j, &follower{}
	j.Start(b.follower)
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

func (b *bench) append(pubs ...Publication) []AppendResult {
	b.t.Helper()
	results := b.Append(context.Background(), pubs)
	for i, r := range results {
		if r.Err != nil {
			b.t.Fatalf("append %s: %v", pubs[i].Event.ID, r.Err)
		}
	}
	return results
}

// settle queues a settle whose end shows in the follower's log.
func (b *bench) settle(job Job, step Step, a *Attempt) {
	b.Settle(&job, step, a, settledBy{b.follower, &job})
}

func (b *bench) succeed(job Job) {
	b.settle(job, Step{State: Succeeded}, attemptAt(job.Attempts+1, OutcomeSucceeded, 200, b.clock.now()))
}

// failed has the attempt fail, and the next one be due in a while.
func (b *bench) failed(job Job, in time.Duration) {
	b.settle(job, Step{State: Scheduled, Due: b.clock.now().Add(in)}, attemptAt(job.Attempts+1, OutcomeRetryable, 500, b.clock.now()))
}

func (b *bench) exhaust(job Job) {
	b.settle(job, Step{State: Exhausted, Reason: "enough"}, attemptAt(job.Attempts+1, OutcomeRetryable, 500, b.clock.now()))
}

func (b *bench) flush() {
	b.t.Helper()
	if err := b.Flush(context.Background()); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) delivery(id ID) *Delivery {
	b.t.Helper()
	d, err := b.Delivery(acme, id)
	if err != nil {
		b.t.Fatalf("delivery %s: %v", id, err)
	}
	return d
}

// read reads all rows of a kind of a lane in all partitions, a few at a time.
func (b *bench) read(lane LaneKey, kind Kind, until time.Time, step int) []Job {
	b.t.Helper()
	var all []Job
	for p := range uint16(b.Partitions()) {
		for from := (Pos{Some: true}); from.Some; {
			found, err := b.Read(lane, p, kind, from, InstantOf(until), step, 1<<30)
			if err != nil || len(found.Aside) > 0 {
				b.t.Fatal(err, found.Aside)
			}
			all = append(all, found.Jobs...)
			for i := range found.Jobs {
				b.Release(found.Jobs[i].Event)
			}
			if from = found.Next; len(found.Jobs) < step {
				break // the next timer is not due
			}
		}
	}
	return all
}

func (b *bench) backlog(sub int) []Job { return b.read(lane(sub), FIFO, time.Time{}, 7) }

func (b *bench) timers(sub int, until time.Time) []Job { return b.read(lane(sub), Timer, until, 5) }

func (b *bench) lanes() []LaneState {
	b.t.Helper()
	var all []LaneState
	for state, err := range b.Lanes() {
		if err != nil {
			b.t.Fatal(err)
		}
		all = append(all, state)
	}
	return all
}

func ids(jobs []Job) []string {
	var out []string
	for i := range jobs {
		out = append(out, jobs[i].Event.ID)
	}
	slices.Sort(out)
	return out
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

func TestJournalKeepsEventsAndDeliveriesOverReopen(t *testing.T) {
	b := newBench(t)
	pub := publication("e1", 1, 2)
	e := pub.Event
	e.Time, e.TTL, e.Subject, e.Schema = b.clock.now().Add(-time.Minute), 30*time.Minute, "s", "urn:x"
	r := b.append(pub)[0]
	if r.Duplicate || r.Event != e || e.Seq == 0 || len(e.UID) != 28 {
		t.Fatalf("unexpected result %+v of %+v", r, e)
	}
	jobs := b.jobs()
	if len(jobs) != 2 || jobs[0].Event != e || jobs[1].Event != e {
		t.Fatalf("offered %v", jobs)
	}
	b.reopen()
	got, err := b.Event(acme, "e1")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(e, got, ignoreRefs()); diff != "" {
		t.Error(diff)
	}
	byUID, err := b.EventByUID(acme, e.UID)
	if diff := cmp.Diff(e, byUID, ignoreRefs()); diff != "" || err != nil {
		t.Error(diff, err)
	}
	d := b.delivery(idOf(e, 2))
	wantD := &Delivery{
		ID: idOf(e, 2), Namespace: acme, EventID: "e1", EventUID: e.UID, EventType: "order.created", Subscription: "sub-2",
		SubscriptionUID: uid(2), State: Pending, MaxAttempts: 3, Expire: e.AcceptTime.Add(30 * time.Minute), CreateTime: e.AcceptTime, Trigger: ByPublish,
	}
	if diff := cmp.Diff(wantD, d); diff != "" {
		t.Error(diff)
	}
	again := b.backlog(2)
	if len(again) != 1 || again[0].ID != d.ID {
		t.Fatalf("backlog %+v", again)
	}
	if diff := cmp.Diff(e, again[0].Event, ignoreRefs()); diff != "" {
		t.Error(diff)
	}
	jobs[1].AsOf, jobs[1].Event = again[0].AsOf, again[0].Event
	if diff := cmp.Diff(jobs[1], again[0], ignoreRefs()); diff != "" {
		t.Error("a job read back is another one than was offered:", diff)
	}
	waitFor(t, b.Counted)
	if n := b.OpenIn(acme); n != 2 {
		t.Errorf("%d open", n)
	}
}

func ignoreRefs() cmp.Option {
	return cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".refs" }, cmp.Ignore())
}

// Whatever time the API accepts comes back as it was, however far away: the second attempt carries the same body.
func TestTimesOfAllYearsComeBack(t *testing.T) {
	b := newBench(t)
	for i, text := range []string{
		"9999-12-31T23:59:59.999999999Z", "2262-04-12T00:00:00Z", "1677-09-20T00:12:43.1Z", "0001-01-01T00:00:00.000000001Z", "1970-01-01T00:00:00Z",
		"1969-12-31T23:59:59.999999999Z",
	} {
		at, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			t.Fatal(err)
		}
		pub := publication(fmt.Sprint("e", i), 1)
		pub.Event.Time, pub.Event.DeliverTime = at, at
		b.append(pub)
		e, err := b.Event(acme, pub.Event.ID)
		if err != nil || !e.Time.Equal(at) || !e.DeliverTime.Equal(at) {
			t.Errorf("%s became %v, %v", text, e, err)
		}
		if !InstantOf(at).Time().After(at.Add(-1)) || InstantOf(at) == 0 {
			t.Errorf("%s is due at %v", text, InstantOf(at).Time())
		}
	}
	b.reopen()
	end := time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
	if got := b.timers(1, end.Add(time.Second)); len(got) != 2 || got[1].Expire.Before(got[1].Due.Time()) {
		t.Errorf("deferred to years away: %+v", got)
	}
	if got := b.timers(1, end); len(got) != 1 {
		t.Errorf("deferred to 2262: %v", ids(got))
	}
}

func TestAppendedJobsComeInOrderOfSequence(t *testing.T) {
	b := newBench(t)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 50 {
				var batch []Publication
				for k := range 5 {
					batch = append(batch, publication(fmt.Sprintf("%d-%d-%d", w, i, k), 1))
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
}

// A large fan-out is offered in pieces, and each of its jobs once.
func TestLargeFanOutIsOfferedInPieces(t *testing.T) {
	b := newBench(t)
	subs := make([]int, 5000)
	for i := range subs {
		subs[i] = i + 1
	}
	b.append(publication("e", subs...))
	seen := map[SubscriptionKey]bool{}
	for _, j := range b.jobs() {
		if seen[j.ID.Subscription] {
			t.Fatal("offered twice", j.ID)
		}
		seen[j.ID.Subscription] = true
	}
	if len(seen) != len(subs) || b.OpenIn(acme) != int64(len(subs)) {
		t.Errorf("%d of %d offered, %d open", len(seen), len(subs), b.OpenIn(acme))
	}
	if got := all(t, b, Query{EventID: "e", Limit: 1000}); len(got) != len(subs) {
		t.Errorf("%d of %d listed", len(got), len(subs))
	}
}

// What is in memory is counted once, however many jobs share it, and by its real size; nothing is left when all is
// given back.
func TestEventsAreHeldOnceAndForgotten(t *testing.T) {
	b := newBench(t)
	b.hold = b.Hold
	big := publication("big", 1, 2, 3, 4)
	big.Event.Payload = make([]byte, 100_000)
	b.append(big, publication("small", 1))
	if n := b.EventBytes(); n < 100_000 || n > 110_000 {
		t.Errorf("%d bytes are held", n)
	}
	jobs := b.jobs()
	again, err := b.Read(lane(1), big.Event.Partition, FIFO, Pos{Some: true}, 0, 10, 1)
	if err != nil || again.Jobs[0].Event != big.Event && again.Jobs[0].Event.ID == "big" {
		t.Errorf("%+v, %v; want the event that is in memory", again, err)
	}
	for _, job := range append(jobs, again.Jobs...) {
		b.Release(job.Event)
	}
	if n := b.EventBytes(); n != 0 {
		t.Errorf("%d bytes are left", n)
	}
	found := 0
	for p := range uint16(b.Partitions()) {
		for _, sub := range []int{1, 2} {
			r, err := b.Read(lane(sub), p, FIFO, Pos{Some: true}, 0, 10, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			found += len(r.Jobs)
			defer func() {
				for i := range r.Jobs {
					b.Release(r.Jobs[i].Event)
				}
			}()
		}
	}
	if n := b.EventBytes(); found != 3 || n < 100_000 || n > 110_000 {
		t.Errorf("%d jobs, %d bytes held", found, n)
	}
}
