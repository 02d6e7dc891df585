package httpplugin

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/sdk/plugin"
)

func TestRequestOnTheWire(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		var got *http.Request
		var body []byte
		srv := c.serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
			got = r
			body, _ = io.ReadAll(r.Body)
			w.WriteHeader(http.StatusAccepted)
			_, _ = io.WriteString(w, "thanks")
		})
		uri := srv.URL + "/hook/%20a?x=1&y=%2F"
		inst := c.configure(t, map[string]any{"method": "PUT"}, plugin.Target{
			Method: http.MethodPost, URL: uri, UserAgent: "grapnel/test", Egress: loopbackAllowed(),
			Headers: []plugin.Header{{Name: "x-static", Value: "s"}},
		})
		req := event()
		req.Headers = append(req.Headers, plugin.Header{Name: "idempotency-key", Value: "k"})
		resp, err := inst.Attempt(within(t, 10*time.Second), req)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Status != http.StatusAccepted || string(resp.Body) != "thanks" || resp.Truncated || resp.Peer != srv.Listener.Addr().String() {
			t.Errorf("response %+v", resp)
		}
		if got.Method != "PUT" || got.RequestURI != "/hook/%20a?x=1&y=%2F" || got.Host != srv.Listener.Addr().String() || string(body) != `{"n":1}` {
			t.Errorf("received %s %s for %s with body %q", got.Method, got.RequestURI, got.Host, body)
		}
		want := http.Header{
			"Content-Type": {"application/json"}, "Webhook-Id": {"evt_1"}, "X-Static": {"s"}, "Idempotency-Key": {"k"},
			"User-Agent": {"grapnel/test"}, "Accept-Encoding": {"identity"}, "Traceparent": {req.Traceparent}, "Content-Length": {"7"},
		}
		if diff := cmp.Diff(want, got.Header); diff != "" {
			t.Error(diff)
		}
	})
}

func TestEmptyAndLargeBodiesArriveWhole(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		var got []byte
		srv := c.serve(t, nil, func(_ http.ResponseWriter, r *http.Request) { got, _ = io.ReadAll(r.Body) })
		inst := c.instance(t, srv.URL, nil)
		for _, size := range []int{0, 1, 20_000, maxJoined, maxJoined + 1, 64 << 10, 1 << 20} {
			req := event()
			req.Body = bytes.Repeat([]byte{0, '\r', '\n', 0xff}, size/4+1)[:size]
			resp, err := inst.Attempt(within(t, 10*time.Second), req)
			if err != nil || resp.Status != http.StatusOK {
				t.Fatalf("%d bytes: %v, %v", size, resp, err)
			}
			if !bytes.Equal(got, req.Body) {
				t.Errorf("%d bytes sent, %d other ones arrived", size, len(got))
			}
		}
	})
}

func TestStatusPassesThrough(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		hits := atomic.Int32{}
		srv := c.serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
			hits.Add(1)
			status, _ := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/"))
			w.Header().Set("Location", "/200")
			w.Header().Set("Retry-After", "120")
			w.WriteHeader(status)
		})
		statuses := []int{200, 201, 204, 301, 302, 303, 307, 308, 400, 401, 404, 410, 429, 500, 503}
		for _, status := range statuses {
			resp, err := attempt(t, c.instance(t, fmt.Sprintf("%s/%d", srv.URL, status), nil))
			if err != nil || resp.Status != status {
				t.Errorf("status %d: got %+v, %v", status, resp, err)
				continue
			}
			if v := headerValue(resp, "retry-after"); v != "120" {
				t.Errorf("status %d: retry-after %q, want 120", status, v)
			}
			if location := headerValue(resp, "location"); (location != "") != (status >= 300) {
				t.Errorf("status %d: location %q; only failures keep their header", status, location)
			}
		}
		if n := int(hits.Load()); n != len(statuses) {
			t.Errorf("%d requests for %d attempts: a redirect was followed or a request repeated", n, len(statuses))
		}
	})
}

func headerValue(r *plugin.Response, name string) string {
	for _, h := range r.Headers {
		if h.Name == name {
			return h.Value
		}
	}
	return ""
}

func TestKeepAliveReuse(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		var conns atomic.Int32
		srv := c.serve(t, func(srv *httptest.Server) {
			srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
				if s == http.StateNew {
					conns.Add(1)
				}
			}
		}, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, strings.Repeat("x", 10_000)) // longer than what is kept
		})
		inst := c.instance(t, srv.URL, nil)
		for range 20 {
			resp, err := attempt(t, inst)
			if err != nil || len(resp.Body) != 4096 || !resp.Truncated {
				t.Fatalf("response %v, %v", resp, err)
			}
		}
		if n := conns.Load(); n != 1 {
			t.Errorf("%d connections for 20 attempts in a row, want 1", n)
		}
	})
}

