// Package h2 is a client of HTTP/2 over net/http's connections that knows what has become of a request.
//
// It guarantees:
//   - requests that wait for one connection share one dial, and a connection that was made to learn which HTTP the server
//     speaks is used;
//   - what the server says it has not looked at (RFC 9113, sections 6.8 and 8.7: a stream behind GOAWAY, REFUSED_STREAM) is
//     sent again within the request's time; and once, what was on a connection that had answered before and ended without
//     an answer to it: servers close idle connections, and not all of them say so in time;
//   - a connection that has no request and no room for one is closed, whatever the server says of how many it takes;
//   - connections age, also busy ones, so that changes of DNS and of the egress policy are followed;
//   - a connection ends on which more comes than answers need, where the dialler has put a meter below TLS;
//   - a request ends by its context's deadline, and its answer is bounded as answer says.
package h2

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/plugins/http/internal/answer"
	"github.com/grapnel/grapnel/plugins/internal/meter"
)

// Grant is how much may come for a request: the body that is kept and drained, what the window lets follow, a header, and
// as much again for the frames around them.
const Grant = 512 << 10

const (
	// window is what the server may send of an answer before it is read, and connectionWindow of all answers of a
	// connection: net/http's own are for downloads, and are taken from whoever answers everybody at once.
	window           = 64 << 10
	connectionWindow = 1 << 20
	// maxAge is for how long a connection takes new requests.
	maxAge      = 10 * time.Minute
	idleTimeout = time.Minute
	// readIdle is when a connection on which nothing comes is asked for a sign of life. net/http keeps one that has ended, and
	// its buffers, for as long.
	readIdle   = 5 * time.Second
	pingAnswer = 10 * time.Second
	// clearing is for how long a connection without requests may have no room for one.
	clearing = time.Second
	// maxTries bounds how often a request goes out that the server says it has not looked at, maxBarren how many
	// connections may end with nothing but that, since each costs a handshake. pause grows between tries.
	maxTries  = 6
	maxBarren = 2
	pause     = 10 * time.Millisecond
)

var (
	// ErrRefused is a request that the server has refused to look at again and again.
	ErrRefused = errors.New("the receiver refused the request without looking at it")
	// ErrHeaderLate is a response whose header took longer than HeaderTimeout.
	ErrHeaderLate = errors.New("the response's header came too late")
	// ErrHTTP1 is a connection on which the server speaks HTTP/1.1.
	ErrHTTP1 = errors.New("the receiver speaks HTTP/1.1")
)

// Dial connects and does the TLS handshake, in which the server chooses HTTP/2; with ErrHTTP1 it did not. It adds to t how
// long that took, and bounds its own time.
type Dial func(t *answer.Timings) (*tls.Conn, error)

// Transport holds what connections have in common.
type Transport struct{ of *http.Transport }

// given is the key of a context's connection.
type given struct{}

// NewTransport returns a Transport.
func NewTransport() *Transport {
	return &Transport{of: &http.Transport{
		Proxy: nil, // the dialler knows of proxies
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, ok := ctx.Value(given{}).(net.Conn)
			if !ok {
				return nil, errors.New("h2: no connection is given")
			}
			return conn, nil
		},
		ForceAttemptHTTP2: true, DisableCompression: true, MaxResponseHeaderBytes: answer.MaxHeader, IdleConnTimeout: idleTimeout,
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: readIdle, PingTimeout: pingAnswer,
			MaxReceiveBufferPerStream: window, MaxReceiveBufferPerConnection: connectionWindow,
		},
	}}
}

// Origin sends requests to one server. Safe for concurrent use.
type Origin struct {
	transport *Transport
	addr      string
	dial      Dial

	mu     sync.Mutex
	conns  []*conn
	flight *flight // a connection on its way, or nil
}

// New returns an Origin for host:port without connections. It needs no closing: what is idle closes itself.
func New(t *Transport, addr string, dial Dial) *Origin {
	return &Origin{transport: t, addr: addr, dial: dial}
}

