package grpcplugin_test

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	receiverv1 "github.com/grapnel/grapnel/proto/grapnel/receiver/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

func TestMain(m *testing.M) { servertest.Main(m) }

// receiver is busy at first, and says for how long.
type receiver struct {
	receiverv1.UnimplementedReceiverServiceServer
	calls chan *receiverv1.DeliverRequest
	busy  sync.Once
}

func (r *receiver) Deliver(_ context.Context, req *receiverv1.DeliverRequest) (*receiverv1.DeliverResponse, error) {
	r.calls <- req
	var err error
	r.busy.Do(func() {
		st, detailErr := status.New(codes.ResourceExhausted, "busy").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)})
		if err = st.Err(); detailErr != nil {
			err = detailErr
		}
	})
	if err != nil {
		return nil, err
	}
	return &receiverv1.DeliverResponse{}, nil
}

func TestLiveServerDeliversAndRetries(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{calls: make(chan *receiverv1.DeliverRequest, 10)}
	g := grpc.NewServer()
	receiverv1.RegisterReceiverServiceServer(g, r)
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.Serve(lis) })
	t.Cleanup(func() { g.Stop(); wg.Wait() })

	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	s.Subscribe("acme", "orders", "grpc://"+lis.Addr().String()+"/orders", func(sub *grapnelv1.Subscription) {
		sub.RetryPolicy = &grapnelv1.RetryPolicy{Schedule: []*durationpb.Duration{durationpb.New(10 * time.Millisecond)}}
	})
	s.Publish("acme", "o-1", "order.created", []byte(`{"n":1}`))
	var got [2]*receiverv1.DeliverRequest
	var at [2]time.Time
	for i := range got {
		select {
		case got[i] = <-r.calls:
			at[i] = time.Now()
		case <-time.After(20 * time.Second):
			t.Fatalf("call %d has not come", i+1)
		}
	}
	if got[0].GetMessageId() == "" || got[0].GetMessageId() != got[1].GetMessageId() || string(got[1].GetBody()) != `{"n":1}` || got[1].GetPath() != "/orders" {
		t.Errorf("calls %v", got)
	}
	if waited := at[1].Sub(at[0]); waited < 900*time.Millisecond {
		t.Errorf("repeated after %s, though RetryInfo asks for a second", waited)
	}
	for _, name := range []string{"webhook-id", "webhook-timestamp", "webhook-signature", "ce-type", "ce-id", "content-type"} {
		if got[1].GetHeaders()[name] == "" {
			t.Errorf("no header %s in %v", name, got[1].GetHeaders())
		}
	}
}
