package server_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/server/servertest"
)

// Headers that are made of an event's attributes, or that it brings and the subscription allows, arrive, signed; all others
// that it brings do not. Nothing in an event makes a header of its own, and what is too large is not sent.
func TestHeadersOfTheEvent(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	receiver := servertest.NewReceiver(t, func(r servertest.Request) int {
		if r.Path == "/orders" && r.Header.Get("X-Fail") != "" {
			return http.StatusBadRequest
		}
		return http.StatusOK
	})
	const house = "a-key-of-our-own-house-0001"
	signer := houseSigner(t, s, house, "{header:x-tenant}.{header:x-request-id}.{body}")
	s.Subscribe("acme", "letters", receiver.URL+"/letters", func(sub *grapnelv1.Subscription) {
		sub.EventTypes = []string{"nothing"}
		sub.HeaderTemplates = map[string]string{"x-from": "{event.attributes.deadletterfrom} {event.id}"}
		sub.AllowedEventHeaders = []string{"x-other"}
	})
	orders := func(sub *grapnelv1.Subscription) {
		sub.Headers = map[string]string{"X-Static": "{event.id}"}
		sub.HeaderTemplates = map[string]string{
			"X-Tenant": "{event.attributes.tenant}", "x-about": "{{{event.type}}} {event.subject}", "x-absent": "{event.id}{event.attributes.absent}", "x-key": "{event.ordering_key}",
		}
		sub.AllowedEventHeaders = []string{"X-Request-Id", "x-fail", "x-nobody"}
		sub.Signers = append(sub.Signers, signer)
		sub.RetryPolicy, sub.DeadLetter = &grapnelv1.RetryPolicy{MaxAttempts: 1}, "namespaces/acme/subscriptions/letters"
	}
	s.Subscribe("acme", "orders", receiver.URL+"/orders", orders)
	s.Subscribe("acme", "shaped", receiver.URL+"/shaped", func(sub *grapnelv1.Subscription) {
		transformedBy(t, "jq", map[string]any{"program": `{body: "b", headers: {"x-tenant": "made", "x-made": "m"}}`, "returns": "request"})(sub)
		sub.HeaderTemplates, sub.AllowedEventHeaders = map[string]string{"x-tenant": "{event.attributes.tenant}", "x-id": "{event.id}"}, []string{"x-made"}
	})
	publish := func(id, tenant string, headers map[string]string) {
		t.Helper()
		if _, err := s.Client.Publish(t.Context(), "acme", client.Event{
			ID: id, Type: "order.created", Subject: "a \"b\", ü", OrderingKey: "k", Data: []byte(id), Headers: headers,
			Attributes: map[string]string{"tenant": tenant},
		}); err != nil {
			t.Fatal(err)
		}
	}
	publish("o-1", "acme eu%", map[string]string{"X-REQUEST-ID": "r, 1", "x-other": "o", "x-made": "theirs"})
	publish("o-2", "t", map[string]string{"x-request-id": "2", "x-fail": "yes", "x-other": "o"})
	var all []*grapnelv1.Delivery
	defer func() {
		if t.Failed() {
			t.Log(all)
		}
	}()
	servertest.Await(t, "all deliveries", func() bool {
		all = s.Deliveries("acme", "")
		return len(all) == 5 && !slices.ContainsFunc(all, func(d *grapnelv1.Delivery) bool { return !client.Ended(d) })
	})
	found := map[string]http.Header{}
	for _, r := range receiver.Requests() {
		found[r.Path+" "+r.Header.Get("Ce-Id")] = r.Header
	}
	for at, want := range map[string]map[string]string{
		"/orders o-1": {"X-Tenant": "acme%20eu%25", "X-About": "{order.created} a%20%22b%22,%20%C3%BC", "X-Request-Id": "r, 1", "X-Static": "{event.id}", "X-Key": "k",
			"X-Absent": "", "X-Other": "", "X-House": house256(house, "acme%20eu%25.r, 1.o-1")},
		"/orders o-2":  {"X-Tenant": "t", "X-Fail": "yes", "X-House": house256(house, "t.2.o-2")},
		"/letters o-2": {"X-From": "orders o-2", "X-Other": "o", "X-Fail": "", "X-Tenant": ""},
		"/shaped o-1":  {"X-Tenant": "made", "X-Made": "m", "X-Id": "o-1"},
	} {
		for name, value := range want {
			if got := found[at].Values(name); strings.Join(got, "|") != value || value == "" && len(got) > 0 {
				t.Errorf("%s: %s is %q, want %q", at, name, got, value)
			}
		}
	}
	d := s.Deliveries("acme", "event=namespaces/acme/events/o-2 AND subscription=namespaces/acme/subscriptions/orders")
	attempts, err := grapnelv1.NewDeliveryServiceClient(s.Conn).ListAttempts(t.Context(), &grapnelv1.ListAttemptsRequest{Parent: d[0].GetName(), IncludeBodies: true})
	if err != nil || attempts.GetAttempts()[0].GetRequestHeaders()["x-tenant"] != "t" {
		t.Errorf("what was sent: %v, %v", attempts, err)
	}

	// What an event makes of the headers is bounded, and no fault of the receiver's.
	if _, err := s.Client.Subscriptions("acme").Update(t.Context(), "orders", func(sub *grapnelv1.Subscription) error {
		sub.HeaderTemplates["x-about"] = strings.Repeat("{event.attributes.tenant}", 100)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	publish("o-3", strings.Repeat("t", 200), map[string]string{"x-request-id": "3"})
	servertest.Await(t, "the end of what is too large", func() bool {
		d := s.Deliveries("acme", "event=namespaces/acme/events/o-3 AND subscription=namespaces/acme/subscriptions/orders")
		return len(d) == 1 && d[0].GetState() == grapnelv1.Delivery_STATE_REJECTED && strings.Contains(d[0].GetLastAttempt().GetError(), "header_templates and allowed_event_headers make more than 8192 bytes")
	})

	// Who else sets a header has the last word before anything is stored.
	for id, c := range map[string]struct {
		change func(*grapnelv1.Subscription)
		want   string
	}{
		"by a signer": {func(sub *grapnelv1.Subscription) { sub.AllowedEventHeaders = []string{"x-house"} }, `"x-house" is among the subscription's own headers too`},
		"by the transport": {func(sub *grapnelv1.Subscription) {
			config, _ := structpb.NewStruct(map[string]any{"auth": map[string]any{"type": "api_key", "name": "x-tenant", "in": "header"}})
			sub.Transport = &grapnelv1.PluginBinding{Plugin: "plugins/http", Config: config, Secrets: map[string]string{"api_key": signer.GetSecrets()["key"]}}
		}, "sets the header x-tenant"},
		"nobody": {func(sub *grapnelv1.Subscription) { sub.HeaderTemplates["x-b"] = "{event.tenant}" }, `subscription.header_templates["x-b"]: {event.tenant} is not a placeholder`},
	} {
		_, err := s.Client.Subscriptions("acme").Update(t.Context(), "orders", func(sub *grapnelv1.Subscription) error { c.change(sub); return nil })
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// A content type is signed as it arrives, however it was published.
func TestContentTypeIsSignedAsItArrives(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	receiver := servertest.NewReceiver(t, func(servertest.Request) int { return http.StatusOK })
	const house = "a-key-of-our-own-house-0002"
	signer := houseSigner(t, s, house, "{header:content-type}.{body}")
	s.Subscribe("acme", "orders", receiver.URL, func(sub *grapnelv1.Subscription) { sub.Signers = []*grapnelv1.PluginBinding{signer} })
	if _, err := s.Client.Publish(t.Context(), "acme", client.Event{ID: "o-1", Type: "order.created", ContentType: "text/plain; a=b  ", Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "the request", func() bool { return len(receiver.Requests()) == 1 })
	r := receiver.Requests()[0]
	if want := house256(house, r.Header.Get("Content-Type")+".x"); r.Header.Get("X-House") != want {
		t.Errorf("%q is signed otherwise: %s, want %s", r.Header.Get("Content-Type"), r.Header.Get("X-House"), want)
	}
}

// houseSigner signs content with a key of namespaces/acme, into the header x-house.
func houseSigner(t *testing.T, s *servertest.Server, key, content string) *grapnelv1.PluginBinding {
	t.Helper()
	secret, err := grapnelv1.NewSecretServiceClient(s.Conn).CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/acme", SecretId: "house", Plugin: "plugins/hmac", Slot: "key", Value: key,
	})
	if err != nil {
		t.Fatal(err)
	}
	settings, err := structpb.NewStruct(map[string]any{"content": content, "headers": map[string]any{"x-house": "{signature}"}})
	if err != nil {
		t.Fatal(err)
	}
	return &grapnelv1.PluginBinding{Plugin: "plugins/hmac", Config: settings, Secrets: map[string]string{"key": secret.GetSecret().GetName()}}
}

func house256(key, text string) string {
	mac := hmac.New(sha256.New, []byte(key))
	fmt.Fprint(mac, text)
	return hex.EncodeToString(mac.Sum(nil))
}
