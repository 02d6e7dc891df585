package server_test

import (
	"bytes"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	standard "github.com/standard-webhooks/standard-webhooks/libraries/go"
	svix "github.com/svix/svix-webhooks/go"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

func seconds(s ...int) []*durationpb.Duration {
	var out []*durationpb.Duration
	for _, n := range s {
		out = append(out, durationpb.New(time.Duration(n)*time.Second))
	}
	return out
}

// TestOfficialVerifiers holds what arrives against the libraries that receivers use.
func TestOfficialVerifiers(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	rcv := servertest.NewReceiver(t, nil)
	key := s.Namespace("acme")
	s.Subscribe("acme", "orders", rcv.URL, nil)
	for id, body := range map[string]string{"empty": "", "json": `{"a":1}`, "binary": "\x00\xff\r\n", "unicode": "żółć 🐙"} {
		s.Publish("acme", id, "order.created", []byte(body))
	}
	servertest.Await(t, "the deliveries", func() bool { return rcv.Accepted() == 4 })
	std, err := standard.NewWebhook(key)
	if err != nil {
		t.Fatal(err)
	}
	svx, err := svix.NewWebhook(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range rcv.Requests() {
		if err := std.Verify(q.Body, q.Header); err != nil {
			t.Errorf("%s: standard-webhooks: %v", q.Header.Get("Ce-Id"), err)
		}
		if err := svx.Verify(q.Body, q.Header); err != nil {
			t.Errorf("%s: svix: %v", q.Header.Get("Ce-Id"), err)
		}
	}
}

// TestOutcomes publishes one event for each way a receiver can answer.
func TestOutcomes(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	redirected := servertest.NewReceiver(t, nil)
	rcv := servertest.NewReceiver(t, nil)
	mux := http.NewServeMux()
	mux.HandleFunc("/redirect", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, redirected.URL, http.StatusTemporaryRedirect)
	})
	redirecting := newServer(t, mux)
	failTwice := &atomic.Int32{}
	rcv.Answer(func(q servertest.Request) int {
		switch q.Path {
		case "/gone":
			return http.StatusGone
		case "/twice":
			if failTwice.Add(1) <= 2 {
				return http.StatusServiceUnavailable
			}
		case "/never":
			return http.StatusInternalServerError
		}
		return http.StatusNoContent
	})
	retry := &grapnelv1.RetryPolicy{MaxAttempts: 3, Schedule: seconds(0, 1)}
	for id, uri := range map[string]string{
		"ok": rcv.URL + "/ok", "gone": rcv.URL + "/gone", "twice": rcv.URL + "/twice", "never": rcv.URL + "/never",
		"redirect": redirecting + "/redirect", "refused": "http://" + freeAddr(t) + "/",
	} {
		s.Subscribe("acme", id, uri, func(sub *grapnelv1.Subscription) { sub.RetryPolicy = retry })
	}
	s.Publish("acme", "e1", "order.created", []byte(`{}`))
	servertest.Await(t, "all deliveries to end", func() bool { return open(s, "acme") == 0 })
	type end struct {
		state    grapnelv1.Delivery_State
		attempts int32
		outcome  grapnelv1.Attempt_Outcome
	}
	want := map[string]end{
		"ok":       {grapnelv1.Delivery_STATE_SUCCEEDED, 1, grapnelv1.Attempt_OUTCOME_SUCCEEDED},
		"gone":     {grapnelv1.Delivery_STATE_REJECTED, 1, grapnelv1.Attempt_OUTCOME_PERMANENT},
		"twice":    {grapnelv1.Delivery_STATE_SUCCEEDED, 3, grapnelv1.Attempt_OUTCOME_SUCCEEDED},
		"never":    {grapnelv1.Delivery_STATE_EXHAUSTED, 3, grapnelv1.Attempt_OUTCOME_RETRYABLE},
		"redirect": {grapnelv1.Delivery_STATE_EXHAUSTED, 3, grapnelv1.Attempt_OUTCOME_RETRYABLE},
		"refused":  {grapnelv1.Delivery_STATE_EXHAUSTED, 3, grapnelv1.Attempt_OUTCOME_UNREACHABLE},
	}
	for id, w := range want {
		name := "namespaces/acme/subscriptions/" + id
		got := s.Deliveries("acme", "subscription = "+name)
		if len(got) != 1 {
			t.Errorf("%s has %d deliveries", id, len(got))
			continue
		}
		d := got[0]
		if g := (end{d.GetState(), d.GetAttemptCount(), d.GetLastAttempt().GetOutcome()}); g != w {
			t.Errorf("%s ended as %v, want %v (%s)", id, g, w, d.GetLastAttempt().GetError())
		}
	}
	if n := len(redirected.Requests()); n != 0 {
		t.Errorf("a redirect was followed %d times", n)
	}
	sub, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).GetSubscription(t.Context(),
		&grapnelv1.GetSubscriptionRequest{Name: "namespaces/acme/subscriptions/gone"})
	if err != nil {
		t.Fatal(err)
	}
	if st := sub.GetSubscription().GetState(); st != grapnelv1.Subscription_STATE_DISABLED {
		t.Errorf("after 410 the subscription is %v", st)
	}
	s.Publish("acme", "e2", "order.created", []byte(`{}`))
	skipped := s.Deliveries("acme", "state = SKIPPED")
	if len(skipped) != 1 || skipped[0].GetSubscription() != "namespaces/acme/subscriptions/gone" {
		t.Errorf("skipped: %v", skipped)
	}
}

