package grpcplugin

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/grapnel/grapnel/plugins/internal/outbound/certtest"
	receiverv1 "github.com/grapnel/grapnel/proto/grapnel/receiver/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// receiver is a real gRPC server that does what a test tells it.
type receiver struct {
	receiverv1.UnimplementedReceiverServiceServer
	addr   string
	server *grpc.Server
	answer func(context.Context, *receiverv1.DeliverRequest) error

	mu    sync.Mutex
	calls []arrival
	conns int
}

type arrival struct {
	request  *receiverv1.DeliverRequest
	metadata metadata.MD
}

func (r *receiver) Deliver(ctx context.Context, req *receiverv1.DeliverRequest) (*receiverv1.DeliverResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	r.mu.Lock()
	r.calls = append(r.calls, arrival{req, md})
	r.mu.Unlock()
	if r.answer != nil {
		if err := r.answer(ctx, req); err != nil {
			return nil, err
		}
	}
	return &receiverv1.DeliverResponse{}, nil
}

func (r *receiver) arrived() []arrival {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]arrival(nil), r.calls...)
}

// connections counts what was accepted so far.
func (r *receiver) connections() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conns
}

func (r *receiver) count(lis net.Listener) net.Listener { return &countingListener{lis, r} }

type countingListener struct {
	net.Listener
	r *receiver
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.r.mu.Lock()
		l.r.conns++
		l.r.mu.Unlock()
	}
	return c, err
}

func serve(t testing.TB, answer func(context.Context, *receiverv1.DeliverRequest) error, opts ...grpc.ServerOption) *receiver {
	t.Helper()
	return serveAt(t, "127.0.0.1:0", answer, opts...)
}

func serveAt(t testing.TB, addr string, answer func(context.Context, *receiverv1.DeliverRequest) error, opts ...grpc.ServerOption) *receiver {
	t.Helper()
	lis, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{addr: lis.Addr().String(), server: grpc.NewServer(opts...), answer: answer}
	receiverv1.RegisterReceiverServiceServer(r.server, r)
	var wg sync.WaitGroup
	wg.Go(func() { _ = r.server.Serve(r.count(lis)) })
	t.Cleanup(func() {
		r.server.Stop()
		wg.Wait()
	})
	return r
}

// serveTLS asks clients for a certificate by the authority when mutual.
func serveTLS(t testing.TB, ca *certtest.Authority, mutual bool) *receiver {
	t.Helper()
	config := &tls.Config{Certificates: []tls.Certificate{ca.Issue("hooks.example.com").Pair()}}
	if mutual {
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, ca.Pool()
	}
	return serve(t, nil, grpc.Creds(credentials.NewTLS(config)))
}

// bench is one process's transport.
type bench struct {
	t testing.TB
	*plugintest.Harness
}

func newBench(t testing.TB) *bench {
	t.Helper()
	pool := &links{}
	t.Cleanup(pool.Close)
	return &bench{t, plugintest.New(t, kind(pool))}
}

func (b *bench) instance(uri string, config any, secrets map[string][]string) *plugintest.Configured {
	b.t.Helper()
	return b.Configure(plugintest.Instance{Kind: "grpc", Config: config, Secrets: secrets, Target: plugin.Target{
		URL: uri, Egress: loopback(),
	}})
}

func loopback() *plugin.Egress {
	return plugin.NewEgress([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")})
}

func event() plugin.Request {
	return plugin.Request{
		MessageID: "evt_1", Body: []byte("{\"n\":1}\x00\xff"), Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		Headers: []plugin.Header{
			{Name: "content-type", Value: "application/json"}, {Name: "webhook-id", Value: "evt_1"},
			{Name: "x-twice", Value: "a"}, {Name: "x-twice", Value: "b"},
		},
	}
}

func deliver(t testing.TB, inst *plugintest.Configured) (*plugin.Response, error) {
	t.Helper()
	return deliverWithin(t, inst, 10*time.Second)
}

func deliverWithin(t testing.TB, inst *plugintest.Configured, d time.Duration) (*plugin.Response, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	return inst.Attempt(ctx, event())
}

func wantStatus(t testing.TB, resp *plugin.Response, err error, status int) {
	t.Helper()
	if err != nil {
		t.Fatalf("error %v, want status %d", err, status)
	}
	if resp.Status != status {
		t.Fatalf("status %d (%s), want %d", resp.Status, resp.Body, status)
	}
}

func wantFailure(t testing.TB, err error, want plugin.Failure) {
	t.Helper()
	var f *plugin.Failure
	if !errors.As(err, &f) {
		t.Fatalf("error %v, want a failure %+v", err, want)
	}
	got := *f
	got.Peer = ""
	if got != want {
		t.Errorf("failure %+v, want %+v", got, want)
	}
}

func endpoint(code, message string, state plugin.WireState) plugin.Failure {
	return plugin.Failure{Source: plugin.SourceEndpoint, Code: code, Message: message, WireState: state}
}
