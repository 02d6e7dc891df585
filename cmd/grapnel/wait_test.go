package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// waited is a server with one event, whose delivery ends once it was looked at so many times.
type waited struct {
	grapnelv1.UnimplementedPublishServiceServer
	grapnelv1.UnimplementedDeliveryServiceServer
	looks, pending atomic.Int32
	watched        bool
}

func (w *waited) Publish(context.Context, *grapnelv1.PublishRequest) (*grapnelv1.PublishResponse, error) {
	return &grapnelv1.PublishResponse{Name: "namespaces/acme/events/o-1", MatchedSubscriptions: 1}, nil
}

func (w *waited) delivery() *grapnelv1.Delivery {
	d := &grapnelv1.Delivery{Name: "namespaces/acme/deliveries/d", Subscription: "namespaces/acme/subscriptions/s", State: grapnelv1.Delivery_STATE_PENDING}
	if w.pending.Load() <= 0 {
		d.State, d.CompleteTime = grapnelv1.Delivery_STATE_SUCCEEDED, timestamppb.Now()
	}
	return d
}

func (w *waited) ListDeliveries(context.Context, *grapnelv1.ListDeliveriesRequest) (*grapnelv1.ListDeliveriesResponse, error) {
	d := w.delivery()
	w.looks.Add(1)
	w.pending.Add(-1)
	return &grapnelv1.ListDeliveriesResponse{Deliveries: []*grapnelv1.Delivery{d}}, nil
}

func (w *waited) WatchDeliveries(_ *grapnelv1.WatchDeliveriesRequest, stream grpc.ServerStreamingServer[grapnelv1.WatchDeliveriesResponse]) error {
	if !w.watched {
		return status.Error(codes.Unimplemented, "not here")
	}
	if err := stream.Send(&grapnelv1.WatchDeliveriesResponse{ResumeToken: "t1"}); err != nil {
		return err
	}
	if err := stream.Send(&grapnelv1.WatchDeliveriesResponse{ResumeToken: "t2", Delivery: w.delivery()}); err != nil {
		return err
	}
	w.pending.Store(0)
	return stream.Send(&grapnelv1.WatchDeliveriesResponse{ResumeToken: "t3", Delivery: w.delivery()})
}

// publish --wait looks when its watch stands, and at the end; where nobody may watch it looks until the deliveries have ended.
func TestPublishWaits(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		watched bool
		pending int32
		looks   int32
	}{
		"watching":             {watched: true, pending: 1000, looks: 2},
		"ended before":         {watched: true, pending: 0, looks: 2},
		"nobody may watch":     {pending: 3, looks: 5},
		"nobody may, and over": {pending: 0, looks: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := &waited{watched: c.watched}
			w.pending.Store(c.pending)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			s := grpc.NewServer()
			grapnelv1.RegisterPublishServiceServer(s, w)
			grapnelv1.RegisterDeliveryServiceServer(s, w)
			go func() { _ = s.Serve(l) }()
			t.Cleanup(s.Stop)
			cmd := exec.CommandContext(t.Context(), "grapnel", "publish", "-n", "acme", "--type", "order.created", "--data", "{}", "--wait", "30s")
			cmd.Env = append(os.Environ(), "GRAPNEL_ADDR="+l.Addr().String())
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "SUCCEEDED") {
				t.Errorf("%v\n%s", err, out)
			}
			if n := w.looks.Load(); n != c.looks {
				t.Errorf("looked %d times, want %d", n, c.looks)
			}
		})
	}
}
