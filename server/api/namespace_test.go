package api_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func TestNamespaceService(t *testing.T) {
	w := startWorld(t)
	t.Run("create", func(t *testing.T) { testCreateNamespace(t, w) })
	t.Run("get", func(t *testing.T) { testGetNamespace(t, w) })
	t.Run("update", func(t *testing.T) { testUpdateNamespace(t, w) })
	t.Run("delete", func(t *testing.T) { testDeleteNamespace(t, w) })
	t.Run("list", func(t *testing.T) { testListNamespaces(t, w) })
}

func testCreateNamespace(t *testing.T, w *world) {
	ctx := t.Context()
	made, err := w.namespaces.CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{
		NamespaceId: "made",
		Namespace: &grapnelv1.Namespace{
			Name: "namespaces/other", State: grapnelv1.Namespace_STATE_DELETED, Etag: "x",
			PurgeTime: timestamppb.Now(), Usage: &grapnelv1.Usage{Subscriptions: 9},
			Labels: map[string]string{"team": "pay"}, Quota: &grapnelv1.Quota{MaxSubscriptions: 3},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := made.GetNamespace()
	if got.GetName() != "namespaces/made" || got.GetState() != grapnelv1.Namespace_STATE_ACTIVE || got.GetPurgeTime() != nil ||
		got.GetUsage() != nil || got.GetEtag() == "" || got.GetEtag() == "x" || got.GetLabels()["team"] != "pay" {
		t.Errorf("created = %v", got)
	}

	_, err = w.namespaces.CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{NamespaceId: "made"})
	if r := refused(t, err, codes.AlreadyExists, "RESOURCE_EXISTS"); r.resource != "namespaces/made" {
		t.Errorf("resource = %q", r.resource)
	}

	_, err = w.namespaces.CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{
		NamespaceId: "Bad_Name",
		Namespace: &grapnelv1.Namespace{Weight: 101, Quota: &grapnelv1.Quota{
			MaxSubscriptions: -1, MaxEventBytes: 2 << 20, Retention: durationpb.New(time.Minute),
			PayloadRetention: durationpb.New(-time.Hour), AttemptRetention: durationpb.New(91 * 24 * time.Hour),
		}},
	})
	r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
	r.names(t, "namespace_id", "namespace.quota.max_subscriptions", "namespace.quota.max_event_bytes", "namespace.quota.retention",
		"namespace.quota.payload_retention", "namespace.quota.attempt_retention", "namespace.weight")
	if why := r.fields["namespace.weight"]; !strings.Contains(why, "0") || !strings.Contains(why, "100") {
		t.Errorf("namespace.weight: %q", why)
	}
	if want := "must be 1 to 63 lower-case letters, digits and hyphens, and begin with a letter"; r.fields["namespace_id"] != want {
		t.Errorf("namespace_id: %q, want %q", r.fields["namespace_id"], want)
	}
}

func testGetNamespace(t *testing.T, w *world) {
	w.namespace(t, "gotten")
	w.subscribe(t, "gotten", "one", nil)
	w.subscribe(t, "gotten", "two", nil)
	got, err := w.namespaces.GetNamespace(t.Context(), &grapnelv1.GetNamespaceRequest{Name: "namespaces/gotten"})
	if err != nil {
		t.Fatal(err)
	}
	want := &grapnelv1.Usage{Subscriptions: 2, OldestDueAge: durationpb.New(3 * time.Second)}
	if diff := cmp.Diff(want, got.GetNamespace().GetUsage(), protocmp.Transform()); diff != "" {
		t.Errorf("usage (-want +got):\n%s", diff)
	}

	_, err = w.namespaces.GetNamespace(t.Context(), &grapnelv1.GetNamespaceRequest{Name: "namespaces/nowhere"})
	if r := refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND"); r.resource != "namespaces/nowhere" {
		t.Errorf("resource = %q", r.resource)
	}
	for _, name := range []string{"", "gotten", "namespaces/", "namespaces/-", "namespaces/gotten/subscriptions/one"} {
		_, err = w.namespaces.GetNamespace(t.Context(), &grapnelv1.GetNamespaceRequest{Name: name})
		r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
		if r.fields["name"] != "must look like namespaces/NAME" {
			t.Errorf("name %q: %v", name, r.fields)
		}
	}
}

