package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// WhenFull says what Publisher.Publish does when the buffer has no room.
type WhenFull int

// Choices of WhenFull.
const (
	// Block waits for room until the event's context ends.
	Block WhenFull = iota
	// Refuse fails the event with ErrBufferFull at once.
	Refuse
)

// PublisherOptions tune a publisher; the zero value is good.
type PublisherOptions struct {
	// A batch is sent when it has this many events (default 100, at most 500) …
	BatchEvents int
	// … or this many bytes (default 1 MiB, at most 3 MiB; a larger event travels alone) …
	BatchBytes int
	// … or when its first event has waited this long (default 10 ms).
	BatchDelay time.Duration
	// Batches in flight at most; default 4.
	BatchesInFlight int
	// Events and their bytes held at most, sent or not; default 1 000 and 16 MiB.
	MaxEvents int
	MaxBytes  int
	// WhenFull is what happens above that.
	WhenFull WhenFull
	// ResendFor is how long an event that may yet succeed is sent again, counted from when it was
	// taken; default 60 s.
	ResendFor time.Duration
	// Stream sends over one PublishStream instead of BatchPublish calls: each event at once, as far as
	// the server's window allows. The Batch fields then have no effect.
	Stream bool
}

func (o PublisherOptions) withDefaults() PublisherOptions {
	o.BatchEvents = min(cmp.Or(max(o.BatchEvents, 0), 100), 500)
	o.BatchBytes = min(cmp.Or(max(o.BatchBytes, 0), 1<<20), 3<<20)
	o.BatchDelay = cmp.Or(max(o.BatchDelay, 0), 10*time.Millisecond)
	o.BatchesInFlight = cmp.Or(max(o.BatchesInFlight, 0), 4)
	o.MaxEvents = cmp.Or(max(o.MaxEvents, 0), 1000)
	o.MaxBytes = cmp.Or(max(o.MaxBytes, 0), 16<<20)
	o.ResendFor = cmp.Or(max(o.ResendFor, 0), time.Minute)
	return o
}

// Publisher publishes many events to one namespace with few round trips. Every event ends in a Result:
// stored, refused, or given up. Events that may yet succeed are sent again with the same ID, so each is
// accepted once. Order is not kept.
//
// It is safe for concurrent use and must be closed; it has goroutines of its own until then.
type Publisher struct {
	service grapnelv1.PublishServiceClient
	parent  string
	o       PublisherOptions
	forget  func()

	ctx    context.Context // ends when the publisher is aborted
	cancel context.CancelCauseFunc
	closed chan struct{} // no event is taken any more
	wake   chan struct{} // size 1: something changed for the sending goroutine
	wg     sync.WaitGroup

	events, bytes *semaphore.Weighted

	mu       sync.Mutex // guards the fields below
	closing  bool
	nextSeq  uint64
	flushTo  uint64 // events up to this one wait for no full batch
	queue    []*item
	later    []*item // to be sent again when due; few, unordered
	open     map[*item]struct{}
	inFlight int // batches
}

// item is an event on its way.
type item struct {
	event    *grapnelv1.Event
	ctx      context.Context // of Publish: its end stops resending
	size     int             // of the whole message
	payload  int
	seq      uint64
	taken    time.Time
	tries    int
	due      time.Time // when in later
	deadline time.Time
	last     error // of the latest try
	result   *Result
	weight   int64 // bytes held in the semaphore
}

// Result is the outcome of one event.
type Result struct {
	id        string
	done      chan struct{}
	name      string
	duplicate bool
	err       error
}

// ID is the event's ID, known at once.
func (r *Result) ID() string { return r.id }

// Done is closed when the outcome is known.
func (r *Result) Done() <-chan struct{} { return r.done }

// Result waits for the outcome. It returns the stored event's name, or why it was not stored: an *Error
// of the server, ErrBufferFull, ErrClosed, or the context's error. After a refusal by the server the
// event is not stored; after giving up it may be.
func (r *Result) Result() (name string, err error) {
	<-r.done
	return r.name, r.err
}

// Duplicate waits for the outcome and reports whether the event had been accepted before, also by an
// earlier try of this publisher whose answer was lost.
func (r *Result) Duplicate() bool {
	<-r.done
	return r.duplicate
}

