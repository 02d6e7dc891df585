package api

import (
	"errors"
	"io"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
)

// Limits of a publish stream.
const (
	windowEvents = 1000
	windowBytes  = 8 << 20
	// streamAppends is how many groups of events may be on their way to the disk at a time: enough that the
	// next group forms while the last one is being synced.
	streamAppends = 4
	groupEvents   = 256
	groupBytes    = 1 << 20
	maxAcks       = 256
)

// PublishStream accepts events until the caller half-closes. The first frame of either side sets the stream
// up; then every item is answered once. An ack means durable. Whatever ends the stream, items that were read
// are answered first, but for a frame of more than maxWire, at which grpc ends it. An item that cannot be read is refused
// alone. Over the window the server stops reading and flow control holds the caller back.
func (s publishService) PublishStream(stream grpc.BidiStreamingServer[grapnelv1.PublishStreamRequest, grapnelv1.PublishStreamResponse]) error {
	ns, err := s.openStream(stream)
	if err != nil {
		return err
	}
	if !s.edge.streamsOf.enter(ns) {
		return s.edge.streamsOf.refusal(ns, "publish streams")
	}
	defer s.edge.streamsOf.leave(ns)
	p := &publishing{service: s, ns: ns, stream: stream}
	p.room.L, p.ready.L = &p.mu, &p.mu
	var sender, watcher sync.WaitGroup
	over := make(chan struct{})
	watcher.Go(func() {
		old := s.old(stream.Context())
		defer old.Stop()
		select {
		case <-s.draining:
			p.drain()
		case <-old.C:
			p.drain()
		case <-over:
		}
	})
	sender.Go(p.send)
	p.read()
	sender.Wait()
	close(over)
	watcher.Wait()
	p.appends.Wait()
	return p.err
}

// firstFrame waits for the first frame, but not for ever: who opens a stream and says nothing holds room that others
// need. Its end ends the read, too.
func (s publishService) firstFrame(stream grpc.BidiStreamingServer[grapnelv1.PublishStreamRequest, grapnelv1.PublishStreamResponse]) (*grapnelv1.PublishStreamRequest, error) {
	type result struct {
		frame *grapnelv1.PublishStreamRequest
		err   error
	}
	read := make(chan result, 1)
	go func() {
		frame, err := stream.Recv()
		read <- result{frame, err}
	}()
	late := time.NewTimer(s.FirstFrame)
	defer late.Stop()
	select {
	case r := <-read:
		return r.frame, r.err
	case <-late.C:
		return nil, abandoned(codes.DeadlineExceeded, "the first frame, open, did not come within "+s.FirstFrame.String(), nil)
	}
}

// openStream reads the first frame.
func (s publishService) openStream(stream grpc.BidiStreamingServer[grapnelv1.PublishStreamRequest, grapnelv1.PublishStreamResponse]) (string, error) {
	first, err := s.firstFrame(stream)
	switch {
	case errors.Is(err, io.EOF):
		return "", invalid(Violation{"open", "must be the first frame; the stream ended without one", "open"})
	case err != nil:
		return "", fromReceive(err)
	case len(first.ProtoReflect().GetUnknown())+len(first.GetOpen().ProtoReflect().GetUnknown()) > 0:
		return "", invalid(unknownInFrame(first))
	case first.GetOpen() == nil:
		return "", invalid(Violation{"open", "must be the first frame", "open"})
	}
	ns, err := parseNamespace("open.parent", first.GetOpen().GetParent())
	if err != nil {
		return "", err
	}
	if id := first.GetOpen().GetClientId(); !isText(id, 128, true) {
		return "", invalid(Violation{"open.client_id", "must be at most 128 printable characters", "text"})
	}
	err = s.Ingest.Refusal(ns)
	if _, full := errors.AsType[*ingest.QuotaError](err); full {
		err = nil // told per event: it may pass while the stream lives
	}
	if err != nil {
		return "", toStatus(err, first.GetOpen().GetParent())
	}
	return ns, nil
}

