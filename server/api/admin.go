package api

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// defaultStatsWindow is how far GetStats looks back when the caller does not say.
const defaultStatsWindow = 5 * time.Minute

// GetCluster reads versions, nodes and whether the configuration store can be written to.
func (s adminService) GetCluster(context.Context, *grapnelv1.GetClusterRequest) (*grapnelv1.GetClusterResponse, error) {
	state := grapnelv1.Node_STATE_READY
	select {
	case <-s.draining:
		state = grapnelv1.Node_STATE_DRAINING
	default:
	}
	dispatch := s.Registry.Snapshot().Dispatch()
	return &grapnelv1.GetClusterResponse{
		Version:      s.Version,
		Commit:       s.Commit,
		StoreHealthy: s.Registry.Healthy(),
		ClusterId:    s.ClusterID,

		DispatchPaused: dispatch.Paused, PauseReason: dispatch.Reason,
		DispatchChangeTime: stamp(dispatch.Time), DispatchEtag: dispatch.Etag(),

		Nodes: []*grapnelv1.Node{{
			Name:            nodeName(s.NodeName),
			Address:         s.Address,
			Version:         s.Version,
			State:           state,
			OwnedPartitions: clampInt32(int64(s.Partitions)),
			InFlight:        clampInt32(int64(s.Engine.Running())),
			StartTime:       timestamppb.New(s.started),
		}},
	}, nil
}

// clusterName stands for all of it where the name of a resource is asked for.
const clusterName = "cluster"

// PauseDispatch stops all attempts. Repeating it changes the reason only.
func (s adminService) PauseDispatch(ctx context.Context, r *grapnelv1.PauseDispatchRequest) (*grapnelv1.PauseDispatchResponse, error) {
	etag, err := s.setDispatch(ctx, r.GetEtag(), true, r.GetReason())
	if err != nil {
		return nil, err
	}
	return &grapnelv1.PauseDispatchResponse{Etag: etag}, nil
}

// ResumeDispatch restarts them.
func (s adminService) ResumeDispatch(ctx context.Context, r *grapnelv1.ResumeDispatchRequest) (*grapnelv1.ResumeDispatchResponse, error) {
	etag, err := s.setDispatch(ctx, r.GetEtag(), false, r.GetReason())
	if err != nil {
		return nil, err
	}
	return &grapnelv1.ResumeDispatchResponse{Etag: etag}, nil
}

func (s adminService) setDispatch(ctx context.Context, etag string, paused bool, reason string) (string, error) {
	d, err := s.Registry.SetDispatch(ctx, etag, paused, reason)
	if err != nil {
		return "", toStatus(err, clusterName)
	}
	s.log.WarnContext(ctx, "the switch for all dispatch was turned", "paused", d.Paused, "reason", d.Reason)
	return d.Etag(), nil
}

// GetStats reads counters over a window, in all and for the subscriptions with the most failures.
func (s adminService) GetStats(_ context.Context, r *grapnelv1.GetStatsRequest) (*grapnelv1.GetStatsResponse, error) {
	ns, err := s.listedNamespace(r.GetParent())
	if err != nil {
		return nil, err
	}
	window := defaultStatsWindow
	if r.GetWindow() != nil {
		window = r.GetWindow().AsDuration()
	}
	total, per := s.Engine.Stats(ns, window, int(r.GetTopSubscriptions()))
	total.Events = s.Ingest.Accepted(ns, window)
	total.ConditionErrors = s.Ingest.ConditionErrors(ns, window)
	return &grapnelv1.GetStatsResponse{Total: total, Subscriptions: per}, nil
}
