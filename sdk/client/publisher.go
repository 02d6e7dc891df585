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
	"google.golang.org/grpc/codes"
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
	// taken, or the one before it of its OrderingKey had its Result; default 60 s.
	ResendFor time.Duration
	// Stream sends over one PublishStream instead of BatchPublish calls: each event at once, as far as
	// the server's window allows. BatchPublish then takes what streams broke at, and everything while
	// none can be opened.
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

// Publisher publishes many events to one namespace with few round trips. Every event ends in a Result of its
// own: stored, refused, or given up. Events that may yet succeed are sent again with the same ID, so each is
// accepted once. Order is kept among events with one OrderingKey: each is sent when the one before it has its Result,
// stored or not. Of all others it is not.
//
// No event decides for its company: what no server could read is refused before it is sent, and a call that
// fails for one event is repeated with half of the events, until the one is alone.
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
	// Size 1 each: something changed for the goroutine that sends batches, or over the stream.
	wakeBatch, wakeStream chan struct{}
	wg                    sync.WaitGroup
	// scratch has buffers for check.
	scratch sync.Pool

	events, bytes *semaphore.Weighted

	mu       sync.Mutex // guards the fields below
	closing  bool
	nextSeq  uint64
	flushTo  uint64  // events up to this one wait for no full batch
	batch    []*item // to be sent in batches
	stream   []*item // to be sent over the stream
	noStream bool    // the stream is broken: everything goes by batch
	later    []*item // to be sent again when due; few, unordered
	// keys has the ordering keys of which an event is on its way, with those that wait for it.
	keys     map[string][]*item
	open     map[*item]struct{}
	inFlight int // batches
}

// How often an event is tried over streams, and alone in a call that fails oddly, before it is sent in
// batches, and given up.
const (
	maxStreamTries = 2
	maxOddTries    = 4
)

