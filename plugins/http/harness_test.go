package httpplugin

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// client is one way for a request to travel; every promise holds for all of them. The zero client speaks HTTP/1.1 over
// plain TCP.
type client struct {
	// tls is whom the receiver's certificate is by, nil for plain TCP.
	tls *authority
	// proxy is what the requests go through, nil for none.
	proxy *relay
	// http2 has the receiver choose HTTP/2.
	http2 bool
	roots *x509.CertPool
}

// direct is for what has no stack of its own to be tried on.
func direct(t *testing.T, test func(t *testing.T, c client)) {
	t.Helper()
	test(t, client{})
}

// everyStack runs the test over HTTP/1.1 on plain TCP, TLS, TLS to a proxy, and TLS to the receiver through TLS to a
// proxy.
func everyStack(t *testing.T, test func(t *testing.T, c client)) {
	t.Helper()
	ca := newAuthority(t)
	for _, stack := range []string{"plain", "tls", "tls proxy", "tls through tls proxy"} {
		t.Run(stack, func(t *testing.T) {
			c := client{roots: ca.roots}
			if strings.HasPrefix(stack, "tls") && stack != "tls proxy" {
				c.tls = ca
			}
			if strings.HasSuffix(stack, "proxy") {
				c.proxy = newRelay(t, "https", ca.config(t))
			}
			test(t, c)
		})
	}
}

// everyVersion is everyStack, and HTTP/2.
func everyVersion(t *testing.T, test func(t *testing.T, c client)) {
	t.Helper()
	everyStack(t, test)
	t.Run("h2", func(t *testing.T) {
		ca := newAuthority(t)
		test(t, client{tls: ca, roots: ca.roots, http2: true})
	})
}

func (c client) instance(t testing.TB, uri string, config any) *plugintest.Configured {
	t.Helper()
	return c.configure(t, config, plugin.Target{
		Method: http.MethodPost, URL: uri, UserAgent: "grapnel/test", Egress: loopbackAllowed(),
	})
}

func (c client) configure(t testing.TB, config any, target plugin.Target) *plugintest.Configured {
	t.Helper()
	if c.proxy != nil {
		all := map[string]any{"proxy": map[string]any{"url": c.proxy.url}}
		if given, ok := config.(map[string]any); ok {
			maps.Copy(all, given)
		} else if config != nil {
			t.Fatal("a config with a proxy must be a map")
		}
		config = all
	}
	return c.harness(t).Configure(plugintest.Instance{Kind: "http", Config: config, Target: target})
}

func (c client) harness(t testing.TB, more ...plugin.Kind) *plugintest.Harness {
	t.Helper()
	p := newPools()
	p.roots = c.roots
	h := plugintest.New(t, append(more, kind(p))...)
	t.Cleanup(p.closeIdle)
	return h
}

// serve is a receiver on the client's stack. prepare may be nil.
func (c client) serve(t *testing.T, prepare func(*httptest.Server), handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	srv := httptest.NewUnstartedServer(handler)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	if prepare != nil {
		prepare(srv)
	}
	if c.tls == nil {
		srv.Start()
	} else {
		srv.TLS, srv.EnableHTTP2 = c.tls.config(t), c.http2
		srv.StartTLS()
	}
	t.Cleanup(srv.Close)
	return srv
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
		pool.mu.Lock()
		for _, w := range pool.origins {
			if o := w.Value(); o != nil {
				o.h1.Drop()
				if o.h2 != nil {
					o.h2.Drop()
				}
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

// attempt has all the time it may need on a machine that is busy.
func attempt(t testing.TB, inst *plugintest.Configured) (*plugin.Response, error) {
	t.Helper()
	return inst.Attempt(within(t, time.Minute), event())
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
	return client{}.serveRaw(t, handle)
}

// serveRaw is the function of that name on the client's stack; with TLS the connection is a *secured.
func (c client) serveRaw(t *testing.T, handle func(n int, c net.Conn)) *rawServer {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &rawServer{url: "http://" + lis.Addr().String() + "/hook"}
	var config *tls.Config
	if c.tls != nil {
		s.url, config = "https"+strings.TrimPrefix(s.url, "http"), c.tls.config(t)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns = append(s.conns, conn)
			n := len(s.conns)
			s.mu.Unlock()
			wg.Go(func() {
				if config != nil {
					raw := &corked{Conn: conn}
					secure := tls.Server(raw, config)
					if secure.Handshake() != nil {
						return
					}
					conn = &secured{Conn: secure, raw: raw}
				}
				handle(n, conn)
			})
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

// secured is the receiver's end of TLS.
type secured struct {
	*tls.Conn
	raw *corked
}

// corked sends what is written to it in one piece when it is uncorked, as a busy network does.
type corked struct {
	net.Conn
	mu   sync.Mutex
	on   bool
	held []byte
}

func (c *corked) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.on {
		c.held = append(c.held, p...)
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// together has what write writes arrive in one piece, each of its writes a TLS record where there is TLS.
func together(conn net.Conn, write func(net.Conn)) {
	s, ok := conn.(*secured)
	if !ok {
		whole := &corked{Conn: conn, on: true}
		write(whole)
		_, _ = conn.Write(whole.held)
		return
	}
	s.raw.mu.Lock()
	s.raw.on = true
	s.raw.mu.Unlock()
	write(conn)
	s.raw.mu.Lock()
	defer s.raw.mu.Unlock()
	s.raw.on = false
	_ = s.raw.Conn.SetWriteDeadline(time.Time{}) // CloseWrite leaves one that has passed
	_, _ = s.raw.Conn.Write(s.raw.held)
	s.raw.held = nil
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
func (c client) always(t *testing.T, response string) *rawServer {
	return c.serveRaw(t, func(_ int, c net.Conn) {
		r := bufio.NewReader(c)
		for readRequest(r) {
			if _, err := io.WriteString(c, response); err != nil {
				return
			}
		}
	})
}

// once answers the first request of a connection with the bytes and closes.
func once(t *testing.T, response string) *rawServer { return client{}.once(t, response) }

func (c client) once(t *testing.T, response string) *rawServer {
	return c.serveRaw(t, func(_ int, c net.Conn) {
		if readRequest(bufio.NewReader(c)) {
			_, _ = io.WriteString(c, response)
		}
		_ = c.Close()
	})
}

// reset closes a connection with RST.
func reset(c net.Conn) {
	if s, ok := c.(*secured); ok {
		c = s.raw.Conn
	}
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.Close()
}