// conn is one connection.
type conn struct {
	*http.ClientConn
	meter *meter.Conn // nil when the dialler gave none
	peer  string
	made  time.Time
	used  atomic.Bool
	// answered says that it has carried an answer.
	answered atomic.Bool

	// users are the requests that have it, left is when the last one gave it back, and taken says that one ever had it.
	// The origin's mutex guards them.
	users int
	left  time.Time
	taken bool
}

// flight is one dial. What is behind done is set before that is closed.
type flight struct {
	done    chan struct{}
	conn    *conn
	err     error
	timings answer.Timings
}

// Request is one request.
type Request struct {
	// HTTP is the request but for its body; it is not changed.
	HTTP *http.Request
	Body []byte
	// HeaderTimeout is how long the response's header may take from now on; zero means as long as the context.
	HeaderTimeout time.Duration
	Wants         answer.Wants
	// Timings is set by Do, whatever it returns. Requests that wait for one connection share how long that took.
	Timings answer.Timings
}

// Do sends r. ctx must have a deadline. Errors are those of the dialler, as they are, and *answer.Error.
func (o *Origin) Do(ctx context.Context, r *Request) (*answer.Answer, error) {
	again := false // it has been on a connection that ended
	barren := 0
	for try := 1; ; try++ {
		c, err := o.reserve(ctx, &r.Timings)
		if err != nil {
			return nil, err
		}
		fresh, answered := !c.used.Swap(true), c.answered.Load()
		e := exchange{conn: c, request: r}
		got, err := e.do(ctx)
		if err == nil {
			c.answered.Store(true)
		}
		o.leave(c)
		if err == nil {
			return got, nil
		}
		failed := &answer.Error{Sent: e.wire.sent(), Peer: c.peer, Fresh: fresh, Err: meaning(err)}
		if again {
			failed.Sent = answer.All // perhaps
		}
		refused := unprocessed(err)
		if refused && c.Err() != nil && !c.answered.Load() && c.InFlight() == 0 {
			barren++
		}
		switch {
		case ctx.Err() != nil:
			return nil, failed
		case refused && (try >= maxTries || barren >= maxBarren || !wait(ctx, try)):
			failed.Err = ErrRefused
			if !again {
				failed.Sent = answer.Nothing
			}
			return nil, failed
		case refused:
		case again || !answered || !c.ended(err):
			return nil, failed
		default:
			again = true
		}
	}
}

// ended reports whether it was the end of the connection that ended a request.
func (c *conn) ended(err error) bool { return c.Err() != nil && !errors.As(err, new(streamError)) }

