package httpplugin

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grapnel/grapnel/plugins/http/internal/h2"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Frames of HTTP/2 (RFC 9113, section 6).
const (
	frameData     = 0
	frameHeaders  = 1
	frameReset    = 3
	frameSettings = 4
	framePing     = 6
	frameGoAway   = 7
	endStream     = 1
	endHeaders    = 4
)

func frame(w io.Writer, kind, flags byte, stream uint32, payload ...byte) {
	head := binary.BigEndian.AppendUint32([]byte{0, byte(len(payload) >> 8), byte(len(payload)), kind, flags}, stream)
	_, _ = w.Write(append(head, payload...))
}

// serveH2 speaks HTTP/2 frame by frame; handle is called with each request that is there as a whole: the number of its
// connection, from 1, and of its stream, 1, 3, 5, …
func serveH2(t *testing.T, ca *authority, handle func(w io.Writer, conn int, stream uint32)) (url string, accepted *atomic.Int32) {
	t.Helper()
	config := ca.config(t)
	config.NextProtos = []string{"h2"}
	lis, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	accepted = &atomic.Int32{}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			n := int(accepted.Add(1))
			stop := context.AfterFunc(t.Context(), func() { _ = c.Close() })
			wg.Go(func() {
				defer stop()
				defer c.Close()
				frames(c, func(stream uint32) { handle(c, n, stream) })
			})
		}
	})
	t.Cleanup(func() { _ = lis.Close(); wg.Wait() })
	return "https://" + lis.Addr().String() + "/", accepted
}

func frames(c net.Conn, request func(stream uint32)) {
	preface := make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	if _, err := io.ReadFull(c, preface); err != nil {
		return
	}
	frame(c, frameSettings, 0, 0)
	head := make([]byte, 9)
	for {
		if _, err := io.ReadFull(c, head); err != nil {
			return
		}
		payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		if _, err := io.ReadFull(c, payload); err != nil {
			return
		}
		switch kind, flags, stream := head[3], head[4], binary.BigEndian.Uint32(head[5:]); {
		case kind == frameSettings && flags == 0:
			frame(c, frameSettings, 1, 0)
		case kind == framePing && flags == 0:
			frame(c, framePing, 1, 0, payload...)
		case (kind == frameData || kind == frameHeaders) && flags&endStream != 0:
			request(stream)
		}
	}
}

