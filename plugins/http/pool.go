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

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/http/internal/answer"
	"github.com/grapnel/grapnel/plugins/http/internal/h2"
	"github.com/grapnel/grapnel/plugins/internal/meter"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/plugins/oauth2"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const tlsSessions = 1024

// settings are what instances must have in common to share connections.
type settings struct {
	connect, tls time.Duration
	http2        bool
	egress       string
	tls13        bool
	serverName   string
	proxy        Proxy
	// credentials is a digest of all that is secret, and of what it is used for; nothing can be read from it.
	credentials outbound.Fingerprint
}

func settingsOf(c Config, egress *plugin.Egress) settings {
	return settings{
		connect: c.ConnectTimeout.Std(), tls: c.TLSTimeout.Std(),
		http2: c.HTTP2, egress: egress.String(),
		tls13: c.TLS.MinVersion == "1.3", serverName: c.TLS.ServerName, proxy: c.Proxy, credentials: c.credentials(),
	}
}

// gates are a process's, for what receivers and clients' keys have it compute: what is read beyond what is ordinary, and
// handshakes.
type gates struct{ reading, shaking *gate.Gate }

// pools are the pools of a process, by settings.
type pools struct {
	// roots replaces the system's certificate authorities when not nil; set in tests.
	roots *x509.CertPool
	gates gates

	mu sync.Mutex
	// by holds pools that are kept alive by the instances that use them and, while connections are idle, by
	// those: credentials come and go.
	by      map[settings]weak.Pointer[pool]
	sweepAt int
}

func newPools() *pools {
	return &pools{by: map[settings]weak.Pointer[pool]{}, sweepAt: 256, gates: gates{reading: gate.New(), shaking: gate.New()}}
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
	made, err := newPool(c, s, egress, p)
	if err != nil {
		return nil, err
	}
	p.by[s] = weak.Make(made)
	return made, nil
}

// pool holds the connections of all instances with equal settings and credentials.
type pool struct {
	settings settings
	dialer   outbound.Dialer
	via      *proxy // nil without one
	tls      *tls.Config
	http2    *h2.Transport
	gates    gates
	// client is the leaf of the client certificate, or nil when there is none.
	client *x509.Certificate
	// tokens is where oauth2's come from; nil with other auth.
	tokens *oauth2.Source
	// scratch holds what attempts write into.
	scratch sync.Pool

	mu sync.Mutex
	// origins are kept alive by the instances that use them and, while connections are idle, by their
	// timers.
	origins map[string]weak.Pointer[origin]
	sweepAt int
}

func newPool(c Config, s settings, egress *plugin.Egress, of *pools) (*pool, error) {
	p := &pool{
		settings: s, dialer: outbound.Dialer{Egress: egress, Timeout: s.connect}, http2: h2.NewTransport(),
		origins: map[string]weak.Pointer[origin]{}, sweepAt: 1024,
		gates: of.gates,
	}
	p.scratch.New = func() any { return &scratch{head: make([]byte, 0, 2048)} }
	certificate, err := c.material().ClientCertificate()
	if err != nil {
		return nil, err
	}
	trust, err := newTrust(c, of.roots)
	if err != nil {
		return nil, err
	}
	if p.via, err = newProxy(c); err != nil {
		return nil, err
	}
	if p.via != nil && p.via.scheme == "https" {
		p.via.shaking = of.gates.shaking
		p.via.tls = &tls.Config{
			MinVersion: tls.VersionTLS12, ServerName: p.via.hostname, RootCAs: trust.others, NextProtos: []string{"http/1.1"},
		}
	}
	p.tls = s.newTLS(trust.receiver)
	if certificate != nil {
		p.tls.Certificates, p.client = []tls.Certificate{*certificate}, certificate.Leaf
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
		config.Certificates = p.tls.Certificates
		config, _ = outbound.Offering(config)
	}
	return &http.Client{Transport: &http.Transport{
		Proxy: nil,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			conn, err := p.dial(ctx, addr)
			if err != nil {
				return nil, outbound.NotConnected(ctx, err)
			}
			return conn, nil
		},
		DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			conn, err := p.dial(ctx, addr)
			if err != nil {
				return nil, outbound.NotConnected(ctx, err)
			}
			own := config.Clone() // without HTTP/2: nothing would bound its frames
			own.ServerName, _, _ = net.SplitHostPort(addr)
			handshake, cancel := context.WithTimeout(ctx, p.settings.tls)
			defer cancel()
			return outbound.Secure(handshake, conn, own, p.gates.shaking)
		},
		MaxResponseHeaderBytes: answer.MaxHeader, IdleConnTimeout: time.Minute,
	}}
}

// origin is where connections to the target's scheme, host and port are kept.
func (p *pool) origin(t *target) *origin {
	key := t.Scheme + "://" + t.addr()
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
	o := newOrigin(p, t)
	p.origins[key] = weak.Make(o)
	return o
}

// dial connects to host:port under the egress policy. With a proxy it is the proxy that is connected to, and the
// policy is asked about both. Errors are of type *outbound.Error. What it takes beside looking names up is the step Connect,
// where the context is outbound.Timed.
func (p *pool) dial(ctx context.Context, addr string) (net.Conn, error) {
	began, steps := time.Now(), outbound.StepsOf(ctx)
	defer func() { steps.Connect += time.Since(began) - steps.DNS }()
	if p.via == nil {
		return p.dialer.Dial(ctx, addr)
	}
	bounded, cancel := context.WithTimeout(ctx, p.settings.connect)
	defer cancel()
	return p.via.dial(bounded, p.dialer, addr)
}

// dialTLS also says whether the receiver has asked for a client certificate.
func (p *pool) dialTLS(ctx context.Context, addr string) (conn *tls.Conn, asked bool, err error) {
	raw, err := p.dial(ctx, addr)
	if err != nil {
		return nil, false, err
	}
	config, offer := outbound.Offering(p.tls)
	config.ServerName = p.settings.serverName
	if config.ServerName == "" {
		config.ServerName, _, _ = net.SplitHostPort(addr) // was dialled a moment ago
	}
	handshake, cancel := context.WithTimeout(ctx, p.settings.tls)
	defer cancel()
	if p.settings.http2 {
		raw = meter.New(raw, h2.Grant, p.gates.reading)
	}
	began := time.Now()
	conn, err = outbound.Secure(handshake, raw, config, p.gates.shaking)
	outbound.StepsOf(ctx).TLS += time.Since(began)
	if err != nil {
		if offer.Asked() {
			err = &outbound.Error{Code: plugin.CodeTLS, Err: errors.Join(err, errAsked)}
		}
		return nil, false, err
	}
	return conn, offer.Asked(), nil
}