// wait pauses before the next try, not at all before the second. It reports whether there is time left.
func wait(ctx context.Context, try int) bool {
	if try == 1 {
		return true
	}
	timer := time.NewTimer(pause << (2 * (try - 2)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// reserve returns a connection with room for a request, dialling where there is none.
func (o *Origin) reserve(ctx context.Context, t *answer.Timings) (*conn, error) {
	for without := 0; ; {
		c, f := o.join()
		if c != nil {
			return c, nil
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, &answer.Error{Err: ctx.Err()}
		}
		t.Add(f.timings.DNS, f.timings.Connect, f.timings.TLS)
		if f.err != nil {
			return nil, f.err
		}
		if !o.barren(f.conn) {
			continue
		}
		if without++; without >= maxTries || !wait(ctx, without) {
			return nil, &answer.Error{Peer: f.conn.peer, Fresh: true, Err: ErrRefused}
		}
	}
}

// barren reports whether a connection had no room from its beginning.
func (o *Origin) barren(c *conn) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !c.taken && c.Available() == 0
}

// useless reports whether no request has the connection and none can have it. What net/http has yet to clear up behind
// the last one is given its moment. The lock is held.
func (c *conn) useless() bool {
	return c.users == 0 && time.Since(c.left) > clearing && c.Available() == 0
}

// leave gives back what reserve has returned.
func (o *Origin) leave(c *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c.left = time.Now()
	if c.users--; c.meter != nil {
		c.meter.Settle(c.users)
	}
}

func (o *Origin) join() (*conn, *flight) {
	o.mu.Lock()
	defer o.mu.Unlock()
	kept := o.conns[:0]
	var found *conn
	for _, c := range o.conns {
		switch {
		case c.Err() != nil:
			continue
		case time.Since(c.made) > maxAge:
			c.retire()
			continue
		case found == nil && c.Reserve() == nil:
			found = c
			found.users, found.taken = found.users+1, true
			if found.meter != nil {
				found.meter.Grant()
			}
		case c.useless():
			go c.Close() //nolint:errcheck // there is nothing to lose in it
			continue
		}
		kept = append(kept, c)
	}
	clear(o.conns[len(kept):])
	o.conns = kept
	if found != nil {
		return found, nil
	}
	if o.flight == nil {
		o.flight = &flight{done: make(chan struct{})}
		go o.fly(o.flight)
	}
	return nil, o.flight
}

func (o *Origin) fly(f *flight) {
	raw, err := o.dial(&f.timings)
	var c *conn
	if err == nil {
		c, err = o.begin(raw)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil {
		o.hold(c)
	}
	f.conn, f.err, o.flight = c, err, nil
	close(f.done)
}

// Adopt takes a connection on which the server has chosen HTTP/2 and nothing was sent.
func (o *Origin) Adopt(raw *tls.Conn) {
	if c, err := o.begin(raw); err == nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.hold(c)
	}
}

// hold keeps a connection until it has ended: also where no other request comes, which would find that. The lock is held.
func (o *Origin) hold(c *conn) {
	o.conns = append(o.conns, c)
	c.SetStateHook(func(cc *http.ClientConn) {
		if cc.Err() != nil {
			go o.drop(c) // net/http calls from within its requests
		}
	})
}

func (o *Origin) drop(c *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.conns = slices.DeleteFunc(o.conns, func(other *conn) bool { return other == c })
}

func (o *Origin) begin(raw *tls.Conn) (*conn, error) {
	metered := meterOf(raw)
	if metered != nil {
		metered.Begin()
	}
	client, err := o.transport.of.NewClientConn(context.WithValue(context.Background(), given{}, net.Conn(raw)), "https", o.addr)
	if err != nil {
		_ = raw.Close()
		return nil, &answer.Error{Peer: raw.RemoteAddr().String(), Fresh: true, Err: meaning(err)}
	}
	return &conn{ClientConn: client, meter: metered, peer: raw.RemoteAddr().String(), made: time.Now(), left: time.Now()}, nil
}

// meterOf is the meter below TLS, or nil.
func meterOf(conn net.Conn) *meter.Conn {
	for {
		if found, ok := conn.(*meter.Conn); ok {
			return found
		}
		over, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return nil
		}
		conn = over.NetConn()
	}
}

// retire closes the connection when what is under way on it has ended.
func (c *conn) retire() {
	c.SetStateHook(func(cc *http.ClientConn) {
		if cc.InFlight() == 0 {
			go cc.Close() //nolint:errcheck // there is nothing to lose in it
		}
	})
	if c.InFlight() == 0 {
		_ = c.Close()
	}
}

// Drop closes the connections, for tests.
func (o *Origin) Drop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.conns {
		_ = c.Close()
	}
	o.conns = nil
}

// exchange is one request and its response on one connection.
type exchange struct {
	conn    *conn
	request *Request
	wire    wire
	// interim counts interim responses.
	interim atomic.Int32
}

// wire follows one request of net/http. Its hooks run on other goroutines.
type wire struct{ state atomic.Int32 }

func (w *wire) sent() answer.Sent { return answer.Sent(w.state.Load()) }

func (e *exchange) trace() *httptrace.ClientTrace {
	w := &e.wire
	return &httptrace.ClientTrace{
		Got1xxResponse: func(int, textproto.MIMEHeader) error {
			if e.interim.Add(1) > answer.MaxInterim {
				if e.conn.meter != nil {
					_ = e.conn.meter.Close() // at once: more has been read already
				}
				return answer.ErrInterim
			}
			return nil
		},
		WroteHeaders: func() { w.state.CompareAndSwap(int32(answer.Nothing), int32(answer.Maybe)) },
		WroteRequest: func(info httptrace.WroteRequestInfo) {
			if info.Err == nil {
				w.state.Store(int32(answer.All))
			}
		},
	}
}

