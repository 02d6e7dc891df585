package subscription_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

// The switch for all dispatch is where everybody who opens the same etcd finds it, and is turned by etag.
func TestSwitchIsKept(t *testing.T) {
	o := &told{}
	r, _ := registry(t, etcd.Client, o.take)
	before := r.Snapshot().Dispatch()
	if before.Paused || before.Etag() != "0" {
		t.Errorf("never turned: %+v", before)
	}
	off, err := r.SetDispatch(t.Context(), before.Etag(), true, "new\nnetwork"+strings.Repeat(" x", 200))
	if err != nil || !off.Paused || !strings.HasPrefix(off.Reason, "new network") || len(off.Reason) > 300 || off.Time.IsZero() {
		t.Fatalf("paused: %+v, %v", off, err)
	}
	if now := r.Snapshot().Dispatch(); now.Etag() != off.Etag() || !now.Paused || now.Reason != off.Reason {
		t.Errorf("shown as %+v, want %+v", now, off)
	}
	var etagError *subscription.EtagError
	if _, err := r.SetDispatch(t.Context(), before.Etag(), false, ""); !errors.As(err, &etagError) || etagError.Current != off.Etag() {
		t.Errorf("turned with an old etag: %v", err)
	}
	if again, err := r.SetDispatch(t.Context(), "", true, off.Reason); err != nil || again.Etag() != off.Etag() {
		t.Errorf("turned twice: %+v, %v", again, err)
	}
	other, _ := registry(t, etcd.Client)
	if now := other.Snapshot().Dispatch(); !now.Paused || now.Reason != off.Reason {
		t.Errorf("opened anew: %+v", now)
	}
	if _, err := other.SetDispatch(t.Context(), off.Etag(), false, "done"); err != nil {
		t.Fatal(err)
	}
	o.want(t, "both turns", "gate, opened: false", "gate, opened: true")
	if now := r.Snapshot().Dispatch(); now.Paused || now.Reason != "done" {
		t.Errorf("turned by another: %+v", now)
	}
}

// A namespace has a state of its own, turned by etag and told of; a deletion keeps it for an undeletion.
func TestNamespaceHasAState(t *testing.T) {
	o := &told{}
	r, _ := registry(t, etcd.Client, o.take)
	withNamespace(t, r, 0)
	o.said()
	const acme = "acme"
	etag := r.Snapshot().Namespace(acme).Proto().Etag
	paused, err := r.SetNamespaceState(t.Context(), acme, etag, grapnelv1.Namespace_STATE_PAUSED, "not\npaid")
	if err != nil || paused.Proto().State != grapnelv1.Namespace_STATE_PAUSED || paused.Proto().StateReason != "not paid" || !paused.Closed() {
		t.Fatalf("paused: %v, %v", paused, err)
	}
	o.want(t, "a pause", "gate, opened: false")
	var etagError *subscription.EtagError
	if _, err := r.SetNamespaceState(t.Context(), acme, etag, grapnelv1.Namespace_STATE_ACTIVE, ""); !errors.As(err, &etagError) {
		t.Errorf("resumed with an old etag: %v", err)
	}
	if n, err := r.UpdateNamespace(t.Context(), acme, "", func(n *grapnelv1.Namespace) error {
		n.Labels, n.State = map[string]string{"a": "b"}, grapnelv1.Namespace_STATE_ACTIVE
		return nil
	}); err != nil || n.Proto().State != grapnelv1.Namespace_STATE_PAUSED {
		t.Errorf("updated: %v, %v", n, err)
	}
	deleted, err := r.DeleteNamespace(t.Context(), acme, "", true)
	if err != nil || deleted.Proto().UndeletedState != grapnelv1.Namespace_STATE_PAUSED || deleted.Proto().StateReason != "deleted by a caller" {
		t.Fatalf("deleted: %v, %v", deleted, err)
	}
	if _, err := r.SetNamespaceState(t.Context(), acme, "", grapnelv1.Namespace_STATE_ACTIVE, ""); !errors.Is(err, subscription.ErrNamespaceDeleted) {
		t.Errorf("resumed while deleted: %v", err)
	}
	back, err := r.UndeleteNamespace(t.Context(), acme, "")
	if err != nil || back.Proto().State != grapnelv1.Namespace_STATE_PAUSED || back.Proto().StateReason != "not paid" ||
		back.Proto().UndeletedState != 0 || back.Proto().UndeletedStateReason != "" {
		t.Errorf("undeleted: %v, %v", back, err)
	}
	o.said()
	resumed, err := r.SetNamespaceState(t.Context(), acme, back.Proto().Etag, grapnelv1.Namespace_STATE_ACTIVE, "")
	if err != nil || resumed.Closed() || resumed.Proto().StateReason != "" {
		t.Errorf("resumed: %v, %v", resumed, err)
	}
	o.want(t, "resuming", "gate, opened: true")
	var missing *subscription.NotFoundError
	if _, err := r.SetNamespaceState(t.Context(), "none", "", grapnelv1.Namespace_STATE_PAUSED, ""); !errors.As(err, &missing) {
		t.Errorf("paused what is not there: %v", err)
	}
}

// What is created may begin paused or disabled; a repeated call that asks for another beginning is another call.
func TestCreatedInAState(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	n, err := r.CreateNamespace(t.Context(), "acme", &grapnelv1.Namespace{State: grapnelv1.Namespace_STATE_DISABLED, StateReason: "not yet"})
	if err != nil || !n.Disabled() || n.Proto().StateReason != "not yet" {
		t.Fatalf("namespace: %v, %v", n, err)
	}
	content := valid()
	o := subscription.CreateOptions{RequestID: uuid.NewString(), State: grapnelv1.Subscription_STATE_PAUSED, StateReason: "no\nreceiver"}
	for range 2 {
		s, err := r.CreateSubscription(t.Context(), "acme", "orders", content, o)
		if err != nil || s.State != grapnelv1.Subscription_STATE_PAUSED || s.Proto().StateReason != "no receiver" {
			t.Errorf("subscription: %v, %v", s, err)
		}
	}
	var invalid *subscription.InvalidError
	o.State = 0
	if _, err := r.CreateSubscription(t.Context(), "acme", "orders", content, o); !errors.As(err, &invalid) {
		t.Errorf("the same request for an active one: %v", err)
	}
}
