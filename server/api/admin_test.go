package api_test

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
)

func TestPluginService(t *testing.T) {
	w := startWorld(t)
	ctx := t.Context()
	schema, err := structpb.NewStruct(map[string]any{"type": "object"})
	if err != nil {
		t.Fatal(err)
	}
	http := w.host.all[0]
	http.ConfigSchema, http.ConfigExample = schema, schema
	http.Instances = []*grapnelv1.PluginInstance{{RestartCount: 2}}

	page, err := w.plugins.ListPlugins(ctx, &grapnelv1.ListPluginsRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	if p := page.GetPlugins(); len(p) != 1 || p[0].GetName() != "plugins/http" || p[0].GetConfigSchema() != nil || p[0].GetConfigExample() != nil || page.GetNextPageToken() == "" {
		t.Errorf("first page = %v", page)
	}
	page, err = w.plugins.ListPlugins(ctx, &grapnelv1.ListPluginsRequest{PageSize: 5, PageToken: page.GetNextPageToken()})
	if p := page.GetPlugins(); err != nil || len(p) != 1 || p[0].GetName() != "plugins/standard-webhooks" || page.GetNextPageToken() != "" {
		t.Errorf("second page = %v, %v", page, err)
	}
	got, err := w.plugins.GetPlugin(ctx, &grapnelv1.GetPluginRequest{Name: "plugins/http"})
	if err != nil {
		t.Fatal(err)
	}
	want := proto.CloneOf(http)
	want.Instances[0].Node = "nodes/one"
	if diff := cmp.Diff(want, got.GetPlugin(), protocmp.Transform()); diff != "" {
		t.Errorf("plugin (-want +got):\n%s", diff)
	}
	_, err = w.plugins.GetPlugin(ctx, &grapnelv1.GetPluginRequest{Name: "plugins/nothing"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	_, err = w.plugins.GetPlugin(ctx, &grapnelv1.GetPluginRequest{Name: "http"})
	if r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); r.fields["name"] != "must look like plugins/NAME" {
		t.Errorf("violations = %v", r.fields)
	}
}

func TestValidatePluginConfig(t *testing.T) {
	w := startWorld(t)
	config, err := structpb.NewStruct(map[string]any{"method": "GET"})
	if err != nil {
		t.Fatal(err)
	}
	validate := func(name string) error {
		_, err := w.plugins.ValidatePluginConfig(t.Context(), &grapnelv1.ValidatePluginConfigRequest{Name: name, Config: config})
		return err
	}
	w.host.say(nil, api.Diagnostic{Field: "method", Summary: "odd", Warning: true})
	if err := validate("plugins/http"); err != nil {
		t.Fatal("a warning is no error:", err)
	}
	w.host.say(nil,
		api.Diagnostic{Field: "config.method", Summary: "must be POST", Code: "schema.enum"},
		api.Diagnostic{Field: "headers[0].name", Summary: "is empty"},
		api.Diagnostic{Summary: "is too large"})
	refused(t, validate("plugins/http"), codes.InvalidArgument, "INVALID_FIELD").names(t, "config.method", "config.headers[0].name", "config")
	w.host.say(api.ErrPluginUnavailable)
	if r := refused(t, validate("plugins/http"), codes.Unavailable, "PLUGIN_UNAVAILABLE"); r.retry == 0 {
		t.Error("no RetryInfo")
	}
	refused(t, validate("plugins/nothing"), codes.NotFound, "RESOURCE_NOT_FOUND")
	w.host.say(nil)
	config = nil
	if err := validate("plugins/http"); err != nil || w.host.config != "{}" {
		t.Errorf("no config is checked as %q, %v", w.host.config, err)
	}
}

func TestAdminService(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	ctx := t.Context()
	got, err := w.admin.GetCluster(ctx, &grapnelv1.GetClusterRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := &grapnelv1.GetClusterResponse{
		Version: "1.2.3", Commit: "abc", StoreHealthy: true, ClusterId: "cluster", DispatchEtag: "0",
		Nodes: []*grapnelv1.Node{{
			Name: "nodes/one", Address: "127.0.0.1:7070", Version: "1.2.3", State: grapnelv1.Node_STATE_READY,
			OwnedPartitions: 16, InFlight: 5,
		}},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform(), protocmp.IgnoreFields(&grapnelv1.Node{}, "start_time")); diff != "" {
		t.Errorf("cluster (-want +got):\n%s", diff)
	}
	if since := time.Since(got.GetNodes()[0].GetStartTime().AsTime()); since < 0 || since > time.Minute {
		t.Errorf("started %v ago", since)
	}
	w.server.Drain()
	got, err = w.admin.GetCluster(ctx, &grapnelv1.GetClusterRequest{})
	if err != nil || got.GetNodes()[0].GetState() != grapnelv1.Node_STATE_DRAINING {
		t.Errorf("draining = %v, %v", got, err)
	}

	for _, test := range []struct {
		req   *grapnelv1.GetStatsRequest
		asked string
		rows  int
	}{
		{&grapnelv1.GetStatsRequest{Parent: "namespaces/-"}, " 5m0s", 0},
		{&grapnelv1.GetStatsRequest{Parent: "namespaces/acme", Window: durationpb.New(time.Hour), TopSubscriptions: 2}, "acme 1h0m0s", 2},
	} {
		stats, err := w.admin.GetStats(ctx, test.req)
		if err != nil || w.engine.asked != test.asked || len(stats.GetSubscriptions()) != test.rows || stats.GetTotal().GetAttempts() != 7 {
			t.Errorf("%v: asked for %q, got %v, %v", test.req, w.engine.asked, stats, err)
		}
	}
	_, err = w.admin.GetStats(ctx, &grapnelv1.GetStatsRequest{Parent: "namespaces/nowhere"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	_, err = w.admin.GetStats(ctx, &grapnelv1.GetStatsRequest{Window: durationpb.New(time.Second), TopSubscriptions: 101})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "parent", "window", "top_subscriptions")
}

func TestStoreAway(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	sub := w.subscribe(t, "acme", "orders", nil)
	w.loseEtcd()
	ctx, name := t.Context(), sub.GetName()

	refusals := map[string]func() error{
		"CreateNamespace": func() error {
			_, err := w.namespaces.CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{NamespaceId: "more"})
			return err
		},
		"CreateSubscription": func() error {
			_, err := w.subscriptions.CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", Subscription: plainSubscription("acme")})
			return err
		},
		"UpdateSubscription": func() error {
			_, err := w.subscriptions.UpdateSubscription(ctx, &grapnelv1.UpdateSubscriptionRequest{Subscription: &grapnelv1.Subscription{Name: name, MaxInFlight: 2}})
			return err
		},
		"PauseSubscription": func() error {
			_, err := w.subscriptions.PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: name})
			return err
		},
		"DeleteSubscription": func() error {
			_, err := w.subscriptions.DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: name})
			return err
		},
		"RotateSecret": func() error {
			_, err := w.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: "namespaces/acme/secrets/key"})
			return err
		},
	}
	answers := make(map[string]chan error, len(refusals))
	for method, call := range refusals {
		answer := make(chan error, 1)
		answers[method] = answer
		go func() { answer <- call() }()
	}
	for method, answer := range answers {
		if r := refused(t, <-answer, codes.Unavailable, "STORE_UNAVAILABLE"); r.retry == 0 {
			t.Errorf("%s: no RetryInfo", method)
		}
	}

	if _, err := w.subscriptions.GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: name}); err != nil {
		t.Errorf("GetSubscription: %v", err)
	}
	if ids, err := w.listAll(ctx, "namespaces/-", "", 0); err != nil || !slices.Equal(ids, []string{"acme/orders"}) {
		t.Errorf("ListSubscriptions: %q, %v", ids, err)
	}
	if _, err := w.secrets.GetSecret(ctx, &grapnelv1.GetSecretRequest{Name: "namespaces/acme/secrets/key"}); err != nil {
		t.Errorf("GetSecret: %v", err)
	}
	if _, err := w.subscriptions.TestSubscription(ctx, &grapnelv1.TestSubscriptionRequest{Name: name}); err != nil {
		t.Errorf("TestSubscription: %v", err)
	}
	cluster, err := w.admin.GetCluster(ctx, &grapnelv1.GetClusterRequest{})
	if err != nil || cluster.GetStoreHealthy() {
		t.Errorf("GetCluster: %v, %v; want an unhealthy store", cluster, err)
	}
}
