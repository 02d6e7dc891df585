package client

import (
	"context"
	"iter"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Subscriptions is the subscriptions of one namespace.
type Subscriptions struct {
	c         *Client
	namespace string
}

// Subscriptions returns those of a namespace; "-" lists and watches those of all.
func (c *Client) Subscriptions(namespace string) Subscriptions { return Subscriptions{c, namespace} }

// Create adds a subscription; an empty id has the server pick one. What the server's warnings say, such as
// that plain HTTP can be read on the way, is returned beside it. ErrExists when the ID is taken.
func (s Subscriptions) Create(ctx context.Context, id string, content *grapnelv1.Subscription) (created *grapnelv1.Subscription, warnings []string, err error) {
	if id, err = shortID(s.namespace, "subscriptions", id); err != nil {
		return nil, nil, err
	}
	r, err := s.c.SubscriptionService().CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
		Parent: namespaceName(s.namespace), SubscriptionId: id, Subscription: content,
	})
	return r.GetSubscription(), r.GetWarnings(), err
}

// List lists them in name order.
func (s Subscriptions) List(ctx context.Context, opts ...ListOption) iter.Seq2[*grapnelv1.Subscription, error] {
	o := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Subscription, string, error) {
		r, err := s.c.SubscriptionService().ListSubscriptions(ctx, &grapnelv1.ListSubscriptionsRequest{
			Parent: namespaceName(s.namespace), PageSize: o.pageSize, PageToken: token, Filter: o.filter,
		})
		return r.GetSubscriptions(), r.GetNextPageToken(), err
	})
}

// Get reads one.
func (s Subscriptions) Get(ctx context.Context, id string) (*grapnelv1.Subscription, error) {
	name, err := s.name(id)
	if err != nil {
		return nil, err
	}
	r, err := s.c.SubscriptionService().GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: name})
	return r.GetSubscription(), err
}

// Update reads a subscription, lets change alter it, and stores the result if nobody stored another in
// between; else it starts again, five times in all, and then returns ErrEtagMismatch. So change may be
// called several times, each time with a fresh copy; its error ends Update and is returned as it is.
// What change leaves alone stays; what it clears is cleared.
func (s Subscriptions) Update(ctx context.Context, id string, change func(*grapnelv1.Subscription) error) (*grapnelv1.Subscription, error) {
	return update(func() (*grapnelv1.Subscription, error) { return s.Get(ctx, id) }, change,
		func(wanted *grapnelv1.Subscription) (*grapnelv1.Subscription, error) {
			r, err := s.c.SubscriptionService().UpdateSubscription(ctx, &grapnelv1.UpdateSubscriptionRequest{
				Subscription: wanted, UpdateMask: everyField(),
			})
			return r.GetSubscription(), err
		})
}

// Delete deletes one and cancels its deliveries that are open, of which it returns the number.
func (s Subscriptions) Delete(ctx context.Context, id string) (cancelled int, err error) {
	name, err := s.name(id)
	if err != nil {
		return 0, err
	}
	r, err := s.c.SubscriptionService().DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: name})
	return int(r.GetCancelledDeliveries()), err
}

// Pause has events wait until Resume; reason is shown to people and may be empty.
func (s Subscriptions) Pause(ctx context.Context, id, reason string) (*grapnelv1.Subscription, error) {
	name, err := s.name(id)
	if err != nil {
		return nil, err
	}
	r, err := s.c.SubscriptionService().PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: name, Reason: reason})
	return r.GetSubscription(), err
}

// Disable has events be skipped until Resume; reason is as for Pause.
func (s Subscriptions) Disable(ctx context.Context, id, reason string) (*grapnelv1.Subscription, error) {
	name, err := s.name(id)
	if err != nil {
		return nil, err
	}
	r, err := s.c.SubscriptionService().DisableSubscription(ctx, &grapnelv1.DisableSubscriptionRequest{Name: name, Reason: reason})
	return r.GetSubscription(), err
}

// Resume has deliveries go on that waited, also after the server disabled the subscription.
func (s Subscriptions) Resume(ctx context.Context, id string) (*grapnelv1.Subscription, error) {
	name, err := s.name(id)
	if err != nil {
		return nil, err
	}
	r, err := s.c.SubscriptionService().ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: name})
	return r.GetSubscription(), err
}

// Test sends one event now, once, and returns the attempt, whose Outcome says whether the target accepted it.
// The zero Event sends a sample of type grapnel.test. The attempt is nil when the subscription's transformer drops the event.
func (s Subscriptions) Test(ctx context.Context, id string, e Event) (*grapnelv1.Attempt, error) {
	name, err := s.name(id)
	if err != nil {
		return nil, err
	}
	request := &grapnelv1.TestSubscriptionRequest{Name: name}
	if e.Type != "" {
		request.Event = e.proto()
	}
	r, err := s.c.SubscriptionService().TestSubscription(ctx, request)
	return r.GetAttempt(), err
}

func (s Subscriptions) name(id string) (string, error) {
	return resourceName(s.namespace, "subscriptions", id)
}

// Match says what the subscriptions make of an event, in name order, all of them or only those that match. Nothing is stored
// or sent.
func (s Subscriptions) Match(ctx context.Context, event *grapnelv1.Event, matchingOnly bool, opts ...ListOption) iter.Seq2[*grapnelv1.SubscriptionMatch, error] {
	o := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.SubscriptionMatch, string, error) {
		r, err := s.c.SubscriptionService().MatchSubscriptions(ctx, &grapnelv1.MatchSubscriptionsRequest{
			Parent: namespaceName(s.namespace), Event: event, MatchingOnly: matchingOnly, PageSize: o.pageSize, PageToken: token,
		})
		return r.GetMatches(), r.GetNextPageToken(), err
	})
}
