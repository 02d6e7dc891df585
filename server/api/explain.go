package api

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/subscription"
)

// MatchSubscriptions says what the subscriptions of a namespace would make of an event.
func (s subscriptionService) MatchSubscriptions(ctx context.Context, r *grapnelv1.MatchSubscriptionsRequest) (*grapnelv1.MatchSubscriptionsResponse, error) {
	ns, _, err := s.existingNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	event, faults := eventOf(ns, r.GetEvent(), time.Now())
	if len(faults) > 0 {
		return nil, invalid(under("event", faults)...)
	}
	text, err := proto.MarshalOptions{Deterministic: true}.Marshal(r.GetEvent())
	if err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	sum := sha256.Sum256(text)
	query := []string{"MatchSubscriptions", r.GetParent(), string(sum[:]), fmt.Sprint(r.GetMatchingOnly())}
	after, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	snapshot := s.Registry.Snapshot()
	candidate := ingest.Candidate(event)
	dry := dryRun{snapshot: snapshot, candidate: &candidate}
	page := takePage(until(ctx, snapshot.Subscriptions(ns, after)), size,
		func(sub *subscription.Subscription) bool { return !r.GetMatchingOnly() || dry.wanted(sub) },
		func(sub *subscription.Subscription) string { return sub.ID }, dry.match)
	if err := context.Cause(ctx); err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	return &grapnelv1.MatchSubscriptionsResponse{Matches: page.items, NextPageToken: s.pages.seal(page.next, query...)}, nil
}

// until goes through all until ctx ends: what is done with each may take long.
func until[T any](ctx context.Context, all iter.Seq[T]) iter.Seq[T] {
	return func(yield func(T) bool) {
		for item := range all {
			if ctx.Err() != nil || !yield(item) {
				return
			}
		}
	}
}

func matches(v grapnelv1.SubscriptionMatch_Verdict) bool {
	switch v {
	case grapnelv1.SubscriptionMatch_VERDICT_MATCHED, grapnelv1.SubscriptionMatch_VERDICT_HELD, grapnelv1.SubscriptionMatch_VERDICT_SKIPPED:
		return true
	}
	return false
}

// dryRun is an event as the subscriptions of a snapshot would see it.
type dryRun struct {
	snapshot  *subscription.Snapshot
	candidate *subscription.Candidate
}

// wanted reports whether a subscription would match the event. It costs much less than to say why.
func (d dryRun) wanted(sub *subscription.Subscription) bool {
	wants, err := sub.Judge(d.candidate)
	return wants && err == nil
}

// match is what a subscription makes of the event as it stands now.
func (d dryRun) match(sub *subscription.Subscription) *grapnelv1.SubscriptionMatch {
	opinion := sub.Explain(d.candidate)
	m := &grapnelv1.SubscriptionMatch{Subscription: subscriptionName(sub.Namespace, sub.ID), Reason: opinion.Text}
	for _, seen := range opinion.Seen {
		m.Values = append(m.Values, &grapnelv1.ConditionValue{Expression: seen.Expression, Value: seen.Value})
	}
	switch opinion.Verdict {
	case subscription.OtherType:
		m.Verdict = grapnelv1.SubscriptionMatch_VERDICT_TYPE_DIFFERS
	case subscription.ConditionFalse:
		m.Verdict = grapnelv1.SubscriptionMatch_VERDICT_CONDITION_FALSE
	case subscription.ConditionFails:
		m.Verdict = grapnelv1.SubscriptionMatch_VERDICT_CONDITION_ERROR
	default:
		m.Verdict, m.Reason = d.destiny(sub)
	}
	return m
}

// destiny is what happens to events that match, from the widest reason to the narrowest.
func (d dryRun) destiny(sub *subscription.Subscription) (grapnelv1.SubscriptionMatch_Verdict, string) {
	ns := d.snapshot.Namespace(sub.Namespace)
	switch {
	case ns.Disabled():
		return grapnelv1.SubscriptionMatch_VERDICT_SKIPPED, "the namespace is disabled" + because(ns.Proto().GetStateReason())
	case sub.State == grapnelv1.Subscription_STATE_DISABLED:
		return grapnelv1.SubscriptionMatch_VERDICT_SKIPPED, "the subscription is disabled" + because(sub.Proto().GetStateReason())
	case d.snapshot.Dispatch().Paused:
		return grapnelv1.SubscriptionMatch_VERDICT_HELD, "all dispatch is paused" + because(d.snapshot.Dispatch().Reason)
	case ns.State == grapnelv1.Namespace_STATE_PAUSED:
		return grapnelv1.SubscriptionMatch_VERDICT_HELD, "the namespace is paused" + because(ns.Proto().GetStateReason())
	case sub.State == grapnelv1.Subscription_STATE_PAUSED:
		return grapnelv1.SubscriptionMatch_VERDICT_HELD, "the subscription is paused" + because(sub.Proto().GetStateReason())
	}
	return grapnelv1.SubscriptionMatch_VERDICT_MATCHED, ""
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return " (" + reason + ")"
}

