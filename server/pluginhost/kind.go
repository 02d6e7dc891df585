package pluginhost

import (
	"fmt"
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
type kindTable struct {
	mu    sync.Mutex // serialises writers
	table atomic.Pointer[map[string]*kind]
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

func (t *kindTable) get(id string) *kind { return t.all()[id] }

func (t *kindTable) byScheme(scheme string) string {
	all := t.all()
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if slices.Contains(all[id].Proto.GetTransport().GetUriSchemes(), scheme) {
			return id
		}
	}
	return ""
}

// set replaces what the processes of a plugin offer, in one step. A kind that another plugin offers already is refused.
func (t *kindTable) set(p *supervisor, kinds []*kind) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.without(p.key)
	for _, k := range kinds {
		if other := next[k.ID]; other != nil {
			return fmt.Errorf("kind %q is offered by %s already", k.ID, other.proc.displayName())
		}
		next[k.ID] = k
	}
	t.table.Store(&next)
	return nil
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
