package httpplugin

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync/atomic"

	"github.com/grapnel/grapnel/plugins/http/internal/answer"
	"github.com/grapnel/grapnel/plugins/http/internal/h1"
	"github.com/grapnel/grapnel/plugins/http/internal/h2"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxJoined is the largest body that is copied behind its header, so that both leave in one piece.
	maxJoined = 16 << 10
	// maxSwitches bounds how often a receiver may change its mind about the version while one attempt looks for a connection.
	maxSwitches = 4
)

// errHTTP2 means that the receiver has chosen HTTP/2. Nothing was sent.
var errHTTP2 = errors.New("the receiver speaks HTTP/2")

// origin is one scheme, host and port, in whichever version of HTTP it speaks.
type origin struct {
	pool *pool
	addr string
	h1   *h1.Origin
	h2   *h2.Origin // nil where only HTTP/1.1 is spoken
	// http1 is set when the receiver has chosen HTTP/1.1 although it was offered more.
	http1 atomic.Bool
	// asked is set while the receiver wants a client certificate.
	asked atomic.Bool
}

func newOrigin(p *pool, t *target) *origin {
	o := &origin{pool: p, addr: t.addr()}
	if t.Scheme != "https" {
		encrypted := p.via != nil && p.via.tls != nil
		o.h1 = h1.New(func(ctx context.Context, t *answer.Timings) (net.Conn, bool, error) {
			var steps outbound.Steps
			conn, err := p.dial(outbound.Timed(ctx, &steps), o.addr)
			t.Add(steps.DNS, steps.Connect, steps.TLS)
			return conn, encrypted, err
		})
		return o
	}
	o.h1 = h1.New(func(ctx context.Context, t *answer.Timings) (net.Conn, bool, error) {
		conn, err := o.dialTLS(ctx, t)
		if err != nil {
			return nil, true, err
		}
		if conn.ConnectionState().NegotiatedProtocol == "h2" {
			o.http1.Store(false)
			o.h2.Adopt(conn)
			return nil, true, errHTTP2
		}
		return conn, true, nil
	})
	if p.settings.http2 {
		o.h2 = h2.New(p.http2, o.addr, func(t *answer.Timings) (*tls.Conn, error) {
			conn, err := o.dialTLS(context.Background(), t) // bounded by the timeouts of the pool
			if err != nil {
				return nil, err
			}
			if conn.ConnectionState().NegotiatedProtocol != "h2" {
				o.http1.Store(true)
				o.h1.Adopt(conn, true)
				return nil, h2.ErrHTTP1
			}
			return conn, nil
		})
	}
	return o
}

// dialTLS also notes whether the receiver wants a client certificate.
func (o *origin) dialTLS(ctx context.Context, t *answer.Timings) (*tls.Conn, error) {
	var steps outbound.Steps
	conn, asked, err := o.pool.dialTLS(outbound.Timed(ctx, &steps), o.addr)
	t.Add(steps.DNS, steps.Connect, steps.TLS)
	if err == nil {
		o.asked.Store(asked)
	}
	return conn, err
}

// send is one request and its answer. What it reports as an error is a *plugin.Failure.
func (i *instance) send(ctx context.Context, t *target, r *plugin.Request, token string) (*plugin.Response, error) {
	s := i.pool.scratch.Get().(*scratch)
	defer i.pool.scratch.Put(s)
	var err error
	if s.fields, err = i.fields(s.fields[:0], r, token); err != nil {
		return nil, refused(err)
	}
	wants := answer.Wants{Body: r.MaxResponseBody, Whole: i.allHeaders || r.Batch}
	var got *answer.Answer
	for range maxSwitches {
		if i.origin.h2 == nil || i.origin.http1.Load() {
			request := h1.Request{HeaderTimeout: i.headerTimeout, Wants: wants}
			s.head = i.appendHead(s.head[:0], t, s.fields, len(r.Body))
			if request.Head = s.head; len(r.Body) <= maxJoined {
				s.head = append(s.head, r.Body...)
				request.Head = s.head
			} else {
				request.Body = r.Body
			}
			got, err = i.origin.h1.Do(ctx, &request)
			timed(r, &request.Timings)
		} else {
			request := h2.Request{HTTP: i.httpRequest(t, s.fields), Body: r.Body, HeaderTimeout: i.headerTimeout, Wants: wants}
			got, err = i.origin.h2.Do(ctx, &request)
			timed(r, &request.Timings)
		}
		if !errors.Is(err, errHTTP2) && !errors.Is(err, h2.ErrHTTP1) {
			break
		}
	}
	if err != nil {
		return nil, i.origin.failure(ctx, err)
	}
	return response(got, i.allHeaders, r.Batch), nil
}

// timed notes how long a request took, of which an attempt may make several.
func timed(r *plugin.Request, t *answer.Timings) {
	to := &r.Timings
	to.DNS, to.Connect, to.TLS = to.DNS+t.DNS, to.Connect+t.Connect, to.TLS+t.TLS
	to.FirstByte, to.Body = to.FirstByte+t.FirstByte, to.Body+t.Body
}

// scratch is what an attempt writes into and gives back.
type scratch struct {
	fields []plugin.Header
	head   []byte
}

// response makes a Response of an answer; only retry-after matters when all went well, and of a batch what was not taken,
// unless all is set.
func response(a *answer.Answer, all, batch bool) *plugin.Response {
	out := &plugin.Response{Status: a.Status, Body: a.Body, Truncated: a.Truncated, Peer: a.Peer, Note: a.Note}
	if a.Status/100 == 2 && !all {
		if after := a.Header["Retry-After"]; len(after) > 0 && len(after[0]) <= maxRetryAfter {
			out.Headers = []plugin.Header{{Name: "retry-after", Value: after[0]}}
		}
		if batch {
			for _, ids := range a.Header["Webhook-Failed-Ids"] {
				out.Headers = append(out.Headers, plugin.Header{Name: "webhook-failed-ids", Value: ids})
			}
		}
		return out
	}
	out.Headers = keep(a.Header)
	return out
}

// httpRequest is the request as net/http takes it, without its body.
func (i *instance) httpRequest(t *target, fields []plugin.Header) *http.Request {
	header := make(http.Header, len(fields)+2)
	values := make([]string, len(fields)+2)
	add := func(name, value string) {
		values[0] = value
		if before := header[name]; before != nil {
			header[name] = append(before, value)
		} else {
			header[name] = values[:1:1]
		}
		values = values[1:]
	}
	add("accept-encoding", "identity")
	agent := false
	for _, f := range fields {
		add(f.Name, f.Value)
		agent = agent || f.Name == "user-agent"
	}
	if !agent {
		add("user-agent", "") // an empty one keeps Go's default away
	}
	return &http.Request{Method: i.method, URL: t.URL, Host: t.host, Header: header, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
}
