package client

import (
	"context"
	"iter"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// ListOption narrows a list. Options that a list does not have, such as a filter over secrets, have no
// effect there.
type ListOption func(*listSettings)

type listSettings struct {
	filter   string
	pageSize int32
	deleted  bool
	bodies   bool
	at       string
	resume   string
	watching func(token string)
}

// Filter keeps what matches an expression such as `state = EXHAUSTED AND event_type = "order.*"`.
// Subscriptions, event types, events and deliveries have it.
func Filter(expression string) ListOption {
	return func(s *listSettings) { s.filter = expression }
}

// PageSize sets how many are fetched per call, 1 to 1000. It does not bound the list.
func PageSize(n int) ListOption {
	return func(s *listSettings) { s.pageSize = int32(min(max(n, 0), 1000)) }
}

// ShowDeleted also lists namespaces that wait to be erased.
func ShowDeleted() ListOption { return func(s *listSettings) { s.deleted = true } }

// IncludeBodies fills bodies and headers of attempts, and schemas and examples of event types.
func IncludeBodies() ListOption { return func(s *listSettings) { s.bodies = true } }

// AtSubscription keeps what is about one subscription, by its full name; empty keeps all. Explain has it.
func AtSubscription(name string) ListOption { return func(s *listSettings) { s.at = name } }

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

// Explain says what has become of an event, by its full name, at each subscription: first its deliveries, then the
// subscriptions that have none.
func (c *Client) Explain(ctx context.Context, event string, opts ...ListOption) iter.Seq2[*grapnelv1.EventAccount, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.EventAccount, string, error) {
		r, err := c.EventService().ExplainEvent(ctx, &grapnelv1.ExplainEventRequest{
			Name: event, Subscription: s.at, PageSize: s.pageSize, PageToken: token,
		})
		return r.GetAccounts(), r.GetNextPageToken(), err
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

// Attempts lists the attempts at one delivery, first to last.
func (c *Client) Attempts(ctx context.Context, delivery string, opts ...ListOption) iter.Seq2[*grapnelv1.Attempt, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Attempt, string, error) {
		r, err := c.DeliveryService().ListAttempts(ctx, &grapnelv1.ListAttemptsRequest{
			Parent: delivery, PageSize: min(s.pageSize, 100), PageToken: token, IncludeBodies: s.bodies,
		})
		return r.GetAttempts(), r.GetNextPageToken(), err
	})
}
