package grpcplugin

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/grapnel/grapnel/plugins/internal/outbound/certtest"
	receiverv1 "github.com/grapnel/grapnel/proto/grapnel/receiver/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// stuck is a receiver that reads calls and never answers, until the test ends.
func stuck(t testing.TB) (*receiver, <-chan struct{}) {
	t.Helper()
	over, reached := make(chan struct{}), make(chan struct{}, 1000)
	r := serve(t, func(context.Context, *receiverv1.DeliverRequest) error {
		reached <- struct{}{}
		<-over
		return nil
	})
	t.Cleanup(func() { close(over) })
	return r, reached
}

func TestSlowReceiverMayHaveTheCall(t *testing.T) {
	r, _ := stuck(t)
	_, err := deliverWithin(t, newBench(t).instance("grpc://"+r.addr, nil, nil), 200*time.Millisecond)
	wantFailure(t, err, endpoint(plugin.CodeTimeout, "no answer in time", plugin.MaybeSent))
}

func TestReceiverThatKeepsTheDeadlineTimesOutAllTheSame(t *testing.T) {
	r := serve(t, func(ctx context.Context, _ *receiverv1.DeliverRequest) error {
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	})
	_, err := deliverWithin(t, newBench(t).instance("grpc://"+r.addr, nil, nil), 200*time.Millisecond)
	f, ok := err.(*plugin.Failure)
	if !ok || f.Code != plugin.CodeTimeout || f.WireState == plugin.NotSent {
		t.Errorf("%#v, want a timeout that may have been sent", err)
	}
}

func TestCancelledByTheHost(t *testing.T) {
	r, reached := stuck(t)
	inst := newBench(t).instance("grpc://"+r.addr, nil, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		<-reached
		cancel()
	})
	_, err := inst.Attempt(ctx, event())
	wg.Wait()
	wantFailure(t, err, plugin.Failure{
		Source: plugin.SourcePlugin, Code: plugin.CodeCancelled, Message: "cancelled by the host", WireState: plugin.MaybeSent,
	})
}

func TestKilledMidCall(t *testing.T) {
	r, reached := stuck(t)
	b := newBench(t)
	inst := b.instance("grpc://"+r.addr, nil, nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		<-reached
		r.server.Stop()
	})
	_, err := deliver(t, inst)
	wg.Wait()
	wantFailure(t, err, endpoint(plugin.CodeReset, "the receiver closed the connection without an answer", plugin.MaybeSent))
	_, err = deliver(t, inst)
	wantFailure(t, err, endpoint(plugin.CodeConnect, "connection refused", plugin.NotSent))
	back := serveAt(t, r.addr, nil)
	resp, err := deliver(t, inst) // at once: no backoff of gRPC's between
	wantStatus(t, resp, err, 200)
	if n := len(back.arrived()); n != 1 {
		t.Errorf("%d calls arrived after the restart, want 1", n)
	}
}

func TestServerThatRetiresConnectionsLosesNoCall(t *testing.T) {
	r := serve(t, nil, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 50 * time.Millisecond, MaxConnectionAgeGrace: time.Second}))
	inst := newBench(t).instance("grpc://"+r.addr, nil, nil)
	sent := 0
	for deadline := time.Now().Add(10 * time.Second); r.connections() < 4; sent++ {
		if time.Now().After(deadline) {
			t.Fatal("the server retired no connection")
		}
		resp, err := deliver(t, inst)
		wantStatus(t, resp, err, 200)
	}
	if got := len(r.arrived()); got != sent {
		t.Errorf("%d calls arrived of %d", got, sent)
	}
}

func TestNoMoreCallsOnTheConnection(t *testing.T) {
	over, reached := make(chan struct{}), make(chan struct{}, 10)
	r := serve(t, func(context.Context, *receiverv1.DeliverRequest) error {
		reached <- struct{}{}
		<-over
		return nil
	}, grpc.MaxConcurrentStreams(1))
	inst := newBench(t).instance("grpc://"+r.addr, nil, nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		if resp, err := deliver(t, inst); err != nil || resp.Status != 200 {
			t.Errorf("response %v, error %v", resp, err)
		}
	})
	<-reached
	_, err := deliverWithin(t, inst, 100*time.Millisecond)
	close(over)
	wg.Wait()
	wantFailure(t, err, endpoint(plugin.CodeTimeout, "the receiver took no more calls on the connection", plugin.NotSent))
}

func TestManyAttemptsShareOneConnection(t *testing.T) {
	r := serve(t, nil)
	b := newBench(t)
	one, other := b.instance("grpc://"+r.addr+"/a", nil, nil), b.instance("grpc://"+r.addr+"/b", nil, nil)
	alone := b.instance("grpc://"+r.addr, nil, map[string][]string{"token": {"another-credential"}})
	var wg sync.WaitGroup
	for range 50 {
		for _, inst := range []*plugintest.Configured{one, other, alone} {
			wg.Go(func() {
				if resp, err := deliver(t, inst); err != nil || resp.Status != 200 {
					t.Errorf("response %v, error %v", resp, err)
				}
			})
		}
	}
	wg.Wait()
	if n := r.connections(); n != 2 {
		t.Errorf("%d connections, want one per credential, 2", n)
	}
}

