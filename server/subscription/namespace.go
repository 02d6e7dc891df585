package subscription

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

const (
	// purgeAfter is how long a deleted namespace can still be read.
	purgeAfter = 7 * 24 * time.Hour
	purgeBatch = 500
	// maxUsers bounds the list in an InUseError.
	maxUsers = 10
)

// CreateNamespace adds a namespace. Of n, which may be nil, only labels, quota, weight, require_event_types, state and state_reason count; a state
// that is not set is ACTIVE. It returns ErrExists as long as one of that ID is not erased.
func (r *Registry) CreateNamespace(ctx context.Context, id string, n *grapnelv1.Namespace) (*Namespace, error) {
	if err := checkIDs("namespace_id", id); err != nil {
		return nil, err
	}
	p := &grapnelv1.Namespace{
		Name:   namespaceName(id),
		Labels: n.GetLabels(),
		Quota:  proto.CloneOf(n.GetQuota()),
		Weight: n.GetWeight(),

		RequireEventTypes: n.GetRequireEventTypes(),

		State:       cmp.Or(n.GetState(), grapnelv1.Namespace_STATE_ACTIVE),
		StateReason: oneLine(n.GetStateReason()),
		CreateTime:  timestamppb.Now(),
		Uid:         uuid.UUID(r.newUID()).String(),
	}
	var believed []keyspace.Item
	if r.Snapshot().Namespace(id) == nil {
		believed = []keyspace.Item{{Key: p.Name}}
	}
	return r.editNamespaceFrom(ctx, id, believed, func(it keyspace.Item) (*grapnelv1.Namespace, []keyspace.Cond, error) {
		if it.Revision != 0 && !r.lost(it) {
			return nil, nil, fmt.Errorf("%s %w", it.Key, ErrExists)
		}
		return p, nil, nil
	})
}

// UpdateNamespace lets mutate change labels, quota, weight and require_event_types of a copy; whatever else it changes is put back.
// mutate may run several times. With an etag it returns an *EtagError unless that is current.
func (r *Registry) UpdateNamespace(ctx context.Context, id, etag string, mutate func(*grapnelv1.Namespace) error) (*Namespace, error) {
	if err := checkIDs("namespace.name", id); err != nil {
		return nil, err
	}
	return r.editNamespace(ctx, id, func(it keyspace.Item) (*grapnelv1.Namespace, []keyspace.Cond, error) {
		n, err := r.activeNamespace(it)
		if err != nil {
			return nil, nil, err
		}
		if err := checkEtag(etag, it); err != nil {
			return nil, nil, err
		}
		wanted := n.Proto()
		if err := mutate(wanted); err != nil {
			return nil, nil, err
		}
		p := n.Proto()
		p.Labels, p.Quota, p.Weight = wanted.Labels, wanted.Quota, wanted.Weight
		p.RequireEventTypes = wanted.RequireEventTypes
		return p, nil, nil
	})
}

// SetNamespaceState pauses, disables or resumes a namespace, of the etag's version when one is given. Errors also: *EtagError,
// ErrNamespaceDeleted.
func (r *Registry) SetNamespaceState(ctx context.Context, id, etag string, state grapnelv1.Namespace_State, reason string) (*Namespace, error) {
	if err := checkIDs("name", id); err != nil {
		return nil, err
	}
	return r.editNamespace(ctx, id, func(it keyspace.Item) (*grapnelv1.Namespace, []keyspace.Cond, error) {
		n, err := r.activeNamespace(it)
		if err != nil {
			return nil, nil, err
		}
		if err := checkEtag(etag, it); err != nil {
			return nil, nil, err
		}
		p := n.Proto()
		p.State, p.StateReason = state, oneLine(reason)
		return p, nil, nil
	})
}

