package api_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/eventtype"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
)

// world is the API on a socket, over a registry and a secret store on an etcd of its own. Dispatch and the
// plugins are played by the test.
type world struct {
	namespaces    grapnelv1.NamespaceServiceClient
	subscriptions grapnelv1.SubscriptionServiceClient
	secrets       grapnelv1.SecretServiceClient
	plugins       grapnelv1.PluginServiceClient
	admin         grapnelv1.AdminServiceClient

	engine *fakeEngine
	host   *fakePlugins
	server *api.Server
	log    *lockedBuffer
	// loseEtcd takes the store away for good.
	loseEtcd func()
}

func startWorld(t *testing.T) *world {
	t.Helper()
	etcd := startEtcd(t)
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd.Clients[0].Addr().String()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	w := &world{engine: &fakeEngine{}, host: newFakePlugins(), log: &lockedBuffer{}, loseEtcd: etcd.Close}
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
	journal, err := delivery.Open(delivery.Options{Dir: t.TempDir(), Partitions: 1, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	journal.Start(&station{})
	var running sync.WaitGroup
	running.Go(func() { _ = registry.Run(ctx) })
	running.Go(func() { _ = secrets.Run(ctx) })
	running.Go(func() { _ = types.Run(ctx) })
	t.Cleanup(func() {
		stop()
		running.Wait()
		_ = journal.Close()
	})
	w.server = api.New(api.Options{
		Registry: registry, Secrets: secrets, EventTypes: types, Journal: journal,
		Ingest: ingest.New(ingest.Options{Registry: registry, Journal: journal, EventTypes: types}),
		Engine: w.engine, Plugins: w.host,
		Version: "1.2.3", Commit: "abc", NodeName: "one", Address: "127.0.0.1:7070", ClusterID: "cluster", Partitions: 16,
		Logger: logger,
	})
	w.connect(t)
	return w
}

func (w *world) connect(t *testing.T) {
	g := grpc.NewServer(w.server.ServerOptions()...)
	w.server.Register(g)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = g.Serve(listener) })
	t.Cleanup(func() {
		g.Stop()
		serving.Wait()
	})
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	w.namespaces = grapnelv1.NewNamespaceServiceClient(conn)
	w.subscriptions = grapnelv1.NewSubscriptionServiceClient(conn)
	w.secrets = grapnelv1.NewSecretServiceClient(conn)
	w.plugins = grapnelv1.NewPluginServiceClient(conn)
	w.admin = grapnelv1.NewAdminServiceClient(conn)
}

func startEtcd(t *testing.T) *embed.Etcd {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	loopback := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{loopback}, []url.URL{loopback}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{loopback}, []url.URL{loopback}
	cfg.InitialCluster = cfg.Name + "=" + loopback.String()
	cfg.TickMs, cfg.ElectionMs = 20, 100
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-etcd.Server.StopNotify(): // lost by the test
		default:
			etcd.Close()
		}
	})
	<-etcd.Server.ReadyNotify()
	return etcd
}

// namespace makes a namespace with a signing key and returns the reference to the key.
func (w *world) namespace(t *testing.T, id string) map[string]string {
	t.Helper()
	if _, err := w.namespaces.CreateNamespace(t.Context(), &grapnelv1.CreateNamespaceRequest{NamespaceId: id}); err != nil {
		t.Fatal(err)
	}
	key, err := w.secrets.CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/" + id, SecretId: "key", Kind: grapnelv1.Secret_KIND_HMAC,
	})
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"key": key.GetSecret().GetName()}
}

// subscribe makes a subscription that nothing is wrong with; change may be nil.
func (w *world) subscribe(t *testing.T, ns, id string, change func(*grapnelv1.Subscription)) *grapnelv1.Subscription {
	t.Helper()
	sub := plainSubscription(ns)
	if change != nil {
		change(sub)
	}
	made, err := w.subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/" + ns, SubscriptionId: id, Subscription: sub,
	})
	if err != nil {
		t.Fatal(err)
	}
	return made.GetSubscription()
}

