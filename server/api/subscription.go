package api

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"iter"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// subscriptionOutputOnly are the fields of Subscription that callers cannot set.
var subscriptionOutputOnly = []string{
	"name", "uid", "state", "state_reason", "create_time", "update_time", "etag",
}

// cancelTime bounds how long DeleteSubscription waits for its open deliveries to be cancelled. The rest is
// cancelled by dispatch, which sees the subscription gone.
const cancelTime = 10 * time.Second

// SubscriptionDeleted is the reason of a delivery that was cancelled for the deletion of its subscription.
const SubscriptionDeleted = "subscription deleted"

// CreateSubscription adds a subscription when everything about it is right, its plugins' opinion included, and
// its target agrees to deliveries where the transport asks.
func (s subscriptionService) CreateSubscription(ctx context.Context, r *grapnelv1.CreateSubscriptionRequest) (*grapnelv1.CreateSubscriptionResponse, error) {
	ns, err := parseNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	id := r.GetSubscriptionId()
	if id == "" {
		id = pickID("sub-", ns, r.GetRequestId())
	}
	name := subscriptionName(ns, id)
	if err := s.writable(ns); err != nil {
		return nil, err
	}
	content := &grapnelv1.Subscription{}
	if err := applyMask(content, proto.CloneOf(r.GetSubscription()), nil, subscriptionOutputOnly...); err != nil {
		return nil, err
	}
	s.defaultTransport(content)
	warnings, err := s.check(ctx, name, content)
	if err != nil {
		return nil, toStatus(err, name)
	}
	var answered []string
	made, err := s.Registry.CreateSubscription(ctx, ns, id, content, subscription.CreateOptions{
		RequestID: r.GetRequestId(), ValidateOnly: r.GetValidateOnly(), Approve: s.approval(&answered),
		State: r.GetInitialState(), StateReason: r.GetStateReason(),
	})
	if err != nil {
		return nil, toStatus(err, name)
	}
	stored := made.Proto()
	if r.GetValidateOnly() {
		// What identifies a stored one would be another next time.
		stored.Uid, stored.CreateTime, stored.UpdateTime = "", nil, nil
	}
	return &grapnelv1.CreateSubscriptionResponse{Subscription: stored, Warnings: append(warnings, answered...)}, nil
}

// pickID makes the id, behind a prefix, of a resource for which the caller named none. The same request id gives the
// same id, so that a repeated call finds what the first one made.
func pickID(prefix, ns, requestID string) string {
	text := rand.Text()
	if requestID != "" {
		sum := sha256.Sum256([]byte(ns + "/" + strings.ToLower(requestID)))
		text = base32.StdEncoding.EncodeToString(sum[:])
	}
	return prefix + strings.ToLower(text[:16])
}

// writable refuses changes in a namespace that is not there or waits to be erased. The registry checks it
// again in the transaction that writes.
func (s *Server) writable(ns string) error {
	n := s.Registry.Snapshot().Namespace(ns)
	switch {
	case n == nil:
		return notFound(namespaceName(ns), "namespace")
	case n.Deleted():
		return invalidState(namespaceName(ns), namespaceName(ns)+" is deleted; nothing in it can be changed")
	}
	return nil
}

// GetSubscription reads one subscription.
func (s subscriptionService) GetSubscription(_ context.Context, r *grapnelv1.GetSubscriptionRequest) (*grapnelv1.GetSubscriptionResponse, error) {
	sub, err := s.find(r.GetName())
	if err != nil {
		return nil, err
	}
	return &grapnelv1.GetSubscriptionResponse{Subscription: sub.Proto(), Status: s.status(sub)}, nil
}

// status tells how a subscription goes.
func (s subscriptionService) status(sub *subscription.Subscription) *grapnelv1.SubscriptionStatus {
	lane := s.lane(sub)
	status := s.Engine.Status(lane)
	status.OpenDeliveries = clampInt32(s.Journal.OpenOf(lane))
	var last *subscription.ConditionError
	if status.ConditionErrors, last = sub.ConditionErrors(); last != nil {
		status.LastConditionError, status.LastConditionErrorTime = last.Text, stamp(last.Time)
	}
	return status
}

// find looks a subscription up by its full name.
func (s subscriptionService) find(name string) (*subscription.Subscription, error) {
	ns, id, err := parseName("name", name, collectionSubscriptions)
	if err != nil {
		return nil, err
	}
	sub := s.Registry.Snapshot().Subscription(ns, id)
	if sub == nil {
		return nil, absent(name, s.Registry.Broken())
	}
	return sub, nil
}

