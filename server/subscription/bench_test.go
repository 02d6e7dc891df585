package subscription_test

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
	"github.com/grapnel/grapnel/server/subscription"
)

// store writes namespaces or subscriptions as a Registry would, many at a time.
type store struct {
	b   *testing.B
	c   *clientv3.Client
	ops []clientv3.Op
}

func (s *store) put(name string, m proto.Message) {
	value, err := proto.Marshal(m)
	if err != nil {
		s.b.Fatal(err)
	}
	s.ops = append(s.ops, clientv3.OpPut("/grapnel/v1/"+name, string(keyspace.AddSum(name, value))))
	if len(s.ops) == 100 {
		s.flush()
	}
}

func (s *store) flush() {
	if len(s.ops) == 0 {
		return
	}
	if _, err := s.c.Txn(context.Background()).Then(s.ops...).Commit(); err != nil {
		s.b.Fatal(err)
	}
	s.ops = nil
}

func (s *store) namespace(id string) {
	s.put("namespaces/"+id, &grapnelv1.Namespace{
		Name: "namespaces/" + id, State: grapnelv1.Namespace_STATE_ACTIVE, Uid: uuid.NewString(),
	})
}

func (s *store) subscription(ns, id string) {
	p := valid()
	p.Name = "namespaces/" + ns + "/subscriptions/" + id
	p.EventTypes = []string{id + ".order.*"}
	full, err := subscription.New(p)
	if err != nil {
		s.b.Fatal(err)
	}
	s.put(p.Name, full.Proto())
}

// BenchmarkRegistry is what writes cost through etcd, by how many subscriptions there are, in one namespace or
// each in its own: 8 callers for each processor create, change and delete, without a quota and under one.
func BenchmarkRegistry(b *testing.B) {
	for _, n := range []int{10, 1000, 100_000} {
		for _, spread := range []string{"one_namespace", "many_namespaces"} {
			b.Run(fmt.Sprintf("%s/%d", spread, n), func(b *testing.B) { benchmarkRegistry(b, n, spread == "many_namespaces") })
		}
	}
}

func benchmarkRegistry(b *testing.B, n int, spread bool) {
	own, err := keyspacetest.Start()
	if err != nil {
		b.Fatal(err)
	}
	defer own.Close()
	c := own.Local()
	s := &store{b: b, c: c}
	s.namespace("acme")
	for i := range n {
		ns := "acme"
		if spread {
			ns = fmt.Sprintf("n%d", i)
			s.namespace(ns)
		}
		s.subscription(ns, fmt.Sprintf("s%d", i))
	}
	s.flush()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	started := time.Now()
	r, err := subscription.Open(b.Context(), subscription.Options{Client: c})
	if err != nil {
		b.Fatal(err)
	}
	opened := time.Since(started)
	runtime.GC()
	runtime.ReadMemStats(&after)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = r.Run(ctx) })
	defer running.Wait()
	defer cancel()
	if _, err := r.UpdateNamespace(ctx, "acme", "", func(p *grapnelv1.Namespace) error { p.Labels = map[string]string{"a": "b"}; return nil }); err != nil {
		b.Fatal(err)
	}
	var made atomic.Int64
	callers := func(b *testing.B, f func(id string) error) {
		b.SetParallelism(8)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := f(fmt.Sprintf("new%d", made.Add(1))); err != nil {
					b.Error(err)
				}
			}
		})
	}
	b.Logf("%d subscriptions: opened in %v, %d bytes of heap each", n, opened.Round(time.Millisecond), (int64(after.HeapAlloc)-int64(before.HeapAlloc))/int64(n))
	create := func(id string) error {
		_, err := r.CreateSubscription(ctx, "acme", id, valid(), subscription.CreateOptions{RequestID: uuid.NewString()})
		return err
	}
	b.Run("create", func(b *testing.B) { callers(b, create) })
	b.Run("create_namespace", func(b *testing.B) {
		callers(b, func(id string) error {
			_, err := r.CreateNamespace(ctx, id, nil)
			return err
		})
	})
	made.Store(0)
	b.Run("change", func(b *testing.B) {
		callers(b, func(id string) error {
			_, err := r.UpdateSubscription(ctx, "acme", id, "", func(p *grapnelv1.Subscription) error { p.DisplayName = id; return nil }, subscription.UpdateOptions{})
			return err
		})
	})
	made.Store(0)
	b.Run("delete", func(b *testing.B) {
		callers(b, func(id string) error {
			gone, err := r.DeleteSubscription(ctx, "acme", id, "", nil)
			if err != nil {
				return err
			}
			return r.Forget(ctx, gone.UID)
		})
	})
	if _, err := r.UpdateNamespace(ctx, "acme", "", func(p *grapnelv1.Namespace) error {
		p.Quota = &grapnelv1.Quota{MaxSubscriptions: 10_000_000}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	made.Store(1 << 40)
	b.Run("create_under_quota", func(b *testing.B) { callers(b, create) })
}
