package natsplugin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxAttempt bounds an attempt whose context has no deadline.
	maxAttempt = 30 * time.Second
	// maxFreshTries bounds how often a message is taken to another connection when the one it was given
	// turned out ended before it was sent.
	maxFreshTries = 3
)

// instance is one subscription's use of the transport. Immutable.
type instance struct {
	pool      *links
	dialler   *dialler
	url       string
	subject   string // a template
	stream    string
	jetStream bool
}

func newInstance(pool *links, shaking *gate.Gate, c Config, t plugin.Target) (*instance, error) {
	address, err := parse(t.URL)
	if err != nil {
		return nil, err
	}
	if c.User != "" && c.Password.Empty() {
		return nil, errors.New("config.user is given but the slot password is empty; fill it")
	}
	egress := t.Egress
	if egress == nil {
		egress = plugin.NewEgress(nil)
	}
	d := &dialler{egress: egress, shaking: shaking, credential: credential(c), settings: settings{
		address: address.String(), serverName: c.TLS.ServerName, secure: secure(c, address), first: c.TLS.HandshakeFirst,
		connect: c.ConnectTimeout.Std(), egress: egress.String(), name: t.UserAgent, user: c.User, inboxPrefix: c.InboxPrefix,
		credential: outbound.FingerprintOf(c.CA, c.ClientCertificate, c.ClientKey, c.Credentials, c.Token, c.Password),
	}}
	name := c.TLS.ServerName
	if name == "" {
		name = address.Host
	}
	if d.tls, err = c.material().TLSConfig(name); err != nil {
		return nil, err
	}
	i := &instance{pool: pool, dialler: d, url: t.URL, stream: c.Stream, jetStream: c.RequireJetStream}
	i.subject, _ = subjectOf(c, address)
	return i, nil
}

// credential has the newest version of what is there shown to the server.
func credential(c Config) func(*nats.Options) {
	return func(o *nats.Options) {
		switch {
		case !c.Credentials.Empty():
			_ = nats.UserCredentialBytes(c.Credentials.Values()[0])(o) // sets two callbacks; readCredentials has read the text
		case !c.Token.Empty():
			o.Token = string(c.Token.Values()[0])
		case !c.Password.Empty():
			o.User, o.Password = c.User, string(c.Password.Values()[0])
		}
	}
}

// attempt is a plugin.AttemptFunc.
func (i *instance) attempt(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
	if _, ok := ctx.Deadline(); !ok {
		bounded, cancel := context.WithTimeout(ctx, maxAttempt)
		defer cancel()
		ctx = bounded
	}
	if r.URL != "" && r.URL != i.url {
		return nil, outbound.Unfit("a signer has changed the URI's query, which NATS does not carry; use one that sets headers")
	}
	m, err := i.message(r)
	if err != nil {
		return nil, outbound.Unfit(err.Error())
	}
	for try := 1; ; try++ {
		lease, err := i.pool.Take(ctx, i.dialler.settings, i.dialler.dial)
		var no *denial
		switch {
		case errors.As(err, &no):
			return answer(no.status, no.text, r.MaxResponseBody, ""), nil
		case err != nil:
			return nil, outbound.NotConnected(ctx, err)
		}
		p := publication{link: lease.Conn, message: m, keep: r.MaxResponseBody}
		resp, err := p.do(ctx, i.jetStream)
		if p.suspect {
			lease.Retire()
		}
		lease.Done()
		if p.unsent && try < maxFreshTries && ctx.Err() == nil {
			continue // the connection had ended, and took nothing
		}
		return resp, err
	}
}

// message is the request as it is published. Its reply subject is the link's to set.
func (i *instance) message(r *plugin.Request) (*nats.Msg, error) {
	subject, err := fill(i.subject, r)
	if err != nil {
		return nil, err
	}
	m := &nats.Msg{Subject: subject, Data: r.Body, Header: make(nats.Header, len(r.Headers)+3)}
	for _, h := range r.Headers {
		if err := checkHeader(h); err != nil {
			return nil, err
		}
		m.Header[h.Name] = append(m.Header[h.Name], h.Value)
	}
	if r.Traceparent != "" && r.Get("traceparent") == "" {
		m.Header["traceparent"] = []string{r.Traceparent}
	}
	if r.Tracestate != "" && r.Get("tracestate") == "" {
		m.Header["tracestate"] = []string{r.Tracestate}
	}
	// A stream knows ids across its subjects. With the message id alone, a second subscription that has the
	// same event stored under another subject would be told that it is there already, and nothing stored.
	m.Header[nats.MsgIdHdr] = []string{r.MessageID + "/" + subject}
	if i.stream != "" {
		m.Header[nats.ExpectedStreamHdr] = []string{i.stream}
	}
	return m, nil
}

