package api_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
)

func TestCreateSubscription(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	w.namespace(t, "other")
	create := func(req *grapnelv1.CreateSubscriptionRequest) (*grapnelv1.CreateSubscriptionResponse, error) {
		t.Helper()
		if req.Parent == "" {
			req.Parent = "namespaces/acme"
		}
		return w.subscriptions.CreateSubscription(t.Context(), req)
	}
	t.Run("defaults are stored", func(t *testing.T) {
		sub := plainSubscription("acme")
		sub.Name, sub.State, sub.Etag, sub.Uid = "namespaces/x/subscriptions/y", grapnelv1.Subscription_STATE_DISABLED, "e", "u"
		made, err := create(&grapnelv1.CreateSubscriptionRequest{SubscriptionId: "orders", Subscription: sub})
		if err != nil {
			t.Fatal(err)
		}
		got := made.GetSubscription()
		if got.GetName() != "namespaces/acme/subscriptions/orders" || got.GetState() != grapnelv1.Subscription_STATE_ACTIVE ||
			len(got.GetUid()) != 36 || got.GetEtag() == "" || got.GetEtag() == "e" || got.GetTransport().GetPlugin() != "plugins/http" ||
			got.GetMaxInFlight() != 16 || got.GetAttemptTimeout().AsDuration() != 15*time.Second {
			t.Errorf("created = %v", got)
		}
		if len(made.GetWarnings()) != 0 {
			t.Errorf("warnings = %q, want none", made.GetWarnings())
		}
		read, err := w.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: got.GetName()})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(got, read.GetSubscription(), protocmp.Transform()); diff != "" {
			t.Errorf("read after create (-created +read):\n%s", diff)
		}
		_, err = create(&grapnelv1.CreateSubscriptionRequest{SubscriptionId: "orders", Subscription: plainSubscription("acme")})
		if r := refused(t, err, codes.AlreadyExists, "RESOURCE_EXISTS"); r.resource != got.GetName() {
			t.Errorf("resource = %q", r.resource)
		}
	})
	t.Run("the server picks an id", func(t *testing.T) {
		one, err1 := create(&grapnelv1.CreateSubscriptionRequest{Subscription: plainSubscription("acme")})
		two, err2 := create(&grapnelv1.CreateSubscriptionRequest{Subscription: plainSubscription("acme")})
		if err1 != nil || err2 != nil || one.GetSubscription().GetName() == two.GetSubscription().GetName() {
			t.Errorf("picked %v and %v, errors %v %v", one.GetSubscription().GetName(), two.GetSubscription().GetName(), err1, err2)
		}
	})
	for _, id := range []string{"", "chosen"} {
		t.Run("request_id repeats nothing, id "+id, func(t *testing.T) {
			req := &grapnelv1.CreateSubscriptionRequest{
				SubscriptionId: id, RequestId: fmt.Sprintf("6a6f1f0e-0000-4000-8000-%012d", len(id)), Subscription: plainSubscription("acme"),
			}
			one, err1 := create(req)
			two, err2 := create(req)
			if err1 != nil || err2 != nil {
				t.Fatal(err1, err2)
			}
			if diff := cmp.Diff(one, two, protocmp.Transform()); diff != "" {
				t.Errorf("the repeat answers otherwise:\n%s", diff)
			}
		})
	}
	t.Run("validate_only stores nothing", func(t *testing.T) {
		sub := plainSubscription("acme")
		sub.Uri = "http://hooks.example.com/orders"
		w.host.say(nil,
			api.Diagnostic{Field: "subscription.uri", Summary: "port 80 is unusual", Warning: true},
			api.Diagnostic{Field: "subscription.uri", Code: "uri.plaintext", Summary: "is readable", Warning: true})
		defer w.host.say(nil)
		made, err := create(&grapnelv1.CreateSubscriptionRequest{SubscriptionId: "tried", Subscription: sub, ValidateOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if got := made.GetSubscription(); got.GetMaxInFlight() != 16 || got.GetName() != "namespaces/acme/subscriptions/tried" || got.GetUid() != "" || got.GetEtag() != "" {
			t.Errorf("validated = %v", got)
		}
		all := strings.Join(made.GetWarnings(), "\n")
		if len(made.GetWarnings()) != 2 || !strings.Contains(all, "plain http") || !strings.Contains(all, "subscription.uri: port 80 is unusual") {
			t.Errorf("warnings = %q", made.GetWarnings())
		}
		_, err = w.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: "namespaces/acme/subscriptions/tried"})
		refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	})
	t.Run("refusals", func(t *testing.T) { testCreateRefusals(t, w) })
}