func TestNoWayToTheReceiver(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free := lis.Addr().String()
	_ = lis.Close()
	tests := map[string]struct {
		uri  string
		want plugin.Failure
	}{
		"refused":      {"grpc://" + free, endpoint(plugin.CodeConnect, "connection refused", plugin.NotSent)},
		"no such name": {"grpc://no-such-name.invalid:8443", endpoint(plugin.CodeDNS, "the host name does not exist", plugin.NotSent)},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := deliver(t, newBench(t).instance(test.uri, nil, nil))
			if f, ok := err.(*plugin.Failure); ok && f.Code == plugin.CodeDNS && f.Message != test.want.Message {
				f.Message = test.want.Message // without a resolver the name cannot even be looked up
			}
			wantFailure(t, err, test.want)
		})
	}
}

func TestEgressIsAskedAboutTheResolvedAddress(t *testing.T) {
	r := serve(t, nil)
	_, port, err := net.SplitHostPort(r.addr)
	if err != nil {
		t.Fatal(err)
	}
	inst := newBench(t).Configure(plugintest.Instance{Kind: "grpc", Target: plugin.Target{
		URL: "grpc://localhost:" + port, Egress: plugin.NewEgress(nil),
	}})
	_, err = deliver(t, inst)
	wantFailure(t, err, plugin.Failure{
		Source: plugin.SourceEndpoint, Code: plugin.CodeDNS, Message: "the host name does not exist, or egress policy forbids every address it has",
		WireState: plugin.NotSent,
	})
	if n := r.connections(); n != 0 {
		t.Errorf("%d connections in spite of the policy", n)
	}
}

func TestProxyOfTheEnvironmentIsNotUsed(t *testing.T) {
	r := serve(t, nil)
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"} {
		t.Setenv(name, "http://127.0.0.1:1")
	}
	resp, err := deliver(t, newBench(t).instance("grpc://"+r.addr, nil, nil))
	wantStatus(t, resp, err, 200)
}

// serveRaw answers each connection with the bytes, once something was read, and closes it.
func serveRaw(t testing.TB, answer string) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			if _, err := bufio.NewReader(c).ReadByte(); err == nil {
				_, _ = io.WriteString(c, answer)
			}
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = lis.Close(); wg.Wait() })
	return lis.Addr().String()
}

func TestReceiverThatSpeaksSomethingElse(t *testing.T) {
	http1 := serveRaw(t, "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"+strings.Repeat("x", 100))
	_, err := deliver(t, newBench(t).instance("grpc://"+http1, nil, nil))
	f, ok := err.(*plugin.Failure)
	if !ok || f.Source != plugin.SourceEndpoint || f.WireState != plugin.NotSent {
		t.Errorf("%#v, want an endpoint failure before anything was sent", err)
	}
	_, err = deliver(t, newBench(t).instance("grpcs://"+http1, nil, nil))
	wantFailure(t, err, endpoint(plugin.CodeTLS, "the receiver does not speak TLS on this port", plugin.NotSent))
}

func TestReceiverThatNeverBegins(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts, nobody reads
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	b := newBench(t)
	config := map[string]any{"connect_timeout": "100ms"}
	_, err = deliver(t, b.instance("grpc://"+lis.Addr().String(), config, nil))
	wantFailure(t, err, endpoint(plugin.CodeConnect, "the receiver did not begin HTTP/2 in time", plugin.NotSent))
	_, err = deliver(t, b.instance("grpcs://"+lis.Addr().String(), config, nil))
	wantFailure(t, err, endpoint(plugin.CodeTLS, "the TLS handshake was not done in time", plugin.NotSent))
	_, err = deliverWithin(t, b.instance("grpc://"+lis.Addr().String(), nil, nil), 100*time.Millisecond)
	wantFailure(t, err, endpoint(plugin.CodeTimeout, "no connection before the attempt's time was up", plugin.NotSent))
}

// silence stands between the transport and a receiver. After begin, what comes back on its first
// connection is lost, as behind a firewall that has forgotten the connection.
func silence(t testing.TB, to string) (addr string, begin func()) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var silent atomic.Bool
	var conns sync.WaitGroup
	conns.Go(func() {
		for first := true; ; first = false {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", to)
			if err != nil {
				_ = c.Close()
				continue
			}
			conns.Go(func() { _, _ = io.Copy(s, c); _ = s.Close() })
			conns.Go(func() {
				defer func() { _ = c.Close() }()
				buffer := make([]byte, 4096)
				for {
					n, err := s.Read(buffer)
					if err != nil {
						return
					}
					if !first || !silent.Load() {
						_, _ = c.Write(buffer[:n])
					}
				}
			})
		}
	})
	t.Cleanup(func() { _ = lis.Close(); conns.Wait() })
	return lis.Addr().String(), func() { silent.Store(true) }
}

