package subscription

import (
	"iter"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tidwall/btree"
)

// Snapshot is all namespaces and subscriptions at one revision. It is immutable; snapshots share what did
// not change between them, so that a change costs the logarithm of what there is.
type Snapshot struct {
	revision int64
	trees
	*common
	// recent are the latest changes of subscriptions, oldest first, and all there were after the version since.
	recent []step
	since  uint64
	// dispatch is the switch for all.
	dispatch Switch
}

// common is what all snapshots of one Registry have in common.
type common struct {
	// errors counts conditions that could not be evaluated.
	errors atomic.Uint64
	cache  cache
}

// trees hold what there is. Their copies share nodes until one of them is written.
type trees struct {
	// tenants are by the ID of their namespace.
	tenants *btree.Map[string, *tenant]
	// namespaces and subs are by UIDKey.
	namespaces *btree.Map[uint64, *Namespace]
	subs       *btree.Map[uint64, *Subscription]
	names      *btree.BTreeG[*Subscription]
	// letters are those that name a dead_letter, by which.
	letters    *btree.BTreeG[letter]
	globs      *btree.BTreeG[globAt]
	tombstones *btree.Map[uint64, Tombstone]
}

// tenant is one namespace, and what is known of its subscriptions as a whole. Immutable in a snapshot.
type tenant struct {
	id string
	// namespace is nil when only subscriptions of it are stored; such a tenant is not shown.
	namespace *Namespace
	// count is how many subscriptions there are.
	count int
	// listeners is how many of them may want operational events.
	listeners int
	// version is that of the latest change of its subscriptions.
	version uint64
}

// step is one change of a subscription; old or now is nil when it was made or removed.
type step struct {
	// version is higher than that of every step before, of whatever namespace.
	version  uint64
	old, now *Subscription
}

// sub is one of the two: they have the same name.
func (s step) sub() *Subscription {
	if s.now != nil {
		return s.now
	}
	return s.old
}

// treeDegree is half of what a node holds at most.
const treeDegree = 16

// maxRecent bounds what a snapshot remembers of changes.
const maxRecent = 32

// named is where a subscription of this name is among others, for searching only.
func named(ns, id string) *Subscription { return &Subscription{Namespace: ns, ID: id} }

func lessName(a, b *Subscription) bool {
	if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
		return c < 0
	}
	return a.ID < b.ID
}

// letter is a subscription by the ID of its dead_letter.
type letter struct {
	to  string
	sub *Subscription
}

func lessLetter(a, b letter) bool {
	if c := strings.Compare(a.sub.Namespace, b.sub.Namespace); c != 0 {
		return c < 0
	}
	if a.to != b.to {
		return a.to < b.to
	}
	return a.sub.ID < b.sub.ID
}

func newTrees() trees {
	// A writer is alone, and readers have copies that nobody writes. Small nodes make small copies.
	alone := btree.Options{NoLocks: true, Degree: treeDegree}
	return trees{
		tenants:    btree.NewMap[string, *tenant](treeDegree),
		namespaces: btree.NewMap[uint64, *Namespace](treeDegree),
		subs:       btree.NewMap[uint64, *Subscription](treeDegree),
		names:      btree.NewBTreeGOptions(lessName, alone),
		letters:    btree.NewBTreeGOptions(lessLetter, alone),
		globs:      btree.NewBTreeGOptions(lessGlob, alone),
		tombstones: btree.NewMap[uint64, Tombstone](treeDegree),
	}
}

func (t trees) copy() trees {
	return trees{
		tenants: t.tenants.Copy(), namespaces: t.namespaces.Copy(), subs: t.subs.Copy(),
		names: t.names.Copy(), letters: t.letters.Copy(), globs: t.globs.Copy(), tombstones: t.tombstones.Copy(),
	}
}

// Candidate is an event that looks for its subscriptions. It is not for use by several goroutines, nor to be changed once it
// has been asked about.
type Candidate struct {
	ID          string
	Source      string
	Type        string
	Subject     string
	Time        time.Time
	ContentType string
	Attributes  map[string]string
	Data        []byte

	// Faults are what Match found of conditions that could not be evaluated, the first maxFaults of FaultCount. They are
	// added to.
	Faults     []Fault
	FaultCount int

	// seen is the event as conditions see it, which parses the payload once, however many ask.
	seen *eventView
}

func (c *Candidate) view() *eventView {
	if c.seen == nil {
		c.seen = &eventView{Candidate: c}
	}
	return c.seen
}

// Fault is a condition that could not be evaluated for an event.
type Fault struct {
	// Subscription is its ID.
	Subscription string
	// Text is as in ConditionError.
	Text string
}

// maxFaults bounds what is told of one event.
const maxFaults = 8

// NewSnapshot builds a snapshot without etcd, for tests of readers. Subscriptions of namespaces that are
// not given are not shown by name.
func NewSnapshot(revision int64, namespaces []*Namespace, subs []*Subscription) *Snapshot {
	e := newEditor()
	for _, n := range namespaces {
		e.putNamespace(n)
	}
	for _, s := range subs {
		e.put(s)
	}
	return e.snapshot(revision)
}

// Revision is etcd's revision that the snapshot shows.
func (s *Snapshot) Revision() int64 { return s.revision }

// Dispatch is the switch for all dispatch.
func (s *Snapshot) Dispatch() Switch { return s.dispatch }

// ConditionErrors counts conditions that could not be evaluated for an event, over all snapshots of one
// Registry.
func (s *Snapshot) ConditionErrors() uint64 { return s.errors.Load() }

// Namespace returns one namespace, nil when absent. Deleted ones are shown until they are erased.
func (s *Snapshot) Namespace(id string) *Namespace {
	if t, ok := s.tenants.Get(id); ok {
		return t.namespace
	}
	return nil
}