func testCreateRefusals(t *testing.T, w *world) {
	key := func(name string) *grapnelv1.PluginBinding {
		return &grapnelv1.PluginBinding{Secrets: map[string]string{"key": name}}
	}
	for _, test := range []struct {
		name   string
		change func(*grapnelv1.CreateSubscriptionRequest)
		says   []api.Diagnostic
		err    error
		code   codes.Code
		reason string
		// fields are the violations; message is part of the text.
		fields  []string
		message string
	}{
		{
			name: "every bound at once, in words",
			change: func(r *grapnelv1.CreateSubscriptionRequest) {
				r.Parent, r.SubscriptionId, r.RequestId = "acme", "Orders", "1"
				r.Subscription.AttemptTimeout = durationpb.New(300 * time.Second)
				r.Subscription.EventTypes = []string{"order.*", "a\nb"}
				r.Subscription.MaxInFlight = 1001
			},
			code: codes.InvalidArgument, reason: "INVALID_FIELD",
			fields: []string{"parent", "subscription_id", "request_id", "subscription.attempt_timeout", "subscription.event_types[1]", "subscription.max_in_flight"},
			message: "parent: must look like namespaces/NAME; subscription_id: must be 1 to 63 lower-case letters, digits and hyphens, " +
				"and begin with a letter, or be empty",
		},
		{
			name: "rules of the domain and what is missing, at once",
			change: func(r *grapnelv1.CreateSubscriptionRequest) {
				r.Subscription.Condition = "event.type =="
				r.Subscription.Signers = []*grapnelv1.PluginBinding{key("namespaces/acme/secrets/nothing")}
			},
			code: codes.InvalidArgument, reason: "INVALID_FIELD",
			fields:  []string{"subscription.condition", `subscription.signers[0].secrets["key"]`},
			message: "namespaces/acme/secrets/nothing does not exist",
		},
		{
			name: "rules of the domain and of plugins, at once",
			change: func(r *grapnelv1.CreateSubscriptionRequest) {
				r.Subscription.Condition = "event.type =="
			},
			says: []api.Diagnostic{{Field: "subscription.transport.config.method", Code: "schema.enum", Summary: "must be POST or PUT"}},
			code: codes.InvalidArgument, reason: "INVALID_FIELD",
			fields:  []string{"subscription.condition", "subscription.transport.config.method"},
			message: "must be POST or PUT",
		},
		{
			name: "a slot that has to be filled, while another plugin is away", err: api.ErrPluginUnavailable,
			says: []api.Diagnostic{{Field: "subscription.signers[0].secrets.key", Code: "secret.missing", Summary: "needs a secret"}},
			code: codes.InvalidArgument, reason: "INVALID_FIELD", fields: []string{`subscription.signers[0].secrets["key"]`},
		},
		{
			name:   "no uri",
			change: func(r *grapnelv1.CreateSubscriptionRequest) { r.Subscription.Uri = "" },
			code:   codes.InvalidArgument, reason: "INVALID_FIELD", fields: []string{"subscription.uri"},
		},
		{
			name:   "no subscription",
			change: func(r *grapnelv1.CreateSubscriptionRequest) { r.Subscription = nil },
			code:   codes.InvalidArgument, reason: "INVALID_FIELD", fields: []string{"subscription"}, message: "is required",
		},
		{
			name: "another namespace's secret",
			change: func(r *grapnelv1.CreateSubscriptionRequest) {
				r.Subscription.Signers = []*grapnelv1.PluginBinding{key("namespaces/other/secrets/key")}
			},
			code: codes.InvalidArgument, reason: "INVALID_FIELD", fields: []string{`subscription.signers[0].secrets["key"]`},
			message: "belongs to another namespace",
		},
		{
			name: "another namespace's secret that is not there is no different",
			change: func(r *grapnelv1.CreateSubscriptionRequest) {
				r.Subscription.Signers = []*grapnelv1.PluginBinding{key("namespaces/other/secrets/nothing")}
			},
			code: codes.InvalidArgument, reason: "INVALID_FIELD", fields: []string{`subscription.signers[0].secrets["key"]`},
			message: "belongs to another namespace",
		},
		{
			name: "a secret in place of its name",
			change: func(r *grapnelv1.CreateSubscriptionRequest) {
				r.Subscription.Signers = []*grapnelv1.PluginBinding{key("whsec_bXktc2VjcmV0")}
			},
			code: codes.InvalidArgument, reason: "INVALID_FIELD", fields: []string{`subscription.signers[0].secrets["key"]`},
			message: "SecretService.CreateSecret",
		},
		{
			name: "a missing secret alone",
			change: func(r *grapnelv1.CreateSubscriptionRequest) {
				r.Subscription.Signers = []*grapnelv1.PluginBinding{key("namespaces/acme/secrets/nothing")}
			},
			code: codes.NotFound, reason: "RESOURCE_NOT_FOUND", message: "namespaces/acme/secrets/nothing",
		},
		{
			name:   "a missing namespace",
			change: func(r *grapnelv1.CreateSubscriptionRequest) { r.Parent = "namespaces/nowhere" },
			code:   codes.NotFound, reason: "RESOURCE_NOT_FOUND", message: "namespaces/nowhere",
		},
		{
			name:   "every namespace",
			change: func(r *grapnelv1.CreateSubscriptionRequest) { r.Parent = "namespaces/-" },
			code:   codes.InvalidArgument, reason: "INVALID_FIELD", fields: []string{"parent"},
		},
		{
			name: "a plugin that is not serving", err: api.ErrPluginUnavailable,
			code: codes.FailedPrecondition, reason: "PLUGIN_UNAVAILABLE",
		},
		{
			name: "a plugin that does not exist", err: api.ErrUnknownPlugin,
			code: codes.FailedPrecondition, reason: "PLUGIN_UNAVAILABLE",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			w.host.say(test.err, test.says...)
			defer w.host.say(nil)
			req := &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", SubscriptionId: "refused", Subscription: plainSubscription("acme")}
			if test.change != nil {
				test.change(req)
			}
			for _, dry := range []bool{true, false} {
				req.ValidateOnly = dry
				_, err := w.subscriptions.CreateSubscription(t.Context(), req)
				r := refused(t, err, test.code, test.reason)
				if test.fields != nil {
					r.names(t, test.fields...)
				}
				if !strings.Contains(r.message, test.message) || strings.Contains(r.message, "regex") {
					t.Errorf("message = %q, want it to hold %q and no regex", r.message, test.message)
				}
				if strings.Contains(r.message, "bXktc2VjcmV0") {
					t.Error("the message repeats a secret")
				}
			}
		})
	}
	t.Run("quota", func(t *testing.T) {
		_, err := w.namespaces.CreateNamespace(t.Context(), &grapnelv1.CreateNamespaceRequest{
			NamespaceId: "small", Namespace: &grapnelv1.Namespace{Quota: &grapnelv1.Quota{MaxSubscriptions: 1}},
		})
		if err != nil {
			t.Fatal(err)
		}
		sub := plainSubscription("small")
		sub.Signers = nil
		req := &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/small", Subscription: sub}
		if _, err := w.subscriptions.CreateSubscription(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		_, err = w.subscriptions.CreateSubscription(t.Context(), req)
		if r := refused(t, err, codes.ResourceExhausted, "QUOTA_EXCEEDED"); !r.quota || r.retry != 0 {
			t.Errorf("quota refusal = %+v, want a QuotaFailure and no RetryInfo", r)
		}
	})
}

