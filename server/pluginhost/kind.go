package pluginhost

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/grapnel/grapnel/server/pluginhost/check"
)

// kind is one signer or transport that a process offers. Immutable; it outlives the process, so that
// configs can be checked while that is being restarted.
type kind struct {
	*check.Kind
	proc *supervisor
}

// kindTable has every kind that a plugin of the host offers, or offered when it last ran. Readers take no lock.
//
// Whose a name is does not depend on who comes up first. What builtin plugins reserve is theirs. Of others that want the
// same name it is the one that stands first in the host's list; where manifests say what they want, also before
// it has come up. Whoever is left without one of its kinds does not serve.
type kindTable struct {
	mu    sync.Mutex // serialises writers
	names atomic.Pointer[names]
	table atomic.Pointer[map[string]*kind]
}

// names are what is settled by the list of plugins alone. Immutable.
type names struct {
	rank    map[string]int   // of a plugin, by its key: its place in the list
	owners  map[string]keyed // of kinds
	schemes map[string]string
	// disabled are kinds of plugins that do not run.
	disabled map[string]disabledKind
}

// disabledKind is a kind as the manifest of a disabled plugin has it.
type disabledKind struct {
	*check.Kind
	of Spec
}

// settle takes over a new list of plugins. What was settled before stays: who has a name keeps it for as long as it wants
// it, and plugins that are new to the list come after those that are not.
func (t *kindTable) settle(specs, disabled []keyed) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.names.Load()
	if before == nil {
		before = &names{}
	}
	specs = slices.Clone(specs)
	slices.SortStableFunc(specs, func(a, b keyed) int { return cmp.Compare(before.standing(a), before.standing(b)) })
	n := &names{rank: map[string]int{}, owners: map[string]keyed{}, schemes: map[string]string{}, disabled: map[string]disabledKind{}}
	for i, k := range specs {
		n.rank[k.key] = i
		for id := range k.spec.wants() {
			if before.owners[id].key == k.key {
				n.owners[id] = k
			}
		}
		for id, schemes := range k.spec.Reserves {
			for _, scheme := range schemes {
				n.schemes[scheme] = id
			}
		}
	}
	for _, k := range specs {
		for id := range k.spec.wants() {
			if _, owned := n.owners[id]; !owned {
				n.owners[id] = k
			}
		}
	}
	for _, k := range disabled {
		for _, pk := range k.spec.Manifest.GetKinds() {
			n.disabled[pk.GetId()] = disabledKind{&check.Kind{ID: pk.GetId(), Proto: pk}, k.spec}
		}
	}
	t.names.Store(n)
}

// standing orders the plugins of a new list: builtin ones, those that were there before, new ones.
func (n *names) standing(k keyed) int {
	if k.spec.Builtin {
		return -1
	}
	if rank, ok := n.rank[k.key]; ok {
		return rank
	}
	return len(n.rank)
}

// wants are the kinds that a plugin is known to offer before it has come up.
func (s Spec) wants() iter.Seq[string] {
	return func(yield func(string) bool) {
		for id := range s.Reserves {
			if !yield(id) {
				return
			}
		}
		for _, k := range s.Manifest.GetKinds() {
			if !yield(k.GetId()) {
				return
			}
		}
	}
}

func (t *kindTable) all() map[string]*kind {
	if m := t.table.Load(); m != nil {
		return *m
	}
	return nil
}

// described are all kinds as their plugins have described them.
func (t *kindTable) described() check.Kinds {
	all := t.all()
	out := make(check.Kinds, len(all))
	for id, k := range all {
		out[id] = k.Kind
	}
	return out
}

// off are the kinds of disabled plugins that no other plugin offers.
func (t *kindTable) off() map[string]disabledKind {
	out := maps.Clone(t.names.Load().disabled)
	for id := range t.all() {
		delete(out, id)
	}
	return out
}

// absent says why attempts cannot be made with a kind just now; "" when they can.
func (t *kindTable) absent(id string) string {
	n, k := t.names.Load(), t.get(id)
	_, disabled := n.disabled[id]
	_, owned := n.owners[id]
	switch {
	case k != nil && k.proc.conn.Load() != nil:
		return ""
	case k != nil || owned:
		return "plugins/" + id + " is not running"
	case disabled:
		return "plugins/" + id + " is disabled"
	case id == "":
		return "no plugin carries the URI's scheme"
	}
	return "there is no plugin plugins/" + id
}

func (t *kindTable) get(id string) *kind { return t.all()[id] }

// byScheme is the default transport of a scheme: the one it is reserved for, which need not have come up, or of those
// that offer it the one whose plugin stands first; "" without any.
func (t *kindTable) byScheme(scheme string) string {
	n := t.names.Load()
	if id, ok := n.schemes[scheme]; ok {
		return id
	}
	all := t.all()
	best := ""
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if slices.Contains(all[id].Proto.GetTransport().GetUriSchemes(), scheme) &&
			(best == "" || n.rank[all[id].proc.key] < n.rank[all[best].proc.key]) {
			best = id
		}
	}
	return best
}

// schemes are those that a transport is the default for.
func (t *kindTable) schemes(k *kind) []string {
	var out []string
	for _, scheme := range k.Proto.GetTransport().GetUriSchemes() {
		if t.byScheme(scheme) == k.ID {
			out = append(out, scheme)
		}
	}
	return out
}

// set replaces what the processes of a plugin offer, in one step, or says why it may not offer that. With evict, plugins
// that have one of its kinds and stand behind it have to give way: they are returned, and their kinds are gone.
func (t *kindTable) set(p *supervisor, kinds []*kind, evict bool) (evicted []*supervisor, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next, n := t.without(p.key), t.names.Load()
	for _, k := range kinds {
		if owner, ok := n.owners[k.ID]; ok && owner.key != p.key {
			return nil, taken(k.ID, owner.spec)
		}
		other := next[k.ID]
		if other == nil {
			next[k.ID] = k
			continue
		}
		if !evict || n.rank[other.proc.key] <= n.rank[p.key] {
			return nil, taken(k.ID, other.proc.spec)
		}
		evicted = append(evicted, other.proc)
		maps.DeleteFunc(next, func(_ string, of *kind) bool { return of.proc.key == other.proc.key })
		next[k.ID] = k
	}
	t.table.Store(&next)
	return evicted, nil
}

// taken says that a kind is another plugin's.
func taken(id string, by Spec) error {
	if by.Builtin {
		return fmt.Errorf("kind %q ships with grapnel; the plugin must call its own by another name", id)
	}
	return fmt.Errorf("kind %q belongs to plugin %s, which was installed before it; remove one of the two", id, by.label())
}

// remove forgets what the processes of a plugin offer.
func (t *kindTable) remove(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.without(key)
	t.table.Store(&next)
}

func (t *kindTable) without(key string) map[string]*kind {
	next := map[string]*kind{}
	for id, k := range t.all() {
		if k.proc.key != key {
			next[id] = k
		}
	}
	return next
}
