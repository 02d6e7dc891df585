package httpplugin

import (
	"bufio"
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// client is one of the two ways a request can travel; every promise holds for both.
type client struct {
	direct bool
	roots  *x509.CertPool
}

func bothClients(t *testing.T, test func(t *testing.T, c client)) {
	t.Helper()
	t.Run("direct", func(t *testing.T) { test(t, client{direct: true}) })
	t.Run("net/http", func(t *testing.T) { test(t, client{}) })
}

func (c client) instance(t testing.TB, uri string, config any) *plugintest.Configured {
	t.Helper()
	return c.configure(t, config, plugin.Target{
		Method: http.MethodPost, URL: uri, UserAgent: "grapnel/test", Egress: loopbackAllowed(),
	})
}

func (c client) configure(t testing.TB, config any, target plugin.Target) *plugintest.Configured {
	t.Helper()
	return c.harness(t).Configure(plugintest.Instance{Kind: "http", Config: config, Target: target})
}

func (c client) harness(t testing.TB, more ...plugin.Kind) *plugintest.Harness {
	t.Helper()
	p := newPools(c.direct)
	p.roots = c.roots
	h := plugintest.New(t, append(more, kind(p))...)
	t.Cleanup(p.closeIdle)
	return h
}

// secret is an instance on loopback with secrets.
func secret(uri string, config any, secrets map[string][]string) plugintest.Instance {
	return plugintest.Instance{Kind: "http", Config: config, Secrets: secrets, Target: plugin.Target{
		Method: http.MethodPost, URL: uri, UserAgent: "grapnel/test", Egress: loopbackAllowed(),
	}}
}

// closeIdle lets test servers stop.
func (p *pools) closeIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, kept := range p.by {
		pool := kept.Value()
		if pool == nil {
			continue
		}
		pool.transport.CloseIdleConnections()
		pool.mu.Lock()
		for _, w := range pool.origins {
			if o := w.Value(); o != nil {
				o.mu.Lock()
				for _, c := range o.idle {
					_ = c.Close()
				}
				o.idle = nil
				o.mu.Unlock()
			}
		}
		pool.mu.Unlock()
	}
}

func loopbackAllowed() *plugin.Egress {
	return plugin.NewEgress([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")})
}

func event() plugin.Request {
	return plugin.Request{
		MessageID: "evt_1", Body: []byte(`{"n":1}`), Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		Headers: []plugin.Header{{Name: "content-type", Value: "application/json"}, {Name: "webhook-id", Value: "evt_1"}},
	}
}

// within is a context that ends after d.
func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func attempt(t testing.TB, inst *plugintest.Configured) (*plugin.Response, error) {
	t.Helper()
	return inst.Attempt(within(t, 10*time.Second), event())
}

// wantFailure checks what an attempt without an answer says.
func wantFailure(t testing.TB, err error, code string, state plugin.WireState) *plugin.Failure {
	t.Helper()
	var f *plugin.Failure
	if !errors.As(err, &f) {
		t.Fatalf("error %v, want a failure with code %s", err, code)
	}
	if f.Code != code || f.WireState != state {
		t.Errorf("failure %+v, want code %s and wire state %d", *f, code, state)
	}
	return f
}

// rawServer answers connections byte by byte.
type rawServer struct {
	url string

	mu    sync.Mutex
	conns []net.Conn
}

// serveRaw calls handle for each connection, with its number from 1; the connection stays open until the
// test ends unless handle closes it.
func serveRaw(t *testing.T, handle func(n int, c net.Conn)) *rawServer {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &rawServer{url: "http://" + lis.Addr().String() + "/hook"}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns = append(s.conns, c)
			n := len(s.conns)
			s.mu.Unlock()
			wg.Go(func() { handle(n, c) })
		}
	})
	t.Cleanup(func() {
		_ = lis.Close()
		s.mu.Lock()
		for _, c := range s.conns {
			_ = c.Close()
		}
		s.mu.Unlock()
		wg.Wait()
	})
	return s
}

func (s *rawServer) accepted() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// readRequest takes one whole request off the connection; false when there is none.
func readRequest(r *bufio.Reader) bool {
	req, err := http.ReadRequest(r)
	if err != nil {
		return false
	}
	_, err = io.Copy(io.Discard, req.Body)
	return err == nil
}

// always answers every request of a connection with the same bytes.
func always(t *testing.T, response string) *rawServer {
	return serveRaw(t, func(_ int, c net.Conn) {
		r := bufio.NewReader(c)
		for readRequest(r) {
			if _, err := io.WriteString(c, response); err != nil {
				return
			}
		}
	})
}

// once answers the first request of a connection with the bytes and closes.
func once(t *testing.T, response string) *rawServer {
	return serveRaw(t, func(_ int, c net.Conn) {
		if readRequest(bufio.NewReader(c)) {
			_, _ = io.WriteString(c, response)
		}
		_ = c.Close()
	})
}

// reset closes a connection with RST.
func reset(c net.Conn) {
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.Close()
}
