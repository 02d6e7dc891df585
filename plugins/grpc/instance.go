package grpcplugin

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/metadata"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	receiverv1 "github.com/grapnel/grapnel/proto/grapnel/receiver/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxAttempt bounds an attempt whose context has no deadline.
	maxAttempt = 30 * time.Second
	// maxOverhead is what a message may have on top of its body.
	maxOverhead = 128 << 10
	// maxFreshTries bounds how often a call is taken to another connection when the one it was given
	// turned out ended before any of it was sent.
	maxFreshTries = 3
)

// instance is one subscription's use of the transport. Immutable.
type instance struct {
	pool    *links
	dialler *dialler
	url     string
	path    string
	bearer  string
}

func newInstance(pool *links, gates gates, c Config, t plugin.Target) (*instance, error) {
	address, err := parse(t.URL)
	if err != nil {
		return nil, err
	}
	egress := t.Egress
	if egress == nil {
		egress = plugin.NewEgress(nil)
	}
	d := &dialler{egress: egress, gates: gates, settings: settings{
		scheme: address.Scheme, address: address.String(), authority: address.URL.Host, connect: c.ConnectTimeout.Std(),
		egress: egress.String(), agent: t.UserAgent, credential: outbound.FingerprintOf(c.CA, c.ClientCertificate, c.ClientKey, c.Token),
	}}
	if c.TLS.ServerName != "" {
		d.settings.authority = c.TLS.ServerName
	}
	if address.Scheme == "grpcs" {
		name := c.TLS.ServerName
		if name == "" {
			name = address.Host
		}
		if d.tls, err = c.material().TLSConfig(name); err != nil {
			return nil, err
		}
		d.tls.NextProtos = []string{"h2"}
	}
	i := &instance{pool: pool, dialler: d, url: t.URL}
	if path := address.URL.EscapedPath(); path != "/" {
		i.path = path
	}
	if !c.Token.Empty() {
		i.bearer = "Bearer " + string(c.Token.Values()[0])
	}
	return i, nil
}

// attempt is a plugin.AttemptFunc.
func (i *instance) attempt(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
	if _, ok := ctx.Deadline(); !ok {
		bounded, cancel := context.WithTimeout(ctx, maxAttempt)
		defer cancel()
		ctx = bounded
	}
	if r.URL != "" && r.URL != i.url {
		return nil, outbound.Unfit("a signer has changed the URI's query, which gRPC does not carry; use one that sets headers")
	}
	message, err := i.message(r)
	if err != nil {
		return nil, outbound.Unfit(err.Error())
	}
	ctx = metadata.NewOutgoingContext(ctx, i.metadata(r))
	for try := 1; ; try++ {
		lease, err := i.pool.Take(ctx, i.dialler.settings, i.dialler.dial)
		if err != nil {
			return nil, outbound.NotConnected(ctx, err)
		}
		c := call{link: lease.Conn, keep: r.MaxResponseBody, secret: strings.TrimPrefix(i.bearer, "Bearer ")}
		resp, err := c.do(ctx, message)
		if c.suspect {
			lease.Retire()
		}
		lease.Done()
		if c.unsent && try < maxFreshTries && ctx.Err() == nil {
			continue // the connection had ended, and took nothing
		}
		return resp, err
	}
}

// message is the request as the receiver gets it. A header with several values has them joined, as
// RFC 9110, section 5.3, allows.
func (i *instance) message(r *plugin.Request) (*receiverv1.DeliverRequest, error) {
	m := &receiverv1.DeliverRequest{
		MessageId: r.MessageID, Body: r.Body, Path: i.path, Headers: make(map[string]string, len(r.Headers)),
	}
	for _, h := range r.Headers {
		if !utf8.ValidString(h.Value) || !utf8.ValidString(h.Name) {
			return nil, fmt.Errorf("header %q is not UTF-8, which gRPC cannot carry", strings.ToValidUTF8(h.Name, "?"))
		}
		value := h.Value
		if before, ok := m.Headers[h.Name]; ok {
			value = before + ", " + value
		}
		m.Headers[h.Name] = value
	}
	return m, nil
}

func (i *instance) metadata(r *plugin.Request) metadata.MD {
	md := metadata.MD{}
	trace := r.Get("traceparent")
	if trace == "" {
		trace = r.Traceparent
	}
	if trace != "" {
		md["traceparent"] = []string{trace}
	}
	if state := cmp.Or(r.Get("tracestate"), r.Tracestate); state != "" {
		md["tracestate"] = []string{state}
	}
	if i.bearer != "" {
		md["authorization"] = []string{i.bearer}
	}
	return md
}
