// Package h1 is a client of HTTP/1.1 that knows what has become of a request.
//
// It guarantees, over plain TCP, TLS and TLS to a proxy alike:
//   - bytes behind a response are never taken for another request's: a connection that has shown any is closed;
//   - a status line that was read is an answer, whatever is wrong with what follows, and also when it came before the
//     request was taken;
//   - a request goes out once. It goes out a second time, on a new connection, only when the first, which had carried
//     requests before, ended without a byte of an answer: servers close idle connections, and one may be on its way. One
//     that took no byte is not counted at all;
//   - a request ends by its context's deadline, and reads at most answer.MaxHeader and answer.MaxDrain past what is kept;
//   - when there is no answer it says how much of the request may have arrived.
//
// It knows neither names nor TLS: the dialler that an Origin is given does.
package h1

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/grapnel/grapnel/plugins/http/internal/answer"
)

const (
	// maxIdle connections of an origin are kept; it is above any max_in_flight worth setting: a limit below what is in
	// flight would close and open connections all the time.
	maxIdle = 4096
	// idleTimeout is how long a connection is kept that nothing uses.
	idleTimeout = time.Minute
	// freshFor is how long a connection that carried nothing is trusted without a look at its socket.
	freshFor = time.Second
	// maxAge makes busy connections follow changes of DNS and of the egress policy.
	maxAge = 10 * time.Minute
	// maxStale bounds how many idle connections are tried that turn out closed before they took a byte.
	maxStale = 3
	// maxInline is how much of a request is written before its answer is read: what fits into a socket's buffer. An answer
	// that comes before more than that is taken must be read meanwhile.
	maxInline = 16 << 10
	// linger is how long is waited for an answer behind a write that failed, and for a write behind an answer that says yes.
	linger = time.Second
)

// ErrHeaderTooLarge is a header, or a row of interim responses, beyond answer.MaxHeader.
var ErrHeaderTooLarge = errors.New("the response's header is larger than 64 KiB")

// Dial connects, and adds to t how long that took. secure says that the connection decrypts, whoever is at its other end: bytes may then wait inside it.
// The connection, or a method NetConn of it, leads to a socket.
type Dial func(ctx context.Context, t *answer.Timings) (conn net.Conn, secure bool, err error)

// Origin sends requests to one server and keeps its idle connections. Safe for concurrent use.
type Origin struct {
	dial Dial

	mu       sync.Mutex
	idle     []*conn // the longest idle first
	sweeping bool
}

// New returns an Origin without connections. It needs no closing: what is idle closes itself.
func New(dial Dial) *Origin { return &Origin{dial: dial} }

// Request is one request.
type Request struct {
	// Head is the request line, the header and the empty line, and may be followed by the beginning of the body.
	Head []byte
	// Body is what of the body is not in Head.
	Body []byte
	// HeaderTimeout is how long the response's header may take from now on; zero means as long as the context.
	HeaderTimeout time.Duration
	Wants         answer.Wants
	// Timings is set by Do, whatever it returns.
	Timings answer.Timings
}

// Do sends r and reads its answer on the caller's goroutine; a large one is written by another, which has ended when Do
// returns. ctx must have a deadline. Errors are those of the dialler, as they are, and *answer.Error.
func (o *Origin) Do(ctx context.Context, r *Request) (*answer.Answer, error) {
	for stale := 0; ; {
		now := time.Now()
		c := o.take(now)
		if c == nil {
			var err error
			if c, now, err = o.connect(ctx, r); err != nil {
				return nil, err
			}
		}
		got, x, err := o.exchange(ctx, r, c, now)
		switch {
		case !x.reused, err == nil && (got.Status != http.StatusRequestTimeout || x.reusable), ctx.Err() != nil, err != nil && isTimeout(err):
			return got, x.failed(err)
		case err != nil && x.sent == answer.Nothing && stale < maxStale:
			stale++
		case err == nil, !x.heard && ended(err): // 408 on an idle connection is for a request that never came, too
			return o.again(ctx, r, got, x.failed(err))
		default:
			return got, x.failed(err)
		}
	}
}

