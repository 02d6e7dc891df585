package delivery

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"
)

// A publish that meets the end of its lane in one round: either it comes after it and stays open, or it is
// cancelled; it never is both, and what was offered of it ends once.
func TestCancelLaneMeetsAppends(t *testing.T) {
	b := newBench(t, onePartition)
	const n = 40
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { b.Append(context.Background(), []Publication{publication(fmt.Sprint(i), 1)}) })
		wg.Go(func() {
			if _, err := b.CancelLane(context.Background(), lane(1), "deleted", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	b.flush()
	for _, job := range b.jobs() {
		b.succeed(job)
	}
	b.flush()
	waitFor(t, b.Counted)
	if n := b.OpenOf(lane(1)); n != 0 || b.counts.lanes[lane(1)].Load() != 0 {
		t.Errorf("%d open", b.counts.lanes[lane(1)].Load())
	}
	cancelled := 0
	for _, d := range all(t, b, Query{}) {
		if d.State == Cancelled {
			cancelled++
		}
		if attempts, err := b.Attempts(acme, d.ID); err != nil || len(attempts) != 1 {
			t.Errorf("%+v: %v, %v", d, attempts, err)
		}
	}
	edited := 0
	for _, c := range b.calls {
		if c.what == "edited" {
			edited++
		}
	}
	if edited != cancelled {
		t.Errorf("%d were cancelled, and %d are", edited, cancelled)
	}
}

// The same in one commit for certain: the round holds an append and an edit of its lane.
func TestRoundOfAppendAndCancelLane(t *testing.T) {
	log := newHeldLog()
	b := newBench(t, onePartition, log.use)
	log.hold(b)
	var wg sync.WaitGroup
	wg.Go(func() { b.append(publication("e", 1)) })
	p := b.partitions[0]
	waitFor(t, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(p.appends) == 1 })
	wg.Go(func() {
		_ = p.do(context.Background(), func(c *commit) error {
			_, _, err := c.cancelOpen(lane(1), "deleted", &cancelling{})
			return err
		})
	})
	waitFor(t, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(p.edits) == 1 })
	log.release()
	wg.Wait()
	jobs := b.jobs()
	for _, job := range jobs {
		b.succeed(job)
	}
	b.flush()
	got := all(t, b, Query{})
	if len(got) != 1 || len(jobs) != 1 || got[0].State != Succeeded || b.counts.lanes[lane(1)].Load() != 0 {
		t.Errorf("%d offered; %+v; %d open", len(jobs), got[0], b.counts.lanes[lane(1)].Load())
	}
}

// A caller's edit, and two settles of attempts that were under way, in one round: the delivery ends once and leaves
// no row behind.
func TestSettlesOfOneRoundSeeEachOther(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("e", 1))
	stale := b.jobs()[0]
	b.failed(stale, time.Minute)
	b.flush()
	id := stale.ID
	if _, err := b.Retry(t.Context(), lane(1), id, -1); err != nil {
		t.Fatal(err)
	}
	current := b.timers(1, b.clock.now())[0]
	b.failed(stale, time.Hour) // both wait for the same round
	b.succeed(current)
	b.flush()
	if d := b.delivery(id); d.State != Succeeded {
		t.Errorf("%+v", d)
	}
	if got := b.lanes(); len(got) != 0 {
		t.Errorf("it has ended, and still waits: %+v", got)
	}
	if n := b.OpenOf(lane(1)); n != 0 {
		t.Errorf("%d open", n)
	}
	attempts, err := b.Attempts(acme, id)
	if err != nil || len(attempts) != 3 {
		t.Errorf("%d attempts, %v: %+v", len(attempts), err, attempts)
	}
}

// heldLog has a round wait in the log while the next one fills up.
type heldLog struct{ asked, wait, held chan struct{} }

func newHeldLog() *heldLog {
	return &heldLog{asked: make(chan struct{}, 1), wait: make(chan struct{}), held: make(chan struct{})}
}

func (l *heldLog) use(o *Options) {
	o.refuse = func(uint16) bool {
		select {
		case <-l.asked:
			close(l.held)
			<-l.wait
		default:
		}
		return false
	}
}

// hold returns once a round of nothing else is held.
func (l *heldLog) hold(b *bench) {
	l.asked <- struct{}{}
	b.SetFailing(lane(1), b.clock.now())
	<-l.held
}

func (l *heldLog) release() { close(l.wait) }

// A sweep that begins, a retry of what it is about to take, and a cancel of that, all in one round.
func TestRoundOfSweepRetryAndCancel(t *testing.T) {
	log := newHeldLog()
	b := newBench(t, onePartition, log.use)
	b.append(publication("e", 1))
	job := b.jobs()[0]
	b.exhaust(job)
	b.flush()
	b.clock.add(100 * time.Hour)
	log.hold(b)
	var wg sync.WaitGroup
	p := b.partitions[0]
	for i, edit := range []func() error{
		func() error { return b.Retain(context.Background(), keepFor(72*time.Hour)) },
		func() error { _, err := b.Retry(context.Background(), lane(1), job.ID, -1); return err },
		func() error { _, err := b.Cancel(context.Background(), lane(1), job.ID, "x"); return err },
	} {
		wg.Go(func() {
			if err := edit(); err != nil {
				t.Error(err)
			}
		})
		waitFor(t, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(p.edits) == i+1 })
	}
	log.release()
	wg.Wait()
	if got := b.lanes(); len(got) != 0 || b.OpenOf(lane(1)) != 0 {
		t.Errorf("cancelled, and still waits: %+v", got)
	}
}
