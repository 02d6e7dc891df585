package subscription

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func bare(ns, id string, uid uint64, globs ...string) *Subscription {
	s := &Subscription{Namespace: ns, ID: id, Policy: &Policy{}, globs: globs}
	binary.BigEndian.PutUint64(s.UID[8:], uid)
	return s
}

func bareNamespace(id string, uid uint64) *Namespace {
	n := &Namespace{ID: id, State: grapnelv1.Namespace_STATE_ACTIVE}
	binary.BigEndian.PutUint64(n.UID[8:], uid)
	return n
}

// world is what a snapshot should show, in plain maps.
type world struct {
	namespaces map[string]*Namespace
	subs       map[string]*Subscription
}

func (w world) clone() world { return world{maps.Clone(w.namespaces), maps.Clone(w.subs)} }

func (w world) check(t *testing.T, s *Snapshot, types []string) {
	t.Helper()
	if got, want := slices.Collect(s.Namespaces("")), w.namespaces; len(got) != len(want) {
		t.Fatalf("%d namespaces, want %d", len(got), len(want))
	}
	byNamespace := make(map[string][]*Subscription)
	for _, key := range slices.Sorted(maps.Keys(w.subs)) {
		sub := w.subs[key]
		byNamespace[sub.Namespace] = append(byNamespace[sub.Namespace], sub)
		if s.SubscriptionByKey(UIDKey(sub.UID)) != sub {
			t.Fatalf("%s is not found by its key", key)
		}
	}
	for _, id := range []string{"a", "a-b", "b", "c"} {
		n, subs := w.namespaces[id], byNamespace[id]
		if s.Namespace(id) != n || n != nil && s.NamespaceByKey(UIDKey(n.UID)) != n {
			t.Fatalf("namespace %s is %v, want %v", id, s.Namespace(id), n)
		}
		if n == nil {
			subs = nil
		}
		if got := slices.Collect(s.Subscriptions(id, "")); !slices.Equal(got, subs) || s.Count(id) != len(subs) {
			t.Fatalf("namespace %s has %d subscriptions, counted %d, want %d", id, len(got), s.Count(id), len(subs))
		}
		for _, typ := range types {
			var want []*Subscription
			for _, sub := range subs {
				if sub.covers(typ) {
					want = append(want, sub)
				}
			}
			if got := s.Match(id, &Candidate{Type: typ}); !slices.Equal(got, want) {
				t.Fatalf("namespace %s, type %q: matched %v, want %v", id, typ, texts(got), texts(want))
			}
		}
	}
}

func texts(subs []*Subscription) (out []string) {
	for _, s := range subs {
		out = append(out, fmt.Sprintf("%s%d%v", s.ID, UIDKey(s.UID), s.globs))
	}
	return out
}

