//go:build unix

package conformance_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/sdk/conformance"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// sockKind carries HTTP over a unix socket: sock:PATH?uri=URI.
func sockKind() plugin.Kind {
	return plugin.Transport("sock", func(_ struct{}, t plugin.Target) (plugin.AttemptFunc, error) {
		u, err := url.Parse(t.URL)
		if err != nil || u.Scheme != "sock" || u.Path == "" {
			return nil, errors.New("want sock:PATH?uri=URI")
		}
		pool := &http.Transport{DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", u.Path)
			}}
		t.OnClose(func(context.Context) { pool.CloseIdleConnections() })
		return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
			_, path, _ := strings.Cut(r.URL, "?uri=")
			req, err := http.NewRequestWithContext(ctx, "POST", "http://sock"+path, bytes.NewReader(r.Body))
			if err != nil {
				return nil, err
			}
			req.GetBody, req.Header["User-Agent"] = nil, nil
			for _, h := range r.Headers {
				req.Header.Add(h.Name, h.Value)
			}
			resp, err := pool.RoundTrip(req)
			if err != nil {
				if errors.Is(ctx.Err(), context.Canceled) {
					return nil, ctx.Err()
				}
				return nil, &plugin.Failure{Source: plugin.SourceEndpoint, Code: map[bool]string{true: plugin.CodeTimeout, false: plugin.CodeReset}[ctx.Err() != nil], WireState: plugin.MaybeSent}
			}
			defer resp.Body.Close()
			out := &plugin.Response{Status: resp.StatusCode}
			for name, values := range resp.Header {
				out.Headers = append(out.Headers, plugin.Header{Name: strings.ToLower(name), Value: values[0]})
			}
			out.Body, err = io.ReadAll(io.LimitReader(resp.Body, int64(r.MaxResponseBody)+1))
			out.Truncated = err != nil || len(out.Body) > r.MaxResponseBody
			out.Body = out.Body[:min(len(out.Body), r.MaxResponseBody)]
			return out, nil
		}, nil
	}, plugin.Schemes("sock"))
}

type message struct {
	Headers []plugin.Header
	Body    []byte
}

// queueKind writes messages to a unix socket, where something takes them and says so, and no more: queue:PATH.
func queueKind() plugin.Kind {
	return plugin.Transport("queue", func(_ struct{}, t plugin.Target) (plugin.AttemptFunc, error) {
		path, ok := strings.CutPrefix(t.URL, "queue:")
		if !ok {
			return nil, errors.New("want queue:PATH")
		}
		return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
			if err != nil {
				return nil, &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeConnect, WireState: plugin.NotSent}
			}
			defer conn.Close()
			if err := json.NewEncoder(conn).Encode(message{r.Headers, r.Body}); err != nil {
				return nil, &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeReset, WireState: plugin.MaybeSent}
			}
			if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
				return nil, &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeReset, WireState: plugin.MaybeSent}
			}
			return &plugin.Response{Status: http.StatusAccepted}, nil
		}, nil
	}, plugin.Schemes("queue"))
}

// listenAt has the socket's name stand only when it takes connections: the suite begins then.
func listenAt(path string) (net.Listener, error) {
	aside := filepath.Join(filepath.Dir(filepath.Dir(path)), fmt.Sprintf("aside-%d", os.Getpid()))
	l, err := net.Listen("unix", aside)
	if err != nil {
		return nil, err
	}
	return l, os.Rename(aside, path)
}

