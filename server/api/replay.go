package api

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// replayDefault is the filter of a replay that has none.
	replayDefault = "state = EXHAUSTED OR state = REJECTED OR state = SKIPPED"
	// maxWait and defaultWait are the bounds of WaitReplayJob.
	maxWait, defaultWait = 5 * time.Minute, 30 * time.Second
	// answerTime is left of a call's deadline for the answer to a wait.
	answerTime = 100 * time.Millisecond
)

// replayOutputOnly are the fields of ReplayJob that callers cannot set.
var replayOutputOnly = []string{
	"name", "state", "scanned_count", "created_count", "skipped_count", "error", "create_time", "complete_time", "open_count", "wait_reason", "progress",
}

// CreateReplayJob starts a job, or only counts what it would do.
func (s replayService) CreateReplayJob(ctx context.Context, r *grapnelv1.CreateReplayJobRequest) (*grapnelv1.CreateReplayJobResponse, error) {
	ns, err := parseNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	if err := s.writable(ns); err != nil {
		return nil, err
	}
	id := r.GetReplayJobId()
	if id == "" {
		id = pickID("replay-", ns, r.GetRequestId())
	}
	name := replayJobName(ns, id)
	content := &grapnelv1.ReplayJob{}
	if err := applyMask(content, proto.CloneOf(r.GetReplayJob()), nil, replayOutputOnly...); err != nil {
		return nil, err
	}
	// A repeated call finds what the first one made, whatever has become of the subscription since.
	hash, err := contentOf(content)
	if err != nil {
		return nil, internal(err)
	}
	space, err := s.space(ns, name)
	if err != nil {
		return nil, err
	}
	job := &delivery.Replay{Namespace: space, ID: id, ContentHash: hash}
	if job.Spec, err = s.replaySpec(ns, content); err != nil {
		return nil, err
	}
	if !r.GetValidateOnly() {
		if known, err := s.replayByID(space, id); err == nil && known.ContentHash == hash {
			return &grapnelv1.CreateReplayJobResponse{ReplayJob: s.replayProto(ns, known)}, nil
		}
	}
	if n := s.Registry.Snapshot().Namespace(ns); n != nil && n.State == grapnelv1.Namespace_STATE_DISABLED {
		return nil, invalidState(r.GetParent(), r.GetParent()+" is disabled; ResumeNamespace enables it")
	}
	if err := s.replayable(content.GetSubscription(), job.Spec); err != nil {
		return nil, err
	}
	// By the clock that deliveries are made by, and with all that was made in this very millisecond.
	if now := s.Journal.Now().Truncate(time.Millisecond).Add(time.Millisecond); job.Spec.Until.IsZero() || job.Spec.Until.After(now) {
		job.Spec.Until = now
	}
	if r.GetValidateOnly() {
		counts, err := s.Replays.Count(ctx, job)
		if err != nil {
			return nil, toStatus(err, name)
		}
		job.Counts = counts
		shown := s.replayProto(ns, job)
		shown.Name = ""
		return &grapnelv1.CreateReplayJobResponse{ReplayJob: shown}, nil
	}
	made, err := s.Replays.Create(ctx, job)
	switch {
	case errors.Is(err, delivery.ErrReplayExists):
		return nil, exists(name, "replay job")
	case errors.Is(err, delivery.ErrTooManyReplays):
		return nil, invalidState(r.GetParent(), "as many replay jobs of "+r.GetParent()+" go on as may at once, 3; wait for one to end, or cancel one")
	case errors.Is(err, ErrStopping):
		return nil, unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the server is stopping", time.Second)
	case err != nil:
		return nil, toStatus(err, name)
	}
	return &grapnelv1.CreateReplayJobResponse{ReplayJob: s.replayProto(ns, made)}, nil
}

func contentOf(content *grapnelv1.ReplayJob) (hash [16]byte, err error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(content)
	sum := sha256.Sum256(b)
	copy(hash[:], sum[:])
	return hash, err
}

