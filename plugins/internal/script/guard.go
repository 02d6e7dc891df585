package script

import (
	"context"
	"errors"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"runtime/pprof"
	"sync"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// Time is how long one evaluation may take.
	Time = 500 * time.Millisecond
	// lookEvery is how often memory is looked at while something is evaluated, and for how long nobody is suspected.
	lookEvery = 2 * time.Millisecond
	// endless is how many looks later an evaluation that was stopped, and has not ended, never will. They count what the
	// process has had of the machine, and not the hours in which it was suspended: 4 s at the least.
	endless = int(4 * time.Second / lookEvery)
	// defaultMemory is what all evaluations may take that the process holds in memory, where no limit is set for it.
	defaultMemory = 256 << 20
	leastMemory   = 64 << 20
)

var (
	errTime   = errors.New("it takes longer than it may")
	errMemory = errors.New("it takes more memory than there is")
)

// Guard bounds evaluations: each in its time, and all together in memory. Nobody can say whose memory is whose, so that
// when there is too much, what has gone on for a while is stopped and done again, one after the other, beside what is quick
// alone: only what is too much by itself has failed then, and nobody else waits for it. An evaluation in a step that nothing
// can stop is the end of the process, whose report names the instance: to go on would cost everybody a processor, and the
// host would end it later without knowing whose doing it is. Safe for concurrent use.
type Guard struct {
	time    time.Duration // Time
	endless int

	// alone has room for the one that is done again.
	alone chan struct{}

	mu      sync.Mutex // guards what follows
	running map[*evaluation]struct{}
	looking bool
}

type evaluation struct {
	ctx   context.Context //nolint:containedctx // it bears the instance's labels
	began time.Time
	stop  context.CancelCauseFunc
	// alone is one that is done again, spared one that was not stopped since others were.
	alone, spared bool
	// since is how many looks have found it going on after it was stopped.
	since int
}

// NewGuard makes a Guard. It starts nothing.
func NewGuard() *Guard {
	return &Guard{time: Time, endless: endless, alone: make(chan struct{}, 1), running: make(map[*evaluation]struct{})}
}

// Do calls f, which must end soon after its context has, else the process does, and may be called twice. ctx is that of a
// plugin.TransformFunc. The error is f's, or a *plugin.Failure that says what was exceeded.
func (g *Guard) Do(ctx context.Context, f func(context.Context) error) error {
	err, cause := g.once(ctx, false, f)
	if errors.Is(cause, errMemory) {
		err, cause = g.again(ctx, f)
	}
	switch {
	case errors.Is(cause, errMemory):
		return &plugin.Failure{Source: plugin.SourcePlugin, Code: "memory", Message: "the script takes more memory than one may"}
	case errors.Is(cause, errTime):
		return &plugin.Failure{Source: plugin.SourcePlugin, Code: plugin.CodeTimeout, Message: "the script takes longer than " + Time.String()}
	}
	return err
}

// again is once in its turn.
func (g *Guard) again(ctx context.Context, f func(context.Context) error) (err, cause error) {
	select {
	case g.alone <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx), nil
	}
	defer func() { <-g.alone }()
	runtime.GC() // what others have left
	return g.once(ctx, true, f)
}

// once returns f's error and, where it was stopped and has not succeeded all the same, why.
func (g *Guard) once(ctx context.Context, alone bool, f func(context.Context) error) (err, cause error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	late := time.AfterFunc(g.time, func() { stop(errTime) })
	defer late.Stop()
	e := &evaluation{ctx: ctx, began: time.Now(), stop: stop, alone: alone}
	g.enter(e)
	defer g.leave(e)
	if err = f(ctx); err != nil {
		cause = context.Cause(ctx)
	}
	return err, cause
}

func (g *Guard) enter(e *evaluation) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running[e] = struct{}{}
	if !g.looking {
		g.looking = true
		time.AfterFunc(lookEvery, g.look)
	}
}

func (g *Guard) leave(e *evaluation) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.running, e)
}

// look goes on for as long as something is evaluated.
func (g *Guard) look() {
	if last := g.stop(heap() > allowed()); last != nil {
		runtime.GC() // what others have left is not its
		if heap() > allowed() {
			last.stop(errMemory)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.looking = len(g.running) > 0; g.looking {
		time.AfterFunc(lookEvery, g.look)
	}
}

// stop stops what has gone on for a while when memory is taken up, but for the one that is done again: that is returned where
// nobody else was stopped, or it has been spared for that before.
func (g *Guard) stop(much bool) (last *evaluation) {
	g.mu.Lock()
	defer g.mu.Unlock()
	others := false
	for e := range g.running {
		switch {
		case e.ctx.Err() != nil:
			if e.since++; e.since == g.endless {
				pprof.SetGoroutineLabels(e.ctx)
				panic("a script is in a step that nothing can stop")
			}
		case !much || time.Since(e.began) < lookEvery:
		case e.alone:
			last = e
		default:
			others = true
			e.stop(errMemory)
		}
	}
	if last != nil && others && !last.spared {
		last.spared = true
		return nil
	}
	return last
}

// heap is what is in memory, garbage included.
func heap() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// allowed is three quarters of what the process was told to keep to, and what a few large events take where that is little.
func allowed() uint64 {
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 {
		return max(leastMemory, uint64(limit)/4*3)
	}
	return defaultMemory
}
