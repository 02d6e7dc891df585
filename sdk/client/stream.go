package client

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// How long a stream may take to open before events go by batch for a while, and how long it may leave an
// event unanswered before it is taken for dead.
const (
	openTimeout = 3 * time.Second
	ackTimeout  = 10 * time.Second
)

// runStream keeps one PublishStream open as long as there are events to send, until the publisher is
// aborted. A stream that ends leaves what it did not answer to the next, and what was on two to batches: a
// stream does not say which of its events broke it.
func (p *Publisher) runStream() {
	failures := 0 // streams in a row that answered nothing
	for p.awaitStream() {
		s := &session{p: p, sent: map[uint64]sentItem{}, changed: make(chan struct{}, 1)}
		err := s.run()
		if p.ctx.Err() != nil {
			return
		}
		if err == nil && s.progress {
			s.requeue()
			continue
		}
		e := FromError(err)
		if err == nil {
			e = newError(codes.Unavailable, "the server ended the stream")
		}
		if !s.opened && verdictOf(e) == refused && aboutAll(e) && e.Reason != "" {
			p.refuseQueue(e) // nothing was sent, and the answer is about the namespace or the caller
		}
		for _, it := range s.unanswered() {
			p.resend(it, e)
		}
		if s.progress {
			failures = 0
			continue
		}
		failures++
		p.divert(true) // nothing waits for the next stream
		if !sleep(p.ctx, backoff(failures)) {
			return
		}
	}
}

// awaitStream waits until there is something to send; false means that the publisher ends.
func (p *Publisher) awaitStream() bool {
	for p.ctx.Err() == nil {
		p.mu.Lock()
		ready := len(p.stream) > 0 || p.noStream && len(p.open) > 0
		p.mu.Unlock()
		if ready {
			return true
		}
		select {
		case <-p.wakeStream:
		case <-p.ctx.Done():
		}
	}
	return false
}

// divert has everything go by batch, or not any more.
func (p *Publisher) divert(on bool) {
	p.mu.Lock()
	changed := p.noStream != on
	p.noStream = on
	if on {
		p.batch = append(p.batch, p.stream...)
		p.stream = nil
	}
	p.mu.Unlock()
	if changed {
		p.signal()
	}
}

// refuseQueue ends what waits for a stream that was refused.
func (p *Publisher) refuseQueue(e *Error) {
	p.mu.Lock()
	waiting := p.stream
	p.stream = nil
	p.mu.Unlock()
	for _, it := range waiting {
		p.finish(it, nil, e)
	}
}

// session is one PublishStream from open to end. run sends; goroutines of its own receive and watch for
// silence.
type session struct {
	p       *Publisher
	stream  grapnelv1.PublishService_PublishStreamClient
	begun   time.Time
	changed chan struct{} // size 1: acks, window or draining arrived

	mu        sync.Mutex // guards the fields below
	sent      map[uint64]sentItem
	sequence  uint64 // of the latest item
	bytes     int
	maxEvents int
	maxBytes  int
	opened    bool // the window has arrived
	draining  bool
	progress  bool // an item was answered
}

type sentItem struct {
	*item
	at time.Time
}

// run returns nil when the server ended the stream in order, else why it ended.
func (s *session) run() error {
	s.begun = time.Now()
	ctx, cancel := context.WithCancelCause(s.p.ctx)
	var others sync.WaitGroup
	defer others.Wait()
	defer cancel(nil) // before the wait, so that they end
	others.Go(func() { s.watch(ctx, cancel) })
	err := s.converse(ctx, &others)
	if silent, ok := errors.AsType[*Error](context.Cause(ctx)); ok {
		return silent
	}
	return err
}

func (s *session) converse(ctx context.Context, others *sync.WaitGroup) error {
	stream, err := s.p.service.PublishStream(ctx)
	if err != nil {
		return err
	}
	s.stream = stream
	// Sending reports io.EOF when the stream has ended; receiving says why.
	if err := stream.Send(openFrame(s.p.parent)); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	received := make(chan error, 1) // one value: how receiving ended
	others.Go(func() { received <- s.receive() })
	return s.sendLoop(ctx, received)
}

func openFrame(parent string) *grapnelv1.PublishStreamRequest {
	return &grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Open_{
		Open: &grapnelv1.PublishStreamRequest_Open{Parent: parent, ClientId: "grapnel-go/" + Version},
	}}
}