func TestUpdateSubscription(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	stored := w.subscribe(t, "acme", "orders", func(s *grapnelv1.Subscription) {
		s.Condition, s.Headers = "true", map[string]string{"X-Team": "pay"}
	})
	update := func(change *grapnelv1.Subscription, paths ...string) (*grapnelv1.UpdateSubscriptionResponse, error) {
		if change.Name == "" {
			change.Name = stored.GetName()
		}
		req := &grapnelv1.UpdateSubscriptionRequest{Subscription: change}
		if len(paths) > 0 {
			req.UpdateMask = &fieldmaskpb.FieldMask{Paths: paths}
		}
		return w.subscriptions.UpdateSubscription(t.Context(), req)
	}
	must := func(r *grapnelv1.UpdateSubscriptionResponse, err error) *grapnelv1.Subscription {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return r.GetSubscription()
	}
	// Without a mask: what is not empty.
	want := proto.CloneOf(stored)
	got := must(update(&grapnelv1.Subscription{MaxInFlight: 4, State: grapnelv1.Subscription_STATE_DISABLED, Uid: "x"}))
	want.MaxInFlight = 4
	ignoreStamps := protocmp.IgnoreFields(&grapnelv1.Subscription{}, "etag", "update_time")
	if diff := cmp.Diff(want, got, protocmp.Transform(), ignoreStamps); diff != "" {
		t.Errorf("without a mask (-want +got):\n%s", diff)
	}
	if got.GetEtag() == stored.GetEtag() {
		t.Error("the etag has not changed")
	}
	// With a mask: just that, cleared when empty; output-only paths do nothing.
	got = must(update(&grapnelv1.Subscription{RetryPolicy: &grapnelv1.RetryPolicy{MaxAttempts: 3}, MaxInFlight: 9}, "condition", "headers", "retry_policy.max_attempts", "state"))
	want.Condition, want.Headers, want.RetryPolicy.MaxAttempts = "", nil, 3
	if diff := cmp.Diff(want, got, protocmp.Transform(), ignoreStamps); diff != "" {
		t.Errorf("with a mask (-want +got):\n%s", diff)
	}
	// "*": all of it, defaults anew.
	got = must(update(&grapnelv1.Subscription{Uri: "https://b.example.com/", Signers: stored.GetSigners()}, "*"))
	if got.GetUri() != "https://b.example.com/" || got.GetMaxInFlight() != 16 || len(got.GetEventTypes()) != 0 || got.GetUid() != stored.GetUid() {
		t.Errorf("after replacing all = %v", got)
	}

	_, err := update(&grapnelv1.Subscription{Etag: stored.GetEtag(), MaxInFlight: 2})
	if r := refused(t, err, codes.Aborted, "ETAG_MISMATCH"); r.metadata["currentEtag"] != got.GetEtag() {
		t.Errorf("currentEtag = %q, want %q", r.metadata["currentEtag"], got.GetEtag())
	}
	must(update(&grapnelv1.Subscription{Etag: got.GetEtag(), MaxInFlight: 2}))

	_, err = update(&grapnelv1.Subscription{}, "urii", "headers.x")
	r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
	r.names(t, "update_mask")
	if !strings.Contains(r.message, `"urii"`) || !strings.Contains(r.message, "max_in_flight") || strings.Contains(r.message, "state_reason") {
		t.Errorf("message = %q, want it to name the path and the fields that can be set", r.message)
	}
	_, err = update(&grapnelv1.Subscription{Uri: "ftp://x.example.com", Condition: "("})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
	_, err = update(&grapnelv1.Subscription{Name: "orders"})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "subscription.name")
	_, err = update(&grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/nothing"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")

	w.host.say(api.ErrPluginUnavailable)
	must(update(&grapnelv1.Subscription{MaxInFlight: 3}))
	_, err = update(&grapnelv1.Subscription{Uri: "https://c.example.com/"})
	refused(t, err, codes.FailedPrecondition, "PLUGIN_UNAVAILABLE")
	w.host.say(nil, api.Diagnostic{Field: "subscription.transport.config", Summary: "no"})
	_, err = update(&grapnelv1.Subscription{Uri: "https://c.example.com/"})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "subscription.transport.config")
}