// DeleteNamespace marks a namespace deleted; PurgeNamespace erases it, which is due at its purge_time,
// seven days later. It returns an *InUseError while there are subscriptions, unless forced. A namespace
// that is already deleted is returned as it is.
func (r *Registry) DeleteNamespace(ctx context.Context, id, etag string, force bool) (*Namespace, error) {
	if err := checkIDs("name", id); err != nil {
		return nil, err
	}
	subs := namespaceName(id) + "/subscriptions/"
	return r.editNamespace(ctx, id, func(it keyspace.Item) (*grapnelv1.Namespace, []keyspace.Cond, error) {
		n, err := r.namespace(it)
		if err != nil {
			return nil, nil, err
		}
		if err := checkEtag(etag, it); err != nil || n.Deleted() {
			return n.Proto(), nil, err
		}
		var conds []keyspace.Cond
		if !force {
			users, _, err := r.space.Below(ctx, subs, maxUsers)
			if err != nil {
				return nil, nil, err
			}
			if len(users) > 0 {
				return nil, nil, &InUseError{Name: it.Key, Users: users}
			}
			// None may be made while this is being written.
			conds = []keyspace.Cond{keyspace.NoneBelow(subs)}
		}
		now := time.Now()
		p := n.Proto()
		p.UndeletedState, p.UndeletedStateReason = p.State, p.StateReason
		p.State = grapnelv1.Namespace_STATE_DELETED
		p.StateReason = "deleted by a caller"
		p.DeleteTime = timestamppb.New(now)
		p.PurgeTime = timestamppb.New(now.Add(purgeAfter))
		return p, conds, nil
	})
}

// UndeleteNamespace takes a deletion back, with the etag's version when one is given. It returns ErrNotDeleted for a
// namespace that is in use, and ErrNamespaceDeleted for one that is being erased.
func (r *Registry) UndeleteNamespace(ctx context.Context, id, etag string) (*Namespace, error) {
	if err := checkIDs("name", id); err != nil {
		return nil, err
	}
	return r.editNamespace(ctx, id, func(it keyspace.Item) (*grapnelv1.Namespace, []keyspace.Cond, error) {
		n, err := r.namespace(it)
		if err != nil {
			return nil, nil, err
		}
		if err := checkEtag(etag, it); err != nil {
			return nil, nil, err
		}
		if !n.Deleted() {
			return nil, nil, fmt.Errorf("%s: %w", it.Key, ErrNotDeleted)
		}
		// The first batch of the erasure leaves a tombstone in its transaction. What the snapshot does not show yet,
		// the condition does.
		if _, erasing := r.Snapshot().Deleted(UIDKey(n.UID)); erasing {
			return nil, nil, fmt.Errorf("%s: %w and is being erased", it.Key, ErrNamespaceDeleted)
		}
		p := n.Proto()
		p.State, p.StateReason = cmp.Or(p.UndeletedState, grapnelv1.Namespace_STATE_ACTIVE), p.UndeletedStateReason
		p.UndeletedState, p.UndeletedStateReason = 0, ""
		p.DeleteTime, p.PurgeTime = nil, nil
		return p, []keyspace.Cond{keyspace.NoneBelow(tombstoneKey(n.UID))}, nil
	})
}

// editNamespace stores what plan makes of the namespace, unless that is what it is already.
func (r *Registry) editNamespace(ctx context.Context, id string, plan func(keyspace.Item) (*grapnelv1.Namespace, []keyspace.Cond, error)) (*Namespace, error) {
	return r.editNamespaceFrom(ctx, id, nil, plan)
}

