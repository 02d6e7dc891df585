// Package client is the Go SDK of Grapnel's public API: a connection with the shipped retry rules,
// idempotent publishing one by one or in batches, iterators over lists, and errors that can be told
// apart by reason.
//
// It is thin: own types exist for events, publishers, iterators and errors only; everything else is
// the generated code of proto/grapnel/v1, and the generated clients are reachable from [Client].
//
// Wherever a namespace or a resource in one is asked for, its short ID and its full name mean the same:
// "acme" and "namespaces/acme", "orders" and "namespaces/acme/subscriptions/orders". A full name of another
// namespace is refused. Deliveries have no short ID: their names are the server's.
//
// It keeps no global state, starts no goroutine before [Dial], and leaves none after [Client.Close].
package client

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/health" // makes the service config's health check work
	"google.golang.org/grpc/keepalive"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Version of this SDK, sent to the server in the user agent.
const Version = "0.1.0"

//go:embed service_config.json
var serviceConfig string

// ServiceConfig returns the gRPC service config that Dial installs: retries of what is idempotent, timeouts
// and health checking per method. Clients in other languages are meant to use the same text. Publishing is
// not among its retries, since it is idempotent only for events with an ID; this package repeats those itself.
func ServiceConfig() string { return serviceConfig }

// Client is a connection to a Grapnel server or cluster. It is safe for concurrent use, meant to be
// made once and shared, and must be closed.
//
// Publishing and everything else use separate channels, because publishing avoids servers that report
// their publish service as not serving while reading goes on there.
type Client struct {
	publish *grpc.ClientConn
	control *grpc.ClientConn

	mu         sync.Mutex // guards the fields below
	closed     bool
	publishers map[*Publisher]struct{}
}

// Dial prepares a connection to addr, a gRPC target such as "127.0.0.1:7070" or
// "dns:///grapnel.internal:7070". It does not wait for the server: calls connect when they need to,
// and ctx matters only with WithWait. Either WithInsecure or WithTLS must be given.
func Dial(ctx context.Context, addr string, opts ...Option) (*Client, error) {
	var s settings
	for _, opt := range opts {
		opt(&s)
	}
	dial, err := s.dialOptions()
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	publish, err := grpc.NewClient(addr, dial...)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	control, err := grpc.NewClient(addr, append(dial, grpc.WithDisableHealthCheck())...)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("dial %s: %w", addr, err), publish.Close())
	}
	c := &Client{publish: publish, control: control, publishers: map[*Publisher]struct{}{}}
	if s.wait {
		if err := waitReady(ctx, control); err != nil {
			return nil, errors.Join(fmt.Errorf("dial %s: %w", addr, err), c.Close())
		}
	}
	return c, nil
}

// Close ends all calls, aborts the publishers that are still open, and returns when nothing of the
// client runs any more. Close publishers first to have their events sent.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	open := make([]*Publisher, 0, len(c.publishers))
	for p := range c.publishers {
		open = append(open, p)
	}
	c.mu.Unlock()
	for _, p := range open {
		p.abort(ErrClosed)
	}
	return errors.Join(c.publish.Close(), c.control.Close())
}

// Conn returns the channel of everything but publishing, for generated clients of other services.
// The caller must not close it.
func (c *Client) Conn() grpc.ClientConnInterface { return c.control }

// PublishService returns the generated client. Its errors are *Error, as all errors of this package.
func (c *Client) PublishService() grapnelv1.PublishServiceClient {
	return grapnelv1.NewPublishServiceClient(c.publish)
}

// NamespaceService returns the generated client.
func (c *Client) NamespaceService() grapnelv1.NamespaceServiceClient {
	return grapnelv1.NewNamespaceServiceClient(c.control)
}

// SubscriptionService returns the generated client.
func (c *Client) SubscriptionService() grapnelv1.SubscriptionServiceClient {
	return grapnelv1.NewSubscriptionServiceClient(c.control)
}

// SecretService returns the generated client.
func (c *Client) SecretService() grapnelv1.SecretServiceClient {
	return grapnelv1.NewSecretServiceClient(c.control)
}

// EventTypeService returns the generated client.
func (c *Client) EventTypeService() grapnelv1.EventTypeServiceClient {
	return grapnelv1.NewEventTypeServiceClient(c.control)
}

// EventService returns the generated client.
func (c *Client) EventService() grapnelv1.EventServiceClient {
	return grapnelv1.NewEventServiceClient(c.control)
}

// DeliveryService returns the generated client.
func (c *Client) DeliveryService() grapnelv1.DeliveryServiceClient {
	return grapnelv1.NewDeliveryServiceClient(c.control)
}

// PluginService returns the generated client.
func (c *Client) PluginService() grapnelv1.PluginServiceClient {
	return grapnelv1.NewPluginServiceClient(c.control)
}

// AdminService returns the generated client.
func (c *Client) AdminService() grapnelv1.AdminServiceClient {
	return grapnelv1.NewAdminServiceClient(c.control)
}

// keepaliveParams notices a dead peer within 40 s while calls or streams are open. The server's
// minimum is 20 s, so this never counts as too many pings.
func keepaliveParams() keepalive.ClientParameters {
	return keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}
}