func number(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

func noContent(w io.Writer, stream uint32) {
	frame(w, frameHeaders, endStream|endHeaders, stream, 0x89)
} // :status 204

// status is the field :status, written out.
func status(text string) []byte { return append([]byte{0x08, byte(len(text))}, text...) }

// TestStatusesOverHTTP2: a status has three digits, the first of them not 0, as over HTTP/1.1.
func TestStatusesOverHTTP2(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	for text, want := range map[string]int{"000": 0, "099": 0, "+20": 0, "20": 0, "0200": 0, "+200": 0, "2000": 0, "200": 200, "600": 600, "999": 999} {
		url, _ := serveH2(t, ca, func(w io.Writer, _ int, stream uint32) {
			frame(w, frameHeaders, endStream|endHeaders, stream, status(text)...)
		})
		resp, err := attempt(t, c.instance(t, url, nil))
		switch {
		case want == 0:
			wantFailure(t, err, plugin.CodeProtocol, plugin.Sent)
		case err != nil || resp.Status != want:
			t.Errorf("%s: %v, %v", text, resp, err)
		}
	}
}

// TestInterimResponsesOverHTTP2: there may be some before the answer, and a connection with more of them than that ends.
func TestInterimResponsesOverHTTP2(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	for n, taken := range map[int]bool{1: true, 100: true, 101: false} {
		ended := make(chan error, 1)
		url, _ := serveH2(t, ca, func(w io.Writer, _ int, stream uint32) {
			for range n {
				frame(w, frameHeaders, endHeaders, stream, status("103")...)
			}
			noContent(w, stream)
			for !taken {
				// An acknowledgement of nothing, which has no answer.
				if _, err := w.Write([]byte{0, 0, 8, framePing, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}); err != nil {
					ended <- err
					return
				}
			}
		})
		resp, err := attempt(t, c.instance(t, url, nil))
		if taken {
			if err != nil || resp.Status != 204 {
				t.Errorf("%d: %v, %v", n, resp, err)
			}
			continue
		}
		wantFailure(t, err, plugin.CodeProtocol, plugin.Sent)
		select {
		case <-ended:
		case <-within(t, 30*time.Second).Done():
			t.Error("the connection stands")
		}
	}
}

// TestUnprocessedStreamsAreSentAgain: what the receiver says it has not looked at goes out again within the attempt.
func TestUnprocessedStreamsAreSentAgain(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	t.Run("GOAWAY every tenth stream", func(t *testing.T) {
		var processed atomic.Int32
		url, accepted := serveH2(t, ca, func(w io.Writer, _ int, stream uint32) {
			switch n := (stream + 1) / 2; {
			case n < 10:
				processed.Add(1)
				noContent(w, stream)
			case n == 10:
				processed.Add(1)
				frame(w, frameGoAway, 0, 0, append(number(stream), number(0)...)...)
				noContent(w, stream)
			}
		})
		inst := c.instance(t, url, nil)
		const workers, each = 8, 25
		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for range each {
					if resp, err := attempt(t, inst); err != nil || resp.Status != 204 {
						t.Errorf("%v, %v", resp, err)
					}
				}
			})
		}
		wg.Wait()
		if n := processed.Load(); n != workers*each {
			t.Errorf("%d requests were taken, %d were sent: one was sent twice, or not at all", n, workers*each)
		}
		if n := accepted.Load(); n < workers*each/10 {
			t.Errorf("%d connections for %d requests of which each takes ten", n, workers*each)
		}
	})
	t.Run("REFUSED_STREAM", func(t *testing.T) {
		var refusals atomic.Int32
		url, _ := serveH2(t, ca, func(w io.Writer, _ int, stream uint32) {
			if refusals.Add(1) < 3 {
				frame(w, frameReset, 0, stream, number(7)...)
				return
			}
			noContent(w, stream)
		})
		if resp, err := attempt(t, c.instance(t, url, nil)); err != nil || resp.Status != 204 {
			t.Errorf("%v, %v", resp, err)
		}
	})
	t.Run("REFUSED_STREAM for ever", func(t *testing.T) {
		var refusals atomic.Int32
		url, _ := serveH2(t, ca, func(w io.Writer, _ int, stream uint32) {
			refusals.Add(1)
			frame(w, frameReset, 0, stream, number(7)...)
		})
		_, err := attempt(t, c.instance(t, url, nil))
		if f := wantFailure(t, err, plugin.CodeReset, plugin.NotSent); f.Message != h2.ErrRefused.Error() {
			t.Errorf("%+v", *f)
		}
		if n := refusals.Load(); n > 10 {
			t.Errorf("%d tries in one attempt", n)
		}
	})
	t.Run("GOAWAY for ever", func(t *testing.T) {
		url, accepted := serveH2(t, ca, func(w io.Writer, _ int, _ uint32) {
			frame(w, frameGoAway, 0, 0, append(number(0), number(0)...)...)
		})
		_, err := attempt(t, c.instance(t, url, nil))
		if f := wantFailure(t, err, plugin.CodeReset, plugin.NotSent); f.Message != h2.ErrRefused.Error() {
			t.Errorf("%+v", *f)
		}
		if n := accepted.Load(); n > 2 {
			t.Errorf("%d handshakes for one attempt", n)
		}
	})
	t.Run("any other reset", func(t *testing.T) {
		var taken atomic.Int32
		url, _ := serveH2(t, ca, func(w io.Writer, _ int, stream uint32) {
			taken.Add(1)
			frame(w, frameReset, 0, stream, number(2)...) // INTERNAL_ERROR: it may have been looked at
		})
		_, err := attempt(t, c.instance(t, url, nil))
		wantFailure(t, err, plugin.CodeReset, plugin.Sent)
		if n := taken.Load(); n != 1 {
			t.Errorf("sent %d times", n)
		}
	})
	t.Run("the connection ends", func(t *testing.T) {
		var taken atomic.Int32
		url, _ := serveH2(t, ca, func(w io.Writer, _ int, _ uint32) {
			taken.Add(1)
			_ = w.(io.Closer).Close()
		})
		_, err := attempt(t, c.instance(t, url, nil))
		wantFailure(t, err, plugin.CodeReset, plugin.Sent)
		if n := taken.Load(); n != 1 {
			t.Errorf("sent %d times", n)
		}
	})
}

// TestIdleHTTP2ConnectionThatEnds: what was on its way when the receiver closed goes out once more, and only once.
func TestIdleHTTP2ConnectionThatEnds(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	var taken atomic.Int32
	url, _ := serveH2(t, ca, func(w io.Writer, conn int, stream uint32) {
		taken.Add(1)
		if stream == 1 && conn < 3 {
			noContent(w, stream)
			return
		}
		_ = w.(io.Closer).Close()
	})
	inst := c.instance(t, url, nil)
	for n := range 2 { // the second is answered by the second connection
		if resp, err := attempt(t, inst); err != nil || resp.Status != 204 {
			t.Fatalf("attempt %d: %v, %v", n, resp, err)
		}
	}
	_, err := attempt(t, inst) // on the second, and then on the third, which is new
	wantFailure(t, err, plugin.CodeReset, plugin.Sent)
	if n := taken.Load(); n != 5 {
		t.Errorf("sent %d times, want 5", n)
	}
}

