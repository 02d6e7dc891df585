package subscription_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestUnreadableValuesAreSkipped(t *testing.T) {
	erase(t)
	put := func(key, value string) {
		if _, err := etcd.Client.Put(t.Context(), prefix(t)+key, string(keyspace.AddSum(key, []byte(value)))); err != nil {
			t.Fatal(err)
		}
	}
	stray, err := proto.Marshal(&grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/other", Uid: uuid.NewString()})
	if err != nil {
		t.Fatal(err)
	}
	put("namespaces/acme/subscriptions/garbage", "\xff\xff")
	put("namespaces/acme/subscriptions/swapped", string(stray))
	put("namespaces/acme/subscriptions/a/b", "x")
	put("namespaces/BAD", "x")
	var logged bytes.Buffer
	r, err := subscription.Open(t.Context(), subscription.Options{
		Client: etcd.Client, Prefix: prefix(t), Logger: slog.New(slog.NewTextHandler(&logged, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"garbage", "swapped", "a/b", "BAD"} {
		if !strings.Contains(logged.String(), key) {
			t.Errorf("%s was not logged", key)
		}
	}
	run(t, r)
	withNamespace(t, r, 0)
	create(t, r, "orders")
	if got := ids(r.Snapshot().Match("acme", &subscription.Candidate{Type: "order.a"})); !cmp.Equal(got, []string{"orders"}) {
		t.Errorf("matched %v", got)
	}
}

// A bit that flips in etcd is not served, and the next write mends what it hit.
func TestDamagedSubscription(t *testing.T) {
	o := &told{}
	r, _ := registry(t, etcd.Client, o.take)
	withNamespace(t, r, 0)
	made := create(t, r, "orders")
	o.said()
	stored, err := etcd.Client.Get(t.Context(), prefix(t)+ordersName)
	if err != nil {
		t.Fatal(err)
	}
	value := stored.Kvs[0].Value
	at := bytes.Index(value, []byte("hooks.example.com"))
	value[at] ^= 1 // another host
	if _, err := etcd.Client.Put(t.Context(), prefix(t)+ordersName, string(value)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is seen", func() bool { return cmp.Equal(r.Broken(), []string{ordersName}) })
	if got := r.Snapshot().Subscription("acme", "orders"); got == nil || got.Proto().Uri != made.Proto().Uri || len(o.said()) != 0 {
		t.Errorf("serving %v", got)
	}
	fresh, err := subscription.Open(t.Context(), subscription.Options{Client: etcd.Client, Prefix: prefix(t)})
	if err != nil {
		t.Fatal(err)
	}
	_, deleted := fresh.Snapshot().Deleted(subscription.UIDKey(made.UID))
	if fresh.Snapshot().Subscription("acme", "orders") != nil || deleted || !cmp.Equal(fresh.Broken(), []string{ordersName}) {
		t.Error("at start it should be absent, not deleted, and named")
	}
	run(t, fresh)
	var broken *subscription.BrokenError
	if _, err := fresh.SetState(t.Context(), "acme", "orders", made.UID, grapnelv1.Subscription_STATE_PAUSED, ""); !errors.As(err, &broken) {
		t.Errorf("built on a damaged value: %v", err)
	}
	paused, err := r.SetState(t.Context(), "acme", "orders", made.UID, grapnelv1.Subscription_STATE_PAUSED, "")
	if err != nil || paused.Proto().Uri != made.Proto().Uri || paused.UID != made.UID {
		t.Fatalf("%v, %v", paused, err)
	}
	if got := r.Snapshot().Subscription("acme", "orders"); len(r.Broken()) != 0 || !proto.Equal(got.Proto(), paused.Proto()) {
		t.Errorf("broken %v, serving %v", r.Broken(), got)
	}
	eventually(t, "others see it again", func() bool { return fresh.Snapshot().Subscription("acme", "orders") != nil })
}

// What is damaged and known to nobody can be made anew, and what it referred to is free.
func TestDamagedBeforeTheStart(t *testing.T) {
	first, stop := registry(t, etcd.Client)
	withNamespace(t, first, 0)
	storeSecret(t, "k1")
	storeSecret(t, "k2")
	p := valid()
	p.Signers = []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/k1"}}}
	lost, err := first.CreateSubscription(t.Context(), "acme", "orders", p, subscription.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := etcd.Client.Put(t.Context(), prefix(t)+ordersName, "damaged"); err != nil {
		t.Fatal(err)
	}
	r, _ := registry(t, etcd.Client)
	p.Signers[0].Secrets["key"] = "namespaces/acme/secrets/k2"
	again, err := r.CreateSubscription(t.Context(), "acme", "orders", p, subscription.CreateOptions{})
	if err != nil || again.UID == lost.UID {
		t.Fatalf("%v, %v", again, err)
	}
	if got := keys(t, "refs/"); len(got) != 1 || !strings.Contains(got[0], "k2") || len(r.Broken()) != 0 {
		t.Errorf("references %v, broken %v", got, r.Broken())
	}
}

func TestResyncAfterCompactionWhileAway(t *testing.T) {
	var mu sync.Mutex
	told := make(map[string]int)
	away, stop := registry(t, etcd.Client, func(changes []subscription.Change) {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range changes {
			switch {
			case c.New == nil:
				told["gone "+c.Old.ID]++
			case c.Old != nil && c.Old.UID != c.New.UID:
				told["replaced "+c.New.ID]++
			default:
				told["put "+c.New.ID]++
			}
		}
	})
	withNamespace(t, away, 0)
	for _, id := range []string{"changes", "goes", "remade", "stays"} {
		create(t, away, id)
	}
	stop()
	clear(told)

	other, _ := registry(t, etcd.Client)
	for _, id := range []string{"goes", "remade"} {
		if _, err := other.DeleteSubscription(t.Context(), "acme", id, "", nil); err != nil {
			t.Fatal(err)
		}
	}
	create(t, other, "remade")
	create(t, other, "comes")
	if _, err := other.SetState(t.Context(), "acme", "changes", [16]byte{}, grapnelv1.Subscription_STATE_PAUSED, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Client.Compact(t.Context(), other.Snapshot().Revision()); err != nil {
		t.Fatal(err)
	}
	run(t, away)
	eventually(t, "the snapshot has caught up", func() bool {
		return away.Snapshot().Revision() >= other.Snapshot().Revision()
	})
	eventually(t, "changes are told", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return cmp.Equal(map[string]int{"gone goes": 1, "replaced remade": 1, "put comes": 1, "put changes": 1}, told)
	})
	want := other.Snapshot()
	for s := range want.Subscriptions("acme", "") {
		if got := away.Snapshot().Subscription("acme", s.ID); got == nil || !proto.Equal(got.Proto(), s.Proto()) {
			t.Errorf("%s: %v", s.ID, got)
		}
	}
	if away.Snapshot().Subscription("acme", "goes") != nil {
		t.Error("a deleted one is still there")
	}
}

func TestEtcdOutage(t *testing.T) {
	own, err := keyspacetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	r, _ := registry(t, own.Client)
	withNamespace(t, r, 0)
	create(t, r, "orders")
	own.Stop()
	started := time.Now()
	if _, err := r.CreateSubscription(t.Context(), "acme", "more", valid(), subscription.CreateOptions{}); !errors.Is(err, subscription.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(started); took > 8*time.Second {
		t.Errorf("it took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.SetState(ctx, "acme", "orders", [16]byte{}, grapnelv1.Subscription_STATE_PAUSED, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who gave up got %v", err)
	}
	if got := ids(r.Snapshot().Match("acme", &subscription.Candidate{Type: "order.a"})); !cmp.Equal(got, []string{"orders"}) {
		t.Errorf("without etcd matched %v", got)
	}
	eventually(t, "it is unhealthy", func() bool { return !r.Healthy() })
	if err := own.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "writes work again", func() bool {
		_, err := r.SetState(t.Context(), "acme", "orders", [16]byte{}, grapnelv1.Subscription_STATE_PAUSED, "")
		return err == nil
	})
	if r.Snapshot().Subscription("acme", "orders").Proto().State != grapnelv1.Subscription_STATE_PAUSED {
		t.Error("the snapshot has not caught up")
	}
	eventually(t, "it is healthy", r.Healthy)
}
