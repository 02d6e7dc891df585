package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// hostile is a server that keeps events in a plain list and does to calls and connections whatever a wire, a
// proxy or a bad day can. It never lies: what it refuses for good or for now it has not stored.
type hostile struct {
	grapnelv1.UnimplementedPublishServiceServer

	mu     sync.Mutex // guards the fields below
	dice   *rand.Rand
	faults int // how many are left
	list   map[string]int
	conns  []net.Conn
}

// roll returns 0 for no fault, else one of n.
func (h *hostile) roll(n int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.faults == 0 || h.dice.IntN(3) > 0 {
		return 0
	}
	h.faults--
	return 1 + h.dice.IntN(n)
}

func (h *hostile) pick(n int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.dice.IntN(n)
}

func (h *hostile) store(e *grapnelv1.Event) *grapnelv1.PublishResult {
	if e.GetType() == "refused" {
		return refused("INVALID_ARGUMENT", "INVALID_FIELD", false)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list[e.GetId()]++
	return &grapnelv1.PublishResult{Name: "namespaces/acme/events/" + e.GetId(), Duplicate: h.list[e.GetId()] > 1}
}

func (h *hostile) storeAll(events []*grapnelv1.Event) *grapnelv1.BatchPublishResponse {
	r := &grapnelv1.BatchPublishResponse{}
	for _, e := range events {
		r.Results = append(r.Results, h.store(e))
	}
	return r
}

func (h *hostile) stored(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.list[id] > 0
}

// cut breaks every connection.
func (h *hostile) cut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.conns {
		_ = c.Close()
	}
	h.conns = nil
}

// poisoned is the fate of a call or stream with an event that the server cannot read: gRPC answers itself.
func poisoned(events ...*grapnelv1.Event) error {
	for _, e := range events {
		switch kind, poison := strings.CutPrefix(e.GetType(), "poison."); {
		case !poison:
		case kind == "large":
			return status.Error(codes.ResourceExhausted, "grpc: received message larger than max")
		case kind == "too-large":
			return failure(codes.ResourceExhausted, "MESSAGE_TOO_LARGE", "the request is larger than 4 MiB")
		case kind == "refused":
			return failure(codes.InvalidArgument, "INVALID_FIELD", "the request cannot be read")
		default:
			return status.Error(codes.Internal, "grpc: error unmarshalling request")
		}
	}
	return nil
}

func rateLimited() error {
	return failure(codes.ResourceExhausted, "RATE_LIMITED", "too fast", &errdetails.RetryInfo{RetryDelay: durationpb.New(200 * time.Millisecond)})
}

func (h *hostile) BatchPublish(ctx context.Context, r *grapnelv1.BatchPublishRequest) (*grapnelv1.BatchPublishResponse, error) {
	events := r.GetEvents()
	if err := poisoned(events...); err != nil {
		return nil, err
	}
	switch h.roll(12) {
	case 1:
		return nil, failure(codes.Unavailable, "DRAINING", "the server is stopping")
	case 2:
		return nil, rateLimited()
	case 3:
		h.cut()
		return nil, ctx.Err()
	case 4:
		h.storeAll(events)
		h.cut()
		return nil, ctx.Err()
	case 5: // and only stores it when the caller has long gone
		time.Sleep(15 * time.Second)
	case 6:
		h.storeAll(events)
		return nil, status.Error([]codes.Code{codes.Unknown, codes.Internal, codes.DeadlineExceeded, codes.Aborted, codes.Canceled}[h.pick(5)], "whatever")
	case 7:
		answer := h.storeAll(events)
		answer.Results = answer.Results[1:]
		return answer, nil
	case 8:
		answer := h.storeAll(events)
		answer.Results = append(answer.Results, answer.Results[0])
		return answer, nil
	case 9:
		answer := h.storeAll(events)
		answer.Results[h.pick(len(events))] = &grapnelv1.PublishResult{}
		return answer, nil
	case 10:
		k := h.pick(len(events))
		answer := h.storeAll(events[:k])
		answer.Results = append(answer.Results, refused("RESOURCE_EXHAUSTED", "RATE_LIMITED", true))
		answer.Results = append(answer.Results, h.storeAll(events[k+1:]).GetResults()...)
		return answer, nil
	case 11:
		answer := h.storeAll(events)
		answer.Results[h.pick(len(events))] = refused([]string{"DEADLINE_EXCEEDED", "INTERNAL", "NO_SUCH_CODE", ""}[h.pick(4)], "ABANDONED", false)
		return answer, nil
	case 12: // stored, and then refused for a reason of its own
		h.storeAll(events)
		h.cut()
		h.mu.Lock()
		h.faults++
		h.mu.Unlock()
		return nil, rateLimited()
	}
	return h.storeAll(events), nil
}