// TestFirstContactIsOneHandshake: attempts that come at once to a receiver whose version is not known share a connection.
func TestFirstContactIsOneHandshake(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	var handshakes atomic.Int32
	srv := c.serve(t, nil, func(http.ResponseWriter, *http.Request) {})
	srv.TLS.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { handshakes.Add(1); return nil, nil }
	inst := c.instance(t, srv.URL, nil)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if resp, err := attempt(t, inst); err != nil || resp.Status != 200 {
				t.Errorf("%v, %v", resp, err)
			}
		})
	}
	wg.Wait()
	if n := handshakes.Load(); n != 1 {
		t.Errorf("%d handshakes for 50 attempts at once, want 1", n)
	}
}

// TestEarlyAnswersOverHTTP2: the answer counts although the receiver did not take the body.
func TestEarlyAnswersOverHTTP2(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	srv := c.serve(t, nil, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusRequestEntityTooLarge) })
	inst := c.instance(t, srv.URL, nil)
	for range 3 {
		req := event()
		req.Body = make([]byte, 8<<20)
		if resp, err := inst.Attempt(within(t, 8*time.Second), req); err != nil || resp.Status != http.StatusRequestEntityTooLarge {
			t.Errorf("%v, %v", resp, err)
		}
	}
}

// TestDrippingAnswersOverHTTP2: what follows a yes is waited for a second, and the connection stays good.
func TestDrippingAnswersOverHTTP2(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	srv := c.serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "x")
		w.(http.Flusher).Flush()
		if strings.HasPrefix(r.URL.Path, "/drip") {
			<-r.Context().Done()
		}
	})
	start := time.Now()
	resp, err := attempt(t, c.instance(t, srv.URL+"/drip", nil))
	if err != nil || resp.Status != 200 || !resp.Truncated || !bytes.Equal(resp.Body, []byte("x")) || time.Since(start) > 8*time.Second {
		t.Errorf("%v, %v after %v", resp, err, time.Since(start))
	}
}

// TestConnectionsWithoutRoomAreClosed: a receiver that takes no streams does not gather connections.
func TestConnectionsWithoutRoomAreClosed(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	ended := make(chan struct{}, 100)
	config := ca.config(t)
	config.NextProtos = []string{"h2"}
	lis, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	go func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				frame(c, frameSettings, 0, 0, 0, 3, 0, 0, 0, 0) // MAX_CONCURRENT_STREAMS is 0
				frames(c, func(uint32) {})
				ended <- struct{}{}
				_ = c.Close()
			}()
		}
	}()
	inst := c.instance(t, "https://"+lis.Addr().String()+"/", nil)
	// Attempts come until one connection was closed, which is a while before idle ones are.
	limit := within(t, 30*time.Second)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		resp, err := inst.Attempt(ctx, event())
		cancel()
		if err == nil {
			t.Fatalf("%v", resp)
		}
		select {
		case <-ended:
			return
		case <-limit.Done():
			t.Fatal("no connection was closed")
		default:
		}
	}
}

// TestFloodOfFrames: a receiver that sends frames without end loses its connection, during a request and when the request
// has ended.
func TestFloodOfFrames(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	flood := func(w io.Writer) {
		var pings bytes.Buffer
		for range 500 {
			frame(&pings, framePing, 1, 0, make([]byte, 8)...)
		}
		for {
			if _, err := w.Write(pings.Bytes()); err != nil {
				return
			}
		}
	}
	t.Run("instead of an answer", func(t *testing.T) {
		url, _ := serveH2(t, ca, func(w io.Writer, _ int, _ uint32) { flood(w) })
		_, err := c.instance(t, url, nil).Attempt(within(t, 30*time.Second), event())
		wantFailure(t, err, plugin.CodeProtocol, plugin.Sent)
	})
	t.Run("behind an answer", func(t *testing.T) {
		ended := make(chan struct{}, 1)
		url, _ := serveH2(t, ca, func(w io.Writer, _ int, stream uint32) {
			noContent(w, stream)
			flood(w)
			ended <- struct{}{}
		})
		if resp, err := attempt(t, c.instance(t, url, nil)); err != nil || resp.Status != 204 {
			t.Fatalf("%v, %v", resp, err)
		}
		select {
		case <-ended:
		case <-within(t, 30*time.Second).Done():
			t.Error("the connection stands")
		}
	})
}