// publishing is one open stream: the handler's goroutine reads, one sends, and up to streamAppends publish
// groups of what has been read.
type publishing struct {
	service publishService
	ns      string
	stream  grpc.BidiStreamingServer[grapnelv1.PublishStreamRequest, grapnelv1.PublishStreamResponse]
	// last is the sequence read last; the reader's own.
	last uint64
	// appends counts the goroutines that publish.
	appends sync.WaitGroup
	// err is why the stream ends; set by the reader before it ends.
	err error

	mu sync.Mutex
	// room wakes the reader, ready the sender.
	room, ready sync.Cond
	// arrived are items read and not yet being published.
	arrived []streamItem
	// answered are acks not yet sent, and the bytes that each gives back to the window.
	answered []*grapnelv1.PublishStreamResponse_Ack
	freed    []int
	// outstanding counts items read whose acks are not yet sent.
	outstanding, bytes int
	publishers         int
	draining, ended    bool
	// broken is set when nothing can be sent any more.
	broken bool
}

type streamItem struct {
	sequence uint64
	event    *delivery.Event
}

// read takes frames until the caller ends the stream or breaks its rules.
func (p *publishing) read() {
	var err error
	for p.waitForRoom() {
		var frame *grapnelv1.PublishStreamRequest
		frame, err = p.stream.Recv()
		if bad, ok := errors.AsType[*badFrame](err); ok && bad.item > p.last {
			p.last = bad.item
			p.refuse(bad.item, bad.refusal)
			err = nil
			continue
		}
		if err != nil {
			break
		}
		if err = p.take(frame); err != nil {
			break
		}
	}
	if refusal, ok := errors.AsType[*Error](err); ok {
		p.err = refusal
	} else if err != nil && !errors.Is(err, io.EOF) {
		p.err = fromReceive(err)
	}
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	p.ready.Signal()
}

// waitForRoom returns when the window has room for another item; false when the stream is dead.
func (p *publishing) waitForRoom() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.broken && (p.outstanding >= windowEvents || p.bytes >= windowBytes) {
		p.room.Wait()
	}
	return !p.broken
}

