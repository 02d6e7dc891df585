package api

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/subscription"
)

// erasureOutputOnly are the fields of Erasure that callers cannot set.
var erasureOutputOnly = []string{
	"name", "state", "scanned_count", "erased_count", "erased_bytes", "cancelled_count", "unread_count", "error", "create_time", "complete_time",
	"verify_time", "verified_bytes", "wait_reason", "progress",
}

// CreateErasure starts a job, or only counts what it would do.
func (s erasureService) CreateErasure(ctx context.Context, r *grapnelv1.CreateErasureRequest) (*grapnelv1.CreateErasureResponse, error) {
	ns, err := parseNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	id := r.GetErasureId()
	if id == "" {
		id = pickID("erasure-", ns, r.GetRequestId())
	}
	name := erasureName(ns, id)
	content := &grapnelv1.Erasure{}
	if err := applyMask(content, proto.CloneOf(r.GetErasure()), nil, erasureOutputOnly...); err != nil {
		return nil, err
	}
	text, err := proto.MarshalOptions{Deterministic: true}.Marshal(content)
	if err != nil {
		return nil, internal(err)
	}
	space, err := s.space(ns, name)
	if err != nil {
		return nil, err
	}
	job := &delivery.Replay{Namespace: space, ID: id}
	sum := sha256.Sum256(text)
	copy(job.ContentHash[:], sum[:])
	if job.Spec, err = s.erasureSpec(content); err != nil {
		return nil, err
	}
	if !r.GetValidateOnly() {
		if known, err := s.erasureByID(space, id); err == nil && known.ContentHash == job.ContentHash {
			return &grapnelv1.CreateErasureResponse{Erasure: s.erasureProto(ns, known)}, nil
		}
	}
	if r.GetValidateOnly() {
		counted, err := s.Replays.CountErasure(ctx, job)
		if err != nil {
			return nil, toStatus(err, name)
		}
		shown := s.erasureProto(ns, counted)
		shown.Name = ""
		return &grapnelv1.CreateErasureResponse{Erasure: shown}, nil
	}
	made, err := s.Replays.Create(ctx, job)
	switch {
	case errors.Is(err, delivery.ErrReplayExists):
		return nil, exists(name, "erasure")
	case errors.Is(err, delivery.ErrTooManyReplays):
		return nil, invalidState(r.GetParent(), "as many erasures of "+r.GetParent()+" go on as may at once, 3; wait for one to end, or cancel one")
	case errors.Is(err, ErrStopping):
		return nil, unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the server is stopping", time.Second)
	case err != nil:
		return nil, toStatus(err, name)
	}
	return &grapnelv1.CreateErasureResponse{Erasure: s.erasureProto(ns, made)}, nil
}

// erasureSpec checks what a job asks for, all of it at once.
func (s erasureService) erasureSpec(job *grapnelv1.Erasure) (delivery.ReplaySpec, error) {
	spec := delivery.ReplaySpec{Erase: true, Filter: job.GetFilter(), Condition: job.GetCondition()}
	var faults []Violation
	add := func(field, rule, text string) {
		faults = append(faults, Violation{"erasure." + field, text, rule})
	}
	if strings.TrimSpace(spec.Filter) == "" && strings.TrimSpace(spec.Condition) == "" {
		add("filter", "required", `is required, or condition is: say what is to go, such as subject = "customer-42"`)
	}
	for _, bound := range []struct {
		field string
		given interface {
			IsValid() bool
			AsTime() time.Time
		}
		set bool
		to  *time.Time
	}{{"start_time", job.GetStartTime(), job.GetStartTime() != nil, &spec.Since}, {"end_time", job.GetEndTime(), job.GetEndTime() != nil, &spec.Until}} {
		if !bound.set {
			continue
		}
		if *bound.to = bound.given.AsTime(); !bound.given.IsValid() {
			add(bound.field, "timestamp", "is not a time of the years 1 to 9999")
		}
	}
	if len(faults) == 0 && !spec.Until.IsZero() && !spec.Until.After(spec.Since) {
		add("end_time", "order", "must lie behind start_time")
	}
	if _, err := parseFilter(spec.Filter, eventFields()); err != nil {
		if bad, ok := errors.AsType[*Error](err); ok {
			bad.field, bad.metadata["field"] = "erasure.filter", "erasure.filter"
			return spec, bad
		}
		return spec, err
	}
	if spec.Condition != "" {
		if _, err := s.Registry.Condition(spec.Condition); err != nil {
			add("condition", "cel", err.Error())
		}
	}
	if len(faults) > 0 {
		return spec, invalid(faults...)
	}
	return spec, nil
}

// SelectErased reads what an erasure selects.
func SelectErased(registry *subscription.Registry, spec *delivery.ReplaySpec) (delivery.Selects, error) {
	f, err := parseFilter(spec.Filter, eventFields())
	if err != nil {
		return nil, err
	}
	holds := func(*subscription.Candidate) bool { return true }
	if spec.Condition != "" {
		if holds, err = registry.Condition(spec.Condition); err != nil {
			return nil, err
		}
	}
	return func(e *delivery.Event) bool {
		if !f.Match(e) {
			return false
		}
		candidate := ingest.Candidate(e)
		return holds(&candidate)
	}, nil
}