func TestConnectionThatFellSilentIsReplaced(t *testing.T) {
	r := serve(t, nil)
	addr, begin := silence(t, r.addr)
	inst := newBench(t).instance("grpc://"+addr, nil, nil)
	resp, err := deliver(t, inst)
	wantStatus(t, resp, err, 200)
	begin()
	_, err = deliverWithin(t, inst, 200*time.Millisecond)
	wantFailure(t, err, endpoint(plugin.CodeTimeout, "no answer in time", plugin.MaybeSent))
	resp, err = deliver(t, inst)
	wantStatus(t, resp, err, 200)
	if n := r.connections(); n != 2 {
		t.Errorf("%d connections, want the silent one and another", n)
	}
}

func TestTLS(t *testing.T) {
	ca, foreign := certtest.New(t), certtest.New(t)
	plain, mutual := serveTLS(t, ca, false), serveTLS(t, ca, true)
	mine, stranger := ca.Issue(), foreign.Issue()
	named := map[string]any{"tls": map[string]any{"server_name": "hooks.example.com"}}
	tests := map[string]struct {
		to      *receiver
		config  any
		secrets map[string][]string
		failure string // "" wants a delivery
	}{
		"own authority":          {plain, nil, map[string][]string{"ca": {ca.PEM}}, ""},
		"authority in rotation":  {plain, nil, map[string][]string{"ca": {foreign.PEM, ca.PEM}}, ""},
		"authorities in one":     {plain, nil, map[string][]string{"ca": {foreign.PEM + ca.PEM}}, ""},
		"server name":            {plain, named, map[string][]string{"ca": {ca.PEM}}, ""},
		"unknown authority":      {plain, nil, nil, "the certificate is by an unknown authority"},
		"wrong name":             {plain, map[string]any{"tls": map[string]any{"server_name": "x.example.com"}}, map[string][]string{"ca": {ca.PEM}}, "the certificate is not valid for the host"},
		"client certificate":     {mutual, nil, map[string][]string{"ca": {ca.PEM}, "client_certificate": {mine.Cert + mine.Key}}, ""},
		"no client certificate":  {mutual, nil, map[string][]string{"ca": {ca.PEM}}, "the receiver wants a client certificate; fill the slot client_certificate with one that it trusts"},
		"wrong client authority": {mutual, nil, map[string][]string{"ca": {ca.PEM}, "client_certificate": {stranger.Cert + stranger.Key}}, "the receiver refused the client certificate"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			resp, err := deliver(t, newBench(t).instance("grpcs://"+test.to.addr, test.config, test.secrets))
			if test.failure == "" {
				wantStatus(t, resp, err, 200)
				return
			}
			f, ok := err.(*plugin.Failure)
			if !ok || f.Code != plugin.CodeTLS || f.WireState != plugin.NotSent || !strings.HasPrefix(f.Message, test.failure) {
				t.Errorf("%#v, want a tls failure: %s", err, test.failure)
			}
		})
	}
	calls := plain.arrived()
	if len(calls) != 4 {
		t.Fatalf("%d calls arrived, want 4", len(calls))
	}
	names := map[string]bool{}
	for _, c := range calls {
		for _, authority := range c.metadata.Get(":authority") {
			names[authority] = true
		}
	}
	if !names["hooks.example.com"] || !names[plain.addr] {
		t.Errorf("authorities %v, want the URI's host and the configured name", names)
	}
}

func TestAnswersOnlyTheReceiverItselfGave(t *testing.T) {
	// A status in the very shape of what gRPC makes up, but sent: an answer, and so no failure.
	r := serve(t, func(context.Context, *receiverv1.DeliverRequest) error {
		return status.Error(codes.Unavailable, "error reading from server: EOF")
	})
	resp, err := deliver(t, newBench(t).instance("grpc://"+r.addr, nil, nil))
	wantStatus(t, resp, err, 503)
}

// TestFloodOfFrames: a receiver that sends frames without end instead of an answer loses its connection.
func TestFloodOfFrames(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := lis.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		go func() { _, _ = io.Copy(io.Discard, conn) }()
		settings := []byte{0, 0, 0, 4, 0, 0, 0, 0, 0}
		ping := append([]byte{0, 0, 8, 6, 1, 0, 0, 0, 0}, make([]byte, 8)...) // an answer to one that nobody sent
		for out := append(settings, ping...); err == nil; out = bytes.Repeat(ping, 1000) {
			_, err = conn.Write(out)
		}
	}()
	begun := time.Now()
	_, err = deliverWithin(t, newBench(t).instance("grpc://"+lis.Addr().String(), nil, nil), time.Minute)
	var f *plugin.Failure
	if !errors.As(err, &f) || f.Source != plugin.SourceEndpoint || f.Code == plugin.CodeTimeout {
		t.Fatalf("%v after %v, want a failure of the receiver", err, time.Since(begun))
	}
	<-ended
}
