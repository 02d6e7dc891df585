// Package keyspace owns a watched etcd prefix: what subscription and secret have in common. A Space reads
// and writes keys by compare-and-set, follows the part of the prefix that its owner keeps in memory, and
// lets a writer wait until that memory shows its write.
//
// It guarantees that Apply sees every lasting change, in revision order, from one goroutine: when the
// watch is lost or its history has been compacted, the keys are listed again and the differences are
// handed over as changes. Changes that cancelled each other out in between are not seen. It knows nothing
// of what the values mean.
package keyspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrUnavailable means that etcd could not be reached, or did not answer in time. A write that fails with
// it may or may not have happened.
var ErrUnavailable = errors.New("etcd is unavailable")

const (
	// timeout bounds one operation, retries and the wait for its own watch event included.
	timeout = 5 * time.Second
	// etcd unheard for healthyFor counts as unhealthy. A watch that is behind and silent for abandonAfter
	// is given up for a new one.
	probeEvery   = time.Second
	healthyFor   = 4 * time.Second
	abandonAfter = 15 * time.Second
	pageSize     = 500
)

// Options for Open. All but Keep are required.
type Options struct {
	// Client is not closed by the Space.
	Client *clientv3.Client
	// Prefix is put before every key, and never shown to the owner.
	Prefix string
	// Watch is the part below Prefix that is followed.
	Watch string
	// Keep says which watched keys Apply is told of; nil keeps all.
	Keep func(key string) bool
	// Apply takes changes into the owner's memory; called by Open and then by Run. Writers wait for it:
	// it must not block, and must not write.
	Apply  func(revision int64, changes []Change)
	Logger *slog.Logger
}

// Change is one key's newest value.
type Change struct {
	Key     string
	Value   []byte
	Deleted bool
	// Revision is the key's modification revision, or that of its deletion.
	Revision int64
}

// Item is one key as read. Revision is zero when it does not exist.
type Item struct {
	Key      string
	Value    []byte
	Revision int64
}

// Txn is what a plan wants written if nothing has changed since it read.
type Txn struct {
	// If adds conditions to those on the keys read. When one fails the plan is made anew.
	If []clientv3.Cmp
	// Then is what to write. Empty means that there is nothing to do.
	Then []clientv3.Op
	// Unwatched says that Then writes no watched key, so that there is no event to wait for.
	Unwatched bool
}

// Space is a watched prefix. Its methods may be called from any goroutine.
type Space struct {
	client *clientv3.Client
	prefix string
	watch  string
	keep   func(string) bool
	apply  func(int64, []Change)
	log    *slog.Logger

	// heard is when etcd last spoke, in unix nanoseconds.
	heard atomic.Int64

	// known holds the revision of every key kept; cluster is the ID of the etcd cluster that said so. Both
	// belong to Open and then to Run.
	known   map[string]int64
	cluster uint64

	mu sync.Mutex // guards what follows
	// revision is what apply has taken in.
	revision int64
	// advanced is closed when revision rises; nil while nobody waits.
	advanced chan struct{}
}

// Open lists the watched keys and applies them.
func Open(ctx context.Context, o Options) (*Space, error) {
	if o.Client == nil || o.Prefix == "" || o.Watch == "" || o.Apply == nil {
		return nil, errors.New("keyspace: Client, Prefix, Watch and Apply are required")
	}
	s := &Space{client: o.Client, prefix: o.Prefix, watch: o.Prefix + o.Watch, keep: o.Keep, apply: o.Apply, log: o.Logger}
	if s.keep == nil {
		s.keep = func(string) bool { return true }
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.resync(ctx); err != nil {
		return nil, fmt.Errorf("list %s: %w", s.watch, err)
	}
	return s, nil
}

// Key returns the full etcd key of a key of this space.
func (s *Space) Key(key string) string { return s.prefix + key }

// Healthy reports whether etcd has been heard within the last seconds.
func (s *Space) Healthy() bool {
	return time.Since(time.Unix(0, s.heard.Load())) < healthyFor
}

// Bound limits the time of one operation made of several calls.
func (s *Space) Bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, timeout, ErrUnavailable)
}

// Read reads keys at one revision. The result has the order of keys.
func (s *Space) Read(ctx context.Context, keys ...string) ([]Item, error) {
	return s.read(ctx, keys)
}

