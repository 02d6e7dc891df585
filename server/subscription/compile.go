package subscription

import (
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// New validates a subscription, fills in its defaults and compiles it, without etcd: for checks and for
// tests of readers. p.Name must be set; p itself is not changed. A missing uid is made. It returns an
// *InvalidError when there is anything wrong.
func New(p *grapnelv1.Subscription) (*Subscription, error) {
	ns, kind, id, ok := splitName(p.GetName())
	if !ok || kind != "subscriptions" {
		var c checker
		c.add("subscription.name", "name", "%q is not a subscription's name; want namespaces/NAMESPACE/subscriptions/NAME", p.GetName())
		return nil, c.err()
	}
	p = proto.CloneOf(p)
	if p.Uid == "" {
		p.Uid = uuid.NewString()
	}
	uid, err := uuid.Parse(p.Uid)
	if err != nil {
		return nil, fmt.Errorf("subscription %s: uid: %w", p.Name, err)
	}
	conds, err := newConditions()
	if err != nil {
		return nil, err
	}
	fillDefaults(p)
	cond, err := validate(p, ns, conds)
	if err != nil {
		return nil, err
	}
	return compile(p, ns, id, uid, cond, nil)
}

// Of is a subscription that is not stored, for those who ask plugins about one and for tests of readers: the message as it is,
// without defaults or checks, and a zero Policy of its own, both for the caller to change before others see it. UID is zero,
// and Namespace and ID are empty, where the message does not say.
func Of(p *grapnelv1.Subscription) *Subscription {
	s := &Subscription{
		State: p.GetState(), Policy: &Policy{DeadLetter: p.GetDeadLetter()}, whole: p,
		created: p.GetCreateTime().AsTime().UnixNano(), globs: p.GetEventTypes(),
	}
	s.Namespace, _, s.ID, _ = splitName(p.GetName())
	s.UID, _ = uuid.Parse(p.GetUid())
	return s
}

// decode reads a stored value. It checks what identity and safety hang on; a subscription that a later
// rule would refuse is still served. Its policy is one of policies' if that is not nil.
func decode(key string, value []byte, revision int64, conds *conditions, policies *sharer) (*Subscription, error) {
	p := &grapnelv1.Subscription{}
	if err := proto.Unmarshal(value, p); err != nil {
		return nil, fmt.Errorf("read subscription: %w", err)
	}
	if p.Name != key {
		return nil, fmt.Errorf("holds the subscription %q", p.Name)
	}
	p.Name = key // one string for all who keep it
	ns, _, id, ok := splitName(key)
	if !ok {
		return nil, fmt.Errorf("%q is not a subscription's key", key)
	}
	uid, err := uuid.Parse(p.Uid)
	if err != nil {
		return nil, fmt.Errorf("read uid: %w", err)
	}
	fillDefaults(p)
	s, err := compile(p, ns, id, uid, conds.condition(p.Condition), policies)
	if err != nil {
		return nil, err
	}
	s.Revision = revision
	return s, nil
}

// compile unpacks a message with defaults, of which it keeps nothing but the name.
func compile(p *grapnelv1.Subscription, ns, id string, uid uuid.UUID, cond *condition, policies *sharer) (*Subscription, error) {
	own, shared, err := split(p)
	if err != nil {
		return nil, err
	}
	s := &Subscription{
		Namespace: ns, ID: id, UID: uid, State: p.State, Policy: policies.policy(p, shared),
		name: p.Name, created: p.CreateTime.AsTime().UnixNano(), own: own, condition: cond,
	}
	if len(p.EventTypes) > 0 {
		s.globs = make([]string, len(p.EventTypes))
	}
	for i, glob := range p.EventTypes {
		s.globs[i] = within(own, glob)
	}
	return s, nil
}

// newPolicy unpacks a message's; values out of range are brought into it, so that a stored value made by someone else cannot
// make dispatch spin.
func newPolicy(p *grapnelv1.Subscription, encoded string) *Policy {
	r := p.RetryPolicy
	return &Policy{
		AttemptTimeout: clamp(p.AttemptTimeout.AsDuration(), time.Second, time.Minute),
		MaxInFlight:    int(clamp(p.MaxInFlight, 1, 1000)),
		MaxRate:        clamp(finite(p.MaxRate), 0, 10000),
		MaxAttempts:    int(clamp(r.MaxAttempts, 1, 100)),
		MaxAge:         clamp(r.MaxAge.AsDuration(), time.Minute, 30*24*time.Hour),
		Schedule:       unroll(r),
		Jitter:         clamp(finite(r.GetJitter()), 0, 1),
		IgnoreGone:     p.FailurePolicy.IgnoreGone,
		DisableAfter:   clamp(p.FailurePolicy.DisableAfter.AsDuration(), 0, 30*24*time.Hour),
		Ordered:        p.Ordered,
		BlocksKeys:     p.Ordered && p.OnExhausted == grapnelv1.Subscription_ON_EXHAUSTED_BLOCK,
		Batching:       batchingOf(p.Batching),
		DeadLetter:     p.DeadLetter,
		encoded:        encoded,
	}
}

// NewNamespace compiles a namespace without etcd, for tests of readers. p.Name must be set; a missing uid is zero.
func NewNamespace(p *grapnelv1.Namespace) (*Namespace, error) {
	ns, kind, _, ok := splitName(p.GetName())
	if !ok || kind != "" {
		return nil, fmt.Errorf("%q is not a namespace's name", p.GetName())
	}
	var uid uuid.UUID
	if p.Uid != "" {
		var err error
		if uid, err = uuid.Parse(p.Uid); err != nil {
			return nil, fmt.Errorf("namespace %s: uid: %w", p.Name, err)
		}
	}
	return compileNamespace(p, ns, uid)
}

// compileNamespace unpacks a message, of which it keeps nothing but the quota.
func compileNamespace(p *grapnelv1.Namespace, id string, uid uuid.UUID) (*Namespace, error) {
	bare := proto.CloneOf(p)
	bare.Name, bare.Etag = "", ""
	own, err := marshal(bare)
	return &Namespace{
		ID: id, UID: uid, State: p.State, RequireEventTypes: p.RequireEventTypes, weight: p.Weight, quota: p.Quota, own: string(own),
	}, err
}

// unroll returns the delays before attempt 2, 3, …
func unroll(r *grapnelv1.RetryPolicy) []time.Duration {
	const longest = 24 * time.Hour
	if len(r.GetSchedule()) > 0 {
		out := make([]time.Duration, min(len(r.Schedule), 99))
		for i := range out {
			out[i] = clamp(r.Schedule[i].AsDuration(), 0, longest)
		}
		return out
	}
	var out []time.Duration
	delay := float64(r.GetInitialBackoff().AsDuration())
	most := float64(clamp(r.GetMaxBackoff().AsDuration(), time.Second, longest))
	for range clamp(r.GetMaxAttempts(), 1, 100) - 1 {
		out = append(out, time.Duration(clamp(delay, float64(time.Second), most)))
		delay = min(most, delay*clamp(finite(r.GetMultiplier()), 1, 10))
	}
	return out
}

func clamp[T int32 | float64 | time.Duration](v, least, most T) T {
	return min(max(v, least), most)
}

func finite(v float64) float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return 0
	}
	return v
}

// etag is a revision in base 36.
func etag(revision int64) string { return strconv.FormatInt(revision, 36) }