// replaySpec checks what a job asks for, all of it at once.
func (s replayService) replaySpec(ns string, job *grapnelv1.ReplayJob) (delivery.ReplaySpec, error) {
	spec := delivery.ReplaySpec{Filter: job.GetFilter(), Missing: job.GetMissingOnly(), Retry: job.GetRetry(), MaxRate: job.GetMaxRate()}
	var faults []Violation
	add := func(field, rule, text string) {
		faults = append(faults, Violation{"replay_job." + field, text, rule})
	}
	if job.GetStartTime() == nil {
		add("start_time", "required", "is required: what was made at or after it is looked at")
	} else if spec.Since = job.GetStartTime().AsTime(); !job.GetStartTime().IsValid() {
		add("start_time", "timestamp", "is not a time of the years 1 to 9999")
	}
	if job.GetEndTime() != nil {
		if spec.Until = job.GetEndTime().AsTime(); !job.GetEndTime().IsValid() {
			add("end_time", "timestamp", "is not a time of the years 1 to 9999")
		} else if !spec.Until.After(spec.Since) {
			add("end_time", "order", "must lie behind start_time")
		}
	}
	if rate := job.GetMaxRate(); math.IsNaN(rate) || rate < 0 || rate > 10_000 {
		add("max_rate", "double.range", "must be 0 to 10000; 0 means 50")
	}
	if spec.Missing {
		if spec.Filter != "" {
			add("filter", "missing_only", "must be empty with missing_only, which selects events and not deliveries")
		}
		if job.GetSubscription() == "" {
			add("subscription", "missing_only", "is required with missing_only: the one whose events are missing")
		}
		if spec.Retry {
			add("retry", "missing_only", "cannot go with missing_only: what is missing cannot be retried")
		}
	} else if _, err := parseFilter(spec.Filter, deliveryFields(ns)); err != nil {
		if bad, ok := errors.AsType[*Error](err); ok {
			bad.field, bad.metadata["field"] = "replay_job.filter", "replay_job.filter"
			return spec, bad
		}
		return spec, err
	}
	if name := job.GetSubscription(); name != "" {
		owner, id, err := parseName("replay_job.subscription", name, collectionSubscriptions)
		switch {
		case err != nil:
			return spec, err
		case owner != ns:
			add("subscription", "namespace", "must be one of namespace "+ns)
		}
		spec.Subscription = id
		if sub := s.Registry.Snapshot().Subscription(ns, id); sub != nil {
			spec.UID = sub.UID
		}
	}
	if len(faults) > 0 {
		return spec, invalid(faults...)
	}
	return spec, nil
}

// replayable refuses a job whose subscription can be sent nothing.
func (s replayService) replayable(name string, spec delivery.ReplaySpec) error {
	if spec.Subscription == "" {
		return nil
	}
	sub := s.Registry.Snapshot().SubscriptionByKey(uint64(spec.UID.SubscriptionKey()))
	if sub == nil {
		return notFound(name, "subscription")
	}
	if sub.State == grapnelv1.Subscription_STATE_DISABLED {
		return invalidState(name, "the subscription is disabled: "+sub.Proto().GetStateReason()+"; ResumeSubscription enables it")
	}
	return nil
}

// GetReplayJob reads one job.
func (s replayService) GetReplayJob(_ context.Context, r *grapnelv1.GetReplayJobRequest) (*grapnelv1.GetReplayJobResponse, error) {
	ns, job, err := s.replay(r.GetName())
	if err != nil {
		return nil, err
	}
	return &grapnelv1.GetReplayJobResponse{ReplayJob: s.replayProto(ns, job)}, nil
}

// replay reads the job of a name.
func (s replayService) replay(name string) (ns string, job *delivery.Replay, err error) {
	ns, id, err := parseName("name", name, collectionReplayJobs)
	if err != nil {
		return "", nil, err
	}
	space, err := s.space(ns, name)
	if err != nil {
		return "", nil, err
	}
	if job, err = s.replayByID(space, id); err != nil {
		return "", nil, toStatus(err, name)
	}
	return ns, job, nil
}

