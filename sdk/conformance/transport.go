package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	// shortTimeout is for attempts that run into it.
	shortTimeout = 500 * time.Millisecond
	// tolerance is how far from its timeout an attempt may be answered.
	tolerance = 300 * time.Millisecond
	// timingTries are how often a case about time is tried: the machine may be busy, a plugin that keeps its
	// time does so sooner or later.
	timingTries = 3
)

func transportCases() []Case {
	const g = GroupTransport
	return []Case{
		{ID: "TR-01", Group: g, Title: "exactly the bytes of the body arrive", run: exactBytes,
			Protects: "a signature over a body that was written anew does not verify"},
		{ID: "TR-02", Group: g, Title: "headers of event, signers and subscription arrive untouched", run: sealedHeaders,
			Protects: "signed headers that were changed do not verify"},
		{ID: "TR-03", Group: g, Title: "adds only headers that it declares", run: surpriseHeaders,
			Protects: "a header added after signing may collide with a signed one"},
		{ID: "TR-04", Group: g, Title: "a query that a signer has changed is the one that is sent", run: changedQuery,
			Protects: "schemes that sign in the query"},
		{ID: "TR-05", Group: g, Title: "the receiver's status is reported, whatever it is", run: statusHonest,
			Protects: "what is retried and what is given up depends on it"},
		{ID: "TR-06", Group: g, Title: "a redirect is reported, not followed", run: redirectNotFollowed,
			Protects: "a receiver must not send signed requests elsewhere, into the operator's network least of all"},
		{ID: "TR-07", Group: g, Title: "a response's body is its start, cut at max_response_body, and says so", run: truncationHonest,
			Protects: "memory, and people who read what the receiver said"},
		{ID: "TR-08", Group: g, Title: "a 204 without body is a success", run: noContent,
			Protects: "receivers that answer with nothing"},
		{ID: "TR-09", Group: g, Title: "retry-after is kept, of any status", run: retryAfterKept,
			Protects: "receivers that ask for time"},
		{ID: "TR-10", Group: g, Title: "a refused connection is the endpoint's fault, and nothing was sent", run: refused,
			Protects: "an attempt that sent nothing may be repeated without a duplicate"},
		{ID: "TR-11", Group: g, Title: "a connection that is reset at once is the endpoint's fault", run: resetAtOnce,
			Protects: "outages of receivers are not counted against the plugin"},
		{ID: "TR-12", Group: g, Title: "a reset after the request never claims that nothing was sent", run: resetAfterRequest,
			Protects: "the receiver may have acted: a repetition must be known as one"},
		{ID: "TR-13", Group: g, Title: "one attempt is one request: nothing is sent a second time", run: noBlindRetry,
			Protects: "retries are the server's to count and to space"},
		{ID: "TR-14", Group: g, Title: "a receiver that does not answer times out, on time", run: timesOut,
			Protects: "the subscription's timeout, and the window that stuck attempts fill"},
		{ID: "TR-15", Group: g, Title: "a body that never ends is answered by the timeout", run: endlessBody,
			Protects: "a receiver cannot hold an attempt for ever"},
		{ID: "TR-16", Group: g, Title: "an answer that is not HTTP is the endpoint's fault", run: garbageAnswer,
			Protects: "the plugin survives what receivers send"},
		{ID: "TR-17", Group: g, Title: "a response header without end is cut off", run: headerBomb,
			Protects: "memory, against a hostile receiver"},
		{ID: "TR-18", Group: g, Title: "an address that egress forbids is not connected to", run: egressDenied,
			Protects: "subscriptions cannot reach into the operator's network"},
		{ID: "TR-19", Group: g, Title: "a certificate of an unknown authority is refused before anything is sent", run: unknownAuthority,
			Protects: "requests and their signatures go to nobody else"},
		{ID: "TR-20", Group: g, Title: "connections are used again", run: keepAlive,
			Protects: "cost and latency of each delivery"},
		{ID: "TR-21", Group: g, Title: "signing on the way gives what signing apart gives", run: signHere,
			Protects: "the server chooses by where signer and transport run"},
		{ID: "TR-22", Group: g, Title: "a name that does not exist is the endpoint's fault, and nothing was sent", run: noSuchHost,
			Protects: "a typing error in a URI is shown as what it is"},
		{ID: "TR-23", Group: g, Title: "delivers to the fixture's URI", run: deliversToFixture,
			Protects: "transports for which the suite has no receiver of its own"},
		{ID: "TR-24", Group: g, Title: "with the trait batches, a whole answer of 2xx comes back, and who it names", run: wholeAnswer,
			Protects: "events of a batch that the receiver has not taken are lost if nobody hears of them"},
	}
}