func (h *hostile) PublishStream(s publishStream) error {
	switch h.roll(8) {
	case 1:
		return failure(codes.Unavailable, "DRAINING", "the server is stopping")
	case 2: // never opens
		<-s.Context().Done()
		return s.Context().Err()
	case 3:
		h.cut()
		return s.Context().Err()
	case 4:
		return status.Error(codes.Unimplemented, "a proxy of another time")
	}
	if err := open(s, int32(1+h.pick(50)), int32(1+h.pick(1<<20))); err != nil {
		return err
	}
	for {
		frame, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		e, sequence := frame.GetItem().GetEvent(), frame.GetItem().GetSequence()
		if err := poisoned(e); err != nil {
			return err
		}
		switch h.roll(40) {
		case 1:
			h.cut()
			return s.Context().Err()
		case 2:
			h.store(e)
			h.cut()
			return s.Context().Err()
		case 3: // never answers this one
			h.store(e)
			continue
		case 4:
			h.store(e)
			return status.Error([]codes.Code{codes.Unknown, codes.Internal, codes.ResourceExhausted, codes.NotFound, codes.OK}[h.pick(5)], "whatever")
		case 5: // reads no more
			<-s.Context().Done()
			return s.Context().Err()
		case 6:
			if s.Send(&grapnelv1.PublishStreamResponse{Draining: true}) != nil {
				return s.Context().Err()
			}
		case 7:
			if s.Send(ack(sequence+1000, refused("INVALID_ARGUMENT", "INVALID_FIELD", false))) != nil {
				return s.Context().Err()
			}
		case 8:
			h.store(e)
			if s.Send(ack(sequence, nil)) != nil {
				return s.Context().Err()
			}
			continue
		case 9:
			if s.Send(ack(sequence, refused("RESOURCE_EXHAUSTED", "RATE_LIMITED", true))) != nil {
				return s.Context().Err()
			}
			continue
		case 10:
			time.Sleep(12 * time.Second)
		}
		result := h.store(e)
		for range 1 + h.roll(1) {
			if s.Send(ack(sequence, result)) != nil {
				return s.Context().Err()
			}
		}
	}
}

// serve starts the server on connections that can be cut.
func (h *hostile) serve(t *testing.T) (*client.Client, func()) {
	t.Helper()
	listener := bufconn.Listen(64 << 10)
	server := grpc.NewServer()
	grapnelv1.RegisterPublishServiceServer(server, h)
	registerHealth(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	c, err := client.Dial(t.Context(), "passthrough:///hostile", client.WithInsecure(), client.WithDialOptions(
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := listener.DialContext(ctx)
			if err == nil {
				h.mu.Lock()
				h.conns = append(h.conns, conn)
				h.mu.Unlock()
			}
			return conn, err
		})))
	if err != nil {
		t.Fatal(err)
	}
	return c, func() {
		closed := c.Close()
		server.Stop()
		if err := errors.Join(closed, <-served); err != nil {
			t.Error(err)
		}
	}
}

// someEvent is one of the kinds that a publisher may be given.
func someEvent(dice *rand.Rand, n int) client.Event {
	e := event(n)
	e.Data = make([]byte, dice.IntN(3000))
	switch dice.IntN(40) {
	case 0:
		e.Subject = "caf\xe9"
	case 1:
		e.Attributes = map[string]string{"region": "\xff"}
	case 2:
		e.Type = "refused"
	case 3:
		e.Type = "poison." + []string{"large", "too-large", "refused", "unreadable"}[dice.IntN(4)]
	case 4:
		if dice.IntN(5) == 0 {
			e.Data = make([]byte, 5<<20)
		}
	}
	return e
}

// good reports whether a server that is well stores the event.
func good(e client.Event) bool {
	return e.Type == "order.created" && e.Subject == "" && e.Attributes == nil && len(e.Data) < 4<<20
}

// TestPublisherTellsTheTruth holds a publisher against everything that a wire can do: each event has exactly
// one outcome, stored is on the list, not stored is not, also later, and unknown is never told as either.
func TestPublisherTellsTheTruth(t *testing.T) {
	seeds := 40
	if testing.Short() {
		seeds = 8
	}
	for seed := range seeds {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("seed=%d,stream=%v", seed, stream), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { truth(t, uint64(seed), stream) })
			})
		}
	}
}