// TestDeliverLater publishes an event for later and one that must not wait that long.
func TestDeliverLater(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	rcv := servertest.NewReceiver(t, nil)
	s.Subscribe("acme", "up", rcv.URL, nil)
	down := servertest.NewReceiver(t, func(servertest.Request) int { return http.StatusServiceUnavailable })
	s.Subscribe("acme", "down", down.URL, func(sub *grapnelv1.Subscription) { sub.RetryPolicy = fastRetries() })
	at := time.Now().Add(1500 * time.Millisecond)
	_, err := grapnelv1.NewPublishServiceClient(s.Conn).Publish(t.Context(), &grapnelv1.PublishRequest{
		Parent: "namespaces/acme",
		Event: &grapnelv1.Event{
			Id: "later", Type: "order.created", DeliverTime: timestamppb.New(at), Ttl: durationpb.New(2 * time.Second),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := open(s, "acme"); n != 2 {
		t.Errorf("%d deliveries wait for their time, want 2", n)
	}
	servertest.Await(t, "both deliveries to end", func() bool { return open(s, "acme") == 0 })
	for _, d := range s.Deliveries("acme", "") {
		first := d.GetLastAttempt().GetStartTime().AsTime()
		want := grapnelv1.Delivery_STATE_SUCCEEDED
		if strings.HasSuffix(d.GetSubscription(), "/down") {
			want = grapnelv1.Delivery_STATE_EXHAUSTED
		}
		if d.GetState() != want || first.Before(at) {
			t.Errorf("%s ended as %v, attempted %v before its time", d.GetSubscription(), d.GetState(), at.Sub(first))
		}
	}
}

// TestForbiddenAddress points a name at an address that deliveries may not go to: nothing reaches the address, and the
// delivery waits, for what a name means changes.
func TestForbiddenAddress(t *testing.T) {
	s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) { o.EgressAllow = nil }})
	s.Namespace("acme")
	rcv := servertest.NewReceiver(t, nil)
	s.Subscribe("acme", "inside", strings.Replace(rcv.URL, "127.0.0.1", "localhost", 1), nil)
	s.Publish("acme", "e1", "order.created", []byte(`{}`))
	servertest.Await(t, "an attempt", func() bool { return s.Deliveries("acme", "")[0].GetLastAttempt() != nil })
	d := s.Deliveries("acme", "")[0]
	if d.GetState() != grapnelv1.Delivery_STATE_SCHEDULED || !strings.Contains(d.GetLastAttempt().GetError(), "egress policy") {
		t.Errorf("the delivery is %v: %s", d.GetState(), d.GetLastAttempt().GetError())
	}
	if n := len(rcv.Requests()); n != 0 {
		t.Errorf("%d requests reached a forbidden address", n)
	}
}

// TestOwnListenersAreClosed: what is allowed for deliveries is not allowed for the server itself.
func TestOwnListenersAreClosed(t *testing.T) {
	s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) { o.EgressDeny = []string{"127.0.0.9/32"} }})
	s.Namespace("acme")
	for _, uri := range []string{
		"http://" + s.AdminAddr + "/debug/pprof/profile", "http://" + s.Addr + "/", "http://127.0.0.9:80/", "http://127.5.5.5" + s.AdminAddr[strings.LastIndex(s.AdminAddr, ":"):] + "/",
	} {
		_, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/acme", SubscriptionId: "own", Subscription: &grapnelv1.Subscription{Uri: uri},
		})
		if err == nil || !strings.Contains(err.Error(), "egress policy") {
			t.Errorf("%s: %v, want a refusal by egress policy", uri, err)
		}
	}
	s.Subscribe("acme", "other", "http://127.0.0.1:1/", nil)
}

