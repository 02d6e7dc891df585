package api_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/eventtype"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
)

// station is the API over a real journal and registry. Dispatch is the journal's edits and what the test
// says is in flight.
type station struct {
	etcd *clientv3.Client
	*world
	conn       *grpc.ClientConn
	grpc       *grpc.Server
	publish    grapnelv1.PublishServiceClient
	events     grapnelv1.EventServiceClient
	deliveries grapnelv1.DeliveryServiceClient
	types      grapnelv1.EventTypeServiceClient
	journal    *delivery.Journal
	registry   *subscription.Registry
	ingest     *ingest.Ingest
	metrics    *prometheus.Registry
	hooks      *hooks

	mu   sync.Mutex
	jobs []delivery.Job
}

// Offer, Timed and Edited make the station the journal's follower.
func (st *station) Offer(_ delivery.Commit, jobs []delivery.Job) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.jobs = append(st.jobs, jobs...)
}

func (st *station) Timed(delivery.Commit, delivery.LaneKey, uint16, delivery.Row) {}

func (st *station) Edited(delivery.Commit, delivery.LaneKey, uint16, uint64, uint32) {}

// key is what the journal knows a namespace by.
func (st *station) key(ns string) delivery.NamespaceKey {
	return delivery.UID(st.registry.Snapshot().Namespace(ns).UID).NamespaceKey()
}

// hooks is an engine over a journal.
type hooks struct {
	*fakeEngine
	journal *delivery.Journal

	mu       sync.Mutex
	inFlight map[delivery.ID]bool
	// onRetry, when set, comes first in Retry.
	onRetry func(context.Context)
}

func (h *hooks) Cancel(ctx context.Context, id delivery.ID, lane delivery.LaneKey) (*delivery.Delivery, error) {
	return h.journal.Cancel(ctx, lane, id, "cancelled by a caller")
}

func (h *hooks) Retry(ctx context.Context, id delivery.ID, lane delivery.LaneKey, ifAttempts int) (*delivery.Delivery, error) {
	h.mu.Lock()
	hook := h.onRetry
	h.mu.Unlock()
	if hook != nil {
		hook(ctx)
	}
	if h.InFlight(id, lane) {
		return nil, delivery.ErrInvalidState
	}
	return h.journal.Retry(ctx, lane, id, ifAttempts)
}

func (h *hooks) InFlight(id delivery.ID, _ delivery.LaneKey) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.inFlight[id]
}

func (h *hooks) set(change func(*hooks)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(h)
}

func startStation(t *testing.T, change ...func(*api.Options)) *station {
	t.Helper()
	etcd := startEtcd(t)
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd.Clients[0].Addr().String()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	w := &world{engine: &fakeEngine{}, host: newFakePlugins(), log: &lockedBuffer{}, loseEtcd: etcd.Close}
	st := &station{world: w, etcd: client, metrics: prometheus.NewRegistry()}
	logger := slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx, stop := context.WithCancel(context.Background())
	registry, err := subscription.Open(ctx, subscription.Options{Client: client, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	types, err := eventtype.Open(ctx, eventtype.Options{Client: client, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	secrets, err := secret.Open(ctx, secret.Options{Client: client, Key: bytes.Repeat([]byte{7}, 32), Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	st.registry = registry
	st.journal, err = delivery.Open(delivery.Options{Dir: t.TempDir(), Partitions: 4, MinFreeBytes: -1, BallastBytes: -1, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	st.journal.Start(st)
	var running sync.WaitGroup
	running.Go(func() { _ = registry.Run(ctx) })
	running.Go(func() { _ = secrets.Run(ctx) })
	running.Go(func() { _ = types.Run(ctx) })
	t.Cleanup(func() {
		stop()
		running.Wait()
		_ = st.journal.Close()
	})
	st.hooks = &hooks{fakeEngine: w.engine, journal: st.journal, inFlight: map[delivery.ID]bool{}}
	st.ingest = ingest.New(ingest.Options{Registry: registry, Journal: st.journal, EventTypes: types, Logger: logger, Registerer: st.metrics})
	o := api.Options{
		Registry: registry, Secrets: secrets, EventTypes: types, Journal: st.journal, Ingest: st.ingest, Engine: st.hooks, Plugins: w.host,
		Version: "1.2.3", NodeName: "one", Logger: logger, Registerer: st.metrics,
	}
	for _, c := range change {
		c(&o)
	}
	w.server = api.New(o)
	st.serve(t)
	return st
}

// compact has etcd forget its history.
func (st *station) compact(t *testing.T) {
	t.Helper()
	head, err := st.etcd.Get(t.Context(), "none")
	if err == nil {
		_, err = st.etcd.Compact(t.Context(), head.Header.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (st *station) serve(t *testing.T) {
	st.grpc = grpc.NewServer(st.server.ServerOptions()...)
	st.server.Register(st.grpc)
	st.server.RegisterReflection(st.grpc)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = st.grpc.Serve(st.server.Listen(listener)) })
	t.Cleanup(func() {
		st.grpc.Stop()
		serving.Wait()
	})
	st.conn, err = grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.conn.Close() })
	st.namespaces = grapnelv1.NewNamespaceServiceClient(st.conn)
	st.subscriptions = grapnelv1.NewSubscriptionServiceClient(st.conn)
	st.secrets = grapnelv1.NewSecretServiceClient(st.conn)
	st.plugins = grapnelv1.NewPluginServiceClient(st.conn)
	st.admin = grapnelv1.NewAdminServiceClient(st.conn)
	st.publish = grapnelv1.NewPublishServiceClient(st.conn)
	st.events = grapnelv1.NewEventServiceClient(st.conn)
	st.deliveries = grapnelv1.NewDeliveryServiceClient(st.conn)
	st.types = grapnelv1.NewEventTypeServiceClient(st.conn)
}

// takeJobs returns the deliveries that the journal has handed out so far, when there are n of them.
func (st *station) takeJobs(t *testing.T, n int) []delivery.Job {
	t.Helper()
	var jobs []delivery.Job
	eventually(t, func() bool {
		st.mu.Lock()
		defer st.mu.Unlock()
		jobs = st.jobs
		return len(jobs) >= n
	})
	st.mu.Lock()
	defer st.mu.Unlock()
	st.jobs = nil
	return jobs
}

// eventually waits for a condition, which is looked at often.
func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	end := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("waited 10 s in vain")
		}
	}
}

// disable does what dispatch does to a subscription that fails for too long.
func (st *station) disable(t *testing.T, ns, id string) {
	t.Helper()
	if _, err := st.registry.SetState(t.Context(), ns, id, [16]byte{}, grapnelv1.Subscription_STATE_DISABLED, "test"); err != nil {
		t.Fatal(err)
	}
}
