// Package server wires Grapnel together: it opens the stores, starts the parts bottom-up, serves, and
// stops them top-down. It holds no rule of the domain.
//
// Start: data directory → room on the disk → journal → configuration store (etcd) → secrets, subscriptions and event types → plugin host →
// dispatch → ingest → API. What is new is made aside and renamed, each wait is bounded, and a store that is not
// the other's is refused. Stop runs the other way, in named steps that are each bounded: health says NOT_SERVING,
// publishes are refused, dispatch takes no new work and waits for its attempts until the grace ends,
// calls end, plugins drain, the configuration store closes, the journal closes.
package server

import (
	"cmp"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/grapnel/grapnel/internal/garbage"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dirlock"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/eventtype"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/notice"
	"github.com/grapnel/grapnel/server/pluginhost"
	"github.com/grapnel/grapnel/server/replay"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
	"github.com/grapnel/grapnel/server/tracing"
)

// Server is one Grapnel node. Build it with New; Run it once.
type Server struct {
	options Options
	log     *slog.Logger
	metrics *prometheus.Registry
	ready   chan struct{}

	public, admin net.Listener

	memory   memoryPlan
	space    *delivery.Space
	etcd     *configStore
	secrets  *secret.Store
	registry *subscription.Registry
	journal  *delivery.Journal
	types    *eventtype.Store
	plugins  *pluginhost.Host
	engine   *dispatch.Engine
	ingest   *ingest.Ingest
	replays  *replay.Runner
	notices  *notice.Teller
	tracer   *tracing.Tracer // nil where there are no traces
	api      *api.Server
	health   *health
	pageKey  []byte

	ending *ending  // Run's
	strays []string // in the plugin directory, as told last; first open's, then watchPlugins'

	copying sync.Mutex // held while the stores are copied for a backup, and while marks are put into etcd
	backups sync.Mutex // held by the one backup at a time

	mu      sync.Mutex
	started bool
}

// New checks the options. It opens and starts nothing.
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
// after an orderly stop, also one during the start. It may be called once.
//
// Once ctx has ended it returns within Options.Grace, which a start does not have, and 5 s; or within a second of
// Options.Abandon. What has not ended by then, which takes a disk that does not answer or the like, is left as it is,
// with an error that names it: the process is then to end.
func (s *Server) Run(ctx context.Context) error {
	s.mu.Lock()
	again := s.started
	s.started = true
	s.mu.Unlock()
	if again {
		return errors.New("a server runs once")
	}
	s.ending = newEnding(ctx, s.options.Abandon)
	defer s.ending.release()
	ended := make(chan error, 1)
	go func() { ended <- s.run(ctx) }()
	select {
	case err := <-ended:
		return err
	case <-s.ending.left:
	}
	err := s.ending.err()
	if !s.ending.allowed() {
		s.log.Warn("stopped while starting", "err", err)
		return nil
	}
	return err
}

func (s *Server) run(ctx context.Context) (err error) {
	var closers stack
	defer func() {
		s.ending.begin() // for a start or a part that failed
		err = errors.Join(err, closers.close(s.ending))
	}()
	if err := s.open(ctx, &closers); err != nil {
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			s.log.Info("stopped while starting")
			return nil
		}
		return err
	}
	return s.serve(ctx)
}

