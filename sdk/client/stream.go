package client

import (
	"cmp"
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// ackTimeout is how long a stream may leave an item unanswered before it is taken for dead.
const ackTimeout = 10 * time.Second

// errShortAnswer is what a server earns that does not answer every event of a batch.
var errShortAnswer = &Error{
	Code:    codes.Internal,
	Message: "the server did not answer every event of the batch",
	status:  status.New(codes.Internal, "the server did not answer every event of the batch"),
}

// errAckTimeout ends a stream that went silent; its items are sent again on the next one.
var errAckTimeout = &Error{
	Code:    codes.DeadlineExceeded,
	Message: "no acknowledgement within " + ackTimeout.String(),
	status:  status.New(codes.DeadlineExceeded, "no acknowledgement within "+ackTimeout.String()),
}

// errStreamEnded is a stream that the server ended in order without answering anything.
var errStreamEnded = &Error{
	Code:    codes.Unavailable,
	Message: "the server ended the stream",
	status:  status.New(codes.Unavailable, "the server ended the stream"),
}

// runStream keeps one PublishStream open as long as there are events to send, until the publisher is
// aborted. A stream that ends leaves its unanswered items to the next.
func (p *Publisher) runStream() {
	failures := 0
	for p.awaitQueue() {
		s := &session{p: p, sent: map[uint64]*item{}, changed: make(chan struct{}, 1)}
		err := s.run()
		if p.ctx.Err() != nil {
			return
		}
		if s.progress {
			failures = 0
		}
		if err == nil && s.progress {
			s.requeue()
			continue
		}
		if err == nil {
			err = errStreamEnded
		}
		failures++
		if permanent(err) {
			s.failAll(err)
			continue
		}
		s.giveBack(err)
		if !sleep(p.ctx, backoff(failures)) {
			return
		}
	}
}

// awaitQueue waits until there is something to send; false means that the publisher ends.
func (p *Publisher) awaitQueue() bool {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		p.mu.Lock()
		abandoned, next := p.promote(time.Now())
		ready := len(p.queue) > 0
		p.mu.Unlock()
		p.abandon(abandoned)
		if p.ctx.Err() != nil {
			return false
		}
		if ready {
			return true
		}
		timer.Reset(untilOr(next, time.Hour))
		select {
		case <-p.wake:
		case <-timer.C:
		case <-p.ctx.Done():
			return false
		}
	}
}

func untilOr(t time.Time, otherwise time.Duration) time.Duration {
	if t.IsZero() {
		return otherwise
	}
	return max(time.Until(t), 0)
}

// permanent tells the failures of a stream that would meet the next stream too.
func permanent(err error) bool {
	switch e := FromError(err); e.Code {
	case codes.InvalidArgument, codes.NotFound, codes.PermissionDenied, codes.Unauthenticated,
		codes.FailedPrecondition, codes.Unimplemented, codes.OutOfRange:
		return true
	case codes.ResourceExhausted:
		return !e.Retryable()
	}
	return false
}

// session is one PublishStream from open to end. run sends; a goroutine of its own receives.
type session struct {
	p       *Publisher
	stream  grapnelv1.PublishService_PublishStreamClient
	changed chan struct{} // size 1: acks, window or draining arrived

	mu          sync.Mutex // guards the fields below
	sent        map[uint64]*item
	sentAt      map[uint64]time.Time
	bytes       int
	maxEvents   int
	maxBytes    int
	draining    bool
	progress    bool // an item was answered
	nextInOrder uint64
}

// run returns nil when the server drained the stream in order, else why the stream ended.
func (s *session) run() error {
	ctx, cancel := context.WithCancel(s.p.ctx)
	defer cancel()
	stream, err := s.p.service.PublishStream(ctx)
	if err != nil {
		return err
	}
	s.stream = stream
	s.sentAt = map[uint64]time.Time{}
	if err := stream.Send(openFrame(s.p.parent)); err != nil {
		return s.receiveError(err)
	}
	received := make(chan error, 1) // one value: how receiving ended
	var receiver sync.WaitGroup
	receiver.Go(func() { received <- s.receive() })
	defer receiver.Wait()
	defer cancel() // before the wait, so that it ends
	return s.sendLoop(received)
}

func openFrame(parent string) *grapnelv1.PublishStreamRequest {
	return &grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Open_{
		Open: &grapnelv1.PublishStreamRequest_Open{Parent: parent, ClientId: "grapnel-go/" + Version},
	}}
}

