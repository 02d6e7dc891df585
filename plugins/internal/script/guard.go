package script

import (
	"context"
	"errors"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// Time is how long one evaluation may take.
	Time = 500 * time.Millisecond
	// lookEvery is how often memory is looked at while something is evaluated, and for how long nobody is suspected.
	lookEvery = 2 * time.Millisecond
	// defaultMemory is what all evaluations may take that the process holds in memory, where no limit is set for it.
	defaultMemory = 256 << 20
)

var (
	errTime   = errors.New("it takes longer than it may")
	errMemory = errors.New("it takes more memory than there is")
)

// Guard bounds evaluations: each in its time, and all together in memory. Nobody can say whose memory is whose, so that
// when there is too much, what has gone on for a while is stopped and done again alone, one after the other: only what is
// too much by itself has failed then. Safe for concurrent use.
type Guard struct {
	// alone is held for reading by evaluations, and for writing by one that is made alone.
	alone sync.RWMutex

	mu      sync.Mutex // guards what follows
	running map[*evaluation]struct{}
	looking bool
}

type evaluation struct {
	began time.Time
	stop  context.CancelCauseFunc
}

// NewGuard makes a Guard. It starts nothing.
func NewGuard() *Guard { return &Guard{running: make(map[*evaluation]struct{})} }

// Do calls f, which must end soon after its context has and may be called twice. The error is f's, or a *plugin.Failure that
// says what was exceeded.
func (g *Guard) Do(ctx context.Context, f func(context.Context) error) error {
	g.alone.RLock()
	err, cause := g.once(ctx, f)
	g.alone.RUnlock()
	if errors.Is(cause, errMemory) {
		g.alone.Lock()
		runtime.GC() // what others have left
		err, cause = g.once(ctx, f)
		g.alone.Unlock()
	}
	switch {
	case errors.Is(cause, errMemory):
		return &plugin.Failure{Source: plugin.SourcePlugin, Code: "memory", Message: "the script takes more memory than one may"}
	case errors.Is(cause, errTime):
		return &plugin.Failure{Source: plugin.SourcePlugin, Code: plugin.CodeTimeout, Message: "the script takes longer than " + Time.String()}
	}
	return err
}

// once returns f's error and, where it was stopped and has not succeeded all the same, why.
func (g *Guard) once(ctx context.Context, f func(context.Context) error) (err, cause error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	late := time.AfterFunc(Time, func() { stop(errTime) })
	defer late.Stop()
	e := &evaluation{began: time.Now(), stop: stop}
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
	much := heap() > allowed()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.looking = len(g.running) > 0; !g.looking {
		return
	}
	if much {
		for e := range g.running {
			if time.Since(e.began) >= lookEvery {
				e.stop(errMemory)
			}
		}
	}
	time.AfterFunc(lookEvery, g.look)
}

// heap is what is in memory, garbage included.
func heap() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// allowed is three quarters of what the process was told to keep to.
func allowed() uint64 {
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 {
		return uint64(limit) / 4 * 3
	}
	return defaultMemory
}
