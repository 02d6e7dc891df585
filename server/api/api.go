// Package api is the gRPC edge: it turns requests into calls of the domain packages and their answers and
// errors into what the protos promise. It owns interceptors, request checks, resource names, page tokens,
// field masks and the one mapping of errors to codes (errors.go). It holds no rule of the domain and keeps
// no state but counters.
//
// Every error that leaves it carries a google.rpc.ErrorInfo with domain "grapnel", and no request or
// answer reaches a log except through redact.
package api

import (
	"cmp"
	"context"
	"crypto/rand"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/eventtype"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
	"github.com/grapnel/grapnel/server/tracing"
)

// Engine is what the edge needs of dispatch.
type Engine interface {
	Cancel(ctx context.Context, id delivery.ID, lane delivery.LaneKey) (*delivery.Delivery, error)
	Retry(ctx context.Context, id delivery.ID, lane delivery.LaneKey, ifAttempts int) (*delivery.Delivery, error)
	// CancelLane cancels what is open and says how many it has cancelled; it stops when while, unless nil, says false.
	CancelLane(ctx context.Context, lane delivery.LaneKey, reason string, while func() bool) (int, error)
	// Deleting says that the caller is about to delete the subscription and to cancel its deliveries itself, until done.
	Deleting(lane delivery.LaneKey) (done func())
	// InFlight reports whether an attempt of the delivery is running now.
	InFlight(id delivery.ID, lane delivery.LaneKey) bool
	// HeldBy says what holds a lane back beside its subscription's state, and Open lifts it.
	HeldBy(lane delivery.LaneKey) string
	Open(lane delivery.LaneKey)
	// WaitReason says why a delivery that is due is not tried; empty when nothing holds it back.
	WaitReason(id delivery.ID, lane delivery.LaneKey) string
	// Status says how a lane goes, but for what the journal and the registry know.
	Status(lane delivery.LaneKey) *grapnelv1.SubscriptionStatus
	// Test makes one attempt and stores nothing. A result that was dropped has no attempt.
	Test(ctx context.Context, sub *subscription.Subscription, event *delivery.Event) (delivery.Result, error)
	// Stats are counters over the window; namespace "" is the whole server. Per-subscription rows carry the
	// full subscription name.
	Stats(namespace string, window time.Duration, top int) (total *grapnelv1.Stats, per []*grapnelv1.Stats)
	OldestDue(namespace string) time.Duration
	// Running is the number of attempts in flight.
	Running() int
}

// Replays is what the edge needs of the runner of replays and erasures.
type Replays interface {
	// Create stores a replay and begins it, and returns the one that is there already with its id and content. Errors:
	// those of delivery.Journal.CreateReplay, ErrStopping.
	Create(ctx context.Context, r *delivery.Replay) (*delivery.Replay, error)
	// Count counts what a replay would make now.
	Count(ctx context.Context, r *delivery.Replay) (delivery.ReplayCounts, error)
	// CountErasure counts what an erasure would purge now.
	CountErasure(ctx context.Context, r *delivery.Replay) (*delivery.Replay, error)
	// WaitReason says what one that goes on waits for.
	WaitReason(ns delivery.NamespaceKey, key uint64) string
	// Wait returns when one has ended, when the server is about to, or when ctx ends.
	Wait(ctx context.Context, ns delivery.NamespaceKey, key uint64)
	// Cancel ends one, and returns one that has ended as it is.
	Cancel(ctx context.Context, ns delivery.NamespaceKey, key uint64) (*delivery.Replay, error)
}