// ExplainEvent tells what has become of an event.
func (s eventService) ExplainEvent(ctx context.Context, r *grapnelv1.ExplainEventRequest) (*grapnelv1.ExplainEventResponse, error) {
	ns, ev, err := s.event(r.GetName())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	x := explanation{Server: s.Server, ns: ns, event: ev, size: size, out: &grapnelv1.ExplainEventResponse{Event: eventProto(ns, ev, false)}}
	if name := r.GetSubscription(); name != "" {
		if x.only, err = s.onlyAccountOf(ns, name); err != nil {
			return nil, err
		}
	}
	query := []string{"ExplainEvent", r.GetName(), r.GetSubscription()}
	token, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	next, err := x.page(ctx, token)
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	x.out.NextPageToken = s.pages.seal(next, query...)
	return x.out, nil
}

// onlyAccountOf finds the one subscription that is asked about.
func (s *Server) onlyAccountOf(ns, name string) (*subscription.Subscription, error) {
	in, id, err := parseName("subscription", name, collectionSubscriptions)
	if err != nil {
		return nil, err
	}
	if in != ns {
		return nil, invalid(Violation{"subscription", "must be of the event's namespace, " + namespaceName(ns), "subscription_namespace"})
	}
	sub := s.Registry.Snapshot().Subscription(ns, id)
	if sub == nil {
		return nil, notFound(name, "subscription")
	}
	return sub, nil
}

// explanation is one ExplainEvent call.
type explanation struct {
	*Server
	ns    string
	event *delivery.Event
	only  *subscription.Subscription // nil: all
	size  int
	bytes pageBytes
	out   *grapnelv1.ExplainEventResponse
}

// subscriptionsAfter begins the token of pages that have come to subscriptions without a delivery; others are a
// delivery's id, which has no such letter.
const subscriptionsAfter = "/"

// page fills the page after a token, and returns the next one's; empty when nothing follows.
func (x *explanation) page(ctx context.Context, token string) (string, error) {
	after, others := strings.CutPrefix(token, subscriptionsAfter)
	if !others {
		next, err := x.delivered(token)
		if next != "" || err != nil {
			return next, err
		}
		after = ""
	}
	return x.notDelivered(ctx, after)
}

// delivered adds the event's deliveries after one.
func (x *explanation) delivered(after string) (next string, err error) {
	q := delivery.Query{Namespace: x.event.Namespace, EventUID: x.event.UID, Limit: x.size, After: after}
	if x.only != nil {
		q.Subscription = delivery.UID(x.only.UID).SubscriptionKey()
	}
	page, err := x.Journal.Deliveries(q)
	if err != nil {
		return "", err
	}
	for i, d := range page.Deliveries {
		account, err := x.account(d)
		if errors.Is(err, delivery.ErrNotFound) {
			continue // its retention ended meanwhile
		}
		if err != nil {
			return "", err
		}
		if x.bytes.full(account) {
			return page.Deliveries[i-1].ID.String(), nil
		}
		x.out.Accounts = append(x.out.Accounts, account)
	}
	return page.Next, nil
}

func (x *explanation) account(d *delivery.Delivery) (*grapnelv1.EventAccount, error) {
	attempts, err := x.Journal.Attempts(d.Namespace, d.ID)
	if err != nil {
		return nil, err
	}
	m := x.deliveryProto(x.ns, d, x.inFlight(d))
	account := &grapnelv1.EventAccount{Subscription: m.GetSubscription(), Delivery: m, Cause: x.cause(d, m)}
	for i := max(0, len(attempts)-maxAttemptsPage); i < len(attempts); i++ {
		account.Attempts = append(account.Attempts, x.attemptProto(&attempts[i], false))
	}
	return account, nil
}

// notDelivered adds what subscriptions make of the event that have no delivery of it, after the one with an id.
func (x *explanation) notDelivered(ctx context.Context, after string) (next string, err error) {
	room := x.size - len(x.out.GetAccounts())
	if room == 0 {
		return subscriptionsAfter + after, nil
	}
	keys, err := x.Journal.Receivers(x.event)
	if err != nil {
		return "", err
	}
	had := make(map[delivery.SubscriptionKey]bool, len(keys))
	for _, key := range keys {
		had[key] = true
	}
	snapshot := x.Registry.Snapshot()
	all := snapshot.Subscriptions(x.ns, after)
	if x.only != nil {
		all = func(yield func(*subscription.Subscription) bool) { yield(x.only) }
	}
	candidate := ingest.Candidate(x.event)
	dry := dryRun{snapshot: snapshot, candidate: &candidate}
	page := takePage(until(ctx, all), room,
		func(sub *subscription.Subscription) bool { return !had[delivery.UID(sub.UID).SubscriptionKey()] },
		func(sub *subscription.Subscription) string { return sub.ID },
		func(sub *subscription.Subscription) *grapnelv1.EventAccount {
			match := x.hindsight(sub, dry.match(sub))
			return &grapnelv1.EventAccount{Subscription: match.GetSubscription(), Match: match, Cause: match.GetReason()}
		})
	next = subscriptionsAfter + after
	for _, account := range page.items {
		if x.bytes.full(account) {
			return next, nil
		}
		x.out.Accounts = append(x.out.Accounts, account)
		next = subscriptionsAfter + strings.TrimPrefix(account.GetSubscription(), subscriptionName(x.ns, ""))
	}
	if page.next == "" {
		return "", context.Cause(ctx)
	}
	return subscriptionsAfter + page.next, context.Cause(ctx)
}

