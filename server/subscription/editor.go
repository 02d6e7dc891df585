package subscription

import (
	"slices"
	"strings"
)

// editor makes one snapshot after the other. It belongs to one goroutine.
type editor struct {
	trees
	common *common
	// changed are the tenants as they will be in the next snapshot; was is what they were in the latest.
	changed map[string]*tenant
	was     map[string]*tenant
	// versions is the latest version given; recent and since are as in Snapshot.
	versions uint64
	recent   []step
	since    uint64
	dispatch Switch
}

// ageAfter is how many changes make the cache older.
const ageAfter = 1024

func newEditor() *editor {
	return &editor{trees: newTrees(), common: &common{}, changed: make(map[string]*tenant), was: make(map[string]*tenant)}
}

// tenant returns a copy that may be changed.
func (e *editor) tenant(id string) *tenant {
	if t := e.changed[id]; t != nil {
		return t
	}
	t := &tenant{id: id}
	if old, ok := e.tenants.Get(id); ok {
		*t = *old
		e.was[id] = old
	} else {
		e.versions++
		t.version = e.versions
	}
	e.changed[id] = t
	return t
}

// before returns the namespace as the latest snapshot shows it, nil when it does not.
func (e *editor) before(id string) *Namespace {
	if t := e.was[id]; t != nil {
		return t.namespace
	}
	return nil
}

// putNamespace adds or replaces a namespace.
func (e *editor) putNamespace(n *Namespace) {
	e.dropNamespace(n.ID)
	t := e.tenant(n.ID)
	t.namespace = n
	if n.UID != [16]byte{} {
		e.namespaces.Set(UIDKey(n.UID), n)
	}
	if t.count > 0 {
		e.adopt(n)
	}
}

// adopt tells the subscriptions of a namespace which one they are in, where it came after them.
func (e *editor) adopt(n *Namespace) {
	var strangers []*Subscription
	e.names.Ascend(named(n.ID, ""), func(found *Subscription) bool {
		if found.Namespace == n.ID && found.NamespaceUID != n.UID {
			strangers = append(strangers, found)
		}
		// All have the same: one look is enough when the namespace has only changed.
		return found.Namespace == n.ID && len(strangers) > 0
	})
	for _, s := range strangers {
		moved := *s
		e.put(&moved)
	}
}

func (e *editor) dropNamespace(id string) {
	t := e.tenant(id)
	if t.namespace != nil && t.namespace.UID != [16]byte{} {
		e.namespaces.Delete(UIDKey(t.namespace.UID))
	}
	t.namespace = nil
}

// put adds or replaces a subscription, which nobody else has yet, and returns what was there.
func (e *editor) put(s *Subscription) *Subscription {
	t := e.tenant(s.Namespace)
	s.Namespace = t.id // one string for all
	if t.namespace != nil {
		s.NamespaceUID = t.namespace.UID
	}
	old, _ := e.names.Set(s)
	t.listen(old, s)
	if old == nil {
		t.count++
	} else {
		e.unlink(old, s)
	}
	e.subs.Set(UIDKey(s.UID), s)
	if s.DeadLetter != "" {
		e.letters.Set(letterOf(s))
	}
	for g := range placesOf(s) {
		e.globs.Set(g)
	}
	e.step(t, old, s)
	return old
}

// drop removes a subscription and returns it, nil when there was none.
func (e *editor) drop(ns, id string) *Subscription {
	old, ok := e.names.Delete(named(ns, id))
	if !ok {
		return nil
	}
	t := e.tenant(ns)
	t.count--
	t.listen(old, nil)
	e.unlink(old, nil)
	e.step(t, old, nil)
	return old
}

// listen counts a subscription that has replaced another one; either may be nil.
func (t *tenant) listen(old, now *Subscription) {
	if old.listens() {
		t.listeners--
	}
	if now.listens() {
		t.listeners++
	}
}

// unlink removes what of old does not go on in now.
func (e *editor) unlink(old, now *Subscription) {
	if now == nil || now.UID != old.UID {
		if there, _ := e.subs.Get(UIDKey(old.UID)); there == old {
			e.subs.Delete(UIDKey(old.UID))
		}
	}
	if old.DeadLetter != "" {
		e.letters.Delete(letterOf(old))
	}
	if now != nil && slices.Equal(old.globs, now.globs) {
		return
	}
	for g := range placesOf(old) {
		e.globs.Delete(g)
	}
}

// letterOf is the place of a subscription among those that name a dead_letter.
func letterOf(s *Subscription) letter {
	return letter{s.DeadLetter[strings.LastIndexByte(s.DeadLetter, '/')+1:], s}
}

func (e *editor) step(t *tenant, old, now *Subscription) {
	if len(e.recent) >= 2*maxRecent {
		e.forget(maxRecent)
	}
	e.versions++
	t.version = e.versions
	e.recent = append(e.recent, step{version: t.version, old: old, now: now})
	if e.versions%ageAfter == 0 {
		e.common.cache.age()
	}
}

// forget leaves the latest changes only.
func (e *editor) forget(keep int) {
	if drop := len(e.recent) - keep; drop > 0 {
		e.since = e.recent[drop-1].version
		e.recent = slices.Clone(e.recent[drop:])
	}
}

// snapshot shows what has been changed since the latest one.
func (e *editor) snapshot(revision int64) *Snapshot {
	for id, t := range e.changed {
		if t.namespace == nil && t.count == 0 {
			e.tenants.Delete(id)
		} else {
			e.tenants.Set(id, t)
		}
	}
	// New ones: to clear a map costs as much as was ever in it.
	e.changed, e.was = make(map[string]*tenant), make(map[string]*tenant)
	e.forget(maxRecent)
	return &Snapshot{revision: revision, trees: e.trees.copy(), common: e.common, recent: slices.Clone(e.recent), since: e.since, dispatch: e.dispatch}
}
