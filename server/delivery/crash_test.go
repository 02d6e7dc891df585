package delivery

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

//nolint:gochecknoglobals // a test flag
var crashSeeds = flag.Int("crash.seeds", 100, "simulated power losses")

// ledger is what callers of a journal were promised before the power went.
type ledger struct {
	mu    sync.Mutex
	acked map[string]Publication
	// settled are those whose Flush had returned.
	settled map[ID]bool
	// ending are those whose end was asked for, answered or not, and that were not opened again since; cancelled those
	// of them that were cancelled with an answer, reopened those that were opened again.
	ending, cancelled, reopened map[ID]bool
	// swept says that sweeps of retention have been begun: what has ended may be gone.
	swept bool
}

// copy is the ledger at one moment. l.mu is held.
func (l *ledger) copy() *ledger {
	return &ledger{
		acked: maps.Clone(l.acked), settled: maps.Clone(l.settled), ending: maps.Clone(l.ending), cancelled: maps.Clone(l.cancelled),
		reopened: maps.Clone(l.reopened), swept: l.swept,
	}
}

// The power goes at any moment, while events are published, settled, cancelled and retried and history is swept, and the
// clock is another one after each: what was acknowledged is there when the journal is opened again, whatever part
// of the unsynced data reached the disk, and no repair is needed.
func TestPowerLossLosesNothingAcknowledged(t *testing.T) {
	seeds := *crashSeeds
	if testing.Short() {
		seeds = min(seeds, 20)
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(uint64(seed), 7))
			fs := vfs.NewCrashableMem()
			l := &ledger{
				acked: map[string]Publication{}, settled: map[ID]bool{}, ending: map[ID]bool{}, cancelled: map[ID]bool{}, reopened: map[ID]bool{},
			}
			for life := range 3 {
				l, fs = l.live(t, fs, rng, life)
			}
			l.check(t, fs, rng)
		})
	}
}

// wrongClock is options whose clock is right or off by an hour or five years.
func wrongClock(t *testing.T, o Options, rng *rand.Rand) Options {
	const hour, years = time.Hour, 5 * 365 * day
	off := []time.Duration{0, hour, -hour, years, -years}[rng.IntN(5)]
	t.Logf("the clock is off by %v", off)
	o.now = func() time.Time { return time.Now().Add(off) }
	return o
}

// live runs a journal under load, pulls the plug at a random point and returns what was promised by then and what is left on
// the disk.
func (l *ledger) live(t *testing.T, fs *vfs.MemFS, rng *rand.Rand, life int) (*ledger, *vfs.MemFS) {
	j, err := Open(wrongClock(t, crashOptions(fs), rng))
	if err != nil {
		t.Fatalf("life %d: %v", life, err)
	}
	f := &follower{}
	j.Start(f)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() { l.publish(ctx, j, life, w) })
	}
	wg.Go(func() { l.settle(ctx, j, f) })
	edits := rand.New(rand.NewPCG(rng.Uint64(), 1))
	wg.Go(func() { l.edit(ctx, j, edits) })
	wg.Go(func() { l.sweep(ctx, j) })
	after := 5 + rng.IntN(60)
	waitFor(t, func() bool { // the plug is pulled after so many acknowledged events of this life
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.acked) >= (life+1)*after
	})
	percent := []int{0, 0, 30, 70, 100}[rng.IntN(5)]
	// The ledger is read with the disk's state: nothing is acknowledged in between that the clone lacks.
	l.mu.Lock()
	clone := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})
	promised := l.copy()
	l.mu.Unlock()
	cancel()
	wg.Wait()
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("life %d: %d acked, %d settled, %d cancelled, %d reopened, %d%% of unsynced data kept", life,
		len(promised.acked), len(promised.settled), len(promised.cancelled), len(promised.reopened), percent)
	return promised, clone
}