// open makes everything that needs no goroutine of ours, bottom-up.
func (s *Server) open(ctx context.Context, closers *stack) (err error) {
	o := s.options
	if err := s.takeDir(closers); err != nil {
		return err
	}
	if s.public, err = net.Listen("tcp", o.Listen); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	closers.push("stop listening", s.public.Close)
	if s.admin, err = net.Listen("tcp", o.AdminListen); err != nil {
		return fmt.Errorf("listen for administration: %w", err)
	}
	closers.push("stop listening for administration", s.admin.Close)
	if err := s.openTracer(ctx); err != nil {
		return err
	}
	closers.push("send the last traces", s.closeTracer)
	s.planMemory()
	closers.push("stop pacing the garbage collector", s.memory.apply())
	if err := s.openStores(ctx, closers); err != nil {
		return err
	}
	s.ending.at("read the configuration")
	if err := s.openConfig(ctx); err != nil {
		return err
	}
	s.ingest = ingest.New(ingest.Options{
		Registry: s.registry, Journal: s.journal, EventTypes: s.types, Near: s.tellNear, Tracer: s.tracer, Logger: o.Logger, Registerer: s.metrics,
	})
	s.notices = notice.New(notice.Options{Registry: s.registry, Recorder: s.ingest, Logger: o.Logger, Registerer: s.metrics})
	s.ending.at("read the plugin directory")
	if s.plugins, err = s.newPlugins(ctx); err != nil {
		return err
	}
	s.engine = dispatch.New(dispatch.Options{
		Journal: s.journal, Subscriptions: subscriptions{s.registry}, Attempter: s.plugins,
		Slots: s.memory.slots, Window: s.plugins.Window, WindowBytes: s.memory.window,
		Disable: s.disable, Tell: s.tellIncident, Logger: o.Logger, Registerer: s.metrics,
	})
	s.replays = replay.New(replay.Options{
		Journal: s.journal, Registry: s.registry, Select: s.selectDeliveries, Erases: s.selectErased, Copied: s.beingCopied, Ended: s.tellReplay, Logger: o.Logger, Registerer: s.metrics,
	})
	s.api = api.New(api.Options{
		Registry: s.registry, Secrets: s.secrets, EventTypes: s.types, Journal: s.journal, Ingest: s.ingest,
		Engine: engine{s.engine, s.registry}, Plugins: plugins{s.plugins}, Replays: replays{s.replays},
		Version: o.Version, Commit: o.Commit, NodeName: o.NodeName, Address: s.public.Addr().String(),
		ClusterID: s.journal.ID(), Partitions: s.journal.Partitions(),
		MaxCalls: o.MaxCalls, MaxCallsPerNamespace: o.MaxCallsPerNamespace, MaxWatches: o.MaxWatches,
		MaxCallsPerConnection: o.MaxCallsPerConnection, MaxStreamsPerConnection: o.MaxStreamsPerConnection,
		PageKey: s.pageKey, Room: s.hasRoom, Tracer: s.tracer, Logger: o.Logger, Registerer: s.metrics,
	})
	s.health = s.newServerHealth(func(serving bool) {
		s.api.SetServing(grapnelv1.PublishService_ServiceDesc.ServiceName, serving)
	})
	s.registry.OnChange(func(changes []subscription.Change) {
		s.plugins.Changed(changes)
		s.engine.Changed(changes)
		s.tellCrowded(changes)
	})
	s.space.OnFilling(s.tellFilling)
	s.etcd.room.near = s.tellConfigStore
	s.secrets.OnChange(s.plugins.SecretChanged)
	s.journal.Start(s.engine)
	return nil
}

// tracesPatience is how long a stop waits for the collector of traces.
const tracesPatience = time.Second

// openTracer makes the tracer, where the environment asks for one.
func (s *Server) openTracer(ctx context.Context) (err error) {
	if !s.options.Tracing {
		return nil
	}
	o := s.options
	s.tracer, err = tracing.Open(ctx, tracing.Options{Version: o.Version, NodeName: o.NodeName, Logger: o.Logger, Registerer: s.metrics})
	return err
}

// closeTracer sends what waits. What the collector does not take by then is lost, which is no fault of the stop.
func (s *Server) closeTracer() error {
	ctx, cancel := context.WithTimeout(s.ending.rest, tracesPatience)
	defer cancel()
	if err := s.tracer.Close(ctx); err != nil {
		s.log.Warn("traces lost", "err", err)
	}
	return nil
}

// takeDir makes the data directory this process's, before anything in it is looked at.
func (s *Server) takeDir(closers *stack) error {
	dir := s.options.DataDir
	if err := makeDir(dir); err != nil {
		return fmt.Errorf("make the data directory: %w", err)
	}
	lock, err := dirlock.Take(filepath.Join(dir, "lock"))
	if held := new(dirlock.HeldError); errors.As(err, &held) {
		return fmt.Errorf("data directory %s is in use by %s", dir, held.Holder)
	}
	if err != nil {
		return fmt.Errorf("data directory %s cannot be used: %w", dir, err)
	}
	closers.push("give the data directory back", lock.Release)
	return nil
}

