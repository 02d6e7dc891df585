package api

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/eventtype"
	"github.com/grapnel/grapnel/server/ingest"
)

// maxBatch is the most events of one BatchPublish.
const maxBatch = 500

// Publish accepts one event; the answer means that it is durable.
func (s publishService) Publish(ctx context.Context, r *grapnelv1.PublishRequest) (*grapnelv1.PublishResponse, error) {
	ns, err := parseNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	if len(r.ProtoReflect().GetUnknown()) > 0 {
		return nil, invalid(Violation{"", unknownField(r.ProtoReflect()), "unknown_field"})
	}
	ev, faults := publishedOf(ns, r.GetEvent(), time.Now())
	if r.GetEvent() != nil && r.GetEvent().GetId() == "" && isRepeat(ctx) {
		faults = append(faults, repeatWithoutID())
	}
	if len(faults) > 0 {
		return nil, invalid(under("event", faults)...)
	}
	result := s.Ingest.Publish(s.Tracer.Caller(ctx), ns, []*delivery.Event{ev})[0]
	if result.Err != nil {
		return nil, toStatus(result.Err, publishedName(ns, ev, result.Err))
	}
	return &grapnelv1.PublishResponse{
		Name:                 eventName(ns, result.Event.ID),
		Duplicate:            result.Duplicate,
		MatchedSubscriptions: clampInt32(int64(result.Event.Matched)),
		SkippedSubscriptions: clampInt32(int64(result.Event.Skipped)),
		AcceptTime:           timestamppb.New(result.Event.AcceptTime),
		Uid:                  result.Event.UID,
		ConditionErrorCount:  clampInt32(int64(result.Event.FaultCount)),
	}, nil
}

// previousAttemptsKey is what grpc's clients send with a call that they repeat by their retry policy: how often they
// have sent it before. (gRFC A6.)
const previousAttemptsKey = "grpc-previous-rpc-attempts"

// isRepeat reports whether the caller's library has sent this call before, without having seen an answer.
func isRepeat(ctx context.Context) bool {
	v := metadata.ValueFromIncomingContext(ctx, previousAttemptsKey)
	return len(v) > 0 && v[0] != "0"
}

// repeatWithoutID refuses an event that may be stored already. Nothing but an id tells it from another one like it.
func repeatWithoutID() Violation {
	return Violation{"id", "is required where a call is repeated: this is a retry, whether the first try stored the event is not known, " +
		"and without an id it would be stored twice; give each event an id, or take Publish out of the client's retry policy", "repeat_without_id"}
}

// lacksID reports whether a call publishes an event without an id, so that a repeat of it would be refused.
func lacksID(req any) bool {
	switch r := req.(type) {
	case *grapnelv1.PublishRequest:
		return r.GetEvent().GetId() == ""
	case *grapnelv1.BatchPublishRequest:
		return slices.ContainsFunc(r.GetEvents(), func(e *grapnelv1.Event) bool { return e.GetId() == "" })
	}
	return false
}

// BatchPublish accepts or refuses each event on its own. The call fails only when no event was looked at.
func (s publishService) BatchPublish(ctx context.Context, r *grapnelv1.BatchPublishRequest) (*grapnelv1.BatchPublishResponse, error) {
	ns, err := parseNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	switch n := len(r.GetEvents()); {
	case len(r.ProtoReflect().GetUnknown()) > 0:
		return nil, invalid(Violation{"", unknownField(r.ProtoReflect()), "unknown_field"})
	case n == 0:
		return nil, invalid(Violation{"events", "must have at least 1 event", "repeated.min_items"})
	case n > maxBatch:
		return nil, invalid(Violation{"events", "has " + strconv.Itoa(n) + " events; a batch takes at most " + strconv.Itoa(maxBatch), "repeated.max_items"})
	}
	if size := proto.Size(r); size > maxMessage {
		return nil, invalid(Violation{"events", "is " + strconv.Itoa(size) + " bytes in all; a batch takes at most " + strconv.Itoa(maxMessage), "batch_bytes"})
	}
	if err := s.Ingest.Refusal(ns); err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	results, err := s.publishAll(ctx, ns, r.GetEvents())
	if err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	out := &grapnelv1.BatchPublishResponse{Results: results}
	for _, result := range results {
		if result.GetError() != nil {
			out.FailedCount++
		}
	}
	return out, nil
}