// Plugins is what the edge needs of the plugin host.
type Plugins interface {
	// Plugins lists the kinds in name order.
	Plugins() []*grapnelv1.Plugin
	Plugin(id string) (*grapnelv1.Plugin, bool)
	// Check examines the bindings of a subscription. Errors: ErrPluginUnavailable.
	Check(ctx context.Context, sub *grapnelv1.Subscription) ([]Diagnostic, error)
	// CheckConfig examines one configuration. Errors: ErrPluginUnavailable, ErrUnknownPlugin.
	CheckConfig(ctx context.Context, id string, configJSON []byte) ([]Diagnostic, error)
	// PrepareSecret checks a value for a secret slot, or has the plugin make one when value is empty.
	// Diagnostics are about plugin, slot, value and algorithm. Errors: as CheckConfig.
	PrepareSecret(ctx context.Context, id, slot string, value []byte, algorithm string) (Prepared, []Diagnostic, error)
	// CheckOwnership asks the target whether it wants deliveries. The attempt is nil when the transport has
	// no such question. Errors: ErrPluginUnavailable, and as Check.
	CheckOwnership(ctx context.Context, sub *grapnelv1.Subscription) (*delivery.Attempt, error)
}

// Prepared is a secret's value as a plugin wants it stored, with what may be published of it.
type Prepared struct {
	Value []byte
	// The rest is as in grapnel.v1.SecretVersion.
	Algorithm, PublicKey, JWK, KeyID string
}

// Diagnostic is a complaint of a plugin about its configuration.
type Diagnostic struct {
	// Field is the proto path, for example subscription.transport.config.method.
	Field   string
	Code    string
	Summary string
	// Warning marks what works but looks wrong.
	Warning bool
}

// Options of a Server. Registry, Secrets, EventTypes, Journal, Ingest, Engine, Plugins, Replays and Logger are required.
type Options struct {
	Registry   *subscription.Registry
	Secrets    *secret.Store
	EventTypes *eventtype.Store
	Journal    *delivery.Journal
	Ingest     *ingest.Ingest
	Engine     Engine
	Plugins    Plugins
	Replays    Replays

	Version string
	Commit  string
	// NodeName is the last segment of nodes/{node}.
	NodeName string
	// Address is what the node advertises.
	Address    string
	ClusterID  string
	Partitions int

	// PageKey seals page tokens; nodes of one cluster share it. Empty: a random one, so that tokens end
	// with the process.
	PageKey []byte
	// Room is asked before anything is added to the configuration or changed in it; deletions do not ask. Its error
	// refuses the call: delivery.ErrDiskFull or ErrConfigFull. Nil always has room. It is called often.
	Room func() error
	// Tracer reads the trace context of callers; nil reads none.
	Tracer *tracing.Tracer
	// MaxCalls bounds the unary calls and, apart, the publish streams in progress. Default 4096.
	MaxCalls int
	// MaxCallsPerNamespace bounds the same of one namespace; default half of MaxCalls, so that nobody takes all.
	MaxCallsPerNamespace int
	// MaxCallsPerConnection bounds all calls and streams open on one connection; a client that has as many waits.
	// Default 250. MaxStreamsPerConnection bounds the publish streams among them; default 100.
	MaxCallsPerConnection, MaxStreamsPerConnection int
	// MaxWatches bounds the calls and streams of health and reflection, which do not count as calls: each client that
	// is connected has one. Default 65536.
	MaxWatches int
	// FirstFrame is how long a publish stream may take to send its first frame. Default 10 s.
	FirstFrame time.Duration
	// WatchPatience is how long one who watches may take no message although there are some. Default 10 s.
	WatchPatience time.Duration
	// ConnectionAge is the age from which on a connection takes nothing new; half of it later it is cut. Default 30 min.
	ConnectionAge time.Duration

	Logger *slog.Logger
	// Registerer takes the metrics; nil keeps none.
	Registerer prometheus.Registerer
}

// Server serves the public API. Build it with New, give ServerOptions to grpc.NewServer, then Register.
type Server struct {
	Options
	log     *slog.Logger
	started time.Time
	pages   pager
	rules   rules
	health  *health.Server
	edge    *edge

	drainOnce sync.Once
	// draining is closed by Drain.
	draining chan struct{}
}

