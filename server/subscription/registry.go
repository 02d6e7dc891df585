package subscription

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"

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
	onChange   []func([]Change)

	// creates bounds concurrent creates, which keeps the count of a quota close to the truth; nearQuota
	// lets one at a time of those by that the quota might be overrun.
	creates   chan struct{}
	nearQuota chan struct{}
	leases    *leases
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
		log:        o.Logger.With("component", "subscription"),
		creates:    make(chan struct{}, maxConcurrentCreates),
		nearQuota:  make(chan struct{}, 1),
		leases:     newLeases(),
	}
	r.snapshot.Store(&Snapshot{errors: new(atomic.Uint64)})
	r.space, err = keyspace.Open(ctx, keyspace.Options{
		Client:   o.Client,
		Prefix:   o.Prefix,
		Watch:    []string{"namespaces/"},
		Keep:     keep,
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
// the goroutine of Run. Register before Run. The function must not block and must not write to the
// Registry: writers wait for it. A change of a namespace alone is not told.
func (r *Registry) OnChange(f func([]Change)) { r.onChange = append(r.onChange, f) }

// keep says what of namespaces/ belongs to the registry; secrets, for one, do not.
func keep(key string) bool {
	_, kind, _, _ := splitName(key)
	return kind == "" || kind == "subscriptions"
}

// apply takes stored changes into the next snapshot. A value that cannot be read is skipped: what was
// known before stays, and nothing else suffers.
func (r *Registry) apply(revision int64, stored []keyspace.Change) {
	edit := newEditor(r.snapshot.Load())
	var changes []Change
	for _, c := range stored {
		ns, kind, id, ok := splitName(c.Key)
		var err error
		switch {
		case !ok:
			err = fmt.Errorf("not the key of a resource")
		case kind == "" && c.Deleted:
			edit.tenant(ns).namespace = nil
		case kind == "":
			var n *Namespace
			if n, err = decodeNamespace(c.Key, c.Value, c.Revision); err == nil {
				edit.tenant(ns).namespace = n
			}
		case c.Deleted:
			if old := edit.drop(ns, id); old != nil {
				changes = append(changes, Change{Old: old})
			}
		default:
			var s *Subscription
			if s, err = decode(c.Key, c.Value, c.Revision, r.conditions); err == nil {
				changes = append(changes, Change{Old: edit.put(s), New: s})
			}
		}
		if err != nil {
			r.log.Error("stored value skipped", "key", r.prefix+c.Key, "revision", c.Revision, "err", err)
		}
	}
	r.snapshot.Store(edit.snapshot(revision))
	if len(changes) == 0 {
		return
	}
	for _, f := range r.onChange {
		f(changes)
	}
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
	p.Etag = etag(revision)
	return &Namespace{Proto: p, ID: strings.TrimPrefix(key, "namespaces/"), Revision: revision}, nil
}

// namespace reads an item as a namespace, *NotFoundError when it does not exist.
func (r *Registry) namespace(it keyspace.Item) (*Namespace, error) {
	if it.Revision == 0 {
		return nil, &NotFoundError{Name: it.Key}
	}
	if it.Err != nil {
		return nil, it.Err
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
		err = fmt.Errorf("%s: %w and will be erased on %s", it.Key, ErrNamespaceDeleted, n.Proto.PurgeTime.AsTime().Format("2006-01-02"))
	}
	return n, err
}

// subscription reads an item as a subscription, *NotFoundError when it does not exist.
func (r *Registry) subscription(it keyspace.Item) (*Subscription, error) {
	if it.Revision == 0 {
		return nil, &NotFoundError{Name: it.Key}
	}
	if it.Err != nil {
		return nil, it.Err
	}
	s, err := decode(it.Key, it.Value, it.Revision, r.conditions)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.space.Key(it.Key), err)
	}
	return s, nil
}

// checkEtag compares a caller's etag, where there is one, with the revision read.
func checkEtag(given string, it keyspace.Item) error {
	if current := etag(it.Revision); given != "" && given != current {
		return &EtagError{Name: it.Key, Current: current}
	}
	return nil
}