// Publisher starts a publisher to a namespace, given by its last segment.
func (c *Client) Publisher(namespace string, o PublisherOptions) *Publisher {
	p := &Publisher{
		service: c.PublishService(),
		parent:  namespaceName(namespace),
		o:       o.withDefaults(),
		closed:  make(chan struct{}),
		wake:    make(chan struct{}, 1),
		open:    map[*item]struct{}{},
	}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	p.events = semaphore.NewWeighted(int64(p.o.MaxEvents))
	p.bytes = semaphore.NewWeighted(int64(p.o.MaxBytes))
	p.forget = func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.publishers, p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		p.closing = true
		close(p.closed)
		p.cancel(ErrClosed)
		return p
	}
	c.publishers[p] = struct{}{}
	if p.o.Stream {
		p.wg.Go(p.runStream)
	} else {
		p.wg.Go(p.runBatches)
	}
	return p
}

// Publish takes an event and returns at once, or waits for room, as WhenFull says. It never returns
// nil: what goes wrong is in the result. The end of ctx stops waiting for room and sending again; an
// event that was taken is sent at least once all the same. Data and Attributes must not be changed
// until the result is done.
func (p *Publisher) Publish(ctx context.Context, e Event) *Result {
	return p.PublishProto(ctx, e.proto())
}

// PublishProto is Publish for an event in wire form, which must not be changed until the result is
// done. An empty ID is set.
func (p *Publisher) PublishProto(ctx context.Context, e *grapnelv1.Event) *Result {
	if e.GetId() == "" {
		e.Id = NewID()
	}
	it := &item{event: e, ctx: ctx, size: proto.Size(e), payload: payloadSize(e)}
	it.result = &Result{id: e.GetId(), done: make(chan struct{})}
	it.weight = int64(min(it.size, p.o.MaxBytes))
	if err := p.reserve(ctx, it.weight); err != nil {
		return it.result.fail(err)
	}
	p.mu.Lock()
	if p.closing {
		p.mu.Unlock()
		p.release(it)
		return it.result.fail(ErrClosed)
	}
	p.nextSeq++
	it.seq = p.nextSeq
	it.taken = time.Now()
	it.deadline = it.taken.Add(p.o.ResendFor)
	p.open[it] = struct{}{}
	p.queue = append(p.queue, it)
	first := len(p.queue) == 1 || len(p.queue)%p.o.BatchEvents == 0 || p.o.Stream || it.size >= p.o.BatchBytes/8
	p.mu.Unlock()
	if first {
		p.signal()
	}
	return it.result
}

func (r *Result) fail(err error) *Result {
	r.err = err
	close(r.done)
	return r
}

// reserve takes room for one event of weight bytes.
func (p *Publisher) reserve(ctx context.Context, weight int64) error {
	if p.events.TryAcquire(1) {
		if p.bytes.TryAcquire(weight) {
			return nil
		}
		p.events.Release(1)
	}
	if p.o.WhenFull == Refuse {
		return ErrBufferFull
	}
	// Room may never come once the publisher closes, so that ends the wait too.
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.ctx, cancel)()
	err := p.events.Acquire(wait, 1)
	if err == nil {
		if err = p.bytes.Acquire(wait, weight); err == nil {
			return nil
		}
		p.events.Release(1)
	}
	if ctx.Err() == nil {
		return ErrClosed
	}
	return fmt.Errorf("wait for room in the publisher: %w", context.Cause(ctx))
}

func (p *Publisher) release(it *item) {
	p.bytes.Release(it.weight)
	p.events.Release(1)
}

func (p *Publisher) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Flush sends what waits without waiting for full batches, and returns when every event taken before
// the call has its outcome, or with ctx's error. Outcomes are in the results only.
func (p *Publisher) Flush(ctx context.Context) error {
	p.mu.Lock()
	p.flushTo = p.nextSeq
	waiting := make([]*Result, 0, len(p.open))
	for it := range p.open {
		waiting = append(waiting, it.result)
	}
	p.mu.Unlock()
	p.signal()
	for _, r := range waiting {
		select {
		case <-r.done:
		case <-ctx.Done():
			return fmt.Errorf("flush publisher: %w", context.Cause(ctx))
		}
	}
	return nil
}

