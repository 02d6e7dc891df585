// Package servertest starts a whole Grapnel in a test: the real server with its embedded etcd, its journal
// on disk and its plugin processes, and a receiver on a socket that keeps a ledger of what arrived.
//
// The plugin process is the test binary itself, so a package that uses Start needs
//
//	func TestMain(m *testing.M) { servertest.Main(m) }
package servertest

import (
	"context"
	"log"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/grapnel/grapnel/plugins"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/server"
)

// Main is the TestMain of a package that uses Start.
func Main(m *testing.M) {
	if len(os.Args) >= 3 && os.Args[1] == "plugin" && os.Args[2] == "serve" {
		if err := plugins.Serve(strings.Join(os.Args[3:], ""), "test"); err != nil {
			log.Fatal(err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Parts are the processes of the bundled plugin.
func Parts() []server.BuiltinPart {
	var parts []server.BuiltinPart
	for _, p := range plugins.Parts() {
		parts = append(parts, server.BuiltinPart{Name: p.Name, Kinds: p.Names(), Confined: p.Confined})
	}
	return parts
}

// Options of a server under test. The zero value is a server in a new directory.
type Options struct {
	// Dir is the data directory; empty makes one that goes with the test.
	Dir string
	// Adjust changes the server's options before it starts.
	Adjust func(*server.Options)
}

// Server is a running Grapnel.
type Server struct {
	// Addr is the host:port of the public API.
	Addr string
	// AdminAddr is the host:port of the admin listener.
	AdminAddr string
	// Dir is the data directory.
	Dir string
	// Conn is a plain connection to Addr; Client the SDK's.
	Conn   *grpc.ClientConn
	Client *client.Client

	t      testing.TB
	server *server.Server
	stop   context.CancelFunc
	ended  chan error
}

// Start runs a server until the test ends. Deliveries to loopback addresses are allowed.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	if o.Dir == "" {
		o.Dir = filepath.Join(t.TempDir(), "data")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	opts := server.Options{
		DataDir: o.Dir, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0",
		EgressAllow:   []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")},
		BuiltinPlugin: []string{self, "plugin", "serve"}, BuiltinParts: Parts(),
		Version: "test", NodeName: "test", Grace: 10 * time.Second,
		Logger: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if o.Adjust != nil {
		o.Adjust(&opts)
	}
	srv, err := server.New(opts)
	if err != nil {
		t.Fatalf("new server: %v", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{Dir: o.Dir, t: t, server: srv, stop: stop, ended: make(chan error, 1)}
	go func() { s.ended <- srv.Run(ctx) }()
	t.Cleanup(s.Stop)
	select {
	case <-srv.Ready():
	case err := <-s.ended:
		s.ended <- err
		t.Fatalf("server ended at start: %v", err)
	case <-time.After(60 * time.Second):
		t.Fatal("server is not ready after 60s")
	}
	s.Addr, s.AdminAddr = srv.Addr(), srv.AdminAddr()
	if s.Conn, err = grpc.NewClient(s.Addr, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	if s.Client, err = client.Dial(t.Context(), s.Addr, client.WithInsecure()); err != nil {
		t.Fatal(err)
	}
	return s
}

// Stop ends the server in the orderly way, and is the end of every test anyway. It may be called again.
func (s *Server) Stop() {
	s.t.Helper()
	if s.ended == nil {
		return
	}
	if s.Client != nil {
		_ = s.Client.Close()
	}
	if s.Conn != nil {
		_ = s.Conn.Close()
	}
	s.stop()
	select {
	case err := <-s.ended:
		if err != nil {
			s.t.Errorf("server ended with: %v", err)
		}
	case <-time.After(60 * time.Second):
		s.t.Error("server did not stop within 60s")
	}
	s.ended = nil
}

// In is the same server for a subtest, whose failures are then its own. It is not for stopping.
func (s *Server) In(t testing.TB) *Server {
	of := *s
	of.t, of.ended = t, nil
	return &of
}

// PluginPids names the plugin processes by plugin name.
func (s *Server) PluginPids() map[string]int { return s.server.PluginPids() }

// Namespace makes a namespace with generous quotas and a signing key named "key"; it returns the key.
func (s *Server) Namespace(ns string) string {
	s.t.Helper()
	ctx := s.t.Context()
	_, err := grapnelv1.NewNamespaceServiceClient(s.Conn).CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{
		NamespaceId: ns, Namespace: &grapnelv1.Namespace{Quota: &grapnelv1.Quota{MaxPublishRate: 1_000_000}},
	})
	if err != nil {
		s.t.Fatalf("create namespace %q: %v", ns, err)
	}
	sec, err := grapnelv1.NewSecretServiceClient(s.Conn).CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/" + ns, SecretId: "key", Kind: grapnelv1.Secret_KIND_HMAC,
	})
	if err != nil {
		s.t.Fatalf("create secret: %v", err)
	}
	return sec.GetGeneratedValue()
}

// Subscribe makes a subscription signed with the namespace's key; change may be nil.
func (s *Server) Subscribe(ns, id, uri string, change func(*grapnelv1.Subscription)) *grapnelv1.Subscription {
	s.t.Helper()
	sub := &grapnelv1.Subscription{
		Uri:     uri,
		Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/" + ns + "/secrets/key"}}},
	}
	if change != nil {
		change(sub)
	}
	got, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).CreateSubscription(s.t.Context(), &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/" + ns, SubscriptionId: id, Subscription: sub,
	})
	if err != nil {
		s.t.Fatalf("create subscription %q: %v", id, err)
	}
	return got.GetSubscription()
}

// Publish publishes one event and fails the test when it is refused.
func (s *Server) Publish(ns, id, eventType string, data []byte) {
	s.t.Helper()
	_, err := grapnelv1.NewPublishServiceClient(s.Conn).Publish(s.t.Context(), &grapnelv1.PublishRequest{
		Parent: "namespaces/" + ns,
		Event:  &grapnelv1.Event{Id: id, Type: eventType, DataContentType: "application/json", Payload: &grapnelv1.Event_Data{Data: data}},
	})
	if err != nil {
		s.t.Fatalf("publish %q: %v", id, err)
	}
}

// Deliveries lists what a filter finds, all pages.
func (s *Server) Deliveries(ns, filter string) []*grapnelv1.Delivery {
	s.t.Helper()
	var all []*grapnelv1.Delivery
	req := &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/" + ns, Filter: filter, PageSize: 1000}
	for {
		page, err := grapnelv1.NewDeliveryServiceClient(s.Conn).ListDeliveries(s.t.Context(), req)
		if err != nil {
			s.t.Fatalf("list deliveries %q: %v", filter, err)
		}
		all = append(all, page.GetDeliveries()...)
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return all
		}
	}
}

// Await waits until ok holds and fails the test when it does not within half a minute.
func Await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting: %s", what)
		}
		pause := time.NewTimer(2 * time.Millisecond)
		<-pause.C
	}
}

// testWriter sends the server's log to the test's.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	// After the test's end Log would panic; what is said then interests nobody.
	defer func() { _ = recover() }()
	w.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}
