package server_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	receiverv1 "github.com/grapnel/grapnel/proto/grapnel/receiver/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// grpcReceiver implements the one method that receivers have. It answers by the path it is called at.
type grpcReceiver struct {
	receiverv1.UnimplementedReceiverServiceServer
	addr string

	mu    sync.Mutex
	conns int
	calls map[string][]grpcCall // by path
}

type grpcCall struct {
	request *receiverv1.DeliverRequest
	token   string
	at      time.Time
}

func (r *grpcReceiver) Deliver(ctx context.Context, req *receiverv1.DeliverRequest) (*receiverv1.DeliverResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls[req.GetPath()] = append(r.calls[req.GetPath()], grpcCall{req, strings.Join(md.Get("authorization"), ","), time.Now()})
	switch {
	case strings.HasSuffix(req.GetPath(), "busy") && len(r.calls[req.GetPath()]) == 1:
		return nil, with(codes.Unavailable, "at lunch", &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)})
	case strings.HasSuffix(req.GetPath(), "echo"):
		return nil, status.Errorf(codes.Unauthenticated, "not for %s", md.Get("authorization"))
	case strings.HasSuffix(req.GetPath(), "gone"):
		return nil, with(codes.FailedPrecondition, "moved away", &errdetails.ErrorInfo{Reason: "GONE", Domain: "hooks.example.com"})
	}
	return &receiverv1.DeliverResponse{}, nil
}

func with(code codes.Code, text string, detail protoadapt.MessageV1) error {
	st, err := status.New(code, text).WithDetails(detail)
	if err != nil {
		return err
	}
	return st.Err()
}

func (r *grpcReceiver) at(path string) []grpcCall {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]grpcCall(nil), r.calls[path]...)
}

func (r *grpcReceiver) connections() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conns
}

// countedListener counts connections.
type countedListener struct {
	net.Listener
	r *grpcReceiver
}

func (l countedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.r.mu.Lock()
		l.r.conns++
		l.r.mu.Unlock()
	}
	return c, err
}

func startGRPC(t *testing.T, opts ...grpc.ServerOption) *grpcReceiver {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &grpcReceiver{addr: lis.Addr().String(), calls: map[string][]grpcCall{}}
	srv := grpc.NewServer(opts...)
	receiverv1.RegisterReceiverServiceServer(srv, r)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(countedListener{lis, r}) })
	t.Cleanup(func() { srv.Stop(); wg.Wait() })
	return r
}

// verifiedCalls asserts that calls are signed, and that none has an id of another event.
func (s *stand) verifiedCalls(calls []grpcCall) {
	s.t.Helper()
	for _, c := range calls {
		header := http.Header{}
		for name, value := range c.request.GetHeaders() {
			header.Set(name, value)
		}
		s.verified(header, c.request.GetBody())
		if id := c.request.GetMessageId(); id == "" || id != header.Get("Webhook-Id") {
			s.t.Errorf("message_id %q, webhook-id %q", id, header.Get("Webhook-Id"))
		}
		if header.Get("Ce-Type") == "" || header.Get("Content-Type") != "application/json" {
			s.t.Errorf("headers %v", header)
		}
	}
}