// TestBrokenPlugin starts a server whose plugin process cannot run: it serves, accepts and keeps.
func TestBrokenPlugin(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := servertest.Start(t, servertest.Options{Dir: dir})
	rcv := servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	s.Subscribe("acme", "orders", rcv.URL, nil)
	s.Stop()
	broken := servertest.Start(t, servertest.Options{Dir: dir, Adjust: func(o *server.Options) {
		o.BuiltinPlugin = []string{os.Args[0], "-test.run=^$"} // ends at once
	}})
	broken.Publish("acme", "e1", "order.created", []byte(`{}`))
	got, err := grapnelv1.NewPluginServiceClient(broken.Conn).ListPlugins(t.Context(), &grapnelv1.ListPluginsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range got.GetPlugins() {
		if p.GetHealth() == grapnelv1.Plugin_HEALTH_SERVING {
			t.Errorf("%s serves", p.GetName())
		}
	}
	broken.Stop()
	whole := servertest.Start(t, servertest.Options{Dir: dir})
	servertest.Await(t, "the delivery", func() bool { return rcv.Accepted() == 1 && open(whole, "acme") == 0 })
}

// TestThirdPartyPlugin builds the example plugin, a module of its own, and delivers with its signer and
// its transport.
func TestThirdPartyPlugin(t *testing.T) {
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "example"), ".")
	build.Dir = "../plugins/example"
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build plugins/example: %v\n%s", err, out)
	}
	s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) { o.PluginDir = dir }})
	rcv := servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	servertest.Await(t, "the plugin to be listed", func() bool {
		got, err := grapnelv1.NewPluginServiceClient(s.Conn).GetPlugin(t.Context(), &grapnelv1.GetPluginRequest{Name: "plugins/example-signer"})
		return err == nil && got.GetPlugin().GetHealth() == grapnelv1.Plugin_HEALTH_SERVING
	})
	s.Subscribe("acme", "signed", rcv.URL, func(sub *grapnelv1.Subscription) { sub.Signers[0].Plugin = "plugins/example-signer" })
	spool := t.TempDir()
	s.Subscribe("acme", "spooled", "file-spool:///orders", func(sub *grapnelv1.Subscription) {
		sub.Transport = &grapnelv1.PluginBinding{Config: &structpb.Struct{Fields: map[string]*structpb.Value{
			"dir": structpb.NewStringValue(spool),
		}}}
	})
	s.Publish("acme", "e1", "order.created", []byte(`{"n":1}`))
	servertest.Await(t, "both deliveries", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 2 })
	if got := rcv.Requests()[0].Header.Get("X-Example-Signature"); got == "" {
		t.Error("the request has no x-example-signature")
	}
	files, err := filepath.Glob(filepath.Join(spool, "*"))
	if err != nil || len(files) != 1 {
		t.Errorf("spool holds %v, %v", files, err)
	}
	transformerGone(t, s, dir)
}

// transformerGone takes a plugin away while deliveries of a subscription with its transformer are open: what it has made is
// sent on every attempt, and what it has not made waits and says so, until it is back. The payload is never sent.
func transformerGone(t *testing.T, s *servertest.Server, dir string) {
	t.Helper()
	var status atomic.Int32
	status.Store(http.StatusServiceUnavailable)
	rcv := servertest.NewReceiver(t, func(servertest.Request) int { return int(status.Load()) })
	if _, err := grapnelv1.NewSecretServiceClient(s.Conn).CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/acme", SecretId: "pseudonyms", Plugin: "plugins/example-pseudonym", Value: "0123456789abcdef",
	}); err != nil {
		t.Fatal(err)
	}
	by := transformedBy(t, "example-pseudonym", map[string]any{"fields": []any{"email"}}) // which retries at once
	s.Subscribe("acme", "hidden", rcv.URL, func(sub *grapnelv1.Subscription) {
		by(sub)
		sub.Transformer.Secrets = map[string]string{"key": "namespaces/acme/secrets/pseudonyms"}
		sub.EventTypes, sub.RetryPolicy.MaxAttempts = []string{"user.*"}, 100
	})
	of := func(event string) (found *grapnelv1.Delivery) {
		for _, d := range s.Deliveries("acme", "subscription=namespaces/acme/subscriptions/hidden") {
			if strings.HasSuffix(d.GetEvent(), event) {
				found = d
			}
		}
		return found
	}
	s.Publish("acme", "u-1", "user.created", []byte(`{"email":"ada@example.com"}`))
	servertest.Await(t, "what the transformer has made", func() bool { return len(rcv.Requests()) > 0 })
	away := filepath.Join(t.TempDir(), "example")
	if err := os.Rename(filepath.Join(dir, "example"), away); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "the plugin to be gone", func() bool {
		_, err := grapnelv1.NewPluginServiceClient(s.Conn).GetPlugin(t.Context(), &grapnelv1.GetPluginRequest{Name: "plugins/example-pseudonym"})
		return err != nil
	})
	s.Publish("acme", "u-2", "user.created", []byte(`{"email":"bea@example.com"}`))
	before := len(rcv.Requests())
	servertest.Await(t, "attempts without the plugin", func() bool { return len(rcv.Requests()) > before+1 })
	status.Store(http.StatusOK)
	servertest.Await(t, "the delivery of what was made", func() bool { return of("u-1").GetState() == grapnelv1.Delivery_STATE_SUCCEEDED })
	servertest.Await(t, "the delivery of what was not made to say that it waits", func() bool {
		return strings.Contains(of("u-2").GetStateReason(), "plugins/example-pseudonym")
	})
	if err := os.Rename(away, filepath.Join(dir, "example")); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "the other delivery", func() bool { return of("u-2").GetState() == grapnelv1.Delivery_STATE_SUCCEEDED })
	all := rcv.Requests()
	for i, r := range all {
		if last := i == len(all)-1; strings.Contains(string(r.Body), "@") || bytes.Equal(r.Body, all[0].Body) == last {
			t.Errorf("request %d of %d: %s", i+1, len(all), r.Body)
		}
	}
}
