package httpplugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"
	"weak"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	maxHeaderBytes = 64 << 10
	// maxIdlePerHost is above any max_in_flight worth setting: a limit below what is in flight would
	// close and open connections all the time.
	maxIdlePerHost = 4096
	maxIdle        = 8192
	idleTimeout    = time.Minute
	// maxAge makes long-lived connections follow changes of DNS and of the egress policy.
	maxAge          = 10 * time.Minute
	http2ReadIdle   = 15 * time.Second
	http2PingAnswer = 10 * time.Second
	tlsSessions     = 1024
	// maxKeptBuffer keeps rare large requests from making every buffer large.
	maxKeptBuffer = 16 << 10
)

// pools are the pools of a process, by settings.
type pools struct {
	// direct allows the own HTTP/1.1 client; without it all goes over net/http.
	direct bool
	// roots replaces the system's certificate authorities when not nil; set in tests.
	roots *x509.CertPool

	mu sync.Mutex
	by map[settings]*pool
}

func newPools(direct bool) *pools { return &pools{direct: direct, by: map[settings]*pool{}} }

func (p *pools) get(s settings, egress *plugin.Egress) *pool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if have := p.by[s]; have != nil {
		return have
	}
	made := newPool(s, egress, p.direct, p.roots)
	p.by[s] = made
	return made
}

// pool holds the connections of all instances with equal settings.
type pool struct {
	settings  settings
	direct    bool
	dialer    net.Dialer
	tls       *tls.Config
	transport *http.Transport
	// buffers hold requests while they are written.
	buffers sync.Pool

	mu sync.Mutex
	// origins are kept alive by the instances that use them and, while connections are idle, by their
	// timers.
	origins map[string]weak.Pointer[origin]
	sweepAt int
}

func newPool(s settings, egress *plugin.Egress, direct bool, roots *x509.CertPool) *pool {
	p := &pool{
		settings: s, direct: direct,
		dialer:  net.Dialer{Timeout: s.connect, ControlContext: egress.Control},
		origins: map[string]weak.Pointer[origin]{}, sweepAt: 1024,
	}
	p.buffers.New = func() any { b := make([]byte, 0, 2048); return &b }
	protocols := []string{"http/1.1"}
	if s.http2 {
		protocols = []string{"h2", "http/1.1"}
	}
	p.tls = &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: protocols, RootCAs: roots,
		ClientSessionCache: tls.NewLRUClientSessionCache(tlsSessions),
	}
	p.transport = &http.Transport{
		Proxy:                  nil, // the egress check would see the proxy only
		DialContext:            p.dial,
		DialTLSContext:         func(ctx context.Context, _, addr string) (net.Conn, error) { return p.dialTLS(ctx, addr) },
		ForceAttemptHTTP2:      s.http2,
		DisableCompression:     true,
		ResponseHeaderTimeout:  s.header,
		MaxResponseHeaderBytes: maxHeaderBytes,
		MaxIdleConns:           maxIdle,
		MaxIdleConnsPerHost:    maxIdlePerHost,
		IdleConnTimeout:        idleTimeout,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: http2ReadIdle, PingTimeout: http2PingAnswer},
	}
	return p
}

// origin is where connections to the target's scheme, host and port are kept.
func (p *pool) origin(t *target) *origin {
	key := t.scheme + "://" + t.addr()
	p.mu.Lock()
	defer p.mu.Unlock()
	if o := p.origins[key].Value(); o != nil {
		return o
	}
	if len(p.origins) >= p.sweepAt {
		for k, w := range p.origins {
			if w.Value() == nil {
				delete(p.origins, k)
			}
		}
		p.sweepAt = max(1024, 2*len(p.origins))
	}
	o := &origin{pool: p, addr: t.addr(), secure: t.scheme == "https"}
	p.origins[key] = weak.Make(o)
	return o
}

// dial looks the name up and connects; the dialer's ControlContext asks the egress policy about each
// address just before it is connected to.
func (p *pool) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	conn, err := p.dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		code := plugin.CodeConnect
		if errors.As(err, new(*net.DNSError)) {
			code = plugin.CodeDNS
		}
		return nil, &dialError{code: code, err: err}
	}
	return conn, nil
}

func (p *pool) dialTLS(ctx context.Context, addr string) (*tls.Conn, error) {
	raw, err := p.dial(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		_ = raw.Close()
		return nil, &dialError{code: plugin.CodeConnect, err: err}
	}
	config := p.tls.Clone()
	config.ServerName = host
	conn := tls.Client(raw, config)
	handshake, cancel := context.WithTimeout(ctx, p.settings.tls)
	defer cancel()
	if err := conn.HandshakeContext(handshake); err != nil {
		_ = raw.Close()
		return nil, &dialError{code: plugin.CodeTLS, err: err}
	}
	return conn, nil
}
