package httpplugin

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// maxFreshTries bounds how often a request is taken to another connection when the one it was given
// turned out closed before a byte of it was written.
const maxFreshTries = 3

// wire follows one request of net/http. Its hooks run on other goroutines.
type wire struct {
	state  atomic.Int32 // plugin.WireState; zero until there is something to say
	reused atomic.Bool
	peer   atomic.Pointer[string]
}

func (w *wire) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			peer := info.Conn.RemoteAddr().String()
			w.peer.Store(&peer)
			w.reused.Store(info.Reused)
		},
		WroteHeaders: func() { w.state.Store(int32(plugin.MaybeSent)) },
		WroteRequest: func(info httptrace.WroteRequestInfo) {
			if info.Err == nil {
				w.state.Store(int32(plugin.Sent))
			}
		},
	}
}

func (w *wire) sent() plugin.WireState {
	if s := plugin.WireState(w.state.Load()); s != 0 {
		return s
	}
	return plugin.NotSent
}

func (w *wire) peerText() string {
	if p := w.peer.Load(); p != nil {
		return *p
	}
	return ""
}

// attemptNetHTTP sends by net/http's Transport. RoundTrip itself follows no redirect, and it repeats no
// request that it has begun to write: the body cannot be rewound, for there is no GetBody, and
// netHTTPHeader hides the header names that would declare the request repeatable.
func (i *instance) attemptNetHTTP(ctx context.Context, t *target, r *plugin.Request, token string) (*plugin.Response, error) {
	header, err := i.netHTTPHeader(r, token)
	if err != nil {
		return nil, refused(err)
	}
	for try := 1; ; try++ {
		w := &wire{}
		req := (&http.Request{
			Method: i.method, URL: t.url, Host: t.host, Header: header,
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
			Body: http.NoBody, ContentLength: int64(len(r.Body)),
		}).WithContext(httptrace.WithClientTrace(ctx, w.trace()))
		if len(r.Body) > 0 {
			req.Body = io.NopCloser(bytes.NewReader(r.Body))
		}
		resp, err := i.pool.transport.RoundTrip(req)
		if err != nil {
			if try < maxFreshTries && w.reused.Load() && w.sent() == plugin.NotSent && ctx.Err() == nil {
				continue // an idle connection had been closed; nothing was written
			}
			if !w.reused.Load() {
				err = i.origin.explain(err)
			}
			return nil, i.pool.failure(ctx, err, w.sent(), w.peerText())
		}
		if resp.StatusCode == http.StatusSwitchingProtocols {
			_ = resp.Body.Close()
			return nil, failure(ctx, errUpgrade, plugin.Sent, w.peerText())
		}
		kept := readBody(resp, r.MaxResponseBody)
		_ = resp.Body.Close()
		return answer(resp, kept, w.peerText(), i.allHeaders), nil
	}
}

func (i *instance) netHTTPHeader(r *plugin.Request, token string) (http.Header, error) {
	header := make(http.Header, len(r.Headers)+3+len(i.fixed))
	for _, h := range i.fixed {
		header[http.CanonicalHeaderKey(h.Name)] = []string{h.Value}
	}
	if token != "" {
		header[http.CanonicalHeaderKey(i.auth.header)] = []string{"Bearer " + token}
	}
	for _, h := range r.Headers {
		if err := checkHeader(h.Name, h.Value); err != nil {
			return nil, err
		}
		if err := i.conflict(h.Name); err != nil {
			return nil, err
		}
		name := http.CanonicalHeaderKey(h.Name)
		if name == "Idempotency-Key" || name == "X-Idempotency-Key" {
			name = h.Name // in lower case net/http does not see it, and so does not repeat the request
		}
		header[name] = append(header[name], h.Value)
	}
	header["Accept-Encoding"] = []string{"identity"}
	if len(header["User-Agent"]) == 0 {
		header["User-Agent"] = []string{i.agent} // an empty one keeps Go's default away
	}
	if len(header["Traceparent"]) == 0 && r.Traceparent != "" {
		if err := checkHeader("traceparent", r.Traceparent); err != nil {
			return nil, err
		}
		header["Traceparent"] = []string{r.Traceparent}
	}
	return header, nil
}