// Snapshots made one out of the other show what was so at their time, whatever comes later, with answers
// remembered from before and after.
func TestSnapshotsKeepTheirTime(t *testing.T) {
	seeds := uint64(30)
	if testing.Short() {
		seeds = 4
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(seed, 7))
		text := func(alphabet string, most int) string {
			var b strings.Builder
			for range 1 + rng.IntN(most) {
				b.WriteByte(alphabet[rng.IntN(len(alphabet))])
			}
			return b.String()
		}
		var types []string
		for range 12 {
			types = append(types, text("ab.", 5))
		}
		e := newEditor()
		now := world{make(map[string]*Namespace), make(map[string]*Subscription)}
		type moment struct {
			world
			snapshot *Snapshot
		}
		var past []moment
		uid := uint64(0)
		for revision := range int64(150) {
			for range 1 + rng.IntN(1+rng.IntN(60)) {
				ns := []string{"a", "a-b", "b", "c"}[rng.IntN(4)]
				id := fmt.Sprintf("s%02d", rng.IntN(60))
				uid++
				switch rng.IntN(10) {
				case 0:
					n := bareNamespace(ns, uid)
					e.putNamespace(n)
					now.namespaces[ns] = n
					for name, s := range now.subs { // those it took over are copies
						if s.Namespace == ns {
							found, _ := e.names.Get(named(ns, s.ID))
							if found.NamespaceUID != n.UID {
								t.Fatalf("%s is in the namespace %x, not %x", name, found.NamespaceUID, n.UID)
							}
							now.subs[name] = found
						}
					}
				case 1:
					if rng.IntN(4) == 0 {
						e.dropNamespace(ns)
						delete(now.namespaces, ns)
					}
				case 2, 3:
					if got := e.drop(ns, id); got != now.subs[ns+"/"+id] {
						t.Fatalf("dropped %v", got)
					}
					delete(now.subs, ns+"/"+id)
				default:
					s := bare(ns, id, uid)
					if old := now.subs[ns+"/"+id]; old != nil && rng.IntN(2) == 0 {
						s.UID, s.globs = old.UID, old.globs // changed, not replaced
					} else {
						for range rng.IntN(4) {
							s.globs = append(s.globs, text("ab.*", 5))
						}
						slices.Sort(s.globs)
						s.globs = slices.Compact(s.globs)
					}
					if got := e.put(s); got != now.subs[ns+"/"+id] {
						t.Fatalf("replaced %v", got)
					}
					now.subs[ns+"/"+id] = s
				}
			}
			m := moment{now.clone(), e.snapshot(revision)}
			past = append(past, m)
			m.check(t, m.snapshot, types[:1+rng.IntN(len(types))])
			if len(past) > 3 {
				p := past[rng.IntN(len(past))]
				p.check(t, p.snapshot, types[:2])
			}
		}
		for _, p := range past {
			p.check(t, p.snapshot, types)
		}
	}
}

// What is remembered of event types is bounded in bytes over all namespaces, and gives room to what is asked
// for now.
func TestMatchesRememberedAreBounded(t *testing.T) {
	e := newEditor()
	const namespaces, subs = 50, 300
	for n := range uint64(namespaces) {
		ns := fmt.Sprintf("n%02d", n)
		e.putNamespace(bareNamespace(ns, n+1))
		for i := range uint64(subs) {
			e.put(bare(ns, fmt.Sprintf("s%03d", i), 1000+n*subs+i))
		}
	}
	s := e.snapshot(1)
	for i := range 4000 {
		if got := s.Match(fmt.Sprintf("n%02d", i%namespaces), &Candidate{Type: fmt.Sprint("t", i)}); len(got) != subs {
			t.Fatalf("matched %d", len(got))
		}
	}
	bytes := 0
	for _, kept := range []map[cacheKey]match{s.cache.young, s.cache.old} {
		for key, m := range kept {
			bytes += matchOverhead + len(key.ns) + len(key.eventType) + 8*cap(m.subs)
		}
	}
	if bytes > maxCacheBytes || bytes < maxCacheBytes/4 {
		t.Errorf("%d bytes are kept, at most %d may be", bytes, maxCacheBytes)
	}
	if _, ok := s.cache.get("n49", "t3999"); !ok {
		t.Error("the latest is not remembered")
	}
}

// A change of one subscription leaves what is remembered of other types and namespaces in use.
func TestChangeKeepsWhatItDoesNotTouch(t *testing.T) {
	e := newEditor()
	e.putNamespace(bareNamespace("a", 1))
	for i := range uint64(100) {
		e.put(bare("a", fmt.Sprintf("s%03d", i), 10+i, fmt.Sprintf("t%d", i)))
	}
	s := e.snapshot(1)
	first := s.Match("a", &Candidate{Type: "t7"})
	for i := range uint64(20) {
		e.put(bare("a", "new", 1000+i, "other.*"))
		e.drop("a", fmt.Sprintf("s%03d", 50+i))
		s = e.snapshot(int64(2 + i))
		if i%5 == 0 {
			if got := s.Match("a", &Candidate{Type: "t7"}); !cmp.Equal(texts(got), []string{"s00717[t7]"}) || &got[0] != &first[0] {
				t.Fatalf("matched %v, or not what was remembered", texts(got))
			}
		}
	}
	c := &Candidate{Type: "t7"}
	if n := testing.AllocsPerRun(100, func() { s.Match("a", c) }); n > 0 {
		t.Errorf("a remembered match allocates %v times", n)
	}
}
