package subscription

import (
	"fmt"
	"testing"
)

// shape is how subscriptions are spread.
type shape struct {
	name string
	// place says where number i goes, and what it wants.
	place func(i int) (ns, id, glob string)
}

func shapes() []shape {
	return []shape{
		{"one_namespace", func(i int) (string, string, string) {
			return "acme", fmt.Sprintf("s%07d", i), fmt.Sprintf("tenant%d.order.*", i)
		}},
		{"endings", func(i int) (string, string, string) {
			return "acme", fmt.Sprintf("s%07d", i), fmt.Sprintf("*.order.tenant%d", i)
		}},
		{"many_namespaces", func(i int) (string, string, string) {
			return fmt.Sprintf("n%07d", i), "s", "order.*"
		}},
	}
}

func populate(s shape, n int) *editor {
	e := newEditor()
	for i := range n {
		ns, id, glob := s.place(i)
		if e.changed[ns] == nil {
			if _, ok := e.tenants.Get(ns); !ok {
				e.putNamespace(bareNamespace(ns, uint64(i)<<32|1))
			}
		}
		e.put(bare(ns, id, uint64(i)+1, glob))
	}
	return e
}

// BenchmarkScale is what one change costs, and a match after it, by how much there is.
func BenchmarkScale(b *testing.B) {
	for _, s := range shapes() {
		for _, n := range []int{10, 1000, 100_000} {
			e := populate(s, n)
			snap := e.snapshot(1)
			ns, id, glob := s.place(n / 2)
			eventType := "tenant5.order.created"
			switch s.name {
			case "endings":
				eventType = "x.order.tenant5"
			case "many_namespaces":
				eventType = "order.created"
			}
			run := func(what string, f func(i int)) {
				b.Run(fmt.Sprintf("%s/%d/%s", s.name, n, what), func(b *testing.B) {
					b.ReportAllocs()
					for i := 0; b.Loop(); i++ {
						f(i)
					}
				})
			}
			run("create+delete", func(i int) {
				e.put(bare(ns, "znew", 1<<40+uint64(i), "x.*"))
				e.snapshot(2)
				e.drop(ns, "znew")
				snap = e.snapshot(2)
			})
			run("change", func(i int) {
				e.put(bare(ns, id, uint64(n/2)+1, glob))
				snap = e.snapshot(2)
			})
			c := &Candidate{Type: eventType}
			run("change_then_match", func(i int) {
				e.put(bare(ns, id, uint64(n/2)+1, glob))
				snap = e.snapshot(2)
				snap.Match(ns, c)
			})
			run("match_known", func(int) { snap.Match(ns, c) })
			candidates := make([]*Candidate, 1<<16)
			for i := range candidates {
				candidates[i] = &Candidate{Type: fmt.Sprintf("%s%d", eventType, i)}
			}
			next := 0
			run("match_new_type", func(int) {
				snap.Match(ns, candidates[next%len(candidates)])
				next++
			})
			key := uint64(n/2) + 1
			run("by_key", func(int) {
				if snap.SubscriptionByKey(key) == nil {
					b.Fatal("not found")
				}
			})
		}
	}
}
