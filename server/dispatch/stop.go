package dispatch

import (
	"context"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/window"
)

const (
	// upkeepEvery is how often the clock is compared.
	upkeepEvery = time.Second
	// tidyRounds is how many rounds of upkeep lie between two in which old statistics and healths go.
	tidyRounds = 60
)

// phase says how a partition stands.
type phase uint8

const (
	recovering phase = iota // what is offered is left on disk
	started
	dropped // nothing of it is known, and what is told of it is ignored
)

// phase of a partition: those that were not stopped stand as the engine does.
func (e *Engine) phase(partition uint16) phase {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if p, ok := e.partitions[partition]; ok {
		return p
	}
	if e.ready.Load() {
		return started
	}
	return recovering
}

func (e *Engine) setPhase(partition uint16, p phase) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.partitions[partition] = p
}

// StartPartition recovers a partition that was stopped, while others run. It does not wait for its work. With an error
// the partition is stopped again.
func (e *Engine) StartPartition(partition uint16) error {
	e.setPhase(partition, recovering)
	err := e.recoverLanes(e.taking, e.journal.LanesOf(partition))
	if err != nil {
		e.StopPartition(partition)
		return err
	}
	e.setPhase(partition, started)
	e.kickAll()
	return nil
}

// StopPartition gives up all that is in memory of a partition, while others run. Attempts in flight are abandoned: their
// results are not taken. The journal tells nothing more of it until StartPartition, or is not listened to. It may be
// called before Run, for partitions that are not to be started with all others.
func (e *Engine) StopPartition(partition uint16) {
	e.setPhase(partition, dropped)
	for _, l := range e.allLanes() {
		l.mu.Lock()
		l.drop(partition)
		l.kick(e.now())
		l.mu.Unlock()
	}
}

func (l *lane) drop(partition uint16) {
	for _, x := range l.held {
		if x.ID.Partition != partition {
			continue
		}
		switch x.stage {
		case window.Waiting:
			l.queueOf(x).remove(x)
		case window.Flying:
			if x.travels() {
				l.leave(x)
				break
			}
			l.land(x)
			l.returned(x)
			l.e.release()
		}
		l.forget(x)
	}
	if i, ok := l.partAt(partition); ok {
		l.parts[i].Window = window.Window{}
		l.tidy(partition)
	}
}

// Run recovers the lanes from the journal, then dispatches until Stop, which it waits for. When ctx ends
// it stops by itself and abandons what is in flight. It may be called once.
func (e *Engine) Run(ctx context.Context) error {
	e.mu.Lock()
	if e.running != nil || e.stops {
		e.mu.Unlock()
		return ErrStopped
	}
	e.running = make(chan struct{})
	e.mu.Unlock()

	err := e.recover(ctx)
	var own sync.WaitGroup
	if err == nil {
		own.Go(e.dispatch)
		own.Go(e.wakeLanes)
		own.Go(e.upkeep)
		own.Go(e.unblock)
		for range readers {
			own.Go(e.readDisk)
		}
		for range gravediggers {
			own.Go(e.bury)
		}
		select {
		case <-ctx.Done():
		case <-e.stopped:
		}
	}
	e.refuse()
	own.Wait()
	close(e.running)
	if err != nil || ctx.Err() != nil {
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		_ = e.Stop(ended) // what it abandons is repeated after a restart
	}
	<-e.finished
	return err
}

// recover reads where each lane stands. Until it is done, all that is offered is left on disk.
func (e *Engine) recover(ctx context.Context) error {
	failing, err := e.journal.Failing()
	if err != nil {
		return fmt.Errorf("recover since when targets have been failing: %w", err)
	}
	for key, since := range failing {
		e.recoverFailing(key, since)
	}
	if err := e.recoverLanes(ctx, e.journal.Lanes()); err != nil {
		return err
	}
	if e.stopping.Load() {
		return nil
	}
	if err := e.recoverBlocked(); err != nil {
		return err
	}
	e.ready.Store(true)
	e.kickAll()
	return nil
}