func TestManyInFlightDoNotChurnConnections(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		const width, rounds = 100, 5
		var conns atomic.Int32
		all := make(chan struct{}, width)
		srv := c.serve(t, func(srv *httptest.Server) {
			srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
				if s == http.StateNew {
					conns.Add(1)
				}
			}
		}, func(http.ResponseWriter, *http.Request) {
			all <- struct{}{}
		})
		inst := c.instance(t, srv.URL, nil)
		for range rounds {
			var wg sync.WaitGroup
			for range width {
				wg.Go(func() {
					if resp, err := attempt(t, inst); err != nil || resp.Status != http.StatusOK {
						t.Errorf("response %v, %v", resp, err)
					}
				})
			}
			wg.Wait()
			if len(all) != width {
				t.Fatalf("%d requests arrived, want %d", len(all), width)
			}
			for range width {
				<-all
			}
		}
		// net/http may dial one that it does not need in the end.
		if n := conns.Load(); n > 2*width {
			t.Errorf("%d connections for %d rounds of %d attempts", n, rounds, width)
		}
	})
}

func TestClosedIdleConnectionIsNoticed(t *testing.T) {
	everyStack(t, func(t *testing.T, c client) {
		srv := c.serveRaw(t, func(_ int, conn net.Conn) {
			if readRequest(bufio.NewReader(conn)) {
				_, _ = io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
			}
			_ = conn.Close()
		})
		inst := c.instance(t, srv.url, nil)
		for i := range 5 {
			if resp, err := attempt(t, inst); err != nil || resp.Status != 204 {
				t.Errorf("attempt %d: %v, %v", i, resp, err)
			}
		}
	})
}

func wantFailureCode(t *testing.T, err error, code string) *plugin.Failure {
	t.Helper()
	f, ok := err.(*plugin.Failure) //nolint:errorlint // the harness returns it bare
	if !ok || f.Code != code {
		t.Fatalf("error %v, want a failure with code %s", err, code)
	}
	return f
}

func TestCancelAndDeadline(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		arrived := make(chan struct{}, 10)
		srv := c.serve(t, nil, func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			arrived <- struct{}{}
			<-r.Context().Done()
		})
		inst := c.instance(t, srv.URL, nil)
		start := time.Now()
		_, err := inst.Attempt(within(t, 500*time.Millisecond), event())
		f := wantFailure(t, err, plugin.CodeTimeout, plugin.Sent)
		if took := time.Since(start); took < 490*time.Millisecond || took > 15*time.Second || f.Source != plugin.SourceEndpoint {
			t.Errorf("deadline: %+v after %v", f, took)
		}
		<-arrived

		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-arrived; cancel() }()
		_, err = inst.Attempt(ctx, event())
		// It arrived, which the one who wrote it may not know yet when it is cancelled.
		if f := wantFailureCode(t, err, plugin.CodeCancelled); f.Source == plugin.SourceEndpoint || f.WireState == plugin.NotSent {
			t.Errorf("a cancelled attempt is held against the receiver, or taken for one that was not sent: %+v", f)
		}
	})
}

func TestHeaderTimeout(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		srv := c.serve(t, nil, func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		})
		_, err := attempt(t, c.instance(t, srv.URL, map[string]any{"header_timeout": "100ms"}))
		wantFailure(t, err, plugin.CodeTimeout, plugin.Sent)
	})
}

// TestSlowAnswersHaveTheWholeAttempt: no bound of the transport's own comes before the attempt's, unless it is asked for.
func TestSlowAnswersHaveTheWholeAttempt(t *testing.T) {
	if i, err := newInstance(newPools(), defaults(), plugin.Target{URL: "https://a.example/"}); err != nil || i.headerTimeout != 0 {
		t.Errorf("%v, %v: a header timeout that nobody has set", i.headerTimeout, err)
	}
}

func TestSignedQueryIsSentAndNothingElse(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		paths := make(chan string, 10)
		srv := c.serve(t, nil, func(_ http.ResponseWriter, r *http.Request) { paths <- r.RequestURI })
		inst := c.instance(t, srv.URL+"/hook", nil)
		req := event()
		req.URL = srv.URL + "/hook?signature=abc"
		if resp, err := inst.Attempt(within(t, 10*time.Second), req); err != nil || resp.Status != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
		if got := <-paths; got != "/hook?signature=abc" {
			t.Errorf("request target %q", got)
		}
		for _, uri := range []string{"http://127.0.0.1:1/hook", srv.URL + "/other", "https" + strings.TrimPrefix(srv.URL, "http") + "/hook", "::"} {
			req.URL = uri
			_, err := inst.Attempt(within(t, 10*time.Second), req)
			if f := wantFailure(t, err, plugin.CodeProtocol, plugin.NotSent); f.Source != plugin.SourcePlugin {
				t.Errorf("%s: %+v", uri, f)
			}
		}
	})
}

func TestHeadersThatBreakFramingAreRefused(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		srv := c.always(t, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		inst := c.instance(t, srv.url, nil)
		for name, value := range map[string]string{
			"x-a": "1\r\nx-b: 2", "x-b": "1\n2", "x-c": "a\x00b", "x d": "1", "x:e": "1", "content-length": "0",
			"transfer-encoding": "chunked", "host": "other", "connection": "close", "expect": "100-continue", "te": "trailers",
		} {
			req := event()
			req.Headers = append(req.Headers, plugin.Header{Name: name, Value: value})
			_, err := inst.Attempt(within(t, 10*time.Second), req)
			wantFailure(t, err, plugin.CodeProtocol, plugin.NotSent)
		}
		if n := srv.accepted(); n != 0 {
			t.Errorf("%d connections were made for refused requests", n)
		}
	})
}
