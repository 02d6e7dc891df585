package subscription

import (
	"time"

	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// maxShared bounds how many different parts of subscriptions are remembered for others to share.
const maxShared = 4096

// sharer gives equal parts of subscriptions one place in memory: most have the same policies, above all the
// default ones, which are more than half of what a subscription takes. For one goroutine.
type sharer struct {
	parts     map[string]proto.Message
	schedules map[*grapnelv1.RetryPolicy][]time.Duration
}

// share replaces parts of a subscription that nobody else has seen yet.
func (h *sharer) share(s *Subscription) {
	if max(len(h.parts), len(h.schedules)) >= maxShared || h.parts == nil {
		h.parts, h.schedules = make(map[string]proto.Message), make(map[*grapnelv1.RetryPolicy][]time.Duration)
	}
	p := s.Proto
	p.Transport = part(h, "t", p.Transport)
	for i := range p.Signers {
		p.Signers[i] = part(h, "s", p.Signers[i])
	}
	p.PayloadShape = part(h, "p", p.PayloadShape)
	p.AttemptTimeout = part(h, "a", p.AttemptTimeout)
	p.FailurePolicy = part(h, "f", p.FailurePolicy)
	p.RetryPolicy = part(h, "r", p.RetryPolicy)
	if schedule, ok := h.schedules[p.RetryPolicy]; ok {
		s.Schedule = schedule
	} else {
		h.schedules[p.RetryPolicy] = s.Schedule
	}
}

// maxSharedBytes keeps large parts, of which no two are equal, from being remembered.
const maxSharedBytes = 512

// part returns the message, or one of its kind that is equal.
func part[M proto.Message](h *sharer, kind string, m M) M {
	key, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend([]byte(kind), m)
	if err != nil || len(key) > maxSharedBytes {
		return m
	}
	if known, ok := h.parts[string(key)].(M); ok {
		return known
	}
	h.parts[string(key)] = m
	return m
}