func (s *session) sendLoop(received <-chan error) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	halfClosed := false
	for {
		wait, drained, err := s.sendReady()
		if err == nil && drained && !halfClosed {
			halfClosed = true
			err = s.stream.CloseSend()
		}
		if err != nil {
			// The stream's own error says more than the failed send; receiving ends with it.
			if end := <-received; end != nil {
				return end
			}
			return nil
		}
		timer.Reset(wait)
		select {
		case end := <-received:
			return end
		case <-s.p.wake:
		case <-s.changed:
		case <-timer.C:
			if s.silent() {
				return errAckTimeout
			}
		case <-s.p.ctx.Done():
			return context.Cause(s.p.ctx)
		}
	}
}

// sendReady sends what the window allows and says when to look again.
func (s *session) sendReady() (wait time.Duration, drained bool, err error) {
	for {
		s.p.mu.Lock()
		abandoned, next := s.p.promote(time.Now())
		var it *item
		if len(s.p.queue) > 0 && s.admit(s.p.queue[0]) {
			it = s.p.queue[0]
			s.p.queue[0] = nil
			s.p.queue = s.p.queue[1:]
		}
		s.p.mu.Unlock()
		s.p.abandon(abandoned)
		if it == nil {
			s.mu.Lock()
			drained = s.draining
			s.mu.Unlock()
			return min(untilOr(next, ackTimeout), ackTimeout/4), drained, nil
		}
		sequence := s.record(it)
		if err := s.stream.Send(itemFrame(sequence, it.event)); err != nil {
			return 0, false, err
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
	if s.draining || s.maxEvents == 0 {
		return false
	}
	return len(s.sent) == 0 || (len(s.sent) < s.maxEvents && s.bytes+it.payload <= s.maxBytes)
}

func (s *session) record(it *item) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	it.tries++
	s.nextInOrder++
	s.sent[s.nextInOrder] = it
	s.sentAt[s.nextInOrder] = time.Now()
	s.bytes += it.payload
	return s.nextInOrder
}

// silent reports whether an item has waited for its answer for too long.
func (s *session) silent() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.sentAt {
		if time.Since(at) >= ackTimeout {
			return true
		}
	}
	return false
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
			s.p.settle(it, result, nil)
		}
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
}

func (s *session) accept(frame *grapnelv1.PublishStreamResponse) map[*item]*grapnelv1.PublishResult {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.progress = s.progress || len(frame.GetAcks()) > 0
	if w := frame.GetWindow(); w != nil {
		s.maxEvents = max(int(w.GetMaxOutstandingEvents()), 1)
		s.maxBytes = max(int(w.GetMaxOutstandingBytes()), 1)
	}
	s.draining = s.draining || frame.GetDraining()
	answers := make(map[*item]*grapnelv1.PublishResult, len(frame.GetAcks()))
	for _, ack := range frame.GetAcks() {
		it := s.sent[ack.GetSequence()]
		if it == nil {
			continue
		}
		delete(s.sent, ack.GetSequence())
		delete(s.sentAt, ack.GetSequence())
		s.bytes -= it.payload
		answers[it] = ack.GetResult()
	}
	return answers
}

// receiveError finds why sending failed: gRPC reports it when receiving.
func (s *session) receiveError(sendErr error) error {
	if _, err := s.stream.Recv(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return FromError(sendErr)
}

// unanswered takes the items that were sent and not answered, in order.
func (s *session) unanswered() []*item {
	s.mu.Lock()
	defer s.mu.Unlock()
	items := slices.Collect(maps.Values(s.sent))
	clear(s.sent)
	slices.SortFunc(items, func(a, b *item) int { return cmp.Compare(a.seq, b.seq) })
	return items
}

// requeue puts the unanswered items back without a wait: the stream ended in order.
func (s *session) requeue() {
	items := s.unanswered()
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.p.queue = append(items, s.p.queue...)
}

// giveBack treats the end of the stream as the answer to what it left open, and gives up queued items
// that cannot be sent in time.
func (s *session) giveBack(err error) {
	for _, it := range s.unanswered() {
		s.p.resend(it, err)
	}
	now := time.Now()
	for _, it := range s.takeQueue(func(it *item) bool { return now.After(it.deadline) || it.ctx.Err() != nil && it.tries > 0 }) {
		s.p.resend(it, err)
	}
}

// failAll ends everything that was sent or waits, with the stream's error.
func (s *session) failAll(err error) {
	for _, it := range append(s.unanswered(), s.takeQueue(func(*item) bool { return true })...) {
		s.p.finish(it, nil, err)
	}
}

func (s *session) takeQueue(take func(*item) bool) []*item {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	var taken []*item
	s.p.queue = slices.DeleteFunc(s.p.queue, func(it *item) bool {
		if take(it) {
			taken = append(taken, it)
			return true
		}
		return false
	})
	return taken
}