func plainSubscription(ns string) *grapnelv1.Subscription {
	return &grapnelv1.Subscription{
		Uri:        "https://hooks.example.com/orders",
		EventTypes: []string{"order.*"},
		Signers:    []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/" + ns + "/secrets/key"}}},
	}
}

// refusal is an error as a caller sees it.
type refusal struct {
	code     codes.Code
	reason   string
	message  string
	metadata map[string]string
	// fields are the violations by field; a field with several has them joined.
	fields   map[string]string
	resource string
	blockers []string
	quota    bool
	retry    time.Duration
}

// refused takes an error apart and holds it to the rules that every one keeps.
func refused(t *testing.T, err error, code codes.Code, reason string) refusal {
	t.Helper()
	st := status.Convert(err)
	r := refusal{code: st.Code(), message: st.Message(), fields: map[string]string{}}
	seen := map[string]bool{}
	for _, d := range st.Details() {
		kind := string(d.(proto.Message).ProtoReflect().Descriptor().Name())
		if seen[kind] {
			t.Errorf("error has two details %s: %v", kind, err)
		}
		seen[kind] = true
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			r.reason, r.metadata = d.GetReason(), d.GetMetadata()
			if d.GetDomain() != "grapnel" {
				t.Errorf("error domain = %q, want grapnel", d.GetDomain())
			}
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				r.fields[v.GetField()] = strings.TrimPrefix(r.fields[v.GetField()]+"; "+v.GetDescription(), "; ")
			}
		case *errdetails.ResourceInfo:
			r.resource = d.GetResourceName()
		case *errdetails.PreconditionFailure:
			for _, v := range d.GetViolations() {
				r.blockers = append(r.blockers, v.GetSubject())
			}
		case *errdetails.QuotaFailure:
			r.quota = len(d.GetViolations()) > 0
		case *errdetails.RetryInfo:
			r.retry = d.GetRetryDelay().AsDuration()
		}
	}
	if r.code != code || r.reason != reason {
		t.Fatalf("error = %v %s (%v), want %v %s", r.code, r.reason, err, code, reason)
	}
	return r
}

// names checks that the refusal has exactly these fields.
func (r refusal) names(t *testing.T, fields ...string) {
	t.Helper()
	var got []string
	for f := range r.fields {
		got = append(got, f)
	}
	slices.Sort(got)
	slices.Sort(fields)
	if !slices.Equal(got, fields) {
		t.Errorf("violations are about %q, want %q (%v)", got, fields, r.fields)
	}
}

// lockedBuffer keeps a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// fakeEngine answers what the test put in.
type fakeEngine struct {
	mu        sync.Mutex
	cancelled []string
	cancels   int
	cancelErr error
	attempt   delivery.Attempt
	testErr   error
	tested    []*delivery.Event
	patience  time.Duration
	asked     string
	held      string
}

func (e *fakeEngine) Cancel(context.Context, delivery.ID, delivery.LaneKey) (*delivery.Delivery, error) {
	return nil, delivery.ErrNotFound
}

func (e *fakeEngine) Retry(context.Context, delivery.ID, delivery.LaneKey, int) (*delivery.Delivery, error) {
	return nil, delivery.ErrNotFound
}

func (e *fakeEngine) CancelLane(_ context.Context, lane delivery.LaneKey, reason string, _ func() bool) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if lane.Subscription == 0 {
		reason = "without a uid"
	}
	e.cancelled = append(e.cancelled, reason)
	return e.cancels, e.cancelErr
}

func (e *fakeEngine) Deleting(delivery.LaneKey) func() { return func() {} }

func (e *fakeEngine) InFlight(delivery.ID, delivery.LaneKey) bool { return false }

func (e *fakeEngine) HeldBy(delivery.LaneKey) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.held
}

func (e *fakeEngine) Open(delivery.LaneKey) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.held = ""
}

func (e *fakeEngine) WaitReason(delivery.ID, delivery.LaneKey) string { return "" }

