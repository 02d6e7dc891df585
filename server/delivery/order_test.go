package delivery

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// keyed is an event with an ordering key, for ordered subscriptions.
func keyed(id, key string, subs ...int) Publication {
	p := publication(id, subs...)
	p.Event.OrderingKey = key
	for i := range p.Targets {
		p.Targets[i].Ordered = true
	}
	return p
}

// turn is the event whose delivery to subscription 1 may be attempted, of an ordering key; "" when none may.
func (b *bench) turn(key string) (id string, job Job) {
	b.t.Helper()
	b.flush()
	for _, kind := range []Kind{FIFO, Timer} {
		for _, j := range b.read(lane(1), kind, b.clock.now().Add(1000*time.Hour), 100) {
			if j.Order == orderKeyOf(key) {
				if id != "" {
					b.t.Fatalf("%s and %s have the turn of %s", id, j.Event.ID, key)
				}
				id, job = j.Event.ID, j
			}
		}
	}
	return id, job
}

func (b *bench) wantTurn(key, want string) Job {
	b.t.Helper()
	id, job := b.turn(key)
	if id != want {
		b.t.Fatalf("it is the turn of %q of %s, want %q", id, key, want)
	}
	return job
}

func TestOrderedDeliveriesGoOneAfterAnother(t *testing.T) {
	b := newBench(t)
	plain := keyed("plain", "a", 1)
	plain.Targets[0].Ordered = false
	b.append(keyed("a1", "a", 1), keyed("b1", "b", 1), keyed("a2", "a", 1), plain, keyed("a3", "a", 1))
	var offered []string
	for _, j := range b.jobs() {
		offered = append(offered, j.Event.ID)
	}
	slices.Sort(offered)
	if !slices.Equal(offered, []string{"a1", "b1", "plain"}) {
		t.Fatalf("offered %v", offered)
	}
	if n := b.OpenOf(lane(1)); n != 5 {
		t.Errorf("%d open, want 5", n)
	}
	for _, id := range []string{"a1", "a2"} {
		job := b.wantTurn("a", id)
		b.failed(job, time.Hour) // an attempt that is to be repeated keeps its key
		job = b.wantTurn("a", id)
		if job.Kind != Timer || job.Attempts != 1 {
			t.Errorf("%s is tried again as %+v", id, job)
		}
		b.succeed(job)
	}
	b.reopen()
	b.succeed(b.wantTurn("a", "a3"))
	b.wantTurn("a", "")
	b.wantTurn("b", "b1")
	// The key is free again.
	b.append(keyed("a4", "a", 1))
	b.wantTurn("a", "a4")
}

