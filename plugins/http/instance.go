package httpplugin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/grapnel/grapnel/internal/header"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// maxAttempt bounds an attempt whose context has no deadline.
const maxAttempt = 30 * time.Second

// instance is one subscription's use of the transport. Immutable.
type instance struct {
	pool   *pool
	origin *origin
	target *target // as configured, and as it may be shown
	wire   *target // as requested: with a credential in the query where auth puts it there
	method string
	agent  string
	lead   []byte // request line and the fields that are the connection's
	auth   credential
	// fixed are headers that each request carries and nobody else may set.
	fixed     []plugin.Header
	ownership Ownership
	// headerTimeout is zero for as long as the attempt.
	headerTimeout time.Duration
	// allHeaders keeps the header of answers that say yes, too.
	allHeaders bool
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
	auth, err := newCredential(c)
	if err != nil {
		return nil, err
	}
	pool, err := p.get(c, egress)
	if err != nil {
		return nil, err
	}
	i := &instance{
		pool: pool, origin: pool.origin(u), target: u, method: c.Method, agent: agent, auth: auth, ownership: c.Ownership,
		headerTimeout: c.HeaderTimeout.Std(),
	}
	if auth.value != "" {
		i.fixed = append(i.fixed, plugin.Header{Name: auth.header, Value: auth.value})
	}
	if c.Ownership.Check == checkCloudEvents {
		i.fixed = append(i.fixed, plugin.Header{Name: originHeader, Value: c.Ownership.Origin})
	}
	for _, h := range i.fixed {
		if err := checkHeader(h.Name, h.Value); err != nil {
			return nil, err
		}
	}
	i.wire = i.onWire(u)
	i.lead = i.appendLead(nil, i.wire)
	return i, nil
}

// attempt is a plugin.AttemptFunc.
func (i *instance) attempt(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
	if _, ok := ctx.Deadline(); !ok {
		bounded, cancel := context.WithTimeout(ctx, maxAttempt)
		defer cancel()
		ctx = bounded
	}
	if r.OwnershipCheck {
		return i.own(ctx, r)
	}
	return i.deliver(ctx, r)
}

// deliver sends the request with the instance's credentials.
func (i *instance) deliver(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
	t := i.wire
	if r.URL != i.target.text && r.URL != "" {
		signed, err := i.signedTarget(r.URL)
		if err != nil {
			return nil, refused(err)
		}
		t = i.onWire(signed)
	}
	if i.auth.tokens != nil {
		return i.sendWithToken(ctx, t, r)
	}
	resp, err := i.send(ctx, t, r, "")
	if len(i.auth.hide) == 0 {
		return resp, err
	}
	return i.clean(resp, ""), err
}

// sendWithToken sends with an access token. A 401 means that the receiver has not taken the request, so it
// is safe to send it once more if there is another token by then; if not, the 401 is the answer.
func (i *instance) sendWithToken(ctx context.Context, t *target, r *plugin.Request) (*plugin.Response, error) {
	token, err := i.pool.tokens.Token(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := i.send(ctx, t, r, token)
	if err != nil || resp.Status != http.StatusUnauthorized {
		return i.clean(resp, token), err
	}
	resp = i.clean(resp, token)
	i.pool.tokens.Refused(token)
	fresh, err := i.pool.tokens.Token(ctx)
	if err != nil || fresh == token {
		return resp, nil //nolint:nilerr // the receiver has answered, and its answer stands
	}
	again, err := i.send(ctx, t, r, fresh)
	return i.clean(again, fresh), err
}

// signedTarget reads the URI that a signer has left. It may have changed the query, never the receiver.
func (i *instance) signedTarget(text string) (*target, error) {
	t, err := parseTarget(text)
	if err != nil {
		return nil, err
	}
	if t.Scheme != i.target.Scheme || t.host != i.target.host || t.URL.EscapedPath() != i.target.URL.EscapedPath() {
		return nil, errors.New("a signer has changed more of the URI than its query")
	}
	return t, nil
}

// refused is a request that must not be sent as it is. That is neither the receiver's fault nor a reason
// to configure the instance again.
func refused(err error) *plugin.Failure {
	f := outbound.Unfit(err.Error())
	switch {
	case errors.As(err, new(*conflictError)):
		f.Code = plugin.CodeConfig
	case errors.As(err, new(errLargeHeader)): // it stays as it is
		f.Source, f.Code = plugin.SourcePolicy, outbound.CodeTooLarge
	}
	return f
}

// conflictError is a header that the instance has to set and that is there already.
type conflictError struct{ name, by string }

func (e *conflictError) Error() string {
	return fmt.Sprintf("%s sets the header %s, and so does a signer of this subscription; take out one of the two", e.by, e.name)
}

// conflict reports whether the header is the instance's own to set.
func (i *instance) conflict(name string) error {
	switch {
	case i.auth.header != "" && header.Key(name) == header.Key(i.auth.header):
		return &conflictError{name: name, by: "auth"}
	case i.ownership.Check == checkCloudEvents && name == originHeader:
		return &conflictError{name: name, by: "ownership"}
	}
	return nil
}
