package plugin

import (
	"context"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// closeLimit is how long one instance may take to give back what it holds.
const closeLimit = 5 * time.Second

// OnClose has close called at the end of the instance that is being built, for what it holds: connections,
// files, goroutines, messages not yet flushed. It is called once, in a goroutine of its own, when the host has
// removed the instance and the last attempt with it has ended; at once when build returns an error, or was
// called for a check alone; and for all instances that are left when the process ends, after its attempts have
// ended or their time was up. Several are called one after the other, the last given first. ctx ends after 5 s,
// or when the process has to go; what goes on then is left to itself. A killed process calls nothing.
//
// An instance is replaced by a new one at each change of its subscription or secrets, so what is not closed here
// piles up. On a Target that was not given by the kit it does nothing.
func (t Target) OnClose(close func(ctx context.Context)) {
	if t.life != nil && t.life.of.hold() {
		t.life.mu.Lock()
		t.life.closers = append(t.life.closers, close)
		t.life.mu.Unlock()
	}
}

// lives is what the instances of a process have in common: what is to be called at their ends, and waited for.
type lives struct {
	ctx    context.Context //nolint:containedctx // the time that closing has
	cancel context.CancelFunc
	// failed is told of a close that panics.
	failed func(stack []byte)

	mu    sync.Mutex // guards what follows
	ended bool
	// held is what is still to be closed.
	held sync.WaitGroup
}

func newLives(failed func(stack []byte)) *lives {
	l := &lives{failed: failed}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

func (l *lives) begin() *life { return &life{of: l} }

// hold counts one more to be closed; not once the process ends.
func (l *lives) hold() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.held.Add(1)
	}
	return !l.ended
}

// end waits, until ctx ends, for all that is held, whose instances have been retired.
func (l *lives) end(ctx context.Context) {
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	stop := context.AfterFunc(ctx, l.cancel)
	defer stop()
	done := make(chan struct{})
	go func() {
		l.held.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// retired is added to a life's users when no more may come.
const retired = 1 << 62

// life counts who is at work with an instance, so that it is closed once, when it is retired and nobody is.
type life struct {
	of    *lives
	users atomic.Int64
	once  sync.Once

	mu      sync.Mutex // guards what follows
	closers []func(context.Context)
}

// enter reports whether the instance may be used; then leave must follow.
func (l *life) enter() bool {
	if l.users.Add(1) < retired {
		return true
	}
	l.leave()
	return false
}

func (l *life) leave() {
	if l.users.Add(-1) == retired {
		l.once.Do(l.close)
	}
}

// retire lets nobody else in. It may be called more than once.
func (l *life) retire() {
	if l.users.Or(retired)|retired == retired {
		l.once.Do(l.close)
	}
}

func (l *life) close() {
	l.mu.Lock()
	closers := l.closers
	l.closers = nil
	l.mu.Unlock()
	if len(closers) == 0 {
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(l.of.ctx, closeLimit)
		defer cancel()
		for i := len(closers) - 1; i >= 0; i-- {
			l.run(ctx, closers[i])
		}
	}()
}

func (l *life) run(ctx context.Context, closer func(context.Context)) {
	defer l.of.held.Done()
	defer func() {
		if recover() != nil {
			l.of.failed(debug.Stack())
		}
	}()
	closer(ctx)
}