// bridge carries bytes from a unix socket to an address, as socat does.
func bridge(path, to string) {
	l, err := listenAt(path)
	for err == nil {
		var from net.Conn
		if from, err = l.Accept(); err != nil {
			break
		}
		go func() {
			defer from.Close()
			conn, err := net.Dial("tcp", to)
			if err != nil {
				return
			}
			defer conn.Close()
			go func() {
				_, _ = io.Copy(conn, from)
				_ = conn.(*net.TCPConn).CloseWrite()
			}()
			_, _ = io.Copy(from, conn)
		}()
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// consume takes messages and posts them, a moment later.
func consume(path, to string) {
	l, err := listenAt(path)
	for err == nil {
		var conn net.Conn
		if conn, err = l.Accept(); err != nil {
			break
		}
		go func() {
			defer conn.Close()
			var m message
			if json.NewDecoder(conn).Decode(&m) != nil {
				return
			}
			fmt.Fprintln(conn, "taken")
			time.Sleep(20 * time.Millisecond) // as queues do
			req, err := http.NewRequest("POST", to, bytes.NewReader(m.Body))
			if err != nil {
				return
			}
			for _, h := range m.Headers {
				req.Header.Add(h.Name, h.Value)
			}
			if resp, err := http.DefaultClient.Do(req); err == nil {
				_ = resp.Body.Close()
			}
		}()
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func localFixture() *conformance.Fixture {
	return &conformance.Fixture{Kinds: map[string]conformance.KindFixture{
		"sock": {Receiver: &conformance.ReceiverFixture{
			URI: "sock:{dir}/s?uri={path}", Command: self("bridge", "{dir}/s", "{host}:{port}"),
		}},
		"queue": {Receiver: &conformance.ReceiverFixture{
			URI: "queue:{dir}/q", Command: self("consume", "{dir}/q", "http://{host}:{port}{path}"), OneWay: true,
		}},
	}}
}

// TestTransportsThatAreNotHTTP: with a fixture, the receivers of the suite are behind whatever the transport speaks to.
func TestTransportsThatAreNotHTTP(t *testing.T) {
	t.Parallel()
	report := run(t, conformance.Options{Command: self("plugin-local"), Fixture: localFixture()})
	if ids, reasons := failures(report); len(ids) > 0 {
		t.Errorf("failed:%s", reasons)
	}
	var idle []string
	for _, res := range report.Results {
		if res.Outcome == conformance.Skipped && (res.Group == conformance.GroupTransport || res.Group == conformance.GroupFlow) {
			idle = append(idle, res.ID)
		}
	}
	// What is about connecting is not the suite's to play behind a command; there is no signer, TLS, and no URI.
	if diff := cmp.Diff([]string{"TR-10", "TR-11", "TR-18", "TR-19", "TR-21", "TR-22", "TR-23", "TR-24"}, idle); diff != "" {
		t.Errorf("skipped (-want +got):\n%s", diff)
	}
	if len(report.Notes) > 0 {
		t.Error(report.Notes)
	}
}

// TestReportSaysWhatWasNotTested: a transport that the suite cannot reach is not green in silence.
func TestReportSaysWhatWasNotTested(t *testing.T) {
	t.Parallel()
	report := run(t, conformance.Options{Command: self("plugin-local"), Only: []string{conformance.GroupTransport}})
	want := []string{
		"transport sock: no transport case ran: its schemes (sock) are not http and do not end in +http; a fixture's receiver says how to get to the suite's",
		"transport queue: no transport case ran: its schemes (queue) are not http and do not end in +http; a fixture's receiver says how to get to the suite's",
	}
	for i, note := range report.Notes {
		if strings.Contains(note, "it takes no instance") { // the path of the URI that was tried
			want[i] = note
		}
	}
	if diff := cmp.Diff(want, report.Notes); diff != "" {
		t.Errorf("notes (-want +got):\n%s", diff)
	}
}

func TestFixtureAboutWhatThereIsNotIsAnError(t *testing.T) {
	t.Parallel()
	_, err := conformance.Run(t.Context(), conformance.Options{
		Command: self("plugin-raw", ""), Only: []string{"HS-01"},
		Fixture: &conformance.Fixture{Kinds: map[string]conformance.KindFixture{
			"raw-sing": {}, "raw-sign": {Secrets: map[string]string{"kye": "x"}}, "raw-mem": {Receiver: &conformance.ReceiverFixture{}},
		}},
	}, nil)
	for _, want := range []string{
		`the fixture is about kind "raw-sing", and the plugin has raw-sign, raw-http, raw-mem, raw-transform`,
		`the fixture fills secret slot "kye" of raw-sign, which has key`, `the fixture's receiver of raw-mem has no uri`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nwant %s", err, want)
		}
	}
}

// TestStoppedRunBlamesNobody: cases that were at work when the run was stopped say nothing of the plugin.
func TestStoppedRunBlamesNobody(t *testing.T) {
	t.Parallel()
	ctx, stop := context.WithCancelCause(t.Context())
	why := errors.New("stopped by the test")
	report, err := conformance.Run(ctx, conformance.Options{Command: self("plugin-raw", ""), Fixture: rawFixture()}, func(conformance.Result) { stop(why) })
	if !errors.Is(err, why) {
		t.Errorf("%v, want %v", err, why)
	}
	if slices.ContainsFunc(report.Results, func(r conformance.Result) bool { return r.Outcome == conformance.Failed || r.ID == "" }) {
		t.Errorf("%+v", report.Results)
	}
	if n := len(report.Results); n == 0 || n > 20 {
		t.Errorf("%d results", n)
	}
}
