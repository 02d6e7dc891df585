// Package keyspace owns a watched etcd prefix: what subscription and secret have in common. A Space reads
// and writes keys by compare-and-set, follows the part of the prefix that its owner keeps in memory, and
// lets a writer wait until that memory shows its write.
//
// It guarantees that Apply sees every lasting change, in revision order, from one goroutine: when the
// watch is lost or its history has been compacted, the keys are listed again and the differences are
// handed over as changes. Changes that cancelled each other out in between are not seen. Values carry a
// checksum; one that is wrong is named in the log and never handed over. An etcd that is not the one it
// should be is not listened to. It knows nothing of what the values mean.
package keyspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
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
	// A page of a listing aims at pageBytes. Each costs etcd a look at every key that is left, so that few
	// and large ones are wanted; but how large values are shows only in the page before.
	pageBytes = 4 << 20
	leastPage = 200
	mostPage  = 2000
)

// Options for Open. Client, Prefix, Watch and Apply are required.
type Options struct {
	// Client is not closed by the Space.
	Client *clientv3.Client
	// Prefix is put before every key, and never shown to the owner.
	Prefix string
	// Watch lists the parts below Prefix that are followed, in the order of keys. One watch spans them all,
	// so that what one transaction writes in several of them is one step to Apply.
	Watch []string
	// Identity, when set, is written below Prefix into an etcd that is empty there, and must be found there
	// for as long as the Space is used: see StrangerError.
	Identity string
	// Apply takes changes into the owner's memory; called by Open, several times, and then by Run. Writers
	// wait for it: it must not block, and must not write.
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

// Space is a watched prefix. Its methods may be called from any goroutine.
type Space struct {
	client   *clientv3.Client
	prefix   string
	watch    []string
	identity string
	apply    func(int64, []Change)
	log      *slog.Logger

	// heard is when etcd last spoke, in unix nanoseconds.
	heard atomic.Int64
	// stranger is set while etcd is not the one it should be.
	stranger atomic.Pointer[StrangerError]
	// cluster is the ID of the etcd cluster, set by Open.
	cluster uint64

	// known holds the revision of every watched key, of damaged ones too. It belongs to Open and then to Run.
	known map[string]int64

	turns turns

	mu sync.Mutex // guards what follows
	// broken holds the watched keys whose stored value is damaged.
	broken map[string]bool
	// revision is what apply has taken in, and reached up to where nothing else was written.
	revision, reached int64
	// advanced is closed when revision rises; nil while nobody waits.
	advanced chan struct{}
}

// Open lists the watched keys and applies them. It returns a *StrangerError when etcd is not the one that
// Identity asks for.
func Open(ctx context.Context, o Options) (*Space, error) {
	if o.Client == nil || o.Prefix == "" || len(o.Watch) == 0 || o.Apply == nil {
		return nil, errors.New("keyspace: Client, Prefix, Watch and Apply are required")
	}
	if !slices.IsSorted(o.Watch) {
		return nil, fmt.Errorf("keyspace: Watch is %q; want it sorted", o.Watch)
	}
	s := &Space{
		client: o.Client, prefix: o.Prefix, watch: o.Watch, identity: o.Identity, apply: o.Apply, log: o.Logger,
		known: make(map[string]int64), broken: make(map[string]bool),
		turns: newTurns(),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if _, err := s.head(ctx); err != nil && !s.unclaimed(err) {
		return nil, fmt.Errorf("open %s: %w", s.prefix, err)
	} else if err != nil {
		if err := s.claim(ctx); err != nil {
			return nil, fmt.Errorf("claim %s: %w", s.prefix, err)
		}
	}
	if err := s.list(ctx); err != nil {
		return nil, fmt.Errorf("list %s: %w", s.prefix, err)
	}
	return s, nil
}

// Key returns the full etcd key of a key of this space.
func (s *Space) Key(key string) string { return s.prefix + key }

// Healthy reports whether etcd has been heard within the last seconds, and is the right one.
func (s *Space) Healthy() bool {
	return s.stranger.Load() == nil && time.Since(time.Unix(0, s.heard.Load())) < healthyFor
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
	if len(keys) == 0 {
		return nil, nil
	}
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
	ops := make([]clientv3.Op, len(keys), len(keys)+1)
	for i, key := range keys {
		ops[i] = clientv3.OpGet(s.prefix+key, opts...)
	}
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	resp, err := s.client.Txn(ctx).Then(append(ops, clientv3.OpGet(s.prefix+identityKey))...).Commit()
	if err != nil {
		return nil, unavailable(ctx, err)
	}
	identity := resp.Responses[len(keys)].GetResponseRange()
	if err := s.recognise(&clientv3.GetResponse{Header: resp.Header, Kvs: identity.GetKvs()}); err != nil {
		return nil, err
	}
	items := make([]Item, len(keys))
	for i, key := range keys {
		items[i].Key = key
		kvs := resp.Responses[i].GetResponseRange().GetKvs()
		if len(kvs) == 0 {
			continue
		}
		items[i].Revision = kvs[0].ModRevision
		if value, ok := CheckSum(key, kvs[0].Value); ok {
			items[i].Value = value
		} else {
			items[i].Err = &BrokenError{Key: s.prefix + key}
		}
	}
	return items, nil
}

// Broken lists the watched keys, without the prefix, whose stored values are damaged, sorted. What was known
// of them before is still in use; what was not known is as if it were absent.
func (s *Space) Broken() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.broken))
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
