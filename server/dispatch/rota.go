package dispatch

import (
	"cmp"

	"github.com/tidwall/btree"

	"github.com/grapnel/grapnel/server/delivery"
)

// rota is a set of lanes that is gone through in the order of their keys, from the first to the last and then again.
// That is the order of their rows on disk, so lanes that are read one after the other share blocks, and each lane has its
// turn in every round. It is guarded by its owner; the zero value is empty.
type rota struct {
	lanes *btree.BTreeG[turn]
	at    delivery.LaneKey // of the lane that was taken last
}

// turn is a lane's place in a rota.
type turn struct {
	key  delivery.LaneKey
	lane *lane
}

func (t turn) before(u turn) bool {
	return cmp.Or(cmp.Compare(t.key.Namespace, u.key.Namespace), cmp.Compare(t.key.Subscription, u.key.Subscription)) < 0
}

func (r *rota) add(l *lane) {
	if r.lanes == nil {
		r.lanes = btree.NewBTreeGOptions(turn.before, btree.Options{NoLocks: true})
	}
	r.lanes.Set(turn{l.key, l})
}

func (r *rota) remove(l *lane) { r.lanes.Delete(turn{key: l.key}) }

func (r *rota) empty() bool { return r.lanes == nil || r.lanes.Len() == 0 }

// next is the lane whose turn it is, which stays in the set, or nil.
func (r *rota) next() *lane {
	if r.empty() {
		return nil
	}
	var next turn
	r.lanes.Ascend(turn{key: r.at}, func(t turn) bool {
		next = t
		return t.key == r.at // has had its turn
	})
	if next.lane == nil || next.key == r.at {
		next, _ = r.lanes.Min()
	}
	return next.lane
}

// take is next, taken out of the set.
func (r *rota) take() *lane {
	l := r.next()
	if l != nil {
		r.remove(l)
		r.at = l.key
	}
	return l
}