// watch ends a stream that does not open or goes silent, also while a send blocks.
func (s *session) watch(ctx context.Context, end context.CancelCauseFunc) {
	ticker := time.NewTicker(openTimeout / 3)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if reason := s.silence(); reason != "" {
				end(newError(codes.DeadlineExceeded, reason))
				return
			}
		}
	}
}

// silence says what has been waited for in vain; empty while there is hope.
func (s *session) silence() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.opened && time.Since(s.begun) >= openTimeout {
		return "no stream within " + openTimeout.String()
	}
	for _, it := range s.sent {
		if time.Since(it.at) >= ackTimeout {
			return "no acknowledgement within " + ackTimeout.String()
		}
	}
	return ""
}

func (s *session) sendLoop(ctx context.Context, received <-chan error) error {
	halfClosed := false
	for {
		drained, err := s.sendReady()
		if err == nil && drained && !halfClosed {
			halfClosed = true
			err = s.stream.CloseSend()
		}
		if err != nil {
			return <-received // it says more than the failed send
		}
		select {
		case end := <-received:
			return end
		case <-s.p.wakeStream:
		case <-s.changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// sendReady sends what the window allows.
func (s *session) sendReady() (drained bool, err error) {
	for {
		s.p.mu.Lock()
		var it *item
		if len(s.p.stream) > 0 && s.admit(s.p.stream[0]) {
			it = s.p.stream[0]
			s.p.stream[0] = nil
			s.p.stream = s.p.stream[1:]
		}
		s.p.mu.Unlock()
		if it == nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.draining, nil
		}
		if err := s.stream.Send(itemFrame(s.record(it), it.event)); err != nil {
			return false, err
		}
	}
}

func itemFrame(sequence uint64, e *grapnelv1.Event) *grapnelv1.PublishStreamRequest {
	return &grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Item_{
		Item: &grapnelv1.PublishStreamRequest_Item{Sequence: sequence, Event: e},
	}}
}

// admit reports whether the window has room. An item above the byte window goes when nothing else is
// out, or it would never go.
func (s *session) admit(it *item) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || !s.opened {
		return false
	}
	return len(s.sent) == 0 || (len(s.sent) < s.maxEvents && s.bytes+it.payload <= s.maxBytes)
}

func (s *session) record(it *item) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	it.out = true
	it.streams++
	s.sequence++
	s.sent[s.sequence] = sentItem{it, time.Now()}
	s.bytes += it.payload
	return s.sequence
}

// receive handles frames until the stream ends; nil means in order.
func (s *session) receive() error {
	for {
		frame, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for it, result := range s.accept(frame) {
			s.p.settle(it, result)
		}
		if frame.GetWindow() != nil {
			s.p.divert(false)
		}
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
}

// accept takes what a frame says. Acks of what was not sent, or was answered before, say nothing.
func (s *session) accept(frame *grapnelv1.PublishStreamResponse) map[*item]*grapnelv1.PublishResult {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := frame.GetWindow(); w != nil {
		s.opened = true
		s.maxEvents = max(int(w.GetMaxOutstandingEvents()), 1)
		s.maxBytes = max(int(w.GetMaxOutstandingBytes()), 1)
	}
	s.draining = s.draining || frame.GetDraining()
	answers := make(map[*item]*grapnelv1.PublishResult, len(frame.GetAcks()))
	for _, ack := range frame.GetAcks() {
		it, found := s.sent[ack.GetSequence()]
		if !found {
			continue
		}
		delete(s.sent, ack.GetSequence())
		s.bytes -= it.payload
		s.progress = true
		answers[it.item] = ack.GetResult()
	}
	return answers
}

// unanswered takes the items that were sent and not answered. They may be stored.
func (s *session) unanswered() []*item {
	s.mu.Lock()
	defer s.mu.Unlock()
	items := make([]*item, 0, len(s.sent))
	for _, it := range s.sent {
		it.out, it.unknown = false, true
		items = append(items, it.item)
	}
	clear(s.sent)
	return items
}

// requeue puts the unanswered items back without a wait: the stream ended in order.
func (s *session) requeue() {
	items := s.unanswered()
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.p.prepend(items)
}
