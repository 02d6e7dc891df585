//go:build unix

package natsplugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// bench is one process's transport.
type bench struct {
	t testing.TB
	*plugintest.Harness
}

func newBench(t testing.TB) *bench {
	t.Helper()
	pool := &links{}
	t.Cleanup(pool.Close)
	return &bench{t, plugintest.New(t, kind(pool))}
}

func (b *bench) instance(uri string, config any, secrets map[string][]string) *plugintest.Configured {
	b.t.Helper()
	return b.Configure(plugintest.Instance{Kind: "nats", Config: config, Secrets: secrets, Target: plugin.Target{
		URL: uri, Egress: plugin.NewEgress([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}), UserAgent: "grapnel/test",
	}})
}

func event() plugin.Request {
	return plugin.Request{
		MessageID: "evt_1", Body: []byte("{\"n\":1}\x00\xff"), Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		Headers: []plugin.Header{
			{Name: "content-type", Value: "application/json"}, {Name: "webhook-id", Value: "evt_1"},
			{Name: "ce-type", Value: "order.created"}, {Name: "x-twice", Value: "a"}, {Name: "x-twice", Value: "b"},
		},
	}
}

func deliver(t testing.TB, inst *plugintest.Configured) (*plugin.Response, error) {
	t.Helper()
	return deliverWithin(t, inst, 10*time.Second, event())
}

func deliverWithin(t testing.TB, inst *plugintest.Configured, d time.Duration, req plugin.Request) (*plugin.Response, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	return inst.Attempt(ctx, req)
}

// wantAnswer checks a response; text is part of its body.
func wantAnswer(t testing.TB, resp *plugin.Response, err error, status int, text string) {
	t.Helper()
	if err != nil {
		t.Fatalf("error %v, want status %d", err, status)
	}
	if resp.Status != status || !strings.Contains(string(resp.Body), text) {
		t.Fatalf("status %d (%s), want %d (…%s…)", resp.Status, resp.Body, status, text)
	}
}

func wantFailure(t testing.TB, err error, want plugin.Failure) {
	t.Helper()
	var f *plugin.Failure
	if !errors.As(err, &f) {
		t.Fatalf("error %v, want a failure %+v", err, want)
	}
	got := *f
	got.Peer = ""
	if got != want {
		t.Errorf("failure %+v, want %+v", got, want)
	}
}

func endpoint(code, message string, state plugin.WireState) plugin.Failure {
	return plugin.Failure{Source: plugin.SourceEndpoint, Code: code, Message: message, WireState: state}
}

func orders(name string) jetstream.StreamConfig {
	return jetstream.StreamConfig{Name: name, Subjects: []string{"orders.>"}}
}

