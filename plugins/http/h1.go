package httpplugin

import (
	"bufio"
	"context"
	"errors"
	"math"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// errHTTP2 means that the receiver has chosen HTTP/2, which net/http speaks. Nothing was sent.
var errHTTP2 = errors.New("the receiver speaks HTTP/2")

// origin keeps idle HTTP/1.1 connections to one scheme, host and port.
type origin struct {
	pool   *pool
	addr   string
	secure bool
	// http2 is set once the receiver has chosen HTTP/2.
	http2 atomic.Bool
	// asked is set while the receiver wants a client certificate.
	asked atomic.Bool

	mu       sync.Mutex
	idle     []*conn // the longest idle first
	sweeping bool
}

// conn is one HTTP/1.1 connection, owned by one attempt or by its origin's idle list.
type conn struct {
	net.Conn
	reader *bufio.Reader // over the conn itself, which counts
	left   int64         // bytes that may still be read
	probe  *probe
	peer   string
	// records says that there is TLS in it, to the receiver or to a proxy.
	records bool
	// interrupt ends reads and writes; made once, so that an attempt need not.
	interrupt func()
	made      time.Time
	idleSince time.Time
}

// Read counts down left, which bounds the header.
func (c *conn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errHeaderTooLarge
	}
	if int64(len(p)) > c.left {
		p = p[:c.left]
	}
	n, err := c.Conn.Read(p)
	c.left -= int64(n)
	return n, err
}

// take returns an idle connection that still stands, or nil.
func (o *origin) take(now time.Time) *conn {
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
		if now.Sub(c.idleSince) < idleTimeout && c.probe.quiet(now.Sub(c.idleSince)) {
			return c
		}
		_ = c.Close()
	}
}

// put takes a connection back.
func (o *origin) put(c *conn) {
	c.idleSince = time.Now()
	if c.idleSince.Sub(c.made) > maxAge {
		_ = c.Close()
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.idle) >= maxIdlePerHost {
		_ = c.Close()
		return
	}
	o.idle = append(o.idle, c)
	if !o.sweeping {
		o.sweeping = true
		time.AfterFunc(idleTimeout, o.sweep)
	}
}

// sweep closes what has been idle for too long, and comes again while there is anything to watch.
func (o *origin) sweep() {
	o.mu.Lock()
	defer o.mu.Unlock()
	limit := time.Now().Add(-idleTimeout)
	n := 0
	for n < len(o.idle) && o.idle[n].idleSince.Before(limit) {
		_ = o.idle[n].Close()
		n++
	}
	o.idle = slices.Delete(o.idle, 0, n)
	if o.sweeping = len(o.idle) > 0; o.sweeping {
		time.AfterFunc(idleTimeout/2, o.sweep)
	} else {
		o.idle = nil
	}
}

func (o *origin) dial(ctx context.Context) (*conn, error) {
	c := &conn{made: time.Now(), records: o.secure || o.pool.via != nil && o.pool.via.tls != nil}
	var raw net.Conn
	if o.secure {
		secure, asked, err := o.pool.dialTLS(ctx, o.addr)
		if err != nil {
			return nil, err
		}
		o.asked.Store(asked)
		if secure.ConnectionState().NegotiatedProtocol == "h2" {
			o.http2.Store(true)
			_ = secure.Close()
			return nil, errHTTP2
		}
		c.Conn, raw = secure, secure.NetConn()
	} else {
		plain, err := o.pool.dial(ctx, "tcp", o.addr)
		if err != nil {
			return nil, err
		}
		c.Conn, raw = plain, plain
	}
	if sc, ok := raw.(syscall.Conn); ok {
		c.probe = newProbe(sc)
	}
	c.peer = raw.RemoteAddr().String()
	c.reader = bufio.NewReaderSize(c, 4096)
	c.interrupt = func() { _ = c.SetDeadline(time.Unix(1, 0)) } // long past: ends what it waits for
	return c, nil
}