// eachHTTP runs f for every transport of http with a process and a receiver that handle plays.
func (t *trial) eachHTTP(handle func(*exchange), f func(*carrier) error) error {
	return t.eachReceiving(answers, handle, f)
}

// eachDirect is eachHTTP for transports that connect to the receiver themselves.
func (t *trial) eachDirect(handle func(*exchange), f func(*carrier) error) error {
	return t.eachReceiving(func(u *subject) bool { return answers(u) && !u.bridged() }, handle, f)
}

func (t *trial) eachReceiving(want func(*subject) bool, handle func(*exchange), f func(*carrier) error) error {
	if !slices.ContainsFunc(t.s.subjects, want) {
		return t.noTransport("http")
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	a, err := ses.sharedAttempts()
	if err != nil {
		return err
	}
	return t.each("transport for http", want, func(u *subject) error {
		k, err := t.receiver(u, handle)
		if err != nil {
			return err
		}
		c := &carrier{ses: ses, u: u, sink: k, a: a}
		c.ref, err = c.instance(k.url + "/hooks/orders?tenant=a%20b")
		if err != nil {
			return err
		}
		err = f(c)
		var skip skipError
		if _, accepted := k.seen(); err != nil && !errors.As(err, &skip) && accepted == 0 && u.httpPrefix() != "" && u.fixture.Receiver == nil {
			err = fmt.Errorf("%w (nothing connected to the receiver: the scheme %shttp is taken for HTTP to the URI's host and port; "+
				"if it is something else, a fixture's receiver says how to get there)", err, u.httpPrefix())
		}
		return err
	})
}

func (t *trial) noTransport(scheme string) error {
	if !t.s.offers(carrying) {
		return skipf("it offers no transport")
	}
	return t.none("transport for the scheme "+scheme, nil)
}

// carrier is a configured transport and its receiver.
type carrier struct {
	ses  *session
	u    *subject
	sink *sink
	a    *attempts
	ref  uint32
}

// instance configures one more, for another URI.
func (c *carrier) instance(uri string) (uint32, error) {
	in := c.ses.instance(c.u, c.uri(uri))
	return in.GetRef(), c.ses.take(in)
}

// uri is a receiver's as the transport takes it. An empty one is left to the subject.
func (c *carrier) uri(plain string) string {
	if plain == "" {
		return ""
	}
	return c.u.uriOf(c.sink, plain)
}

// arrived are the requests so far, of which n are waited for where an answer does not say that they are there.
func (c *carrier) arrived(n int) ([]*request, error) {
	if !answers(c.u) {
		if err := c.sink.await(c.ses.t, n, attemptTimeout); err != nil {
			return nil, err
		}
	}
	got, _ := c.sink.seen()
	return got, nil
}

// send makes one attempt and returns its outcome.
func (c *carrier) send(body []byte, timeout time.Duration) (*pluginv1.AttemptResult, error) {
	return c.a.one(newContent("evt_conformance", body), newAttempt(c.ref, timeout))
}

// response is send for attempts that must be answered by the receiver.
func (c *carrier) response(body []byte) (*pluginv1.Response, error) {
	res, err := c.send(body, attemptTimeout)
	if err != nil {
		return nil, err
	}
	if res.GetResponse() == nil {
		return nil, fmt.Errorf("the receiver answered, and the outcome is a failure: %s", failureText(res.GetFailure()))
	}
	return res.GetResponse(), nil
}

// failure is send for attempts that must fail.
func (c *carrier) failure(timeout time.Duration) (*pluginv1.Failure, error) {
	res, err := c.send([]byte(`{}`), timeout)
	if err != nil {
		return nil, err
	}
	return mustFail(res)
}

func mustFail(res *pluginv1.AttemptResult) (*pluginv1.Failure, error) {
	if res.GetFailure() == nil {
		return nil, fmt.Errorf("the outcome is a response with status %d, want a failure", res.GetResponse().GetStatus())
	}
	return res.GetFailure(), nil
}

// outcome checks a failure. An empty list allows anything.
func outcome(f *pluginv1.Failure, source pluginv1.Failure_Source, codes []string, states ...pluginv1.Failure_WireState) error {
	state := f.GetWireState()
	if state == pluginv1.Failure_WIRE_STATE_UNSPECIFIED {
		state = pluginv1.Failure_WIRE_STATE_MAYBE_SENT
	}
	switch {
	case f.GetSource() != source:
		return fmt.Errorf("the failure is %s, want source %s", failureText(f), strings.TrimPrefix(source.String(), "SOURCE_"))
	case len(codes) > 0 && !slices.Contains(codes, f.GetCode()):
		return fmt.Errorf("the failure is %s, want code %s", failureText(f), strings.Join(codes, " or "))
	case len(states) > 0 && !slices.Contains(states, state):
		return fmt.Errorf("the failure is %s, which is the wrong wire state here", failureText(f))
	}
	return nil
}

const (
	endpoint  = pluginv1.Failure_SOURCE_ENDPOINT
	notSent   = pluginv1.Failure_WIRE_STATE_NOT_SENT
	maybeSent = pluginv1.Failure_WIRE_STATE_MAYBE_SENT
	allSent   = pluginv1.Failure_WIRE_STATE_SENT
)

func exactBytes(t *trial) error {
	return t.eachReceiving(overHTTP, answer200, func(c *carrier) error {
		n := 0
		for name, body := range oddBodies() {
			if limit := c.u.kind.GetTransport().GetMaxBodyBytes(); limit > 0 && uint32(len(body)) > limit {
				continue
			}
			if _, err := c.response(body); err != nil {
				return fmt.Errorf("a body of %s: %w", name, err)
			}
			n++
			got, err := c.arrived(n)
			if err != nil {
				return fmt.Errorf("a body of %s: %w", name, err)
			}
			if len(got) != n {
				return fmt.Errorf("%d requests arrived for %d attempts", len(got), n)
			}
			last := got[n-1]
			if last.unsound != nil || !bytes.Equal(last.body, body) {
				return fmt.Errorf("a body of %s: %d bytes were to be sent, and %d arrived that are not the same", name, len(body), len(last.body))
			}
		}
		return nil
	})
}

// exchangeHeaders sends headers of all three kinds and returns what arrived.
func (c *carrier) exchangeHeaders() (*request, map[string]string, error) {
	in := c.ses.instance(c.u, c.uri(c.sink.url+"/headers"))
	static := &pluginv1.Header{Name: "x-static", Value: "of the subscription"}
	in.Target.Headers = append(in.Target.Headers, static)
	if err := c.ses.take(in); err != nil {
		return nil, nil, err
	}
	content := newContent("evt_headers", []byte(`{"h":1}`))
	content.Headers = append(content.Headers, &pluginv1.Header{Name: "x-event", Value: `a "b" ; c=d, e`})
	at := newAttempt(in.GetRef(), attemptTimeout)
	at.Headers = []*pluginv1.Header{{Name: "x-signature", Value: "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}, {Name: "x-signed-at", Value: "1614265330"}}
	res, err := c.a.one(content, at)
	if err != nil {
		return nil, nil, err
	}
	if res.GetResponse() == nil {
		return nil, nil, fmt.Errorf("the attempt failed: %s", failureText(res.GetFailure()))
	}
	want := map[string]string{}
	for _, h := range slices.Concat(content.GetHeaders(), in.GetTarget().GetHeaders(), at.GetHeaders()) {
		want[h.GetName()] = h.GetValue()
	}
	got, err := c.arrived(1)
	if err != nil {
		return nil, nil, err
	}
	if len(got) == 0 {
		return nil, nil, errors.New("nothing arrived, and the outcome is a response")
	}
	return got[len(got)-1], want, nil
}

func sealedHeaders(t *trial) error {
	return t.eachReceiving(overHTTP, answer200, func(c *carrier) error {
		got, want, err := c.exchangeHeaders()
		if err != nil {
			return err
		}
		for name, value := range want {
			if values := got.header.Values(name); len(values) != 1 || values[0] != value {
				return fmt.Errorf("%s was to be %q, and arrived as %q", name, value, values)
			}
		}
		return nil
	})
}

func surpriseHeaders(t *trial) error {
	return t.eachHTTP(answer200, func(c *carrier) error {
		got, want, err := c.exchangeHeaders()
		if err != nil {
			return err
		}
		framing := []string{"host", "content-length", "transfer-encoding", "connection"}
		for name := range got.header {
			name = strings.ToLower(name)
			if _, sent := want[name]; !sent && !slices.Contains(framing, name) && !slices.Contains(c.u.kind.GetTransport().GetMayAddHeaders(), name) {
				return fmt.Errorf("it adds %q, which may_add_headers does not name", name)
			}
		}
		return nil
	})
}

func changedQuery(t *trial) error {
	return t.eachHTTP(answer200, func(c *carrier) error {
		at := newAttempt(c.ref, attemptTimeout)
		at.Uri = c.uri(c.sink.url + "/hooks/orders?tenant=a%20b&signature=abc%2B%2F%3D")
		if _, err := c.a.one(newContent("evt_query", []byte(`{}`)), at); err != nil {
			return err
		}
		if _, err := c.response([]byte(`{}`)); err != nil {
			return err
		}
		got, _ := c.sink.seen()
		want := []string{"/hooks/orders?tenant=a%20b&signature=abc%2B%2F%3D", "/hooks/orders?tenant=a%20b"}
		for i, target := range want {
			if i >= len(got) || got[i].target != target {
				return fmt.Errorf("request %d is for another target than %s", i+1, target)
			}
		}
		return nil
	})
}

func statusHonest(t *trial) error {
	statuses := []int{200, 201, 202, 400, 401, 404, 410, 429, 500, 503, 599}
	return t.eachHTTP(func(x *exchange) { x.reply(statuses[(x.n-1)%len(statuses)], "", "said") }, func(c *carrier) error {
		for _, status := range statuses {
			resp, err := c.response([]byte(`{}`))
			if err != nil {
				return fmt.Errorf("status %d: %w", status, err)
			}
			if resp.GetStatus() != uint32(status) {
				return fmt.Errorf("the receiver answered %d, and the outcome says %d", status, resp.GetStatus())
			}
		}
		return nil
	})
}

func redirectNotFollowed(t *trial) error {
	statuses := []int{301, 302, 303, 307, 308}
	handle := func(x *exchange) {
		if strings.HasPrefix(x.target, "/elsewhere") {
			x.reply(http.StatusOK, "", "followed")
			return
		}
		x.reply(statuses[(x.n-1)%len(statuses)], "Location: /elsewhere\r\n", "")
	}
	return t.eachHTTP(handle, func(c *carrier) error {
		for range statuses {
			if _, err := c.send([]byte(`{}`), attemptTimeout); err != nil {
				return err
			}
		}
		got, _ := c.sink.seen()
		for _, r := range got {
			if strings.HasPrefix(r.target, "/elsewhere") {
				return errors.New("a redirect was followed")
			}
		}
		return nil
	})
}

func truncationHonest(t *trial) error {
	sizes := []int{0, 100, maxResponse, maxResponse + 1, 1 << 20}
	body := func(n int) string { return strings.Repeat("0123456789abcdef", n/16+1)[:n] }
	return t.eachHTTP(func(x *exchange) { x.reply(http.StatusBadRequest, "", body(sizes[(x.n-1)%len(sizes)])) }, func(c *carrier) error {
		for _, n := range sizes {
			resp, err := c.response([]byte(`{}`))
			if err != nil {
				return err
			}
			want := body(min(n, maxResponse))
			switch {
			case len(resp.GetBody()) > maxResponse:
				return fmt.Errorf("%d bytes came back of %d, and max_response_body is %d", len(resp.GetBody()), n, maxResponse)
			case !strings.HasPrefix(want, string(resp.GetBody())):
				return fmt.Errorf("what came back of a body of %d bytes is not its start", n)
			case resp.GetBodyTruncated() != (len(resp.GetBody()) < n):
				return fmt.Errorf("%d bytes came back of %d, and body_truncated is %v", len(resp.GetBody()), n, resp.GetBodyTruncated())
			}
		}
		return nil
	})
}

func wholeAnswer(t *trial) error {
	batches := func(u *subject) bool { return answers(u) && u.kind.GetTransport().GetBatches() }
	if !slices.ContainsFunc(t.s.subjects, batches) {
		return skipf("it offers no transport for http with the trait batches")
	}
	const most = 64 << 10
	sizes := []int{40_000, most + 1000}
	body := func(n int) string { return strings.Repeat("0123456789abcdef", n/16+1)[:n] }
	return t.eachReceiving(batches, func(x *exchange) {
		text := body(sizes[(x.n-1)%len(sizes)])
		_, _ = fmt.Fprintf(x, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nWebhook-Failed-Ids: evt_a, evt_b\r\nWebhook-Failed-Ids: evt_c\r\n\r\n%s", len(text), text[:100])
		select {
		case <-time.After(1500 * time.Millisecond):
		case <-x.stop:
		}
		_, _ = io.WriteString(x, text[100:])
	}, func(c *carrier) error {
		for _, n := range sizes {
			a := newAttempt(c.ref, attemptTimeout)
			a.MaxResponseBody = most
			res, err := c.a.one(newContent("bat_conformance", []byte(`[{}]`)), a)
			if err != nil {
				return err
			}
			resp := res.GetResponse()
			if resp == nil {
				return fmt.Errorf("the receiver answered, and the outcome is a failure: %s", failureText(res.GetFailure()))
			}
			want := body(n)[:min(n, most)]
			var named []string
			for _, h := range resp.GetHeaders() {
				if h.GetName() == "webhook-failed-ids" {
					named = append(named, h.GetValue())
				}
			}
			switch {
			case string(resp.GetBody()) != want || resp.GetBodyTruncated() != (n > most):
				return fmt.Errorf("of a body of %d bytes that ends 1.5 s after it began, %d came back, and body_truncated is %v; max_response_body of the attempt is %d",
					n, len(resp.GetBody()), resp.GetBodyTruncated(), most)
			case strings.Join(named, ", ") != "evt_a, evt_b, evt_c":
				return fmt.Errorf("of two headers webhook-failed-ids in an answer of 200, %q came back", named)
			}
		}
		return nil
	})
}

func noContent(t *trial) error {
	return t.eachHTTP(func(x *exchange) { _, _ = io.WriteString(x, "HTTP/1.1 204 No Content\r\n\r\n") }, func(c *carrier) error {
		for range 3 {
			resp, err := c.response([]byte(`{}`))
			if err != nil {
				return err
			}
			if resp.GetStatus() != http.StatusNoContent || len(resp.GetBody()) > 0 {
				return fmt.Errorf("the outcome is %d with %d bytes", resp.GetStatus(), len(resp.GetBody()))
			}
		}
		return nil
	})
}

func retryAfterKept(t *trial) error {
	statuses := []int{503, 429, 202}
	return t.eachHTTP(func(x *exchange) { x.reply(statuses[(x.n-1)%len(statuses)], "Retry-After: 120\r\n", "later") }, func(c *carrier) error {
		for _, status := range statuses {
			resp, err := c.response([]byte(`{}`))
			if err != nil {
				return err
			}
			kept := slices.ContainsFunc(resp.GetHeaders(), func(h *pluginv1.Header) bool {
				return h.GetName() == "retry-after" && h.GetValue() == "120"
			})
			if !kept {
				return fmt.Errorf("with status %d, retry-after: 120 is not among the headers", status)
			}
		}
		return nil
	})
}
