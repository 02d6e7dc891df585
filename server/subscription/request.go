package subscription

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
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

// requestFormat begins a stored request; behind it come the hash of the call and the subscription made.
const requestFormat = 1

// request makes a create call idempotent.
type request struct {
	key   string
	hash  [sha256.Size]byte
	lease clientv3.LeaseID
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
	content.Name, content.Uid, content.Etag, content.StateReason = "", "", "", ""
	content.State, content.CreateTime, content.UpdateTime = 0, (*timestamppb.Timestamp)(nil), nil
	value, err := marshal(content)
	if err != nil {
		return nil, err
	}
	return &request{
		key:  requestKey(ns, requestID.String()),
		hash: sha256.Sum256(fmt.Appendf(nil, "%s\x00%s", id, value)),
	}, nil
}

// repeated answers a call that has been made before: with the subscription as it is, or as it was when it
// has been deleted since.
func (r *Registry) repeated(req *request, it keyspace.Item) (*Subscription, error) {
	body, ok := bytes.CutPrefix(it.Value, []byte{requestFormat})
	if !ok || len(body) < sha256.Size {
		return nil, fmt.Errorf("%s: unknown format", r.space.Key(it.Key))
	}
	if [sha256.Size]byte(body) != req.hash {
		var c checker
		c.add("request_id", "request_id.reused", "was used within the last day for another subscription; want a new UUID for each")
		return nil, c.err()
	}
	value := body[sha256.Size:]
	p := &grapnelv1.Subscription{}
	if err := proto.Unmarshal(value, p); err != nil {
		return nil, fmt.Errorf("%s: %w", r.space.Key(it.Key), err)
	}
	// Both were written by one transaction, so its revision is that of the subscription.
	made, err := decode(p.Name, value, it.Revision, r.conditions)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.space.Key(it.Key), err)
	}
	if now := r.Snapshot().Subscription(made.Namespace, made.ID); now != nil && now.UID == made.UID {
		return now, nil
	}
	return made, nil
}

// remember adds the request to the transaction that makes its subscription.
func (r *Registry) remember(ctx context.Context, req *request, p *grapnelv1.Subscription, txn *keyspace.Txn) error {
	if req.lease == 0 {
		lease, err := r.space.Lease(ctx, requestLife)
		if err != nil {
			return err
		}
		req.lease = lease
	}
	value, err := marshal(p)
	if err != nil {
		return err
	}
	record := append([]byte{requestFormat}, req.hash[:]...)
	record = append(record, value...)
	txn.Then = append(txn.Then, clientv3.OpPut(r.space.Key(req.key), string(record), clientv3.WithLease(req.lease)))
	return nil
}

// settleLease gives a lease back that nothing hangs on. When the outcome is unknown the lease stays: the
// request may have been stored under it.
func (r *Registry) settleLease(ctx context.Context, req *request, written bool, err error) {
	unknown := errors.Is(err, ErrUnavailable) || ctx.Err() != nil
	if req.lease == 0 || written || unknown {
		return
	}
	if err := r.space.Revoke(ctx, req.lease); err != nil {
		r.log.Debug("lease not given back, it will expire", "err", err)
	}
}
