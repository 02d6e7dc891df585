package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// maxUpdates is how often an update tries before it returns ErrEtagMismatch.
const maxUpdates = 5

// update reads, applies change to a copy, and stores it unless somebody stored another in between; else it
// starts again.
func update[T proto.Message](read func() (T, error), change func(T) error, write func(T) (T, error)) (T, error) {
	var none T
	for try := 1; ; try++ {
		current, err := read()
		if err != nil {
			return none, err
		}
		wanted := proto.CloneOf(current)
		if err := change(wanted); err != nil {
			return none, err
		}
		if proto.Equal(wanted, current) {
			return current, nil
		}
		stored, err := write(wanted)
		if err == nil {
			return stored, nil
		}
		if try == maxUpdates || !errors.Is(err, ErrEtagMismatch) {
			return none, err
		}
	}
}

func everyField() *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: []string{"*"}} }

// CreateNamespace adds a namespace; n holds labels and quota and may be nil. ErrExists when the name is taken.
func (c *Client) CreateNamespace(ctx context.Context, namespace string, n *grapnelv1.Namespace) (*grapnelv1.Namespace, error) {
	r, err := c.NamespaceService().CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{
		NamespaceId: namespaceName(namespace)[len(namespaces):], Namespace: n,
	})
	return r.GetNamespace(), err
}

// GetNamespace reads a namespace and its usage.
func (c *Client) GetNamespace(ctx context.Context, namespace string) (*grapnelv1.Namespace, error) {
	r, err := c.NamespaceService().GetNamespace(ctx, &grapnelv1.GetNamespaceRequest{Name: namespaceName(namespace)})
	return r.GetNamespace(), err
}

// UpdateNamespace changes a namespace as Subscriptions.Update does a subscription.
func (c *Client) UpdateNamespace(ctx context.Context, namespace string, change func(*grapnelv1.Namespace) error) (*grapnelv1.Namespace, error) {
	return update(func() (*grapnelv1.Namespace, error) { return c.GetNamespace(ctx, namespace) }, change,
		func(n *grapnelv1.Namespace) (*grapnelv1.Namespace, error) {
			r, err := c.NamespaceService().UpdateNamespace(ctx, &grapnelv1.UpdateNamespaceRequest{Namespace: n, UpdateMask: everyField()})
			return r.GetNamespace(), err
		})
}

// PauseNamespace has all deliveries of a namespace wait until ResumeNamespace; reason is shown to people and may be empty.
func (c *Client) PauseNamespace(ctx context.Context, namespace, reason string) (*grapnelv1.Namespace, error) {
	r, err := c.NamespaceService().PauseNamespace(ctx, &grapnelv1.PauseNamespaceRequest{Name: namespaceName(namespace), Reason: reason})
	return r.GetNamespace(), err
}

// DisableNamespace has what is published into a namespace be skipped until ResumeNamespace; reason is as for
// PauseNamespace.
func (c *Client) DisableNamespace(ctx context.Context, namespace, reason string) (*grapnelv1.Namespace, error) {
	r, err := c.NamespaceService().DisableNamespace(ctx, &grapnelv1.DisableNamespaceRequest{Name: namespaceName(namespace), Reason: reason})
	return r.GetNamespace(), err
}

// ResumeNamespace has deliveries go on.
func (c *Client) ResumeNamespace(ctx context.Context, namespace string) (*grapnelv1.Namespace, error) {
	r, err := c.NamespaceService().ResumeNamespace(ctx, &grapnelv1.ResumeNamespaceRequest{Name: namespaceName(namespace)})
	return r.GetNamespace(), err
}

// DeleteNamespace marks a namespace deleted; the answer's PurgeTime says when it will be erased. ErrInUse when
// it has subscriptions, unless force is set.
func (c *Client) DeleteNamespace(ctx context.Context, namespace string, force bool) (*grapnelv1.Namespace, error) {
	r, err := c.NamespaceService().DeleteNamespace(ctx, &grapnelv1.DeleteNamespaceRequest{Name: namespaceName(namespace), Force: force})
	return r.GetNamespace(), err
}

