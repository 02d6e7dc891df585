package api_test

import (
	"strings"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

// Events of a key go to an ordered subscription one after another; those that wait say for what, and the next one tells of
// the gap that a failed one leaves.
func TestOrderedDeliveries(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", func(s *grapnelv1.Subscription) { s.Ordered = true })
	stored, err := st.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: "namespaces/acme/subscriptions/orders"})
	if err != nil || stored.GetSubscription().GetOnExhausted() != grapnelv1.Subscription_ON_EXHAUSTED_SKIP {
		t.Errorf("stored with %v, %v", stored.GetSubscription().GetOnExhausted(), err)
	}
	for _, id := range []string{"1", "2", "3"} {
		r := publishText("acme", id, id)
		r.Event.OrderingKey = "order 7"
		if _, err := st.publish.Publish(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	event, err := st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: "namespaces/acme/events/2"})
	if err != nil || event.GetEvent().GetOrderingKey() != "order 7" {
		t.Errorf("event %v, %v", event, err)
	}
	one := func(id string) *grapnelv1.Delivery {
		page, err := st.deliveries.ListDeliveries(t.Context(), &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", Filter: "event = " + id})
		if err != nil || len(page.GetDeliveries()) != 1 {
			t.Fatalf("deliveries of %s: %v, %v", id, page, err)
		}
		return page.GetDeliveries()[0]
	}
	job := st.takeJobs(t, 1)[0]
	d := one("3")
	if d.GetState() != grapnelv1.Delivery_STATE_PENDING || !strings.HasSuffix(d.GetStateReason(), "it is the turn of delivery "+job.ID.String()) {
		t.Errorf("the third: %v", d)
	}
	st.journal.Settle(&job, delivery.Step{State: delivery.Exhausted, Reason: "enough"},
		&delivery.Attempt{Number: 1, Start: time.Now(), Outcome: delivery.OutcomeRetryable}, nil)
	if err := st.journal.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := one("2"); d.GetOrderingGap() != 1 || d.GetState() != grapnelv1.Delivery_STATE_PENDING || d.GetStateReason() != "" {
		t.Errorf("the second: %v", d)
	}
	if d := one("1"); d.GetStateReason() != "enough; its ordering key goes on without it" {
		t.Errorf("the first: %v", d)
	}
}
