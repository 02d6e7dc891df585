package delivery

import (
	"bytes"
	"context"
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
}

// The power goes at any moment: what was acknowledged is there when the journal is opened again, whatever part
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
			l := &ledger{acked: map[string]Publication{}, settled: map[ID]bool{}}
			for life := range 3 {
				fs = l.live(t, fs, rng, life)
			}
			l.check(t, fs)
		})
	}
}

// live runs a journal under load, pulls the plug at a random point and returns what is left on the disk.
func (l *ledger) live(t *testing.T, fs *vfs.MemFS, rng *rand.Rand, life int) *vfs.MemFS {
	j, err := Open(crashOptions(fs))
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
	acked, settled := maps.Clone(l.acked), maps.Clone(l.settled)
	l.mu.Unlock()
	cancel()
	wg.Wait()
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("life %d: %d acked, %d settled, %d%% of unsynced data kept", life, len(acked), len(settled), percent)
	l.acked, l.settled = acked, settled
	return clone
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
			}
			j.Settle(&job, step, attemptAt(1, OutcomeSucceeded, 200, time.Now()), nil)
			unflushed = append(unflushed, job.ID)
			n++
		}
		if err := j.Flush(context.Background()); err != nil {
			return
		}
		l.mu.Lock()
		for _, id := range unflushed {
			l.settled[id] = true
		}
		l.mu.Unlock()
		unflushed = nil
	}
}

func crashOptions(fs vfs.FS) Options {
	return Options{Dir: "journal", Partitions: 3, CacheBytes: 1 << 20, BallastBytes: -1, fs: fs}
}

func (l *ledger) check(t *testing.T, fs vfs.FS) {
	b := &bench{t: t, opts: crashOptions(fs)}
	b.open()
	defer b.close()
	open := map[ID]bool{}
	for _, sub := range []int{1, 2} {
		for _, job := range append(b.backlog(sub), b.timers(sub, time.Now().Add(time.Hour))...) {
			if open[job.ID] {
				t.Errorf("%s is queued twice", job.ID)
			}
			open[job.ID] = true
		}
	}
	for id, pub := range l.acked {
		want := pub.Event
		got, err := b.Event(acme, id)
		if err != nil {
			t.Errorf("acknowledged %s: %v", id, err)
			continue
		}
		if got.UID != want.UID || !bytes.Equal(got.Payload, want.Payload) {
			t.Errorf("%s has changed", id)
		}
		for _, target := range pub.Targets {
			d, err := b.Delivery(acme, ID{want.Seq, want.Partition, target.UID.SubscriptionKey()})
			if err != nil {
				t.Errorf("%s of %s: %v", target.Subscription, id, err)
				continue
			}
			if d.State.Final() == open[d.ID] {
				t.Errorf("%s of %s: state %d, queued %v", target.Subscription, id, d.State, open[d.ID])
			}
		}
	}
	for id := range l.settled {
		if d, err := b.Delivery(acme, id); err != nil || d.State == Pending {
			t.Errorf("settle of %s was flushed and is lost: %+v, %v", id, d, err)
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
			func() error { _, err := b.CancelLane(ctx, lane(2), "x"); return err },
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
