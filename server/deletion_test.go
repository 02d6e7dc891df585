package server_test

import (
	"fmt"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// What a deletion answers is what it has done, although others see it at the same moment.
func TestDeletionCountsWhatItCancels(t *testing.T) {
	receiver := servertest.NewReceiver(t, func(servertest.Request) int { return 503 })
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	subscriptions := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	const open = 5
	for i := range 20 {
		sub := s.Subscribe("acme", fmt.Sprint("s", i), receiver.URL, nil)
		for n := range open {
			s.Publish("acme", fmt.Sprintf("e%d-%d", i, n), "order.created", []byte(`{}`))
		}
		gone, err := subscriptions.DeleteSubscription(t.Context(), &grapnelv1.DeleteSubscriptionRequest{Name: sub.GetName()})
		if err != nil || gone.GetCancelledDeliveries() != open {
			t.Errorf("deletion %d cancelled %d of %d, %v", i, gone.GetCancelledDeliveries(), open, err)
		}
	}
	if n := len(s.Deliveries("acme", `state = "CANCELLED"`)); n != 20*open {
		t.Errorf("%d are cancelled, want %d", n, 20*open)
	}
}

// What was accepted after a namespace was taken back is not cancelled by what its deletion left to do.
func TestUndeletedNamespaceKeepsWhatItAccepts(t *testing.T) {
	receiver := servertest.NewReceiver(t, func(servertest.Request) int { return 503 })
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	namespaces := grapnelv1.NewNamespaceServiceClient(s.Conn)
	const subs, turns = 10, 5
	for i := range subs {
		s.Subscribe("acme", fmt.Sprint("s", i), receiver.URL, nil)
	}
	for turn := range turns {
		s.Publish("acme", fmt.Sprint("lost", turn), "order.created", []byte(`{}`))
		if _, err := namespaces.DeleteNamespace(t.Context(), &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/acme", Force: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := namespaces.UndeleteNamespace(t.Context(), &grapnelv1.UndeleteNamespaceRequest{Name: "namespaces/acme"}); err != nil {
			t.Fatal(err)
		}
	}
	s.Publish("acme", "kept", "order.created", []byte(`{}`))
	again := time.After(6 * time.Second) // dispatch looks a second time then
	<-again
	open := 0
	for _, d := range s.Deliveries("acme", "") {
		if d.GetEvent() == "namespaces/acme/events/kept" && d.GetState() != grapnelv1.Delivery_STATE_CANCELLED {
			open++
		}
	}
	if open != subs {
		t.Errorf("%d of %d deliveries are open that were accepted after the deletion was taken back", open, subs)
	}
}
