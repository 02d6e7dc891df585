package httpplugin

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxAttempt bounds an attempt whose context has no deadline.
	maxAttempt = 30 * time.Second
	// maxDirectBody is the largest body that is written before the response is read. A receiver that
	// answers early and stops reading could block a larger one; net/http reads meanwhile.
	maxDirectBody = 64 << 10
)

// instance is one subscription's use of the transport. Immutable.
type instance struct {
	pool   *pool
	origin *origin
	target *target
	method string
	agent  string
	lead   []byte // request line and the fields that never change
}

func newInstance(p *pools, c Config, t plugin.Target) (*instance, error) {
	u, err := parseTarget(t.URL)
	if err != nil {
		return nil, err
	}
	agent := t.UserAgent
	if agent != "" {
		if err := checkHeader("user-agent", agent); err != nil {
			return nil, err
		}
	}
	egress := t.Egress
	if egress == nil {
		egress = plugin.NewEgress(nil)
	}
	pool := p.get(settingsOf(c, egress), egress)
	return &instance{
		pool: pool, origin: pool.origin(u), target: u, method: c.Method, agent: agent,
		lead: appendLead(nil, c.Method, u),
	}, nil
}

// attempt is a plugin.AttemptFunc.
func (i *instance) attempt(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
	if _, ok := ctx.Deadline(); !ok {
		bounded, cancel := context.WithTimeout(ctx, maxAttempt)
		defer cancel()
		ctx = bounded
	}
	t := i.target
	if r.URL != t.text && r.URL != "" {
		var err error
		if t, err = i.signedTarget(r.URL); err != nil {
			return nil, refused(err)
		}
	}
	if i.pool.direct && len(r.Body) <= maxDirectBody && !i.origin.http2.Load() {
		resp, err := i.attemptDirect(ctx, t, r)
		if !errors.Is(err, errHTTP2) {
			return resp, err
		}
	}
	return i.attemptNetHTTP(ctx, t, r)
}

// signedTarget reads the URI that a signer has left. It may have changed the query, never the receiver.
func (i *instance) signedTarget(text string) (*target, error) {
	t, err := parseTarget(text)
	if err != nil {
		return nil, err
	}
	if t.scheme != i.target.scheme || t.host != i.target.host || t.url.EscapedPath() != i.target.url.EscapedPath() {
		return nil, errors.New("a signer has changed more of the URI than its query")
	}
	return t, nil
}

// refused is a request that must not be sent as it is. That is neither the receiver's fault nor a reason
// to configure the instance again.
func refused(err error) *plugin.Failure {
	return &plugin.Failure{
		Source: plugin.SourcePlugin, Code: plugin.CodeProtocol, Message: err.Error(), WireState: plugin.NotSent,
	}
}

// answer makes a Response of what net/http has read; only retry-after matters when all went well.
func answer(resp *http.Response, kept body, peer string) *plugin.Response {
	out := &plugin.Response{Status: resp.StatusCode, Body: kept.bytes, Truncated: kept.truncated, Peer: peer}
	if resp.StatusCode >= 200 && resp.StatusCode <= 299 {
		if after := resp.Header["Retry-After"]; len(after) > 0 {
			out.Headers = []plugin.Header{{Name: "retry-after", Value: after[0]}}
		}
		return out
	}
	for name, values := range resp.Header {
		for _, v := range values {
			out.Headers = append(out.Headers, plugin.Header{Name: strings.ToLower(name), Value: v})
		}
	}
	return out
}
