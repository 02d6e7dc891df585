package client_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func refused(code, reason string, retryable bool) *grapnelv1.PublishResult {
	return &grapnelv1.PublishResult{Error: &grapnelv1.ItemStatus{Code: code, Reason: reason, Message: "refused", Retryable: retryable}}
}

func TestPublisherBatchesByCountAndDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{})
		var results []*client.Result
		for i := range 250 {
			results = append(results, p.Publish(t.Context(), event(i)))
		}
		for i, r := range results {
			if name, err := wait(t, r); err != nil || name != fmt.Sprintf("namespaces/acme/events/e-%d", i) {
				t.Fatalf("event %d: %q, %v", i, name, err)
			}
		}
		var sizes []int
		for _, b := range f.batches {
			sizes = append(sizes, len(b))
		}
		if len(sizes) != 3 || sizes[0]+sizes[1]+sizes[2] != 250 || max(sizes[0], sizes[1], sizes[2]) != 100 {
			t.Errorf("batches of %v events, want 100, 100 and 50", sizes)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestPublisherCutsBatchesByBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{BatchBytes: 10_000})
		for i := range 10 {
			e := event(i)
			e.Data = make([]byte, 4_000)
			p.Publish(t.Context(), e)
		}
		large := event(99)
		large.Data = make([]byte, 50_000)
		p.Publish(t.Context(), large)
		if err := p.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, b := range f.batches {
			if len(b) > 2 {
				t.Errorf("a batch of %d events of 4 kB under a bound of 10 kB", len(b))
			}
		}
		if _, events := f.count(); events != 11 {
			t.Errorf("%d events stored, want 11", events)
		}
	})
}

func TestPublisherResendsOnlyWhatMaySucceed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		f.batch = func(call int, events []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
			if call > 1 {
				return nil, nil
			}
			return []*grapnelv1.PublishResult{
				f.store(events[0]),
				refused("RESOURCE_EXHAUSTED", "RATE_LIMITED", true),
				refused("ALREADY_EXISTS", "EVENT_ID_CONFLICT", false),
			}, nil
		}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{})
		stored, limited, conflict := p.Publish(t.Context(), event(0)), p.Publish(t.Context(), event(1)), p.Publish(t.Context(), event(2))
		if err := p.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := stored.Result(); err != nil {
			t.Errorf("stored: %v", err)
		}
		if _, err := limited.Result(); err != nil {
			t.Errorf("limited: %v", err)
		}
		if _, err := conflict.Result(); !errors.Is(err, client.ErrEventIDConflict) {
			t.Errorf("conflict: %v", err)
		}
		if len(f.batches) != 2 || len(f.batches[1]) != 1 || f.batches[1][0].GetId() != "e-1" {
			t.Errorf("second batch = %v, want e-1 alone", f.batches[1:])
		}
	})
}

func TestPublisherHealsALostAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		f.batch = func(call int, events []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
			if call == 1 { // stored, but the answer is lost
				for _, e := range events {
					f.store(e)
				}
				return nil, failure(codes.DeadlineExceeded, "ABANDONED", "lost")
			}
			return nil, nil
		}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{})
		r := p.Publish(t.Context(), client.Event{Type: "order.created"})
		if _, err := wait(t, r); err != nil || !r.Duplicate() {
			t.Errorf("err %v, duplicate %v; want the duplicate to be seen as success", err, r.Duplicate())
		}
		if f.batches[0][0].GetId() != r.ID() || f.batches[1][0].GetId() != r.ID() {
			t.Error("the ID changed between tries")
		}
		_ = p.Close(t.Context())
	})
}

func TestPublisherGivesUpAfterResendFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{batch: func(int, []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
			return []*grapnelv1.PublishResult{refused("UNAVAILABLE", "STORE_UNAVAILABLE", true)}, nil
		}}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{})
		begin := time.Now()
		_, err := wait(t, p.Publish(t.Context(), event(1)))
		if !errors.Is(err, client.ErrUnavailable) {
			t.Errorf("err = %v, want the last refusal", err)
		}
		if waited := time.Since(begin); waited < 50*time.Second || waited > time.Minute {
			t.Errorf("gave up after %s, want about 60s", waited)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		begin = time.Now()
		if _, err := wait(t, p.Publish(ctx, event(2))); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("err = %v, want the context's", err)
		}
		if waited := time.Since(begin); waited > 8*time.Second {
			t.Errorf("the event outlived its context by %s", waited)
		}
		_ = p.Close(t.Context())
	})
}

func TestPublisherRefusesOrBlocksWhenFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		f := &fake{batch: func(int, []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
			<-release
			return nil, nil
		}}
		c, stop := start(t, f)
		defer stop()
		refuse := c.Publisher("acme", client.PublisherOptions{MaxEvents: 2, WhenFull: client.Refuse})
		first := refuse.Publish(t.Context(), event(1))
		refuse.Publish(t.Context(), event(2))
		if _, err := wait(t, refuse.Publish(t.Context(), event(3))); !errors.Is(err, client.ErrBufferFull) {
			t.Errorf("err = %v, want ErrBufferFull", err)
		}
		block := c.Publisher("acme", client.PublisherOptions{MaxBytes: 100})
		block.Publish(t.Context(), client.Event{ID: "x", Type: "t", Data: make([]byte, 1000)}) // larger than the cap: goes alone
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := wait(t, block.Publish(ctx, event(4))); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("err = %v, want the context's", err)
		}
		var blocked *client.Result
		done := make(chan struct{})
		go func() { defer close(done); blocked = block.Publish(t.Context(), event(5)) }()
		synctest.Wait()
		close(release)
		<-done
		if _, err := wait(t, blocked); err != nil {
			t.Errorf("blocked event: %v", err)
		}
		if _, err := wait(t, first); err != nil {
			t.Errorf("first event: %v", err)
		}
		_, _ = refuse.Close(t.Context()), block.Close(t.Context())
	})
}

func TestPublisherKeepsFourBatchesInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		f := &fake{batch: func(int, []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
			<-release
			return nil, nil
		}}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{BatchEvents: 10})
		for i := range 100 {
			p.Publish(t.Context(), event(i))
		}
		time.Sleep(time.Second) // of the bubble
		synctest.Wait()
		if calls, _ := f.count(); calls != 4 {
			t.Errorf("%d batches in flight, want 4", calls)
		}
		close(release)
		if err := p.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		if _, events := f.count(); events != 100 {
			t.Errorf("%d events stored after Flush, want 100", events)
		}
		_ = p.Close(t.Context())
	})
}

