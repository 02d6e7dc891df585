package httpplugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"maps"
	"net"
	"net/http"
	"sync"
	"time"
	"weak"

	"github.com/grapnel/grapnel/plugins/oauth2"
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

// settings are what instances must have in common to share connections.
type settings struct {
	connect, tls, header time.Duration
	http2                bool
	egress               string
	tls13                bool
	serverName           string
	proxy                Proxy
	// credentials is a digest of all that is secret, and of what it is used for; nothing can be read from it.
	credentials string
}

func settingsOf(c Config, egress *plugin.Egress) settings {
	return settings{
		connect: c.ConnectTimeout.Std(), tls: c.TLSTimeout.Std(), header: c.HeaderTimeout.Std(),
		http2: c.HTTP2, egress: egress.String(),
		tls13: c.TLS.MinVersion == "1.3", serverName: c.TLS.ServerName, proxy: c.Proxy, credentials: digest(c),
	}
}

// pools are the pools of a process, by settings.
type pools struct {
	// direct allows the own HTTP/1.1 client; without it all goes over net/http.
	direct bool
	// roots replaces the system's certificate authorities when not nil; set in tests.
	roots *x509.CertPool

	mu sync.Mutex
	// by holds pools that are kept alive by the instances that use them and, while connections are idle, by
	// those: credentials come and go.
	by      map[settings]weak.Pointer[pool]
	sweepAt int
}

func newPools(direct bool) *pools {
	return &pools{direct: direct, by: map[settings]weak.Pointer[pool]{}, sweepAt: 256}
}

// get returns the pool for the config's settings and credentials.
func (p *pools) get(c Config, egress *plugin.Egress) (*pool, error) {
	s := settingsOf(c, egress)
	p.mu.Lock()
	defer p.mu.Unlock()
	if have := p.by[s].Value(); have != nil {
		return have, nil
	}
	if len(p.by) >= p.sweepAt {
		maps.DeleteFunc(p.by, func(_ settings, w weak.Pointer[pool]) bool { return w.Value() == nil })
		p.sweepAt = max(256, 2*len(p.by))
	}
	made, err := newPool(c, s, egress, p.direct, p.roots)
	if err != nil {
		return nil, err
	}
	p.by[s] = weak.Make(made)
	return made, nil
}

// pool holds the connections of all instances with equal settings and credentials.
type pool struct {
	settings  settings
	direct    bool
	dialer    net.Dialer
	egress    *plugin.Egress
	via       *proxy // nil without one
	tls       *tls.Config
	transport *http.Transport
	// certificate is what receivers that ask for one are shown, client its leaf, or nil when there is none.
	certificate *tls.Certificate
	client      *x509.Certificate
	// tokens is where oauth2's come from; nil with other auth.
	tokens *oauth2.Source
	// buffers hold requests while they are written.
	buffers sync.Pool

	mu sync.Mutex
	// origins are kept alive by the instances that use them and, while connections are idle, by their
	// timers.
	origins map[string]weak.Pointer[origin]
	sweepAt int
}

func newPool(c Config, s settings, egress *plugin.Egress, direct bool, roots *x509.CertPool) (*pool, error) {
	p := &pool{
		settings: s, direct: direct, egress: egress,
		dialer:  net.Dialer{Timeout: s.connect, ControlContext: egress.Control},
		origins: map[string]weak.Pointer[origin]{}, sweepAt: 1024,
	}
	p.buffers.New = func() any { b := make([]byte, 0, 2048); return &b }
	certificate, err := clientCertificate(c)
	if err != nil {
		return nil, err
	}
	trust, err := newTrust(c, roots)
	if err != nil {
		return nil, err
	}
	if p.via, err = newProxy(c); err != nil {
		return nil, err
	}
	if p.via != nil && p.via.scheme == "https" {
		p.via.tls = &tls.Config{
			MinVersion: tls.VersionTLS12, ServerName: p.via.hostname, RootCAs: trust.others, NextProtos: []string{"http/1.1"},
		}
	}
	p.tls = s.newTLS(trust.receiver)
	p.certificate = &tls.Certificate{} // which shows none
	if certificate != nil {
		p.certificate, p.client = certificate, certificate.Leaf
	}
	p.transport = &http.Transport{
		Proxy:       nil, // the egress check would see the proxy only
		DialContext: p.dial,
		DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			conn, asked, err := p.dialTLS(ctx, addr)
			if err != nil {
				return nil, err
			}
			p.asks(addr, asked)
			return conn, nil
		},
		ForceAttemptHTTP2:      s.http2,
		DisableCompression:     true,
		ResponseHeaderTimeout:  s.header,
		MaxResponseHeaderBytes: maxHeaderBytes,
		MaxIdleConns:           maxIdle,
		MaxIdleConnsPerHost:    maxIdlePerHost,
		IdleConnTimeout:        idleTimeout,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: http2ReadIdle, PingTimeout: http2PingAnswer},
	}
	if c.Auth.Type == authOAuth2 {
		p.tokens, err = oauth2.New(*tokenConfig(c), p.tokenClient(c, trust.others))
	}
	return p, err
}

