package api_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
)

// TestConfigurationStopsWhereRoomEnds: what adds to the configuration is refused as publishes are, what takes from it
// or stops traffic goes on.
func TestConfigurationStopsWhereRoomEnds(t *testing.T) {
	var full atomic.Pointer[error]
	st := startStation(t, func(o *api.Options) {
		o.Room = func() error {
			if err := full.Load(); err != nil {
				return *err
			}
			return nil
		}
	})
	ctx := t.Context()
	calls := map[string]func(id string) error{
		"create namespace": func(id string) error {
			_, err := st.namespaces.CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{NamespaceId: id})
			return err
		},
		"update namespace": func(string) error {
			_, err := st.namespaces.UpdateNamespace(ctx, &grapnelv1.UpdateNamespaceRequest{Namespace: &grapnelv1.Namespace{Name: "namespaces/acme", Labels: map[string]string{"a": "b"}}})
			return err
		},
		"create secret": func(id string) error {
			_, err := st.secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: id, Kind: grapnelv1.Secret_KIND_HMAC})
			return err
		},
		"rotate secret": func(string) error {
			_, err := st.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: "namespaces/acme/secrets/key"})
			return err
		},
		"create subscription": func(id string) error {
			_, err := st.subscriptions.CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
				Parent: "namespaces/acme", SubscriptionId: id, Subscription: plainSubscription("acme"),
			})
			return err
		},
		"update subscription": func(string) error {
			sub := plainSubscription("acme")
			sub.Name = "namespaces/acme/subscriptions/one"
			_, err := st.subscriptions.UpdateSubscription(ctx, &grapnelv1.UpdateSubscriptionRequest{Subscription: sub})
			return err
		},
	}
	order := []string{"create namespace", "update namespace", "create secret", "rotate secret", "create subscription", "update subscription"}
	if err := calls["create namespace"]("acme"); err != nil {
		t.Fatal(err)
	}
	if err := calls["create secret"]("key"); err != nil {
		t.Fatal(err)
	}
	if err := calls["create subscription"]("one"); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{delivery.ErrDiskFull, fmt.Errorf("%w: 15 of 16 bytes", api.ErrConfigFull)} {
		full.Store(&err)
		for _, what := range order {
			refused(t, calls[what]("two"), codes.ResourceExhausted, "STORE_FULL")
		}
	}
	const sub = "namespaces/acme/subscriptions/one"
	if _, err := st.subscriptions.PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: sub}); err != nil {
		t.Errorf("pause: %v", err)
	}
	if _, err := st.subscriptions.ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: sub}); err != nil {
		t.Errorf("resume: %v", err)
	}
	if _, err := st.subscriptions.DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: sub}); err != nil {
		t.Errorf("delete subscription: %v", err)
	}
	if _, err := st.secrets.DeleteSecret(ctx, &grapnelv1.DeleteSecretRequest{Name: "namespaces/acme/secrets/key"}); err != nil {
		t.Errorf("delete secret: %v", err)
	}
	if _, err := st.namespaces.DeleteNamespace(ctx, &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/acme"}); err != nil {
		t.Errorf("delete namespace: %v", err)
	}
	full.Store(nil)
	if err := calls["create namespace"]("two"); err != nil {
		t.Errorf("with room again: %v", err)
	}
}