// Close takes no more events, flushes, and ends the publisher. When ctx ends first it gives up the
// events that are left, whose results are then ErrClosed, and returns ctx's error. Closing again does
// nothing and returns nil.
func (p *Publisher) Close(ctx context.Context) error {
	p.mu.Lock()
	again := p.closing
	if !again {
		p.closing = true
		close(p.closed)
	}
	p.mu.Unlock()
	if again {
		return nil
	}
	err := p.Flush(ctx)
	p.abort(ErrClosed)
	return err
}

// abort ends the publisher now and returns when its goroutines have.
func (p *Publisher) abort(cause error) {
	p.mu.Lock()
	if !p.closing {
		p.closing = true
		close(p.closed)
	}
	p.mu.Unlock()
	p.cancel(cause)
	p.wg.Wait()
	p.mu.Lock()
	left := p.open
	p.open, p.queue, p.later = map[*item]struct{}{}, nil, nil
	p.mu.Unlock()
	for it := range left {
		p.release(it)
		it.result.fail(cause)
	}
	p.forget()
}

// settle records the answer to one sent item; the caller must not hold mu. err nil means stored.
func (p *Publisher) settle(it *item, r *grapnelv1.PublishResult, err error) {
	if err == nil && r.GetError() != nil {
		e := itemError(r.GetError())
		if !r.GetError().GetRetryable() {
			p.finish(it, r, e)
			return
		}
		err = e
	} else if err != nil && !retryable(err) {
		p.finish(it, r, err)
		return
	}
	if err == nil {
		p.finish(it, r, nil)
		return
	}
	p.resend(it, err)
}

// resend puts an item aside to be sent again, or gives it up.
func (p *Publisher) resend(it *item, err error) {
	it.last = err
	wait := backoff(it.tries)
	if after := FromError(err).RetryAfter; after > wait {
		wait = after
	}
	it.due = time.Now().Add(wait)
	switch {
	case it.ctx.Err() != nil:
		p.finish(it, nil, fmt.Errorf("%w; last try: %w", context.Cause(it.ctx), err))
	case it.due.After(it.deadline):
		p.finish(it, nil, fmt.Errorf("gave up after %s: %w", p.o.ResendFor, err))
	default:
		p.mu.Lock()
		p.later = append(p.later, it)
		p.mu.Unlock()
		p.signal()
	}
}

func (p *Publisher) finish(it *item, r *grapnelv1.PublishResult, err error) {
	p.mu.Lock()
	_, open := p.open[it]
	delete(p.open, it)
	p.mu.Unlock()
	if !open {
		return
	}
	p.release(it)
	it.result.name, it.result.duplicate, it.result.err = r.GetName(), r.GetDuplicate(), err
	close(it.result.done)
}

// promote moves resends that are due, or whose sender gave up, to the front of the queue or to their
// end. It returns when the next one is due, zero for none. The caller holds mu; what has to be finished
// without it is returned.
func (p *Publisher) promote(now time.Time) (abandoned []*item, next time.Time) {
	if len(p.later) == 0 {
		return nil, time.Time{}
	}
	var due []*item
	p.later = slices.DeleteFunc(p.later, func(it *item) bool {
		switch {
		case it.ctx.Err() != nil:
			abandoned = append(abandoned, it)
		case !it.due.After(now):
			due = append(due, it)
		default:
			if next.IsZero() || it.due.Before(next) {
				next = it.due
			}
			return false
		}
		return true
	})
	slices.SortFunc(due, func(a, b *item) int { return cmp.Compare(a.seq, b.seq) })
	p.queue = append(due, p.queue...)
	return abandoned, next
}

func (p *Publisher) abandon(items []*item) {
	for _, it := range items {
		p.finish(it, nil, fmt.Errorf("%w; last try: %w", context.Cause(it.ctx), it.last))
	}
}

func retryable(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Retryable()
}

// backoff is the wait before try n+1: 100 ms, doubling to 3 s, spread by ±25 % so that publishers that
// failed together do not come back together.
func backoff(tries int) time.Duration {
	d := min(100*time.Millisecond<<min(max(tries-1, 0), 10), 3*time.Second)
	return d*3/4 + rand.N(d/2)
}
