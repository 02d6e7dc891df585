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
	return compile(p, ns, id, uid, cond), nil
}

// decode reads a stored value. It checks what identity and safety hang on; a subscription that a later
// rule would refuse is still served.
func decode(key string, value []byte, revision int64, conds *conditions) (*Subscription, error) {
	p := &grapnelv1.Subscription{}
	if err := proto.Unmarshal(value, p); err != nil {
		return nil, fmt.Errorf("read subscription: %w", err)
	}
	if p.Name != key {
		return nil, fmt.Errorf("holds the subscription %q", p.Name)
	}
	ns, _, id, ok := splitName(p.Name)
	if !ok {
		return nil, fmt.Errorf("%q is not a subscription's key", key)
	}
	uid, err := uuid.Parse(p.Uid)
	if err != nil {
		return nil, fmt.Errorf("read uid: %w", err)
	}
	fillDefaults(p)
	p.Etag = etag(revision)
	s := compile(p, ns, id, uid, conds.condition(p.Condition))
	s.Revision = revision
	return s, nil
}

// compile unpacks a message with defaults; values out of range are brought into it, so that a stored
// value made by someone else cannot make dispatch spin.
func compile(p *grapnelv1.Subscription, ns, id string, uid uuid.UUID, cond *condition) *Subscription {
	r := p.RetryPolicy
	return &Subscription{
		Proto:          p,
		Namespace:      ns,
		ID:             id,
		UID:            uid,
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
		globs:          p.EventTypes,
		condition:      cond,
	}
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