// hindsight says why a subscription that would match the event as it is now has nothing of it.
func (x *explanation) hindsight(sub *subscription.Subscription, m *grapnelv1.SubscriptionMatch) *grapnelv1.SubscriptionMatch {
	if x.event.Purged != nil && m.GetVerdict() != grapnelv1.SubscriptionMatch_VERDICT_TYPE_DIFFERS {
		m.Verdict, m.Values = grapnelv1.SubscriptionMatch_VERDICT_CONDITION_ERROR, nil
		m.Reason = "the event's payload was purged " + clock(x.event.Purged.Time) + ": whether the subscription would match cannot be told any more"
		return m
	}
	if !matches(m.GetVerdict()) {
		return m
	}
	if created := sub.CreateTime(); created.After(x.event.AcceptTime) {
		m.Verdict = grapnelv1.SubscriptionMatch_VERDICT_CREATED_LATER
		m.Reason = "the subscription was created " + clock(created) + ", after the event had been accepted; a replay with missing_only sends it what it missed"
		return m
	}
	m.Verdict = grapnelv1.SubscriptionMatch_VERDICT_CHANGED
	m.Reason = "the subscription would match as it is since " + clock(sub.Proto().GetUpdateTime().AsTime()) + "; when the event was accepted it did not"
	for _, f := range x.event.Faults {
		if f.Subscription == sub.ID {
			m.Reason += ", because its condition could not be evaluated: " + f.Text
		}
	}
	return m
}

// cause says in a sentence why a delivery stands as it does. m is how it is shown.
func (s *Server) cause(d *delivery.Delivery, m *grapnelv1.Delivery) string {
	last := lastWords(d)
	switch m.GetState() {
	case grapnelv1.Delivery_STATE_IN_FLIGHT:
		if m.GetStateReason() != "" {
			return fmt.Sprintf("attempt %d has begun, and is %s", d.Attempts+1, m.GetStateReason())
		}
		return fmt.Sprintf("attempt %d is running", d.Attempts+1)
	case grapnelv1.Delivery_STATE_SUCCEEDED:
		return fmt.Sprintf("the target accepted attempt %d", d.Attempts) + last
	case grapnelv1.Delivery_STATE_EXHAUSTED:
		if m.GetStateReason() != "" {
			return "given up: " + m.GetStateReason() + last
		}
		return fmt.Sprintf("given up after %d attempts", d.Attempts) + last
	case grapnelv1.Delivery_STATE_REJECTED:
		if d.Last != nil && d.Last.Error != "" && strings.Contains(m.GetStateReason(), d.Last.Error) {
			return "given up, since trying again is useless: " + m.GetStateReason()
		}
		return "given up, since trying again is useless" + last + because(m.GetStateReason())
	case grapnelv1.Delivery_STATE_CANCELLED:
		return "cancelled" + because(m.GetStateReason())
	case grapnelv1.Delivery_STATE_SKIPPED:
		if strings.HasPrefix(d.StateReason, delivery.ReasonDropped) {
			return m.GetStateReason() + "; a replay has the transformer look again"
		}
		return "the subscription or its namespace was disabled when the event was accepted; a replay sends it"
	}
	switch due := m.GetNextAttemptTime().AsTime(); {
	case m.GetStateReason() != "":
		return m.GetStateReason()
	case due.After(time.Now()) && d.Attempts == 0:
		return "waits for its deliver_time, " + clock(due)
	case due.After(time.Now()):
		return fmt.Sprintf("attempt %d of %d is due %s", d.Attempts+1, d.MaxAttempts, clock(due)) + last
	}
	return "is due, " + s.lineWords(laneOf(d))
}

// lineWords says what a delivery that is due waits for while its lane is open.
func (s *Server) lineWords(lane delivery.LaneKey) string {
	st := s.Engine.Status(lane)
	words := fmt.Sprintf("and waits for its turn: %d attempts of its subscription are running, of %d at once", st.GetInFlight(), st.GetInFlightLimit())
	if why := st.GetLimitReason(); why != "" {
		words += because(why)
	}
	return words + fmt.Sprintf(", and %d deliveries are open", s.Journal.OpenOf(lane))
}

// lastWords tells of the last attempt, behind a sentence.
func lastWords(d *delivery.Delivery) string {
	switch {
	case d.Last == nil:
		return ""
	case d.Last.Error != "":
		return ": " + d.Last.Error
	case d.Last.ResponseCode != 0:
		return fmt.Sprintf(": %d", d.Last.ResponseCode)
	}
	return ": " + strings.ToLower(strings.TrimPrefix(grapnelv1.Attempt_Outcome(d.Last.Outcome).String(), "OUTCOME_"))
}

func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }
