// Package server wires Grapnel together: it opens the stores, starts the parts bottom-up, serves, and
// stops them top-down. It holds no rule of the domain.
//
// Start: configuration store (etcd) → secrets and subscriptions → journal → plugin host → dispatch →
// ingest → API. Stop runs the other way, in named steps that are each bounded: health says NOT_SERVING,
// publishes are refused, dispatch takes no new work and waits for its attempts until the grace ends,
// calls end, plugins drain, the journal closes, the configuration store closes.
package server

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/pluginhost"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
)

// Server is one Grapnel node. Build it with New; Run it once.
type Server struct {
	options Options
	log     *slog.Logger
	metrics *prometheus.Registry
	ready   chan struct{}

	public, admin net.Listener

	etcd     *configStore
	secrets  *secret.Store
	registry *subscription.Registry
	journal  *delivery.Journal
	plugins  *pluginhost.Host
	engine   *dispatch.Engine
	ingest   *ingest.Ingest
	api      *api.Server
	pageKey  []byte

	mu      sync.Mutex
	started bool
}

// New checks the options and takes the listening addresses, so that a fault is known at once. It starts
// nothing.
func New(o Options) (*Server, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	return &Server{
		options: o, log: o.Logger.With("component", "server"), metrics: newMetrics(),
		ready: make(chan struct{}),
	}, nil
}

// Ready is closed when the server serves and its first-party plugins run, or have had ten seconds to.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Addr is the address of the public API; valid once Ready is closed.
func (s *Server) Addr() string { return s.public.Addr().String() }

// AdminAddr is the address of metrics, health, pprof and reflection; valid once Ready is closed.
func (s *Server) AdminAddr() string { return s.admin.Addr().String() }

// PluginPids names the plugin processes that run now, by plugin name.
func (s *Server) PluginPids() map[string]int { return s.plugins.Pids() }

// Run starts the server, serves until ctx ends or a part fails for good, and stops it. It returns nil
// after an orderly stop. It may be called once.
func (s *Server) Run(ctx context.Context) (err error) {
	s.mu.Lock()
	again := s.started
	s.started = true
	s.mu.Unlock()
	if again {
		return errors.New("a server runs once")
	}
	var closers stack
	defer func() { err = errors.Join(err, closers.close()) }()
	if err := s.open(ctx, &closers); err != nil {
		return err
	}
	return s.serve(ctx)
}

// open makes everything that needs no goroutine of ours, bottom-up.
func (s *Server) open(ctx context.Context, closers *stack) (err error) {
	o := s.options
	if err := os.MkdirAll(o.DataDir, 0o700); err != nil {
		return fmt.Errorf("make the data directory: %w", err)
	}
	if s.public, err = net.Listen("tcp", o.Listen); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	closers.push(s.public.Close)
	if s.admin, err = net.Listen("tcp", o.AdminListen); err != nil {
		return fmt.Errorf("listen for administration: %w", err)
	}
	closers.push(s.admin.Close)
	if s.etcd, err = openConfigStore(ctx, o); err != nil {
		return err
	}
	closers.push(s.etcd.close)
	s.etcd.watchSpace(s.metrics)
	if err := s.openStores(ctx, closers); err != nil {
		return err
	}
	if s.plugins, err = s.newPlugins(closers); err != nil {
		return err
	}
	s.engine = dispatch.New(dispatch.Options{
		Journal: s.journal, Subscriptions: subscriptions{s.registry}, Attempter: s.plugins,
		Disable: s.disable, Logger: o.Logger, Registerer: s.metrics,
	})
	s.ingest = ingest.New(ingest.Options{Registry: s.registry, Journal: s.journal, Logger: o.Logger, Registerer: s.metrics})
	s.api = api.New(api.Options{
		Registry: s.registry, Secrets: s.secrets, Journal: s.journal, Ingest: s.ingest,
		Engine: engine{s.engine}, Plugins: plugins{s.plugins},
		Version: o.Version, Commit: o.Commit, NodeName: o.NodeName, Address: s.public.Addr().String(),
		ClusterID: s.journal.ID(), Partitions: s.journal.Partitions(),
		PageKey: s.pageKey, Logger: o.Logger, Registerer: s.metrics,
	})
	s.registry.OnChange(func(changes []subscription.Change) {
		s.plugins.Changed(changes)
		s.engine.Changed(changes)
	})
	s.secrets.OnChange(s.plugins.SecretChanged)
	s.journal.OnTimer(s.engine.Timer)
	s.journal.Start(s.engine.Offer)
	return nil
}

