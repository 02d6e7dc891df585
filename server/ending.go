package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
)

const (
	// stopRest is what a stop may take behind its grace, all together: ending calls and plugins, closing the stores.
	stopRest = 5 * time.Second
	// stopAtOnce is what is left of that once the operator has asked a second time.
	stopAtOnce = time.Second
	// lastMoment is kept of it for what ends because its context has.
	lastMoment = 500 * time.Millisecond
	// callPatience is how long calls in progress are waited for at the most. Ours are shorter; those that only watch, as
	// of health, end when their clients have heard of the stop, or never.
	callPatience = 5 * time.Second
)

// errLeft says that a stop went on without something that did not end. That is then as after a kill.
var errLeft = errors.New("the stop did not wait any longer")

// ending is the one deadline of a stop, which every layer is handed. It is made before the start, since a stop may come
// in the middle of that.
type ending struct {
	// grace is how long attempts and calls in progress are waited for, rest how long anything is. Neither ends before
	// the stop has begun.
	grace, rest       context.Context //nolint:containedctx // handed on
	endGrace, endRest context.CancelFunc
	// abandon cuts the grace short; nil never does.
	abandon <-chan struct{}
	// left is closed a moment after rest has ended: what has not ended by now takes no context.
	left                chan struct{}
	beginning, released chan struct{}
	begun, freed        sync.Once

	mu      sync.Mutex // guards what follows
	started bool
	longest time.Duration // of grace
	stage   string
}

// newEnding makes the deadline of a stop that begins when ctx ends, or by begin. It is to be released.
func newEnding(ctx context.Context, abandon <-chan struct{}) *ending {
	e := &ending{abandon: abandon, left: make(chan struct{}), beginning: make(chan struct{}), released: make(chan struct{})}
	e.grace, e.endGrace = context.WithCancel(context.WithoutCancel(ctx))
	e.rest, e.endRest = context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, e.begin)
	go e.run()
	return e
}

// allow gives a stop that begins from here on a grace. One that comes before, during the start, has nothing to wait for.
func (e *ending) allow(grace time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.started, e.longest = true, grace
}

// allowed reports whether the start had come to its end when the stop began, or did afterwards.
func (e *ending) allowed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.started
}

// begin has the time run, unless it does already.
func (e *ending) begin() { e.begun.Do(func() { close(e.beginning) }) }

// calls has calls in progress end until the grace does. Those that are then still there are cut off.
func (e *ending) calls(g *grpc.Server) {
	ended := make(chan struct{})
	go func() {
		g.GracefulStop()
		close(ended)
	}()
	patience, cancel := context.WithTimeout(e.grace, callPatience)
	defer cancel()
	select {
	case <-ended:
	case <-patience.Done():
	}
	g.Stop()
	select {
	case <-ended:
	case <-e.rest.Done(): // a handler that hangs in a store
	}
}

// release ends all that is about the deadline; there is nothing left to be waited for.
func (e *ending) release() { e.freed.Do(func() { close(e.released) }) }

// at says what is done now, for the error that tells what was left.
func (e *ending) at(stage string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stage = stage
}

func (e *ending) err() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return fmt.Errorf("%w: %s", errLeft, e.stage)
}

func (e *ending) run() {
	select {
	case <-e.beginning:
	case <-e.released:
	}
	e.mu.Lock()
	grace := e.longest
	e.mu.Unlock()
	e.sleep(grace, e.abandon)
	e.endGrace()
	e.sleep(stopRest-stopAtOnce, e.abandon) // not at all, once it is closed
	e.sleep(stopAtOnce-lastMoment, nil)
	e.endRest()
	e.sleep(lastMoment, nil)
	close(e.left)
}

// sleep waits, until it is cut short.
func (e *ending) sleep(d time.Duration, short <-chan struct{}) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-short:
	case <-e.released:
	}
}