// planMemory divides what there is.
func (s *Server) planMemory() {
	o := s.options
	total := o.MemoryBytes
	if total == 0 {
		total = availableMemory(os.ReadFile)
	}
	s.memory = planMemory(total)
	s.memory.window = cmp.Or(o.WindowBytes, s.memory.window)
	wanted := cmp.Or(o.Slots, s.memory.slots)
	s.memory.slots = wanted
	s.memory = s.memory.withFiles(mostFiles())
	if s.memory.slots < wanted {
		s.log.Warn("fewer attempts in flight than could be: the limit of open files (ulimit -n) is low",
			"slots", s.memory.slots, "wanted", wanted, "open_files", mostFiles())
	}
	s.log.Info("memory", "bytes", total, "heap_bytes", s.memory.heap, "plugin_bytes", s.memory.plugin,
		"window_bytes", s.memory.window, "slots", s.memory.slots)
}

// openStores opens the two stores, and makes them where there are none. Before either can ask for it there is room on
// the disk, if that is in our power; and the journal is there before etcd is, so that an etcd without a journal has
// lost one.
func (s *Server) openStores(ctx context.Context, closers *stack) (err error) {
	o := s.options
	if err := checkPresence(o); err != nil {
		return err
	}
	s.space = delivery.NewSpace(delivery.SpaceOptions{Dir: o.DataDir, Also: []string{journalDir(o), etcdDir(o)}, MinFreeBytes: o.MinFreeBytes, Logger: o.Logger})
	opening := "open the journal in " + journalDir(o)
	s.ending.at(opening) // takes no context
	if err := step(s.log, opening, s.openJournal); err != nil {
		return fmt.Errorf("open the journal: %w", err)
	}
	closers.push("close the journal in "+journalDir(o), s.journal.Close)
	if err := ctx.Err(); err != nil {
		return err
	}
	s.ending.at("open etcd")
	if s.etcd, err = openConfigStore(ctx, o); err != nil {
		return err
	}
	closers.push("close etcd", s.etcd.close)
	s.etcd.watchRoom(s.metrics)
	if err := wait(ctx, s.log, "etcd to say whose it is", s.checkStores); err != nil {
		return err
	}
	return s.checkMarks(ctx)
}

// checkStores refuses strangers.
func (s *Server) checkStores(ctx context.Context) error {
	if s.options.AdoptStores {
		return keyspace.Adopt(ctx, s.etcd.client, configPrefix, s.journal.ID())
	}
	owner, err := keyspace.Owner(ctx, s.etcd.client, configPrefix)
	if broken := new(keyspace.BrokenError); errors.As(err, &broken) {
		return fmt.Errorf("%w: %w; %s", errStranger, err, meant)
	}
	if err != nil {
		return err
	}
	return checkPair(s.options, s.stores(), owner)
}

// stores are those that are open.
func (s *Server) stores() pair { return pair{journal: s.journal.ID(), etcd: s.etcd.cluster} }