// checkHeader refuses what would break the framing of the message, and what steers the stream.
func checkHeader(h plugin.Header) error {
	switch {
	case h.Name == "" || strings.ContainsFunc(h.Name, func(c rune) bool { return c <= ' ' || c > '~' || c == ':' }):
		return fmt.Errorf("header name %q may have letters, digits and hyphens only", h.Name)
	case strings.ContainsAny(h.Value, "\r\n\x00"):
		return fmt.Errorf("the value of header %q has a line break or another control character", h.Name)
	case len(h.Name) >= 5 && strings.EqualFold(h.Name[:5], "nats-"):
		return fmt.Errorf("header %q is reserved: names that begin with Nats- steer the stream", h.Name)
	}
	return nil
}

// publication is one message on one link.
type publication struct {
	link    *link
	message *nats.Msg
	keep    int

	// suspect says that the link should take no further attempts.
	suspect bool
	// unsent says that the link had ended before the message was sent.
	unsent bool
}

func (p *publication) do(ctx context.Context, jetStream bool) (*plugin.Response, error) {
	began, l := time.Now(), p.link
	w, token := l.expect(p.message.Subject)
	defer l.forget(token)
	m := *p.message
	if jetStream {
		m.Reply = l.inbox + token
	}
	handed := make(chan error, 1) // to the client, which may have to wait for a server that does not read
	go func() { handed <- l.client.PublishMsg(&m) }()
	select {
	case err := <-handed:
		if err != nil {
			return nil, p.untaken(err)
		}
	case <-ctx.Done():
		p.suspect = true
		_ = l.conn.Close() // nothing else ends a write
		return nil, outbound.Interrupted(ctx, plugin.MaybeSent, l.conn.Peer())
	}
	if !jetStream {
		return p.read(ctx, began)
	}
	select {
	case reply := <-w.reply:
		return response(reply, m.Subject, p.keep, l.conn.Peer())
	case <-w.refused:
		return p.refused(), nil
	case <-l.over:
	case <-ctx.Done():
		return nil, p.late(ctx, began)
	}
	select { // what came before the end counts
	case reply := <-w.reply:
		return response(reply, m.Subject, p.keep, l.conn.Peer())
	default:
		return nil, outbound.Lost(plugin.MaybeSent, l.conn.Peer())
	}
}

// read waits until the server has read the message.
func (p *publication) read(ctx context.Context, began time.Time) (*plugin.Response, error) {
	flushed := make(chan error, 1) // the client may have to wait, before it looks at ctx, for another's write
	go func() { flushed <- p.link.client.FlushWithContext(ctx) }()
	var err error
	select {
	case err = <-flushed:
	case <-ctx.Done():
		err = ctx.Err()
	}
	switch {
	case err == nil && p.link.denies(p.message.Subject):
		return p.refused(), nil
	case err == nil:
		return &plugin.Response{Status: http.StatusAccepted, Peer: p.link.conn.Peer()}, nil
	case ctx.Err() != nil:
		return nil, p.late(ctx, began)
	}
	return nil, outbound.Lost(plugin.MaybeSent, p.link.conn.Peer())
}

// late is a message without an answer. A server that was silent all the while may be gone.
func (p *publication) late(ctx context.Context, began time.Time) error {
	p.suspect = !p.link.conn.HeardSince(began)
	return outbound.Interrupted(ctx, plugin.MaybeSent, p.link.conn.Peer())
}

// untaken is a message that the client has not sent.
func (p *publication) untaken(err error) error {
	f := &plugin.Failure{Source: plugin.SourceEndpoint, WireState: plugin.NotSent, Peer: p.link.conn.Peer()}
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		f.Source, f.Code, f.Message = plugin.SourcePolicy, outbound.CodeTooLarge, fmt.Sprintf(
			"the body has %d bytes; with its headers it is more than the %d that the server takes (max_payload)", len(p.message.Data), p.link.maxPayload)
	case errors.Is(err, nats.ErrConnectionClosed):
		p.unsent, p.suspect = true, true // the pool may not have heard of it yet
		f.Code, f.Message = plugin.CodeConnect, "the server ends connections before they can be used"
	default: // a write that broke off
		return outbound.Lost(plugin.MaybeSent, p.link.conn.Peer())
	}
	return f
}

func (p *publication) refused() *plugin.Response {
	text := fmt.Sprintf("the user may not publish to %q", p.message.Subject)
	return answer(http.StatusForbidden, text, p.keep, p.link.conn.Peer())
}
