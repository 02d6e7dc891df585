package subscription

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

// Options for Open.
type Options struct {
	// Client is required; the Registry does not close it.
	Client *clientv3.Client
	// Prefix of all keys, ending in a slash. Default /grapnel/v1/.
	Prefix string
	// Identity says whose etcd it must be; empty does not ask. It is written into one that is empty.
	Identity string
	// Logger defaults to none.
	Logger *slog.Logger
}

// Registry is all namespaces and subscriptions: read from memory, written to etcd. Its methods may be
// called from any goroutine. Writes wait until the snapshot shows them, and so need Run.
type Registry struct {
	space      *keyspace.Space
	prefix     string
	conditions *conditions
	log        *slog.Logger
	snapshot   atomic.Pointer[Snapshot]
	// editor and policies belong to Open and then to Run.
	editor   *editor
	policies sharer
	onChange []func([]Change)

	// creates bounds concurrent creates under a quota: by what they may overrun it. Near it those of one
	// namespace go one by one: they would only make each other fail.
	creates chan struct{}
	near    [nearLocks]chan struct{}
	leases  *leases
}

// Open reads everything once. ctx bounds that only. It returns a *StrangerError for an etcd of somebody else.
func Open(ctx context.Context, o Options) (*Registry, error) {
	if o.Prefix == "" {
		o.Prefix = "/grapnel/v1/"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	conds, err := newConditions()
	if err != nil {
		return nil, err
	}
	r := &Registry{
		prefix:     o.Prefix,
		conditions: conds,
		editor:     newEditor(),
		log:        o.Logger.With("component", "subscription"),
		creates:    make(chan struct{}, maxConcurrentCreates),
		leases:     newLeases(),
	}
	for i := range r.near {
		r.near[i] = make(chan struct{}, 1)
	}
	r.space, err = keyspace.Open(ctx, keyspace.Options{
		Client:   o.Client,
		Prefix:   o.Prefix,
		Watch:    []string{"namespaces/", switches, tombstones},
		Identity: o.Identity,
		Apply:    r.apply,
		Logger:   r.log,
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Run keeps the snapshot up to date until ctx ends, and then returns nil.
func (r *Registry) Run(ctx context.Context) error { return r.space.Run(ctx) }

// Snapshot returns the latest snapshot. It never blocks and never returns nil.
func (r *Registry) Snapshot() *Snapshot { return r.snapshot.Load() }

// Healthy reports whether etcd has been heard within the last seconds, and is the right one.
func (r *Registry) Healthy() bool { return r.space.Healthy() }

// Stranger says why etcd is not listened to, a *StrangerError; nil while it is the one it should be.
func (r *Registry) Stranger() error { return r.space.Stranger() }

// ClusterID is etcd's own ID, the same for as long as the Registry is open.
func (r *Registry) ClusterID() uint64 { return r.space.ClusterID() }

// Broken lists the full names of namespaces and subscriptions whose stored values are damaged, sorted. What
// was known of them before is still in the snapshot; what was not known is not, without being deleted.
func (r *Registry) Broken() []string { return r.space.Broken() }

// ConditionErrors counts conditions that could not be evaluated for an event, since Open.
func (r *Registry) ConditionErrors() uint64 { return r.Snapshot().ConditionErrors() }

// OnChange registers a function that is told of every change after the snapshot shows it, in order, from
// the goroutine of Run. Register before Run; what there is by then, tombstones too, is in the Snapshot. The
// function must not block and must not write to the Registry: writers wait for it. Of a namespace its tombstone and
// changes of its state are told.
func (r *Registry) OnChange(f func([]Change)) { r.onChange = append(r.onChange, f) }

// apply takes stored changes into the next snapshot. A value that cannot be read is skipped: what was
// known before stays, and nothing else suffers.
func (r *Registry) apply(revision int64, stored []keyspace.Change) {
	n := news{registry: r, editor: r.editor, untold: make(map[uint64]*Tombstone)}
	// A deletion and its tombstone are one step: the tombstones come first, so that the deletions see them.
	for _, c := range stored {
		if strings.HasPrefix(c.Key, tombstones) && !c.Deleted {
			n.skip(c, n.bury(c))
		}
	}
	for _, c := range stored {
		n.skip(c, n.take(c))
	}
	for _, g := range n.gates {
		n.changes = append(n.changes, Change{Gate: &g})
	}
	for _, t := range n.untold {
		n.changes = append(n.changes, Change{Tombstone: t})
	}
	r.snapshot.Store(r.editor.snapshot(revision))
	if len(n.changes) == 0 {
		return
	}
	for _, f := range r.onChange {
		f(n.changes)
	}
}

// news is what one call of apply makes of stored changes.
type news struct {
	registry *Registry
	editor   *editor
	changes  []Change
	// untold are the new tombstones that no change has told of yet, by UIDKey.
	untold map[uint64]*Tombstone
	gates  []Gate
}

func (n *news) skip(c keyspace.Change, err error) {
	if err != nil {
		n.registry.log.Error("stored value skipped", "key", n.registry.prefix+c.Key, "revision", c.Revision, "err", err)
	}
}

// bury takes in a tombstone.
func (n *news) bury(c keyspace.Change) error {
	t, err := decodeTombstone(c)
	if err != nil {
		return err
	}
	if _, known := n.editor.tombstones.Set(UIDKey(t.UID), t); !known {
		n.untold[UIDKey(t.UID)] = &t
	}
	return nil
}

// take takes in one change. Tombstones that are still there are known already.
func (n *news) take(c keyspace.Change) error {
	switch {
	case strings.HasPrefix(c.Key, tombstones):
		return n.unbury(c)
	case strings.HasPrefix(c.Key, switches):
		return n.turn(c)
	}
	ns, kind, id, ok := splitName(c.Key)
	switch {
	case !ok || kind != "" && kind != "subscriptions":
		return fmt.Errorf("not the key of a resource")
	case kind == "" && c.Deleted:
		n.editor.dropNamespace(ns)
	case kind == "":
		namespace, err := decodeNamespace(c.Key, c.Value, c.Revision)
		if err != nil {
			return err
		}
		if was, ok := n.editor.namespaces.Get(UIDKey(namespace.UID)); ok && was.State != namespace.State {
			n.gates = append(n.gates, Gate{NamespaceUID: namespace.UID, Opened: was.Closed() && !namespace.Closed()})
		}
		n.editor.putNamespace(namespace)
	case c.Deleted:
		if old := n.editor.drop(ns, id); old != nil {
			n.changes = append(n.changes, Change{Old: old, Tombstone: n.tombstone(old)})
		}
	default:
		s, err := decode(c.Key, c.Value, c.Revision, n.registry.conditions, &n.registry.policies)
		if err != nil {
			return err
		}
		change := Change{Old: n.editor.put(s), New: s}
		if change.Old != nil && change.Old.UID != s.UID {
			change.Tombstone = n.tombstone(change.Old)
		}
		n.changes = append(n.changes, change)
	}
	return nil
}

// unbury removes a tombstone that has been forgotten, and keeps one that is there at the end.
func (n *news) unbury(c keyspace.Change) error {
	if !c.Deleted {
		t, err := decodeTombstone(c)
		if err == nil {
			n.editor.tombstones.Set(UIDKey(t.UID), t)
		}
		return nil // told before
	}
	uid, err := parseTombstoneKey(c.Key)
	if err == nil {
		n.editor.tombstones.Delete(UIDKey(uid))
	}
	return err
}

// tombstone finds that of a subscription which is gone, or of the namespace it was in; nil when it was not
// deleted, as far as is known.
func (n *news) tombstone(old *Subscription) *Tombstone {
	if t, ok := n.editor.tombstones.Get(UIDKey(old.UID)); ok && t.UID == old.UID {
		delete(n.untold, UIDKey(old.UID))
		return &t
	}
	if ns := n.editor.before(old.Namespace); ns != nil {
		if t, ok := n.editor.tombstones.Get(UIDKey(ns.UID)); ok && t.UID == ns.UID {
			return &t
		}
	}
	return nil
}

// decodeNamespace reads a stored value.
func decodeNamespace(key string, value []byte, revision int64) (*Namespace, error) {
	p := &grapnelv1.Namespace{}
	if err := proto.Unmarshal(value, p); err != nil {
		return nil, fmt.Errorf("read namespace: %w", err)
	}
	if p.Name != key {
		return nil, fmt.Errorf("holds the namespace %q", p.Name)
	}
	uid, err := uuid.Parse(p.Uid)
	if err != nil {
		return nil, fmt.Errorf("read uid: %w", err)
	}
	n, err := compileNamespace(p, strings.TrimPrefix(key, "namespaces/"), uid)
	if err != nil {
		return nil, err
	}
	n.Revision = revision
	return n, nil
}

// namespace reads an item as a namespace, *NotFoundError when it does not exist. In place of a damaged value
// stands what is known, so that the next write mends it; *BrokenError when nothing is.
func (r *Registry) namespace(it keyspace.Item) (*Namespace, error) {
	if it.Revision == 0 {
		return nil, &NotFoundError{Name: it.Key}
	}
	if it.Err != nil {
		known := r.Snapshot().Namespace(strings.TrimPrefix(it.Key, "namespaces/"))
		if known == nil {
			return nil, it.Err
		}
		n := *known
		n.Revision = it.Revision
		return &n, nil
	}
	n, err := decodeNamespace(it.Key, it.Value, it.Revision)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.space.Key(it.Key), err)
	}
	return n, nil
}

// activeNamespace is namespace for those who want to change something in it.
func (r *Registry) activeNamespace(it keyspace.Item) (*Namespace, error) {
	n, err := r.namespace(it)
	if err == nil && n.Deleted() {
		err = fmt.Errorf("%s: %w and will be erased on %s", it.Key, ErrNamespaceDeleted, n.Proto().PurgeTime.AsTime().Format("2006-01-02"))
	}
	return n, err
}

// subscription reads an item as a subscription, as namespace does.
func (r *Registry) subscription(it keyspace.Item) (*Subscription, error) {
	if it.Revision == 0 {
		return nil, &NotFoundError{Name: it.Key}
	}
	if it.Err != nil {
		ns, _, id, _ := splitName(it.Key)
		known := r.Snapshot().Subscription(ns, id)
		if known == nil {
			return nil, it.Err
		}
		s := *known
		s.Revision = it.Revision
		return &s, nil
	}
	s, err := decode(it.Key, it.Value, it.Revision, r.conditions, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.space.Key(it.Key), err)
	}
	return s, nil
}

// lost reports whether there is nothing left of an item but its key: it may be made anew.
func (r *Registry) lost(it keyspace.Item) bool {
	if it.Err == nil {
		return false
	}
	ns, _, id, _ := splitName(it.Key)
	if id == "" {
		return r.Snapshot().Namespace(ns) == nil
	}
	return r.Snapshot().Subscription(ns, id) == nil
}

// checkEtag compares a caller's etag, where there is one, with the revision read.
func checkEtag(given string, it keyspace.Item) error {
	if current := etag(it.Revision); given != "" && given != current {
		return &EtagError{Name: it.Key, Current: current}
	}
	return nil
}