// openJournal opens the journal. A new one is made aside and closed again first: the log of the process that makes a
// journal is of an older format, in which a damaged record looks like the end of the log.
func (s *Server) openJournal() (err error) {
	dir := journalDir(s.options)
	options := delivery.Options{
		Dir: dir, Partitions: s.options.Partitions, Space: s.space,
		CacheBytes: s.memory.cache, MemTableBytes: s.memory.memTable, Logger: s.options.Logger,
	}
	highWater := HighWater(dir)
	if err := os.RemoveAll(backupDir(s.options)); err != nil { // a kill may have left it
		return err
	}
	if s.options.AdoptStores { // another journal's notes say nothing about this one
		if err := os.Remove(highWater); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if !journalMade(s.options) {
		if err := makeJournal(options); err != nil {
			return err
		}
	}
	options.Registerer, options.HighWater, options.AcceptLoss = s.metrics, highWater, s.options.AcceptLoss
	s.journal, err = delivery.Open(options)
	if errors.Is(err, delivery.ErrStranger) {
		err = fmt.Errorf("%w: expected the journal that %s is about: %w; %s", errStranger, highWater, err, meant)
	}
	return err
}

// HighWater is where the high-water marks of the journal in a directory are.
func HighWater(dir string) string { return filepath.Clean(dir) + ".highwater" }

// makeJournal makes a journal, whole or not at all.
func makeJournal(options delivery.Options) error {
	dir, aside := options.Dir, options.Dir+".new"
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	// An empty directory gives way. One that cannot is a volume of its own, and has the journal made in it.
	inPlace := os.Remove(dir)
	if inPlace == nil || errors.Is(inPlace, fs.ErrNotExist) {
		options.Dir = aside
	}
	j, err := delivery.Open(options)
	if err == nil {
		err = j.Close()
	}
	if err != nil || options.Dir == dir {
		return err
	}
	return moveDurably(aside, dir)
}

// keyFile is the key of the secrets.
func keyFile(o Options) string { return filepath.Join(o.DataDir, "secret.key") }

// openConfig opens what etcd holds.
func (s *Server) openConfig(ctx context.Context) error {
	o := s.options
	key, err := secret.LoadOrCreateKey(keyFile(o), func() (sealed bool, err error) {
		err = wait(ctx, s.log, "etcd to say whether it holds secrets", func(ctx context.Context) error {
			sealed, err = secret.Sealed(ctx, s.etcd.client, configPrefix)
			return err
		})
		return sealed, err
	})
	if err != nil {
		return err
	}
	// Page tokens outlive a restart, and nodes that share the key understand each other's.
	if s.pageKey, err = hkdf.Key(sha256.New, key, nil, "grapnel page tokens", sha256.Size); err != nil {
		return fmt.Errorf("derive the page key: %w", err)
	}
	id := s.journal.ID()
	err = step(s.log, "read secrets, subscriptions and event types from etcd", func() (err error) {
		s.secrets, err = secret.Open(ctx, secret.Options{Client: s.etcd.client, Identity: id, Key: key, Expiring: s.tellExpiring, Logger: o.Logger})
		if err != nil {
			return fmt.Errorf("open the secrets with key file %s: %w", keyFile(o), err)
		}
		s.registry, err = subscription.Open(ctx, subscription.Options{Client: s.etcd.client, Identity: id, Logger: o.Logger})
		if err != nil {
			return fmt.Errorf("open the subscriptions: %w", err)
		}
		s.types, err = eventtype.Open(ctx, eventtype.Options{
			Client: s.etcd.client, Identity: id, CacheBytes: max(4<<20, int(s.memory.heap/32)), Logger: o.Logger,
		})
		if err != nil {
			return fmt.Errorf("open the event types: %w", err)
		}
		return nil
	})
	if stranger := new(keyspace.StrangerError); errors.As(err, &stranger) { // since it was asked, or nobody's
		return fmt.Errorf("%w: %w; %s", errStranger, stranger, meant)
	}
	if err != nil {
		return err
	}
	s.metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "grapnel_config_store_healthy", Help: "1 while etcd answers; at 0 configuration cannot be changed.",
	}, func() float64 {
		if s.registry.Healthy() {
			return 1
		}
		return 0
	}))
	s.metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "grapnel_dispatch_paused", Help: "1 while all dispatch is paused, by PauseDispatch.",
	}, func() float64 {
		if s.registry.Snapshot().Dispatch().Paused {
			return 1
		}
		return 0
	}))
	return notePair(o, s.stores())
}

// hasRoom is nil while new configuration may be stored.
func (s *Server) hasRoom() error {
	if err := s.space.Err(); err != nil {
		return err
	}
	return s.etcd.Err()
}