func truth(t *testing.T, seed uint64, stream bool) {
	dice := rand.New(rand.NewPCG(seed, 1))
	h := &hostile{dice: rand.New(rand.NewPCG(seed, 2)), faults: dice.IntN(60), list: map[string]int{}}
	c, stop := h.serve(t)
	p := c.Publisher("acme", client.PublisherOptions{
		Stream: stream, BatchEvents: 1 + dice.IntN(100), BatchesInFlight: 1 + dice.IntN(4), MaxEvents: 50 + dice.IntN(200),
		ResendFor: time.Duration(5+dice.IntN(600)) * time.Second,
	})
	events := make([]client.Event, 300)
	results := make([]*client.Result, len(events))
	for n := range events {
		events[n] = someEvent(dice, n)
		ctx := t.Context()
		if dice.IntN(20) == 0 {
			limited, cancel := context.WithTimeout(ctx, time.Duration(dice.IntN(1000))*time.Millisecond)
			defer cancel()
			ctx = limited
		}
		results[n] = p.Publish(ctx, events[n])
		if dice.IntN(30) == 0 {
			time.Sleep(time.Duration(dice.IntN(2000)) * time.Millisecond)
		}
	}
	closing, cancel := context.WithTimeout(t.Context(), time.Duration(1+dice.IntN(900))*time.Second)
	defer cancel()
	_ = p.Close(closing) // its events then have an outcome, whatever it returns
	stop()
	synctest.Wait()
	time.Sleep(time.Minute) // what the server does late is done
	for n, r := range results {
		select {
		case <-r.Done():
		default:
			t.Fatalf("event %d has no outcome", n)
		}
		name, err := r.Result()
		notStored, maybe := errors.Is(err, client.ErrNotStored), errors.Is(err, client.ErrMaybeStored)
		if onList := h.stored(r.ID()); err == nil && (!onList || name == "") || notStored && onList {
			t.Errorf("event %d is on the list: %v; told %q, %v", n, onList, name, err)
		}
		if err != nil && notStored == maybe {
			t.Errorf("event %d: %v says neither or both of not stored and maybe stored", n, err)
		}
	}
}

// TestOneEventDecidesForItselfOnly has events that cannot be sent, read or stored among good ones, and
// nothing else that is wrong.
func TestOneEventDecidesForItselfOnly(t *testing.T) {
	seeds := 20
	if testing.Short() {
		seeds = 4
	}
	for seed := range seeds {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("seed=%d,stream=%v", seed, stream), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					dice := rand.New(rand.NewPCG(uint64(seed), 3))
					h := &hostile{dice: rand.New(rand.NewPCG(uint64(seed), 4)), list: map[string]int{}}
					c, stop := h.serve(t)
					defer stop()
					p := c.Publisher("acme", client.PublisherOptions{Stream: stream})
					begin := time.Now()
					var events []client.Event
					var results []*client.Result
					for n := range 600 {
						events = append(events, someEvent(dice, n))
						results = append(results, p.Publish(t.Context(), events[n]))
					}
					for n, r := range results {
						if !good(events[n]) {
							continue
						}
						if _, err := wait(t, r); err != nil {
							t.Errorf("event %d, which is good: %v", n, err)
						}
					}
					if took := time.Since(begin); took > 2*time.Second {
						t.Errorf("the good events waited %s for the others", took)
					}
					if err := p.Close(t.Context()); err != nil {
						t.Fatal(err)
					}
					for n, r := range results {
						_, err := r.Result()
						switch e := events[n]; {
						case good(e):
						case err == nil:
							t.Errorf("event %d of type %s is told as stored", n, e.Type)
						case !strings.HasPrefix(e.Type, "poison.") && !errors.Is(err, client.ErrInvalidField):
							t.Errorf("event %d: %v, want ErrInvalidField", n, err)
						}
					}
				})
			})
		}
	}
}

func TestPublishSaysWhetherTheEventMayBeStored(t *testing.T) {
	lost := status.Error(codes.Unavailable, "connection closed")
	quota := failure(codes.ResourceExhausted, "QUOTA_EXCEEDED", "too many open deliveries")
	tests := []struct {
		name    string
		event   client.Event
		answers []error
		want    error
		cause   error
	}{
		{"refused", event(1), []error{quota}, client.ErrNotStored, client.ErrQuotaExceeded},
		{"refused after a try that may have stored it", event(1), []error{lost, quota}, client.ErrMaybeStored, client.ErrQuotaExceeded},
		{"never an answer", event(1), slices.Repeat([]error{lost}, 5), client.ErrMaybeStored, client.ErrUnavailable},
		{"not now", event(1), slices.Repeat([]error{failure(codes.Unavailable, "DRAINING", "stopping")}, 5), client.ErrNotStored, client.ErrDraining},
		{"internal", event(1), []error{status.Error(codes.Internal, "stream terminated")}, client.ErrMaybeStored, nil},
		{"not UTF-8", client.Event{Type: "t", Subject: "caf\xe9"}, nil, client.ErrNotStored, client.ErrInvalidField},
		{"too large", client.Event{Type: "t", Data: make([]byte, 5<<20)}, nil, client.ErrNotStored, client.ErrInvalidField},
		{"then stored", event(1), []error{lost, lost}, nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fake{publish: func(call int, _ *grapnelv1.Event) error {
					if call <= len(tt.answers) {
						return tt.answers[call-1]
					}
					return nil
				}}
				c, stop := start(t, f)
				defer stop()
				_, err := c.Publish(t.Context(), "acme", tt.event)
				if !errors.Is(err, tt.want) || tt.cause != nil && !errors.Is(err, tt.cause) {
					t.Errorf("err = %v, want %v and %v", err, tt.want, tt.cause)
				}
				if calls, _ := f.count(); calls < len(tt.answers) || tt.answers == nil && calls > 0 {
					t.Errorf("%d calls, want %d", calls, len(tt.answers))
				}
			})
		})
	}
}