func (e *fakeEngine) Status(delivery.LaneKey) *grapnelv1.SubscriptionStatus {
	return &grapnelv1.SubscriptionStatus{Open: false, WaitReason: "subscription paused"}
}

func (e *fakeEngine) Test(ctx context.Context, _ *subscription.Subscription, ev *delivery.Event) (delivery.Result, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tested = append(e.tested, ev)
	if deadline, ok := ctx.Deadline(); ok {
		e.patience = time.Until(deadline)
	}
	return delivery.Result{Attempt: e.attempt}, e.testErr
}

func (e *fakeEngine) Stats(ns string, window time.Duration, top int) (*grapnelv1.Stats, []*grapnelv1.Stats) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = ns + " " + window.String()
	var per []*grapnelv1.Stats
	for range top {
		per = append(per, &grapnelv1.Stats{Subscription: "namespaces/acme/subscriptions/orders", Failed: 2})
	}
	return &grapnelv1.Stats{Attempts: 7}, per
}

func (e *fakeEngine) OldestDue(string) time.Duration { return 3 * time.Second }
func (e *fakeEngine) Running() int                   { return 5 }

// fakePlugins has a signer and a transport; what they say of a configuration is up to the test.
type fakePlugins struct {
	mu   sync.Mutex
	all  []*grapnelv1.Plugin
	says []api.Diagnostic
	err  error
	// checked is the last subscription that was looked at.
	checked *grapnelv1.Subscription
	config  string

	// prepare, when set, answers PrepareSecret; prepared are its calls: plugin, slot, value, algorithm.
	prepare  func(id, slot, value, algorithm string) (api.Prepared, []api.Diagnostic, error)
	prepared [][4]string
	// owner, when set, answers CheckOwnership; asked are the URIs.
	owner func(ctx context.Context, sub *grapnelv1.Subscription) (*delivery.Attempt, error)
	asked []string
}

func newFakePlugins() *fakePlugins {
	return &fakePlugins{all: []*grapnelv1.Plugin{
		{Name: "plugins/http", Version: "1", Roles: []grapnelv1.Plugin_Role{grapnelv1.Plugin_ROLE_TRANSPORT}},
		{Name: "plugins/standard-webhooks", Version: "1", Roles: []grapnelv1.Plugin_Role{grapnelv1.Plugin_ROLE_SIGNER}},
	}}
}

func (p *fakePlugins) say(err error, says ...api.Diagnostic) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.says, p.err = says, err
}

func (p *fakePlugins) Plugins() []*grapnelv1.Plugin { return p.all }

func (p *fakePlugins) Plugin(id string) (*grapnelv1.Plugin, bool) {
	i := slices.IndexFunc(p.all, func(q *grapnelv1.Plugin) bool { return q.GetName() == "plugins/"+id })
	if i < 0 {
		return nil, false
	}
	return p.all[i], true
}

func (p *fakePlugins) Check(_ context.Context, sub *grapnelv1.Subscription) ([]api.Diagnostic, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.checked = sub
	return p.says, p.err
}

func (p *fakePlugins) PrepareSecret(_ context.Context, id, slot string, value []byte, algorithm string) (api.Prepared, []api.Diagnostic, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prepared = append(p.prepared, [4]string{id, slot, string(value), algorithm})
	if _, ok := p.Plugin(id); !ok {
		return api.Prepared{}, nil, api.ErrUnknownPlugin
	}
	if p.prepare == nil {
		return api.Prepared{Value: value}, nil, nil
	}
	return p.prepare(id, slot, string(value), algorithm)
}

func (p *fakePlugins) CheckOwnership(ctx context.Context, sub *grapnelv1.Subscription) (*delivery.Attempt, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, sub.GetUri())
	if p.owner == nil {
		return nil, nil
	}
	return p.owner(ctx, sub)
}

func (p *fakePlugins) CheckConfig(_ context.Context, id string, config []byte) ([]api.Diagnostic, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.config = string(config)
	if _, ok := p.Plugin(id); !ok {
		return nil, api.ErrUnknownPlugin
	}
	return p.says, p.err
}