// Missing returns those keys that do not exist, without reading values.
func (s *Space) Missing(ctx context.Context, keys ...string) ([]string, error) {
	items, err := s.read(ctx, keys, clientv3.WithKeysOnly())
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, it := range items {
		if it.Revision == 0 {
			missing = append(missing, it.Key)
		}
	}
	return missing, nil
}

func (s *Space) read(ctx context.Context, keys []string, opts ...clientv3.OpOption) ([]Item, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	ops := make([]clientv3.Op, len(keys))
	for i, key := range keys {
		ops[i] = clientv3.OpGet(s.prefix+key, opts...)
	}
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	resp, err := s.client.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return nil, unavailable(ctx, err)
	}
	items := make([]Item, len(keys))
	for i, r := range resp.Responses {
		items[i].Key = keys[i]
		if kvs := r.GetResponseRange().GetKvs(); len(kvs) > 0 {
			items[i].Value, items[i].Revision = kvs[0].Value, kvs[0].ModRevision
		}
	}
	return items, nil
}

// Below lists keys under a prefix in key order, without values, and counts them all.
func (s *Space) Below(ctx context.Context, prefix string, limit int64) (keys []string, count int64, err error) {
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	opts := []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(limit)}
	if limit == 0 {
		opts = []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithCountOnly()}
	}
	resp, err := s.client.Get(ctx, s.prefix+prefix, opts...)
	if err != nil {
		return nil, 0, unavailable(ctx, err)
	}
	for _, kv := range resp.Kvs {
		keys = append(keys, strings.TrimPrefix(string(kv.Key), s.prefix))
	}
	return keys, resp.Count, nil
}

// Edit changes keys by compare-and-set. It reads keys, asks plan what follows, and commits that on
// condition that none of the keys has changed; if one has, it starts again. It returns the revision of the
// write once Apply has seen it, or zero when plan had nothing to do. An error of plan ends it as it is.
func (s *Space) Edit(ctx context.Context, keys []string, plan func([]Item) (Txn, error)) (int64, error) {
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	for try := 0; ; try++ {
		items, err := s.read(ctx, keys)
		if err != nil {
			return 0, err
		}
		txn, err := plan(items)
		if err != nil || len(txn.Then) == 0 {
			return 0, err
		}
		conds := txn.If
		for _, it := range items {
			conds = append(conds, clientv3.Compare(clientv3.ModRevision(s.prefix+it.Key), "=", it.Revision))
		}
		resp, err := s.client.Txn(ctx).If(conds...).Then(txn.Then...).Commit()
		if err != nil {
			return 0, unavailable(ctx, err)
		}
		if resp.Succeeded && txn.Unwatched {
			return resp.Header.Revision, nil
		}
		if resp.Succeeded {
			return resp.Header.Revision, s.wait(ctx, resp.Header.Revision)
		}
		// Someone else was first; writers that step back for different times get past each other.
		if err := pause(ctx, rand.N(time.Millisecond<<min(try, 5))); err != nil {
			return 0, unavailable(ctx, err)
		}
	}
}

// Lease grants a lease.
func (s *Space) Lease(ctx context.Context, ttl time.Duration) (clientv3.LeaseID, error) {
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	resp, err := s.client.Grant(ctx, int64(ttl/time.Second))
	if err != nil {
		return 0, unavailable(ctx, err)
	}
	return resp.ID, nil
}

// Revoke ends a lease and erases the keys that hang on it.
func (s *Space) Revoke(ctx context.Context, id clientv3.LeaseID) error {
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	if _, err := s.client.Revoke(ctx, id); err != nil {
		return unavailable(ctx, err)
	}
	return nil
}

// wait blocks until apply has taken in a revision.
func (s *Space) wait(ctx context.Context, revision int64) error {
	for {
		s.mu.Lock()
		if s.revision >= revision {
			s.mu.Unlock()
			return nil
		}
		if s.advanced == nil {
			s.advanced = make(chan struct{})
		}
		advanced := s.advanced
		s.mu.Unlock()
		select {
		case <-advanced:
		case <-ctx.Done():
			return unavailable(ctx, fmt.Errorf("stored at revision %d, which this server has not seen yet", revision))
		}
	}
}

// unavailable says why a call to etcd failed: the caller gave up, or etcd did not answer. The cause is
// kept as text only, so that no status of etcd's passes for one of ours.
func unavailable(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, ErrUnavailable) {
		return cause
	}
	return fmt.Errorf("%w: %v", ErrUnavailable, err)
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
