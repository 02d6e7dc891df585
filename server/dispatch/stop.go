package dispatch

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

const (
	// upkeepEvery is how often the clock is compared and low-water marks are written.
	upkeepEvery = time.Second
	// lowWaterRounds and evictRounds are how many rounds of upkeep lie between two of theirs.
	lowWaterRounds = 3
	evictRounds    = 60
)

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

	err := e.recoverLanes(ctx)
	var own sync.WaitGroup
	if err == nil {
		own.Go(e.dispatch)
		own.Go(e.wakeLanes)
		own.Go(e.upkeep)
		for range readers {
			own.Go(e.readDisk)
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

// recoverLanes reads where each lane stands. Until it is done, all that is offered is left on disk.
func (e *Engine) recoverLanes(ctx context.Context) error {
	for state, err := range e.journal.Lanes() {
		if err != nil {
			return fmt.Errorf("recover lanes: %w", err)
		}
		if ctx.Err() != nil || e.stopping.Load() {
			return nil
		}
		e.recoverLane(state)
	}
	e.ready.Store(true)
	now := time.Now()
	for _, l := range e.allLanes() {
		l.mu.Lock()
		l.kick(now)
		l.mu.Unlock()
	}
	return nil
}

func (e *Engine) recoverLane(state delivery.LaneState) {
	l := e.lane(state.Lane)
	defer l.mu.Unlock()
	p := l.part(state.Partition)
	if state.From != 0 && (p.from == 0 || state.From < p.from) {
		l.setFrom(p, state.From)
	}
	if !state.NextDue.IsZero() {
		l.lower(p, state.NextDue.UnixNano())
	}
}

// Stop takes no new work and waits for the attempts in flight. When ctx ends first it abandons them: their
// results are no longer taken, and the deliveries are repeated after a restart; Stop then returns an error
// that says how many. Nothing of the engine runs any more when it has returned.
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
	if e.ready.Load() { // before recovery the read positions mean nothing
		for _, l := range e.allLanes() {
			l.setLowWater()
		}
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
	for e.inFlight.Load() > 0 {
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
	e.index.each(func(x *entry) {
		if x.state.CompareAndSwap(inFlight, gone) || x.state.CompareAndSwap(cancelling, gone) {
			n++
		}
	})
	if e.inFlight.Add(int64(-n)) == 0 {
		signal(e.drained)
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

// upkeep writes low-water marks, watches the wall clock and drops lanes that nobody needs.
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
		now := time.Now()
		if d := drift(start, now); d-known > maxDrift || known-d > maxDrift {
			e.log.Warn("wall clock has jumped, timers are read again", "by", d-known)
			known = d
			e.rearmAll(now)
		}
		if round%lowWaterRounds == 0 {
			e.setLowWaters()
		}
		if round%evictRounds == 0 {
			e.evict()
		}
	}
}

func (e *Engine) setLowWaters() {
	e.mu.Lock()
	dirty := e.dirty
	e.dirty = nil
	e.mu.Unlock()
	for _, l := range dirty {
		l.setLowWater()
	}
}

// setLowWater tells the journal below what nothing of the FIFO is pending, where that has changed. What
// is being settled still counts as pending here, so each mark is queued behind the settles below it.
func (l *lane) setLowWater() {
	type mark struct {
		partition uint16
		seq       uint64
	}
	var marks []mark
	l.mu.Lock()
	l.dirty = false
	for _, p := range l.parts {
		if p == nil {
			continue
		}
		if low := p.pendingFrom(); low > p.lowWater {
			p.lowWater = low
			marks = append(marks, mark{p.number, low})
		}
	}
	l.mu.Unlock()
	for _, m := range marks {
		l.e.journal.SetLowWater(l.key, m.partition, m.seq)
	}
}

// pendingFrom is a sequence below which nothing of the FIFO is pending; 0 when that is not known.
func (p *part) pendingFrom() uint64 {
	switch {
	case p.oldest != nil:
		return p.oldest.id.Seq
	case p.from != 0:
		return p.from
	case p.loaded != 0:
		return p.loaded + 1
	}
	return 0
}

// evict drops the idle lanes of subscriptions that are gone.
func (e *Engine) evict() {
	for _, l := range e.allLanes() {
		if e.subs.Subscription(l.key.Namespace, l.key.Subscription) != nil {
			continue
		}
		l.mu.Lock()
		if l.idle() {
			l.evicted = true
			e.mu.Lock()
			delete(e.lanes, l.key)
			e.mu.Unlock()
		}
		l.mu.Unlock()
	}
}

func (l *lane) idle() bool {
	return l.fresh.n+l.retries.n+l.flying.n+l.backlogs+l.cancels == 0 && l.due == 0 &&
		!l.dirty && !l.running && !l.disabling && !l.queuedRead && !l.queued.Load()
}
