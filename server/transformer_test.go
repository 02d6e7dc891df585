package server_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/sdk/webhook"
	"github.com/grapnel/grapnel/server/servertest"
)

// transformedBy gives a subscription a transformer.
func transformedBy(t *testing.T, plugin string, config map[string]any) func(*grapnelv1.Subscription) {
	t.Helper()
	settings, err := structpb.NewStruct(config)
	if err != nil {
		t.Fatal(err)
	}
	return func(sub *grapnelv1.Subscription) {
		sub.Transformer = &grapnelv1.PluginBinding{Plugin: "plugins/" + plugin, Config: settings}
		sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 3, Schedule: []*durationpb.Duration{durationpb.New(10 * time.Millisecond)}}
	}
}

// random makes something else each time that it runs.
const random = `function transform(event) {
  return {body: {order: event.data.order, at: Math.random()}, content_type: "application/vnd.shop+json", headers: {"x-order": String(event.data.order)}};
}`

// A transformer runs once for each delivery: every attempt has the same bytes, which the signature covers, over a restart of
// the server, after the transformer has changed, and in a replay.
func TestTransformedOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir() + "/data"
	s := servertest.Start(t, servertest.Options{Dir: dir})
	var status atomic.Int32
	status.Store(http.StatusServiceUnavailable)
	receiver := servertest.NewReceiver(t, func(servertest.Request) int { return int(status.Load()) })
	verifier, err := webhook.NewVerifier(s.Namespace("acme"))
	if err != nil {
		t.Fatal(err)
	}
	by := transformedBy(t, "javascript", map[string]any{"script": random, "returns": "request"})
	s.Subscribe("acme", "shop", receiver.URL, func(sub *grapnelv1.Subscription) {
		by(sub)
		sub.RetryPolicy = fastRetries()
	})
	s.Publish("acme", "o-1", "order.created", []byte(`{"order":1001}`))
	servertest.Await(t, "two attempts", func() bool { return len(receiver.Requests()) >= 2 })
	s.Stop()
	s = servertest.Start(t, servertest.Options{Dir: dir})
	before := len(receiver.Requests())
	servertest.Await(t, "an attempt after a restart", func() bool { return len(receiver.Requests()) > before })
	if _, err := s.Client.Subscriptions("acme").Update(t.Context(), "shop", func(sub *grapnelv1.Subscription) error {
		transformedBy(t, "jq", map[string]any{"program": `"another"`})(sub)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	status.Store(http.StatusOK)
	servertest.Await(t, "the delivery", func() bool {
		d := s.Deliveries("acme", "")
		return len(d) == 1 && d[0].GetState() == grapnelv1.Delivery_STATE_SUCCEEDED
	})
	before = len(receiver.Requests())
	if _, err := grapnelv1.NewDeliveryServiceClient(s.Conn).RetryDelivery(t.Context(), &grapnelv1.RetryDeliveryRequest{Name: s.Deliveries("acme", "")[0].GetName(), AllowSucceeded: true}); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "the replay", func() bool { return len(receiver.Requests()) > before })
	all := receiver.Requests()
	for i, r := range all {
		if !bytes.Equal(r.Body, all[0].Body) || r.ID != all[0].ID || r.Header.Get("X-Order") != "1001" || r.Header.Get("Content-Type") != "application/vnd.shop+json" {
			t.Errorf("attempt %d of %d: %s with %v, and the first was %s", i+1, len(all), r.Body, r.Header, all[0].Body)
		}
		if err := verifier.Verify(r.Header, r.Body); err != nil {
			t.Errorf("attempt %d: %v", i+1, err)
		}
	}
	var body struct{ Order int }
	if err := json.Unmarshal(all[0].Body, &body); err != nil || body.Order != 1001 {
		t.Errorf("%s: %v", all[0].Body, err)
	}
	s.Publish("acme", "o-2", "order.created", []byte(`{"order":1002}`))
	servertest.Await(t, "what the new transformer makes", func() bool {
		rs := receiver.Requests()
		return string(rs[len(rs)-1].Body) == `"another"`
	})
}