// serve runs the parts until ctx ends or one of them fails, then stops them in order.
func (s *Server) serve(ctx context.Context) error {
	// Each layer has a context of its own, ended when the layer above has stopped.
	s.ending.allow(s.options.Grace)
	base, stopBase := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBase()
	watching, stopWatching := context.WithCancel(base)
	defer stopWatching()
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
	stores(s.types.Run, base, "event types")
	stores(s.notices.Run, base, "operational events")
	stores(s.sweep, base, "sweep")
	stores(s.keepMarks, base, "notes of what was acknowledged")
	stores(func(ctx context.Context) error { return s.etcd.keepRoom(ctx, s.space.Free) }, base, "room in etcd")
	stores(garbage.Return, base, "memory")
	parts.Go(func() error { return s.plugins.Run(base) }) // returns nil
	stores(s.watchPlugins, watching, "plugin directory")
	parts.Go(func() error {
		// A stop during the start may come before Run.
		if err := s.engine.Run(base); err != nil && base.Err() == nil && !errors.Is(err, dispatch.ErrStopped) {
			return fmt.Errorf("dispatch: %w", err)
		}
		return nil
	})
	parts.Go(func() error {
		select {
		case err := <-s.etcd.failed():
			return fmt.Errorf("embedded etcd: %w", err)
		case <-base.Done():
			return nil
		}
	})
	replaying, stopReplaying := context.WithCancel(base)
	defer stopReplaying()
	stores(s.replays.Run, replaying, "replays")
	public, stopServing, err := s.serveAPI(parts)
	if err != nil {
		stopBase()
		return errors.Join(err, parts.Wait())
	}
	looking, stopLooking := context.WithCancel(base)
	defer stopLooking()
	var looks sync.WaitGroup
	if s.awaitPlugins(ctx, failed) {
		looks.Go(func() { s.health.run(looking) })
		s.log.Info("ready", "listen", s.Addr(), "admin_listen", s.AdminAddr(), "data_dir", s.options.DataDir)
		close(s.ready)
		select {
		case <-ctx.Done():
		case <-failed.Done():
		}
	}
	s.log.Info("stopping", "grace", max(s.options.Grace, 0))
	s.ending.begin()
	stopReplaying() // it makes deliveries, which nobody takes from here on
	stopLooking()
	looks.Wait() // from here on nothing says again that publishes are served
	stopErr := s.stop(public, stopServing)
	s.ending.at("end the plugins")
	stopWatching()
	_ = s.plugins.Close(s.ending.grace) // an error says that they were killed
	s.ending.at("end what runs in the background")
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
	err := step(s.log, "start the first-party plugins", func() error { return s.plugins.Ready(wait) })
	if ctx.Err() != nil || failed.Err() != nil {
		return false
	}
	if err != nil {
		s.log.Error("the first-party plugins do not serve; deliveries wait until they do", "err", err)
	}
	return true
}

// stop is the way down until dispatch is still and no call is in progress.
func (s *Server) stop(public *grpc.Server, stopServing func(context.Context)) error {
	end := s.ending
	s.api.Drain()
	s.ingest.Drain()
	end.at("end the attempts in flight")
	if err := s.engine.Stop(end.grace); err != nil {
		s.log.Warn("attempts abandoned; their deliveries are repeated after the next start", "err", err)
	}
	end.at("store the operational events that wait")
	telling, cancel := context.WithTimeout(end.rest, tellingAtEnd)
	defer cancel()
	if err := s.notices.Stop(telling); err != nil {
		s.log.Warn("operational events lost", "err", err)
	}
	end.at("end the calls")
	end.calls(public)
	end.at("end the calls of the administrator")
	stopServing(end.grace)
	end.at("flush the journal")
	if err := s.journal.Flush(end.rest); err != nil {
		return fmt.Errorf("flush the journal: %w", err)
	}
	return nil
}

// stack closes what was opened, last first, and joins the errors.
type stack []closer

type closer struct {
	what  string
	close func() error
}

func (s *stack) push(what string, f func() error) { *s = append(*s, closer{what, f}) }

func (s *stack) close(e *ending) error {
	var errs []error
	for i := len(*s) - 1; i >= 0; i-- {
		e.at((*s)[i].what)
		if err := (*s)[i].close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