// openStores opens what holds state.
func (s *Server) openStores(ctx context.Context, closers *stack) error {
	o := s.options
	key, err := secret.LoadOrCreateKey(filepath.Join(o.DataDir, "secret.key"))
	if err != nil {
		return err
	}
	// Page tokens outlive a restart, and nodes that share the key understand each other's.
	if s.pageKey, err = hkdf.Key(sha256.New, key, nil, "grapnel page tokens", sha256.Size); err != nil {
		return fmt.Errorf("derive the page key: %w", err)
	}
	s.secrets, err = secret.Open(ctx, secret.Options{Client: s.etcd.client, Key: key, Logger: o.Logger})
	if err != nil {
		return fmt.Errorf("open the secrets: %w", err)
	}
	s.registry, err = subscription.Open(ctx, subscription.Options{Client: s.etcd.client, Logger: o.Logger})
	if err != nil {
		return fmt.Errorf("open the subscriptions: %w", err)
	}
	s.metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "grapnel_config_store_healthy", Help: "1 while etcd answers; at 0 configuration cannot be changed.",
	}, func() float64 {
		if s.registry.Healthy() {
			return 1
		}
		return 0
	}))
	s.journal, err = delivery.Open(delivery.Options{
		Dir: filepath.Join(o.DataDir, "journal"), Partitions: o.Partitions, Logger: o.Logger, Registerer: s.metrics,
	})
	if err != nil {
		return fmt.Errorf("open the journal: %w", err)
	}
	closers.push(s.journal.Close)
	return nil
}

// serve runs the parts until ctx ends or one of them fails, then stops them in order.
func (s *Server) serve(ctx context.Context) error {
	// Each layer has a context of its own, ended when the layer above has stopped.
	base, stopBase := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBase()
	hosts, stopHosts := context.WithCancel(base)
	defer stopHosts()
	parts, failed := errgroup.WithContext(base)

	stores := func(run func(context.Context) error, ctx context.Context, what string) {
		parts.Go(func() error {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			return nil
		})
	}
	stores(s.secrets.Run, base, "secrets")
	stores(s.registry.Run, base, "subscriptions")
	stores(s.sweep, base, "sweep")
	hostEnded := make(chan struct{})
	parts.Go(func() error {
		defer close(hostEnded)
		if err := s.plugins.Run(hosts); err != nil && hosts.Err() == nil {
			return fmt.Errorf("plugin host: %w", err)
		}
		return nil
	})
	stores(s.watchPlugins, hosts, "plugin directory")
	stores(s.engine.Run, base, "dispatch")
	parts.Go(func() error {
		select {
		case err := <-s.etcd.failed():
			return fmt.Errorf("embedded etcd: %w", err)
		case <-base.Done():
			return nil
		}
	})
	public, stopServing, err := s.serveAPI(parts)
	if err != nil {
		stopBase()
		return errors.Join(err, parts.Wait())
	}
	if s.awaitPlugins(ctx, failed) {
		s.log.Info("ready", "listen", s.Addr(), "admin_listen", s.AdminAddr(), "data_dir", s.options.DataDir)
		close(s.ready)
		select {
		case <-ctx.Done():
		case <-failed.Done():
		}
	}
	s.log.Info("stopping", "grace", s.options.Grace)
	stopErr := s.stop(public, stopServing)
	stopHosts()
	<-hostEnded
	stopBase()
	return errors.Join(parts.Wait(), stopErr)
}

// pluginPatience is how long readiness waits for the first-party plugins.
const pluginPatience = 10 * time.Second

// awaitPlugins waits until the first-party plugins serve. A broken plugin does not stop the server: after a
// while it is ready all the same, and what it accepts waits. It reports false when the server is to end.
func (s *Server) awaitPlugins(ctx, failed context.Context) bool {
	wait, done := context.WithTimeout(ctx, pluginPatience)
	defer done()
	defer context.AfterFunc(failed, done)()
	err := s.plugins.Ready(wait)
	if ctx.Err() != nil || failed.Err() != nil {
		return false
	}
	if err != nil {
		s.log.Error("the first-party plugins do not serve; deliveries wait until they do", "err", err)
	}
	return true
}

// stop is the way down until dispatch is still and no call is in progress.
func (s *Server) stop(public *grpc.Server, stopServing func()) error {
	grace, done := context.WithTimeout(context.Background(), s.options.Grace)
	defer done()
	if s.options.Abandon != nil {
		go func() {
			select {
			case <-s.options.Abandon:
				done()
			case <-grace.Done():
			}
		}()
	}
	s.api.Drain()
	s.ingest.Drain()
	var errs []error
	if err := s.engine.Stop(grace); err != nil && !errors.Is(err, context.Canceled) {
		s.log.Warn("attempts abandoned; their deliveries are repeated after the next start", "err", err)
	}
	gracefully(grace, public)
	stopServing()
	flush, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := s.journal.Flush(flush); err != nil {
		errs = append(errs, fmt.Errorf("flush the journal: %w", err))
	}
	return errors.Join(errs...)
}

// gracefully lets calls end until ctx does.
func gracefully(ctx context.Context, g *grpc.Server) {
	ended := make(chan struct{})
	go func() {
		g.GracefulStop()
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
	case <-time.After(5 * time.Second):
	}
	g.Stop()
	<-ended
}

// stack closes what was opened, last first, and joins the errors.
type stack []func() error

func (s *stack) push(f func() error) { *s = append(*s, f) }

func (s *stack) close() error {
	var errs []error
	for i := len(*s) - 1; i >= 0; i-- {
		if err := (*s)[i](); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
