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

// TestEventIDsOfAllKindsAreNames: whatever a publisher's ID looks like, it is found under its name.
func TestEventIDsOfAllKindsAreNames(t *testing.T) {
	c, stop := start(t, &fake{})
	defer stop()
	for id, want := range map[string]string{
		"o-1001.created_~":                          "o-1001.created_~",
		"partition:1/offset:24":                     "partition%3A1%2Foffset%3A24",
		"100%":                                      "100%25",
		"café":                                      "caf%C3%A9",
		"namespaces/other/events/x":                 "namespaces%2Fother%2Fevents%2Fx",
		"namespaces/acme/events/partition%3A1":      "partition%3A1",
		"evt_06h2icnakk00000d0k81p64g":              "evt_06h2icnakk00000d0k81p64g",
		"namespaces/acme/events/o-1001-created":     "o-1001-created",
		"https://shop.example.com/orders/1?x=1&y=2": "https%3A%2F%2Fshop.example.com%2Forders%2F1%3Fx%3D1%26y%3D2",
	} {
		e, err := c.GetEvent(t.Context(), "acme", id)
		if err != nil || e.GetName() != "namespaces/acme/events/"+want {
			t.Errorf("GetEvent(%q) asks for %q, %v; want %q", id, e.GetName(), err, want)
		}
	}
}