func TestUpdateSubscriptionAllowMissingAndValidateOnly(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	name := "namespaces/acme/subscriptions/applied"
	sub := plainSubscription("acme")
	sub.Name = name
	apply := func(dry bool, paths ...string) (*grapnelv1.UpdateSubscriptionResponse, error) {
		return w.subscriptions.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
			Subscription: sub, AllowMissing: true, ValidateOnly: dry, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
		})
	}
	if _, err := apply(true); err != nil {
		t.Fatal(err)
	}
	_, err := w.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: name})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	made, err := apply(false, "max_in_flight")
	if err != nil {
		t.Fatal(err)
	}
	if got := made.GetSubscription(); got.GetUri() != sub.GetUri() || got.GetMaxInFlight() != 16 {
		t.Errorf("made = %v, want all of the request", got)
	}
	sub.MaxInFlight, sub.Uri = 5, "https://d.example.com/"
	changed, err := apply(true, "max_in_flight")
	if err != nil || changed.GetSubscription().GetMaxInFlight() != 5 {
		t.Errorf("validated = %v, %v", changed, err)
	}
	read, err := w.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: name})
	if err != nil || read.GetSubscription().GetMaxInFlight() != 16 {
		t.Errorf("after validate_only = %v, %v", read, err)
	}
	changed, err = apply(false, "max_in_flight")
	if got := changed.GetSubscription(); err != nil || got.GetMaxInFlight() != 5 || got.GetUri() != made.GetSubscription().GetUri() || got.GetUid() != made.GetSubscription().GetUid() {
		t.Errorf("applied again = %v, %v", got, err)
	}
}