func (s settings) newTLS(roots *x509.CertPool) *tls.Config {
	out := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, RootCAs: roots,
		ClientSessionCache: tls.NewLRUClientSessionCache(tlsSessions),
	}
	if s.http2 {
		out.NextProtos = []string{"h2", "http/1.1"}
	}
	if s.tls13 {
		out.MinVersion = tls.VersionTLS13
	}
	return out
}

// tokenClient is for the token endpoint: the same egress policy, proxy and timeouts, and a client
// certificate only where that is how the client authenticates.
func (p *pool) tokenClient(c Config, roots *x509.CertPool) *http.Client {
	config := &tls.Config{MinVersion: p.tls.MinVersion, RootCAs: roots}
	if c.Auth.ClientAuth == oauth2.TLSClientAuth {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.certificate, nil }
	}
	return &http.Client{Transport: &http.Transport{
		Proxy: nil,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := p.dial(ctx, network, addr)
			if err != nil {
				return nil, failure(ctx, err, plugin.NotSent, "")
			}
			return conn, nil
		},
		TLSClientConfig: config, TLSHandshakeTimeout: p.settings.tls, ForceAttemptHTTP2: true,
		ResponseHeaderTimeout: p.settings.header, MaxResponseHeaderBytes: maxHeaderBytes, IdleConnTimeout: idleTimeout,
	}}
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

// asks notes whether the receiver at addr wants a client certificate.
func (p *pool) asks(addr string, asked bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if o := p.origins["https://"+addr].Value(); o != nil {
		o.asked.Store(asked)
	}
}

// dial looks the name up and connects; the dialer's ControlContext asks the egress policy about each
// address just before it is connected to. With a proxy it is the proxy that is connected to, and the policy
// is asked about both.
func (p *pool) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	if p.via != nil {
		bounded, cancel := context.WithTimeout(ctx, p.settings.connect)
		defer cancel()
		return p.via.dial(bounded, &p.dialer, p.egress, addr)
	}
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

// dialTLS also says whether the receiver has asked for a client certificate.
func (p *pool) dialTLS(ctx context.Context, addr string) (conn *tls.Conn, asked bool, err error) {
	raw, err := p.dial(ctx, "tcp", addr)
	if err != nil {
		return nil, false, err
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		_ = raw.Close()
		return nil, false, &dialError{code: plugin.CodeConnect, err: err}
	}
	config := p.tls.Clone()
	// A list of certificates would not do: crypto/tls shows none of those if the receiver names other
	// authorities, and the receiver would then complain of an absent one.
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		asked = true // in the handshake, which is over when this function returns
		return p.certificate, nil
	}
	if config.ServerName = host; p.settings.serverName != "" {
		config.ServerName = p.settings.serverName
	}
	conn = tls.Client(raw, config)
	handshake, cancel := context.WithTimeout(ctx, p.settings.tls)
	defer cancel()
	if err := conn.HandshakeContext(handshake); err != nil {
		_ = raw.Close()
		if asked {
			err = errors.Join(err, errAsked)
		}
		return nil, false, &dialError{code: plugin.CodeTLS, err: err}
	}
	return conn, asked, nil
}
