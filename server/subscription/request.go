package subscription

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

// requestLife is how long a create call with a request ID may be repeated.
const requestLife = 24 * time.Hour

// A lease is shared by so many requests, and for so long, that a create costs none of its own and the end of
// one is little work for etcd.
const (
	leaseShare = 500
	leaseSpan  = 10 * time.Minute
)

// requestFormat begins a stored request; behind it come the hash of the call and the subscription made.
const requestFormat = 1

// request makes a create call idempotent.
type request struct {
	key  string
	hash [sha256.Size]byte
}

// leases are what request records hang on.
type leases struct {
	// taking is a lock that a caller can give up waiting for.
	taking chan struct{}
	id     clientv3.LeaseID
	left   int
	until  time.Time
	// lost is set when etcd may not have it any more.
	lost atomic.Bool
}

func newLeases() *leases { return &leases{taking: make(chan struct{}, 1)} }

// take returns a lease that lasts for at least requestLife.
func (l *leases) take(ctx context.Context, space *keyspace.Space) (clientv3.LeaseID, error) {
	if err := acquire(ctx, l.taking); err != nil {
		return 0, err
	}
	defer func() { <-l.taking }()
	if l.lost.Swap(false) || l.left == 0 || time.Now().After(l.until) {
		id, err := space.Lease(ctx, requestLife+leaseSpan)
		if err != nil {
			l.lost.Store(true)
			return 0, err
		}
		l.id, l.left, l.until = id, leaseShare, time.Now().Add(leaseSpan)
	}
	l.left--
	return l.id, nil
}

// newRequest returns nil when the call carries no request ID.
func newRequest(ns, id string, p *grapnelv1.Subscription, o CreateOptions) (*request, error) {
	if o.RequestID == "" || o.ValidateOnly {
		return nil, nil
	}
	var c checker
	requestID, err := uuid.Parse(o.RequestID)
	if err != nil {
		c.add("request_id", "string.uuid", "%q is not a UUID; want a new one for each subscription, such as %s", o.RequestID, uuid.New())
		return nil, c.err()
	}
	content := &grapnelv1.Subscription{}
	proto.Merge(content, p)
	content.Name, content.Uid, content.Etag = "", "", ""
	content.State, content.StateReason = o.State, o.StateReason
	content.CreateTime, content.UpdateTime = (*timestamppb.Timestamp)(nil), nil
	value, err := marshal(content)
	if err != nil {
		return nil, err
	}
	return &request{
		key:  requestKey(ns, requestID.String()),
		hash: sha256.Sum256(fmt.Appendf(nil, "%s\x00%s", id, value)),
	}, nil
}

// made reads which subscription a call made, as it was then.
func (r *Registry) made(it keyspace.Item) (*Subscription, error) {
	if it.Err != nil {
		return nil, it.Err
	}
	body, ok := bytes.CutPrefix(it.Value, []byte{requestFormat})
	if !ok || len(body) < sha256.Size {
		return nil, fmt.Errorf("%s: unknown format", r.space.Key(it.Key))
	}
	value := body[sha256.Size:]
	p := &grapnelv1.Subscription{}
	if err := proto.Unmarshal(value, p); err != nil {
		return nil, fmt.Errorf("%s: %w", r.space.Key(it.Key), err)
	}
	// Both were written by one transaction, so its revision is that of the subscription.
	made, err := decode(p.Name, value, it.Revision, r.conditions, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.space.Key(it.Key), err)
	}
	return made, nil
}

// current is what has become of a subscription that was made; nil when it has been deleted since. own is what stands at
// the name that the call is about, which the snapshot may not show yet. What stands elsewhere is asked of a snapshot in
// which it has been made: one that does not show it yet says nothing of its end.
func (r *Registry) current(ctx context.Context, made *Subscription, own keyspace.Item) (*Subscription, error) {
	if own.Key == made.name && own.Revision != 0 {
		if now, err := r.subscription(own); err == nil {
			if now.UID == made.UID {
				return now, nil
			}
			return nil, nil
		}
		return made, nil
	}
	if err := r.space.Wait(ctx, made.Revision); err != nil {
		return nil, err
	}
	if now := r.Snapshot().Subscription(made.Namespace, made.ID); now != nil && now.UID == made.UID {
		return now, nil
	}
	return nil, nil
}

// sameAs refuses a call that is not the one that was remembered.
func (q *request) sameAs(it keyspace.Item) error {
	if bytes.HasPrefix(it.Value[1:], q.hash[:]) {
		return nil
	}
	var c checker
	c.add("request_id", "request_id.reused", "was used within the last day for another subscription; want a new UUID for each")
	return c.err()
}

// remember adds the request to the transaction that makes its subscription.
func (r *Registry) remember(ctx context.Context, req *request, p *grapnelv1.Subscription, txn *keyspace.Txn) error {
	lease, err := r.leases.take(ctx, r.space)
	if err != nil {
		return err
	}
	value, err := marshal(p)
	if err != nil {
		return err
	}
	record := append([]byte{requestFormat}, req.hash[:]...)
	record = append(record, value...)
	txn.Then = append(txn.Then, keyspace.PutUnder(lease, req.key, record))
	return nil
}
