package httpplugin

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// TestBrokenAnswers holds a receiver against what an attempt must say about it.
func TestBrokenAnswers(t *testing.T) {
	head := "HTTP/1.1 200 OK\r\n"
	tests := []struct {
		name, response string
		code           string // empty when the answer counts
		status         int
		body           string
		truncated      bool
	}{
		{name: "nothing", response: "", code: plugin.CodeReset},
		{name: "half a status line", response: "HTTP/1.1 20", code: plugin.CodeProtocol},
		{name: "half a header", response: head + "Content-Le", status: 200, truncated: true},
		{name: "another protocol", response: "SSH-2.0-OpenSSH_9.6\r\n", code: plugin.CodeProtocol},
		{name: "status is no number", response: "HTTP/1.1 abc OK\r\n\r\n", code: plugin.CodeProtocol},
		{name: "bad header line", response: head + "no colon here\r\n\r\n", status: 200, truncated: true},
		{name: "two lengths", response: head + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", status: 200, truncated: true},
		{name: "negative length", response: head + "Content-Length: -1\r\n\r\n", status: 200, truncated: true},
		{name: "switching protocols", response: "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", status: 101},
		{name: "header bomb", response: head + strings.Repeat("X-Bomb: "+strings.Repeat("b", 1000)+"\r\n", 200), status: 200, truncated: true},
		{name: "one huge header line", response: head + "X-Bomb: " + strings.Repeat("b", 200_000), status: 200, truncated: true},
		{name: "many small headers", response: head + strings.Repeat("a: b\r\n", 100_000), status: 200, truncated: true},
		{name: "flood of interim responses", response: strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 10_000), code: plugin.CodeProtocol},

		{name: "identity", response: head + "Transfer-Encoding: identity\r\n\r\nok", status: 200, truncated: true},
		{name: "failure with a broken header", response: "HTTP/1.1 503 Busy\r\nno colon\r\n\r\n", status: 503, truncated: true},
		{name: "status 000", response: "HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n" + head + "Content-Length: 0\r\n\r\n", code: plugin.CodeProtocol},
		{name: "status 099", response: "HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n" + head + "Content-Length: 0\r\n\r\n", code: plugin.CodeProtocol},
		{name: "status +20", response: "HTTP/1.1 +20 X\r\nContent-Length: 0\r\n\r\n", code: plugin.CodeProtocol},
		{name: "status of two digits", response: "HTTP/1.1 20 X\r\nContent-Length: 0\r\n\r\n", code: plugin.CodeProtocol},
		{name: "status of four digits", response: "HTTP/1.1 2000 X\r\nContent-Length: 0\r\n\r\n", code: plugin.CodeProtocol},
		{name: "status 600", response: "HTTP/1.1 600 X\r\nContent-Length: 0\r\n\r\n", status: 600},
		{name: "status 999", response: "HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n", status: 999},
		{name: "broken interim response", response: "HTTP/1.1 103 X\r\nno colon\r\n\r\n" + head, code: plugin.CodeProtocol},

		{name: "as many interim responses as there may be", response: strings.Repeat("HTTP/1.1 103 E\r\n\r\n", 100) + "HTTP/1.1 204 No Content\r\n\r\n", status: 204},
		{name: "one more", response: strings.Repeat("HTTP/1.1 103 E\r\n\r\n", 101) + "HTTP/1.1 204 No Content\r\n\r\n", code: plugin.CodeProtocol},
		{name: "some interim responses", response: "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 P\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", status: 204},
		{name: "body breaks off", response: head + "Content-Length: 10\r\n\r\nabc", status: 200, body: "abc", truncated: true},
		{name: "bad chunk", response: head + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n", status: 200, body: "abc", truncated: true},
		{name: "chunked", response: head + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", status: 200, body: "abc"},
		{name: "until the end", response: "HTTP/1.0 200 OK\r\n\r\nabc", status: 200, body: "abc"},
		{name: "gzip is not inflated", response: head + "Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08", status: 200, body: "\x1f\x8b\x08"},
		{name: "failure without reason", response: "HTTP/1.1 500\r\nContent-Length: 0\r\n\r\n", status: 500},
		{name: "no content with content", response: "HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\nabc", status: 204},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			everyStack(t, func(t *testing.T, c client) {
				resp, err := attempt(t, c.instance(t, c.once(t, tt.response).url, nil))
				if tt.code != "" {
					wantFailure(t, err, tt.code, plugin.Sent)
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if unread := tt.truncated && tt.body == "" && tt.status != 0; unread != (resp.Note != "") {
					t.Errorf("note %q", resp.Note)
				}
				if resp.Status != tt.status || string(resp.Body) != tt.body || resp.Truncated != tt.truncated {
					t.Errorf("status %d, body %q, truncated %v; want %d, %q, %v", resp.Status, resp.Body, resp.Truncated, tt.status, tt.body, tt.truncated)
				}
			})
		})
	}
}

func TestResetBeforeDuringAndAfter(t *testing.T) {
	t.Run("before the request is read", func(t *testing.T) {
		everyStack(t, func(t *testing.T, c client) {
			srv := c.serveRaw(t, func(_ int, conn net.Conn) { reset(conn) })
			_, err := attempt(t, c.instance(t, srv.url, nil))
			// How far it came is a matter of microseconds.
			var f *plugin.Failure
			if !errors.As(err, &f) || f.Code != plugin.CodeReset && (f.Code != plugin.CodeConnect || f.WireState != plugin.NotSent) {
				t.Errorf("error %v, want a reset, or no connection", err)
			}
		})
	})
	t.Run("in the middle of the request", func(t *testing.T) {
		everyStack(t, func(t *testing.T, c client) {
			srv := c.serveRaw(t, func(_ int, conn net.Conn) {
				_, _ = io.ReadFull(conn, make([]byte, 20))
				reset(conn)
			})
			req := event()
			req.Body = make([]byte, 8<<20)
			_, err := c.instance(t, srv.url, nil).Attempt(within(t, 10*time.Second), req)
			if f := wantFailureCode(t, err, plugin.CodeReset); f.WireState == plugin.NotSent {
				t.Errorf("failure %+v, but some of it was sent", *f)
			}
		})
	})
	t.Run("instead of an answer", func(t *testing.T) {
		everyStack(t, func(t *testing.T, c client) {
			srv := c.serveRaw(t, func(_ int, conn net.Conn) {
				readRequest(bufio.NewReader(conn))
				reset(conn)
			})
			_, err := attempt(t, c.instance(t, srv.url, nil))
			wantFailure(t, err, plugin.CodeReset, plugin.Sent)
			if n := srv.accepted(); n != 1 {
				t.Errorf("%d connections for one attempt: it was repeated", n)
			}
		})
	})
	t.Run("behind the status", func(t *testing.T) {
		everyStack(t, func(t *testing.T, c client) {
			taken := make(chan struct{})
			srv := c.serveRaw(t, func(_ int, conn net.Conn) {
				readRequest(bufio.NewReader(conn))
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"+strings.Repeat("x", 50_000))
				<-taken
				reset(conn)
			})
			time.AfterFunc(200*time.Millisecond, func() { close(taken) })
			resp, err := attempt(t, c.instance(t, srv.url, nil))
			if err != nil || resp.Status != 200 || !resp.Truncated || len(resp.Body) != 4096 {
				t.Errorf("%v, %v; the status counts", resp, err)
			}
		})
	})
}

// TestReusedConnectionThatDiesIsTriedAgainOnce: a server that closes an idle connection may do so while a request is on
// its way.
func TestReusedConnectionThatDiesIsTriedAgainOnce(t *testing.T) {
	everyStack(t, func(t *testing.T, c client) {
		for _, second := range []int{200, 0} {
			srv := c.serveRaw(t, func(n int, conn net.Conn) {
				r := bufio.NewReader(conn)
				if n == 1 && readRequest(r) {
					_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
				}
				if readRequest(r) && n == 2 && second != 0 {
					_, _ = io.WriteString(conn, "HTTP/1.1 201 OK\r\nContent-Length: 0\r\n\r\n")
				}
				_ = conn.Close()
			})
			inst := c.instance(t, srv.url, nil)
			if resp, err := attempt(t, inst); err != nil || resp.Status != 200 {
				t.Fatalf("first: %v, %v", resp, err)
			}
			resp, err := attempt(t, inst)
			if second == 0 {
				wantFailure(t, err, plugin.CodeReset, plugin.Sent)
			} else if err != nil || resp.Status != 201 {
				t.Errorf("%v, %v; want the answer that the second connection gave", resp, err)
			}
			if n := srv.accepted(); n != 2 {
				t.Errorf("%d connections, want 2", n)
			}
		}
	})
}

// TestRequestTimeoutIsTriedAgainOnce: 408 says that the request did not arrive whole. On a connection that was idle and
// closes with it, it is for one that crossed the receiver's farewell: that is repeated on a new connection, once, in the
// same attempt (RFC 9110, section 15.5.9). Everywhere else it is the answer.
func TestRequestTimeoutIsTriedAgainOnce(t *testing.T) {
	const (
		ok       = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
		goodbye  = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
		stays    = "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"
		accepted = "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
	)
	everyStack(t, func(t *testing.T, c client) {
		for name, tt := range map[string]struct {
			first, second []string // what the connections answer, request by request
			want          []int
			requests      int32
		}{
			"repeated":                   {[]string{ok, goodbye}, []string{accepted}, []int{200, 201}, 3},
			"once":                       {[]string{ok, goodbye}, []string{goodbye}, []int{200, 408}, 3},
			"not where it stays":         {[]string{ok, stays}, []string{accepted}, []int{200, 408}, 2},
			"not on a new connection":    {[]string{goodbye}, []string{accepted}, []int{408}, 1},
			"what became of that counts": {[]string{ok, goodbye}, nil, []int{200, 0}, 3},
		} {
			var requests atomic.Int32
			srv := c.serveRaw(t, func(n int, conn net.Conn) {
				defer conn.Close()
				r := bufio.NewReader(conn)
				answers := tt.first
				if n > 1 {
					answers = tt.second
				}
				for _, answer := range answers {
					if !readRequest(r) {
						return
					}
					requests.Add(1)
					_, _ = io.WriteString(conn, answer)
				}
				if stayed := len(answers) > 0 && answers[len(answers)-1] == stays; (answers == nil || stayed) && readRequest(r) {
					requests.Add(1)
				}
			})
			inst := c.instance(t, srv.url, nil)
			for i, want := range tt.want {
				resp, err := attempt(t, inst)
				if want == 0 {
					wantFailure(t, err, plugin.CodeReset, plugin.Sent)
				} else if err != nil || resp.Status != want {
					t.Errorf("%s, attempt %d: %v, %v; want %d", name, i+1, resp, err, want)
				}
			}
			if n := requests.Load(); n != tt.requests {
				t.Errorf("%s: %d requests, want %d", name, n, tt.requests)
			}
		}
	})
}

// TestBytesBehindAResponseInTLS: what TLS has read off the socket, a second record or the end of TLS, is not seen by a
// look at the socket.
func TestBytesBehindAResponseInTLS(t *testing.T) {
	everyStack(t, func(t *testing.T, c client) {
		for _, behind := range []string{"a record", "the same record", "the end", "half a second later, the end"} {
			srv := c.serveRaw(t, func(_ int, conn net.Conn) {
				r := bufio.NewReader(conn)
				for first := true; readRequest(r); first = false {
					const ok, smuggled = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 299 Smuggled\r\nContent-Length: 0\r\n\r\n"
					if !first {
						_, _ = io.WriteString(conn, "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
						continue
					}
					together(conn, func(conn net.Conn) {
						switch behind {
						case "a record":
							_, _ = io.WriteString(conn, ok)
							_, _ = io.WriteString(conn, smuggled)
						case "the same record":
							_, _ = io.WriteString(conn, ok+smuggled)
						default:
							_, _ = io.WriteString(conn, ok)
							if s, isTLS := conn.(*secured); isTLS {
								_ = s.CloseWrite()
							}
						}
					})
				}
			})
			inst := c.instance(t, srv.url, nil)
			for n := range 5 {
				resp, err := attempt(t, inst)
				if err != nil || resp.Status != 200 && (behind[0] != 't' && c.tls != nil || resp.Status != 503) {
					t.Errorf("%s, attempt %d: %v, %v; want the answer to its own request", behind, n, resp, err)
				}
			}
		}
	})
}

// TestEarlyAnswers holds an answer that comes before the request is read against bodies of all sizes, of receivers that
// close and of such that go on and read nothing.
func TestEarlyAnswers(t *testing.T) {
	everyStack(t, func(t *testing.T, c client) {
		sizes := []int{100, 30 << 10, 100 << 10, 1 << 20, 8 << 20}
		if testing.Short() {
			sizes = sizes[:3]
		}
		for _, size := range sizes {
			for _, end := range []string{"close", "stay"} {
				srv := c.serveRaw(t, func(_ int, conn net.Conn) {
					head := make([]byte, 16)
					_, _ = io.ReadFull(conn, head)
					_, _ = io.WriteString(conn, "HTTP/1.1 410 Gone\r\nConnection: close\r\nContent-Length: 4\r\n\r\ngone")
					if end == "close" {
						_ = conn.Close()
					}
				})
				inst := c.instance(t, srv.url, nil)
				for range 3 {
					req := event()
					req.Body = make([]byte, size)
					start := time.Now()
					resp, err := inst.Attempt(within(t, 8*time.Second), req)
					if err != nil || resp.Status != 410 {
						t.Errorf("%d bytes, %s: %v, %v after %v", size, end, resp, err, time.Since(start))
					}
				}
			}
		}
	})
}

// TestNoContentWithContent: what a 204 has announced is not the next answer; nor is a line too much.
func TestNoContentWithContent(t *testing.T) {
	everyStack(t, func(t *testing.T, c client) {
		for _, first := range []string{
			"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
			"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
		} {
			srv := c.serveRaw(t, func(_ int, conn net.Conn) {
				r := bufio.NewReader(conn)
				for n := 0; readRequest(r); n++ {
					if n > 0 && strings.Contains(first, "200") {
						_, _ = io.WriteString(conn, "\r\n") // late, and read before the answer
					} else if n > 0 {
						_, _ = io.WriteString(conn, "hello")
					}
					_, _ = io.WriteString(conn, first)
				}
			})
			inst := c.instance(t, srv.url, nil)
			for n := range 6 {
				if resp, err := attempt(t, inst); err != nil || resp.Status/100 > 3 {
					t.Errorf("%.20q, attempt %d: %v, %v", first, n, resp, err)
				}
			}
		}
	})
}

func TestSlowReceiversEndAtTheDeadline(t *testing.T) {
	drip := func(conn net.Conn, lead, piece string) {
		readRequest(bufio.NewReader(conn))
		_, err := io.WriteString(conn, lead)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for err == nil {
			<-tick.C
			_, err = io.WriteString(conn, piece)
		}
	}
	const limit = 300 * time.Millisecond
	everyStack(t, func(t *testing.T, c client) {
		t.Run("header", func(t *testing.T) {
			srv := c.serveRaw(t, func(_ int, conn net.Conn) { drip(conn, "HTTP/1.1", " ") })
			_, err := c.instance(t, srv.url, nil).Attempt(within(t, limit), event())
			wantFailure(t, err, plugin.CodeTimeout, plugin.Sent)
		})
		t.Run("of a yes", func(t *testing.T) {
			for _, begin := range []string{"HTTP/1.1 200 OK\r\nX: ", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"} {
				srv := c.serveRaw(t, func(_ int, conn net.Conn) { drip(conn, begin, "x") })
				start := time.Now()
				resp, err := c.instance(t, srv.url, nil).Attempt(within(t, 20*time.Second), event())
				if err != nil || resp.Status != 200 || !resp.Truncated {
					t.Errorf("%q: %v, %v", begin, resp, err)
				}
				if took := time.Since(start); took > 10*time.Second {
					t.Errorf("%q: took %v", begin, took)
				}
			}
		})
		t.Run("interim", func(t *testing.T) {
			srv := c.serveRaw(t, func(_ int, conn net.Conn) { drip(conn, "", "HTTP/1.1 100 Continue\r\n\r\n") })
			_, err := c.instance(t, srv.url, nil).Attempt(within(t, limit), event())
			wantFailure(t, err, plugin.CodeTimeout, plugin.Sent)
		})
		t.Run("body", func(t *testing.T) {
			srv := c.serveRaw(t, func(_ int, conn net.Conn) { drip(conn, "HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\n", "x") })
			start := time.Now()
			resp, err := c.instance(t, srv.url, nil).Attempt(within(t, limit), event())
			if err != nil || resp.Status != 503 || !resp.Truncated {
				t.Errorf("%v, %v; the status counts", resp, err)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v, deadline %v", took, limit)
			}
		})
		t.Run("request not taken", func(t *testing.T) {
			srv := c.serveRaw(t, func(int, net.Conn) {})
			req := event()
			req.Body = make([]byte, 16<<20)
			_, err := c.instance(t, srv.url, nil).Attempt(within(t, limit), req)
			if f := wantFailureCode(t, err, plugin.CodeTimeout); f.WireState != plugin.MaybeSent {
				t.Errorf("failure %+v, want MAYBE_SENT", *f)
			}
		})
	})
}

func TestEndlessBodyIsCutOff(t *testing.T) {
	everyStack(t, func(t *testing.T, c client) {
		sent := make(chan int, 1)
		srv := c.serveRaw(t, func(_ int, conn net.Conn) {
			readRequest(bufio.NewReader(conn))
			n, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			chunk := fmt.Sprintf("%x\r\n%s\r\n", 64<<10, strings.Repeat("x", 64<<10))
			for err == nil && n < 1<<30 {
				var m int
				m, err = io.WriteString(conn, chunk)
				n += m
			}
			sent <- n
		})
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		resp, err := attempt(t, c.instance(t, srv.url, nil))
		runtime.ReadMemStats(&after)
		if err != nil || resp.Status != 200 || len(resp.Body) != 4096 || !resp.Truncated {
			t.Fatalf("%v, %v", resp, err)
		}
		// What the kernel buffers on both ends comes on top of the 64 KiB that are drained.
		if n := <-sent; n > 32<<20 {
			t.Errorf("%d bytes were taken", n)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 16<<20 {
			t.Errorf("%d bytes allocated", grown)
		}
	})
}

func TestBytesBehindAResponseAreNotTheNextResponse(t *testing.T) {
	everyStack(t, func(t *testing.T, c client) {
		first := make(chan struct{})
		srv := c.serveRaw(t, func(n int, conn net.Conn) {
			r := bufio.NewReader(conn)
			for readRequest(r) {
				if n == 1 {
					_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 418 Smuggled\r\nContent-Length: 0\r\n\r\n")
					close(first)
					continue
				}
				_, _ = io.WriteString(conn, "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
			}
		})
		inst := c.instance(t, srv.url, nil)
		if resp, err := attempt(t, inst); err != nil || resp.Status != 200 || string(resp.Body) != "ok" {
			t.Fatalf("first: %v, %v", resp, err)
		}
		<-first
		if resp, err := attempt(t, inst); err == nil && resp.Status != 201 {
			t.Errorf("second: status %d, want 201 on another connection", resp.Status)
		} else if err != nil {
			t.Errorf("second: %v", err)
		}
	})
}
