package api

import (
	"context"
	"errors"
	"math"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// namespaceOutputOnly are the fields of Namespace that callers cannot set.
var namespaceOutputOnly = []string{
	"name", "uid", "usage", "effective_quota", "state", "state_reason", "create_time", "delete_time", "purge_time", "etag",
	"undeleted_state", "undeleted_state_reason",
}

// CreateNamespace adds a namespace. The id is its idempotency key: a repeated call is RESOURCE_EXISTS.
func (s namespaceService) CreateNamespace(ctx context.Context, r *grapnelv1.CreateNamespaceRequest) (*grapnelv1.CreateNamespaceResponse, error) {
	content := &grapnelv1.Namespace{}
	if r.GetNamespace() != nil {
		if err := applyMask(content, proto.CloneOf(r.GetNamespace()), nil, namespaceOutputOnly...); err != nil {
			return nil, err
		}
	}
	content.State, content.StateReason = r.GetInitialState(), r.GetStateReason()
	n, err := s.Registry.CreateNamespace(ctx, r.GetNamespaceId(), content)
	if errors.Is(err, subscription.ErrExists) {
		return nil, s.taken(r.GetNamespaceId())
	}
	if err != nil {
		return nil, toStatus(err, namespaceName(r.GetNamespaceId()))
	}
	return &grapnelv1.CreateNamespaceResponse{Namespace: n.Proto()}, nil
}

// taken says who has the name of a namespace.
func (s namespaceService) taken(id string) *Error {
	name := namespaceName(id)
	e := exists(name, "namespace")
	if n := s.Registry.Snapshot().Namespace(id); n != nil && n.Deleted() {
		e.message = name + " is deleted, and its name is taken until it is erased, at " + n.Proto().GetPurgeTime().AsTime().Format(time.RFC3339) +
			"; UndeleteNamespace takes the deletion back"
		e.metadata["purgeTime"] = n.Proto().GetPurgeTime().AsTime().Format(time.RFC3339)
	}
	return e
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
	out := n.Proto()
	out.Usage, out.EffectiveQuota = s.usage(snapshot, n), n.Quota().Proto()
	return &grapnelv1.GetNamespaceResponse{Namespace: out}, nil
}

// usage reads how much of its quota a namespace has used.
func (s namespaceService) usage(snapshot *subscription.Snapshot, n *subscription.Namespace) *grapnelv1.Usage {
	return &grapnelv1.Usage{
		Subscriptions:  clampInt32(int64(snapshot.Count(n.ID))),
		OpenDeliveries: clampInt32(s.Journal.OpenIn(delivery.UID(n.UID).NamespaceKey())),
		PublishRate:    s.Ingest.Rate(n.ID),
		OldestDueAge:   durationpb.New(s.Engine.OldestDue(n.ID)),
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
		func(n *subscription.Namespace) string { return n.ID },
		func(n *subscription.Namespace) *grapnelv1.Namespace { return n.Proto() })
	return &grapnelv1.ListNamespacesResponse{Namespaces: page.items, NextPageToken: s.pages.seal(page.next, query...)}, nil
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
	if errors.Is(err, subscription.ErrNotFound) && r.GetAllowMissing() && r.GetNamespace().GetEtag() == "" {
		return s.createMissing(ctx, id, r)
	}
	if err != nil {
		return nil, toStatus(err, name)
	}
	return &grapnelv1.UpdateNamespaceResponse{Namespace: n.Proto()}, nil
}

// createMissing makes the namespace that an update did not find; everything in the request counts.
func (s namespaceService) createMissing(ctx context.Context, id string, r *grapnelv1.UpdateNamespaceRequest) (*grapnelv1.UpdateNamespaceResponse, error) {
	made, err := s.CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{NamespaceId: id, Namespace: r.GetNamespace()})
	if err != nil {
		return nil, err
	}
	return &grapnelv1.UpdateNamespaceResponse{Namespace: made.GetNamespace()}, nil
}

// PauseNamespace stops all attempts of a namespace while events keep queueing. Repeating it changes the reason only.
func (s namespaceService) PauseNamespace(ctx context.Context, r *grapnelv1.PauseNamespaceRequest) (*grapnelv1.PauseNamespaceResponse, error) {
	n, err := s.setState(ctx, r, grapnelv1.Namespace_STATE_PAUSED)
	if err != nil {
		return nil, err
	}
	return &grapnelv1.PauseNamespaceResponse{Namespace: n}, nil
}