// GetErasure reads one job.
func (s erasureService) GetErasure(_ context.Context, r *grapnelv1.GetErasureRequest) (*grapnelv1.GetErasureResponse, error) {
	ns, job, err := s.erasure(r.GetName())
	if err != nil {
		return nil, err
	}
	return &grapnelv1.GetErasureResponse{Erasure: s.erasureProto(ns, job)}, nil
}

// erasure reads the job of a name.
func (s erasureService) erasure(name string) (ns string, job *delivery.Replay, err error) {
	ns, id, err := parseName("name", name, collectionErasures)
	if err != nil {
		return "", nil, err
	}
	space, err := s.space(ns, name)
	if err != nil {
		return "", nil, err
	}
	if job, err = s.erasureByID(space, id); err != nil {
		return "", nil, toStatus(err, name)
	}
	return ns, job, nil
}

func (s erasureService) erasureByID(space delivery.NamespaceKey, id string) (*delivery.Replay, error) {
	return s.jobByID(space, id, true)
}

// ListErasures reads one page, newest first.
func (s erasureService) ListErasures(_ context.Context, r *grapnelv1.ListErasuresRequest) (*grapnelv1.ListErasuresResponse, error) {
	ns, space, err := s.existingNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	f, err := parseFilter(r.GetFilter(), erasureFields())
	if err != nil {
		return nil, err
	}
	query := []string{"ListErasures", r.GetParent(), r.GetFilter()}
	page, err := listJobs(s.Server, space, true, r.GetPageSize(), r.GetPageToken(), query, f.Match, func(job *delivery.Replay) *grapnelv1.Erasure {
		return s.erasureProto(ns, job)
	})
	if err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	return &grapnelv1.ListErasuresResponse{Erasures: page.items, NextPageToken: page.next}, nil
}

// WaitErasure returns when the job has ended or the timeout is over.
func (s erasureService) WaitErasure(ctx context.Context, r *grapnelv1.WaitErasureRequest) (*grapnelv1.WaitErasureResponse, error) {
	ns, job, err := s.erasure(r.GetName())
	if err != nil {
		return nil, err
	}
	if job, err = s.waitJob(ctx, job, r.GetTimeout()); err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.WaitErasureResponse{Erasure: s.erasureProto(ns, job)}, nil
}

// CancelErasure stops a job.
func (s erasureService) CancelErasure(ctx context.Context, r *grapnelv1.CancelErasureRequest) (*grapnelv1.CancelErasureResponse, error) {
	ns, job, err := s.erasure(r.GetName())
	if err != nil {
		return nil, err
	}
	if !job.State.Ended() {
		if job, err = s.Replays.Cancel(ctx, job.Namespace, job.Key); err != nil {
			return nil, toStatus(err, r.GetName())
		}
	}
	if job.State != delivery.ReplayCancelled {
		return nil, invalidState(r.GetName(), "the erasure has ended already, as "+replayState(job)+", and cannot be cancelled")
	}
	return &grapnelv1.CancelErasureResponse{Erasure: s.erasureProto(ns, job)}, nil
}

func erasureFields() []filter.Field[*delivery.Replay] {
	return slices.DeleteFunc(replayFields(""), func(f filter.Field[*delivery.Replay]) bool { return f.Name == "subscription" })
}

// erasedUntil is when the job was made at the latest.
func erasedUntil(r *delivery.Replay) time.Time {
	if until := r.Spec.Until; !until.IsZero() && (r.CreateTime.IsZero() || until.Before(r.CreateTime)) {
		return until
	}
	return r.CreateTime
}

func (s erasureService) erasureProto(ns string, r *delivery.Replay) *grapnelv1.Erasure {
	m := &grapnelv1.Erasure{
		Name: erasureName(ns, r.ID), StartTime: stamp(r.Spec.Since), EndTime: stamp(erasedUntil(r)), Filter: r.Spec.Filter, Condition: r.Spec.Condition,
		State: grapnelv1.Erasure_State(r.State), ScannedCount: r.Counts.Scanned, ErasedCount: r.Purged.Events, ErasedBytes: r.Purged.Bytes,
		CancelledCount: r.Purged.Cancelled, UnreadCount: r.Counts.Skipped, CreateTime: stamp(r.CreateTime), CompleteTime: stamp(r.DoneTime),
		VerifyTime: stamp(r.Proof.Time), VerifiedBytes: r.Proof.Bytes, Progress: r.Progress,
	}
	if !r.State.Ended() && r.Key != 0 {
		m.WaitReason = s.Replays.WaitReason(r.Namespace, r.Key)
	}
	if r.State == delivery.ReplayFailed {
		m.Error = invalidState(m.GetName(), r.Reason).item()
	}
	return m
}
