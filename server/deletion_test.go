package server_test

import (
	"context"
	"fmt"
	"testing"

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
	s.Publish("acme", "kept", "order.created", []byte(`{"kept":true}`))
	// That dispatch's second look, seconds later, leaves them alone as well is tested where time can be turned
	// (TestWhatIsAcceptedAfterADeletionWasTakenBackIsKept).
	servertest.Await(t, "a first attempt of each", func() bool {
		tried := 0
		for _, r := range receiver.Requests() {
			if string(r.Body) == `{"kept":true}` {
				tried++
			}
		}
		return tried >= subs
	})
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

// A deleted namespace has what is open in it cancelled, however many subscriptions there are and although the caller
// leaves, and each says what was deleted.
func TestDeletedNamespaceIsWorkedOffWithoutItsCaller(t *testing.T) {
	receiver := servertest.NewReceiver(t, func(servertest.Request) int { return 503 })
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	namespaces := grapnelv1.NewNamespaceServiceClient(s.Conn)
	const subs = 150 // more than one call cancels itself
	for i := range subs {
		s.Subscribe("acme", fmt.Sprint("s", i), receiver.URL, nil)
	}
	for turn := range 2 {
		s.Publish("acme", fmt.Sprint("e", turn), "order.created", []byte(`{}`))
		ctx, leave := context.WithCancel(t.Context())
		deleted := make(chan error, 1)
		go func() {
			_, err := namespaces.DeleteNamespace(ctx, &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/acme", Force: true})
			deleted <- err
		}()
		servertest.Await(t, "the deletion", func() bool {
			n, err := namespaces.GetNamespace(t.Context(), &grapnelv1.GetNamespaceRequest{Name: "namespaces/acme"})
			return err == nil && n.GetNamespace().GetState() == grapnelv1.Namespace_STATE_DELETED
		})
		if turn == 0 {
			leave()
		}
		<-deleted
		servertest.Await(t, "all to be cancelled", func() bool { return len(s.Deliveries("acme", "state = CANCELLED")) == (turn+1)*subs })
		leave()
		if _, err := namespaces.UndeleteNamespace(t.Context(), &grapnelv1.UndeleteNamespaceRequest{Name: "namespaces/acme"}); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range s.Deliveries("acme", "") {
		if d.GetStateReason() != "namespace deleted" {
			t.Fatalf("cancelled because %q", d.GetStateReason())
		}
	}
}