// NamespaceByKey returns the namespace whose UID has this UIDKey, nil when absent. It allocates nothing.
func (s *Snapshot) NamespaceByKey(key uint64) *Namespace {
	n, _ := s.namespaces.Get(key)
	return n
}

// Subscription returns one subscription, nil when absent.
func (s *Snapshot) Subscription(ns, id string) *Subscription {
	if s.Namespace(ns) == nil {
		return nil
	}
	found, _ := s.names.Get(named(ns, id))
	return found
}

// LettersTo returns the first of a namespace's subscriptions that name one as their dead_letter, nil when none does.
func (s *Snapshot) LettersTo(ns, id string) (first *Subscription) {
	s.letters.Ascend(letter{id, named(ns, "")}, func(n letter) bool {
		if n.sub.Namespace == ns && n.to == id {
			first = n.sub
		}
		return false
	})
	return first
}

// SubscriptionByKey returns the subscription whose UID has this UIDKey, nil when absent: which is no proof
// that it was deleted, see Deleted. One whose namespace is deleted or absent is returned, too. It allocates
// nothing.
func (s *Snapshot) SubscriptionByKey(key uint64) *Subscription {
	sub, _ := s.subs.Get(key)
	return sub
}

// Deleted returns the tombstone of the namespace or subscription whose UID has this UIDKey. A subscription
// that was erased with its namespace has none of its own: ask for the namespace, too.
func (s *Snapshot) Deleted(key uint64) (Tombstone, bool) { return s.tombstones.Get(key) }

// Tombstones goes through all tombstones, in no order that means anything.
func (s *Snapshot) Tombstones() iter.Seq[Tombstone] {
	return func(yield func(Tombstone) bool) {
		s.tombstones.Scan(func(_ uint64, t Tombstone) bool { return yield(t) })
	}
}

// Namespaces goes through the namespaces in the order of their IDs, beginning behind after.
func (s *Snapshot) Namespaces(after string) iter.Seq[*Namespace] {
	return func(yield func(*Namespace) bool) {
		s.tenants.Ascend(after, func(id string, t *tenant) bool {
			return t.namespace == nil || id == after || yield(t.namespace)
		})
	}
}

// Subscriptions goes through a namespace's subscriptions in the order of their IDs, beginning behind
// after; through none when the namespace is absent.
func (s *Snapshot) Subscriptions(ns, after string) iter.Seq[*Subscription] {
	return func(yield func(*Subscription) bool) {
		if s.Namespace(ns) == nil {
			return
		}
		s.names.Ascend(named(ns, after), func(sub *Subscription) bool {
			return sub.Namespace == ns && (sub.ID == after || yield(sub))
		})
	}
}

// Count returns how many subscriptions a namespace has. It does not go through them.
func (s *Snapshot) Count(ns string) int {
	if t, ok := s.tenants.Get(ns); ok && t.namespace != nil {
		return t.count
	}
	return 0
}

// taken reports whether a uid with this key could be mistaken for another.
func (s *Snapshot) taken(key uint64) bool {
	_, deleted := s.Deleted(key)
	return key == 0 || deleted || s.NamespaceByKey(key) != nil || s.SubscriptionByKey(key) != nil
}

// Match returns the subscriptions that want the event, in the order of their IDs: those whose globs cover
// its type and whose condition holds, but for the one that an operational event is about. Paused and disabled ones are among them; what becomes of those is
// for the caller to say. A condition that cannot be evaluated does not hold, and is counted and told in c. A namespace
// that is absent or deleted matches nothing. The result is shared and must not be changed.
func (s *Snapshot) Match(ns string, c *Candidate) []*Subscription {
	t, ok := s.tenants.Get(ns)
	if !ok || t.namespace == nil || t.namespace.Deleted() {
		return nil
	}
	m := s.byType(t, c.Type)
	subs := others(m.subs, c)
	if !m.conditional {
		return subs
	}
	view := c.view()
	var out []*Subscription
	for _, sub := range subs {
		if sub.condition != nil {
			holds, err := sub.condition.holds(view)
			if err != nil {
				s.errors.Add(1)
				text := sub.condition.failed(err)
				if c.FaultCount++; len(c.Faults) < maxFaults {
					c.Faults = append(c.Faults, Fault{sub.ID, text})
				}
			}
			if !holds {
				continue
			}
		}
		out = append(out, sub)
	}
	return out
}

// byType asks the globs, or remembers what they said.
func (s *Snapshot) byType(t *tenant, eventType string) match {
	known, ok := s.cache.get(t.id, eventType)
	if ok && known.version == t.version {
		return known
	}
	var now match
	if ok && s.since <= known.version && known.version < t.version {
		now = newMatch(t.version, s.follow(known, t.id, eventType))
	} else {
		now = newMatch(t.version, find(s.globs, t.id, eventType))
	}
	s.cache.put(t.id, eventType, now)
	return now
}

// Wants reports whether the subscription would match the event, whatever its state and its namespace's. A condition
// that cannot be evaluated does not hold, and is told in c.
func (s *Subscription) Wants(c *Candidate) bool {
	wants, err := s.Judge(c)
	if err != nil {
		c.FaultCount++
		c.Faults = append(c.Faults, Fault{s.ID, s.condition.failed(err)})
	}
	return wants
}

// Judge is Wants that counts nothing; err says why the condition cannot be evaluated.
func (s *Subscription) Judge(c *Candidate) (wants bool, err error) {
	if !s.covers(c.Type) || s.about(c) {
		return false, nil
	}
	if s.condition == nil {
		return true, nil
	}
	return s.condition.holds(c.view())
}