// DisableNamespace stops all attempts of a namespace, and has new matches recorded as skipped.
func (s namespaceService) DisableNamespace(ctx context.Context, r *grapnelv1.DisableNamespaceRequest) (*grapnelv1.DisableNamespaceResponse, error) {
	n, err := s.setState(ctx, r, grapnelv1.Namespace_STATE_DISABLED)
	if err != nil {
		return nil, err
	}
	return &grapnelv1.DisableNamespaceResponse{Namespace: n}, nil
}

// ResumeNamespace restarts attempts.
func (s namespaceService) ResumeNamespace(ctx context.Context, r *grapnelv1.ResumeNamespaceRequest) (*grapnelv1.ResumeNamespaceResponse, error) {
	n, err := s.setState(ctx, r, grapnelv1.Namespace_STATE_ACTIVE)
	if err != nil {
		return nil, err
	}
	return &grapnelv1.ResumeNamespaceResponse{Namespace: n}, nil
}

// turn is a request that brings what it names into another state.
type turn interface {
	GetName() string
	GetEtag() string
	GetReason() string
}

func (s namespaceService) setState(ctx context.Context, r turn, state grapnelv1.Namespace_State) (*grapnelv1.Namespace, error) {
	id, err := parseNamespace("name", r.GetName())
	if err != nil {
		return nil, err
	}
	n, err := s.Registry.SetNamespaceState(ctx, id, r.GetEtag(), state, r.GetReason())
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return n.Proto(), nil
}

// UndeleteNamespace takes a deletion back.
func (s namespaceService) UndeleteNamespace(ctx context.Context, r *grapnelv1.UndeleteNamespaceRequest) (*grapnelv1.UndeleteNamespaceResponse, error) {
	id, err := parseNamespace("name", r.GetName())
	if err != nil {
		return nil, err
	}
	n, err := s.Registry.UndeleteNamespace(ctx, id, r.GetEtag())
	switch {
	case errors.Is(err, subscription.ErrNotDeleted):
		e := exists(r.GetName(), "namespace")
		e.message = r.GetName() + " is not deleted"
		return nil, e
	case errors.Is(err, subscription.ErrNamespaceDeleted):
		return nil, invalidState(r.GetName(), r.GetName()+" is being erased; it cannot be taken back any more")
	case err != nil:
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.UndeleteNamespaceResponse{Namespace: n.Proto()}, nil
}

// NamespaceDeleted is the reason of a delivery that was cancelled for the deletion of its namespace.
const NamespaceDeleted = "namespace deleted"

const (
	// cancelledLanes is of how many subscriptions DeleteNamespace cancels the open deliveries before it answers, among the
	// first lookedAt. The rest is cancelled by dispatch, which sees the namespace deleted.
	cancelledLanes = 100
	lookedAt       = 10_000
)

// DeleteNamespace marks a namespace deleted, and its open deliveries are cancelled whether the caller stays or not; one
// that has subscriptions needs force. Repeating it is OK.
func (s namespaceService) DeleteNamespace(ctx context.Context, r *grapnelv1.DeleteNamespaceRequest) (*grapnelv1.DeleteNamespaceResponse, error) {
	id, err := parseNamespace("name", r.GetName())
	if err != nil {
		return nil, err
	}
	n, err := s.Registry.DeleteNamespace(ctx, id, r.GetEtag(), r.GetForce())
	if r.GetAllowMissing() && errors.Is(err, subscription.ErrNotFound) {
		return &grapnelv1.DeleteNamespaceResponse{}, nil
	}
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	s.cancelFirst(ctx, n)
	return &grapnelv1.DeleteNamespaceResponse{Namespace: n.Proto()}, nil
}

// cancelFirst cancels what is open in a deleted namespace, as far as one call may, so that a caller of a small one sees
// it done.
func (s namespaceService) cancelFirst(ctx context.Context, n *subscription.Namespace) {
	ctx, cancel := context.WithTimeout(ctx, cancelTime)
	defer cancel()
	// UndeleteNamespace may come meanwhile, and events after it.
	deleted := func() bool {
		now := s.Registry.Snapshot().NamespaceByKey(subscription.UIDKey(n.UID))
		return now == nil || now.Deleted()
	}
	looked, cancelled := 0, 0
	for sub := range s.Registry.Snapshot().Subscriptions(n.ID, "") {
		if looked++; looked > lookedAt || cancelled == cancelledLanes || ctx.Err() != nil || !deleted() {
			return
		}
		if s.Journal.OpenOf(s.lane(sub)) > 0 {
			s.cancelOpen(ctx, sub, NamespaceDeleted, deleted)
			cancelled++
		}
	}
}

// clampInt32 keeps a counter that the API shows as int32 from turning negative.
func clampInt32(n int64) int32 {
	return int32(max(0, min(n, math.MaxInt32))) //nolint:gosec // bounded by the line itself
}