// TestWindows: receivers that all answer at once with bodies without end are let send little before it is read.
func TestWindows(t *testing.T) {
	ca := newAuthority(t)
	c := client{tls: ca, roots: ca.roots, http2: true}
	config := ca.config(t)
	config.NextProtos = []string{"h2"}
	lis, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	windows := make(chan [2]uint32, 1)
	go func() {
		conn, err := lis.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		const windowUpdate, initialWindowSize = 8, 4
		stream, whole := uint32(65535), uint32(65535) // until something else is said (RFC 9113, section 6.9.2)
		_, _ = io.CopyN(io.Discard, conn, int64(len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")))
		frame(conn, frameSettings, 0, 0)
		for head := make([]byte, 9); ; {
			if _, err := io.ReadFull(conn, head); err != nil {
				return
			}
			payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
			if _, err := io.ReadFull(conn, payload); err != nil {
				return
			}
			switch id := binary.BigEndian.Uint32(head[5:]); head[3] {
			case frameSettings:
				for ; len(payload) >= 6; payload = payload[6:] {
					if binary.BigEndian.Uint16(payload) == initialWindowSize {
						stream = binary.BigEndian.Uint32(payload[2:])
					}
				}
			case windowUpdate:
				whole += binary.BigEndian.Uint32(payload)
			case frameHeaders:
				windows <- [2]uint32{stream, whole}
				noContent(conn, id)
			}
		}
	}()
	if resp, err := attempt(t, c.instance(t, "https://"+lis.Addr().String()+"/", nil)); err != nil || resp.Status != 204 {
		t.Fatalf("%v, %v", resp, err)
	}
	if got := <-windows; got[0] > 64<<10 || got[1] > 2<<20 {
		t.Errorf("a stream may send %d bytes and the connection %d before they are read", got[0], got[1])
	}
}

// TestLargeResponseHeaders: what is handed on of a header is bounded in sum, and what retries depend on is in it.
func TestLargeResponseHeaders(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		srv := c.serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
			for i := range 50 {
				w.Header().Add("X-Big", strings.Repeat(string(rune('a'+i%26)), 1000))
			}
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(http.StatusServiceUnavailable)
		})
		resp, err := attempt(t, c.instance(t, srv.URL, nil))
		if err != nil || resp.Status != 503 || headerValue(resp, "retry-after") != "7" {
			t.Fatalf("%v, %v", resp, err)
		}
		sum := 0
		for _, h := range resp.Headers {
			sum += len(h.Name) + len(h.Value)
		}
		if sum > maxKeptHeader {
			t.Errorf("%d bytes of header are handed on", sum)
		}
	})
}

// TestManyResponseFields: a header of very many short fields, each of which takes memory, is as large as one of few long
// ones; one of many fields that has a receiver's measure is read.
func TestManyResponseFields(t *testing.T) {
	fields := func(n int) string {
		var out strings.Builder
		for i := range n {
			fmt.Fprintf(&out, "x%d:\r\n", i)
		}
		return out.String()
	}
	everyStack(t, func(t *testing.T, c client) {
		srv := c.always(t, "HTTP/1.1 500 Oops\r\n"+fields(4000)+"content-length: 0\r\n\r\n")
		resp, err := attempt(t, c.instance(t, srv.url, nil))
		if err != nil || resp.Status != 500 || !strings.Contains(resp.Note, "larger than 64 KiB") {
			t.Errorf("%v, %v", resp, err)
		}
		body := strings.Repeat("\n", 10_000)
		srv = c.always(t, fmt.Sprintf("HTTP/1.1 500 Oops\r\n%scontent-length: %d\r\n\r\n%s", fields(1000), len(body), body))
		resp, err = attempt(t, c.instance(t, srv.url, nil))
		if err != nil || resp.Status != 500 || resp.Note != "" || len(resp.Body) == 0 {
			t.Errorf("%v, %v", resp, err)
		}
	})
}

// TestLargeRequestHeaders are refused before they are sent, for good: they stay as they are.
func TestLargeRequestHeaders(t *testing.T) {
	everyVersion(t, func(t *testing.T, c client) {
		srv := c.serve(t, nil, func(http.ResponseWriter, *http.Request) { t.Error("a request arrived") })
		req := event()
		for range 32 {
			req.Headers = append(req.Headers, plugin.Header{Name: "ce-x", Value: strings.Repeat("%E4%B8%AD", 256)})
		}
		_, err := c.instance(t, srv.URL, nil).Attempt(within(t, 10*time.Second), req)
		if f := wantFailure(t, err, "too_large", plugin.NotSent); f.Source != plugin.SourcePolicy {
			t.Errorf("%+v", *f)
		}
	})
}
