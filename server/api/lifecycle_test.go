package api_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// TestUndeleteNamespace: a deletion can be taken back; until then what is in the namespace is hidden from lists of all,
// can be read and deleted, and the name says why it is taken.
func TestUndeleteNamespace(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	sub := st.subscribe(t, "acme", "orders", nil)
	st.subscribe(t, "acme", "other", nil)
	const name = "namespaces/acme"
	_, err := st.namespaces.UndeleteNamespace(t.Context(), &grapnelv1.UndeleteNamespaceRequest{Name: name})
	refused(t, err, codes.AlreadyExists, "RESOURCE_EXISTS")
	deleted, err := st.namespaces.DeleteNamespace(t.Context(), &grapnelv1.DeleteNamespaceRequest{Name: name, Force: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.namespaces.CreateNamespace(t.Context(), &grapnelv1.CreateNamespaceRequest{NamespaceId: "acme"})
	if r := refused(t, err, codes.AlreadyExists, "RESOURCE_EXISTS"); !strings.Contains(r.message, "is deleted") || !strings.Contains(r.message, "UndeleteNamespace") {
		t.Errorf("message = %q", r.message)
	}
	all, err := st.subscriptions.ListSubscriptions(t.Context(), &grapnelv1.ListSubscriptionsRequest{Parent: "namespaces/-"})
	if err != nil || len(all.GetSubscriptions()) != 0 {
		t.Errorf("listed: %v %v", all, err)
	}
	secrets, err := st.secrets.ListSecrets(t.Context(), &grapnelv1.ListSecretsRequest{Parent: "namespaces/-"})
	if err != nil || len(secrets.GetSecrets()) != 0 {
		t.Errorf("listed: %v %v", secrets, err)
	}
	if _, err := st.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: sub.GetName()}); err != nil {
		t.Error(err)
	}
	for _, id := range []string{"orders", "other"} {
		if _, err := st.subscriptions.DeleteSubscription(t.Context(), &grapnelv1.DeleteSubscriptionRequest{Name: name + "/subscriptions/" + id}); err != nil {
			t.Error(err)
		}
	}
	if _, err := st.secrets.DeleteSecret(t.Context(), &grapnelv1.DeleteSecretRequest{Name: name + "/secrets/key"}); err != nil {
		t.Error(err)
	}
	_, err = st.namespaces.UndeleteNamespace(t.Context(), &grapnelv1.UndeleteNamespaceRequest{Name: name, Etag: "stale"})
	refused(t, err, codes.Aborted, "ETAG_MISMATCH")
	back, err := st.namespaces.UndeleteNamespace(t.Context(), &grapnelv1.UndeleteNamespaceRequest{Name: name, Etag: deleted.GetNamespace().GetEtag()})
	if err != nil {
		t.Fatal(err)
	}
	n := back.GetNamespace()
	if n.GetState() != grapnelv1.Namespace_STATE_ACTIVE || n.GetPurgeTime() != nil || n.GetDeleteTime() != nil || n.GetStateReason() != "" || n.GetUid() != deleted.GetNamespace().GetUid() {
		t.Errorf("namespace = %v", n)
	}
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "", "x")); err != nil {
		t.Error(err)
	}
	_, err = st.namespaces.UndeleteNamespace(t.Context(), &grapnelv1.UndeleteNamespaceRequest{Name: "namespaces/none"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
}

// TestNamespaceAllowMissing: what is to be there is made, what is to be gone may be gone.
func TestNamespaceAllowMissing(t *testing.T) {
	st := startStation(t)
	update := &grapnelv1.UpdateNamespaceRequest{Namespace: &grapnelv1.Namespace{Name: "namespaces/new", Labels: map[string]string{"a": "b"}}}
	_, err := st.namespaces.UpdateNamespace(t.Context(), update)
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	update.AllowMissing = true
	for range 2 {
		made, err := st.namespaces.UpdateNamespace(t.Context(), update)
		if err != nil || made.GetNamespace().GetLabels()["a"] != "b" {
			t.Fatal(made, err)
		}
	}
	read, err := st.namespaces.GetNamespace(t.Context(), &grapnelv1.GetNamespaceRequest{Name: "namespaces/new"})
	if q := read.GetNamespace().GetEffectiveQuota(); err != nil || q.GetMaxEventBytes() != 262144 || q.GetRetention().AsDuration() != 72*time.Hour || read.GetNamespace().GetQuota() != nil {
		t.Errorf("namespace = %v %v", read, err)
	}
	_, err = st.namespaces.DeleteNamespace(t.Context(), &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/none"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	if _, err := st.namespaces.DeleteNamespace(t.Context(), &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/none", AllowMissing: true}); err != nil {
		t.Error(err)
	}
}

