package client

import (
	"time"

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
		case <-p.wake:
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
		head := p.queue[0]
		if due := head.taken.Add(p.o.BatchDelay); !full && head.tries == 0 && head.seq > p.flushTo && due.After(now) {
			if next.IsZero() || due.Before(next) {
				next = due
			}
			break
		}
		batches = append(batches, append([]*item(nil), p.queue[:n]...))
		clear(p.queue[:n])
		p.queue = p.queue[n:]
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
	size := 0
	for n < len(p.queue) {
		size += p.queue[n].size
		if n > 0 && size > p.o.BatchBytes {
			return n, true
		}
		n++
		if n == p.o.BatchEvents || size >= p.o.BatchBytes {
			return n, true
		}
	}
	return n, false
}

func (p *Publisher) sendBatch(batch []*item) {
	request := &grapnelv1.BatchPublishRequest{Parent: p.parent, Events: make([]*grapnelv1.Event, len(batch))}
	for i, it := range batch {
		it.tries++
		request.Events[i] = it.event
	}
	response, err := p.service.BatchPublish(p.ctx, request)
	results := response.GetResults()
	if err == nil && len(results) != len(batch) {
		err = errShortAnswer
	}
	p.mu.Lock()
	p.inFlight--
	p.mu.Unlock()
	if p.ctx.Err() == nil {
		for i, it := range batch {
			var r *grapnelv1.PublishResult
			if err == nil {
				r = results[i]
			}
			p.settle(it, r, err)
		}
	}
	p.signal()
}
