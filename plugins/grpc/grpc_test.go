package grpcplugin

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	receiverv1 "github.com/grapnel/grapnel/proto/grapnel/receiver/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

func TestDeliversWhatAnHTTPReceiverWouldGet(t *testing.T) {
	r := serve(t, nil)
	b := newBench(t)
	inst := b.Configure(plugintest.Instance{
		Kind: "grpc", Secrets: map[string][]string{"token": {"newest-token", "older-token"}},
		Target: plugin.Target{
			URL: "grpc://" + r.addr + "/orders/eu%20west", UserAgent: "grapnel/test", Egress: loopback(),
			Headers: []plugin.Header{{Name: "x-team", Value: "billing"}},
		},
	})
	resp, err := deliver(t, inst)
	wantStatus(t, resp, err, http.StatusOK)
	if resp.Peer != r.addr {
		t.Errorf("peer %q, want %q", resp.Peer, r.addr)
	}
	got := r.arrived()
	if len(got) != 1 {
		t.Fatalf("%d calls arrived, want 1", len(got))
	}
	want := &receiverv1.DeliverRequest{
		MessageId: "evt_1", Body: event().Body, Path: "/orders/eu%20west",
		Headers: map[string]string{"content-type": "application/json", "webhook-id": "evt_1", "x-twice": "a, b", "x-team": "billing"},
	}
	if diff := cmp.Diff(want, got[0].request, protocmp.Transform()); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	md := got[0].metadata
	if trace := md.Get("traceparent"); len(trace) != 1 || trace[0] != event().Traceparent {
		t.Errorf("traceparent %q", trace)
	}
	if agent := md.Get("user-agent"); len(agent) != 1 || !strings.HasPrefix(agent[0], "grapnel/test ") {
		t.Errorf("user-agent %q", agent)
	}
	if auth := md.Get("authorization"); len(auth) != 1 || auth[0] != "Bearer newest-token" {
		t.Errorf("authorization %q", auth)
	}
}

func TestNoPathIsEmpty(t *testing.T) {
	r := serve(t, nil)
	b := newBench(t)
	for _, uri := range []string{"grpc://" + r.addr, "grpc://" + r.addr + "/"} {
		resp, err := deliver(t, b.instance(uri, nil, nil))
		wantStatus(t, resp, err, http.StatusOK)
	}
	for _, a := range r.arrived() {
		if a.request.GetPath() != "" {
			t.Errorf("path %q, want none", a.request.GetPath())
		}
	}
}

func TestStatusesMeanWhatTheyMeanInHTTP(t *testing.T) {
	want := map[codes.Code]int{
		codes.OK: 200, codes.Canceled: 499, codes.Unknown: 500, codes.InvalidArgument: 400, codes.DeadlineExceeded: 504,
		codes.NotFound: 404, codes.AlreadyExists: 409, codes.PermissionDenied: 403, codes.ResourceExhausted: 429,
		codes.FailedPrecondition: 412, codes.Aborted: 409, codes.OutOfRange: 400, codes.Unimplemented: 501,
		codes.Internal: 500, codes.Unavailable: 503, codes.DataLoss: 500, codes.Unauthenticated: 401, codes.Code(77): 500,
	}
	var code codes.Code
	r := serve(t, func(context.Context, *receiverv1.DeliverRequest) error { return status.Error(code, "because") })
	inst := newBench(t).instance("grpc://"+r.addr, nil, nil)
	for c, httpStatus := range want {
		code = c
		t.Run(c.String(), func(t *testing.T) {
			resp, err := deliver(t, inst)
			wantStatus(t, resp, err, httpStatus)
			if c == codes.OK {
				return
			}
			if string(resp.Body) != "because" {
				t.Errorf("body %q, want the status message", resp.Body)
			}
			if diff := cmp.Diff([]plugin.Header{{Name: "grpc-status", Value: fmt.Sprint(int(c))}}, resp.Headers); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
		})
	}
	if n := len(r.arrived()); n != len(want) {
		t.Errorf("%d calls for %d attempts", n, len(want))
	}
	if n := r.connections(); n != 1 {
		t.Errorf("%d connections, want one for all", n)
	}
}

func TestStatusDetails(t *testing.T) {
	tests := map[string]struct {
		code   codes.Code
		detail proto.Message
		status int
		after  string
	}{
		"retry info, rounded up":      {codes.ResourceExhausted, retryIn(1500 * time.Millisecond), 429, "2"},
		"retry info of unavailable":   {codes.Unavailable, retryIn(time.Minute), 503, "60"},
		"retry info of nothing":       {codes.Unavailable, retryIn(0), 503, ""},
		"retry info in the past":      {codes.Unavailable, retryIn(-time.Minute), 503, ""},
		"retry info out of bounds":    {codes.Unavailable, &errdetails.RetryInfo{RetryDelay: &durationpb.Duration{Seconds: 1 << 62}}, 503, ""},
		"gone":                        {codes.NotFound, &errdetails.ErrorInfo{Reason: "GONE"}, 410, ""},
		"another reason":              {codes.NotFound, &errdetails.ErrorInfo{Reason: "gone fishing"}, 404, ""},
		"a detail nobody understands": {codes.Internal, &errdetails.DebugInfo{Detail: "x"}, 500, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := serve(t, func(context.Context, *receiverv1.DeliverRequest) error {
				st, err := status.New(test.code, "no").WithDetails(protoadapt.MessageV1Of(test.detail))
				if err != nil {
					t.Error(err)
				}
				return st.Err()
			})
			resp, err := deliver(t, newBench(t).instance("grpc://"+r.addr, nil, nil))
			wantStatus(t, resp, err, test.status)
			after := ""
			for _, h := range resp.Headers {
				if h.Name == "retry-after" {
					after = h.Value
				}
			}
			if after != test.after {
				t.Errorf("retry-after %q, want %q", after, test.after)
			}
		})
	}
}

func retryIn(d time.Duration) proto.Message {
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(d)}
}

func TestLongStatusMessageIsCut(t *testing.T) {
	r := serve(t, func(context.Context, *receiverv1.DeliverRequest) error {
		return status.Error(codes.Internal, strings.Repeat("x", 20_000))
	})
	resp, err := deliver(t, newBench(t).instance("grpc://"+r.addr, nil, nil))
	wantStatus(t, resp, err, 500)
	if len(resp.Body) != plugintest.MaxResponseBody || !resp.Truncated {
		t.Errorf("%d bytes kept, truncated %t; want %d, true", len(resp.Body), resp.Truncated, plugintest.MaxResponseBody)
	}
}

func TestBodyTooLargeForTheServer(t *testing.T) {
	r := serve(t, nil, grpc.MaxRecvMsgSize(4))
	resp, err := deliver(t, newBench(t).instance("grpc://"+r.addr, nil, nil))
	wantStatus(t, resp, err, http.StatusRequestEntityTooLarge)
}

func TestServiceThatIsNotThere(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(lis) })
	t.Cleanup(func() { s.Stop(); wg.Wait() })
	resp, err := deliver(t, newBench(t).instance("grpc://"+lis.Addr().String(), nil, nil))
	wantStatus(t, resp, err, http.StatusNotImplemented)
}