// edit cancels deliveries in any state, and opens again what has been settled.
func (l *ledger) edit(ctx context.Context, j *Journal, rng *rand.Rand) {
	for ctx.Err() == nil {
		id, settled := l.any(rng)
		lane := lane(int(id.Subscription))
		switch {
		case id.Seq == 0:
			_ = sleep(ctx, time.Millisecond)
		case settled && rng.IntN(2) == 0:
			l.note(func() { delete(l.cancelled, id) })
			if _, err := j.Retry(context.Background(), lane, id, -1); err == nil {
				l.note(func() {
					l.reopened[id] = true
					delete(l.ending, id)
				})
			}
		default:
			l.note(func() { l.ending[id] = true })
			if _, err := j.Cancel(context.Background(), lane, id, "x"); err == nil {
				l.note(func() {
					l.cancelled[id] = true
					delete(l.reopened, id)
				})
			}
		}
	}
}

// any is one of the deliveries, and whether it was settled; it has no sequence while there are none.
func (l *ledger) any(rng *rand.Rand) (ID, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, pub := range l.acked { // in no order
		target := pub.Targets[rng.IntN(len(pub.Targets))]
		id := ID{pub.Event.Seq, pub.Event.Partition, target.UID.SubscriptionKey()}
		return id, l.settled[id]
	}
	return ID{}, false
}

func (l *ledger) note(what func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	what()
}

// sweep erases what has ended, however young, again and again.
func (l *ledger) sweep(ctx context.Context, j *Journal) {
	for sleep(ctx, time.Millisecond) == nil {
		l.note(func() { l.swept = true })
		_ = j.Retain(ctx, keepFor(time.Millisecond))
	}
}

func (l *ledger) publish(ctx context.Context, j *Journal, life, writer int) {
	for i := 0; ctx.Err() == nil; i++ {
		batch := []Publication{publication(fmt.Sprintf("%d-%d-%d", life, writer, i), 1, 2)}
		if i%5 == 0 {
			batch = append(batch, publication(fmt.Sprintf("%d-%d-%d+", life, writer, i), 1))
		}
		for k, r := range j.Append(context.Background(), batch) {
			if r.Err == nil {
				l.mu.Lock()
				l.acked[r.Event.ID] = batch[k]
				l.mu.Unlock()
			}
		}
	}
}

func (l *ledger) settle(ctx context.Context, j *Journal, f *follower) {
	var unflushed []ID
	for n := 0; ctx.Err() == nil; {
		for _, job := range f.jobs() {
			step := Step{State: Succeeded}
			if n%3 == 0 {
				step = Step{State: Scheduled, Due: time.Now().Add(time.Minute)}
			} else {
				l.note(func() { l.ending[job.ID] = true })
			}
			j.Settle(&job, step, attemptAt(1, OutcomeSucceeded, 200, time.Now()), nil)
			unflushed = append(unflushed, job.ID)
			n++
		}
		if err := j.Flush(context.Background()); err != nil {
			return
		}
		l.note(func() {
			for _, id := range unflushed {
				l.settled[id] = true
			}
		})
		unflushed = nil
	}
}

func crashOptions(fs vfs.FS) Options {
	return Options{Dir: "journal", Partitions: 3, CacheBytes: 1 << 20, BallastBytes: -1, fs: fs}
}