// attemptDirect sends over HTTP/1.1 on the caller's goroutine: write, then read.
func (i *instance) attemptDirect(ctx context.Context, t *target, r *plugin.Request, token string) (*plugin.Response, error) {
	buffer := i.pool.buffers.Get().(*[]byte)
	defer i.pool.buffers.Put(buffer)
	request, err := i.appendHead((*buffer)[:0], t, r, token)
	if err != nil {
		return nil, refused(err)
	}
	request = append(request, r.Body...)
	if cap(request) <= maxKeptBuffer {
		*buffer = request[:0]
	}
	for range maxFreshTries {
		c := i.origin.take(time.Now())
		reused := c != nil
		if !reused {
			if c, err = i.origin.dial(ctx); err != nil {
				if errors.Is(err, errHTTP2) {
					return nil, err
				}
				return nil, i.pool.failure(ctx, err, plugin.NotSent, "")
			}
		}
		x := exchange{conn: c, header: i.pool.settings.header, keep: r.MaxResponseBody, allHeaders: i.allHeaders}
		resp, err := x.do(ctx, request)
		if x.reusable {
			i.origin.put(c)
		} else {
			_ = c.Close()
		}
		if err == nil {
			return resp, nil
		}
		if !reused {
			err = i.origin.explain(err)
		}
		if !reused || x.state != plugin.NotSent || ctx.Err() != nil {
			return nil, i.pool.failure(ctx, err, x.state, c.peer)
		}
		// The idle connection had been closed and took no byte: another one.
	}
	return nil, failure(ctx, syscall.EPIPE, plugin.NotSent, "")
}

// explain marks the end of a connection that was just made to a receiver that wants a client certificate.
func (o *origin) explain(err error) error {
	if o.asked.Load() && isReset(err) {
		return errors.Join(err, errAsked)
	}
	return err
}

// exchange is one request and its response on one connection.
type exchange struct {
	conn   *conn
	header time.Duration // the longest wait for the response's header
	keep   int           // of the response's body
	// allHeaders is the instance's.
	allHeaders bool

	state    plugin.WireState
	reusable bool
}

func (x *exchange) do(ctx context.Context, request []byte) (*plugin.Response, error) {
	x.state = plugin.NotSent
	c := x.conn
	deadline, _ := ctx.Deadline()
	headerBy := time.Now().Add(x.header)
	early := headerBy.Before(deadline)
	if !early {
		headerBy = deadline
	}
	if err := c.SetDeadline(headerBy); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, c.interrupt)
	defer func() {
		// Once interrupt has begun, it may strike the connection's next user.
		x.reusable = stop() && x.reusable
	}()
	if err := x.write(request); err != nil {
		return nil, x.reason(err)
	}
	resp, err := x.readHead()
	if err != nil {
		return nil, err
	}
	kept := body{whole: true}
	if resp.Body != http.NoBody {
		c.left = math.MaxInt64 // readBody has its own bound
		if early {
			if err := c.SetDeadline(deadline); err != nil || ctx.Err() != nil {
				c.interrupt()
			}
		}
		kept = readBody(resp, x.keep)
	}
	// Bytes behind the response belong to no request: whoever sent them is not to be asked again here.
	x.reusable = kept.whole && !resp.Close && c.reader.Buffered() == 0
	return answer(resp, kept, c.peer, x.allHeaders), nil
}

func (x *exchange) write(request []byte) error {
	n, err := x.conn.Write(request)
	if err == nil {
		x.state = plugin.Sent
		return nil
	}
	// A TLS record may be on its way although no byte counts as written.
	if n > 0 || x.conn.records {
		x.state = plugin.MaybeSent
	}
	return err
}

// reason is why a write has failed: the receiver's TLS alert, where one stands unread behind the end of the
// connection.
func (x *exchange) reason(err error) error {
	if !x.conn.records || !isReset(err) {
		return err
	}
	x.conn.left = maxHeaderBytes
	if _, alert := x.conn.reader.Peek(1); alert != nil && tlsMessage(alert) != "" {
		return alert
	}
	return err
}

// readHead reads up to the final response's header; interim responses share its bound.
func (x *exchange) readHead() (*http.Response, error) {
	x.conn.left = maxHeaderBytes
	for {
		resp, err := http.ReadResponse(x.conn.reader, nil)
		switch {
		case err != nil:
			return nil, err
		case resp.StatusCode == http.StatusSwitchingProtocols:
			return nil, errUpgrade
		case resp.StatusCode >= 200:
			return resp, nil
		}
	}
}