// item is an event on its way. It belongs to the goroutine that took it off a queue.
type item struct {
	event    *grapnelv1.Event
	ctx      context.Context // of Publish: its end stops resending
	size     int             // of the whole message
	payload  int
	seq      uint64
	taken    time.Time
	deadline time.Time
	due      time.Time // when in later
	result   *Result
	weight   int64 // bytes held in the semaphore

	// out is set while a try has no verdict.
	out bool
	// unknown is set when a try may have stored it.
	unknown bool
	// company is how many events its next batch may have at most; 0 is no limit. It halves when a batch fails
	// for what may be the fault of one.
	company int
	// tries count what backs off, streams the tries over streams, odd those that failed oddly alone.
	tries, streams, odd int
	last                error // of the latest try
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

// Result waits for the outcome. It returns the stored event's name, or a *PublishError: why, and whether the
// event may be stored all the same.
func (r *Result) Result() (name string, err error) {
	<-r.done
	return r.name, r.err
}

// Wait is Result for callers with a context: when that ends first, its error is returned, and the event goes
// on being published.
func (r *Result) Wait(ctx context.Context) (name string, err error) {
	select {
	case <-r.done:
		return r.name, r.err
	case <-ctx.Done():
		return "", fmt.Errorf("wait for event %s: %w", r.id, context.Cause(ctx))
	}
}

// Duplicate waits for the outcome and reports whether the event had been accepted before, also by an
// earlier try of this publisher whose answer was lost.
func (r *Result) Duplicate() bool {
	<-r.done
	return r.duplicate
}

// Publisher starts a publisher to a namespace.
func (c *Client) Publisher(namespace string, o PublisherOptions) *Publisher {
	p := &Publisher{
		service:    c.PublishService(),
		parent:     namespaceName(namespace),
		o:          o.withDefaults(),
		closed:     make(chan struct{}),
		wakeBatch:  make(chan struct{}, 1),
		wakeStream: make(chan struct{}, 1),
		open:       map[*item]struct{}{},
		keys:       map[string][]*item{},
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
	p.wg.Go(p.runBatches)
	if p.o.Stream {
		p.wg.Go(p.runStream)
	}
	return p
}

// Publish takes an event and returns at once, or waits for room, as WhenFull says. It never returns
// nil: what goes wrong is in the result. The end of ctx stops waiting for room and sending again; an
// event that was taken is sent at least once all the same. Data, Attributes and Headers must not be changed
// until the result is done.
func (p *Publisher) Publish(ctx context.Context, e Event) *Result {
	return p.PublishProto(ctx, e.proto())
}

// PublishProto is Publish for an event in wire form, which must not be changed until the result is
// done. An empty ID is set.
func (p *Publisher) PublishProto(ctx context.Context, e *grapnelv1.Event) *Result {
	if e.GetId() == "" && e != nil {
		e.Id = NewID()
	}
	r := &Result{id: e.GetId(), done: make(chan struct{})}
	if err := p.check(e); err != nil {
		return r.fail(err, false)
	}
	if ctx.Err() != nil {
		return r.fail(context.Cause(ctx), false)
	}
	it := &item{event: e, ctx: ctx, size: proto.Size(e), payload: payloadSize(e), result: r}
	it.weight = int64(min(it.size, p.o.MaxBytes))
	if err := p.reserve(ctx, it.weight); err != nil {
		return r.fail(err, false)
	}
	p.mu.Lock()
	if p.closing {
		p.mu.Unlock()
		p.release(it)
		return r.fail(ErrClosed, false)
	}
	p.nextSeq++
	it.seq = p.nextSeq
	p.open[it] = struct{}{}
	if key := e.GetOrderingKey(); key != "" {
		others, busy := p.keys[key]
		if busy {
			p.keys[key] = append(others, it)
			p.mu.Unlock()
			return r
		}
		p.keys[key] = nil
	}
	waiting := p.enqueue(it)
	first := waiting == 1 || waiting%p.o.BatchEvents == 0 || p.o.Stream || it.size >= p.o.BatchBytes/8
	p.mu.Unlock()
	if first {
		p.signal()
	}
	return r
}

// enqueue puts an item at the end of its queue and returns how long that is now. The caller holds mu.
func (p *Publisher) enqueue(it *item) int {
	it.taken = time.Now()
	it.deadline = it.taken.Add(p.o.ResendFor)
	if p.streams(it) {
		p.stream = append(p.stream, it)
		return len(p.stream)
	}
	p.batch = append(p.batch, it)
	return len(p.batch)
}

// streams reports whether an item goes over the stream. What has seen two of them break goes in batches,
// whose failures can be told apart. The caller holds mu.
func (p *Publisher) streams(it *item) bool {
	return p.o.Stream && !p.noStream && it.streams < maxStreamTries
}

func (p *Publisher) check(e *grapnelv1.Event) error {
	buffer, _ := p.scratch.Get().(*[]byte)
	if buffer == nil {
		buffer = new([]byte)
	}
	wire, err := check(p.parent, e, *buffer)
	if cap(wire) <= 64<<10 { // large ones are too few to keep memory for
		*buffer = wire[:0]
		p.scratch.Put(buffer)
	}
	if err != nil {
		return err
	}
	return nil
}

func (r *Result) fail(err error, maybe bool) *Result {
	r.err = &PublishError{ID: r.id, MaybeStored: maybe, Err: err}
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
	for _, wake := range []chan struct{}{p.wakeBatch, p.wakeStream} {
		select {
		case wake <- struct{}{}:
		default:
		}
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
	p.open, p.batch, p.stream, p.later, p.keys = map[*item]struct{}{}, nil, nil, nil, map[string][]*item{}
	p.mu.Unlock()
	for it := range left {
		p.release(it)
		it.result.fail(cause, it.unknown || it.out)
	}
	p.forget()
}

// settle records the answer to one event; the caller must not hold mu.
func (p *Publisher) settle(it *item, r *grapnelv1.PublishResult) {
	switch {
	case r.GetError() != nil:
		p.refuse(it, itemError(r.GetError()), r.GetError().GetRetryable())
	case r.GetName() == "":
		p.refuse(it, newError(codes.Internal, "the server's answer says neither that the event is stored nor that it is not"), false)
	default:
		p.finish(it, r, nil)
	}
}

// refuse treats an error about one event that had no company in it. mend says that the server believes the
// same event to have better luck later.
func (p *Publisher) refuse(it *item, e *Error, mend bool) {
	it.out = false
	v := verdictOf(e)
	if v == refused && mend {
		v = deferred
	}
	if !v.known() {
		it.unknown = true
	}
	if errors.Is(e, ErrEventIDConflict) {
		it.unknown = false // what is stored under the ID has another content
	}
	if v == odd {
		it.odd++
	}
	if v == refused || it.odd == maxOddTries {
		p.finish(it, nil, e)
		return
	}
	p.resend(it, e)
}

// resend puts an item aside to be sent again, or gives it up.
func (p *Publisher) resend(it *item, e *Error) {
	it.out = false
	it.last = e
	it.tries++
	it.due = time.Now().Add(max(backoff(it.tries), e.RetryAfter))
	switch {
	case it.ctx.Err() != nil:
		p.finish(it, nil, fmt.Errorf("%w; last try: %w", context.Cause(it.ctx), e))
	case it.due.After(it.deadline):
		p.finish(it, nil, fmt.Errorf("gave up, since another try would come after %s: %w", p.o.ResendFor, e))
	default:
		p.mu.Lock()
		p.later = append(p.later, it)
		p.mu.Unlock()
		p.signal()
	}
}

// finish ends an item; err nil means stored as r says.
func (p *Publisher) finish(it *item, r *grapnelv1.PublishResult, err error) {
	p.mu.Lock()
	_, open := p.open[it]
	delete(p.open, it)
	if open {
		p.passOn(it.event.GetOrderingKey())
	}
	p.mu.Unlock()
	if !open {
		return
	}
	p.release(it)
	if err != nil {
		it.result.fail(err, it.unknown || it.out)
		return
	}
	it.result.name, it.result.duplicate = r.GetName(), r.GetDuplicate()
	close(it.result.done)
}

// passOn has the next event of an ordering key sent. The caller holds mu.
func (p *Publisher) passOn(key string) {
	waiting, busy := p.keys[key]
	switch {
	case !busy:
	case len(waiting) == 0:
		delete(p.keys, key)
	default:
		p.keys[key] = waiting[1:]
		p.enqueue(waiting[0])
		p.signal()
	}
}

// promote moves resends that are due to the front of their queue, and returns those whose sender gave up,
// to be finished without mu. next is when another one is due, zero for none. The caller holds mu.
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
	p.prepend(due)
	return abandoned, next
}

// prepend puts items that were sent before in front of the queues. The caller holds mu.
func (p *Publisher) prepend(items []*item) {
	if len(items) == 0 {
		return
	}
	slices.SortFunc(items, func(a, b *item) int { return cmp.Compare(a.seq, b.seq) })
	var batch, stream []*item
	for _, it := range items {
		if p.streams(it) {
			stream = append(stream, it)
		} else {
			batch = append(batch, it)
		}
	}
	p.batch = append(batch, p.batch...)
	p.stream = append(stream, p.stream...)
	p.signal() // the other goroutine may have found them due
}

func (p *Publisher) abandon(items []*item) {
	for _, it := range items {
		p.finish(it, nil, fmt.Errorf("%w; last try: %w", context.Cause(it.ctx), it.last))
	}
}

// backoff is the wait before try n+1: 100 ms, doubling to 3 s, spread by ±25 % so that publishers that
// failed together do not come back together.
func backoff(tries int) time.Duration {
	d := min(100*time.Millisecond<<min(max(tries-1, 0), 10), 3*time.Second)
	return d*3/4 + rand.N(d/2)
}