// New builds a Server. It panics on a fault of the linked protos only, which no input can cause.
func New(o Options) *Server {
	if len(o.PageKey) == 0 {
		o.PageKey = make([]byte, 32)
		rand.Read(o.PageKey) //nolint:errcheck // never fails
	}
	for _, d := range []struct {
		set      *int
		standard int
	}{
		{&o.MaxCalls, 4096},
		{&o.MaxCallsPerNamespace, max(1, cmp.Or(max(o.MaxCalls, 0), 4096)/2)},
		{&o.MaxCallsPerConnection, 250},
		{&o.MaxStreamsPerConnection, 100},
		{&o.MaxWatches, 1 << 16},
	} {
		if *d.set <= 0 {
			*d.set = d.standard
		}
		*d.set = min(*d.set, math.MaxInt32)
	}
	if o.FirstFrame <= 0 {
		o.FirstFrame = 10 * time.Second
	}
	if o.WatchPatience <= 0 {
		o.WatchPatience = 10 * time.Second
	}
	if o.ConnectionAge <= 0 {
		o.ConnectionAge = 30 * time.Minute
	}
	if o.Room == nil {
		o.Room = func() error { return nil }
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		Options:  o,
		log:      o.Logger.With("component", "api"),
		started:  time.Now(),
		pages:    pager{key: o.PageKey},
		rules:    newRules(),
		health:   health.NewServer(),
		draining: make(chan struct{}),
	}
	s.edge = newEdge(s)
	return s
}

// The services, one small type each, so that the methods of one cannot satisfy another.
type (
	publishService struct {
		grapnelv1.UnsafePublishServiceServer
		*Server
	}
	eventService struct {
		grapnelv1.UnsafeEventServiceServer
		*Server
	}
	deliveryService struct {
		grapnelv1.UnsafeDeliveryServiceServer
		*Server
	}
	replayService struct {
		grapnelv1.UnsafeReplayServiceServer
		*Server
	}
	erasureService struct {
		grapnelv1.UnsafeErasureServiceServer
		*Server
	}
	namespaceService struct {
		grapnelv1.UnsafeNamespaceServiceServer
		*Server
	}
	subscriptionService struct {
		grapnelv1.UnsafeSubscriptionServiceServer
		*Server
	}
	secretService struct {
		grapnelv1.UnsafeSecretServiceServer
		*Server
	}
	eventTypeService struct {
		grapnelv1.UnsafeEventTypeServiceServer
		*Server
	}
	pluginService struct {
		grapnelv1.UnsafePluginServiceServer
		*Server
	}
	adminService struct {
		grapnelv1.UnsafeAdminServiceServer
		*Server
	}
)

// Register adds all services and health to g. It may be called for several grpc servers (public, admin),
// each before it serves.
func (s *Server) Register(g *grpc.Server) {
	r := registrar{g, s.edge}
	grapnelv1.RegisterPublishServiceServer(r, publishService{Server: s})
	grapnelv1.RegisterEventServiceServer(r, eventService{Server: s})
	grapnelv1.RegisterDeliveryServiceServer(r, deliveryService{Server: s})
	grapnelv1.RegisterReplayServiceServer(r, replayService{Server: s})
	grapnelv1.RegisterErasureServiceServer(r, erasureService{Server: s})
	grapnelv1.RegisterNamespaceServiceServer(r, namespaceService{Server: s})
	grapnelv1.RegisterSubscriptionServiceServer(r, subscriptionService{Server: s})
	grapnelv1.RegisterSecretServiceServer(r, secretService{Server: s})
	grapnelv1.RegisterEventTypeServiceServer(r, eventTypeService{Server: s})
	grapnelv1.RegisterPluginServiceServer(r, pluginService{Server: s})
	grapnelv1.RegisterAdminServiceServer(r, adminService{Server: s})
	healthpb.RegisterHealthServer(r, s.health)
	for name := range g.GetServiceInfo() {
		s.SetServing(name, true)
	}
	s.SetServing("", true)
	s.SetServing("liveness", true)
}

// SetServing sets the health of one service name; "" is the server, "liveness" the process.
func (s *Server) SetServing(service string, serving bool) {
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if serving {
		status = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus(service, status)
}

// Drain tells clients that the server is about to stop: health of "" and PublishService becomes
// NOT_SERVING, and publish streams are asked to end. Calls go on being served. It returns at once.
func (s *Server) Drain() {
	s.drainOnce.Do(func() {
		s.SetServing("", false)
		s.SetServing(grapnelv1.PublishService_ServiceDesc.ServiceName, false)
		close(s.draining)
	})
}