// ListSubscriptions reads one page in name order, of one namespace or of all.
func (s subscriptionService) ListSubscriptions(_ context.Context, r *grapnelv1.ListSubscriptionsRequest) (*grapnelv1.ListSubscriptionsResponse, error) {
	ns, err := s.listedNamespace(r.GetParent())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	keep, err := subscriptionFilter(r.GetFilter())
	if err != nil {
		return nil, err
	}
	query := []string{"ListSubscriptions", r.GetParent(), r.GetFilter()}
	after, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	snapshot := s.Registry.Snapshot()
	list := func(ns, after string) iter.Seq[*subscription.Subscription] { return snapshot.Subscriptions(ns, after) }
	page := takePage(inNamespaces(snapshot, ns, after, list), size, keep,
		func(sub *subscription.Subscription) string { return sub.Namespace + "/" + sub.ID },
		func(sub *subscription.Subscription) *grapnelv1.Subscription { return sub.Proto() })
	return &grapnelv1.ListSubscriptionsResponse{Subscriptions: page.items, NextPageToken: s.pages.seal(page.next, query...)}, nil
}

// UpdateSubscription changes the fields that the mask names, under an etag when one is sent. A new target is
// asked whether it agrees, as in CreateSubscription.
func (s subscriptionService) UpdateSubscription(ctx context.Context, r *grapnelv1.UpdateSubscriptionRequest) (*grapnelv1.UpdateSubscriptionResponse, error) {
	name := r.GetSubscription().GetName()
	ns, id, err := parseName("subscription.name", name, collectionSubscriptions)
	if err != nil {
		return nil, err
	}
	if err := s.writable(ns); err != nil {
		return nil, err
	}
	var warnings, answered []string
	// The registry calls this again when somebody else's change comes between, each time with what is
	// stored then; so what it works on is copied from the request each time.
	mutate := func(stored *grapnelv1.Subscription) error {
		before := proto.CloneOf(stored)
		mask := r.GetUpdateMask()
		if before.GetUid() == "" {
			mask = nil // made anew: everything in the request counts
		}
		if err := applyMask(stored, proto.CloneOf(r.GetSubscription()), mask, subscriptionOutputOnly...); err != nil {
			return err
		}
		chooseRetryForm(stored, r.GetSubscription(), mask)
		s.defaultTransport(stored)
		warnings, err = s.check(ctx, name, stored)
		if errors.Is(err, ErrPluginUnavailable) && sameTarget(before, stored) {
			// What the plugin would be asked about is stored already: limits can be changed without it.
			err = nil
		}
		return err
	}
	sub, err := s.Registry.UpdateSubscription(ctx, ns, id, r.GetSubscription().GetEtag(), mutate, subscription.UpdateOptions{
		AllowMissing: r.GetAllowMissing(), ValidateOnly: r.GetValidateOnly(), Approve: s.approval(&answered),
	})
	if err != nil {
		return nil, toStatus(err, name)
	}
	return &grapnelv1.UpdateSubscriptionResponse{Subscription: sub.Proto(), Warnings: append(warnings, answered...)}, nil
}

// chooseRetryForm drops the form of the retry policy that was stored, schedule or backoff, when an update is about the
// other alone: the two exclude each other, and one of them is always stored.
func chooseRetryForm(stored, sent *grapnelv1.Subscription, mask *fieldmaskpb.FieldMask) {
	policy := stored.GetRetryPolicy()
	if policy == nil {
		return
	}
	schedule := mentions(sent, mask, "retry_policy.schedule")
	backoff := mentions(sent, mask, "retry_policy.initial_backoff") || mentions(sent, mask, "retry_policy.max_backoff") ||
		mentions(sent, mask, "retry_policy.multiplier")
	isBackoff := policy.GetInitialBackoff() != nil || policy.GetMaxBackoff() != nil || policy.GetMultiplier() != 0
	switch {
	case schedule == backoff:
	case backoff && isBackoff:
		policy.Schedule = nil
	case schedule && len(policy.GetSchedule()) > 0:
		policy.InitialBackoff, policy.MaxBackoff, policy.Multiplier = nil, nil, 0
	}
}