func testUpdateNamespace(t *testing.T, w *world) {
	ctx := t.Context()
	w.namespace(t, "updated")
	update := func(n *grapnelv1.Namespace, paths ...string) (*grapnelv1.Namespace, error) {
		n.Name = "namespaces/updated"
		req := &grapnelv1.UpdateNamespaceRequest{Namespace: n}
		if len(paths) > 0 {
			req.UpdateMask = &fieldmaskpb.FieldMask{Paths: paths}
		}
		answer, err := w.namespaces.UpdateNamespace(ctx, req)
		return answer.GetNamespace(), err
	}
	got, err := update(&grapnelv1.Namespace{Labels: map[string]string{"a": "1"}, Quota: &grapnelv1.Quota{MaxPublishRate: 5, MaxSubscriptions: 6}})
	if err != nil {
		t.Fatal(err)
	}
	first := got.GetEtag()
	if got, err = update(&grapnelv1.Namespace{Weight: 3}, "weight"); err != nil || got.GetWeight() != 3 || got.GetQuota().GetMaxPublishRate() != 5 {
		t.Errorf("with a weight: %v, %v", got, err)
	}
	if got, err = update(&grapnelv1.Namespace{}, "weight"); err != nil || got.GetWeight() != 0 {
		t.Errorf("with the default weight: %v, %v", got, err)
	}
	got, err = update(&grapnelv1.Namespace{Quota: &grapnelv1.Quota{MaxPublishRate: 7}, State: grapnelv1.Namespace_STATE_DELETED}, "quota.max_publish_rate", "state")
	if err != nil {
		t.Fatal(err)
	}
	if got.GetLabels()["a"] != "1" || got.GetQuota().GetMaxPublishRate() != 7 || got.GetQuota().GetMaxSubscriptions() != 6 ||
		got.GetState() != grapnelv1.Namespace_STATE_ACTIVE || got.GetEtag() == first {
		t.Errorf("after a masked update = %v", got)
	}

	_, err = update(&grapnelv1.Namespace{Etag: first, Labels: map[string]string{"b": "1"}})
	if r := refused(t, err, codes.Aborted, "ETAG_MISMATCH"); r.metadata["currentEtag"] != got.GetEtag() {
		t.Errorf("currentEtag = %q, want %q", r.metadata["currentEtag"], got.GetEtag())
	}
	if got, err = update(&grapnelv1.Namespace{Etag: got.GetEtag()}, "*"); err != nil || len(got.GetLabels()) > 0 || got.GetQuota() != nil {
		t.Errorf("after replacing all with nothing = %v, %v", got, err)
	}

	_, err = update(&grapnelv1.Namespace{}, "quotas", "labels.a")
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "update_mask")
	_, err = w.namespaces.UpdateNamespace(ctx, &grapnelv1.UpdateNamespaceRequest{})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "namespace")
	_, err = w.namespaces.UpdateNamespace(ctx, &grapnelv1.UpdateNamespaceRequest{Namespace: &grapnelv1.Namespace{}})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "namespace.name")
	_, err = w.namespaces.UpdateNamespace(ctx, &grapnelv1.UpdateNamespaceRequest{Namespace: &grapnelv1.Namespace{Name: "namespaces/nowhere"}})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
}

