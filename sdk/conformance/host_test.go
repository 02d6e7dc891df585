//go:build unix

package conformance_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost"
	"github.com/grapnel/grapnel/server/subscription"
)

type oneResult chan delivery.Result

func (c oneResult) Complete(_ *delivery.Job, r delivery.Result) { c <- r }

// TestServerTakesThePluginTheSuitePasses delivers by the server's own host with the plugin that has no SDK, no
// go-plugin, no health service and none of go-plugin's streams: what the suite asks for is enough.
func TestServerTakesThePluginTheSuitePasses(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"", "unary"} {
		if h := deliver(t, true, mode); h.Get("X-Raw-Signature") == "" || h.Get("Webhook-Id") != "evt_1" || h.Get("X-Raw-Label") != "x" {
			t.Errorf("mode %q: headers %v", mode, h)
		}
	}
}

// deliver has the server's host deliver one event with the raw plugin, started with these arguments, and returns the
// headers that arrived.
func deliver(t *testing.T, signed bool, args ...string) http.Header {
	t.Helper()
	got := make(chan http.Header, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r.Header }))
	t.Cleanup(srv.Close)
	host, err := pluginhost.New(pluginhost.Options{
		Plugins: []pluginhost.Spec{
			{Path: os.Args[0], Args: append([]string{"plugin-raw"}, args...), Builtin: true},
			{Path: os.Args[0], Args: []string{"plugin-bundled"}, Builtin: true},
		}, Dir: t.TempDir(),
		EgressAllow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")},
		Secrets: func(string) ([]pluginhost.SecretVersion, bool) {
			return []pluginhost.SecretVersion{{Number: 1, Value: []byte("whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")}}, true
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = host.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	ready, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	if err := host.Ready(ready); err != nil {
		t.Fatal(err)
	}
	config, err := structpb.NewStruct(map[string]any{"label": "x"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(oneResult, 1)
	signers := []*grapnelv1.PluginBinding{{Plugin: "plugins/raw-sign", Config: config, Secrets: map[string]string{"key": "namespaces/n/secrets/k"}}}
	if !signed {
		signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}
	}
	sub := subscription.Of(&grapnelv1.Subscription{
		Name: "namespaces/n/subscriptions/s", Uri: srv.URL, Transport: &grapnelv1.PluginBinding{Plugin: "plugins/raw-http", Config: config},
		Signers: signers, Transformer: &grapnelv1.PluginBinding{Plugin: "plugins/raw-transform", Config: config},
	})
	sub.UID, sub.Revision = [16]byte{1}, 1
	sub.AttemptTimeout, sub.MaxInFlight, sub.MaxAttempts = 10*time.Second, 8, 1
	host.Attempt(sub, &delivery.Job{MaxAttempts: 1, Event: &delivery.Event{ID: "1", Source: "/t", Type: "t", Payload: []byte("{}"), UID: "evt_1"}}, done)
	select {
	case r := <-done:
		if r.Attempt.Outcome != delivery.OutcomeSucceeded {
			t.Fatalf("%v: %+v", args, r)
		}
		return <-got
	case <-time.After(20 * time.Second):
		t.Fatalf("%v: no result", args)
	}
	return nil
}
