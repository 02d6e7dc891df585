package subscription

import (
	"context"
	"errors"

	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

// ErrCompacted says that etcd does not keep what has changed since a revision any more.
var ErrCompacted = keyspace.ErrCompacted

// Watcher tells what becomes of the subscriptions of a namespace, or of all. It is for one goroutine, and is to be closed.
type Watcher struct {
	*keyspace.Watcher
	r *Registry
}

// Watched is a change of one subscription.
type Watched struct {
	r    *Registry
	seen keyspace.Seen
}

// Name is its full name, and Revision etcd's; several changes may have the same one.
func (c Watched) Name() string    { return c.seen.Key }
func (c Watched) Revision() int64 { return c.seen.Revision }

// Deleted: it is there no longer. Made: it was not there before.
func (c Watched) Deleted() bool { return c.seen.Deleted }
func (c Watched) Made() bool    { return c.seen.Made }

// Now is the subscription since the change, for the caller to keep; nil when it was deleted, or cannot be read.
func (c Watched) Now() *grapnelv1.Subscription {
	return shown(c.seen.Key, c.seen.Value, c.seen.Revision)
}

// Before is what it was, nil when it is not known any more. The error wraps ErrUnavailable, or is ctx's.
func (c Watched) Before(ctx context.Context) (*grapnelv1.Subscription, error) {
	value, err := c.r.space.Before(ctx, c.seen)
	if broken := new(keyspace.BrokenError); errors.Is(err, ErrCompacted) || errors.As(err, &broken) {
		return nil, nil
	}
	return shown(c.seen.Key, value, 0), err
}

// Watch tells what has changed and changes of the subscriptions of a namespace after a revision, until ctx ends; "" means all
// namespaces.
func (r *Registry) Watch(ctx context.Context, ns string, after int64) *Watcher {
	prefix := namespaceName("")
	if ns != "" {
		prefix = namespaceName(ns) + "/subscriptions/"
	}
	return &Watcher{r.space.Watch(ctx, prefix, after), r}
}

// Reached is the revision of etcd up to which the snapshot shows all that was written, and Head etcd's own. Its error wraps
// ErrUnavailable.
func (r *Registry) Reached() int64                          { return r.space.Reached() }
func (r *Registry) Head(ctx context.Context) (int64, error) { return r.space.Head(ctx) }

// Next waits for changes, and returns those of one or several revisions, never of a part of one. It returns an error when
// ctx ends, after which it may be called again, ErrCompacted, or one that wraps ErrUnavailable.
func (w *Watcher) Next(ctx context.Context) ([]Watched, error) {
	for {
		seen, err := w.Watcher.Next(ctx)
		if err != nil {
			return nil, err
		}
		changes := make([]Watched, 0, len(seen))
		for _, s := range seen {
			if _, kind, _, ok := splitName(s.Key); ok && kind == "subscriptions" { // and not a namespace itself
				changes = append(changes, Watched{w.r, s})
			}
		}
		if len(changes) > 0 {
			return changes, nil
		}
	}
}

// Reach waits until the snapshot shows a change, for some seconds at the most: then the error wraps ErrUnavailable.
func (r *Registry) Reach(ctx context.Context, c Watched) error {
	ctx, cancel := r.space.Bound(ctx)
	defer cancel()
	return r.space.Wait(ctx, c.seen.Revision)
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