func (s replayService) replayByID(space delivery.NamespaceKey, id string) (*delivery.Replay, error) {
	return s.jobByID(space, id, false)
}

// jobByID reads a replay, or an erasure.
func (s *Server) jobByID(space delivery.NamespaceKey, id string, erase bool) (*delivery.Replay, error) {
	all, err := s.Journal.Replays(space)
	if err != nil {
		return nil, err
	}
	for _, job := range all {
		if job.ID == id && job.Spec.Erase == erase {
			return s.Journal.Replay(space, job.Key) // with its counts
		}
	}
	return nil, delivery.ErrNotFound
}

// ListReplayJobs reads one page, newest first.
func (s replayService) ListReplayJobs(_ context.Context, r *grapnelv1.ListReplayJobsRequest) (*grapnelv1.ListReplayJobsResponse, error) {
	ns, space, err := s.existingNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	f, err := parseFilter(r.GetFilter(), replayFields(ns))
	if err != nil {
		return nil, err
	}
	query := []string{"ListReplayJobs", r.GetParent(), r.GetFilter()}
	page, err := listJobs(s.Server, space, false, r.GetPageSize(), r.GetPageToken(), query, f.Match, func(job *delivery.Replay) *grapnelv1.ReplayJob {
		return s.replayProto(ns, job)
	})
	if err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	return &grapnelv1.ListReplayJobsResponse{ReplayJobs: page.items, NextPageToken: page.next}, nil
}

// listJobs reads one page of replays, or of erasures, newest first.
func listJobs[M proto.Message](s *Server, space delivery.NamespaceKey, erase bool, wanted int32, token string, query []string, match func(*delivery.Replay) bool, show func(*delivery.Replay) M) (page pageOf[M], err error) {
	size, err := pageSize(wanted)
	if err != nil {
		return page, err
	}
	after, err := s.pages.open(token, query...)
	if err != nil {
		return page, err
	}
	before := uint64(math.MaxUint64)
	if after != "" {
		if before, err = strconv.ParseUint(after, 10, 64); err != nil {
			return page, pageTokenError("the page token does not fit this call; begin at the first page")
		}
	}
	all, err := s.Journal.Replays(space)
	if err != nil {
		return page, err
	}
	slices.Reverse(all)
	page = takePage(slices.Values(all), size,
		func(job *delivery.Replay) bool { return job.Spec.Erase == erase && job.Key < before && match(job) },
		func(job *delivery.Replay) string { return strconv.FormatUint(job.Key, 10) },
		func(job *delivery.Replay) M {
			if full, err := s.Journal.Replay(space, job.Key); err == nil {
				job = full
			}
			return show(job)
		})
	page.next = s.pages.seal(page.next, query...)
	return page, nil
}

// WaitReplayJob returns when the job has ended or the timeout is over.
func (s replayService) WaitReplayJob(ctx context.Context, r *grapnelv1.WaitReplayJobRequest) (*grapnelv1.WaitReplayJobResponse, error) {
	ns, job, err := s.replay(r.GetName())
	if err != nil {
		return nil, err
	}
	if job, err = s.waitJob(ctx, job, r.GetTimeout()); err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.WaitReplayJobResponse{ReplayJob: s.replayProto(ns, job)}, nil
}

// waitJob returns a job when it has ended or the timeout is over.
func (s *Server) waitJob(ctx context.Context, job *delivery.Replay, most *durationpb.Duration) (*delivery.Replay, error) {
	timeout := defaultWait
	if most != nil {
		timeout = min(max(most.AsDuration(), 0), maxWait)
	}
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(deadline)-answerTime)
	}
	if job.State.Ended() || timeout <= 0 {
		return job, nil
	}
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	go func() {
		select {
		case <-s.draining:
			cancel()
		case <-bounded.Done():
		}
	}()
	s.Replays.Wait(bounded, job.Namespace, job.Key)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return s.Journal.Replay(job.Namespace, job.Key)
}