func grpcReceivers(t *testing.T, s *stand) {
	rcv := startGRPC(t)
	uri := "grpc://" + rcv.addr
	// The scheme says which transport.
	s.over("plain", uri+"/plain", route{plugin: "grpc"}, func(sub *grapnelv1.Subscription) { sub.Transport = nil })
	s.send("plain", 30)
	s.once("plain")
	calls := rcv.at("/plain")
	s.verifiedCalls(calls)
	if len(calls) != 30 || rcv.connections() != 1 {
		t.Errorf("%d calls over %d connections, want 30 over 1", len(calls), rcv.connections())
	}

	s.over("busy", uri+"/busy", route{plugin: "grpc"}, func(sub *grapnelv1.Subscription) {
		sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 3, Schedule: seconds(0)}
	})
	s.send("busy", 1)
	calls = rcv.at("/busy")
	s.verifiedCalls(calls)
	if len(calls) != 2 || calls[0].request.GetMessageId() != calls[1].request.GetMessageId() ||
		string(calls[0].request.GetBody()) != string(calls[1].request.GetBody()) {
		t.Errorf("after UNAVAILABLE: %v", calls)
	} else if waited := calls[1].at.Sub(calls[0].at); waited < time.Second {
		t.Errorf("repeated after %v, the receiver asked for 1s", waited)
	}
	attempts := s.attempts(s.of("busy", "attempt_count > 0")[0].GetName())
	if a := attempts[0]; a.GetResponseCode() != http.StatusServiceUnavailable || a.GetRetryAfter().AsDuration() != time.Second ||
		string(a.GetResponseBody()) != "at lunch" || a.GetOutcome() != grapnelv1.Attempt_OUTCOME_RETRYABLE {
		t.Errorf("the first attempt is kept as %v, %q", a, a.GetResponseBody())
	}

	sub := s.over("gone", uri+"/gone", route{plugin: "grpc"}, nil)
	if d := s.fail("gone"); d.GetState() != grapnelv1.Delivery_STATE_REJECTED || d.GetAttemptCount() != 1 {
		t.Errorf("GONE ended as %v after %d attempts", d.GetState(), d.GetAttemptCount())
	}
	servertest.Await(t, "the subscription to be disabled after GONE", func() bool {
		got, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: sub.GetName()})
		return err == nil && got.GetSubscription().GetState() == grapnelv1.Subscription_STATE_DISABLED
	})
}

func grpcOverTLS(t *testing.T, s *stand) {
	ca := newAuthority(t)
	config := ca.serverConfig(tls.RequireAndVerifyClientCert)
	config.NextProtos = []string{"h2"}
	rcv := startGRPC(t, grpc.Creds(credentials.NewTLS(config)))
	token := s.canary("a bearer token for gRPC", "c4n4ry-grpc-"+rand.Text())
	s.over("secure", "grpcs://"+rcv.addr+"/v1", route{plugin: "grpc", secrets: map[string]string{
		"ca": ca.pem, "client_certificate": ca.client(s, "grpc client"), "token": token,
	}}, nil)
	s.send("secure", 10)
	s.once("secure")
	calls := rcv.at("/v1")
	s.verifiedCalls(calls)
	if len(calls) != 10 || calls[0].token != "Bearer "+token || rcv.connections() != 1 {
		t.Errorf("%d calls over %d connections, the first with %q", len(calls), rcv.connections(), calls[0].token)
	}
	echo := map[string]string{"ca": ca.pem, "client_certificate": ca.client(s, "another grpc client"), "token": token}
	s.over("echo", "grpcs://"+rcv.addr+"/echo", route{plugin: "grpc", secrets: echo}, oneTry)
	if a := s.attempts(s.fail("echo").GetName())[0]; a.GetResponseCode() != http.StatusUnauthorized || !strings.Contains(string(a.GetResponseBody()), "not for") {
		t.Errorf("the receiver said the token back: %v, %q", a, a.GetResponseBody())
	}
	for id, secrets := range map[string]map[string]string{
		"without": {"ca": ca.pem}, "distrusted": {"ca": newAuthority(t).pem},
	} {
		s.over(id, "grpcs://"+rcv.addr+"/"+id, route{plugin: "grpc", secrets: secrets}, oneTry)
		d := s.fail(id)
		want := map[string]string{"without": "client certificate", "distrusted": "unknown authority"}[id]
		if a := d.GetLastAttempt(); a.GetOutcome() != grapnelv1.Attempt_OUTCOME_UNREACHABLE || !strings.Contains(a.GetError(), want) {
			t.Errorf("%s ended as %v: %q, want UNREACHABLE and %q", id, a.GetOutcome(), a.GetError(), want)
		}
	}
}
