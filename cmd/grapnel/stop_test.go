//go:build unix

package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// mute is a receiver that takes requests and never answers. Waiting until it has some is what tests do.
type mute struct {
	url   string
	taken atomic.Int64
}

func newMute(t *testing.T) *mute {
	m := &mute{}
	over := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		m.taken.Add(1)
		<-over
	}))
	m.url = s.URL
	t.Cleanup(func() {
		close(over)
		s.Close()
	})
	return m
}

// subscribe makes a namespace with one subscription, whose attempts may take longer than a test waits.
func (a *api) subscribe(uri string) {
	a.t.Helper()
	if err := a.create("acme"); err != nil {
		a.t.Fatal(err)
	}
	_, err := grapnelv1.NewSecretServiceClient(a.conn).CreateSecret(a.t.Context(), &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/acme", SecretId: "key", Kind: grapnelv1.Secret_KIND_HMAC,
	})
	if err != nil {
		a.t.Fatal(err)
	}
	_, err = a.subs.CreateSubscription(a.t.Context(), &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/acme", SubscriptionId: "one", Subscription: &grapnelv1.Subscription{
			Uri: uri, AttemptTimeout: durationpb.New(time.Minute), MaxInFlight: 8,
			Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/key"}}},
			// However often it was refused, it is tried again soon.
			RetryPolicy: &grapnelv1.RetryPolicy{Schedule: slices.Repeat([]*durationpb.Duration{durationpb.New(5 * time.Second)}, 20)},
		},
	})
	if err != nil {
		a.t.Fatal(err)
	}
}

// hanging is a server with attempts in flight that last longer than a test waits.
func hanging(t *testing.T, dir string, args ...string) (*running, *api) {
	t.Helper()
	m := newMute(t)
	r := runServerIn(t, dir, append([]string{"--egress-allow", "127.0.0.0/8"}, args...)...)
	a := dialAPI(t, r.ready())
	a.subscribe(m.url)
	for range 3 {
		if err := a.publish(); err != nil {
			t.Fatal(err)
		}
	}
	waitUntil(t, "the receiver has a request", func() bool { return m.taken.Load() > 0 })
	return r, a
}

// TestStopIsBounded: whatever attempts, callers and plugins do, a stop ends soon after its grace, and a second signal ends
// the grace. Attempts here take a minute, which is longer than the test waits.
func TestStopIsBounded(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		grace  string
		before func(t *testing.T, r *running, a *api)
		second os.Signal
	}{
		"grace":                     {grace: "1s"},
		"no grace":                  {grace: "0s"},
		"second SIGTERM":            {grace: "10m", second: syscall.SIGTERM},
		"second SIGINT":             {grace: "10m", second: os.Interrupt},
		"grace, callers that stay":  {grace: "1s", before: stay},
		"second, callers that stay": {grace: "10m", before: stay, second: syscall.SIGTERM},
		"grace, plugin that hangs":  {grace: "1s", before: stopPlugin},
		"second, plugin that hangs": {grace: "10m", before: stopPlugin, second: os.Interrupt},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "data")
			r, a := hanging(t, dir, "--grace", c.grace)
			if c.before != nil {
				c.before(t, r, a)
			}
			if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, "the server stops", func() bool { return strings.Contains(r.log.text(), "msg=stopping") })
			if c.second != nil {
				if err := r.cmd.Process.Signal(c.second); err != nil {
					t.Fatal(err)
				}
			}
			if code := r.code(); code != 0 {
				t.Errorf("exit code %d\n%s", code, r.log.text())
			}
			// Nothing was lost by it.
			r = runServerIn(t, dir)
			a = dialAPI(t, r.ready())
			page, err := grapnelv1.NewDeliveryServiceClient(a.conn).ListDeliveries(t.Context(), &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme"})
			if err != nil || len(page.GetDeliveries()) != 3 {
				t.Errorf("after the next start: %d deliveries, %v", len(page.GetDeliveries()), err)
			}
			for _, d := range page.GetDeliveries() {
				if s := d.GetState(); s != grapnelv1.Delivery_STATE_PENDING && s != grapnelv1.Delivery_STATE_SCHEDULED && s != grapnelv1.Delivery_STATE_IN_FLIGHT {
					t.Errorf("after the next start: %v", s)
				}
			}
		})
	}
}

// stay has callers hold their streams and requests open.
func stay(t *testing.T, r *running, a *api) {
	publish, err := grapnelv1.NewPublishServiceClient(a.conn).PublishStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := publish.Send(&grapnelv1.PublishStreamRequest{}); err != nil {
		t.Fatal(err)
	}
	watch, err := healthpb.NewHealthClient(a.conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", r.admin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := fmt.Fprint(conn, "GET /debug/pprof/trace?seconds=300 HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
}

// stopPlugin has the first-party plugins' process hang.
func stopPlugin(t *testing.T, r *running, a *api) {
	list, err := grapnelv1.NewPluginServiceClient(a.conn).ListPlugins(t.Context(), &grapnelv1.ListPluginsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	stopped := map[int32]bool{}
	for _, p := range list.GetPlugins() {
		for _, i := range p.GetInstances() {
			if pid := i.GetPid(); !stopped[pid] {
				stopped[pid] = true
				if err := syscall.Kill(int(pid), syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if len(stopped) == 0 {
		t.Fatal("no plugin process")
	}
}
