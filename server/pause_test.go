package server_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// What a namespace that is paused accepts waits; what one that is disabled accepts is skipped; others go on.
func TestPausedAndDisabledNamespace(t *testing.T) {
	receiver := servertest.NewReceiver(t, nil)
	s := servertest.Start(t, servertest.Options{})
	namespaces := grapnelv1.NewNamespaceServiceClient(s.Conn)
	for _, ns := range []string{"acme", "other"} {
		s.Namespace(ns)
		s.Subscribe(ns, "orders", receiver.URL+"/"+ns, nil)
	}
	const name = "namespaces/acme"
	paused, err := namespaces.PauseNamespace(t.Context(), &grapnelv1.PauseNamespaceRequest{Name: name, Reason: "not paid"})
	if n := paused.GetNamespace(); err != nil || n.GetState() != grapnelv1.Namespace_STATE_PAUSED || n.GetStateReason() != "not paid" {
		t.Fatalf("paused: %v, %v", paused, err)
	}
	s.Publish("acme", "waits", "order.created", []byte(`{}`))
	s.Publish("other", "goes", "order.created", []byte(`{}`))
	servertest.Await(t, "the other namespace's delivery", func() bool { return len(s.Deliveries("other", "state = SUCCEEDED")) == 1 })
	waiting := s.Deliveries("acme", "state = PENDING")
	if len(waiting) != 1 {
		t.Fatalf("of the paused namespace: %v", s.Deliveries("acme", ""))
	}
	got, err := grapnelv1.NewDeliveryServiceClient(s.Conn).GetDelivery(t.Context(), &grapnelv1.GetDeliveryRequest{Name: waiting[0].GetName()})
	if err != nil || got.GetDelivery().GetStateReason() != "its namespace is paused" {
		t.Errorf("it waits because %q, %v", got.GetDelivery().GetStateReason(), err)
	}
	if _, err := namespaces.DisableNamespace(t.Context(), &grapnelv1.DisableNamespaceRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	s.Publish("acme", "skipped", "order.created", []byte(`{}`))
	if skipped := s.Deliveries("acme", "state = SKIPPED"); len(skipped) != 1 || len(s.Deliveries("acme", "state = PENDING")) != 1 {
		t.Errorf("of the disabled namespace: %v", s.Deliveries("acme", ""))
	}
	if _, err := namespaces.ResumeNamespace(t.Context(), &grapnelv1.ResumeNamespaceRequest{Name: name, Etag: paused.GetNamespace().GetEtag()}); status.Code(err) != codes.Aborted {
		t.Errorf("resumed with an old etag: %v", err)
	}
	if _, err := namespaces.ResumeNamespace(t.Context(), &grapnelv1.ResumeNamespaceRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "what waited", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 1 })
	if len(s.Deliveries("acme", "state = SKIPPED")) != 1 {
		t.Error("what was skipped has been sent")
	}
}

