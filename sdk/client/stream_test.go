package client_test

import (
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func window(events, bytes int32) *grapnelv1.PublishStreamResponse {
	return &grapnelv1.PublishStreamResponse{Window: &grapnelv1.PublishStreamResponse_Window{
		MaxOutstandingEvents: events, MaxOutstandingBytes: bytes}}
}

func ack(sequence uint64, r *grapnelv1.PublishResult) *grapnelv1.PublishStreamResponse {
	return &grapnelv1.PublishStreamResponse{Acks: []*grapnelv1.PublishStreamResponse_Ack{{Sequence: sequence, Result: r}}}
}

// open reads the first frame and sends the window.
func open(s publishStream, events, bytes int32) error {
	first, err := s.Recv()
	if err != nil {
		return err
	}
	if first.GetOpen().GetParent() != "namespaces/acme" {
		return fmt.Errorf("first frame = %v", first)
	}
	return s.Send(window(events, bytes))
}

// answer acknowledges everything until the client half-closes.
func answer(f *fake, s publishStream) error {
	for {
		frame, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(ack(frame.GetItem().GetSequence(), f.store(frame.GetItem().GetEvent()))); err != nil {
			return err
		}
	}
}

func TestStreamPublisherStoresEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		f.stream = func(_ int, s publishStream) error {
			if err := open(s, 100, 1<<20); err != nil {
				return err
			}
			return answer(f, s)
		}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{Stream: true})
		for i := range 500 {
			p.Publish(t.Context(), event(i))
		}
		if err := p.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if calls, events := f.count(); calls != 1 || events != 500 {
			t.Errorf("%d events over %d streams, want 500 over 1", events, calls)
		}
	})
}

func TestStreamPublisherObeysTheWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		received := make(chan *grapnelv1.PublishStreamRequest_Item, 100)
		proceed := make(chan struct{})
		f.stream = func(_ int, s publishStream) error {
			if err := open(s, 3, 1<<20); err != nil {
				return err
			}
			for range 3 {
				frame, err := s.Recv()
				if err != nil {
					return err
				}
				received <- frame.GetItem()
			}
			<-proceed
			if err := s.Send(window(100, 5)); err != nil { // now bytes are what is scarce
				return err
			}
			for sequence := uint64(1); sequence <= 3; sequence++ {
				if err := s.Send(ack(sequence, &grapnelv1.PublishResult{Name: "n"})); err != nil {
					return err
				}
			}
			return answer(f, s)
		}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{Stream: true})
		for i := range 10 {
			p.Publish(t.Context(), event(i))
		}
		synctest.Wait()
		if len(received) != 3 {
			t.Errorf("%d items sent into a window of 3", len(received))
		}
		close(proceed)
		if err := p.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		if _, events := f.count(); events != 7 {
			t.Errorf("%d further events stored, want 7", events)
		}
		_ = p.Close(t.Context())
	})
}

func TestStreamPublisherDrainsAndReconnects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		f.stream = func(call int, s publishStream) error {
			if err := open(s, 100, 1<<20); err != nil {
				return err
			}
			if call > 1 {
				return answer(f, s)
			}
			first, err := s.Recv()
			if err != nil {
				return err
			}
			if err := s.Send(&grapnelv1.PublishStreamResponse{Draining: true}); err != nil {
				return err
			}
			if err := s.Send(ack(first.GetItem().GetSequence(), f.store(first.GetItem().GetEvent()))); err != nil {
				return err
			}
			return answer(f, s) // until the client half-closes
		}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{Stream: true})
		if _, err := wait(t, p.Publish(t.Context(), event(1))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, err := wait(t, p.Publish(t.Context(), event(2))); err != nil {
			t.Fatal(err)
		}
		if calls, events := f.count(); calls != 2 || events != 2 {
			t.Errorf("%d events over %d streams, want 2 over 2", events, calls)
		}
		_ = p.Close(t.Context())
	})
}

func TestStreamPublisherResendsWhatABrokenStreamLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		var ids [2][]string
		f.stream = func(call int, s publishStream) error {
			if err := open(s, 100, 1<<20); err != nil {
				return err
			}
			for range 5 {
				frame, err := s.Recv()
				if err != nil {
					return err
				}
				e := frame.GetItem().GetEvent()
				ids[call-1] = append(ids[call-1], e.GetId())
				result := f.store(e) // the first stream stores, and loses the answers but one
				if call == 2 || e.GetId() == "e-0" {
					if err := s.Send(ack(frame.GetItem().GetSequence(), result)); err != nil {
						return err
					}
				}
				if call == 2 && len(ids[1]) == 4 {
					return answer(f, s)
				}
			}
			return failure(codes.Internal, "INTERNAL", "crash")
		}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{Stream: true})
		var results []*client.Result
		for i := range 5 {
			results = append(results, p.Publish(t.Context(), event(i)))
		}
		for i, r := range results {
			if _, err := wait(t, r); err != nil || r.Duplicate() != (i > 0) {
				t.Errorf("event %d: err %v, duplicate %v", i, err, r.Duplicate())
			}
		}
		if len(ids[1]) != 4 {
			t.Errorf("resent %v, want the four without an answer", ids[1])
		}
		_ = p.Close(t.Context())
	})
}

func TestStreamPublisherLeavesASilentStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		f.stream = func(call int, s publishStream) error {
			if err := open(s, 100, 1<<20); err != nil {
				return err
			}
			if call == 1 {
				<-s.Context().Done()
				return s.Context().Err()
			}
			return answer(f, s)
		}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{Stream: true})
		begin := time.Now()
		if _, err := wait(t, p.Publish(t.Context(), event(1))); err != nil {
			t.Error(err)
		}
		if waited := time.Since(begin); waited < 10*time.Second || waited > 15*time.Second {
			t.Errorf("answered after %s, want soon after 10s", waited)
		}
		_ = p.Close(t.Context())
	})
}

func TestStreamPublisherFailsWhatNoStreamCanTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{stream: func(int, publishStream) error {
			return failure(codes.NotFound, "RESOURCE_NOT_FOUND", "namespace acme does not exist")
		}}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{Stream: true})
		if _, err := wait(t, p.Publish(t.Context(), event(1))); !errors.Is(err, client.ErrNotFound) {
			t.Errorf("err = %v, want ErrNotFound", err)
		}
		_ = p.Close(t.Context())
	})
}