func (e *Engine) recoverFailing(key delivery.LaneKey, since time.Time) {
	if l := e.find(key); l != nil {
		l.health.Failed(since)
		l.reclass()
		l.mu.Unlock()
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	h := e.healths[key]
	h.Failed(since)
	e.healths[key] = h
}

func (e *Engine) recoverLanes(ctx context.Context, states iter.Seq2[delivery.LaneState, error]) error {
	for state, err := range states {
		if err != nil {
			return fmt.Errorf("recover lanes: %w", err)
		}
		if ctx.Err() != nil || e.stopping.Load() {
			return nil
		}
		if e.phase(state.Partition) == dropped {
			continue
		}
		l := e.lane(state.Lane)
		l.window(state.Partition).Found(state.FIFO, state.Timer)
		l.mu.Unlock()
	}
	return nil
}

func (e *Engine) kickAll() {
	now := e.now()
	for _, l := range e.allLanes() {
		l.mu.Lock()
		l.kick(now)
		l.mu.Unlock()
	}
}

// Stop takes no new work and waits for the attempts in flight. When ctx ends first it abandons them: their
// results are no longer taken, and the deliveries are repeated after a restart; Stop then returns an error
// that says how many. Nothing of the engine runs any more when it has returned, but what the journal tells it.
func (e *Engine) Stop(ctx context.Context) error {
	e.refuse()
	e.mu.Lock()
	first := !e.stops
	e.stops = true
	running := e.running
	e.mu.Unlock()
	if !first {
		<-e.finished
		return nil
	}
	defer close(e.finished)
	err := e.drain(ctx)
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	release := context.AfterFunc(ctx, e.endWork)
	e.aside.Wait()
	release()
	e.endWork()
	if running != nil {
		<-running
	}
	return err
}

// refuse is the first step of stopping.
func (e *Engine) refuse() {
	e.stopping.Store(true)
	e.endTaking()
}

// drain waits for the attempts in flight, and abandons them when ctx ends.
func (e *Engine) drain(ctx context.Context) error {
	done := ctx.Done()
	abandoned := 0
	for e.slots.used.Load() > 0 {
		select {
		case <-e.drained:
		case <-done:
			// What is being settled right now is still waited for, which takes no time.
			abandoned, done = e.abandon(), nil
		}
	}
	if abandoned > 0 {
		return fmt.Errorf("%d attempts in flight were abandoned: %w", abandoned, context.Cause(ctx))
	}
	return nil
}

// abandon gives the attempts in flight up, so that their ends are not taken.
func (e *Engine) abandon() int {
	n := 0
	for _, l := range e.allLanes() {
		l.mu.Lock()
		for _, q := range []*queue{&l.flying, &l.strays} {
			for x := q.head; x != nil; x = q.head {
				l.land(x)
				x.gone = true
				e.release()
				if n++; x.carries() {
					n += len(x.parcel.all) - 1
				}
			}
		}
		l.mu.Unlock()
	}
	return n
}

// background runs f beside Run and has Stop wait for it. It reports false once that is too late.
func (e *Engine) background(ctx context.Context, f func(context.Context)) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.aside.Go(func() { f(ctx) })
	return true
}

// upkeep watches the wall clock, and drops what is old.
func (e *Engine) upkeep() {
	tick := time.NewTicker(upkeepEvery)
	defer tick.Stop()
	start := time.Now()
	var known time.Duration
	for round := 1; ; round++ {
		select {
		case <-e.stopped:
			return
		case <-tick.C:
		}
		if d := drift(start, time.Now()); d-known > maxDrift || known-d > maxDrift {
			e.log.Warn("wall clock has jumped; what is due goes by the clock that has not", "by", d-known)
			known = d
		}
		e.feed() // room may come from events that others held
		if round%tidyRounds == 0 {
			now := e.now()
			e.statistics.tidy(now)
			e.tidyHealths(now)
		}
	}
}

func (e *Engine) tidyHealths(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for key, h := range e.healths {
		if h.Worthless(now) {
			delete(e.healths, key)
		}
	}
}