func TestStoresWhatAnHTTPReceiverWouldGet(t *testing.T) {
	n := start(t, "")
	stream := n.stream(orders("ORDERS"))
	inst := newBench(t).instance("nats://"+n.addr+"/orders/eu.created", map[string]any{"stream": "ORDERS"}, nil)
	resp, err := deliver(t, inst)
	wantAnswer(t, resp, err, http.StatusOK, "")
	if resp.Peer != n.addr {
		t.Errorf("peer %q, want %q", resp.Peer, n.addr)
	}
	got, err := stream.GetMsg(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if got.Subject != "orders.eu.created" || !bytes.Equal(got.Data, event().Body) {
		t.Errorf("stored %q: %q", got.Subject, got.Data)
	}
	want := nats.Header{
		"Nats-Msg-Id": {"evt_1/orders.eu.created"}, "Nats-Expected-Stream": {"ORDERS"}, "content-type": {"application/json"}, "webhook-id": {"evt_1"},
		"ce-type": {"order.created"}, "x-twice": {"a", "b"}, "traceparent": {event().Traceparent},
	}
	if diff := cmp.Diff(want, got.Header); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
}

func TestRepeatsAreStoredOncePerSubject(t *testing.T) {
	n := start(t, "")
	n.stream(orders("ORDERS"))
	b := newBench(t)
	created, audit := b.instance("nats://"+n.addr+"/orders.created", nil, nil), b.instance("nats://"+n.addr+"/orders.audit", nil, nil)
	for range 3 {
		for _, inst := range []*plugintest.Configured{created, audit} {
			resp, err := deliver(t, inst)
			wantAnswer(t, resp, err, http.StatusOK, "")
		}
	}
	if stored := n.stored("ORDERS"); stored != 2 {
		t.Errorf("%d messages stored, want one per subject, 2", stored)
	}
}

func TestSubjectFromType(t *testing.T) {
	n := start(t, "")
	stream := n.stream(jetstream.StreamConfig{Name: "ALL", Subjects: []string{"events.>"}})
	b := newBench(t)
	inst := b.instance("nats://"+n.addr, map[string]any{"subject": "events.{type}"}, nil)
	inPath := b.instance("nats://"+n.addr+"/events/{type}/x", nil, nil)
	tests := []struct {
		inst *plugintest.Configured
		kind string
		want string
	}{
		{inst, "order.created", "events.order.created"},
		{inPath, "order.created", "events.order.created.x"},
		{inst, "com.example x/*.>.\n..$JS", "events.com.example_x/_._._._._JS"},
	}
	for i, test := range tests {
		resp, err := deliverWithin(t, test.inst, 10*time.Second, plugin.Request{
			MessageID: fmt.Sprint("evt_", i), EventType: test.kind,
		})
		wantAnswer(t, resp, err, http.StatusOK, "")
		got, err := stream.GetMsg(t.Context(), uint64(i+1))
		if err != nil {
			t.Fatal(err)
		}
		if got.Subject != test.want {
			t.Errorf("subject %q, want %q", got.Subject, test.want)
		}
	}
	_, err := deliverWithin(t, inst, 10*time.Second, plugin.Request{MessageID: "evt_x"})
	wantFailure(t, err, plugin.Failure{
		Source: plugin.SourcePlugin, Code: plugin.CodeProtocol, Message: errNoType.Error(), WireState: plugin.NotSent,
	})
}

func TestWhatStreamsRefuse(t *testing.T) {
	n := start(t, "max_payload: 2KB")
	n.stream(orders("ORDERS"))
	n.stream(jetstream.StreamConfig{Name: "SMALL", Subjects: []string{"small"}, MaxMsgSize: 300})
	n.stream(jetstream.StreamConfig{Name: "FULL", Subjects: []string{"full"}, MaxMsgs: 1, Discard: jetstream.DiscardNew})
	b := newBench(t)
	large := event()
	large.Body = bytes.Repeat([]byte("x"), 1000)
	t.Run("no stream", func(t *testing.T) {
		resp, err := deliver(t, b.instance("nats://"+n.addr+"/nobody.listens", nil, nil))
		wantAnswer(t, resp, err, http.StatusNotFound, `no JetStream stream takes the subject "nobody.listens"`)
	})
	t.Run("another stream", func(t *testing.T) {
		resp, err := deliver(t, b.instance("nats://"+n.addr+"/orders.x", map[string]any{"stream": "OTHER"}, nil))
		wantAnswer(t, resp, err, http.StatusPreconditionFailed, "expected stream does not match (JetStream error 10060)")
	})
	t.Run("too large for the stream", func(t *testing.T) {
		resp, err := deliverWithin(t, b.instance("nats://"+n.addr+"/small", nil, nil), 10*time.Second, large)
		wantAnswer(t, resp, err, http.StatusRequestEntityTooLarge, "message size exceeds maximum allowed")
	})
	t.Run("stream full", func(t *testing.T) {
		inst := b.instance("nats://"+n.addr+"/full", nil, nil)
		resp, err := deliver(t, inst)
		wantAnswer(t, resp, err, http.StatusOK, "")
		next := event()
		next.MessageID = "evt_2"
		resp, err = deliverWithin(t, inst, 10*time.Second, next)
		wantAnswer(t, resp, err, http.StatusServiceUnavailable, "maximum messages exceeded")
	})
	t.Run("too large for the server", func(t *testing.T) {
		inst := b.instance("nats://"+n.addr+"/orders.x", nil, nil)
		large.Body = bytes.Repeat([]byte("x"), 2000)
		_, err := deliverWithin(t, inst, 10*time.Second, large)
		wantFailure(t, err, plugin.Failure{
			Source: plugin.SourcePolicy, Code: "too_large", WireState: plugin.NotSent,
			Message: "the body has 2000 bytes; with its headers it is more than the 2048 that the server takes (max_payload)",
		})
		resp, err := deliver(t, inst)
		wantAnswer(t, resp, err, http.StatusOK, "")
	})
	t.Run("somebody else answers", func(t *testing.T) {
		client := n.admin().Conn()
		if _, err := client.Subscribe("service", func(m *nats.Msg) { _ = m.Respond([]byte("hello")) }); err != nil {
			t.Fatal(err)
		}
		if err := client.Flush(); err != nil {
			t.Fatal(err)
		}
		_, err := deliver(t, b.instance("nats://"+n.addr+"/service", nil, nil))
		wantFailure(t, err, endpoint(plugin.CodeProtocol, "something other than a JetStream stream answered on the subject", plugin.Sent))
	})
}

func TestWithoutJetStream(t *testing.T) {
	n := start(t, `authorization { users: [
		{ user: app, password: s3cret, permissions: { publish: { allow: ["orders.>"] } } }, { user: admin, password: admin } ] }`)
	client := n.admin(nats.UserInfo("admin", "admin")).Conn()
	sub, err := client.SubscribeSync("orders.>")
	if err == nil {
		err = client.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t)
	config := map[string]any{"require_jetstream": false, "user": "app"}
	secrets := map[string][]string{"password": {"s3cret"}}
	resp, err := deliver(t, b.instance("nats://"+n.addr+"/orders.created", config, secrets))
	wantAnswer(t, resp, err, http.StatusAccepted, "")
	got, err := sub.NextMsg(10 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Data, event().Body) || got.Header.Get("Nats-Msg-Id") != "evt_1/orders.created" || got.Reply != "" {
		t.Errorf("got %+v", got)
	}
	resp, err = deliver(t, b.instance("nats://"+n.addr+"/elsewhere", config, secrets))
	wantAnswer(t, resp, err, http.StatusForbidden, `the user may not publish to "elsewhere"`)
}

func TestManyAttemptsShareOneConnection(t *testing.T) {
	n := start(t, "authorization { users: [ { user: a, password: pa5sword }, { user: b, password: pa5sword } ] }")
	n.stream(orders("ORDERS"), nats.UserInfo("a", "pa5sword"))
	p := newProxy(t, n.address)
	b := newBench(t)
	var all []*plugintest.Configured
	for _, user := range []string{"a", "b"} {
		for _, subject := range []string{"orders.x", "orders.y"} {
			all = append(all, b.instance("nats://"+p.addr+"/"+subject, map[string]any{"user": user}, map[string][]string{"password": {"pa5sword"}}))
		}
	}
	var wg sync.WaitGroup
	for range 50 {
		for _, inst := range all {
			wg.Go(func() {
				if resp, err := deliver(t, inst); err != nil || resp.Status != 200 {
					t.Errorf("response %v, error %v", resp, err)
				}
			})
		}
	}
	wg.Wait()
	if got := p.connections(); got != 2 {
		t.Errorf("%d connections, want one per user, 2", got)
	}
}
