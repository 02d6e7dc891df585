package delivery

import (
	"bytes"
	"context"
	"flag"
	"fmt"
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
	acked map[string]*Event
	// settled are those whose Flush had returned.
	settled map[string]ID
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
			l := &ledger{acked: map[string]*Event{}, settled: map[string]ID{}}
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
	jobs := make(chan []*Job, 10_000) // more than this load makes; onCommit must not block
	j.Start(func(fresh []*Job) { jobs <- fresh })
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() { l.publish(ctx, j, life, w) })
	}
	wg.Go(func() { l.settle(ctx, j, jobs) })
	crashed := make(chan struct{})
	after := 5 + rng.IntN(60)
	wg.Go(func() { // the plug is pulled after so many acknowledged events of this life
		defer close(crashed)
		for ctx.Err() == nil {
			l.mu.Lock()
			enough := len(l.acked) >= (life+1)*after
			l.mu.Unlock()
			if enough {
				return
			}
			<-time.After(100 * time.Microsecond)
		}
	})
	<-crashed
	percent := []int{0, 0, 30, 70, 100}[rng.IntN(5)]
	// The ledger is read with the disk's state: nothing is acknowledged in between that the clone lacks.
	l.mu.Lock()
	acked, settled := len(l.acked), len(l.settled)
	clone := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})
	before := l.copy()
	l.mu.Unlock()
	cancel()
	wg.Wait()
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("life %d: %d acked, %d settled, %d%% of unsynced data kept", life, acked, settled, percent)
	l.acked, l.settled = before.acked, before.settled
	return clone
}

func (l *ledger) copy() *ledger {
	c := &ledger{acked: map[string]*Event{}, settled: map[string]ID{}}
	for k, v := range l.acked {
		c.acked[k] = v
	}
	for k, v := range l.settled {
		c.settled[k] = v
	}
	return c
}

func (l *ledger) publish(ctx context.Context, j *Journal, life, writer int) {
	for i := 0; ctx.Err() == nil; i++ {
		batch := []*Event{event(fmt.Sprintf("%d-%d-%d", life, writer, i), "a", "b")}
		if i%5 == 0 {
			batch = append(batch, event(fmt.Sprintf("%d-%d-%d+", life, writer, i), "a"))
		}
		for _, r := range j.Append(context.Background(), batch) {
			if r.Err == nil {
				l.mu.Lock()
				l.acked[r.Event.ID] = r.Event
				l.mu.Unlock()
			}
		}
	}
}

func (l *ledger) settle(ctx context.Context, j *Journal, jobs chan []*Job) {
	var unflushed []*Job
	for n := 0; ; {
		var fresh []*Job
		select {
		case <-ctx.Done():
			return
		case fresh = <-jobs:
		}
		for _, job := range fresh {
			step := Step{State: Succeeded}
			if n%3 == 0 {
				step = Step{State: Scheduled, Due: time.Now().Add(time.Minute)}
			}
			j.Settle(job, step, attemptAt(1, OutcomeSucceeded, 200, time.Now()))
			unflushed = append(unflushed, job)
			n++
		}
		if n%7 != 0 {
			continue
		}
		if err := j.Flush(context.Background()); err != nil {
			return
		}
		l.mu.Lock()
		for _, job := range unflushed {
			l.settled[job.ID.String()] = job.ID
		}
		l.mu.Unlock()
		unflushed = nil
	}
}

func crashOptions(fs vfs.FS) Options {
	return Options{Dir: "journal", Partitions: 3, CacheBytes: 1 << 20, BallastBytes: -1, fs: fs}
}

func (l *ledger) check(t *testing.T, fs vfs.FS) {
	j, err := Open(crashOptions(fs))
	if err != nil {
		t.Fatal(err)
	}
	j.Start(func([]*Job) {})
	open := map[ID]bool{}
	for state, err := range j.Lanes() {
		if err != nil {
			t.Fatal(err)
		}
		queued, next, err := j.Backlog(state.Lane, state.Partition, state.From, 1<<20, 1<<30)
		if err != nil || next != 0 {
			t.Fatalf("next %d, %v", next, err)
		}
		timed, _, err := j.Timers(state.Lane, state.Partition, time.Now().Add(time.Hour), 1<<20, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		for _, job := range append(queued, timed...) {
			if open[job.ID] {
				t.Errorf("%s is queued twice", job.ID)
			}
			open[job.ID] = true
		}
	}
	for id, want := range l.acked {
		got, err := j.Event("acme", id)
		if err != nil {
			t.Errorf("acknowledged %s: %v", id, err)
			continue
		}
		if got.UID != want.UID || !bytes.Equal(got.Payload, want.Payload) {
			t.Errorf("%s has changed", id)
		}
		for i := range want.Targets {
			d, err := j.Delivery(ID{want.Seq, want.Partition, uint16(i)})
			if err != nil {
				t.Errorf("delivery %d of %s: %v", i, id, err)
				continue
			}
			if d.State.Final() == open[d.ID] {
				t.Errorf("delivery %d of %s: state %d, queued %v", i, id, d.State, open[d.ID])
			}
		}
	}
	for _, id := range l.settled {
		if d, err := j.Delivery(id); err != nil || d.State == Pending {
			t.Errorf("settle of %s was flushed and is lost: %+v, %v", id, d, err)
		}
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}

// Without a Flush a settle may be lost to a power cut, but only for the promised time.
func TestSettlesAreDurableSoon(t *testing.T) {
	fs := vfs.NewCrashableMem()
	j, err := Open(crashOptions(fs))
	if err != nil {
		t.Fatal(err)
	}
	jobs := make(chan []*Job, 1)
	j.Start(func(fresh []*Job) { jobs <- fresh })
	j.Append(context.Background(), []*Event{event("e", "s")})
	job := (<-jobs)[0]
	start := time.Now()
	j.Settle(job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, time.Now()))
	waitFor(t, func() bool {
		clone := fs.CrashClone(vfs.CrashCloneCfg{})
		again, err := Open(crashOptions(clone))
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		d, err := again.Delivery(job.ID)
		return err == nil && d.State == Succeeded
	})
	// The promise is 100 ms; a loaded machine that runs the whole suite gets more.
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("durable after %v", took)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}
