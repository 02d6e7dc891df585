package natsplugin

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	pingInterval = 20 * time.Second
	// writeTimeout bounds how long the client waits for a server that has stopped reading; attempts end
	// by their own deadlines.
	writeTimeout = 30 * time.Second
	// maxUnread is how many acknowledgements may wait to be handed out, which takes a moment each; the client drops what is
	// more. A link that hostile servers have made again and again is nothing but its buffers.
	maxUnread = 2048
)

// dialler makes links of one settings.
type dialler struct {
	settings settings
	egress   *plugin.Egress
	tls      *tls.Config
	// shaking is the process's gate of handshakes.
	shaking *gate.Gate
	// credential sets what the client shows to the server.
	credential func(*nats.Options)
}

// link is one connection to a server. It is never connected again: a new link takes its place, so that
// every attempt learns of its own dial and nothing waits in a buffer for better times.
type link struct {
	client *nats.Conn
	conn   *outbound.Watched
	// inbox is what the subjects of acknowledgements begin with.
	inbox string
	// maxPayload is the largest message, headers included, that the server took at the beginning.
	maxPayload int64
	// ended is closed when the connection is, over when all that came on it has been handed out.
	ended  chan struct{}
	over   chan struct{}
	unfit  atomic.Bool // takes no new attempts
	serial atomic.Uint64

	mu      sync.Mutex
	waiting map[string]*wait // by the end of the reply subject
	denied  map[string]bool  // subjects that the server has refused publications to
}

// wait is one attempt that waits for an acknowledgement.
type wait struct {
	subject string
	reply   chan *nats.Msg // capacity 1
	refused chan struct{}  // closed when the server denies the subject
}

// Usable reports whether attempts can be sent on it. It asks nothing of the client, whose lock may be held
// while a server does not read.
func (l *link) Usable() bool { return !l.unfit.Load() }

// Close ends it.
func (l *link) Close() {
	l.unfit.Store(true)
	_ = l.conn.Close() // first: the client would try to write what it still has
	l.client.Close()
}

func (d *dialler) dial() (*link, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d.settings.connect)
	defer cancel()
	raw, err := outbound.Dialer{Egress: d.egress}.Dial(ctx, d.settings.address)
	if err != nil {
		return nil, err
	}
	l := &link{
		conn: outbound.Watch(raw), ended: make(chan struct{}), over: make(chan struct{}),
		waiting: map[string]*wait{}, denied: map[string]bool{},
	}
	config, offer := outbound.Offering(d.tls)
	guarded, err := greet(ctx, l.conn, d.settings, config, d.shaking)
	if err != nil {
		_ = raw.Close()
		return nil, greeting(err, offer)
	}
	deadline, _ := ctx.Deadline()
	options := d.options(l, guarded, time.Until(deadline))
	if l.client, err = options.Connect(); err != nil {
		_ = guarded.Close()
		return nil, refusal(err, l.conn, offer)
	}
	if err := l.listen(ctx); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func (d *dialler) options(l *link, conn net.Conn, left time.Duration) *nats.Options {
	o := nats.GetDefaultOptions()
	o.Url = "nats://" + d.settings.address
	o.Name = d.settings.name
	o.CustomDialer = dialled{conn}
	o.SkipHostLookup, o.IgnoreDiscoveredServers = true, true
	o.AllowReconnect, o.ReconnectBufSize = false, -1
	o.Timeout, o.FlusherTimeout, o.PingInterval = left, writeTimeout, pingInterval
	o.InboxPrefix = d.settings.inboxPrefix
	o.ClosedCB = func(*nats.Conn) {
		l.unfit.Store(true)
		close(l.ended)
	}
	o.LameDuckModeHandler = func(*nats.Conn) { l.unfit.Store(true) } // the server is about to stop
	o.AsyncErrorCB = func(_ *nats.Conn, _ *nats.Subscription, err error) { l.complaint(err) }
	d.credential(&o)
	return &o
}

// dialled hands the client the connection that has been made.
type dialled struct{ conn net.Conn }

func (d dialled) Dial(string, string) (net.Conn, error) { return d.conn, nil }

// listen subscribes to acknowledgements, and waits until the server has agreed.
func (l *link) listen(ctx context.Context) error {
	if !l.client.HeadersSupported() {
		return &outbound.Error{Code: plugin.CodeProtocol, Err: nats.ErrHeadersNotSupported, Message: "the server is too old to take headers; it must be NATS 2.2 or newer"}
	}
	l.maxPayload = l.client.MaxPayload()
	l.inbox = l.client.NewInbox() + "."
	// A channel, for with a callback the client forgets what it has read when the connection ends.
	acknowledgements := make(chan *nats.Msg, maxUnread)
	go l.receive(acknowledgements)
	_, err := l.client.ChanSubscribe(l.inbox+"*", acknowledgements)
	if err == nil {
		err = l.client.FlushWithContext(ctx)
	}
	if err == nil {
		err = l.client.LastError() // a refusal comes before the flush's answer
	}
	switch {
	case errors.Is(err, nats.ErrPermissionViolation):
		return &denial{status: 403, text: "the user may not subscribe to " + l.inbox + "*, which acknowledgements come to; allow it, or set inbox_prefix to what is allowed"}
	case err != nil:
		return &outbound.Error{Code: plugin.CodeConnect, Err: err, Message: "the server ended the connection at once"}
	}
	return nil
}

// receive hands out what comes until the connection has ended.
func (l *link) receive(acknowledgements <-chan *nats.Msg) {
	defer close(l.over)
	for {
		select {
		case m := <-acknowledgements:
			l.arrived(m)
			continue
		case <-l.ended:
		}
		for {
			select {
			case m := <-acknowledgements:
				l.arrived(m)
			default:
				return
			}
		}
	}
}

func (l *link) arrived(m *nats.Msg) {
	token := strings.TrimPrefix(m.Subject, l.inbox)
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := l.waiting[token]; w != nil {
		delete(l.waiting, token) // one answer: there may be other listeners who answer too
		w.reply <- m
	}
}

// expect registers an attempt and returns the subject for its answer; forget must follow.
func (l *link) expect(subject string) (w *wait, token string) {
	w = &wait{subject: subject, reply: make(chan *nats.Msg, 1), refused: make(chan struct{})}
	token = strconv.FormatUint(l.serial.Add(1), 36)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting[token] = w
	return w, token
}

func (l *link) forget(token string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.waiting, token)
}

// complaint reads what the server says out of turn. A refused publication has no other answer. The link
// takes no new attempts then: permissions may have changed by the next.
func (l *link) complaint(err error) {
	subject := deniedSubject(err)
	if subject == "" {
		return
	}
	l.unfit.Store(true)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.denied[subject] = true
	for token, w := range l.waiting {
		if w.subject == subject {
			delete(l.waiting, token)
			close(w.refused)
		}
	}
}

// denies reports whether the server has refused the subject, as far as is known.
func (l *link) denies(subject string) bool {
	if deniedSubject(l.client.LastError()) == subject {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.denied[subject]
}

// deniedSubject reads a text such as: nats: permissions violation: Permissions Violation for Publish to "a.b".
func deniedSubject(err error) string {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return ""
	}
	_, after, _ := strings.Cut(err.Error(), `Publish to "`)
	subject, _, _ := strings.Cut(after, `"`)
	return subject
}
