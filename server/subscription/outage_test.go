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
		if _, err := other.DeleteSubscription(t.Context(), "acme", id, ""); err != nil {
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
		if got := away.Snapshot().Subscription("acme", s.ID); got == nil || !proto.Equal(got.Proto, s.Proto) {
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
	if r.Snapshot().Subscription("acme", "orders").Proto.State != grapnelv1.Subscription_STATE_PAUSED {
		t.Error("the snapshot has not caught up")
	}
	eventually(t, "it is healthy", r.Healthy)
}
