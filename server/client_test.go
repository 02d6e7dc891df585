package server_test

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/server/servertest"
)

// TestFirstWebhookWithTypedCalls goes from nothing to a delivered event and back to nothing with the Go SDK,
// once with short IDs and once with full names.
func TestFirstWebhookWithTypedCalls(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	var status atomic.Int32
	status.Store(http.StatusNoContent)
	receiver := servertest.NewReceiver(t, func(servertest.Request) int { return int(status.Load()) })
	names := map[string]func(collection, id string) string{
		"short": func(_, id string) string { return id },
		"full": func(collection, id string) string {
			return strings.TrimSuffix("namespaces/full/"+collection, "/") + strings.TrimSuffix("/"+id, "/")
		},
	}
	for ns, name := range names {
		t.Run(ns, func(t *testing.T) {
			status.Store(http.StatusNoContent)
			firstWebhook(t, s.Client, receiver.URL, ns, name, func(code int32) { status.Store(code) })
		})
	}
}

func firstWebhook(t *testing.T, c *client.Client, target, ns string, name func(collection, id string) string, answer func(int32)) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	tenant := ns
	if ns == "full" {
		tenant = "namespaces/full"
	}
	_, err := c.CreateNamespace(ctx, tenant, &grapnelv1.Namespace{Labels: map[string]string{"plan": "free"}})
	must("create namespace", err)
	if _, err := c.CreateNamespace(ctx, tenant, nil); !errors.Is(err, client.ErrExists) {
		t.Errorf("create it again: %v, want ErrExists", err)
	}
	n, err := c.UpdateNamespace(ctx, tenant, func(n *grapnelv1.Namespace) error { n.Labels["plan"] = "paid"; return nil })
	must("update namespace", err)
	if n.GetLabels()["plan"] != "paid" || n.GetUsage() == nil && n.GetName() != "namespaces/"+ns {
		t.Errorf("namespace = %v", n)
	}
	key, generated, err := c.CreateSecret(ctx, tenant, name("secrets", "key"), client.NewSecret{})
	must("create secret", err)
	if !strings.HasPrefix(generated, "whsec_") {
		t.Errorf("generated value is no whsec_ key")
	}
	_, rotated, err := c.RotateSecret(ctx, tenant, name("secrets", "key"), "", time.Hour)
	must("rotate secret", err)
	if got, err := c.GetSecret(ctx, tenant, name("secrets", "key")); err != nil || len(got.GetVersions()) != 2 || rotated == generated {
		t.Errorf("after a rotation: %v, %v", got, err)
	}

	subscriptions := c.Subscriptions(tenant)
	orders := name("subscriptions", "orders")
	_, warnings, err := subscriptions.Create(ctx, orders, &grapnelv1.Subscription{
		Uri: target, EventTypes: []string{"order.*"}, Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": key.GetName()}}},
		RetryPolicy: &grapnelv1.RetryPolicy{MaxAttempts: 1},
	})
	must("create subscription", err)
	if len(warnings) == 0 {
		t.Error("no warning about plain http")
	}
	attempt, err := subscriptions.Test(ctx, orders, client.Event{})
	must("test subscription", err)
	if attempt.GetOutcome() != grapnelv1.Attempt_OUTCOME_SUCCEEDED {
		t.Errorf("test attempt = %v", attempt)
	}

	published, err := c.Publish(ctx, tenant, client.Event{ID: "o-1", Type: "order.created", Data: []byte(`{"order":1}`)})
	must("publish", err)
	deliveries, err := c.WaitEvent(ctx, tenant, name("events", "o-1"))
	must("wait for the event", err)
	if len(deliveries) != 1 || deliveries[0].GetState() != grapnelv1.Delivery_STATE_SUCCEEDED {
		t.Fatalf("deliveries = %v", deliveries)
	}
	for _, id := range []string{name("events", "o-1"), published.GetName(), published.GetUid()} {
		if e, err := c.GetEvent(ctx, tenant, id); err != nil || string(e.GetData()) != `{"order":1}` {
			t.Errorf("event %q = %v, %v", id, e, err)
		}
	}

	answer(http.StatusBadRequest)
	_, err = c.Publish(ctx, tenant, client.Event{ID: "o-2", Type: "order.created"})
	must("publish", err)
	deliveries, err = c.WaitEvent(ctx, tenant, "o-2")
	must("wait for the event", err)
	if len(deliveries) != 1 || deliveries[0].GetState() == grapnelv1.Delivery_STATE_SUCCEEDED || !client.Ended(deliveries[0]) {
		t.Fatalf("deliveries = %v", deliveries)
	}
	answer(http.StatusNoContent)
	_, err = c.RetryDelivery(ctx, deliveries[0].GetName())
	must("retry", err)
	if d, err := c.WaitDelivery(ctx, deliveries[0].GetName()); err != nil || d.GetState() != grapnelv1.Delivery_STATE_SUCCEEDED {
		t.Errorf("after a retry: %v, %v", d, err)
	}

	if sub, err := subscriptions.Pause(ctx, orders, "by hand"); err != nil || sub.GetState() != grapnelv1.Subscription_STATE_PAUSED {
		t.Errorf("pause: %v, %v", sub, err)
	}
	_, err = c.Publish(ctx, tenant, client.Event{ID: "o-3", Type: "order.created"})
	must("publish", err)
	short, cancelShort := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancelShort()
	waiting, err := c.WaitEvent(short, tenant, "o-3")
	if !errors.Is(err, context.DeadlineExceeded) || len(waiting) != 1 {
		t.Errorf("wait for a paused delivery = %v, %v; want it as last seen and the context's error", waiting, err)
	}
	if d, err := c.CancelDelivery(ctx, waiting[0].GetName()); err != nil || d.GetState() != grapnelv1.Delivery_STATE_CANCELLED {
		t.Errorf("cancel: %v, %v", d, err)
	}
	if sub, err := subscriptions.Resume(ctx, orders); err != nil || sub.GetState() != grapnelv1.Subscription_STATE_ACTIVE {
		t.Errorf("resume: %v, %v", sub, err)
	}
	var listed []string
	for sub, err := range subscriptions.List(ctx) {
		must("list", err)
		listed = append(listed, sub.GetName())
	}
	if !slices.Equal(listed, []string{"namespaces/" + ns + "/subscriptions/orders"}) {
		t.Errorf("listed %v", listed)
	}
	if err := c.DeleteSecret(ctx, tenant, name("secrets", "key")); !errors.Is(err, client.ErrInUse) {
		t.Errorf("delete a secret in use: %v, want ErrInUse", err)
	}
	_, err = subscriptions.Delete(ctx, orders)
	must("delete subscription", err)
	must("delete secret", c.DeleteSecret(ctx, tenant, name("secrets", "key")))
	if n, err := c.DeleteNamespace(ctx, tenant, false); err != nil || n.GetState() != grapnelv1.Namespace_STATE_DELETED {
		t.Errorf("delete namespace: %v, %v", n, err)
	}
	if p, err := c.GetPlugin(ctx, "plugins/http"); err != nil || p.GetName() != "plugins/http" {
		t.Errorf("plugin: %v, %v", p, err)
	}
}