// again sends a request once more, on a connection of its own; without one, what came of the first time stands.
func (o *Origin) again(ctx context.Context, r *Request, got *answer.Answer, first error) (*answer.Answer, error) {
	c, now, err := o.connect(ctx, r)
	if err != nil {
		return got, first
	}
	got, x, err := o.exchange(ctx, r, c, now)
	x.sent = answer.All // perhaps the first time
	return got, x.failed(err)
}

// exchange sends r on c, which is an idle connection or closed afterwards.
func (o *Origin) exchange(ctx context.Context, r *Request, c *conn, now time.Time) (*answer.Answer, *exchange, error) {
	x := &exchange{conn: c, request: r, reused: !c.fresh}
	c.fresh = false
	got, err := x.do(ctx)
	over := time.Now()
	if x.heardAt.IsZero() {
		r.Timings.FirstByte += over.Sub(now)
	} else {
		r.Timings.FirstByte += x.heardAt.Sub(now)
		r.Timings.Body += over.Sub(x.heardAt)
	}
	if x.reusable {
		o.put(c, over)
	} else {
		_ = c.Close()
	}
	return got, x, err
}

// failed is err with what is known of the request, nil for nil.
func (x *exchange) failed(err error) error {
	if err == nil {
		return nil
	}
	return &answer.Error{Sent: x.sent, Peer: x.conn.peer, Fresh: !x.reused, Err: err}
}

// Adopt takes a connection that has carried nothing yet.
func (o *Origin) Adopt(raw net.Conn, secure bool) {
	now := time.Now()
	o.put(newConn(raw, secure, now), now)
}

// Drop closes idle connections, for tests.
func (o *Origin) Drop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.idle {
		_ = c.Close()
	}
	o.idle = nil
}

// take returns an idle connection that still stands, or nil.
func (o *Origin) take(now time.Time) *conn {
	for {
		o.mu.Lock()
		n := len(o.idle)
		if n == 0 {
			o.mu.Unlock()
			return nil
		}
		c := o.idle[n-1]
		o.idle[n-1] = nil
		o.idle = o.idle[:n-1]
		o.mu.Unlock()
		if c.fresh && now.Sub(c.idleSince) < freshFor {
			return c
		}
		if now.Sub(c.idleSince) < idleTimeout && c.probe.quiet(now.Sub(c.idleSince)) {
			return c
		}
		_ = c.Close()
	}
}

// put takes a connection back.
func (o *Origin) put(c *conn, now time.Time) {
	c.idleSince = now
	if c.idleSince.Sub(c.made) > maxAge {
		_ = c.Close()
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.idle) >= maxIdle {
		_ = c.Close()
		return
	}
	o.idle = append(o.idle, c)
	if !o.sweeping {
		o.sweeping = true
		time.AfterFunc(idleTimeout/4, o.sweep)
	}
}

// sweep closes what has been idle for too long and what the server has closed, and comes again while there is anything to
// watch.
func (o *Origin) sweep() {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	o.idle = slices.DeleteFunc(o.idle, func(c *conn) bool {
		idle := now.Sub(c.idleSince)
		over := idle > idleTimeout || !c.fresh && !c.probe.quiet(idle)
		if over {
			_ = c.Close()
		}
		return over
	})
	if o.sweeping = len(o.idle) > 0; o.sweeping {
		time.AfterFunc(idleTimeout/4, o.sweep)
	} else {
		o.idle = nil
	}
}

// connect also says when it had connected.
func (o *Origin) connect(ctx context.Context, r *Request) (*conn, time.Time, error) {
	made := time.Now()
	raw, secure, err := o.dial(ctx, &r.Timings)
	if err != nil {
		return nil, made, err
	}
	return newConn(raw, secure, made), time.Now(), nil
}

// socketOf is the socket below TLS.
func socketOf(c net.Conn) syscall.Conn {
	for {
		if socket, ok := c.(syscall.Conn); ok {
			return socket
		}
		over, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return nil
		}
		c = over.NetConn()
	}
}
