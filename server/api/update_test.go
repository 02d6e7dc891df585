package api_test

import (
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
)

// TestUpdateKeepsWhatIsNotMentioned: an update without a mask changes what it mentions and nothing beside it, on every
// level (AIP-134).
func TestUpdateKeepsWhatIsNotMentioned(t *testing.T) {
	w := startWorld(t)
	keys := w.namespace(t, "acme")
	full := func() *grapnelv1.Subscription {
		s := plainSubscription("acme")
		s.DisplayName, s.Labels, s.Headers = "Orders", map[string]string{"a": "1"}, map[string]string{"X-A": "1"}
		s.PayloadShape = &grapnelv1.PayloadShape{Format: grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS, Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP}
		s.FailurePolicy = &grapnelv1.FailurePolicy{IgnoreGone: true, DisableAfter: durationpb.New(time.Hour)}
		s.RetryPolicy = &grapnelv1.RetryPolicy{
			InitialBackoff: durationpb.New(10 * time.Second), MaxBackoff: durationpb.New(time.Minute), MaxAttempts: 7, Jitter: proto.Float64(0.5),
		}
		s.Transport = &grapnelv1.PluginBinding{Secrets: keys}
		return s
	}
	type sub = grapnelv1.Subscription
	for name, c := range map[string]struct{ sent, want *sub }{
		"max_attempts":  {&sub{RetryPolicy: &grapnelv1.RetryPolicy{MaxAttempts: 20}}, &sub{RetryPolicy: &grapnelv1.RetryPolicy{MaxAttempts: 20}}},
		"compression":   {&sub{PayloadShape: &grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_NONE}}, &sub{PayloadShape: &grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_NONE}}},
		"disable_after": {&sub{FailurePolicy: &grapnelv1.FailurePolicy{DisableAfter: durationpb.New(time.Minute)}}, &sub{FailurePolicy: &grapnelv1.FailurePolicy{DisableAfter: durationpb.New(time.Minute)}}},
		"transport":     {&sub{Transport: &grapnelv1.PluginBinding{Plugin: "plugins/http"}}, &sub{}},
		"nothing":       {&sub{RetryPolicy: &grapnelv1.RetryPolicy{}, FailurePolicy: &grapnelv1.FailurePolicy{}}, &sub{}},
	} {
		stored := w.subscribe(t, "acme", strings.ReplaceAll(name, "_", "-"), func(s *sub) { proto.Reset(s); proto.Merge(s, full()) })
		c.sent.Name = stored.GetName()
		got, err := w.subscriptions.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{Subscription: c.sent})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := proto.CloneOf(stored)
		proto.Merge(want, c.want)
		if d := c.want.GetFailurePolicy().GetDisableAfter(); d != nil {
			want.FailurePolicy.DisableAfter = d
		}
		if diff := cmp.Diff(want, got.GetSubscription(), protocmp.Transform(), protocmp.IgnoreFields(&sub{}, "etag", "update_time")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}

	// Batching is turned on by one of its fields, changed by another, and turned off by its name.
	stored := w.subscribe(t, "acme", "batched", nil)
	for _, c := range []struct {
		sent  *grapnelv1.Batching
		paths []string
		want  *grapnelv1.Batching
	}{
		{&grapnelv1.Batching{MaxEvents: 7}, []string{"batching.max_events"}, &grapnelv1.Batching{MaxEvents: 7, MaxBytes: 262144, MaxWait: durationpb.New(time.Second), Format: grapnelv1.Batching_FORMAT_JSON_ARRAY}},
		{&grapnelv1.Batching{MaxWait: durationpb.New(0)}, nil, &grapnelv1.Batching{MaxEvents: 7, MaxBytes: 262144, MaxWait: durationpb.New(0), Format: grapnelv1.Batching_FORMAT_JSON_ARRAY}},
		{nil, []string{"batching"}, nil},
		{&grapnelv1.Batching{}, []string{"batching"}, &grapnelv1.Batching{MaxEvents: 100, MaxBytes: 262144, MaxWait: durationpb.New(time.Second), Format: grapnelv1.Batching_FORMAT_JSON_ARRAY}},
	} {
		req := &grapnelv1.UpdateSubscriptionRequest{Subscription: &sub{Name: stored.GetName(), Batching: c.sent}}
		if c.paths != nil {
			req.UpdateMask = &fieldmaskpb.FieldMask{Paths: c.paths}
		}
		got, err := w.subscriptions.UpdateSubscription(t.Context(), req)
		if err != nil {
			t.Errorf("batching %v, %v: %v", c.sent, c.paths, err)
			continue
		}
		if diff := cmp.Diff(c.want, got.GetSubscription().GetBatching(), protocmp.Transform()); diff != "" {
			t.Errorf("batching %v, %v (-want +got):\n%s", c.sent, c.paths, diff)
		}
	}

	quota := &grapnelv1.Quota{MaxPublishRate: 5, MaxEventBytes: 1000, Retention: durationpb.New(90 * 24 * time.Hour)}
	ns, err := w.namespaces.UpdateNamespace(t.Context(), &grapnelv1.UpdateNamespaceRequest{Namespace: &grapnelv1.Namespace{
		Name: "namespaces/acme", Quota: quota, Labels: map[string]string{"a": "b"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	ns, err = w.namespaces.UpdateNamespace(t.Context(), &grapnelv1.UpdateNamespaceRequest{Namespace: &grapnelv1.Namespace{
		Name: ns.GetNamespace().GetName(), Quota: &grapnelv1.Quota{MaxSubscriptions: 200},
	}})
	if err != nil {
		t.Fatal(err)
	}
	quota.MaxSubscriptions = 200
	if diff := cmp.Diff(quota, ns.GetNamespace().GetQuota(), protocmp.Transform()); diff != "" || ns.GetNamespace().GetLabels()["a"] != "b" {
		t.Errorf("quota (-want +got):\n%s", diff)
	}
}

// TestUpdateChoosesRetryForm: schedule and backoff exclude each other, and one of them is always stored; an update that
// is about the other one alone replaces it, with a mask and without.
func TestUpdateChoosesRetryForm(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	backoff := &grapnelv1.RetryPolicy{InitialBackoff: durationpb.New(30 * time.Second)}
	schedule := &grapnelv1.RetryPolicy{Schedule: []*durationpb.Duration{durationpb.New(time.Second)}}
	for name, paths := range map[string][2][]string{
		"maskless": {},
		"masked":   {{"retry_policy.initial_backoff"}, {"retry_policy.schedule"}},
	} {
		stored := w.subscribe(t, "acme", name, nil)
		update := func(policy *grapnelv1.RetryPolicy, paths []string) *grapnelv1.RetryPolicy {
			t.Helper()
			req := &grapnelv1.UpdateSubscriptionRequest{Subscription: &grapnelv1.Subscription{Name: stored.GetName(), RetryPolicy: policy}}
			if len(paths) > 0 {
				req.UpdateMask = &fieldmaskpb.FieldMask{Paths: paths}
			}
			got, err := w.subscriptions.UpdateSubscription(t.Context(), req)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			return got.GetSubscription().GetRetryPolicy()
		}
		got := update(backoff, paths[0])
		if len(got.GetSchedule()) > 0 || got.GetInitialBackoff().AsDuration() != 30*time.Second || got.GetMaxBackoff().AsDuration() != 6*time.Hour || got.GetMaxAttempts() != 10 {
			t.Errorf("%s: backoff = %v", name, got)
		}
		got = update(schedule, paths[1])
		if len(got.GetSchedule()) != 1 || got.GetInitialBackoff() != nil || got.GetMaxBackoff() != nil || got.GetMultiplier() != 0 {
			t.Errorf("%s: schedule = %v", name, got)
		}
	}
	both := proto.CloneOf(backoff)
	proto.Merge(both, schedule)
	_, err := w.subscriptions.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
		Subscription: &grapnelv1.Subscription{Name: w.subscribe(t, "acme", "both", nil).GetName(), RetryPolicy: both},
	})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "subscription.retry_policy.schedule")
}
