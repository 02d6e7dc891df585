package subscription

import (
	"slices"
	"strings"
)

// OperationalPrefix begins the types of operational events, which the server makes itself, and no others: publishers
// are refused it. See docs/operational-events.md.
const OperationalPrefix = "grapnel."

// OperationalSource, with a namespace's ID behind it, is the source of operational events. Publishers are refused what begins
// with it, so that no event of theirs is taken for one of these by its source and ID. Theirs is //grapnel/NAMESPACE by default.
const OperationalSource = "//grapnel/namespaces/"

// Operational reports whether events of a type are operational; of a glob, whether it may cover such types. A glob
// covers none unless it begins with the prefix itself, so that those who want everything get what is published.
func Operational(eventType string) bool { return strings.HasPrefix(eventType, OperationalPrefix) }

// globCovers reports whether a glob covers a type.
func globCovers(glob, eventType string) bool {
	return (Operational(glob) || !Operational(eventType)) && globMatch(glob, eventType)
}

// listens reports whether the subscription may want operational events.
func (s *Subscription) listens() bool { return s != nil && slices.ContainsFunc(s.globs, Operational) }

// Listens reports whether a subscription of the namespace may want operational events. It does not go through them.
func (s *Snapshot) Listens(ns string) bool {
	t, ok := s.tenants.Get(ns)
	return ok && t.namespace != nil && t.listeners > 0
}

// Covers reports whether a subscription of the namespace covers an operational type, whatever its condition and its state.
// It does not go through those that do not.
func (s *Snapshot) Covers(ns, eventType string) bool {
	if !Operational(eventType) || !s.Listens(ns) {
		return false
	}
	t, _ := s.tenants.Get(ns)
	return !t.namespace.Deleted() && len(s.byType(t, eventType).subs) > 0
}

// about reports whether an event is operational and about the subscription itself, which is told nothing of that: what
// fails there would be told there, and fail.
func (s *Subscription) about(c *Candidate) bool {
	return Operational(c.Type) && c.Subject == s.Name()
}

// others are the subscriptions but for the one that an operational event is about.
func others(subs []*Subscription, c *Candidate) []*Subscription {
	if !Operational(c.Type) {
		return subs
	}
	at := slices.IndexFunc(subs, func(s *Subscription) bool { return s.about(c) })
	if at < 0 {
		return subs
	}
	return slices.Concat(subs[:at], subs[at+1:])
}