// editNamespaceFrom begins with what is believed to be stored, as keyspace.Space.EditFrom does.
func (r *Registry) editNamespaceFrom(ctx context.Context, id string, believed []keyspace.Item, plan func(keyspace.Item) (*grapnelv1.Namespace, []keyspace.Cond, error)) (*Namespace, error) {
	var out *Namespace
	key := namespaceName(id)
	revision, err := r.space.EditFrom(ctx, []string{key}, believed, func(items []keyspace.Item) (keyspace.Txn, error) {
		it := items[0]
		p, conds, err := plan(it)
		if err != nil {
			return keyspace.Txn{}, err
		}
		p = proto.CloneOf(p)
		p.Etag, p.Usage, p.EffectiveQuota = "", nil, nil
		var c checker
		c.labels("namespace.labels", p.Labels)
		c.quota("namespace.quota", p.Quota)
		c.number("namespace.weight", float64(p.Weight), 0, MaxWeight)
		if err := c.err(); err != nil {
			return keyspace.Txn{}, err
		}
		uid, err := uuid.Parse(p.Uid)
		if err != nil {
			return keyspace.Txn{}, fmt.Errorf("%s: read uid: %w", key, err)
		}
		if out, err = compileNamespace(p, id, uid); err != nil {
			return keyspace.Txn{}, err
		}
		out.Revision = it.Revision
		value, err := marshal(p)
		if err != nil || it.Err == nil && string(value) == string(it.Value) {
			return keyspace.Txn{}, err
		}
		return keyspace.Txn{If: conds, Then: []keyspace.Write{keyspace.Put(key, value)}}, nil
	})
	if err != nil {
		return nil, err
	}
	if revision != 0 {
		out.Revision = revision
	}
	return out, nil
}

// PurgeNamespace erases a deleted namespace with all its subscriptions, secrets and event types, in batches, and leaves a
// tombstone from the first of them on; it can be repeated when it failed. The caller sees to it that
// purge_time has come and that the journal holds nothing of the namespace any more.
func (r *Registry) PurgeNamespace(ctx context.Context, id string) error {
	if err := checkIDs("name", id); err != nil {
		return err
	}
	name := namespaceName(id)
	for _, prefix := range []string{name + "/", secretKey(name + "/"), eventTypeKey(name + "/"), "refs/" + name + "/", requestKey(id, "")} {
		if err := r.purge(ctx, name, prefix); err != nil {
			return err
		}
	}
	_, err := r.space.Edit(ctx, []string{name}, func(items []keyspace.Item) (keyspace.Txn, error) {
		grave, err := r.checkPurge(items[0])
		return keyspace.Txn{
			If:   []keyspace.Cond{keyspace.NoneBelow(name + "/")},
			Then: []keyspace.Write{grave, keyspace.Delete(name), keyspace.Delete(quotaKey(id))},
		}, err
	})
	return err
}

// purge erases the keys below a prefix as long as the namespace is deleted: then no new ones can appear.
func (r *Registry) purge(ctx context.Context, name, prefix string) error {
	for {
		keys, _, err := r.space.Below(ctx, prefix, purgeBatch)
		if err != nil {
			return err
		}
		_, err = r.space.Edit(ctx, []string{name}, func(items []keyspace.Item) (keyspace.Txn, error) {
			grave, err := r.checkPurge(items[0])
			if err != nil || len(keys) == 0 {
				return keyspace.Txn{}, err
			}
			batch := keyspace.DeleteRange(keys[0], keys[len(keys)-1])
			return keyspace.Txn{Then: []keyspace.Write{grave, batch}}, nil
		})
		if err != nil || len(keys) < purgeBatch {
			return err
		}
	}
}

// checkPurge returns the tombstone of a namespace that may be erased.
func (r *Registry) checkPurge(it keyspace.Item) (keyspace.Write, error) {
	n, err := r.namespace(it)
	if err != nil {
		return keyspace.Write{}, err
	}
	if !n.Deleted() {
		return keyspace.Write{}, fmt.Errorf("purge %s: it is not deleted", it.Key)
	}
	return r.tombstone(Tombstone{UID: n.UID, Name: it.Key, NamespaceUID: n.UID, OfNamespace: true})
}

// marshal encodes what is stored: the same message always gives the same bytes.
func marshal(m proto.Message) ([]byte, error) {
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return value, nil
}