// DeleteSubscription removes a subscription, cancels its open deliveries and says how many.
func (s subscriptionService) DeleteSubscription(ctx context.Context, r *grapnelv1.DeleteSubscriptionRequest) (*grapnelv1.DeleteSubscriptionResponse, error) {
	ns, id, err := parseName("name", r.GetName(), collectionSubscriptions)
	if err != nil {
		return nil, err
	}
	// Dispatch would cancel, too, as soon as it sees the subscription gone, and the count would be won by a race.
	claimed := make(map[delivery.LaneKey]func())
	defer func() {
		for _, done := range claimed {
			done()
		}
	}()
	gone, err := s.Registry.DeleteSubscription(ctx, ns, id, r.GetEtag(), func(n *subscription.Namespace, sub *subscription.Subscription) {
		lane := delivery.LaneKey{Namespace: delivery.UID(n.UID).NamespaceKey(), Subscription: delivery.UID(sub.UID).SubscriptionKey()}
		if claimed[lane] == nil {
			claimed[lane] = s.Engine.Deleting(lane)
		}
	})
	if err != nil {
		if r.GetAllowMissing() && errors.Is(err, subscription.ErrNotFound) {
			return &grapnelv1.DeleteSubscriptionResponse{}, nil
		}
		return nil, toStatus(err, r.GetName())
	}
	bounded, cancel := context.WithTimeout(ctx, cancelTime)
	defer cancel()
	n := s.cancelOpen(bounded, gone, SubscriptionDeleted, nil)
	return &grapnelv1.DeleteSubscriptionResponse{CancelledDeliveries: clampInt32(int64(n))}, nil
}

// cancelOpen cancels what a deleted subscription leaves open and says how many there were. It is deleted, so
// the caller's answer is OK whatever happens here: dispatch cancels the rest when it meets it. It stops when while,
// unless nil, says false.
func (s *Server) cancelOpen(ctx context.Context, gone *subscription.Subscription, reason string, while func() bool) int {
	n, err := s.Engine.CancelLane(ctx, s.lane(gone), reason, while)
	if err != nil {
		s.log.WarnContext(ctx, "open deliveries of a deleted subscription are left to dispatch",
			"subscription_id", gone.ID, "cancelled", n, "err", err)
	}
	return n
}

// lane is the queue of a subscription, also of one that has just been deleted.
func (s *Server) lane(sub *subscription.Subscription) delivery.LaneKey {
	lane := delivery.LaneKey{Subscription: delivery.UID(sub.UID).SubscriptionKey()}
	if n := s.Registry.Snapshot().Namespace(sub.Namespace); n != nil {
		lane.Namespace = delivery.UID(n.UID).NamespaceKey()
	}
	return lane
}

// PauseSubscription stops attempts while events keep queueing. Repeating it changes the reason only.
func (s subscriptionService) PauseSubscription(ctx context.Context, r *grapnelv1.PauseSubscriptionRequest) (*grapnelv1.PauseSubscriptionResponse, error) {
	sub, err := s.setState(ctx, r, grapnelv1.Subscription_STATE_PAUSED)
	if err != nil {
		return nil, err
	}
	return &grapnelv1.PauseSubscriptionResponse{Subscription: sub}, nil
}

// DisableSubscription stops attempts, and has new matches recorded as skipped.
func (s subscriptionService) DisableSubscription(ctx context.Context, r *grapnelv1.DisableSubscriptionRequest) (*grapnelv1.DisableSubscriptionResponse, error) {
	sub, err := s.setState(ctx, r, grapnelv1.Subscription_STATE_DISABLED)
	if err != nil {
		return nil, err
	}
	return &grapnelv1.DisableSubscriptionResponse{Subscription: sub}, nil
}

// ResumeSubscription restarts attempts after a pause or disabling, also an automatic one.
func (s subscriptionService) ResumeSubscription(ctx context.Context, r *grapnelv1.ResumeSubscriptionRequest) (*grapnelv1.ResumeSubscriptionResponse, error) {
	held := ""
	was, missing := s.find(r.GetName())
	if missing == nil {
		held = s.Engine.HeldBy(s.lane(was)) // dispatch opens the lane, too, when it sees the state change
	}
	sub, err := s.setState(ctx, r, grapnelv1.Subscription_STATE_ACTIVE)
	if err != nil {
		return nil, err
	}
	if missing == nil {
		s.Engine.Open(s.lane(was))
	}
	return &grapnelv1.ResumeSubscriptionResponse{Subscription: sub, Lifted: held}, nil
}

func (s subscriptionService) setState(ctx context.Context, r turn, state grapnelv1.Subscription_State) (*grapnelv1.Subscription, error) {
	ns, id, err := parseName("name", r.GetName(), collectionSubscriptions)
	if err != nil {
		return nil, err
	}
	sub, err := s.Registry.SetStateAt(ctx, ns, id, r.GetEtag(), state, r.GetReason())
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return sub.Proto(), nil
}
