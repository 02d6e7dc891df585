package client

import (
	"context"
	"errors"
	"iter"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// maxUpdates is how often Subscriptions.Update tries before it returns ErrEtagMismatch.
const maxUpdates = 5

// ListOption narrows a list. Options that a list does not have, such as a filter over secrets, have no
// effect there.
type ListOption func(*listSettings)

type listSettings struct {
	filter   string
	pageSize int32
	deleted  bool
	bodies   bool
}

// Filter keeps what matches an expression such as `state = EXHAUSTED AND event_type = "order.*"`.
// Subscriptions, events and deliveries have it.
func Filter(expression string) ListOption {
	return func(s *listSettings) { s.filter = expression }
}

// PageSize sets how many are fetched per call, 1 to 1000. It does not bound the list.
func PageSize(n int) ListOption {
	return func(s *listSettings) { s.pageSize = int32(min(max(n, 0), 1000)) }
}

// ShowDeleted also lists namespaces that wait to be erased.
func ShowDeleted() ListOption { return func(s *listSettings) { s.deleted = true } }

// IncludeBodies fills bodies and headers of attempts.
func IncludeBodies() ListOption { return func(s *listSettings) { s.bodies = true } }

func listOptions(opts []ListOption) listSettings {
	s := listSettings{pageSize: 200}
	for _, opt := range opts {
		opt(&s)
	}
	return s
}

// pages walks all pages of a list. It ends after the first error, which it yields with a zero value.
func pages[T any](fetch func(token string) ([]T, string, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		token := ""
		for {
			page, next, err := fetch(token)
			if err != nil {
				var zero T
				yield(zero, err)
				return
			}
			for _, item := range page {
				if !yield(item, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			token = next
		}
	}
}

// Namespaces lists namespaces in name order. Here as in all lists, pages are fetched while the loop
// goes on, every use of the sequence starts afresh, and an error is yielded once, last.
func (c *Client) Namespaces(ctx context.Context, opts ...ListOption) iter.Seq2[*grapnelv1.Namespace, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Namespace, string, error) {
		r, err := c.NamespaceService().ListNamespaces(ctx, &grapnelv1.ListNamespacesRequest{
			PageSize: s.pageSize, PageToken: token, ShowDeleted: s.deleted,
		})
		return r.GetNamespaces(), r.GetNextPageToken(), err
	})
}

// Plugins lists plugins in name order, without schemas.
func (c *Client) Plugins(ctx context.Context, opts ...ListOption) iter.Seq2[*grapnelv1.Plugin, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Plugin, string, error) {
		r, err := c.PluginService().ListPlugins(ctx, &grapnelv1.ListPluginsRequest{
			PageSize: s.pageSize, PageToken: token,
		})
		return r.GetPlugins(), r.GetNextPageToken(), err
	})
}

// Secrets lists the secrets of a namespace in name order; metadata only.
func (c *Client) Secrets(ctx context.Context, namespace string, opts ...ListOption) iter.Seq2[*grapnelv1.Secret, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Secret, string, error) {
		r, err := c.SecretService().ListSecrets(ctx, &grapnelv1.ListSecretsRequest{
			Parent: namespaceName(namespace), PageSize: s.pageSize, PageToken: token,
		})
		return r.GetSecrets(), r.GetNextPageToken(), err
	})
}

// Events lists the events of a namespace, newest first, without payloads.
func (c *Client) Events(ctx context.Context, namespace string, opts ...ListOption) iter.Seq2[*grapnelv1.Event, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Event, string, error) {
		r, err := c.EventService().ListEvents(ctx, &grapnelv1.ListEventsRequest{
			Parent: namespaceName(namespace), PageSize: s.pageSize, PageToken: token, Filter: s.filter,
		})
		return r.GetEvents(), r.GetNextPageToken(), err
	})
}

// Deliveries lists the deliveries of a namespace, newest first.
func (c *Client) Deliveries(ctx context.Context, namespace string, opts ...ListOption) iter.Seq2[*grapnelv1.Delivery, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Delivery, string, error) {
		r, err := c.DeliveryService().ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{
			Parent: namespaceName(namespace), PageSize: s.pageSize, PageToken: token, Filter: s.filter,
		})
		return r.GetDeliveries(), r.GetNextPageToken(), err
	})
}

// Attempts lists the attempts at one delivery, given by its full name, first to last.
func (c *Client) Attempts(ctx context.Context, delivery string, opts ...ListOption) iter.Seq2[*grapnelv1.Attempt, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Attempt, string, error) {
		r, err := c.DeliveryService().ListAttempts(ctx, &grapnelv1.ListAttemptsRequest{
			Parent: delivery, PageSize: min(s.pageSize, 100), PageToken: token, IncludeBodies: s.bodies,
		})
		return r.GetAttempts(), r.GetNextPageToken(), err
	})
}

// Subscriptions is the subscriptions of one namespace.
type Subscriptions struct {
	c         *Client
	namespace string
}

// Subscriptions returns those of a namespace, given by its last segment; "-" lists all namespaces.
func (c *Client) Subscriptions(namespace string) Subscriptions { return Subscriptions{c, namespace} }

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

// Get reads one, by its ID or full name.
func (s Subscriptions) Get(ctx context.Context, id string) (*grapnelv1.Subscription, error) {
	r, err := s.c.SubscriptionService().GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: s.name(id)})
	return r.GetSubscription(), err
}

// Update reads a subscription, lets change alter it, and stores the result if nobody stored another in
// between; else it starts again, five times in all, and then returns ErrEtagMismatch. So change may be
// called several times, each time with a fresh copy; its error ends Update and is returned as it is.
// What change leaves alone stays; what it clears is cleared.
func (s Subscriptions) Update(ctx context.Context, id string, change func(*grapnelv1.Subscription) error) (*grapnelv1.Subscription, error) {
	for try := 1; ; try++ {
		current, err := s.Get(ctx, id)
		if err != nil {
			return nil, err
		}
		wanted := proto.CloneOf(current)
		if err := change(wanted); err != nil {
			return nil, err
		}
		if proto.Equal(wanted, current) {
			return current, nil
		}
		wanted.Name, wanted.Etag = current.GetName(), current.GetEtag()
		r, err := s.c.SubscriptionService().UpdateSubscription(ctx, &grapnelv1.UpdateSubscriptionRequest{
			Subscription: wanted,
			UpdateMask:   &fieldmaskpb.FieldMask{Paths: []string{"*"}},
		})
		if err == nil {
			return r.GetSubscription(), nil
		}
		if try == maxUpdates || !errors.Is(err, ErrEtagMismatch) {
			return nil, err
		}
	}
}

func (s Subscriptions) name(id string) string {
	if strings.Contains(id, "/") {
		return id
	}
	return namespaceName(s.namespace) + "/subscriptions/" + id
}