// publishAll publishes what passes the checks; results[k] answers events[k]. The error is that of a server
// or namespace that took none of them.
func (s publishService) publishAll(ctx context.Context, ns string, events []*grapnelv1.Event) ([]*grapnelv1.PublishResult, error) {
	results := make([]*grapnelv1.PublishResult, len(events))
	accepted := make([]*delivery.Event, 0, len(events))
	places := make([]int, 0, len(events))
	now := time.Now()
	repeat := isRepeat(ctx)
	unreadable, _ := ctx.Value(badEvents{}).(map[int]*Error)
	for k, e := range events {
		if bad := unreadable[k]; bad != nil {
			results[k] = &grapnelv1.PublishResult{Error: bad.item()}
			continue
		}
		ev, faults := publishedOf(ns, e, now)
		if repeat && e.GetId() == "" {
			faults = append(faults, repeatWithoutID())
		}
		if len(faults) > 0 {
			results[k] = &grapnelv1.PublishResult{Error: invalid(faults...).item()}
			continue
		}
		accepted = append(accepted, ev)
		places = append(places, k)
	}
	if len(accepted) == 0 {
		return results, nil
	}
	for i, r := range s.Ingest.Publish(s.Tracer.Caller(ctx), ns, accepted) {
		if r.Err != nil && ofNamespace(r.Err) {
			return nil, r.Err
		}
		results[places[i]] = publishResult(ns, accepted[i], r)
	}
	return results, nil
}

// ofNamespace tells the refusals that are about the server or the namespace, not the event: Ingest refuses
// all events of a call with them, or none.
func ofNamespace(err error) bool {
	if _, ok := errors.AsType[*ingest.QuotaError](err); ok {
		return true
	}
	return errors.Is(err, ingest.ErrDraining) || errors.Is(err, ingest.ErrNamespaceNotFound) || errors.Is(err, ingest.ErrNamespaceDeleted)
}

func publishResult(ns string, ev *delivery.Event, r ingest.Result) *grapnelv1.PublishResult {
	if r.Err == nil {
		return &grapnelv1.PublishResult{
			Name: eventName(ns, r.Event.ID), Duplicate: r.Duplicate, Uid: r.Event.UID, AcceptTime: timestamppb.New(r.Event.AcceptTime),
			MatchedSubscriptions: clampInt32(int64(r.Event.Matched)), SkippedSubscriptions: clampInt32(int64(r.Event.Skipped)),
			ConditionErrorCount: clampInt32(int64(r.Event.FaultCount)),
		}
	}
	if bad, ok := errors.AsType[*ingest.FieldError](r.Err); ok {
		return &grapnelv1.PublishResult{Error: invalid(Violation{bad.Field, bad.Description, bad.Rule}).item()}
	}
	if bad, ok := errors.AsType[*eventtype.MismatchError](r.Err); ok {
		return &grapnelv1.PublishResult{Error: schemaMismatch("", bad).item()}
	}
	if bad, ok := errors.AsType[*ingest.UnregisteredError](r.Err); ok {
		return &grapnelv1.PublishResult{Error: unregistered("", bad).item()}
	}
	return &grapnelv1.PublishResult{Error: toStatus(r.Err, publishedName(ns, ev, r.Err)).item()}
}

// publishedName is the resource that a refusal is about: the event when it is one of the event's id.
func publishedName(ns string, ev *delivery.Event, err error) string {
	if errors.Is(err, delivery.ErrEventConflict) {
		return eventName(ns, ev.ID)
	}
	return namespaceName(ns)
}