// NewSecret says what secret to make. The zero value is a key for Standard Webhooks' HMAC, made by the server.
type NewSecret struct {
	// Kind of key; KIND_HMAC when not set.
	Kind grapnelv1.Secret_Kind
	// Value is the secret when it exists already; empty has the server make one.
	Value string
	// Plugin, Slot and Algorithm have a signing plugin make or check the key, as in CreateSecretRequest.
	Plugin, Slot, Algorithm string
}

// CreateSecret stores a secret. generated is its value when the server made it: what the receiver verifies
// with, shown this once. The request is not repeated.
func (c *Client) CreateSecret(ctx context.Context, namespace, secret string, n NewSecret) (s *grapnelv1.Secret, generated string, err error) {
	id, err := shortID(namespace, "secrets", secret)
	if err != nil {
		return nil, "", err
	}
	r, err := c.SecretService().CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
		Parent: namespaceName(namespace), SecretId: id, Value: n.Value, Plugin: n.Plugin, Slot: n.Slot, Algorithm: n.Algorithm,
		Kind: cmp.Or(n.Kind, defaultKind(n)),
	})
	return r.GetSecret(), r.GetGeneratedValue(), err
}

// defaultKind leaves the kind to a plugin that is asked for.
func defaultKind(n NewSecret) grapnelv1.Secret_Kind {
	if n.Plugin != "" {
		return grapnelv1.Secret_KIND_UNSPECIFIED
	}
	return grapnelv1.Secret_KIND_HMAC
}

// GetSecret reads a secret's metadata; no call reads its value.
func (c *Client) GetSecret(ctx context.Context, namespace, secret string) (*grapnelv1.Secret, error) {
	name, err := resourceName(namespace, "secrets", secret)
	if err != nil {
		return nil, err
	}
	r, err := c.SecretService().GetSecret(ctx, &grapnelv1.GetSecretRequest{Name: name})
	return r.GetSecret(), err
}

// RotateSecret adds a version, made by the server when value is empty and then returned as generated. Both
// sign for as long as overlap, seven days at most; a negative one leaves it to the server's default.
func (c *Client) RotateSecret(ctx context.Context, namespace, secret, value string, overlap time.Duration) (s *grapnelv1.Secret, generated string, err error) {
	name, err := resourceName(namespace, "secrets", secret)
	if err != nil {
		return nil, "", err
	}
	request := &grapnelv1.RotateSecretRequest{Name: name, Value: value}
	if overlap >= 0 {
		request.Overlap = durationpb.New(overlap)
	}
	r, err := c.SecretService().RotateSecret(ctx, request)
	return r.GetSecret(), r.GetGeneratedValue(), err
}

// DeleteSecret deletes a secret; ErrInUse while a subscription refers to it.
func (c *Client) DeleteSecret(ctx context.Context, namespace, secret string) error {
	name, err := resourceName(namespace, "secrets", secret)
	if err != nil {
		return err
	}
	_, err = c.SecretService().DeleteSecret(ctx, &grapnelv1.DeleteSecretRequest{Name: name})
	return err
}

// PurgeEvent takes away what an event carries, given as in GetEvent, and keeps its history: payload, subject and
// attributes, what was made of it, and what is kept of requests and answers. It returns how many open deliveries it has
// cancelled. It may be repeated.
func (c *Client) PurgeEvent(ctx context.Context, namespace, event string) (cancelled int, err error) {
	name, err := resourceName(namespace, "events", event)
	if err != nil {
		return 0, err
	}
	r, err := c.EventService().PurgeEventPayload(ctx, &grapnelv1.PurgeEventPayloadRequest{Name: name})
	return int(r.GetCancelledDeliveries()), err
}

// GetEvent reads an event with its payload, by its ID, its uid (the webhook-id that receivers see), or its
// full name.
func (c *Client) GetEvent(ctx context.Context, namespace, event string) (*grapnelv1.Event, error) {
	name, err := resourceName(namespace, "events", event)
	if err != nil {
		return nil, err
	}
	r, err := c.EventService().GetEvent(ctx, &grapnelv1.GetEventRequest{Name: name, IncludePayload: true})
	return r.GetEvent(), err
}