// What is dropped ends as SKIPPED, with why; what fails is the plugin's fault, ends with its attempts, and says nothing of the
// receiver; what the process dies of costs the rest nothing but time.
func TestTransformersThatMakeNothing(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	receiver := servertest.NewReceiver(t, nil)
	js := func(body string) func(*grapnelv1.Subscription) {
		return transformedBy(t, "javascript", map[string]any{"script": "function transform(event) { " + body + " }"})
	}
	s.Subscribe("acme", "drops", receiver.URL+"/drops", transformedBy(t, "jq", map[string]any{"program": `drop("\(.data.order) is of no interest")`}))
	s.Subscribe("acme", "throws", receiver.URL+"/throws", js(`throw new Error("mine")`))
	s.Subscribe("acme", "loops", receiver.URL+"/loops", js(`for (;;);`))
	s.Subscribe("acme", "dies", receiver.URL+"/dies", js(`return Array.from({get length() { return 2 ** 31; }, get 0() { return 1; }}, (_, i) => "x" + i);`))
	s.Subscribe("acme", "well", receiver.URL+"/well", js(`return event.data;`))
	const events = 3
	for i := range events {
		s.Publish("acme", fmt.Sprint("o-", i), "order.created", fmt.Appendf(nil, `{"order":%d}`, i))
	}
	ended := func(sub string) (ended []*grapnelv1.Delivery) {
		for _, d := range s.Deliveries("acme", "subscription=namespaces/acme/subscriptions/"+sub) {
			if client.Ended(d) {
				ended = append(ended, d)
			}
		}
		return ended
	}
	for sub, want := range map[string]struct {
		state  grapnelv1.Delivery_State
		reason string
		last   string
	}{
		"well":   {state: grapnelv1.Delivery_STATE_SUCCEEDED},
		"drops":  {state: grapnelv1.Delivery_STATE_SKIPPED, reason: "is of no interest"},
		"throws": {state: grapnelv1.Delivery_STATE_EXHAUSTED, last: "transform: Error: mine"},
		"loops":  {state: grapnelv1.Delivery_STATE_EXHAUSTED, last: "timeout: the script takes longer than"},
	} {
		servertest.Await(t, sub, func() bool { return len(ended(sub)) == events })
		for _, d := range ended(sub) {
			if d.GetState() != want.state || !strings.Contains(d.GetStateReason(), want.reason) || !strings.Contains(d.GetLastAttempt().GetError(), want.last) {
				t.Errorf("%s: %v, want %v", sub, d, want)
			}
			if want.last != "" && d.GetLastAttempt().GetOutcome() != grapnelv1.Attempt_OUTCOME_PLUGIN_ERROR {
				t.Errorf("%s: outcome %v", sub, d.GetLastAttempt().GetOutcome())
			}
		}
		if got, err := s.Client.Subscriptions("acme").Get(t.Context(), sub); err != nil || got.GetState() != grapnelv1.Subscription_STATE_ACTIVE {
			t.Errorf("%s: %v, %v", sub, got.GetState(), err)
		}
	}
	for _, r := range receiver.Requests() {
		if r.Path != "/well" {
			t.Errorf("%s has got %s", r.Path, r.Body)
		}
	}
	status, err := grapnelv1.NewEventServiceClient(s.Conn).ExplainEvent(t.Context(), &grapnelv1.ExplainEventRequest{Name: "namespaces/acme/events/o-1"})
	if err != nil || !strings.Contains(status.String(), "dropped by the transformer: 1 is of no interest") {
		t.Errorf("explained as %v, %v", status, err)
	}
	// While the one that kills its process goes on doing so, others are delivered.
	for i := range events {
		s.Publish("acme", fmt.Sprint("p-", i), "order.created", fmt.Appendf(nil, `{"order":%d}`, i))
	}
	servertest.Await(t, "those beside it", func() bool { return len(ended("well")) == 2*events })
}

// A test of a subscription shows what was made, or why not, and stores nothing.
func TestTransformedTest(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	receiver := servertest.NewReceiver(t, nil)
	s.Subscribe("acme", "shop", receiver.URL, transformedBy(t, "cel", map[string]any{
		"expression": `event.type == "order.created" ? {"order": event.data.order} : drop("only new orders")`,
	}))
	try := func(eventType string) *grapnelv1.TestSubscriptionResponse {
		var out *grapnelv1.TestSubscriptionResponse
		servertest.Await(t, "a test", func() bool { // one a second is made
			var err error
			out, err = grapnelv1.NewSubscriptionServiceClient(s.Conn).TestSubscription(t.Context(), &grapnelv1.TestSubscriptionRequest{
				Name: "namespaces/acme/subscriptions/shop", Event: &grapnelv1.Event{Type: eventType, DataContentType: "application/json", Payload: &grapnelv1.Event_Text{Text: `{"order":1}`}},
			})
			return err == nil
		})
		return out
	}
	if got := try("order.created"); string(got.GetTransformed().GetBody()) != `{"order":1}` || got.GetTransformed().GetContentType() != "application/json" || got.GetAttempt().GetResponseCode() != http.StatusNoContent {
		t.Errorf("%v", got)
	}
	if got := try("order.paid"); !got.GetTransformed().GetDropped() || got.GetTransformed().GetDropReason() != "only new orders" || got.GetAttempt() != nil {
		t.Errorf("%v", got)
	}
	if n := len(s.Deliveries("acme", "")); n != 0 {
		t.Errorf("%d deliveries of tests", n)
	}
	for field, change := range map[string]func(*grapnelv1.Subscription){
		"subscription.transformer.plugin":            transformedBy(t, "http", nil),
		"subscription.transformer.config.expression": transformedBy(t, "cel", map[string]any{"expression": "event.data +"}),
		"subscription.batching": func(sub *grapnelv1.Subscription) {
			transformedBy(t, "jq", map[string]any{"program": "."})(sub)
			sub.Batching = &grapnelv1.Batching{}
		},
		"subscription.payload_shape.format": func(sub *grapnelv1.Subscription) {
			transformedBy(t, "jq", map[string]any{"program": "."})(sub)
			sub.PayloadShape = &grapnelv1.PayloadShape{Format: grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS}
		},
	} {
		sub := &grapnelv1.Subscription{Uri: receiver.URL, Signers: []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}}
		change(sub)
		_, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/acme", SubscriptionId: "other", Subscription: sub,
		})
		if err == nil || !strings.Contains(client.FromError(err).Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}
