package subscription

import (
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// maxCachedTypes bounds what a namespace remembers of its event types: a publisher may invent as many as
// it likes.
const maxCachedTypes = 1024

// Snapshot is all namespaces and subscriptions at one revision. It is immutable; snapshots share what did
// not change between them.
type Snapshot struct {
	revision int64
	// tenants is sorted by ID.
	tenants []*tenant
	errors  *atomic.Uint64
}

// tenant is one namespace and its subscriptions. Immutable but for what it works out on demand.
type tenant struct {
	id string
	// namespace is nil when only subscriptions of it are stored; such a tenant is not shown.
	namespace *Namespace
	// subs is sorted by ID.
	subs  []*Subscription
	index *lazyIndex

	mu     sync.RWMutex // guards cached
	cached map[string]match
}

// lazyIndex is built when an event is first matched, so that a bulk of changes costs one.
type lazyIndex struct {
	once sync.Once
	*index
}

// match is the answer of the globs for one event type.
type match struct {
	subs []*Subscription
	// conditional is set when one of subs has a condition.
	conditional bool
}

// Candidate is an event that looks for its subscriptions.
type Candidate struct {
	ID          string
	Source      string
	Type        string
	Subject     string
	Time        time.Time
	ContentType string
	Attributes  map[string]string
	Data        []byte
}

// NewSnapshot builds a snapshot without etcd, for tests of readers. Subscriptions of namespaces that are
// not given are not shown.
func NewSnapshot(revision int64, namespaces []*Namespace, subs []*Subscription) *Snapshot {
	e := newEditor(&Snapshot{errors: new(atomic.Uint64)})
	for _, n := range namespaces {
		e.tenant(n.ID).namespace = n
	}
	for _, s := range subs {
		e.put(s)
	}
	return e.snapshot(revision)
}

// Revision is etcd's revision that the snapshot shows.
func (s *Snapshot) Revision() int64 { return s.revision }

// ConditionErrors counts conditions that could not be evaluated for an event, over all snapshots of one
// Registry.
func (s *Snapshot) ConditionErrors() uint64 { return s.errors.Load() }

// Namespace returns one namespace, nil when absent. Deleted ones are shown until they are erased.
func (s *Snapshot) Namespace(id string) *Namespace {
	if t := s.tenant(id); t != nil {
		return t.namespace
	}
	return nil
}

// Subscription returns one subscription, nil when absent.
func (s *Snapshot) Subscription(ns, id string) *Subscription {
	t := s.tenant(ns)
	if t == nil || t.namespace == nil {
		return nil
	}
	if i, ok := slices.BinarySearchFunc(t.subs, id, compareSubscription); ok {
		return t.subs[i]
	}
	return nil
}

// Namespaces goes through the namespaces in the order of their IDs, beginning behind after.
func (s *Snapshot) Namespaces(after string) iter.Seq[*Namespace] {
	return func(yield func(*Namespace) bool) {
		from, found := slices.BinarySearchFunc(s.tenants, after, compareTenant)
		if found {
			from++
		}
		for _, t := range s.tenants[from:] {
			if t.namespace != nil && !yield(t.namespace) {
				return
			}
		}
	}
}

// Subscriptions goes through a namespace's subscriptions in the order of their IDs, beginning behind
// after; through none when the namespace is absent.
func (s *Snapshot) Subscriptions(ns, after string) iter.Seq[*Subscription] {
	return func(yield func(*Subscription) bool) {
		t := s.tenant(ns)
		if t == nil || t.namespace == nil {
			return
		}
		from, found := slices.BinarySearchFunc(t.subs, after, compareSubscription)
		if found {
			from++
		}
		for _, sub := range t.subs[from:] {
			if !yield(sub) {
				return
			}
		}
	}
}

// Match returns the subscriptions that want the event, in the order of their IDs: those whose globs cover
// its type and whose condition holds. Paused and disabled ones are among them; what becomes of those is
// for the caller to say. A condition that cannot be evaluated does not hold, and is counted. A namespace
// that is absent or deleted matches nothing. The result is shared and must not be changed.
func (s *Snapshot) Match(ns string, c *Candidate) []*Subscription {
	t := s.tenant(ns)
	if t == nil || t.namespace == nil || t.namespace.Deleted() {
		return nil
	}
	m := t.byType(c.Type)
	if !m.conditional {
		return m.subs
	}
	view := &eventView{Candidate: c}
	var out []*Subscription
	for _, sub := range m.subs {
		if sub.condition != nil {
			holds, err := sub.condition.holds(view)
			if err != nil {
				s.errors.Add(1)
			}
			if !holds {
				continue
			}
		}
		out = append(out, sub)
	}
	return out
}

// byType asks the globs, once per event type.
func (t *tenant) byType(eventType string) match {
	t.mu.RLock()
	m, ok := t.cached[eventType]
	t.mu.RUnlock()
	if ok {
		return m
	}
	t.index.once.Do(func() { t.index.index = newIndex(t.subs) })
	for _, at := range t.index.find(eventType) {
		m.subs = append(m.subs, t.subs[at])
		m.conditional = m.conditional || t.subs[at].condition != nil
	}
	m.subs = slices.Clip(m.subs)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cached == nil || len(t.cached) >= maxCachedTypes {
		t.cached = make(map[string]match)
	}
	t.cached[strings.Clone(eventType)] = m
	return m
}

func (s *Snapshot) tenant(id string) *tenant {
	if i, ok := slices.BinarySearchFunc(s.tenants, id, compareTenant); ok {
		return s.tenants[i]
	}
	return nil
}

func compareTenant(t *tenant, id string) int             { return strings.Compare(t.id, id) }
func compareSubscription(s *Subscription, id string) int { return strings.Compare(s.ID, id) }

// editor makes the next snapshot out of one, copying only the namespaces that change.
type editor struct {
	from    *Snapshot
	changed map[string]*tenant
}

func newEditor(from *Snapshot) *editor {
	return &editor{from: from, changed: make(map[string]*tenant)}
}

// tenant returns a copy that may be changed.
func (e *editor) tenant(id string) *tenant {
	if t := e.changed[id]; t != nil {
		return t
	}
	t := &tenant{id: id, index: &lazyIndex{}}
	if old := e.from.tenant(id); old != nil {
		t.namespace, t.subs, t.index = old.namespace, slices.Clone(old.subs), old.index
	}
	e.changed[id] = t
	return t
}

// put adds or replaces a subscription and returns what was there.
func (e *editor) put(s *Subscription) *Subscription {
	t := e.tenant(s.Namespace)
	at, ok := slices.BinarySearchFunc(t.subs, s.ID, compareSubscription)
	if !ok {
		t.subs = slices.Insert(t.subs, at, s)
		t.index = &lazyIndex{}
		return nil
	}
	old := t.subs[at]
	t.subs[at] = s
	if !slices.Equal(old.globs, s.globs) {
		t.index = &lazyIndex{}
	}
	return old
}

// drop removes a subscription and returns it, nil when there was none.
func (e *editor) drop(ns, id string) *Subscription {
	t := e.tenant(ns)
	at, ok := slices.BinarySearchFunc(t.subs, id, compareSubscription)
	if !ok {
		return nil
	}
	old := t.subs[at]
	t.subs = slices.Delete(t.subs, at, at+1)
	t.index = &lazyIndex{}
	return old
}

// snapshot ends the edit.
func (e *editor) snapshot(revision int64) *Snapshot {
	next := &Snapshot{revision: revision, tenants: e.from.tenants, errors: e.from.errors}
	if len(e.changed) == 0 {
		return next
	}
	next.tenants = slices.Clone(e.from.tenants)
	known := len(next.tenants)
	for _, t := range e.changed {
		if at, ok := slices.BinarySearchFunc(next.tenants[:known], t.id, compareTenant); ok {
			next.tenants[at] = t
		} else {
			next.tenants = append(next.tenants, t)
		}
	}
	if len(next.tenants) > known {
		slices.SortFunc(next.tenants, func(a, b *tenant) int { return strings.Compare(a.id, b.id) })
	}
	next.tenants = slices.DeleteFunc(next.tenants, func(t *tenant) bool {
		return t.namespace == nil && len(t.subs) == 0
	})
	return next
}
