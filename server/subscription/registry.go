package subscription

import (
	"context"
	"iter"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Options for Open.
type Options struct {
	Client *clientv3.Client
	Prefix string
	Logger *slog.Logger
}

type Registry struct{}

func Open(ctx context.Context, o Options) (*Registry, error) { return nil, ErrUnavailable }
func (r *Registry) Run(ctx context.Context) error            { return ErrUnavailable }
func (r *Registry) Snapshot() *Snapshot                      { return nil }
func (r *Registry) OnChange(func([]Change))                  {}
func (r *Registry) Healthy() bool                            { return false }
func (r *Registry) ConditionErrors() uint64                  { return 0 }
func (r *Registry) CreateNamespace(ctx context.Context, id string, n *grapnelv1.Namespace) (*Namespace, error) {
	return nil, ErrUnavailable
}
func (r *Registry) UpdateNamespace(ctx context.Context, id, etag string, mutate func(*grapnelv1.Namespace) error) (*Namespace, error) {
	return nil, ErrUnavailable
}
func (r *Registry) DeleteNamespace(ctx context.Context, id, etag string, force bool) (*Namespace, error) {
	return nil, ErrUnavailable
}
func (r *Registry) PurgeNamespace(ctx context.Context, id string) error { return ErrUnavailable }
func (r *Registry) CreateSubscription(ctx context.Context, ns, id string, s *grapnelv1.Subscription, o CreateOptions) (*Subscription, error) {
	return nil, ErrUnavailable
}
func (r *Registry) UpdateSubscription(ctx context.Context, ns, id, etag string, mutate func(*grapnelv1.Subscription) error, o UpdateOptions) (*Subscription, error) {
	return nil, ErrUnavailable
}
func (r *Registry) DeleteSubscription(ctx context.Context, ns, id, etag string) (*Subscription, error) {
	return nil, ErrUnavailable
}
func (r *Registry) SetState(ctx context.Context, ns, id string, uid [16]byte, state grapnelv1.Subscription_State, reason string) (*Subscription, error) {
	return nil, ErrUnavailable
}

// New validates a subscription, fills its defaults and compiles it without etcd.
func New(p *grapnelv1.Subscription) (*Subscription, error) { return nil, ErrUnavailable }

// Warnings lists what works but looks wrong.
func Warnings(p *grapnelv1.Subscription) []string { return nil }

type Snapshot struct{}

// NewSnapshot builds a snapshot without etcd, for tests of readers.
func NewSnapshot(revision int64, namespaces []*Namespace, subs []*Subscription) *Snapshot { return nil }

type Candidate struct {
	ID          string
	Source      string
	Type        string
	Subject     string
	Time        time.Time
	ContentType string
	Attributes  map[string]string
	Data        []byte
}

func (s *Snapshot) Revision() int64                                        { return 0 }
func (s *Snapshot) Namespace(id string) *Namespace                         { return nil }
func (s *Snapshot) Subscription(ns, id string) *Subscription               { return nil }
func (s *Snapshot) Namespaces(after string) iter.Seq[*Namespace]           { return nil }
func (s *Snapshot) Subscriptions(ns, after string) iter.Seq[*Subscription] { return nil }
func (s *Snapshot) Match(ns string, c *Candidate) []*Subscription          { return nil }