func (l *ledger) check(t *testing.T, fs vfs.FS, rng *rand.Rand) {
	b := &bench{t: t, opts: wrongClock(t, crashOptions(fs), rng)}
	b.open()
	defer b.close()
	open := map[ID]bool{}
	for _, sub := range []int{1, 2} {
		for _, job := range append(b.backlog(sub), b.timers(sub, time.Now().Add(20*365*day))...) {
			if open[job.ID] {
				t.Errorf("%s is queued twice", job.ID)
			}
			open[job.ID] = true
		}
	}
	for id, pub := range l.acked {
		want := pub.Event
		erasable := l.swept
		for _, target := range pub.Targets {
			erasable = erasable && l.ending[ID{want.Seq, want.Partition, target.UID.SubscriptionKey()}]
		}
		got, err := b.EventByUID(acme, want.UID)
		if errors.Is(err, ErrNotFound) && erasable {
			continue
		}
		if err != nil {
			t.Errorf("acknowledged %s: %v", id, err)
			continue
		}
		if got.ID != id || !bytes.Equal(got.Payload, want.Payload) {
			t.Errorf("%s has changed", id)
		}
		for _, target := range pub.Targets {
			at := ID{want.Seq, want.Partition, target.UID.SubscriptionKey()}
			d, err := b.Delivery(acme, at)
			if errors.Is(err, ErrNotFound) && l.swept && l.ending[at] {
				continue
			}
			if err != nil {
				t.Errorf("%s of %s: %v", target.Subscription, id, err)
				continue
			}
			if d.State.Final() == open[d.ID] {
				t.Errorf("%s of %s: state %d, queued %v", target.Subscription, id, d.State, open[d.ID])
			}
			switch {
			case l.cancelled[at] && !d.State.Final():
				t.Errorf("%s of %s: was cancelled and is %d", target.Subscription, id, d.State)
			case l.reopened[at] && !l.ending[at] && d.State.Final():
				t.Errorf("%s of %s: was opened again and is %d", target.Subscription, id, d.State)
			case l.settled[at] && d.State == Pending:
				t.Errorf("settle of %s was flushed and is lost: %+v", id, d)
			}
		}
	}
	waitFor(t, b.Counted)
	if n := b.OpenIn(acme); n != int64(len(open)) {
		t.Errorf("%d open, %d queued", n, len(open))
	}
}

// Without a Flush a settle may be lost to a power cut, but only for the promised time.
func TestSettlesAreDurableSoon(t *testing.T) {
	fs := vfs.NewCrashableMem()
	j, err := Open(crashOptions(fs))
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{}
	j.Start(f)
	j.Append(context.Background(), []Publication{publication("e", 1)})
	job := f.jobs()[0]
	start := time.Now()
	j.Settle(&job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, time.Now()), nil)
	j.SetFailing(lane(1), start)
	waitFor(t, func() bool {
		clone := fs.CrashClone(vfs.CrashCloneCfg{})
		again, err := Open(crashOptions(clone))
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		d, err := again.Delivery(acme, job.ID)
		failing, ferr := again.Failing()
		return err == nil && d.State == Succeeded && ferr == nil && len(failing) == 1
	})
	// The promise is 100 ms; a loaded machine that runs the whole suite gets more.
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("durable after %v", took)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}

// An edit is durable when it returns.
func TestEditsAreDurableAtOnce(t *testing.T) {
	fs := vfs.NewCrashableMem()
	b := newBench(t, func(o *Options) { o.fs = fs })
	b.append(publication("a", 1), publication("b", 1), publication("c", 2), publication("d", 1))
	jobs := map[string]Job{}
	for _, job := range b.jobs() {
		jobs[job.Event.ID] = job
	}
	beside := publication("a", 1)
	beside.Event.Namespace = other
	b.append(beside)
	b.exhaust(jobs["b"])
	b.flush()
	ctx := t.Context()
	for _, edit := range []struct {
		make func() error
		want func(*bench) bool
	}{
		{
			func() error { _, err := b.Cancel(ctx, lane(1), jobs["a"].ID, "x"); return err },
			func(b *bench) bool { return b.delivery(jobs["a"].ID).State == Cancelled },
		},
		{
			func() error { _, err := b.Retry(ctx, lane(1), jobs["b"].ID, -1); return err },
			func(b *bench) bool { return b.delivery(jobs["b"].ID).State == Scheduled },
		},
		{
			func() error { _, err := b.CancelLane(ctx, lane(2), "x", nil); return err },
			func(b *bench) bool { return b.delivery(jobs["c"].ID).State == Cancelled },
		},
		{
			func() error { return b.DropNamespace(ctx, other) },
			func(b *bench) bool { return len(all(b.t, b, Query{Namespace: other})) == 0 },
		},
	} {
		if err := edit.make(); err != nil {
			t.Fatal(err)
		}
		after := &bench{t: t, clock: b.clock, opts: b.opts}
		after.opts.fs = fs.CrashClone(vfs.CrashCloneCfg{})
		after.open()
		if !edit.want(after) {
			t.Error("an edit is lost")
		}
		after.close()
	}
}
