package keyspace

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Item is one key as read. Revision is zero when it does not exist.
type Item struct {
	Key      string
	Value    []byte
	Revision int64
	// Err is a *BrokenError when the key exists and its value is damaged; Value is then nil.
	Err error
	// Unread is set by who gives it to EditFrom, and so in what plan gets first.
	Unread bool
}

// Txn is what a plan wants written if nothing has changed since it read.
type Txn struct {
	// If adds conditions to those on the keys read. When one fails the plan is made anew.
	If []Cond
	// Then is what to write, a watched key among it. Empty means that there is nothing to do.
	Then []Write
	// Loose names keys read that may change in between.
	Loose []string
}

// Cond is a condition of a Txn.
type Cond struct {
	key   string
	below bool
	// by, when set, is NotSince's revision.
	by int64
}

// Exists holds while a key exists.
func Exists(key string) Cond { return Cond{key: key} }

// NoneBelow holds while no key begins with a prefix. It costs as much as there are keys.
func NoneBelow(prefix string) Cond { return Cond{key: prefix, below: true} }

// NotSince holds while a key has not been written after a revision.
func NotSince(key string, revision int64) Cond { return Cond{key: key, by: revision} }

func (c Cond) compare(s *Space) clientv3.Cmp {
	created := clientv3.CreateRevision(s.prefix + c.key)
	switch {
	case c.below:
		return clientv3.Compare(created, "=", 0).WithPrefix()
	case c.by != 0:
		return clientv3.Compare(clientv3.ModRevision(s.prefix+c.key), "<", c.by+1)
	}
	return clientv3.Compare(created, ">", 0)
}

// Write is one change of a Txn.
type Write struct {
	key string
	// last, when set, ends a range that is deleted.
	last  string
	value []byte
	put   bool
	lease clientv3.LeaseID
}

// Put stores a value, with a checksum.
func Put(key string, value []byte) Write { return Write{key: key, value: value, put: true} }

// PutUnder stores a value that goes when the lease ends.
func PutUnder(lease clientv3.LeaseID, key string, value []byte) Write {
	return Write{key: key, value: value, put: true, lease: lease}
}

// Delete removes a key.
func Delete(key string) Write { return Write{key: key} }

// DeleteRange removes the keys from first to last, both included.
func DeleteRange(first, last string) Write { return Write{key: first, last: last} }

func (w Write) op(s *Space) clientv3.Op {
	key := s.prefix + w.key
	switch {
	case w.put:
		return clientv3.OpPut(key, string(AddSum(w.key, w.value)), clientv3.WithLease(w.lease))
	case w.last != "":
		return clientv3.OpDelete(key, clientv3.WithRange(s.prefix+w.last+"\x00"))
	}
	return clientv3.OpDelete(key)
}

// Edit changes keys by compare-and-set. It reads keys, asks plan what follows, and commits that on
// condition that none of the keys has changed; if one has, it starts again. It returns the revision of the
// write once Apply has seen it, or zero when plan had nothing to do. An error of plan ends it as it is. Only some are made
// at once: see turns.
func (s *Space) Edit(ctx context.Context, keys []string, plan func([]Item) (Txn, error)) (int64, error) {
	return s.EditFrom(ctx, keys, nil, plan)
}

// ErrUnread is wrapped by an error of a plan that ends EditFrom whether the keys have been read or not.
var ErrUnread = errors.New("nothing was read")

// EditFrom is Edit that has plan begin with what its owner believes to be stored, where that is not nil, in place of a first
// reading. What is wrong with it is found by the condition of the write; then, or when plan has nothing to do or an error that
// does not wrap ErrUnread, the keys are read.
func (s *Space) EditFrom(ctx context.Context, keys []string, believed []Item, plan func([]Item) (Txn, error)) (int64, error) {
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	give, err := s.turns.take(ctx)
	if err != nil {
		return 0, unavailable(ctx, err)
	}
	defer give()
	for try := 0; ; try++ {
		items := believed
		if items == nil {
			if items, err = s.read(ctx, keys); err != nil {
				return 0, err
			}
		}
		txn, err := plan(items)
		if believed != nil && (err != nil || len(txn.Then) == 0) && !errors.Is(err, ErrUnread) {
			believed = nil
			continue
		}
		if err != nil || len(txn.Then) == 0 {
			return 0, err
		}
		resp, err := s.client.Txn(ctx).If(s.conditions(txn, items)...).Then(s.operations(txn)...).Commit()
		if err != nil {
			return 0, unavailable(ctx, err)
		}
		if resp.Succeeded {
			return resp.Header.Revision, s.Wait(ctx, resp.Header.Revision)
		}
		if believed != nil {
			believed = nil
			continue
		}
		// Someone else was first; writers that step back for different times get past each other.
		if err := pause(ctx, rand.N(time.Millisecond<<min(try, 5))); err != nil {
			return 0, unavailable(ctx, err)
		}
	}
}

func (s *Space) conditions(txn Txn, items []Item) []clientv3.Cmp {
	conds := make([]clientv3.Cmp, 0, len(items)+len(txn.If)+1)
	for _, c := range txn.If {
		conds = append(conds, c.compare(s))
	}
	loose := make(map[string]bool, len(txn.Loose))
	for _, key := range txn.Loose {
		loose[key] = true
	}
	for _, it := range items {
		if !loose[it.Key] {
			conds = append(conds, clientv3.Compare(clientv3.ModRevision(s.prefix+it.Key), "=", it.Revision))
		}
	}
	if s.identity != "" {
		conds = append(conds, clientv3.Compare(clientv3.Value(s.prefix+identityKey), "=", s.identityValue()))
	}
	return conds
}

func (s *Space) operations(txn Txn) []clientv3.Op {
	ops := make([]clientv3.Op, len(txn.Then))
	for i, w := range txn.Then {
		ops[i] = w.op(s)
	}
	return ops
}

// Wait blocks until Apply has taken in a revision at which a watched key was written.
func (s *Space) Wait(ctx context.Context, revision int64) error {
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