// TestRequestIDDiesWithItsSubscription: a repeated call finds what it made, not what is gone.
func TestRequestIDDiesWithItsSubscription(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for _, id := range []string{"orders", ""} {
		create := func() (*grapnelv1.Subscription, error) {
			t.Helper()
			made, err := st.subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
				Parent: "namespaces/acme", SubscriptionId: id, Subscription: plainSubscription("acme"),
				RequestId: uuid.NewSHA1(uuid.Nil, []byte(id)).String(),
			})
			return made.GetSubscription(), err
		}
		first, err := create()
		if err != nil {
			t.Fatal(err)
		}
		again, err := create()
		if err != nil || again.GetUid() != first.GetUid() {
			t.Errorf("%q: repeated: %v %v", id, again, err)
		}
		if _, err := st.subscriptions.DeleteSubscription(t.Context(), &grapnelv1.DeleteSubscriptionRequest{Name: first.GetName()}); err != nil {
			t.Fatal(err)
		}
		anew, err := create()
		if err != nil || anew.GetUid() == first.GetUid() {
			t.Fatalf("%q: made anew: %v %v", id, anew, err)
		}
		if _, err := st.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: anew.GetName()}); err != nil {
			t.Errorf("%q: %v", id, err)
		}
		if again, err := create(); err != nil || again.GetUid() != anew.GetUid() {
			t.Errorf("%q: repeated: %v %v", id, again, err)
		}
	}
}

// TestFiltersOfFriction: what operators ask for first.
func TestFiltersOfFriction(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	sub := st.subscribe(t, "acme", "orders", func(s *grapnelv1.Subscription) { s.DisplayName = "Orders of the shop" })
	st.subscribe(t, "acme", "none", func(s *grapnelv1.Subscription) {
		s.Signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}
		s.EventTypes = []string{"x"}
	})
	for _, filter := range []string{
		"secret = key", "secret = namespaces/acme/secrets/key", "uid = " + sub.GetUid(), `display_name = "Orders*"`, "state = active AND secret = key", "state = State_Active AND NOT event_type = x",
	} {
		list, err := st.subscriptions.ListSubscriptions(t.Context(), &grapnelv1.ListSubscriptionsRequest{Parent: "namespaces/acme", Filter: filter})
		if err != nil || len(list.GetSubscriptions()) != 1 || list.GetSubscriptions()[0].GetName() != sub.GetName() {
			t.Errorf("%s: %v %v", filter, list, err)
		}
	}
	later := publishText("acme", "later", "x")
	later.Event.DeliverTime = timestamppb.New(time.Now().Add(time.Hour))
	for _, r := range []*grapnelv1.PublishRequest{later, publishText("acme", "now", "x")} {
		if _, err := st.publish.Publish(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	for filter, want := range map[string]string{"scheduled = true": "later", "scheduled = FALSE": "now", "next_attempt_time > " + time.Now().Add(time.Minute).Format(time.RFC3339): "later"} {
		list, err := st.deliveries.ListDeliveries(t.Context(), &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", Filter: filter})
		if err != nil || len(list.GetDeliveries()) != 1 || list.GetDeliveries()[0].GetEvent() != "namespaces/acme/events/"+want {
			t.Errorf("%s: %v %v", filter, list, err)
		}
	}
}

// TestPauseUnderEtag: who pauses what has changed meanwhile is told.
func TestPauseUnderEtag(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	sub := st.subscribe(t, "acme", "orders", nil)
	paused, err := st.subscriptions.PauseSubscription(t.Context(), &grapnelv1.PauseSubscriptionRequest{Name: sub.GetName(), Etag: sub.GetEtag()})
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.subscriptions.PauseSubscription(t.Context(), &grapnelv1.PauseSubscriptionRequest{Name: sub.GetName(), Etag: sub.GetEtag(), Reason: "other"})
	refused(t, err, codes.Aborted, "ETAG_MISMATCH")
	_, err = st.subscriptions.ResumeSubscription(t.Context(), &grapnelv1.ResumeSubscriptionRequest{Name: sub.GetName(), Etag: sub.GetEtag()})
	refused(t, err, codes.Aborted, "ETAG_MISMATCH")
	if _, err = st.subscriptions.ResumeSubscription(t.Context(), &grapnelv1.ResumeSubscriptionRequest{Name: sub.GetName(), Etag: paused.GetSubscription().GetEtag()}); err != nil {
		t.Error(err)
	}
}
