package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/protoadapt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// fake is a server whose answers the test scripts. It keeps events by ID, as the real one does.
type fake struct {
	grapnelv1.UnimplementedPublishServiceServer
	grapnelv1.UnimplementedSubscriptionServiceServer
	grapnelv1.UnimplementedEventServiceServer

	mu      sync.Mutex // guards the fields below
	stored  map[string]int
	batches [][]*grapnelv1.Event
	agents  []string

	// Scripts; nil means to store everything.
	publish func(call int, e *grapnelv1.Event) error
	batch   func(call int, events []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error)
	stream  func(call int, s grpc.BidiStreamingServer[grapnelv1.PublishStreamRequest, grapnelv1.PublishStreamResponse]) error

	calls        int
	subscription *grapnelv1.Subscription
	update       func(call int, s *grapnelv1.Subscription) error
	list         func(token string) (*grapnelv1.ListSubscriptionsResponse, error)
}

func (f *fake) store(e *grapnelv1.Event) *grapnelv1.PublishResult {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stored[e.GetId()]++
	return &grapnelv1.PublishResult{Name: "namespaces/acme/events/" + e.GetId(), Duplicate: f.stored[e.GetId()] > 1}
}

func (f *fake) count() (calls, events int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls, len(f.stored)
}

func (f *fake) call(ctx context.Context) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		f.agents = append(f.agents, md.Get("user-agent")...)
	}
	return f.calls
}

func (f *fake) Publish(ctx context.Context, r *grapnelv1.PublishRequest) (*grapnelv1.PublishResponse, error) {
	call := f.call(ctx)
	if f.publish != nil {
		if err := f.publish(call, r.GetEvent()); err != nil {
			return nil, err
		}
	}
	result := f.store(r.GetEvent())
	return &grapnelv1.PublishResponse{Name: result.GetName(), Duplicate: result.GetDuplicate()}, nil
}

func (f *fake) BatchPublish(ctx context.Context, r *grapnelv1.BatchPublishRequest) (*grapnelv1.BatchPublishResponse, error) {
	call := f.call(ctx)
	f.mu.Lock()
	f.batches = append(f.batches, r.GetEvents())
	f.mu.Unlock()
	if f.batch != nil {
		results, err := f.batch(call, r.GetEvents())
		if err != nil {
			return nil, err
		}
		if results != nil {
			return &grapnelv1.BatchPublishResponse{Results: results}, nil
		}
	}
	response := &grapnelv1.BatchPublishResponse{}
	for _, e := range r.GetEvents() {
		response.Results = append(response.Results, f.store(e))
	}
	return response, nil
}

func (f *fake) PublishStream(s grpc.BidiStreamingServer[grapnelv1.PublishStreamRequest, grapnelv1.PublishStreamResponse]) error {
	return f.stream(f.call(s.Context()), s)
}

func (f *fake) GetSubscription(context.Context, *grapnelv1.GetSubscriptionRequest) (*grapnelv1.GetSubscriptionResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.subscription == nil {
		return nil, failure(codes.NotFound, "RESOURCE_NOT_FOUND", "no such subscription")
	}
	return &grapnelv1.GetSubscriptionResponse{Subscription: f.subscription}, nil
}

// GetEvent answers with nothing but the name that was asked for.
func (f *fake) GetEvent(_ context.Context, r *grapnelv1.GetEventRequest) (*grapnelv1.GetEventResponse, error) {
	return &grapnelv1.GetEventResponse{Event: &grapnelv1.Event{Name: r.GetName()}}, nil
}

func (f *fake) UpdateSubscription(ctx context.Context, r *grapnelv1.UpdateSubscriptionRequest) (*grapnelv1.UpdateSubscriptionResponse, error) {
	if err := f.update(f.call(ctx), r.GetSubscription()); err != nil {
		return nil, err
	}
	return &grapnelv1.UpdateSubscriptionResponse{Subscription: r.GetSubscription()}, nil
}

func (f *fake) ListSubscriptions(_ context.Context, r *grapnelv1.ListSubscriptionsRequest) (*grapnelv1.ListSubscriptionsResponse, error) {
	return f.list(r.GetPageToken())
}

// failure is an error as the server makes it.
func failure(code codes.Code, reason, message string, details ...protoadapt.MessageV1) error {
	info := &errdetails.ErrorInfo{Domain: "grapnel", Reason: reason}
	st, err := status.New(code, message).WithDetails(append([]protoadapt.MessageV1{info}, details...)...)
	if err != nil {
		return err
	}
	return st.Err()
}

// start serves f in memory and returns a client of it. The returned function ends both; it must be
// called inside the bubble when there is one, so t.Cleanup would be too late.
func start(t *testing.T, f *fake) (*client.Client, func()) {
	t.Helper()
	c, stop, err := serve(f)
	if err != nil {
		t.Fatal(err)
	}
	return c, func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
}

// startExample is a server for the examples; in real code this is client.Dial.
func startExample() (*client.Client, func()) {
	c, stop, err := serve(&fake{})
	if err != nil {
		panic(err)
	}
	return c, func() { _ = stop() }
}

func serve(f *fake, opts ...grpc.ServerOption) (*client.Client, func() error, error) {
	f.stored = map[string]int{}
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(opts...)
	grapnelv1.RegisterPublishServiceServer(server, f)
	grapnelv1.RegisterSubscriptionServiceServer(server, f)
	grapnelv1.RegisterEventServiceServer(server, f)
	registerHealth(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	c, err := client.Dial(context.Background(), "passthrough:///fake", client.WithInsecure(), client.WithDialOptions(
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
	))
	return c, func() error {
		closed := c.Close()
		server.Stop()
		return errors.Join(closed, <-served)
	}, err
}

// registerHealth says that publishing is served, which clients ask about.
func registerHealth(server *grpc.Server) {
	checks := health.NewServer()
	checks.SetServingStatus("grapnel.v1.PublishService", healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(server, checks)
}

func event(n int) client.Event {
	return client.Event{ID: fmt.Sprintf("e-%d", n), Type: "order.created", Data: []byte(`{}`)}
}

// wait returns the outcome, or fails the test when there is none before the test's own deadline.
func wait(t *testing.T, r *client.Result) (string, error) {
	t.Helper()
	select {
	case <-r.Done():
		return r.Result()
	case <-t.Context().Done():
		t.Fatal("no outcome")
		return "", nil
	}
}
