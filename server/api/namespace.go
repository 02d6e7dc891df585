package api

import (
	"context"
	"math"
	"strconv"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

// namespaceOutputOnly are the fields of Namespace that callers cannot set.
var namespaceOutputOnly = []string{
	"name", "uid", "usage", "state", "state_reason", "create_time", "delete_time", "purge_time", "etag",
}

// CreateNamespace adds a namespace. The id is its idempotency key: a repeated call is RESOURCE_EXISTS.
func (s namespaceService) CreateNamespace(ctx context.Context, r *grapnelv1.CreateNamespaceRequest) (*grapnelv1.CreateNamespaceResponse, error) {
	content := &grapnelv1.Namespace{}
	if r.GetNamespace() != nil {
		if err := applyMask(content, proto.CloneOf(r.GetNamespace()), nil, namespaceOutputOnly...); err != nil {
			return nil, err
		}
	}
	n, err := s.Registry.CreateNamespace(ctx, r.GetNamespaceId(), content)
	if err != nil {
		return nil, toStatus(err, namespaceName(r.GetNamespaceId()))
	}
	return &grapnelv1.CreateNamespaceResponse{Namespace: n.Proto}, nil
}

// GetNamespace reads one namespace and how much of its quota is used.
func (s namespaceService) GetNamespace(_ context.Context, r *grapnelv1.GetNamespaceRequest) (*grapnelv1.GetNamespaceResponse, error) {
	id, err := parseNamespace("name", r.GetName())
	if err != nil {
		return nil, err
	}
	snapshot := s.Registry.Snapshot()
	n := snapshot.Namespace(id)
	if n == nil {
		return nil, notFound(r.GetName(), "namespace")
	}
	out := proto.CloneOf(n.Proto)
	out.Usage = s.usage(snapshot, id)
	return &grapnelv1.GetNamespaceResponse{Namespace: out}, nil
}

// usage reads how much of its quota a namespace has used.
func (s namespaceService) usage(snapshot *subscription.Snapshot, id string) *grapnelv1.Usage {
	return &grapnelv1.Usage{
		Subscriptions:  clampInt32(int64(snapshot.Count(id))),
		OpenDeliveries: clampInt32(s.Journal.OpenIn(id)),
		PublishRate:    s.Ingest.Rate(id),
		OldestDueAge:   durationpb.New(s.Engine.OldestDue(id)),
	}
}

// ListNamespaces reads one page in name order, without usage.
func (s namespaceService) ListNamespaces(_ context.Context, r *grapnelv1.ListNamespacesRequest) (*grapnelv1.ListNamespacesResponse, error) {
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	query := []string{"ListNamespaces", strconv.FormatBool(r.GetShowDeleted())}
	after, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	page := takePage(s.Registry.Snapshot().Namespaces(after), size,
		func(n *subscription.Namespace) bool { return r.GetShowDeleted() || !n.Deleted() },
		func(n *subscription.Namespace) string { return n.ID })
	out := &grapnelv1.ListNamespacesResponse{NextPageToken: s.pages.seal(page.next, query...)}
	for _, n := range page.items {
		out.Namespaces = append(out.Namespaces, n.Proto)
	}
	return out, nil
}

// UpdateNamespace changes labels and quota by field mask, under an etag when one is sent.
func (s namespaceService) UpdateNamespace(ctx context.Context, r *grapnelv1.UpdateNamespaceRequest) (*grapnelv1.UpdateNamespaceResponse, error) {
	name := r.GetNamespace().GetName()
	id, err := parseNamespace("namespace.name", name)
	if err != nil {
		return nil, err
	}
	n, err := s.Registry.UpdateNamespace(ctx, id, r.GetNamespace().GetEtag(), func(stored *grapnelv1.Namespace) error {
		return applyMask(stored, proto.CloneOf(r.GetNamespace()), r.GetUpdateMask(), namespaceOutputOnly...)
	})
	if err != nil {
		return nil, toStatus(err, name)
	}
	return &grapnelv1.UpdateNamespaceResponse{Namespace: n.Proto}, nil
}

// DeleteNamespace marks a namespace deleted and cancels its open deliveries; one that has subscriptions
// needs force. Repeating it is OK.
func (s namespaceService) DeleteNamespace(ctx context.Context, r *grapnelv1.DeleteNamespaceRequest) (*grapnelv1.DeleteNamespaceResponse, error) {
	id, err := parseNamespace("name", r.GetName())
	if err != nil {
		return nil, err
	}
	n, err := s.Registry.DeleteNamespace(ctx, id, r.GetEtag(), r.GetForce())
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	bounded, cancel := context.WithTimeout(ctx, cancelTime)
	defer cancel()
	for sub := range s.Registry.Snapshot().Subscriptions(id, "") {
		s.cancelOpen(bounded, sub, "namespace deleted")
	}
	return &grapnelv1.DeleteNamespaceResponse{Namespace: n.Proto}, nil
}

// clampInt32 keeps a counter that the API shows as int32 from turning negative.
func clampInt32(n int64) int32 {
	return int32(max(0, min(n, math.MaxInt32))) //nolint:gosec // bounded by the line itself
}
