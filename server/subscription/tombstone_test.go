package subscription_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
	"github.com/grapnel/grapnel/server/subscription"
)

// told keeps what OnChange was told, in words.
type told struct {
	mu    sync.Mutex
	words []string
}

func (o *told) take(changes []subscription.Change) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range changes {
		word := ""
		switch {
		case c.Gate != nil:
			word = fmt.Sprint("gate, opened: ", c.Gate.Opened)
		case c.Old == nil && c.New == nil:
			word = "buried " + c.Tombstone.Name
		case c.Old == nil:
			word = "new " + c.New.ID
		case c.New == nil:
			word = "gone " + c.Old.ID
		case c.Old.UID != c.New.UID:
			word = "another " + c.New.ID
		default:
			word = "changed " + c.New.ID
		}
		if c.Old != nil && c.Tombstone != nil {
			word += ", deleted as " + c.Tombstone.Name
		}
		o.words = append(o.words, word)
	}
}

// said returns what was told since the last call, sorted.
func (o *told) said() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	words := o.words
	o.words = nil
	slices.Sort(words)
	return words
}

func (o *told) want(t *testing.T, what string, want ...string) {
	t.Helper()
	var got []string
	eventually(t, what, func() bool { got = append(got, o.said()...); return len(got) >= len(want) })
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func compact(t *testing.T, c *clientv3.Client) {
	t.Helper()
	head, err := c.Get(t.Context(), "x")
	if err == nil {
		_, err = c.Compact(t.Context(), head.Header.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A deletion is told as one, whether the watch brings it or a listing; what is merely absent is not.
func TestDeletedIsToldFromAbsent(t *testing.T) {
	o := &told{}
	r, stop := registry(t, etcd.Client, o.take)
	withNamespace(t, r, 0)
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		create(t, r, id)
	}
	o.said()
	a := r.Snapshot().Subscription("acme", "a")
	if _, err := r.DeleteSubscription(t.Context(), "acme", "a", "", nil); err != nil {
		t.Fatal(err)
	}
	const subs = "namespaces/acme/subscriptions/"
	o.want(t, "a deletion by the watch", "gone a, deleted as "+subs+"a")
	grave, ok := r.Snapshot().Deleted(subscription.UIDKey(a.UID))
	if acme := r.Snapshot().Namespace("acme"); !ok || grave.UID != a.UID || grave.Name != subs+"a" || grave.OfNamespace ||
		grave.NamespaceUID != acme.UID || grave.Time.IsZero() || grave.Revision == 0 {
		t.Errorf("tombstone %+v, %v", grave, ok)
	}
	if _, err := etcd.Client.Delete(t.Context(), prefix(t)+subs+"b"); err != nil {
		t.Fatal(err)
	}
	o.want(t, "an absence by the watch", "gone b")

	stop()
	other, _ := registry(t, etcd.Client)
	for _, id := range []string{"c", "d"} {
		if _, err := other.DeleteSubscription(t.Context(), "acme", id, "", nil); err != nil {
			t.Fatal(err)
		}
	}
	create(t, other, "d")
	if _, err := etcd.Client.Delete(t.Context(), prefix(t)+subs+"e"); err != nil {
		t.Fatal(err)
	}
	compact(t, etcd.Client)
	run(t, r)
	o.want(t, "a listing", "another d, deleted as "+subs+"d", "gone c, deleted as "+subs+"c", "gone e")
}

// What was in a namespace that is erased counts as deleted, and so does the namespace.
func TestErasedNamespaceIsDeleted(t *testing.T) {
	o := &told{}
	r, _ := registry(t, etcd.Client, o.take)
	withNamespace(t, r, 0)
	create(t, r, "orders")
	acme := r.Snapshot().Namespace("acme")
	if _, err := r.DeleteNamespace(t.Context(), "acme", "", true); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Snapshot().Deleted(subscription.UIDKey(acme.UID)); ok {
		t.Error("a tombstone before it is erased")
	}
	o.said()
	if err := r.PurgeNamespace(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	o.want(t, "erasure", "buried namespaces/acme", "gone orders, deleted as namespaces/acme")
	grave, ok := r.Snapshot().Deleted(subscription.UIDKey(acme.UID))
	if !ok || !grave.OfNamespace || grave.UID != acme.UID || grave.NamespaceUID != acme.UID {
		t.Errorf("tombstone %+v, %v", grave, ok)
	}
	withNamespace(t, r, 0)
	if again := r.Snapshot().Namespace("acme"); again.UID == acme.UID || r.Snapshot().NamespaceByKey(subscription.UIDKey(acme.UID)) != nil {
		t.Error("a name that is used again has the old uid")
	}
}

func TestForget(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	other, _ := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	var uids [][16]byte
	for range 130 {
		uids = append(uids, create(t, r, "again").UID)
		if _, err := r.DeleteSubscription(t.Context(), "acme", "again", "", nil); err != nil {
			t.Fatal(err)
		}
	}
	graves := func(r *subscription.Registry) int { return len(slices.Collect(r.Snapshot().Tombstones())) }
	if n := graves(r); n != len(uids) {
		t.Fatalf("%d tombstones", n)
	}
	for range 2 { // the second finds none
		if err := r.Forget(t.Context(), append(uids, [16]byte{1})...); err != nil {
			t.Fatal(err)
		}
	}
	if graves(r) != 0 || len(keys(t, "tombstones/")) != 0 {
		t.Errorf("%d tombstones are left", graves(r))
	}
	eventually(t, "other servers forget them too", func() bool { return graves(other) == 0 })
}

func TestLookupByKey(t *testing.T) {
	r, stop := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	made := create(t, r, "orders")
	check := func(snap *subscription.Snapshot) {
		t.Helper()
		acme := snap.Namespace("acme")
		if parsed, err := uuid.Parse(acme.Proto().Uid); err != nil || parsed != acme.UID || parsed.Version() != 4 {
			t.Errorf("namespace uid %q, %v", acme.Proto().Uid, err)
		}
		if got := snap.NamespaceByKey(subscription.UIDKey(acme.UID)); got != acme {
			t.Errorf("namespace %v", got)
		}
		if got := snap.SubscriptionByKey(subscription.UIDKey(made.UID)); got == nil || got.UID != made.UID || got != snap.Subscription("acme", "orders") {
			t.Errorf("subscription %v", got)
		}
		if snap.SubscriptionByKey(1) != nil || snap.NamespaceByKey(1) != nil || snap.NamespaceByKey(0) != nil {
			t.Error("something was found under no one's key")
		}
	}
	check(r.Snapshot())
	uid := r.Snapshot().Namespace("acme").Proto().Uid
	if _, err := r.UpdateNamespace(t.Context(), "acme", "", func(n *grapnelv1.Namespace) error {
		n.Uid, n.Labels = "x", map[string]string{"a": "b"}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.SetState(t.Context(), "acme", "orders", made.UID, grapnelv1.Subscription_STATE_PAUSED, ""); err != nil {
		t.Fatal(err)
	}
	check(r.Snapshot())
	if r.Snapshot().Namespace("acme").Proto().Uid != uid {
		t.Error("an update changed the uid")
	}
	if _, err := r.DeleteNamespace(t.Context(), "acme", "", true); err != nil {
		t.Fatal(err)
	}
	check(r.Snapshot()) // its namespace is deleted, and it is still found
	stop()
	again, err := subscription.Open(t.Context(), subscription.Options{Client: etcd.Client, Prefix: prefix(t)})
	if err != nil {
		t.Fatal(err)
	}
	check(again.Snapshot())
	snap, key := again.Snapshot(), subscription.UIDKey(made.UID)
	if n := testing.AllocsPerRun(100, func() { snap.SubscriptionByKey(key); snap.NamespaceByKey(key); snap.Deleted(key) }); n != 0 {
		t.Errorf("a look-up allocates %v times", n)
	}
}

// An etcd that comes back empty, as with a volume that was not mounted, deletes nothing.
func TestEmptyEtcdDeletesNothing(t *testing.T) {
	own, err := keyspacetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	o := &told{}
	open := func(identity string) (*subscription.Registry, error) {
		return subscription.Open(t.Context(), subscription.Options{Client: own.Client, Prefix: prefix(t), Identity: identity})
	}
	r, err := open("one")
	if err != nil {
		t.Fatal(err)
	}
	r.OnChange(o.take)
	run(t, r)
	withNamespace(t, r, 0)
	create(t, r, "orders")
	o.said()
	own.Stop()
	if err := own.Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := own.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is noticed", func() bool { return r.Stranger() != nil })
	if r.Healthy() || r.Snapshot().Subscription("acme", "orders") == nil || len(o.said()) != 0 {
		t.Error("what was known is gone")
	}
	if _, err := r.CreateNamespace(t.Context(), "more", nil); !errors.Is(err, subscription.ErrUnavailable) {
		t.Errorf("wrote to a stranger: %v", err)
	}
	if got := ids(r.Snapshot().Match("acme", &subscription.Candidate{Type: "order.a"})); !cmp.Equal(got, []string{"orders"}) {
		t.Errorf("matched %v", got)
	}
	if _, err := open("two"); err != nil {
		t.Fatalf("an empty etcd is not taken: %v", err)
	}
	var stranger *subscription.StrangerError
	if _, err := open("one"); !errors.As(err, &stranger) || stranger.Found != "two" {
		t.Errorf("got %v", err)
	}
}
