package subscription

import (
	"context"

	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

// ErrCompacted says that etcd does not keep what has changed since a revision any more.
var ErrCompacted = keyspace.ErrCompacted

// Watcher tells what becomes of the subscriptions of a namespace. It is for one goroutine, and is to be closed.
type Watcher struct{ *keyspace.Watcher }

// Watched is a change of one subscription.
type Watched struct {
	// Now is nil when it was deleted, Before when it was made; also when what it was is not known any more. The caller may
	// change them.
	Now, Before *grapnelv1.Subscription
	// Name is its full name.
	Name string
	// Revision is etcd's; several changes may have the same one.
	Revision int64
}

// Watch tells what has changed and changes of the subscriptions of a namespace after a revision, until ctx ends.
func (r *Registry) Watch(ctx context.Context, ns string, after int64) *Watcher {
	return &Watcher{r.space.Watch(ctx, namespaceName(ns)+"/subscriptions/", after)}
}

// Reached is the revision of etcd up to which the snapshot shows all that was written, and Head etcd's own. Its error wraps
// ErrUnavailable.
func (r *Registry) Reached() int64                          { return r.space.Reached() }
func (r *Registry) Head(ctx context.Context) (int64, error) { return r.space.Head(ctx) }

// Next waits for changes, and returns those of one or several revisions, never of a part of one. It returns an error when
// ctx ends, ErrCompacted, or one that wraps ErrUnavailable.
func (w *Watcher) Next(ctx context.Context) ([]Watched, error) {
	for {
		seen, err := w.Watcher.Next(ctx)
		if err != nil {
			return nil, err
		}
		changes := make([]Watched, 0, len(seen))
		for _, s := range seen {
			c := Watched{Name: s.Key, Revision: s.Revision, Before: shown(s.Key, s.Before, 0)}
			if !s.Deleted {
				if c.Now = shown(s.Key, s.Value, s.Revision); c.Now == nil { // apply has said so
					continue
				}
			}
			changes = append(changes, c)
		}
		if len(changes) > 0 {
			return changes, nil
		}
	}
}

// shown is a stored subscription as callers see it; nil when there is none, or it cannot be read.
func shown(key string, value []byte, revision int64) *grapnelv1.Subscription {
	p := &grapnelv1.Subscription{}
	if value == nil || proto.Unmarshal(value, p) != nil || p.Name != key {
		return nil
	}
	fillDefaults(p)
	if revision > 0 {
		p.Etag = etag(revision)
	}
	return p
}