// TestConnectionsAgeUnnoticed publishes now and then for hours against the server's rules for connections: pings
// at least 20 s apart, an end after half an hour and five minutes.
func TestConnectionsAgeUnnoticed(t *testing.T) {
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("stream=%v", stream), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fake{stream: nil}
				f.stream = func(_ int, s publishStream) error {
					if err := open(s, 100, 1<<20); err != nil {
						return err
					}
					return answer(f, s)
				}
				c, stop, err := serve(f,
					grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 20 * time.Second, PermitWithoutStream: true}),
					grpc.KeepaliveParams(keepalive.ServerParameters{
						Time: 30 * time.Second, Timeout: 10 * time.Second, MaxConnectionIdle: 15 * time.Minute,
						MaxConnectionAge: 30 * time.Minute, MaxConnectionAgeGrace: 5 * time.Minute,
					}))
				if err != nil {
					t.Fatal(err)
				}
				p := c.Publisher("acme", client.PublisherOptions{Stream: stream})
				for n := range 500 {
					begin := time.Now()
					r := p.Publish(t.Context(), event(n))
					// This server cuts streams without a word, so an answer may be lost.
					if _, err := r.Wait(t.Context()); err != nil || r.Duplicate() && !stream {
						t.Errorf("event %d: err %v, duplicate %v", n, err, r.Duplicate())
					}
					// Once such a stream is cut, it is a second before the connection ends; then the event is sent again.
					if took := time.Since(begin); took > 2*time.Second {
						t.Errorf("event %d took %s", n, took)
					}
					time.Sleep(time.Duration(n%97) * time.Second) // of the bubble
				}
				if _, events := f.count(); events != 500 {
					t.Errorf("%d events stored, want 500", events)
				}
				if err := errors.Join(p.Close(t.Context()), stop()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestPublisherRefusesWhatCannotBeSent: nothing of it reaches the wire, so nothing of it may be stored.
func TestPublisherRefusesWhatCannotBeSent(t *testing.T) {
	deep := structpb.NewNullValue()
	for range 20_000 {
		deep = structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{deep}})
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	text := &grapnelv1.Event{Type: "t", Payload: &grapnelv1.Event_Text{Text: "caf\xe9"}}
	tests := []struct {
		name, namespace string
		ctx             context.Context
		event           *grapnelv1.Event
		want            error
		field           string
	}{
		{"nothing", "acme", t.Context(), nil, client.ErrInvalidField, "event"},
		{"type", "acme", t.Context(), &grapnelv1.Event{Type: "\xff"}, client.ErrInvalidField, "event.type"},
		{"id", "acme", t.Context(), &grapnelv1.Event{Type: "t", Id: "\xff"}, client.ErrInvalidField, "event.id"},
		{"text", "acme", t.Context(), text, client.ErrInvalidField, "event.text"},
		{"attribute name", "acme", t.Context(), &grapnelv1.Event{Type: "t", Attributes: map[string]string{"\xff": "x"}}, client.ErrInvalidField, "event.attributes"},
		{"json", "acme", t.Context(), &grapnelv1.Event{Type: "t", Payload: &grapnelv1.Event_Json{Json: structpb.NewStringValue("\xff")}}, client.ErrInvalidField, "event.json"},
		{"deep json", "acme", t.Context(), &grapnelv1.Event{Type: "t", Payload: &grapnelv1.Event_Json{Json: deep}}, client.ErrInvalidField, "event.json"},
		{"size", "acme", t.Context(), &grapnelv1.Event{Type: "t", Payload: &grapnelv1.Event_Data{Data: make([]byte, 4<<20)}}, client.ErrInvalidField, "event"},
		{"namespace", "\xff", t.Context(), &grapnelv1.Event{Type: "t"}, client.ErrInvalidField, "parent"},
		{"context", "acme", ended, &grapnelv1.Event{Type: "t"}, context.Canceled, ""},
	}
	for _, stream := range []bool{false, true} {
		f := &fake{}
		c, stop := start(t, f)
		for _, tt := range tests {
			p := c.Publisher(tt.namespace, client.PublisherOptions{Stream: stream})
			_, err := p.PublishProto(tt.ctx, proto.CloneOf(tt.event)).Result()
			if !errors.Is(err, tt.want) || !errors.Is(err, client.ErrNotStored) {
				t.Errorf("%s: %v, want %v and ErrNotStored", tt.name, err, tt.want)
			}
			if e := client.FromError(err); tt.field != "" && (len(e.Violations) != 1 || e.Violations[0].Field != tt.field) {
				t.Errorf("%s: violations %v, want one of %s", tt.name, e.Violations, tt.field)
			}
			if err := p.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if calls, _ := f.count(); calls != 0 {
			t.Errorf("%d calls, want none", calls)
		}
		stop()
	}
}

func TestResultWaitsNoLongerThanItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		f := &fake{batch: func(int, []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) { <-release; return nil, nil }}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{})
		r := p.Publish(t.Context(), event(1))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wait = %v, want the context's error", err)
		}
		close(release)
		if name, err := r.Wait(t.Context()); err != nil || name != "namespaces/acme/events/e-1" {
			t.Errorf("Wait = %q, %v", name, err)
		}
		_ = p.Close(t.Context())
	})
}

func TestFlushDoesNotWaitForTheDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, stop := start(t, &fake{})
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{BatchDelay: time.Hour})
		r := p.Publish(t.Context(), event(1))
		begin := time.Now()
		if err := p.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := wait(t, r); err != nil || time.Since(begin) > time.Second {
			t.Errorf("err %v after %s", err, time.Since(begin))
		}
		_ = p.Close(t.Context())
	})
}

func TestCloseGivesUpWhenItsContextEnds(t *testing.T) {
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("stream=%v", stream), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fake{
					batch: func(int, []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
						return nil, failure(codes.Unavailable, "STORE_UNAVAILABLE", "no quorum")
					},
					stream: func(int, publishStream) error {
						return failure(codes.Unavailable, "STORE_UNAVAILABLE", "no quorum")
					},
				}
				c, stop := start(t, f)
				defer stop()
				p := c.Publisher("acme", client.PublisherOptions{Stream: stream})
				r := p.Publish(t.Context(), event(1))
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if err := p.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Close = %v", err)
				}
				if _, err := r.Result(); !errors.Is(err, client.ErrClosed) {
					t.Errorf("result = %v, want ErrClosed", err)
				}
				if _, err := p.Publish(t.Context(), event(2)).Result(); !errors.Is(err, client.ErrClosed) {
					t.Errorf("publish after close = %v, want ErrClosed", err)
				}
				if err := p.Close(t.Context()); err != nil {
					t.Errorf("second Close = %v", err)
				}
			})
		})
	}
}

func TestClientCloseEndsItsPublishers(t *testing.T) {
	// The bubble fails the test when a goroutine is left.
	synctest.Test(t, func(t *testing.T) {
		f := &fake{batch: func(int, []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
			return nil, failure(codes.Unavailable, "DRAINING", "draining")
		}}
		c, stop := start(t, f)
		p := c.Publisher("acme", client.PublisherOptions{})
		r := p.Publish(t.Context(), event(1))
		stop()
		if _, err := wait(t, r); !errors.Is(err, client.ErrClosed) {
			t.Errorf("err = %v, want ErrClosed", err)
		}
		late := c.Publisher("acme", client.PublisherOptions{})
		if _, err := late.Publish(t.Context(), event(2)).Result(); !errors.Is(err, client.ErrClosed) {
			t.Errorf("publisher of a closed client: %v", err)
		}
	})
}

type publishStream = grpc.BidiStreamingServer[grapnelv1.PublishStreamRequest, grapnelv1.PublishStreamResponse]

// Events of an ordering key are sent one after another, also when one of them has to be sent again; others do not wait.
func TestPublisherKeepsTheOrderOfAKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		var order []string
		tries := map[string]int{}
		f.batch = func(_ int, events []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
			var results []*grapnelv1.PublishResult
			keys := map[string]bool{}
			for _, e := range events {
				if key := e.GetOrderingKey(); key != "" && keys[key] {
					t.Errorf("two events of %s in one batch", key)
				}
				keys[e.GetOrderingKey()] = true
				if tries[e.GetId()]++; e.GetId() == "e-1" && tries["e-1"] < 3 {
					results = append(results, refused("UNAVAILABLE", "DRAINING", true))
					continue
				}
				order = append(order, e.GetId())
				results = append(results, f.store(e))
			}
			return results, nil
		}
		c, stop := start(t, f)
		defer stop()
		p := c.Publisher("acme", client.PublisherOptions{})
		for i := range 4 {
			e := event(i)
			e.OrderingKey = "a"
			p.Publish(t.Context(), e)
		}
		p.Publish(t.Context(), event(9))
		if err := p.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(order); got != "[e-0 e-9 e-1 e-2 e-3]" {
			t.Errorf("stored in the order %v", got)
		}
	})
}