func TestWaitingDeliverySaysWhatItWaitsFor(t *testing.T) {
	b := newBench(t)
	b.append(keyed("1", "k", 1), keyed("2", "k", 1))
	head := b.wantTurn("k", "1")
	page, err := b.Deliveries(Query{Namespace: acme, Subscription: 1, States: []State{Pending}})
	if err != nil || len(page.Deliveries) != 2 {
		t.Fatalf("%d pending, %v", len(page.Deliveries), err)
	}
	d := page.Deliveries[0]
	if want := "waits for its ordering key: it is the turn of delivery " + head.ID.String(); d.EventID != "2" || d.StateReason != want || !d.WaitsForKey {
		t.Errorf("waits as %+v, want %q", d, want)
	}
	b.settle(head, Step{State: Exhausted, Reason: "enough", Block: true}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
	b.flush()
	if got := b.delivery(d.ID).StateReason; !strings.Contains(got, head.ID.String()+" has failed") {
		t.Errorf("waits for a failed one: %q", got)
	}
	if got := b.delivery(head.ID).StateReason; got != "enough; its ordering key waits until it is retried or cancelled" {
		t.Errorf("blocks: %q", got)
	}
}

func TestFailedDeliverySkipsOrBlocksItsKey(t *testing.T) {
	ctx := context.Background()
	fail := func(b *bench, id string, block bool) Job {
		job := b.wantTurn("k", id)
		b.settle(job, Step{State: Rejected, Reason: "no", Block: block}, attemptAt(job.Attempts+1, OutcomePermanent, 400, b.clock.now()))
		b.flush()
		return job
	}
	start := func(t *testing.T) *bench {
		b := newBench(t)
		for i := range 5 {
			b.append(keyed(fmt.Sprint(i), "k", 1))
		}
		return b
	}
	t.Run("skip", func(t *testing.T) {
		b := start(t)
		first := fail(b, "0", false)
		fail(b, "1", false)
		if got := b.delivery(first.ID).StateReason; got != "no; its ordering key goes on without it" {
			t.Errorf("reason %q", got)
		}
		job := b.wantTurn("k", "2")
		if job.Gap != 2 || b.delivery(job.ID).OrderingGap != 2 {
			t.Errorf("gap %d, want 2", job.Gap)
		}
		b.succeed(job)
		if job := b.wantTurn("k", "3"); job.Gap != 0 {
			t.Errorf("gap %d after a success", job.Gap)
		}
	})
	t.Run("retry", func(t *testing.T) {
		b := start(t)
		job := fail(b, "0", true)
		b.wantTurn("k", "")
		b.reopen()
		b.wantTurn("k", "")
		if _, err := b.Retry(ctx, lane(1), job.ID, -1); err != nil {
			t.Fatal(err)
		}
		b.succeed(b.wantTurn("k", "0"))
		if job := b.wantTurn("k", "1"); job.Gap != 0 {
			t.Errorf("gap %d behind a success", job.Gap)
		}
	})
	t.Run("cancel", func(t *testing.T) {
		b := start(t)
		job := fail(b, "0", true)
		if d, err := b.Cancel(ctx, lane(1), job.ID, "never mind"); err != nil || d.State != Cancelled {
			t.Fatalf("%+v, %v", d, err)
		}
		if job := b.wantTurn("k", "1"); job.Gap != 1 {
			t.Errorf("gap %d, want 1", job.Gap)
		}
		if _, err := b.Cancel(ctx, lane(1), fail(b, "1", false).ID, "x"); !errors.Is(err, ErrFinal) {
			t.Errorf("cancel of one that blocks nothing: %v", err)
		}
	})
	t.Run("unblock", func(t *testing.T) {
		b := start(t)
		job := fail(b, "0", true)
		lanes, err := b.BlockedLanes()
		if err != nil || !slices.Equal(lanes, []LaneKey{lane(1)}) {
			t.Fatalf("blocked lanes %v, %v", lanes, err)
		}
		if n, err := b.Unblock(ctx, lane(1), func() bool { return false }); n != 0 || err != nil {
			t.Errorf("%d unblocked, %v", n, err)
		}
		if n, err := b.Unblock(ctx, lane(1), nil); n != 1 || err != nil {
			t.Errorf("%d unblocked, %v", n, err)
		}
		if got := b.delivery(job.ID).StateReason; got != "no; its ordering key goes on without it" {
			t.Errorf("reason %q", got)
		}
		if job := b.wantTurn("k", "1"); job.Gap != 1 {
			t.Errorf("gap %d, want 1", job.Gap)
		}
	})
	t.Run("cancel lane", func(t *testing.T) {
		b := start(t)
		fail(b, "0", true)
		if n, err := b.CancelLane(ctx, lane(1), "deleted", nil); n != 4 || err != nil {
			t.Fatalf("%d cancelled, %v", n, err)
		}
		b.append(keyed("after", "k", 1))
		b.wantTurn("k", "after")
	})
	t.Run("retention", func(t *testing.T) {
		b := start(t)
		job := fail(b, "0", true)
		b.clock.add(240 * time.Hour)
		for range 2 {
			if err := b.Retain(ctx, Retention{Of: func(NamespaceKey) time.Duration { return 48 * time.Hour }}); err != nil {
				t.Fatal(err)
			}
			b.clock.add(24 * time.Hour)
		}
		if _, err := b.Retry(ctx, lane(1), job.ID, -1); err != nil {
			t.Fatal(err)
		}
		b.succeed(b.wantTurn("k", "0"))
		b.wantTurn("k", "1")
	})
}

// What a caller brings back waits for its turn, and has it before those that were accepted after it.
func TestRetriedDeliveryWaitsForItsTurn(t *testing.T) {
	b := newBench(t)
	for i := range 4 {
		b.append(keyed(fmt.Sprint(i), "k", 1))
	}
	first := b.wantTurn("k", "0")
	b.exhaust(first)
	second := b.wantTurn("k", "1")
	d, err := b.Retry(context.Background(), lane(1), first.ID, -1)
	if err != nil || d.State != Scheduled || !d.WaitsForKey || !strings.Contains(d.StateReason, second.ID.String()) {
		t.Fatalf("retried: %+v, %v", d, err)
	}
	b.succeed(b.wantTurn("k", "1"))
	again := b.wantTurn("k", "0")
	if again.Attempts != 1 || !again.Manual {
		t.Errorf("comes back as %+v", again)
	}
	b.succeed(again)
	b.wantTurn("k", "2")
}

// The time in which attempts may start begins with the turn of a delivery.
func TestMaxAgeCountsFromTheTurn(t *testing.T) {
	b := newBench(t)
	b.append(keyed("0", "k", 1), keyed("1", "k", 1))
	b.clock.add(30 * time.Hour) // max_age is one hour
	b.succeed(b.wantTurn("k", "0"))
	if job := b.wantTurn("k", "1"); !job.Expire.Equal(b.clock.now().Add(time.Hour)) {
		t.Errorf("expires %v, want an hour from %v", job.Expire, b.clock.now())
	}
}

// An event that is to be delivered later holds back those of its key, and one that waits is not delivered early.
func TestDeliverTimeOfOrderedEvents(t *testing.T) {
	b := newBench(t)
	late := func(id string, in time.Duration) Publication {
		p := keyed(id, "k", 1)
		p.Event.DeliverTime = b.clock.now().Add(in)
		return p
	}
	b.append(late("0", time.Hour), keyed("1", "k", 1), late("2", 3*time.Hour))
	if job := b.wantTurn("k", "0"); job.Kind != Timer || job.Due != InstantOf(b.clock.now().Add(time.Hour)) {
		t.Errorf("the first is %+v", job)
	}
	due := InstantOf(b.clock.now().Add(3 * time.Hour))
	b.clock.add(time.Hour)
	b.succeed(b.wantTurn("k", "0"))
	b.succeed(b.wantTurn("k", "1"))
	if job := b.wantTurn("k", "2"); job.Kind != Timer || job.Due != due || !b.delivery(job.ID).NextAttempt.Equal(due.Time()) {
		t.Errorf("the last is %+v", job)
	}
}

// An event id is taken within its ordering key, and the event is found by it all the same.
func TestOrderingKeyTellsEventsApart(t *testing.T) {
	b := newBench(t)
	var uids []string
	for _, key := range []string{"", "a", "b", "c", "d", "e", "f"} {
		r := b.append(keyed("same", key, 1))
		if r[0].Duplicate {
			t.Errorf("with key %q it is a duplicate", key)
		}
		if r := b.append(keyed("same", key, 1)); !r[0].Duplicate {
			t.Errorf("with key %q it is no duplicate of itself", key)
		}
		uids = append(uids, r[0].Event.UID)
		b.clock.add(time.Second)
	}
	check := func() {
		e, err := b.Event(acme, "same")
		if err != nil || e.UID != uids[len(uids)-1] || e.OrderingKey != "f" {
			t.Errorf("latest %+v, %v", e, err)
		}
		if all := all(t, b, Query{Namespace: acme, EventID: "same"}); len(all) != len(uids) {
			t.Errorf("%d deliveries by the id, want %d", len(all), len(uids))
		}
	}
	check()
	b.reopen()
	check()
}

// A key that is blocked costs nothing, however many wait: they are neither offered, nor read, nor found at the start.
func TestBlockedKeyIsNotRead(t *testing.T) {
	b := newBench(t)
	b.append(keyed("head", "k", 1))
	job := b.wantTurn("k", "head")
	b.settle(job, Step{State: Exhausted, Block: true}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
	b.flush()
	for i := range 1000 {
		b.append(keyed(fmt.Sprint(i), "k", 1))
	}
	if jobs := b.jobs(); len(jobs) != 1 { // the head
		t.Errorf("%d were offered", len(jobs))
	}
	b.reopen()
	if lanes := b.lanes(); len(lanes) != 0 {
		t.Errorf("lanes %+v", lanes)
	}
	waitFor(t, b.Counted)
	if n := b.OpenOf(lane(1)); n != 1000 {
		t.Errorf("%d open, want 1000", n)
	}
	b.follower.heard()
	if _, err := b.Cancel(context.Background(), lane(1), job.ID, "x"); err != nil {
		t.Fatal(err)
	}
	if told := b.follower.heard(); !slices.Equal(told, []string{"timed 1"}) {
		t.Errorf("told %v", told)
	}
	if found, err := b.Read(lane(1), job.ID.Partition, FIFO, Pos{Some: true}, 0, 10, 1<<20); err != nil || len(found.Jobs) != 1 || found.Next.Some {
		t.Errorf("read %d rows, next %v, %v", len(found.Jobs), found.Next, err)
	} else {
		b.Release(found.Jobs[0].Event)
	}
}

// Those that have had their turns are not looked for again, however many there were: a key costs what waits of it.
func TestKeyDoesNotLookBack(t *testing.T) {
	var log bytes.Buffer
	b := newBench(t, func(o *Options) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	r := b.append(keyed("0", "k", 1), keyed("1", "k", 1), keyed("2", "k", 1))
	first := b.wantTurn("k", "0")
	// It would be come across, and complained of.
	past := appendBlockedRow(nil, r[0].Event.Partition, lane(1), orderKeyOf("k"), r[0].Event.Seq-1)
	if err := b.db.Set(past, []byte{9}, nil); err != nil {
		t.Fatal(err)
	}
	b.exhaust(first)
	b.succeed(b.wantTurn("k", "1"))
	b.wantTurn("k", "2")
	if log.Len() > 0 {
		t.Errorf("it has looked back: %s", &log)
	}
	// But for one that a caller has brought back.
	if _, err := b.Retry(context.Background(), lane(1), first.ID, -1); err != nil {
		t.Fatal(err)
	}
	b.append(keyed("3", "k", 1))
	b.succeed(b.wantTurn("k", "2"))
	b.succeed(b.wantTurn("k", "0"))
	b.succeed(b.wantTurn("k", "3"))
	b.wantTurn("k", "")
}

// A row that cannot be read does not keep its key waiting, and the check of a stopped journal names it.
func TestDamagedRowLosesItsTurn(t *testing.T) {
	dir := t.TempDir()
	b := newBench(t, func(o *Options) { o.fs, o.Dir, o.MinFreeBytes = nil, dir, -1 })
	r := b.append(keyed("0", "k", 1), keyed("1", "k", 1), keyed("2", "k", 1))
	damaged := appendBlockedRow(nil, r[1].Event.Partition, lane(1), orderKeyOf("k"), r[1].Event.Seq)
	if err := b.db.Set(damaged, []byte{9}, nil); err != nil {
		t.Fatal(err)
	}
	b.succeed(b.wantTurn("k", "0"))
	b.succeed(b.wantTurn("k", "2"))
	b.flush()
	b.close()
	var found []Damage
	sum, err := Inspect(t.Context(), dir, func(d Damage) { found = append(found, d) })
	if err != nil || sum.Open != 1 || len(found) != 1 || !strings.Contains(found[0].What, "ordering key") {
		t.Errorf("%+v, %+v, %v", sum, found, err)
	}
}

// What a replay sends again to an ordered subscription takes its place in the order of its key, behind what is there, and
// has all else that a replayed delivery has.
func TestReplayKeepsOrder(t *testing.T) {
	b := newBench(t)
	for i := range 5 {
		b.append(keyed(fmt.Sprint(i), "k", 1))
		b.exhaust(b.wantTurn("k", fmt.Sprint(i)))
	}
	b.append(keyed("live", "k", 1))
	r := b.replay("again", ReplaySpec{})
	to := deadTo(0)
	pick := to.Delivery
	to.Delivery = func(d *Delivery) (Target, Verdict) {
		target, verdict := pick(d)
		target.Ordered = true
		return target, verdict
	}
	if got := b.advance(r, to, 2); got.Created != 5 {
		t.Fatalf("%+v", got)
	}
	waiting := func() (list []*Delivery) {
		for _, d := range b.all(Query{States: []State{Pending}}) {
			if d.Trigger == ByReplay {
				list = append(list, d)
			}
		}
		return list
	}
	b.clock.add(10 * 24 * time.Hour)
	b.retain(72 * time.Hour) // events that something open is of stay
	b.reopen()
	waitFor(t, b.Counted)
	if n := b.ReplayOpen(acme, r.Key); n != 5 || b.OpenOf(lane(1)) != 6 {
		t.Errorf("%d of %d that are open are the replay's", n, b.OpenOf(lane(1)))
	}
	live := b.wantTurn("k", "live")
	list := waiting()
	if len(list) != 5 {
		t.Fatalf("%d wait", len(list))
	}
	for _, d := range list {
		if !d.WaitsForKey || !strings.Contains(d.StateReason, live.ID.String()) {
			t.Errorf("%+v", d)
		}
		if d.EventID == "2" {
			if _, err := b.Cancel(context.Background(), lane(1), d.ID, "not this one"); err != nil {
				t.Error(err)
			}
		}
	}
	b.succeed(live)
	for _, id := range []string{"0", "1", "3", "4"} {
		job := b.wantTurn("k", id)
		if job.Replay != r.Key || job.Event.Seq == job.ID.Seq {
			t.Errorf("%+v", job)
		}
		if d := b.delivery(job.ID); d.Trigger != ByReplay || d.ReplayJob != "again" || d.WaitsForKey {
			t.Errorf("%+v", d)
		}
		b.failed(job, time.Hour)
		b.succeed(b.wantTurn("k", id))
	}
	b.wantTurn("k", "")
	b.flush()
	if n := b.ReplayOpen(acme, r.Key); n != 0 || b.OpenOf(lane(1)) != 0 {
		t.Errorf("%d of %d that are open are the replay's", n, b.OpenOf(lane(1)))
	}
}

// onTimed is a follower that does something when it is told of a timer.
type onTimed struct {
	*follower
	do func()
}

func (o *onTimed) Timed(c Commit, lane LaneKey, partition uint16, row Row) {
	o.do()
	o.follower.Timed(c, lane, partition, row)
}

// When a key goes on without a delivery, or a dead letter is made of one, a crash does not bring it back: it would succeed
// behind the next of its key, or after the letter that says it has been given up.
func TestWhatFollowsAFailureIsDurableFirst(t *testing.T) {
	letter := &DeadLetter{From: "sub-1", To: Target{Subscription: "sub-9", UID: uid(9), MaxAttempts: 2, MaxAge: time.Hour}}
	for name, c := range map[string]struct {
		events int
		letter *DeadLetter
	}{"next of its key": {2, nil}, "dead letter": {1, letter}} {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewCrashableMem()
			b := newBench(t, onePartition, func(o *Options) { o.fs = fs })
			b.close()
			var crashed atomic.Pointer[vfs.MemFS]
			j, err := Open(b.opts)
			if err != nil {
				t.Fatal(err)
			}
			b.Journal, b.follower = j, &follower{}
			j.Start(&onTimed{b.follower, func() { crashed.CompareAndSwap(nil, fs.CrashClone(vfs.CrashCloneCfg{})) }})
			for i := range c.events {
				b.append(keyed(fmt.Sprint(i), "k", 1))
			}
			first := b.wantTurn("k", "0")
			b.settle(first, Step{State: Exhausted, Reason: "enough", DeadLetter: c.letter}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
			waitFor(t, func() bool { return crashed.Load() != nil })
			b.close()
			b.opts.fs = crashed.Load()
			b.open()
			if d := b.delivery(first.ID); d.State != Exhausted {
				t.Errorf("after a crash it is %+v", d)
			}
		})
	}
}

// Dead letters of one key go to an ordered subscription one after another, in the order in which they were made, also when
// one is made in the very commit that ends the one before it.
func TestDeadLettersKeepOrder(t *testing.T) {
	b := newBench(t, onePartition)
	for i := range 4 {
		b.append(keyed(fmt.Sprint(i), "k", 1))
	}
	give := func(id string) {
		step := Step{State: Exhausted, Reason: "enough", DeadLetter: &DeadLetter{From: "sub-1", To: Target{
			Subscription: "sub-9", UID: uid(9), MaxAttempts: 2, MaxAge: time.Hour, Ordered: true,
		}}}
		b.settle(b.wantTurn("k", id), step, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
	}
	letter := func(id string) Job {
		b.flush()
		jobs := b.timers(9, b.clock.now().Add(time.Hour))
		if len(jobs) != 1 || jobs[0].Event.ID != id || jobs[0].Letter == nil {
			t.Fatalf("the letters that may be attempted are of %v, want %s", ids(jobs), id)
		}
		return jobs[0]
	}
	give("0")
	give("1")
	b.reopen()
	b.succeed(letter("0"))
	last := letter("1")
	give("2")
	b.succeed(last)
	last = letter("2")
	b.succeed(last) // in one round with the next
	give("3")
	b.succeed(letter("3"))
	b.flush()
	if n := b.OpenOf(lane(9)); n != 0 {
		t.Errorf("%d letters are open at the end", n)
	}
}

// A delivery that cannot be read lets go of its key as others do, and does not hold up theirs.
func TestUnblockPassesOverWhatCannotBeRead(t *testing.T) {
	b := newBench(t, onePartition)
	var heads []Job
	keys := []string{"a", "b", "c", "d"}
	for _, k := range keys {
		b.append(keyed(k+"0", k, 1), keyed(k+"1", k, 1))
		job := b.wantTurn(k, k+"0")
		b.settle(job, Step{State: Exhausted, Reason: "no", Block: true}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
		b.flush()
		heads = append(heads, job)
	}
	b.spoil(appendDeliveryKey(nil, 0, dayOf(heads[1].ID.Seq), lane(1), heads[1].ID.Seq))
	if n, err := b.Unblock(context.Background(), lane(1), nil); n != len(keys) || err != nil {
		t.Errorf("%d unblocked, %v", n, err)
	}
	for _, k := range keys {
		b.wantTurn(k, k+"1")
	}
}

// Whoever waits, waits for somebody: a key goes on after a start when its turn, or the delivery that had it, was set aside.
func TestTurnOfNobodyIsPassedOn(t *testing.T) {
	turnOf := func(head Job) []byte { return appendTurn(nil, head.ID.Partition, lane(1), head.Order) }
	rowOf := func(head Job) []byte { return appendRow(nil, head.ID.Partition, lane(1), head.Row()) }
	for name, lost := range map[string]func(b *bench, head Job) [][]byte{
		"both":     func(_ *bench, head Job) [][]byte { return [][]byte{turnOf(head), rowOf(head)} },
		"delivery": func(_ *bench, head Job) [][]byte { return [][]byte{rowOf(head)} },
		"failed one": func(b *bench, head Job) [][]byte {
			b.settle(head, Step{State: Exhausted, Block: true}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
			b.flush()
			return [][]byte{appendDeliveryKey(nil, head.ID.Partition, dayOf(head.ID.Seq), lane(1), head.ID.Seq)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			b := newBench(t, func(o *Options) { o.fs, o.Dir, o.MinFreeBytes = nil, dir, -1 })
			b.append(keyed("0", "k", 1), keyed("1", "k", 1), keyed("2", "k", 1), keyed("x0", "x", 1), keyed("x1", "x", 1))
			keys := lost(b, b.wantTurn("k", "0"))
			b.close()
			for _, key := range keys {
				if err := SetAside(dir, hex.EncodeToString(key), io.Discard); err != nil {
					t.Fatal(err)
				}
			}
			b.open()
			waitFor(t, func() bool { id, _ := b.turn("k"); return id == "1" })
			b.succeed(b.wantTurn("k", "1"))
			b.succeed(b.wantTurn("k", "2"))
			b.wantTurn("k", "")
			b.wantTurn("x", "x0")
		})
	}
}

// What a replay has made waits as other deliveries do, and is no damage.
func TestCheckKnowsReplaysThatWait(t *testing.T) {
	dir := t.TempDir()
	b := newBench(t, func(o *Options) { o.fs, o.Dir, o.MinFreeBytes = nil, dir, -1 })
	b.append(keyed("0", "k", 1))
	b.exhaust(b.wantTurn("k", "0"))
	b.append(keyed("1", "k", 1))
	pick := deadTo(0)
	was := pick.Delivery
	pick.Delivery = func(d *Delivery) (Target, Verdict) {
		to, verdict := was(d)
		to.Ordered = true
		return to, verdict
	}
	b.flush()
	if got := b.advance(b.replay("again", ReplaySpec{}), pick, 2); got.Created != 1 {
		t.Fatalf("%+v", got)
	}
	b.close()
	sum, err := Inspect(t.Context(), dir, func(d Damage) { t.Errorf("%+v", d) })
	if err != nil || sum.Open != 2 {
		t.Errorf("%+v, %v", sum, err)
	}
	b.open()
}