// take checks one frame. An error is a broken rule of the stream and ends it; an event that is not right is
// only refused.
func (p *publishing) take(frame *grapnelv1.PublishStreamRequest) error {
	item := frame.GetItem()
	switch {
	case len(frame.ProtoReflect().GetUnknown()) > 0:
		return invalid(unknownInFrame(frame))
	case frame.GetOpen() != nil:
		return invalid(Violation{"open", "is for the first frame only", "open"})
	case item == nil:
		return invalid(Violation{"item", "is required in every frame after the first", "required"})
	case item.GetSequence() <= p.last:
		return invalid(Violation{"item.sequence", "must rise with every item: " + strconv.FormatUint(item.GetSequence(), 10) +
			" came after " + strconv.FormatUint(p.last, 10), "sequence"})
	}
	p.last = item.GetSequence()
	ev, faults := publishedOf(p.ns, item.GetEvent(), time.Now())
	if item.GetEvent() != nil && item.GetEvent().GetId() == "" {
		faults = append(faults, Violation{"id", "is required in a stream: what was not acknowledged is sent again with the same id", "required"})
	}
	faults = under("event", faults)
	if len(item.ProtoReflect().GetUnknown()) > 0 {
		faults = append(faults, Violation{"item", unknownField(item.ProtoReflect()), "unknown_field"})
	}
	if len(faults) > 0 {
		p.refuse(item.GetSequence(), invalid(faults...))
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outstanding++
	p.bytes += len(ev.Payload)
	p.arrived = append(p.arrived, streamItem{item.GetSequence(), ev})
	if p.publishers < streamAppends {
		p.publishers++
		p.appends.Go(p.publish)
	}
	return nil
}

// unknownInFrame refuses a stream for a field that this server does not know, outside of any item.
func unknownInFrame(frame *grapnelv1.PublishStreamRequest) Violation {
	if m := frame.ProtoReflect(); len(m.GetUnknown()) > 0 {
		return Violation{"", unknownField(m), "unknown_field"}
	}
	return Violation{"open", unknownField(frame.GetOpen().ProtoReflect()), "unknown_field"}
}

// refuse answers an item that is not published.
func (p *publishing) refuse(sequence uint64, refusal *Error) {
	p.mu.Lock()
	p.outstanding++
	p.mu.Unlock()
	p.answer(ack(sequence, &grapnelv1.PublishResult{Error: refusal.item()}), 0)
}

// publish publishes groups until nothing has arrived.
func (p *publishing) publish() {
	for {
		group := p.group()
		if group == nil {
			return
		}
		for k, result := range p.publishGroup(group) {
			p.answer(ack(group[k].sequence, result), len(group[k].event.Payload))
		}
	}
}

// group takes what has arrived, within bounds; with nothing there the publisher is over.
func (p *publishing) group() []streamItem {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, size := 0, 0
	for n < len(p.arrived) && n < groupEvents && (n == 0 || size < groupBytes) {
		size += len(p.arrived[n].event.Payload)
		n++
	}
	if n == 0 {
		p.publishers--
		return nil
	}
	group := p.arrived[:n:n]
	if n == len(p.arrived) {
		p.arrived = nil
	} else {
		p.arrived = p.arrived[n:]
	}
	return group
}

// publishGroup publishes and recovers: this goroutine is outside of the interceptor's protection.
func (p *publishing) publishGroup(group []streamItem) (results []*grapnelv1.PublishResult) {
	results = make([]*grapnelv1.PublishResult, len(group))
	defer func() {
		if v := recover(); v != nil {
			fault := panicked(v, debug.Stack())
			p.service.log.Error("publish stream", "namespace", p.ns, "err", fault.cause)
			for k := range results {
				results[k] = &grapnelv1.PublishResult{Error: fault.item()}
			}
		}
	}()
	events := make([]*delivery.Event, len(group))
	for k := range group {
		events[k] = group[k].event
	}
	for k, r := range p.service.Ingest.Publish(p.stream.Context(), p.ns, events) {
		results[k] = publishResult(p.ns, events[k], r)
		if e := results[k].GetError(); e.GetField() != "" {
			e.Field = "event." + e.Field
		}
	}
	return results
}

func ack(sequence uint64, result *grapnelv1.PublishResult) *grapnelv1.PublishStreamResponse_Ack {
	return &grapnelv1.PublishStreamResponse_Ack{Sequence: sequence, Result: result}
}

// answer queues an ack.
func (p *publishing) answer(a *grapnelv1.PublishStreamResponse_Ack, size int) {
	p.mu.Lock()
	p.answered = append(p.answered, a)
	p.freed = append(p.freed, size)
	p.mu.Unlock()
	p.ready.Signal()
}

func (p *publishing) drain() {
	p.mu.Lock()
	p.draining = true
	p.mu.Unlock()
	p.ready.Signal()
}

// send writes frames until every item is answered after the reader has ended. What is ready goes at once:
// acks gather while the frame before them is being written.
func (p *publishing) send() {
	frame := &grapnelv1.PublishStreamResponse{Window: &grapnelv1.PublishStreamResponse_Window{
		MaxOutstandingEvents: windowEvents,
		MaxOutstandingBytes:  windowBytes,
	}}
	told := false
	for frame != nil {
		if p.stream.Send(frame) != nil {
			p.breakOff()
			return
		}
		frame = p.next(&told)
	}
}

// next waits for something to send; nil when everything has been. told remembers the draining frame.
func (p *publishing) next(told *bool) *grapnelv1.PublishStreamResponse {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.answered) == 0 && (*told || !p.draining) {
		if p.ended && p.outstanding == 0 {
			return nil
		}
		p.ready.Wait()
	}
	frame := &grapnelv1.PublishStreamResponse{}
	if p.draining && !*told {
		frame.Draining, *told = true, true
	}
	n := min(len(p.answered), maxAcks)
	frame.Acks = p.answered[:n:n]
	p.outstanding -= n
	for _, size := range p.freed[:n] {
		p.bytes -= size
	}
	if n == len(p.answered) {
		p.answered, p.freed = nil, p.freed[:0]
	} else {
		p.answered, p.freed = p.answered[n:], p.freed[n:]
	}
	p.room.Signal()
	return frame
}

// breakOff wakes the reader of a stream that cannot be written to.
func (p *publishing) breakOff() {
	p.mu.Lock()
	p.broken = true
	p.mu.Unlock()
	p.room.Signal()
}
