package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// publisher sends n events to a namespace in one of the three ways.
type publisher func(ctx context.Context, p *serverProcess, ns string, n, size int) error

const batchSize = 100

// event makes the i-th event of a run. Its ID is set, as SDKs do, so that retries are idempotent.
func event(i int64, body []byte) *grapnelv1.Event {
	return &grapnelv1.Event{
		Id: fmt.Sprintf("bench-%d", i), Type: "bench.event", DataContentType: "application/json",
		Payload: &grapnelv1.Event_Data{Data: body},
	}
}

func unary(callers int) publisher {
	return func(ctx context.Context, p *serverProcess, ns string, n, size int) error {
		client := grapnelv1.NewPublishServiceClient(p.conn)
		body := payload(size, 1, time.Time{})
		var next atomic.Int64
		g, ctx := errgroup.WithContext(ctx)
		for range callers {
			g.Go(func() error {
				for {
					i := next.Add(1)
					if i > int64(n) {
						return nil
					}
					_, err := client.Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/" + ns, Event: event(i, body)})
					if err != nil {
						return err
					}
				}
			})
		}
		return g.Wait()
	}
}

// batch keeps four calls of batchSize events in flight.
func batch(ctx context.Context, p *serverProcess, ns string, n, size int) error {
	return batchOf(event)(ctx, p, ns, n, size)
}

// batchOf is batch with other events.
func batchOf(event func(i int64, body []byte) *grapnelv1.Event) publisher {
	return func(ctx context.Context, p *serverProcess, ns string, n, size int) error {
		return sendBatches(ctx, p, ns, n, size, event)
	}
}

func sendBatches(ctx context.Context, p *serverProcess, ns string, n, size int, event func(i int64, body []byte) *grapnelv1.Event) error {
	client := grapnelv1.NewPublishServiceClient(p.conn)
	body := payload(size, 1, time.Time{})
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range 4 {
		g.Go(func() error {
			for {
				end := next.Add(batchSize)
				begin := end - batchSize
				if begin >= int64(n) {
					return nil
				}
				req := &grapnelv1.BatchPublishRequest{Parent: "namespaces/" + ns}
				for i := begin; i < min(end, int64(n)); i++ {
					req.Events = append(req.Events, event(i, body))
				}
				if err := batchErr(client.BatchPublish(ctx, req)); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// batchErr is the error of a call, or the first of its events'.
func batchErr(resp *grapnelv1.BatchPublishResponse, err error) error {
	if err != nil {
		return err
	}
	for _, r := range resp.GetResults() {
		if r.GetError() != nil {
			return fmt.Errorf("batch item refused: %s: %s", r.GetError().GetReason(), r.GetError().GetMessage())
		}
	}
	return nil
}

// stream sends over one PublishStream, within the server's window.
func stream(ctx context.Context, p *serverProcess, ns string, n, size int) error {
	s, err := grapnelv1.NewPublishServiceClient(p.conn).PublishStream(ctx)
	if err != nil {
		return err
	}
	err = s.Send(&grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Open_{
		Open: &grapnelv1.PublishStreamRequest_Open{Parent: "namespaces/" + ns, ClientId: "grapnel-bench"},
	}})
	if err != nil {
		return err
	}
	first, err := s.Recv()
	if err != nil {
		return err
	}
	var mu sync.Mutex
	room := sync.NewCond(&mu)
	window, outstanding, acked := int(first.GetWindow().GetMaxOutstandingEvents()), 0, 0
	var failure error
	var wg sync.WaitGroup
	wg.Go(func() {
		for acked < n && failure == nil {
			resp, err := s.Recv()
			mu.Lock()
			if w := resp.GetWindow(); w != nil {
				window = int(w.GetMaxOutstandingEvents())
			}
			for _, a := range resp.GetAcks() {
				acked++
				outstanding--
				if e := a.GetResult().GetError(); e != nil {
					err = fmt.Errorf("stream item refused: %s: %s", e.GetReason(), e.GetMessage())
				}
			}
			if err != nil {
				failure = err
			}
			mu.Unlock()
			room.Broadcast()
		}
	})
	body := payload(size, 1, time.Time{})
	for i := range n {
		mu.Lock()
		for outstanding >= window && failure == nil {
			room.Wait()
		}
		outstanding++
		stop := failure != nil
		mu.Unlock()
		if stop {
			break
		}
		err := s.Send(&grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Item_{
			Item: &grapnelv1.PublishStreamRequest_Item{Sequence: uint64(i + 1), Event: event(int64(i), body)},
		}})
		if err != nil {
			break
		}
	}
	_ = s.CloseSend()
	wg.Wait()
	return failure
}