func TestListSubscriptions(t *testing.T) {
	w := startWorld(t)
	for _, ns := range []string{"acme", "beta", "empty"} {
		w.namespace(t, ns)
	}
	w.subscribe(t, "acme", "a", func(s *grapnelv1.Subscription) { s.Labels = map[string]string{"team": "pay"} })
	w.subscribe(t, "acme", "b", func(s *grapnelv1.Subscription) {
		s.EventTypes, s.Transport = []string{"user.created"}, &grapnelv1.PluginBinding{Plugin: "plugins/queue"}
	})
	w.subscribe(t, "acme", "c", nil)
	w.subscribe(t, "beta", "a", nil)
	w.subscribe(t, "beta", "z", func(s *grapnelv1.Subscription) {
		s.Labels = map[string]string{"team": "core"}
		s.Signers = append(s.Signers, &grapnelv1.PluginBinding{Plugin: "plugins/stripe"})
	})
	if _, err := w.subscriptions.PauseSubscription(t.Context(), &grapnelv1.PauseSubscriptionRequest{Name: "namespaces/acme/subscriptions/c"}); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ parent, filter, want string }{
		{"acme", "", "acme/a acme/b acme/c"},
		{"empty", "", ""},
		{"-", "", "acme/a acme/b acme/c beta/a beta/z"},
		{"acme", "state = PAUSED", "acme/c"},
		{"-", "state = STATE_ACTIVE", "acme/a acme/b beta/a beta/z"},
		{"-", "labels.team = pay OR labels.team = core", "acme/a beta/z"},
		{"-", "labels:team", "acme/a beta/z"},
		{"-", "event_type = order.*", "acme/a acme/c beta/a beta/z"},
		{"-", "event_type = user.created", "acme/b"},
		{"-", "transport = plugins/queue", "acme/b"},
		{"-", "transport != http AND signer = standard-webhooks", "acme/b"},
		{"-", "signer = standard-webhooks", "acme/a acme/b acme/c beta/a beta/z"},
		{"-", "signer = plugins/stripe", "beta/z"},
		{"-", "signer = stripe AND signer = standard-webhooks", "beta/z"},
		{"-", "NOT signer = stripe", "acme/a acme/b acme/c beta/a"},
		{"acme", `uri = "https://hooks.example.com/*" AND state = PAUSED`, "acme/c"},
		{"-", "create_time > 2020-01-01T00:00:00Z AND NOT state = PAUSED", "acme/a acme/b beta/a beta/z"},
		{"-", "create_time < 2020-01-01T00:00:00Z", ""},
	} {
		for _, size := range []int32{0, 1, 2, 5000} {
			t.Run(fmt.Sprintf("%s %s by %d", test.parent, test.filter, size), func(t *testing.T) {
				got, err := w.listAll(t.Context(), "namespaces/"+test.parent, test.filter, size)
				if err != nil {
					t.Fatal(err)
				}
				if strings.Join(got, " ") != test.want {
					t.Errorf("listed %q, want %q", got, test.want)
				}
			})
		}
	}
	for _, filter := range []string{"status = PAUSED", "state = BROKEN", "state =", "create_time > yesterday"} {
		_, err := w.listAll(t.Context(), "namespaces/acme", filter, 0)
		r := refused(t, err, codes.InvalidArgument, "INVALID_FILTER")
		if r.metadata["offset"] == "" || !strings.Contains(r.metadata["fields"], "event_type") {
			t.Errorf("filter %q: metadata = %v", filter, r.metadata)
		}
	}
	_, err := w.listAll(t.Context(), "namespaces/nowhere", "", 0)
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	page, err := w.subscriptions.ListSubscriptions(t.Context(), &grapnelv1.ListSubscriptionsRequest{Parent: "namespaces/-", PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.subscriptions.ListSubscriptions(t.Context(), &grapnelv1.ListSubscriptionsRequest{Parent: "namespaces/acme", PageToken: page.GetNextPageToken()})
	refused(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")
}

// listAll pages through a list and returns namespace/id of each.
func (w *world) listAll(ctx context.Context, parent, filter string, size int32) ([]string, error) {
	var ids []string
	req := &grapnelv1.ListSubscriptionsRequest{Parent: parent, Filter: filter, PageSize: size}
	for {
		page, err := w.subscriptions.ListSubscriptions(ctx, req)
		if err != nil {
			return nil, err
		}
		if n := len(page.GetSubscriptions()); size > 0 && n > int(size) || n == 0 && page.GetNextPageToken() != "" {
			return nil, fmt.Errorf("a page of %d holds %d", size, n)
		}
		for _, s := range page.GetSubscriptions() {
			parts := strings.Split(s.GetName(), "/")
			ids = append(ids, parts[1]+"/"+parts[3])
		}
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return ids, nil
		}
	}
}

func TestDeletePauseResumeSubscription(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	sub := w.subscribe(t, "acme", "orders", nil)
	ctx, name := t.Context(), sub.GetName()

	for _, reason := range []string{"migration", "still migrating"} {
		paused, err := w.subscriptions.PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: name, Reason: reason})
		if got := paused.GetSubscription(); err != nil || got.GetState() != grapnelv1.Subscription_STATE_PAUSED || got.GetStateReason() != reason {
			t.Errorf("paused = %v, %v", got, err)
		}
	}
	w.engine.mu.Lock()
	w.engine.held = "breaker open since yesterday"
	w.engine.mu.Unlock()
	resumed, err := w.subscriptions.ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: name})
	if resumed.GetLifted() != "breaker open since yesterday" {
		t.Errorf("lifted %q", resumed.GetLifted())
	}
	if again, err := w.subscriptions.ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: name}); err != nil || again.GetLifted() != "" {
		t.Errorf("lifted again: %q, %v", again.GetLifted(), err)
	}
	if got := resumed.GetSubscription(); err != nil || got.GetState() != grapnelv1.Subscription_STATE_ACTIVE || got.GetStateReason() != "" {
		t.Errorf("resumed = %v, %v", got, err)
	}
	_, err = w.subscriptions.PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: name, Reason: strings.Repeat("x", 257)})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "reason")
	_, err = w.subscriptions.PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: "namespaces/acme/subscriptions/nothing"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	_, err = w.subscriptions.ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: "namespaces/nowhere/subscriptions/nothing"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")

	_, err = w.subscriptions.DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: name, Etag: sub.GetEtag()})
	refused(t, err, codes.Aborted, "ETAG_MISMATCH")
	w.engine.cancels = 7
	gone, err := w.subscriptions.DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: name, Etag: resumed.GetSubscription().GetEtag()})
	if err != nil || gone.GetCancelledDeliveries() != 7 {
		t.Errorf("deleted = %v, %v", gone, err)
	}
	if want := []string{"subscription deleted"}; !slices.Equal(w.engine.cancelled, want) {
		t.Errorf("cancelled lanes = %q, want %q", w.engine.cancelled, want)
	}
	_, err = w.subscriptions.DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: name})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	if again, err := w.subscriptions.DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: name, AllowMissing: true}); err != nil || again.GetCancelledDeliveries() != 0 {
		t.Errorf("deleted again = %v, %v", again, err)
	}

	// Cancelling that does not end in time is no failure of the deletion.
	w.subscribe(t, "acme", "busy", nil)
	w.engine.cancels, w.engine.cancelErr = 3, context.DeadlineExceeded
	gone, err = w.subscriptions.DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: "namespaces/acme/subscriptions/busy"})
	if err != nil || gone.GetCancelledDeliveries() != 3 {
		t.Errorf("deleted busy = %v, %v", gone, err)
	}
}