func (e *exchange) do(ctx context.Context) (*answer.Answer, error) {
	r := e.request
	ctx = httptrace.WithClientTrace(ctx, e.trace())
	var late *time.Timer
	if r.HeaderTimeout > 0 {
		bounded, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		late = time.AfterFunc(r.HeaderTimeout, func() { cancel(ErrHeaderLate) })
		defer late.Stop()
		ctx = bounded
	}
	req := r.HTTP.WithContext(ctx)
	req.ContentLength, req.Body = int64(len(r.Body)), http.NoBody
	if len(r.Body) > 0 {
		b := &body{rest: r.Body}
		defer b.Close() //nolint:errcheck // the bytes are the caller's from then on
		req.Body = b
	}
	began := time.Now()
	resp, err := e.conn.RoundTrip(req)
	headed := time.Now()
	r.Timings.FirstByte += headed.Sub(began)
	switch {
	case err == nil:
	case e.interim.Load() > answer.MaxInterim:
		e.wire.state.Store(int32(answer.All)) // it was answered, after a fashion
		_ = e.conn.Close()                    // or what follows would be read for the other requests' sake
		return nil, answer.ErrInterim
	case errors.Is(context.Cause(ctx), ErrHeaderLate):
		return nil, ErrHeaderLate
	default:
		return nil, err
	}
	if late != nil {
		late.Stop()
	}
	defer resp.Body.Close() //nolint:errcheck // there is nothing to lose in it
	// net/http reads any number, signs and all.
	if number, _, _ := strings.Cut(resp.Status, " "); len(number) != 3 || resp.StatusCode < 100 {
		e.wire.state.Store(int32(answer.All))
		return nil, answer.ErrStatus
	}
	if resp.Body != http.NoBody && resp.ContentLength != 0 && !r.Wants.Patient(resp.StatusCode) {
		drip := time.AfterFunc(answer.Drip, func() { _ = resp.Body.Close() })
		defer drip.Stop()
	}
	a := &answer.Answer{Status: resp.StatusCode, Header: resp.Header, Peer: e.conn.peer}
	a.Body, a.Truncated, _ = answer.Read(resp, r.Wants)
	r.Timings.Body += time.Since(headed)
	return a, nil
}

// body is a request's body. net/http may read it after the response is there.
type body struct {
	mu   sync.Mutex
	rest []byte
}

func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

// Close has later reads find nothing.
func (b *body) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rest = nil
	return nil
}

// streamError is how net/http shows its own to errors.As, field by field.
type streamError struct {
	StreamID uint32
	Code     uint32
	Cause    error
}

func (e streamError) Error() string { return "stream reset" }

// refusedStream is RFC 9113's REFUSED_STREAM.
const refusedStream = 7

// unprocessed reports whether the server has not looked at the request. net/http has no types for two of the reasons.
func unprocessed(err error) bool {
	var stream streamError
	if errors.As(err, &stream) {
		return stream.Code == refusedStream
	}
	switch err.Error() {
	case "http2: client conn not usable", "http2: Transport received Server's graceful shutdown GOAWAY":
		return true
	}
	return false
}

// meaning makes the end of a connection or stream of what net/http has only texts for.
func meaning(err error) error {
	if errors.As(err, new(streamError)) {
		return errors.Join(io.ErrUnexpectedEOF, err)
	}
	text := err.Error()
	for _, begin := range []string{
		"http2: client conn could not be established", "http2: client connection lost", "http2: client connection force closed",
		"http2: Transport received", "http2: server sent GOAWAY", "http2: client conn is closed",
	} {
		if strings.HasPrefix(text, begin) {
			return errors.Join(io.ErrUnexpectedEOF, err)
		}
	}
	return err
}