func testDeleteNamespace(t *testing.T, w *world) {
	ctx := t.Context()
	w.namespace(t, "doomed")
	w.subscribe(t, "doomed", "one", nil)
	_, err := w.namespaces.DeleteNamespace(ctx, &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/doomed"})
	r := refused(t, err, codes.FailedPrecondition, "RESOURCE_IN_USE")
	if len(r.blockers) != 1 || r.blockers[0] != "namespaces/doomed/subscriptions/one" {
		t.Errorf("blockers = %q", r.blockers)
	}
	_, err = w.namespaces.DeleteNamespace(ctx, &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/doomed", Etag: "stale", Force: true})
	refused(t, err, codes.Aborted, "ETAG_MISMATCH")

	gone, err := w.namespaces.DeleteNamespace(ctx, &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/doomed", Force: true})
	if err != nil {
		t.Fatal(err)
	}
	n := gone.GetNamespace()
	if kept := n.GetPurgeTime().AsTime().Sub(n.GetDeleteTime().AsTime()); n.GetState() != grapnelv1.Namespace_STATE_DELETED || kept != 7*24*time.Hour {
		t.Errorf("deleted = %v, kept for %v", n, kept)
	}

	// Reading goes on, changes do not, and the name stays taken.
	if _, err := w.subscriptions.GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: "namespaces/doomed/subscriptions/one"}); err != nil {
		t.Errorf("read in a deleted namespace: %v", err)
	}
	for parent, want := range map[string]int{"namespaces/doomed": 1, "namespaces/-": 0} {
		all, err := w.listAll(ctx, parent, "", 0)
		all = slices.DeleteFunc(all, func(id string) bool { return !strings.HasPrefix(id, "doomed/") })
		if err != nil || len(all) != want {
			t.Errorf("list in %s = %q, %v", parent, all, err)
		}
	}
	_, err = w.subscriptions.CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/doomed", Subscription: plainSubscription("doomed")})
	refused(t, err, codes.FailedPrecondition, "INVALID_STATE")
	_, err = w.subscriptions.UpdateSubscription(ctx, &grapnelv1.UpdateSubscriptionRequest{
		Subscription: &grapnelv1.Subscription{Name: "namespaces/doomed/subscriptions/one", MaxInFlight: 1},
	})
	refused(t, err, codes.FailedPrecondition, "INVALID_STATE")
	_, err = w.subscriptions.TestSubscription(ctx, &grapnelv1.TestSubscriptionRequest{Name: "namespaces/doomed/subscriptions/one"})
	refused(t, err, codes.FailedPrecondition, "INVALID_STATE")
	_, err = w.secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/doomed", SecretId: "more", Kind: grapnelv1.Secret_KIND_HMAC})
	refused(t, err, codes.FailedPrecondition, "INVALID_STATE")
	_, err = w.namespaces.CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{NamespaceId: "doomed"})
	refused(t, err, codes.AlreadyExists, "RESOURCE_EXISTS")
	_, err = w.namespaces.DeleteNamespace(ctx, &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/nowhere"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
}

// testListNamespaces counts on what the subtests before it have made.
func testListNamespaces(t *testing.T, w *world) {
	list := func(size int32, token string, deleted bool) ([]string, string) {
		t.Helper()
		page, err := w.namespaces.ListNamespaces(t.Context(), &grapnelv1.ListNamespacesRequest{PageSize: size, PageToken: token, ShowDeleted: deleted})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, n := range page.GetNamespaces() {
			names = append(names, n.GetName())
		}
		return names, page.GetNextPageToken()
	}
	names, token := list(2, "", true)
	if want := []string{"namespaces/doomed", "namespaces/gotten"}; !cmp.Equal(names, want) || token == "" {
		t.Errorf("first page = %q, token %q", names, token)
	}
	names, next := list(100, token, true)
	if want := []string{"namespaces/made", "namespaces/updated"}; !cmp.Equal(names, want) || next != "" {
		t.Errorf("second page = %q, token %q", names, next)
	}
	if names, _ = list(0, "", false); !cmp.Equal(names, []string{"namespaces/gotten", "namespaces/made", "namespaces/updated"}) {
		t.Errorf("without deleted ones = %q", names)
	}
	_, err := w.namespaces.ListNamespaces(t.Context(), &grapnelv1.ListNamespacesRequest{PageToken: token})
	refused(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")
	_, err = w.namespaces.ListNamespaces(t.Context(), &grapnelv1.ListNamespacesRequest{PageToken: "nonsense"})
	refused(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")
	_, err = w.namespaces.ListNamespaces(t.Context(), &grapnelv1.ListNamespacesRequest{PageSize: -1})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "page_size")
}
