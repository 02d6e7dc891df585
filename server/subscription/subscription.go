// Package subscription owns tenants and who gets what: Namespace and Subscription, their rules, their
// storage in etcd by compare-and-set, and the immutable snapshot that the publish path matches on.
//
// A Registry guarantees that a write returns only after its own snapshot shows it, that no write is lost
// to a concurrent one, and that readers never wait for etcd: while it is away they keep the last
// snapshot, and writes answer ErrUnavailable within seconds. What is deleted leaves a Tombstone, so that it
// is told from what is merely absent. What a change or a look-up costs does not grow with how many
// subscriptions there are, but for a logarithm. It does not know plugins, journals or the
// wire; secrets are names to it, whose existence it checks in the same transaction that refers to them.
package subscription

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Subscription is one subscription as stored, compiled for matching and dispatch. Immutable. It is kept small, since there
// may be very many: the message is encoded, see Proto, and the policy shared with others.
type Subscription struct {
	// Namespace and ID are the segments of the name.
	Namespace string
	ID        string
	// UID is the message's uid, parsed, and NamespaceUID that of its namespace.
	UID, NamespaceUID [16]byte
	// Revision is etcd's modification revision of the stored value; it rises with each change.
	Revision int64
	State    grapnelv1.Subscription_State
	*Policy

	name string
	// created is the message's create_time, in nanoseconds since 1970.
	created int64
	// own is what is encoded of the message beside the name, the etag and what the policy has.
	own string
	// whole, when set, is the message itself.
	whole *grapnelv1.Subscription
	// globs are parts of own.
	globs     []string
	condition *condition
}

// Policy is how deliveries of a subscription are made, unpacked for dispatch. Subscriptions that have the same share one.
type Policy struct {
	AttemptTimeout time.Duration
	MaxInFlight    int
	MaxRate        float64
	MaxAttempts    int
	MaxAge         time.Duration
	// Schedule holds the delays before attempt 2, 3, …; the backoff form is unrolled into it.
	Schedule     []time.Duration
	Jitter       float64
	IgnoreGone   bool
	DisableAfter time.Duration
	// Ordered: events with one ordering key go one after another. BlocksKeys: an ordered delivery that fails for good
	// keeps those behind it waiting.
	Ordered, BlocksKeys bool
	// Batching is nil where each delivery has a request of its own.
	Batching *Batching
	// DeadLetter is the name of the subscription that gets what ends without success, empty for none.
	DeadLetter string

	// encoded is what of the message it was made of.
	encoded string
}

// Batching is how many deliveries one request may carry.
type Batching struct {
	MaxEvents int
	// MaxBytes bounds the payloads and attributes.
	MaxBytes int
	// MaxWait is how long a delivery waits for others.
	MaxWait time.Duration
}

// Namespace is one tenant as stored. Immutable. It is kept small as a Subscription is.
type Namespace struct {
	ID string
	// UID is the message's uid, parsed.
	UID [16]byte
	// Revision is etcd's modification revision of the stored value; it rises with each change.
	Revision int64
	State    grapnelv1.Namespace_State
	// RequireEventTypes: only events of types that are registered are taken.
	RequireEventTypes bool

	weight int32
	quota  *grapnelv1.Quota // nil is that of a message without one
	// own is what is encoded of the message beside the name and the etag.
	own string
}

// Change is one subscription before and after, or news of a deletion or a Gate alone. Old is nil for a new one, New for
// one that is gone; when both are set their UIDs may differ: made again between two looks.
//
// That Old is gone means that it was deleted only if there is a Tombstone. Without one it is absent: the store
// may have been restored from a backup, or damaged, and it may come back.
type Change struct {
	Old, New *Subscription
	// Tombstone is that of Old or of its namespace. Alone it is that of something the snapshot did not show
	// before, or of a namespace: each one that appears is told by itself at least once, unless it is told with
	// the subscription that it is of.
	Tombstone *Tombstone
	// Gate, alone, is news of a namespace or the switch.
	Gate *Gate
}

// Gate is news of what closes or opens many subscriptions at once.
type Gate struct {
	// NamespaceUID is that of a namespace whose state has changed; zero: the switch for all dispatch has.
	NamespaceUID [16]byte
	// Opened: it no longer stands in the way of attempts, and did before.
	Opened bool
}

// CreateOptions for CreateSubscription.
type CreateOptions struct {
	// RequestID, when set, makes the call idempotent for 24 hours.
	RequestID string
	// ValidateOnly checks everything and stores nothing; the result has no etag.
	ValidateOnly bool
	// State and StateReason are those that it begins with; a State that is not set is ACTIVE.
	State       grapnelv1.Subscription_State
	StateReason string
	// Approve, when set, has the last word, after all other checks and outside the time that a write may
	// take. It is not called with ValidateOnly, nor for a call that is answered by its RequestID.
	Approve Approve
}

