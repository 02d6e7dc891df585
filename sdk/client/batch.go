package client

import (
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func protoSize(m proto.Message) int { return proto.Size(m) }

// runBatches cuts the queue into batches and sends them, until the publisher is aborted.
func (p *Publisher) runBatches() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		batches, wait := p.cut(time.Now())
		for _, batch := range batches {
			p.wg.Go(func() { p.sendBatch(batch) })
		}
		timer.Reset(wait)
		select {
		case <-p.wakeBatch:
		case <-timer.C:
		case <-p.ctx.Done():
			return
		}
	}
}

// cut takes the batches that may be sent now off the queue, and says when to look again at the latest.
func (p *Publisher) cut(now time.Time) (batches [][]*item, wait time.Duration) {
	p.mu.Lock()
	abandoned, next := p.promote(now)
	for p.inFlight < p.o.BatchesInFlight {
		n, full := p.measure()
		if n == 0 {
			break
		}
		head := p.batch[0]
		fresh := head.tries == 0 && head.company == 0 && head.streams == 0
		if due := head.taken.Add(p.o.BatchDelay); !full && fresh && head.seq > p.flushTo && due.After(now) {
			if next.IsZero() || due.Before(next) {
				next = due
			}
			break
		}
		batches = append(batches, append([]*item(nil), p.batch[:n]...))
		clear(p.batch[:n])
		p.batch = p.batch[n:]
		p.inFlight++
	}
	p.mu.Unlock()
	p.abandon(abandoned)
	if next.IsZero() {
		return batches, time.Hour
	}
	return batches, max(next.Sub(now), 0)
}

// measure says how many events at the head of the queue make one batch, and whether more would not fit.
func (p *Publisher) measure() (n int, full bool) {
	size, most := 0, p.o.BatchEvents
	for n < len(p.batch) {
		it := p.batch[n]
		if it.company > 0 {
			most = min(most, max(it.company, n))
		}
		if size += it.size; n > 0 && (n >= most || size > p.o.BatchBytes) {
			return n, true
		}
		if n++; n >= most || size >= p.o.BatchBytes {
			return n, true
		}
	}
	return n, false
}

func (p *Publisher) sendBatch(batch []*item) {
	request := &grapnelv1.BatchPublishRequest{Parent: p.parent, Events: make([]*grapnelv1.Event, len(batch))}
	for i, it := range batch {
		it.out = true
		request.Events[i] = it.event
	}
	response, err := p.service.BatchPublish(p.ctx, request, once{})
	results := response.GetResults()
	failure := FromError(err)
	if err == nil && len(results) != len(batch) {
		failure = newError(codes.Internal, "the server did not answer every event of the batch")
	}
	p.mu.Lock()
	p.inFlight--
	p.mu.Unlock()
	switch {
	case failure == nil:
		for i, it := range batch {
			p.settle(it, results[i])
		}
	case p.ctx.Err() == nil: // else abort has the last word
		p.failed(batch, failure)
	}
	p.signal()
}

// failed treats the error of a whole call.
func (p *Publisher) failed(batch []*item, e *Error) {
	v := verdictOf(e)
	if len(batch) == 1 || v == deferred || v == refused && aboutAll(e) {
		for _, it := range batch {
			p.refuse(it, e, false)
		}
		return
	}
	// It may be the fault of one of them: the next call of each has half as many.
	for _, it := range batch {
		it.out = false
		it.company = len(batch) / 2
		// What was too large may have been the answer.
		it.unknown = it.unknown || !v.known() || errors.Is(e, ErrMessageTooLarge)
	}
	if v == lost {
		for _, it := range batch {
			p.resend(it, e)
		}
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prepend(batch)
}