// TestPublisherAgainstTheServer gives a publisher events that no server can take among many that it can.
func TestPublisherAgainstTheServer(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	for _, stream := range []bool{false, true} {
		ns := map[bool]string{false: "batches", true: "streams"}[stream]
		t.Run(ns, func(t *testing.T) {
			s.In(t).Namespace(ns)
			p := s.Client.Publisher(ns, client.PublisherOptions{Stream: stream})
			bad := map[int]client.Event{
				100: {ID: "latin", Type: "order.created", Subject: "caf\xe9"},
				200: {ID: "huge", Type: "order.created", Data: make([]byte, 5<<20)},
				300: {ID: "large", Type: "order.created", Data: make([]byte, 1<<20)}, // above the namespace's limit
				400: {ID: "untyped"},
			}
			results := make([]*client.Result, 1000)
			for n := range results {
				e, wrong := bad[n]
				if !wrong {
					e = client.Event{ID: "e-" + strconv.Itoa(n), Type: "order.created", Data: []byte(`{}`)}
				}
				results[n] = p.Publish(t.Context(), e)
			}
			if err := p.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			stored := map[string]bool{}
			for e, err := range s.Client.Events(t.Context(), ns) {
				if err != nil {
					t.Fatal(err)
				}
				stored[e.GetId()] = true
			}
			for n, r := range results {
				_, err := r.Result()
				switch _, wrong := bad[n]; {
				case wrong && (!errors.Is(err, client.ErrNotStored) || !errors.Is(err, client.ErrInvalidField) || stored[r.ID()]):
					t.Errorf("event %s: %v, want ErrInvalidField and ErrNotStored", r.ID(), err)
				case !wrong && (err != nil || !stored[r.ID()]):
					t.Errorf("event %s: %v, stored: %v", r.ID(), err, stored[r.ID()])
				}
			}
			if len(stored) != len(results)-len(bad) {
				t.Errorf("%d events stored, want %d", len(stored), len(results)-len(bad))
			}
		})
	}
}