// Approve decides whether a subscription may deliver to its target; its error ends the write as it is. p is
// what is about to be stored and must not be changed. It is asked when the target is new: uri or transport
// differ from what is stored, or max_rate allows more.
type Approve func(ctx context.Context, p *grapnelv1.Subscription) error

// UpdateOptions for UpdateSubscription.
type UpdateOptions struct {
	// AllowMissing creates the subscription when it is absent; mutate then gets an empty message.
	AllowMissing bool
	// ValidateOnly checks everything and stores nothing.
	ValidateOnly bool
	// Approve is as in CreateOptions.
	Approve Approve
}

// Deleted reports whether the namespace waits to be erased.
func (n *Namespace) Deleted() bool {
	return n.State == grapnelv1.Namespace_STATE_DELETED
}

// Disabled reports whether what is published into the namespace is to be recorded as skipped.
func (n *Namespace) Disabled() bool {
	return n.State == grapnelv1.Namespace_STATE_DISABLED
}

// Closed reports whether no attempts are to be made in the namespace.
func (n *Namespace) Closed() bool {
	return n.State != grapnelv1.Namespace_STATE_ACTIVE
}

// MaxWeight is the most that a namespace weighs.
const MaxWeight = 100

// Weight is the namespace's share beside that of others where there is less than all want, 1 to MaxWeight; 1 of nil.
func (n *Namespace) Weight() int {
	if n == nil {
		return 1
	}
	return int(clamp(n.weight, 1, MaxWeight))
}

// Quota holds a namespace's limits, defaults filled in.
type Quota struct {
	// MaxSubscriptions, MaxPublishRate and MaxOpenDeliveries are 0 where there is no limit.
	MaxSubscriptions  int
	MaxPublishRate    int
	MaxOpenDeliveries int
	// MaxEventBytes is 256 KiB by default and 1 MiB at most, Retention 3 days by default, from an hour to 90
	// days.
	MaxEventBytes int
	Retention     time.Duration
	// DeadLetterRetention is how long what ended without success stays after its end; at least Retention.
	DeadLetterRetention time.Duration
	// PayloadRetention and AttemptRetention are how long payloads and failed attempts of what has ended are kept; at most
	// Retention.
	PayloadRetention, AttemptRetention time.Duration
}

// Quota returns the limits in force; stored ones that are out of bounds are brought within them.
func (n *Namespace) Quota() Quota {
	q := n.quota
	retention := clamp(positive(q.GetRetention().AsDuration(), 72*time.Hour), time.Hour, 90*24*time.Hour)
	return Quota{
		MaxSubscriptions:  positive(q.GetMaxSubscriptions(), 0),
		MaxPublishRate:    positive(q.GetMaxPublishRate(), 0),
		MaxOpenDeliveries: positive(q.GetMaxOpenDeliveries(), 0),
		MaxEventBytes:     min(positive(q.GetMaxEventBytes(), 256<<10), 1<<20),
		Retention:         retention,

		DeadLetterRetention: clamp(q.GetDeadLetterRetention().AsDuration(), retention, 90*24*time.Hour),
		PayloadRetention:    clamp(positive(q.GetPayloadRetention().AsDuration(), retention), time.Hour, retention),
		AttemptRetention:    clamp(positive(q.GetAttemptRetention().AsDuration(), retention), time.Hour, retention),
	}
}

// Proto is the quota as the API shows it.
func (q Quota) Proto() *grapnelv1.Quota {
	return &grapnelv1.Quota{
		MaxSubscriptions:  int32(q.MaxSubscriptions),  //nolint:gosec // it was one
		MaxPublishRate:    int32(q.MaxPublishRate),    //nolint:gosec // it was one
		MaxEventBytes:     int32(q.MaxEventBytes),     //nolint:gosec // at most 1 MiB
		MaxOpenDeliveries: int32(q.MaxOpenDeliveries), //nolint:gosec // it was one
		Retention:         durationpb.New(q.Retention),

		DeadLetterRetention: durationpb.New(q.DeadLetterRetention),
		PayloadRetention:    durationpb.New(q.PayloadRetention),
		AttemptRetention:    durationpb.New(q.AttemptRetention),
	}
}

// positive returns v, or the default when v is not above zero.
func positive[T int32 | time.Duration, D int | time.Duration](v T, def D) D {
	if v > 0 {
		return D(v)
	}
	return def
}