// GetDelivery reads a delivery, by its full name.
func (c *Client) GetDelivery(ctx context.Context, delivery string) (*grapnelv1.Delivery, error) {
	name, err := deliveryName(delivery)
	if err != nil {
		return nil, err
	}
	r, err := c.DeliveryService().GetDelivery(ctx, &grapnelv1.GetDeliveryRequest{Name: name})
	return r.GetDelivery(), err
}

// RetryDelivery makes a delivery due now, also one that has ended without success.
func (c *Client) RetryDelivery(ctx context.Context, delivery string) (*grapnelv1.Delivery, error) {
	name, err := deliveryName(delivery)
	if err != nil {
		return nil, err
	}
	r, err := c.DeliveryService().RetryDelivery(ctx, &grapnelv1.RetryDeliveryRequest{Name: name})
	return r.GetDelivery(), err
}

// CancelDelivery ends a delivery that is open; ErrInvalidState when it has ended.
func (c *Client) CancelDelivery(ctx context.Context, delivery string) (*grapnelv1.Delivery, error) {
	name, err := deliveryName(delivery)
	if err != nil {
		return nil, err
	}
	r, err := c.DeliveryService().CancelDelivery(ctx, &grapnelv1.CancelDeliveryRequest{Name: name})
	return r.GetDelivery(), err
}

// Ended reports whether a delivery is in a final state.
func Ended(d *grapnelv1.Delivery) bool {
	switch d.GetState() {
	case grapnelv1.Delivery_STATE_PENDING, grapnelv1.Delivery_STATE_SCHEDULED, grapnelv1.Delivery_STATE_IN_FLIGHT, grapnelv1.Delivery_STATE_UNSPECIFIED:
		return false
	}
	return true
}

// Waiting asks soon at first, since most deliveries end within milliseconds, then ever less often.
const (
	firstPoll = 50 * time.Millisecond
	lastPoll  = 2 * time.Second
)

// poll calls look until it says that it is done, fails for good, or ctx ends.
func poll(ctx context.Context, look func() (done bool, err error)) error {
	for pause := firstPoll; ; pause = min(2*pause, lastPoll) {
		done, err := look()
		switch {
		case done:
			return nil
		case err != nil && (ctx.Err() != nil || !FromError(err).Retryable()):
			return err
		case !sleep(ctx, pause):
			return fmt.Errorf("wait for the end: %w", context.Cause(ctx))
		}
	}
}

// WaitDelivery returns a delivery when it has ended; its State says how. The error is ctx's when that ends
// first, with the delivery as it was last seen, if at all. A paused subscription's deliveries do not end, and
// a failing one's may take days: give ctx a deadline.
func (c *Client) WaitDelivery(ctx context.Context, delivery string) (*grapnelv1.Delivery, error) {
	var last *grapnelv1.Delivery
	err := poll(ctx, func() (bool, error) {
		d, err := c.GetDelivery(ctx, delivery)
		if err == nil {
			last = d
		}
		return err == nil && Ended(d), err
	})
	return last, err
}

// WaitEvent returns the deliveries of an event, given as in GetEvent, when all of them have ended; none for an
// event that matched no subscription. Errors are as with WaitDelivery.
func (c *Client) WaitEvent(ctx context.Context, namespace, event string) ([]*grapnelv1.Delivery, error) {
	e, err := c.GetEvent(ctx, namespace, event)
	if err != nil {
		return nil, err
	}
	var last []*grapnelv1.Delivery
	err = poll(ctx, func() (bool, error) {
		var now []*grapnelv1.Delivery
		ended := true
		for d, err := range c.Deliveries(ctx, namespace, Filter(fmt.Sprintf("event_uid = %q", e.GetUid()))) {
			if err != nil {
				return false, err
			}
			now = append(now, d)
			ended = ended && Ended(d)
		}
		last = now
		return ended, nil
	})
	return last, err
}

// GetPlugin reads a plugin with its kinds and schemas, by its ID or full name.
func (c *Client) GetPlugin(ctx context.Context, plugin string) (*grapnelv1.Plugin, error) {
	r, err := c.PluginService().GetPlugin(ctx, &grapnelv1.GetPluginRequest{Name: "plugins/" + strings.TrimPrefix(plugin, "plugins/")})
	return r.GetPlugin(), err
}
