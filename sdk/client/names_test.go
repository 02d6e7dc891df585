package client_test

import (
	"context"
	"errors"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// TestNamesOfElsewhereAreRefused: a short ID and a full name mean the same, and a full name of another
// namespace or kind is not taken for either.
func TestNamesOfElsewhereAreRefused(t *testing.T) {
	c, stop := start(t, &fake{subscription: &grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/orders"}})
	defer stop()
	for _, namespace := range []string{"acme", "namespaces/acme"} {
		for _, id := range []string{"orders", "namespaces/acme/subscriptions/orders"} {
			if _, err := c.Subscriptions(namespace).Get(t.Context(), id); err != nil {
				t.Errorf("Get(%q) in %q: %v", id, namespace, err)
			}
		}
		for _, id := range []string{"", "namespaces/other/subscriptions/orders", "namespaces/acme/secrets/orders", "namespaces/acme"} {
			if _, err := c.Subscriptions(namespace).Get(t.Context(), id); !errors.Is(err, client.ErrInvalidField) {
				t.Errorf("Get(%q) in %q: %v, want ErrInvalidField", id, namespace, err)
			}
		}
		r, err := c.Publish(t.Context(), namespace, event(1))
		if err != nil || r.GetName() != "namespaces/acme/events/e-1" {
			t.Errorf("publish to %q: %v, %v", namespace, r, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := c.WaitDelivery(ctx, "17"); !errors.Is(err, client.ErrInvalidField) {
		t.Errorf("WaitDelivery of no name: %v, want ErrInvalidField", err)
	}
}
