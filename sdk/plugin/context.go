package plugin

import (
	"context"
	"slices"
	"sync"
	"time"
)

// attemptContext is the context of one attempt on the stream. It is part of the task, has no timer of its own,
// and makes its channel only for those who ask: the standard library's costs as much as all the rest of a batched
// attempt. The stream's watch calls expire; whoever asks Err after the deadline need not wait for that.
type attemptContext struct {
	deadline time.Time // zero: none
	// of is the attempt, nil for none.
	of *attempt

	mu   sync.Mutex // guards what follows
	err  error
	done chan struct{} // nil until asked for
	// after is what contexts derived from this one want to be called at the end.
	after []*func()
}

// Deadline implements context.Context.
func (c *attemptContext) Deadline() (time.Time, bool) { return c.deadline, !c.deadline.IsZero() }

// Value implements context.Context: there is none but the trace.
func (c *attemptContext) Value(key any) any {
	if _, ok := key.(traceKey); ok && c.of != nil {
		return [2]string{c.of.traceparent, c.of.tracestate}
	}
	return nil
}

// traceKey is the key of a context's traceparent and tracestate.
type traceKey struct{}

func withTrace(ctx context.Context, parent, state string) context.Context {
	if parent == "" {
		return ctx
	}
	return context.WithValue(ctx, traceKey{}, [2]string{parent, state})
}

// TraceContext is the traceparent and tracestate (W3C Trace Context) of what is done under a context that an AttemptFunc or a
// TransformFunc was given, for a plugin that makes spans of its own; empty where there is none. With OpenTelemetry:
//
//	parent, state := plugin.TraceContext(ctx)
//	ctx = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": parent, "tracestate": state})
func TraceContext(ctx context.Context) (traceparent, tracestate string) {
	trace, _ := ctx.Value(traceKey{}).([2]string)
	return trace[0], trace[1]
}

// Err implements context.Context.
func (c *attemptContext) Err() error {
	c.mu.Lock()
	err := c.err
	c.mu.Unlock()
	if err == nil && c.expired(time.Now()) {
		return c.end(context.DeadlineExceeded)
	}
	return err
}

// Done implements context.Context.
func (c *attemptContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.err != nil {
			close(c.done)
		}
	}
	return c.done
}

// AfterFunc spares contexts that are derived from this one a goroutine each; package context looks for it.
func (c *attemptContext) AfterFunc(f func()) func() bool {
	entry := &f
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		go f()
		return func() bool { return false }
	}
	c.after = append(c.after, entry)
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		i := slices.Index(c.after, entry)
		if i >= 0 {
			c.after = slices.Delete(c.after, i, i+1)
		}
		return i >= 0
	}
}

func (c *attemptContext) expired(now time.Time) bool {
	return !c.deadline.IsZero() && !now.Before(c.deadline)
}

// end ends it with err, unless it has ended already, and returns what it ended with.
func (c *attemptContext) end(err error) error {
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	c.err = err
	if c.done != nil {
		close(c.done)
	}
	after := c.after
	c.after = nil
	c.mu.Unlock()
	for _, f := range after {
		go (*f)()
	}
	return err
}