// The switch stops everything, says so where one looks, survives a restart, and lets go of everything.
func TestPausedDispatch(t *testing.T) {
	receiver := servertest.NewReceiver(t, nil)
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	sub := s.Subscribe("acme", "orders", receiver.URL, nil)
	admin := grapnelv1.NewAdminServiceClient(s.Conn)
	if _, err := admin.PauseDispatch(t.Context(), &grapnelv1.PauseDispatchRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("paused without a reason: %v", err)
	}
	off, err := admin.PauseDispatch(t.Context(), &grapnelv1.PauseDispatchRequest{Reason: "new network"})
	if err != nil {
		t.Fatal(err)
	}
	s.Publish("acme", "one", "order.created", []byte(`{}`))
	if _, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).TestSubscription(t.Context(), &grapnelv1.TestSubscriptionRequest{Name: sub.GetName()}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a test of a subscription: %v", err)
	}
	s.Stop()

	s = servertest.Start(t, servertest.Options{Dir: s.Dir})
	admin = grapnelv1.NewAdminServiceClient(s.Conn)
	s.Publish("acme", "two", "order.created", []byte(`{}`))
	cluster, err := admin.GetCluster(t.Context(), &grapnelv1.GetClusterRequest{})
	if err != nil || !cluster.GetDispatchPaused() || cluster.GetPauseReason() != "new network" ||
		cluster.GetDispatchEtag() != off.GetEtag() || cluster.GetDispatchChangeTime() == nil {
		t.Errorf("after a restart: %v, %v", cluster, err)
	}
	got, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: sub.GetName()})
	if st := got.GetStatus(); err != nil || st.GetOpen() || st.GetWaitReason() != "all dispatch is paused" || st.GetOpenDeliveries() != 2 {
		t.Errorf("status %v, %v", st, err)
	}
	if !strings.Contains(metrics(t, s), "grapnel_dispatch_paused 1") {
		t.Error("the metric does not say so")
	}
	if _, err := admin.ResumeDispatch(t.Context(), &grapnelv1.ResumeDispatchRequest{Etag: "0"}); status.Code(err) != codes.Aborted {
		t.Errorf("resumed with an old etag: %v", err)
	}
	if len(receiver.Requests()) != 0 {
		t.Errorf("%d requests while dispatch was paused", len(receiver.Requests()))
	}
	if _, err := admin.ResumeDispatch(t.Context(), &grapnelv1.ResumeDispatchRequest{Etag: off.GetEtag(), Reason: "done"}); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "both deliveries", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 2 })
}

// A subscription can begin paused or disabled, and be disabled by hand.
func TestSubscriptionBegunClosed(t *testing.T) {
	receiver := servertest.NewReceiver(t, nil)
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	subscriptions := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	create := func(id string, state grapnelv1.Subscription_State) (*grapnelv1.Subscription, error) {
		r, err := subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/acme", SubscriptionId: id, InitialState: state, StateReason: "no receiver yet",
			Subscription: &grapnelv1.Subscription{Uri: receiver.URL + "/" + id, Signers: []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}},
		})
		return r.GetSubscription(), err
	}
	if _, err := create("odd", 9); status.Code(err) != codes.InvalidArgument {
		t.Errorf("begun in state 9: %v", err)
	}
	for id, state := range map[string]grapnelv1.Subscription_State{
		"active": 0, "paused": grapnelv1.Subscription_STATE_PAUSED, "disabled": grapnelv1.Subscription_STATE_DISABLED,
	} {
		sub, err := create(id, state)
		if err != nil || sub.GetState() != max(state, grapnelv1.Subscription_STATE_ACTIVE) || sub.GetStateReason() != "no receiver yet" {
			t.Fatalf("%s: %v, %v", id, sub, err)
		}
	}
	s.Publish("acme", "one", "order.created", []byte(`{}`))
	servertest.Await(t, "the active one's delivery", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 1 })
	if len(s.Deliveries("acme", "state = PENDING")) != 1 || len(s.Deliveries("acme", "state = SKIPPED")) != 1 {
		t.Errorf("deliveries %v", s.Deliveries("acme", ""))
	}
	by, err := subscriptions.DisableSubscription(t.Context(), &grapnelv1.DisableSubscriptionRequest{Name: "namespaces/acme/subscriptions/active", Reason: "by hand"})
	if sub := by.GetSubscription(); err != nil || sub.GetState() != grapnelv1.Subscription_STATE_DISABLED || sub.GetStateReason() != "by hand" {
		t.Errorf("disabled: %v, %v", by, err)
	}
	for _, id := range []string{"paused", "disabled"} {
		resumed, err := subscriptions.ResumeSubscription(t.Context(), &grapnelv1.ResumeSubscriptionRequest{Name: "namespaces/acme/subscriptions/" + id, Reason: "it is there"})
		if sub := resumed.GetSubscription(); err != nil || sub.GetState() != grapnelv1.Subscription_STATE_ACTIVE || sub.GetStateReason() != "it is there" {
			t.Errorf("resumed: %v, %v", resumed, err)
		}
	}
	servertest.Await(t, "what waited", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 2 })
}
