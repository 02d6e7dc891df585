package subscription

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

var (
	// policyFields are those of the message that the policy is made of, with what else most have the same of.
	policyFields = fieldNumbers("attempt_timeout", "retry_policy", "max_rate", "max_in_flight", "ordered", "failure_policy",
		"payload_shape", "on_exhausted", "dead_letter", "batching")
	// knownFields are those that are not encoded, since the Subscription has them.
	knownFields = fieldNumbers("name", "etag")
)

func fieldNumbers(names ...protoreflect.Name) []protowire.Number {
	fields := (&grapnelv1.Subscription{}).ProtoReflect().Descriptor().Fields()
	out := make([]protowire.Number, len(names))
	for i, name := range names {
		out[i] = fields.ByName(name).Number()
	}
	return out
}

// split encodes a message in two parts, own and what the policy is made of.
func split(p *grapnelv1.Subscription) (own, policy string, err error) {
	all, err := marshal(p)
	if err != nil {
		return "", "", err
	}
	var mine, shared []byte
	for len(all) > 0 {
		number, _, n := protowire.ConsumeField(all)
		if n < 0 {
			return "", "", fmt.Errorf("encode: %w", protowire.ParseError(n))
		}
		switch {
		case slices.Contains(policyFields, number):
			shared = append(shared, all[:n]...)
		case !slices.Contains(knownFields, number):
			mine = append(mine, all[:n]...)
		}
		all = all[n:]
	}
	return string(mine), string(shared), nil
}

// Proto is the stored message with all defaults filled in. It is decoded at each call and the caller's, but that of a
// Subscription made by Of is the one it was made of.
func (s *Subscription) Proto() *grapnelv1.Subscription {
	if s.whole != nil {
		return s.whole
	}
	p := &grapnelv1.Subscription{}
	for _, part := range []string{s.own, s.encoded} { // encoded by split: both can be read
		_ = proto.UnmarshalOptions{Merge: true}.Unmarshal([]byte(part), p)
	}
	p.Name = s.name
	if s.Revision != 0 {
		p.Etag = etag(s.Revision)
	}
	return p
}

// Proto is the stored message, whose quota is to be read through Quota. It is decoded at each call and the caller's.
func (n *Namespace) Proto() *grapnelv1.Namespace {
	p := &grapnelv1.Namespace{}
	_ = proto.Unmarshal([]byte(n.own), p) // encoded here
	p.Name = namespaceName(n.ID)
	if n.Revision != 0 {
		p.Etag = etag(n.Revision)
	}
	return p
}

// value is the message as it is stored.
func (n *Namespace) value() ([]byte, error) {
	p := n.Proto()
	p.Etag = ""
	return marshal(p)
}

// Name is the full resource name.
func (s *Subscription) Name() string {
	if s.whole != nil {
		return s.whole.Name
	}
	return s.name
}

// Mentions reports whether a text stands anywhere in the message, but for its name, etag and policy. It costs much less than
// to decode it.
func (s *Subscription) Mentions(text string) bool {
	return s.whole != nil || strings.Contains(s.own, text)
}

// CreateTime is when it was created, by the clock of the server that did.
func (s *Subscription) CreateTime() time.Time { return time.Unix(0, s.created).UTC() }

// within returns the same text as a part of another one, which holds it, so that it takes no memory of its own.
func within(text, part string) string {
	at := strings.Index(text, part)
	if at < 0 {
		return part
	}
	return text[at : at+len(part)]
}

const (
	// maxShared bounds how many different policies are remembered for others to share.
	maxShared = 4096
	// maxSharedBytes keeps large ones, of which no two are equal, from being remembered.
	maxSharedBytes = 1024
)

// sharer gives equal policies one place in memory: most subscriptions have the same, above all the default one. For one
// goroutine. A nil one shares nothing.
type sharer struct {
	policies map[string]*Policy
}

// policy is that of a message, of which encoded is split's part.
func (h *sharer) policy(p *grapnelv1.Subscription, encoded string) *Policy {
	if h == nil || len(encoded) > maxSharedBytes {
		return newPolicy(p, encoded)
	}
	known := h.policies[encoded]
	if known == nil {
		if h.policies == nil || len(h.policies) >= maxShared {
			h.policies = make(map[string]*Policy)
		}
		known = newPolicy(p, encoded)
		h.policies[encoded] = known
	}
	return known
}