// CancelReplayJob stops a job.
func (s replayService) CancelReplayJob(ctx context.Context, r *grapnelv1.CancelReplayJobRequest) (*grapnelv1.CancelReplayJobResponse, error) {
	ns, job, err := s.replay(r.GetName())
	if err != nil {
		return nil, err
	}
	if !job.State.Ended() {
		if job, err = s.Replays.Cancel(ctx, job.Namespace, job.Key); err != nil {
			return nil, toStatus(err, r.GetName())
		}
	}
	if job.State != delivery.ReplayCancelled {
		return nil, invalidState(r.GetName(), "the replay job has ended already, as "+replayState(job)+", and cannot be cancelled")
	}
	return &grapnelv1.CancelReplayJobResponse{ReplayJob: s.replayProto(ns, job)}, nil
}

func replayState(job *delivery.Replay) string {
	return strings.TrimPrefix(grapnelv1.ReplayJob_State(job.State).String(), statePrefix)
}

func replayFields(ns string) []filter.Field[*delivery.Replay] {
	type field = filter.Field[*delivery.Replay]
	return []field{
		{Name: "state", Text: replayState, Values: enumNames(grapnelv1.ReplayJob_State_name, statePrefix), Prefix: statePrefix},
		{Name: "subscription", Text: func(r *delivery.Replay) string { return r.Spec.Subscription }, Canonical: ownID(ns, collectionSubscriptions)},
		{Name: "create_time", Time: func(r *delivery.Replay) time.Time { return r.CreateTime }},
	}
}

func (s replayService) replayProto(ns string, r *delivery.Replay) *grapnelv1.ReplayJob {
	m := &grapnelv1.ReplayJob{
		Name: replayJobName(ns, r.ID), StartTime: stamp(r.Spec.Since), EndTime: stamp(r.Spec.Until), Filter: r.Spec.Filter,
		MissingOnly: r.Spec.Missing, Retry: r.Spec.Retry, MaxRate: r.Spec.MaxRate, State: grapnelv1.ReplayJob_State(r.State),
		ScannedCount: r.Counts.Scanned, CreatedCount: r.Counts.Created, SkippedCount: r.Counts.Skipped,
		CreateTime: stamp(r.CreateTime), CompleteTime: stamp(r.DoneTime), Progress: r.Progress,
	}
	if m.MaxRate == 0 {
		m.MaxRate = 50
	}
	if m.StartTime == nil { // year 1 is a time, too
		m.StartTime = timestamppb.New(r.Spec.Since)
	}
	if r.Spec.Subscription != "" {
		m.Subscription = subscriptionName(ns, r.Spec.Subscription)
	}
	if r.Key != 0 {
		m.OpenCount = s.Journal.ReplayOpen(r.Namespace, r.Key)
	}
	if !r.State.Ended() && r.Key != 0 {
		m.WaitReason = s.Replays.WaitReason(r.Namespace, r.Key)
	}
	if r.State == delivery.ReplayFailed {
		m.Error = invalidState(m.GetName(), r.Reason).item()
	}
	return m
}

// Selected is what a filter over the deliveries of a namespace selects.
type Selected struct {
	// Query has what the journal can use of it.
	Query delivery.Query
	// None: nothing can pass.
	None  bool
	Match func(*delivery.Delivery) bool
}

// SelectDeliveries reads the filter of a replay; it is that of ListDeliveries, with a default.
func SelectDeliveries(registry *subscription.Registry, ns string, spec *delivery.ReplaySpec) (*Selected, error) {
	text := spec.Filter
	if strings.TrimSpace(text) == "" {
		text = replayDefault
	}
	f, err := parseFilter(text, deliveryFields(ns))
	if err != nil {
		return nil, fmt.Errorf("filter of a replay: %w", err)
	}
	s := &Selected{Match: func(d *delivery.Delivery) bool { return f.Match(shownDelivery{d, false}) }}
	narrower := &Server{Options: Options{Registry: registry}}
	s.None = !narrower.narrow(&s.Query, ns, f)
	if spec.UID != (delivery.UID{}) && !f.Names("subscription") && !f.Names("subscription_uid") {
		s.Query.Subscription = spec.UID.SubscriptionKey()
	}
	return s, nil
}
