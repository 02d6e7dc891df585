package server_test

import (
	"net/http"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/server/servertest"
)

// TestOwnership: with the handshake of CloudEvents asked for, a subscription is stored when its receiver
// agrees, and for as many requests as it agrees to.
func TestOwnership(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	var mu sync.Mutex
	var methods []string
	rate := ""
	receiver := newServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		methods = append(methods, r.Method)
		if r.Method == http.MethodOptions && rate != "" {
			w.Header().Set("WebHook-Allowed-Origin", r.Header.Get("WebHook-Request-Origin"))
			w.Header().Set("WebHook-Allowed-Rate", rate)
		}
		w.WriteHeader(http.StatusOK)
	}))
	agree := func(to string) { mu.Lock(); defer mu.Unlock(); rate = to }
	asked := func() string {
		mu.Lock()
		defer mu.Unlock()
		defer func() { methods = nil }()
		return strings.Join(methods, " ")
	}
	config, err := structpb.NewStruct(map[string]any{"ownership": map[string]any{"check": "cloudevents", "origin": "hooks.example.com"}})
	if err != nil {
		t.Fatal(err)
	}
	create := func(maxRate float64, only bool) error {
		_, err := s.Client.SubscriptionService().CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/acme", SubscriptionId: "orders", ValidateOnly: only, Subscription: &grapnelv1.Subscription{
				Uri: receiver, MaxRate: maxRate, Transport: &grapnelv1.PluginBinding{Config: config},
				Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/key"}}},
			},
		})
		return err
	}
	refused := func(err error, reason, field, text string) {
		t.Helper()
		e := client.FromError(err)
		if e == nil || e.Reason != reason || len(e.Violations) != 1 || e.Violations[0].Field != field || !strings.Contains(e.Message, text) {
			t.Errorf("got %v, want %s of %s: …%s…", err, reason, field, text)
		}
	}

	if err := create(0, true); err != nil || asked() != "" {
		t.Errorf("validate only: %v", err)
	}
	refused(create(0, false), "OWNERSHIP_REFUSED", "subscription.uri", "without WebHook-Allowed-Origin")
	if got := asked(); got != "OPTIONS" {
		t.Errorf("asked by %q", got)
	}
	agree("120")
	refused(create(0, false), "INVALID_FIELD", "subscription.max_rate", "at most 2")
	if err := create(2, false); err != nil {
		t.Fatal(err)
	}

	// The receiver is asked again before it gets more, and not for anything else.
	asked()
	update := func(path string, sub *grapnelv1.Subscription) error {
		sub.Name = "namespaces/acme/subscriptions/orders"
		_, err := s.Client.SubscriptionService().UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
			Subscription: sub, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{path}},
		})
		return err
	}
	if err := update("max_in_flight", &grapnelv1.Subscription{MaxInFlight: 2}); err != nil || asked() != "" {
		t.Errorf("another change: %v", err)
	}
	refused(update("max_rate", &grapnelv1.Subscription{MaxRate: 10}), "INVALID_FIELD", "subscription.max_rate", "given 10 a second")
	agree("*")
	if err := update("max_rate", &grapnelv1.Subscription{}); err != nil {
		t.Error(err)
	}
	agree("")
	refused(update("uri", &grapnelv1.Subscription{Uri: receiver + "/other"}), "OWNERSHIP_REFUSED", "subscription.uri", "without WebHook-Allowed-Origin")
}
