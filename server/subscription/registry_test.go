package subscription_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
	"github.com/grapnel/grapnel/server/subscription"
)

var etcd *keyspacetest.Etcd

func TestMain(m *testing.M) {
	var err error
	if etcd, err = keyspacetest.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	etcd.Close()
	os.Exit(code)
}

func prefix(t *testing.T) string { return "/" + t.Name() + "/" }

// registry opens one under the test's own prefix and runs it until stop or the end of the test.
func registry(t *testing.T, c *clientv3.Client, onChange ...func([]subscription.Change)) (r *subscription.Registry, stop func()) {
	t.Helper()
	erase(t)
	r, err := subscription.Open(t.Context(), subscription.Options{Client: c, Prefix: prefix(t)})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range onChange {
		r.OnChange(f)
	}
	return r, run(t, r)
}

// erase removes what the test stored when it ends, so that it can be run again.
func erase(t *testing.T) {
	t.Cleanup(func() {
		if _, err := etcd.Client.Delete(context.Background(), prefix(t), clientv3.WithPrefix()); err != nil {
			t.Error(err)
		}
	})
}

func run(t *testing.T, r *subscription.Registry) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := r.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

func withNamespace(t *testing.T, r *subscription.Registry, quota int32) {
	t.Helper()
	if _, err := r.CreateNamespace(t.Context(), "acme", &grapnelv1.Namespace{Quota: &grapnelv1.Quota{MaxSubscriptions: quota}}); err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, r *subscription.Registry, id string) *subscription.Subscription {
	t.Helper()
	s, err := r.CreateSubscription(t.Context(), "acme", id, valid(), subscription.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func storeSecret(t *testing.T, id string) string {
	t.Helper()
	name := "namespaces/acme/secrets/" + id
	if _, err := etcd.Client.Put(t.Context(), prefix(t)+"secrets/"+name, string(keyspace.AddSum("secrets/"+name, []byte("sealed")))); err != nil {
		t.Fatal(err)
	}
	return name
}

// keys lists what is stored below a prefix of the test.
func keys(t *testing.T, below string) []string {
	t.Helper()
	resp, err := etcd.Client.Get(t.Context(), prefix(t)+below, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, kv := range resp.Kvs {
		out = append(out, strings.TrimPrefix(string(kv.Key), prefix(t)))
	}
	return out
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func TestSubscriptionLifecycle(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	r, _ := registry(t, etcd.Client, func(changes []subscription.Change) {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range changes {
			switch {
			case c.Old == nil:
				seen = append(seen, "new "+c.New.ID)
			case c.New == nil:
				seen = append(seen, "gone "+c.Old.ID)
			default:
				seen = append(seen, "changed "+c.New.ID+" "+c.New.Proto().State.String())
			}
		}
	})
	withNamespace(t, r, 0)

	made := create(t, r, "orders")
	if got := r.Snapshot().Subscription("acme", "orders"); got == nil || got.Revision != made.Revision || !proto.Equal(got.Proto(), made.Proto()) {
		t.Fatalf("the snapshot holds %v, created was %v", got, made)
	}
	if made.Proto().Etag == "" || made.Proto().CreateTime == nil || made.Proto().State != grapnelv1.Subscription_STATE_ACTIVE {
		t.Errorf("created %v", made.Proto())
	}
	if _, err := r.CreateSubscription(t.Context(), "acme", "orders", valid(), subscription.CreateOptions{}); !errors.Is(err, subscription.ErrExists) {
		t.Errorf("created twice: %v", err)
	}

	updated, err := r.UpdateSubscription(t.Context(), "acme", "orders", made.Proto().Etag, func(p *grapnelv1.Subscription) error {
		p.MaxInFlight, p.Signers = 4, nil
		p.Uid, p.State, p.Name = "x", grapnelv1.Subscription_STATE_DISABLED, "y"
		return nil
	}, subscription.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if updated.MaxInFlight != 4 || updated.UID != made.UID || updated.Proto().State != grapnelv1.Subscription_STATE_ACTIVE ||
		updated.Proto().Name != ordersName || updated.Proto().Signers[0].GetPlugin() != "plugins/standard-webhooks" || updated.Proto().Etag == made.Proto().Etag {
		t.Errorf("updated to %v", updated.Proto())
	}
	var etagErr *subscription.EtagError
	_, err = r.UpdateSubscription(t.Context(), "acme", "orders", made.Proto().Etag, func(*grapnelv1.Subscription) error { return nil }, subscription.UpdateOptions{})
	if !errors.As(err, &etagErr) || etagErr.Current != updated.Proto().Etag {
		t.Errorf("old etag: %v", err)
	}
	same, err := r.UpdateSubscription(t.Context(), "acme", "orders", "", func(*grapnelv1.Subscription) error { return nil }, subscription.UpdateOptions{})
	if err != nil || same.Proto().Etag != updated.Proto().Etag {
		t.Errorf("an update without change gave %v, %v", same, err)
	}

	paused, err := r.SetState(t.Context(), "acme", "orders", made.UID, grapnelv1.Subscription_STATE_PAUSED, "receiver\nmigration")
	if err != nil || paused.Proto().State != grapnelv1.Subscription_STATE_PAUSED || paused.Proto().StateReason != "receiver migration" {
		t.Errorf("paused: %v, %v", paused, err)
	}
	if _, err := r.SetState(t.Context(), "acme", "orders", [16]byte{1}, grapnelv1.Subscription_STATE_DISABLED, "gone"); !errors.Is(err, subscription.ErrNotFound) {
		t.Errorf("another uid: %v", err)
	}
	resumed, err := r.SetState(t.Context(), "acme", "orders", [16]byte{}, grapnelv1.Subscription_STATE_ACTIVE, "moved")
	if err != nil || resumed.Proto().State != grapnelv1.Subscription_STATE_ACTIVE || resumed.Proto().StateReason != "moved" {
		t.Errorf("resumed: %v, %v", resumed, err)
	}

	if _, err := r.DeleteSubscription(t.Context(), "acme", "orders", made.Proto().Etag, nil); !errors.As(err, &etagErr) {
		t.Errorf("deleted with an old etag: %v", err)
	}
	if _, err := r.DeleteSubscription(t.Context(), "acme", "orders", resumed.Proto().Etag, nil); err != nil {
		t.Fatal(err)
	}
	if r.Snapshot().Subscription("acme", "orders") != nil {
		t.Error("still there")
	}
	var missing *subscription.NotFoundError
	if _, err := r.DeleteSubscription(t.Context(), "acme", "orders", "", nil); !errors.As(err, &missing) || missing.Name != ordersName {
		t.Errorf("deleted twice: %v", err)
	}
	if again := create(t, r, "orders"); again.UID == made.UID {
		t.Error("a new subscription has the uid of the old one")
	}
	want := []string{"new orders", "changed orders STATE_ACTIVE", "changed orders STATE_PAUSED", "changed orders STATE_ACTIVE", "gone orders", "new orders"}
	mu.Lock()
	defer mu.Unlock()
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("changes told (-want +got):\n%s", diff)
	}
}

func TestBadIDsNeverReachEtcd(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	for _, id := range []string{"../x", "a/b", "A", "1a", "a\x00", strings.Repeat("a", 64), "ä", "a b"} {
		var invalid *subscription.InvalidError
		if _, err := r.CreateSubscription(t.Context(), "acme", id, valid(), subscription.CreateOptions{}); !errors.As(err, &invalid) {
			t.Errorf("created %q: %v", id, err)
		}
		if _, err := r.CreateNamespace(t.Context(), id, nil); !errors.As(err, &invalid) {
			t.Errorf("created namespace %q: %v", id, err)
		}
		if _, err := r.DeleteSubscription(t.Context(), id, "x", "", nil); !errors.As(err, &invalid) {
			t.Errorf("deleted in %q: %v", id, err)
		}
		if err := r.PurgeNamespace(t.Context(), id); !errors.As(err, &invalid) {
			t.Errorf("purged %q: %v", id, err)
		}
	}
	if diff := cmp.Diff([]string{"namespaces/acme"}, keys(t, "")); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
}

func TestValidateOnlyStoresNothing(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	s, err := r.CreateSubscription(t.Context(), "acme", "", valid(), subscription.CreateOptions{ValidateOnly: true})
	if err != nil || s.Proto().Etag != "" || s.MaxAttempts != 10 {
		t.Errorf("%v, %v", s, err)
	}
	create(t, r, "orders")
	s, err = r.UpdateSubscription(t.Context(), "acme", "orders", "", func(p *grapnelv1.Subscription) error {
		p.MaxInFlight = 3
		return nil
	}, subscription.UpdateOptions{ValidateOnly: true})
	if err != nil || s.MaxInFlight != 3 {
		t.Errorf("%v, %v", s, err)
	}
	_, err = r.UpdateSubscription(t.Context(), "acme", "orders", "", func(p *grapnelv1.Subscription) error {
		p.Uri = "x"
		return nil
	}, subscription.UpdateOptions{ValidateOnly: true})
	var invalid *subscription.InvalidError
	if !errors.As(err, &invalid) {
		t.Errorf("got %v", err)
	}
	if got := r.Snapshot().Subscription("acme", "orders").MaxInFlight; got != 16 || len(keys(t, "namespaces/acme/")) != 1 {
		t.Errorf("something was stored: %d, %v", got, keys(t, ""))
	}
}

func TestUpdateAllowMissing(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	fill := func(p *grapnelv1.Subscription) error { proto.Merge(p, valid()); return nil }
	if _, err := r.UpdateSubscription(t.Context(), "acme", "orders", "", fill, subscription.UpdateOptions{}); !errors.Is(err, subscription.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	s, err := r.UpdateSubscription(t.Context(), "acme", "orders", "", fill, subscription.UpdateOptions{AllowMissing: true})
	if err != nil || s.Proto().Uid == "" || s.Proto().CreateTime == nil {
		t.Errorf("%v, %v", s, err)
	}
}

func TestParallelUpdatesAllLand(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	create(t, r, "orders")
	const writers, rounds = 6, 5
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range rounds {
				_, err := r.UpdateSubscription(t.Context(), "acme", "orders", "", func(p *grapnelv1.Subscription) error {
					if p.Labels == nil {
						p.Labels = make(map[string]string)
					}
					p.Labels[fmt.Sprintf("w%d-%d", w, i)] = "x"
					return nil
				}, subscription.UpdateOptions{})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := len(r.Snapshot().Subscription("acme", "orders").Proto().Labels); got != writers*rounds {
		t.Errorf("%d of %d updates landed", got, writers*rounds)
	}
}

func TestRequestIDMakesCreateIdempotent(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	o := subscription.CreateOptions{RequestID: uuid.NewString()}
	var wg sync.WaitGroup
	got := make([]*subscription.Subscription, 4)
	for i := range got {
		wg.Go(func() {
			var err error
			if got[i], err = r.CreateSubscription(t.Context(), "acme", "", valid(), o); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, s := range got {
		if s == nil || s.UID != got[0].UID || s.ID != got[0].ID || s.Proto().Etag != got[0].Proto().Etag {
			t.Fatalf("calls gave different subscriptions: %v and %v", s, got[0])
		}
	}
	if n := len(keys(t, "namespaces/acme/subscriptions/")); n != 1 {
		t.Errorf("%d were made", n)
	}
	other := valid()
	other.MaxInFlight = 9
	var invalid *subscription.InvalidError
	if _, err := r.CreateSubscription(t.Context(), "acme", "", other, o); !errors.As(err, &invalid) || invalid.Violations[0].Field != "request_id" {
		t.Errorf("other content: %v", err)
	}
	if _, err := r.DeleteSubscription(t.Context(), "acme", got[0].ID, "", nil); err != nil {
		t.Fatal(err)
	}
	if s, err := r.CreateSubscription(t.Context(), "acme", "", valid(), o); err != nil || s.UID == got[0].UID {
		t.Errorf("after the deletion: %v, %v", s, err)
	}
	resp, err := etcd.Client.Get(t.Context(), prefix(t)+"requests/", clientv3.WithPrefix())
	if err != nil || len(resp.Kvs) != 1 || resp.Kvs[0].Lease == 0 {
		t.Fatalf("request record: %v, %v", resp, err)
	}
	ttl, err := etcd.Client.TimeToLive(t.Context(), clientv3.LeaseID(resp.Kvs[0].Lease))
	if err != nil || ttl.GrantedTTL < 24*3600 {
		t.Errorf("lease: %v, %v", ttl, err)
	}
	if _, err := r.CreateSubscription(t.Context(), "acme", "", valid(), subscription.CreateOptions{RequestID: "x/../y"}); !errors.As(err, &invalid) {
		t.Errorf("bad request id: %v", err)
	}
}

func TestQuotaIsNeverExceeded(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	r2, _ := registry(t, etcd.Client) // another server
	withNamespace(t, r, 5)
	var wg sync.WaitGroup
	var mu sync.Mutex
	refused := 0
	for i := range 16 {
		wg.Go(func() {
			reg := r
			if i%2 == 0 {
				reg = r2
			}
			_, err := reg.CreateSubscription(t.Context(), "acme", fmt.Sprint("s", i), valid(), subscription.CreateOptions{})
			var quota *subscription.QuotaError
			if err != nil && !(errors.As(err, &quota) && quota.Limit == 5 && quota.Quota == "max_subscriptions") {
				t.Error(err)
			}
			if err != nil {
				mu.Lock()
				refused++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if n := len(keys(t, "namespaces/acme/subscriptions/")); n != 5 || refused != 11 {
		t.Errorf("%d were made and %d refused, want 5 and 11", n, refused)
	}
	if _, err := r.UpdateNamespace(t.Context(), "acme", "", func(n *grapnelv1.Namespace) error {
		n.Quota.MaxSubscriptions = 6
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	create(t, r, "one-more")
}

// Far from the quota creates run side by side, near it one after the other: it is met exactly, whoever makes
// them, also when it is set where there was none.
func TestQuotaIsReachedExactly(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	r2, _ := registry(t, etcd.Client) // another server
	withNamespace(t, r, 0)
	for i := range 20 {
		create(t, r2, fmt.Sprint("free", i))
	}
	const quota = 280
	if _, err := r.UpdateNamespace(t.Context(), "acme", "", func(n *grapnelv1.Namespace) error {
		n.Quota = &grapnelv1.Quota{MaxSubscriptions: quota}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var next, refused atomic.Int64
	for _, reg := range []*subscription.Registry{r, r2} {
		for range 6 {
			wg.Go(func() {
				for i := next.Add(1); i <= 290; i = next.Add(1) {
					_, err := reg.CreateSubscription(t.Context(), "acme", fmt.Sprint("s", i), valid(), subscription.CreateOptions{})
					if _, ok := errors.AsType[*subscription.QuotaError](err); ok {
						refused.Add(1)
					} else if err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	wg.Wait()
	if n := len(keys(t, "namespaces/acme/subscriptions/")); n != quota || refused.Load() != 290+20-quota || r.Snapshot().Count("acme") > quota {
		t.Errorf("%d were made and %d refused, want %d", n, refused.Load(), quota)
	}
	if _, err := r.DeleteSubscription(t.Context(), "acme", "free0", "", nil); err != nil {
		t.Fatal(err)
	}
	create(t, r, "in-its-place")
}

func TestSecretReferences(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	p := valid()
	p.Signers = []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/k1"}}}
	var missing *subscription.NotFoundError
	if _, err := r.CreateSubscription(t.Context(), "acme", "orders", p, subscription.CreateOptions{}); !errors.As(err, &missing) ||
		missing.Name != "namespaces/acme/secrets/k1" || missing.Field != `subscription.signers[0].secrets["key"]` {
		t.Errorf("absent secret: %v", err)
	}
	storeSecret(t, "k1")
	storeSecret(t, "k2")
	if _, err := r.CreateSubscription(t.Context(), "acme", "orders", p, subscription.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	ref := func(secret string) string { return "refs/namespaces/acme/secrets/" + secret + "/" + ordersName }
	if diff := cmp.Diff([]string{ref("k1")}, keys(t, "refs/")); diff != "" {
		t.Errorf("after create (-want +got):\n%s", diff)
	}
	_, err := r.UpdateSubscription(t.Context(), "acme", "orders", "", func(p *grapnelv1.Subscription) error {
		p.Signers[0].Secrets["key"] = "namespaces/acme/secrets/k2"
		return nil
	}, subscription.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{ref("k2")}, keys(t, "refs/")); diff != "" {
		t.Errorf("after update (-want +got):\n%s", diff)
	}
	if _, err := r.DeleteSubscription(t.Context(), "acme", "orders", "", nil); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, "refs/"); got != nil {
		t.Errorf("after delete: %v", got)
	}
}

func TestNamespaceLifecycle(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	n, err := r.CreateNamespace(t.Context(), "acme", &grapnelv1.Namespace{Labels: map[string]string{"a": "b"}})
	if err != nil || n.Proto().State != grapnelv1.Namespace_STATE_ACTIVE || n.Proto().Etag == "" {
		t.Fatalf("%v, %v", n, err)
	}
	if _, err := r.CreateNamespace(t.Context(), "acme", nil); !errors.Is(err, subscription.ErrExists) {
		t.Errorf("created twice: %v", err)
	}
	var invalid *subscription.InvalidError
	_, err = r.UpdateNamespace(t.Context(), "acme", "", func(n *grapnelv1.Namespace) error {
		n.Quota = &grapnelv1.Quota{MaxEventBytes: 2 << 20}
		return nil
	})
	if !errors.As(err, &invalid) || invalid.Violations[0].Field != "namespace.quota.max_event_bytes" {
		t.Errorf("quota out of bounds: %v", err)
	}
	for weight, is := range map[int32]int{0: 1, 3: 3, 100: 100} {
		n, err := r.UpdateNamespace(t.Context(), "acme", "", func(n *grapnelv1.Namespace) error {
			n.Weight = weight
			return nil
		})
		if err != nil || n.Weight() != is || r.Snapshot().NamespaceByKey(subscription.UIDKey(n.UID)).Weight() != is {
			t.Errorf("weight %d: %v, want %d, %v", weight, n.Weight(), is, err)
		}
	}
	for _, weight := range []int32{-1, 101} {
		_, err := r.UpdateNamespace(t.Context(), "acme", "", func(n *grapnelv1.Namespace) error {
			n.Weight = weight
			return nil
		})
		if !errors.As(err, &invalid) || invalid.Violations[0].Field != "namespace.weight" || !strings.Contains(err.Error(), "want 0 to 100") {
			t.Errorf("weight %d: %v", weight, err)
		}
	}
	storeSecret(t, "k")
	p := valid()
	p.Signers = []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/k"}}}
	if _, err := r.CreateSubscription(t.Context(), "acme", "orders", p, subscription.CreateOptions{RequestID: uuid.NewString()}); err != nil {
		t.Fatal(err)
	}
	var inUse *subscription.InUseError
	if _, err := r.DeleteNamespace(t.Context(), "acme", "", false); !errors.As(err, &inUse) || !cmp.Equal(inUse.Users, []string{ordersName}) {
		t.Errorf("deleted in use: %v", err)
	}
	if err := r.PurgeNamespace(t.Context(), "acme"); err == nil {
		t.Error("purged a live namespace")
	}
	n, err = r.DeleteNamespace(t.Context(), "acme", "", true)
	if err != nil || !n.Deleted() || n.Proto().PurgeTime.AsTime().Sub(n.Proto().DeleteTime.AsTime()) != 7*24*time.Hour {
		t.Fatalf("%v, %v", n, err)
	}
	if again, err := r.DeleteNamespace(t.Context(), "acme", "", false); err != nil || !proto.Equal(again.Proto(), n.Proto()) {
		t.Errorf("deleted twice: %v, %v", again, err)
	}
	nothing := func(*grapnelv1.Subscription) error { return nil }
	_, err1 := r.CreateSubscription(t.Context(), "acme", "more", valid(), subscription.CreateOptions{})
	_, err2 := r.UpdateSubscription(t.Context(), "acme", "orders", "", nothing, subscription.UpdateOptions{})
	_, err3 := r.SetState(t.Context(), "acme", "orders", [16]byte{}, grapnelv1.Subscription_STATE_PAUSED, "")
	_, err4 := r.UpdateNamespace(t.Context(), "acme", "", func(*grapnelv1.Namespace) error { return nil })
	for i, err := range []error{err1, err2, err3, err4} {
		if !errors.Is(err, subscription.ErrNamespaceDeleted) {
			t.Errorf("change %d: %v", i+1, err)
		}
	}
	if r.Snapshot().Subscription("acme", "orders") == nil || r.Snapshot().Match("acme", &subscription.Candidate{Type: "order.a"}) != nil {
		t.Error("a deleted namespace is read but matches nothing")
	}
	if _, err := r.CreateNamespace(t.Context(), "acme", nil); !errors.Is(err, subscription.ErrExists) {
		t.Errorf("created before it was erased: %v", err)
	}
	if err := r.PurgeNamespace(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, ""); len(got) != 1 || !strings.HasPrefix(got[0], "tombstones/") {
		t.Errorf("left behind: %v", got)
	}
	if r.Snapshot().Namespace("acme") != nil || r.Snapshot().Subscription("acme", "orders") != nil {
		t.Error("still in the snapshot")
	}
	if err := r.PurgeNamespace(t.Context(), "acme"); !errors.Is(err, subscription.ErrNotFound) {
		t.Errorf("purged twice: %v", err)
	}
	withNamespace(t, r, 0)
}

func TestPurgeInBatches(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 0)
	other, err := r.CreateNamespace(t.Context(), "acme-2", nil)
	if err != nil {
		t.Fatal(err)
	}
	for from := 0; from < 1100; from += 100 {
		var ops []clientv3.Op
		for i := range 100 {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("%ssecrets/namespaces/acme/secrets/s%d", prefix(t), from+i), "not read"))
		}
		if _, err := etcd.Client.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.DeleteNamespace(t.Context(), "acme", "", false); err != nil {
		t.Fatal(err)
	}
	if err := r.PurgeNamespace(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{other.Proto().Name}, append(keys(t, "namespaces/"), keys(t, "secrets/")...)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
