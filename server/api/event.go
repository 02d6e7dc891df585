package api

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
)

// GetEvent reads one event, with its payload when asked.
func (s eventService) GetEvent(_ context.Context, r *grapnelv1.GetEventRequest) (*grapnelv1.GetEventResponse, error) {
	ns, ev, err := s.event(r.GetName())
	if err != nil {
		return nil, err
	}
	return &grapnelv1.GetEventResponse{Event: eventProto(ns, ev, r.GetIncludePayload())}, nil
}

// PurgeEventPayload takes away what an event carries.
func (s eventService) PurgeEventPayload(ctx context.Context, r *grapnelv1.PurgeEventPayloadRequest) (*grapnelv1.PurgeEventPayloadResponse, error) {
	_, ev, err := s.event(r.GetName())
	if err != nil {
		return nil, err
	}
	done, err := s.Journal.PurgeEvent(ctx, ev.Namespace, ev.Partition, ev.Seq)
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.PurgeEventPayloadResponse{CancelledDeliveries: clampInt32(done.Cancelled)}, nil
}

// event reads an event by its name, of which the last segment is its id or its uid.
func (s *Server) event(name string) (ns string, ev *delivery.Event, err error) {
	ns, id, err := parseName("name", name, collectionEvents)
	if err != nil {
		return "", nil, err
	}
	space, err := s.space(ns, name)
	if err != nil {
		return "", nil, err
	}
	ev, err = s.Journal.Event(space, id)
	if errors.Is(err, delivery.ErrNotFound) {
		ev, err = s.Journal.EventByUID(space, id)
	}
	if err != nil {
		return "", nil, toStatus(err, name)
	}
	return ns, ev, nil
}

// space is what the journal knows a namespace by. One that does not exist has nothing, so that resource is what was
// not found.
func (s *Server) space(ns, resource string) (delivery.NamespaceKey, error) {
	n := s.Registry.Snapshot().Namespace(ns)
	if n == nil {
		return 0, notFound(resource, noun(resource))
	}
	return delivery.UID(n.UID).NamespaceKey(), nil
}

// ListEvents reads one page, newest first, without payloads. A page may be short, or empty, before the end.
func (s eventService) ListEvents(_ context.Context, r *grapnelv1.ListEventsRequest) (*grapnelv1.ListEventsResponse, error) {
	ns, space, err := s.existingNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	f, err := parseFilter(r.GetFilter(), eventFields())
	if err != nil {
		return nil, err
	}
	query := []string{"ListEvents", r.GetParent(), r.GetFilter()}
	after, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	q := delivery.EventQuery{Namespace: space, Limit: size, After: after}
	if !f.Empty() {
		q.Match = f.Match
		q.Since, q.Until = f.Between("accept_time")
	}
	page, err := s.events(q, f)
	if err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	out := &grapnelv1.ListEventsResponse{}
	var bytes pageBytes
	for i, ev := range page.Events {
		m := eventProto(ns, ev, false)
		if bytes.full(m) {
			before := page.Events[i-1]
			page.Next = delivery.ID{Seq: before.Seq, Partition: before.Partition}.String()
			break
		}
		out.Events = append(out.Events, m)
	}
	out.NextPageToken = s.pages.seal(page.Next, query...)
	return out, nil
}

// events reads a page. An event that the filter names is read by itself.
func (s *Server) events(q delivery.EventQuery, f *filter.Filter[*delivery.Event]) (delivery.EventPage, error) {
	uids, known := f.OneOf("uid")
	if !known {
		return s.Journal.Events(q)
	}
	var page delivery.EventPage
	for _, uid := range uids {
		ev, err := s.Journal.EventByUID(q.Namespace, uid)
		if err != nil && !errors.Is(err, delivery.ErrNotFound) {
			return delivery.EventPage{}, err
		}
		if err == nil && f.Match(ev) {
			page.Events = append(page.Events, ev)
		}
	}
	return page, nil
}

// existingNamespace reads the name of a namespace that must be there, deleted or not.
func (s *Server) existingNamespace(field, name string) (string, delivery.NamespaceKey, error) {
	ns, err := parseNamespace(field, name)
	if err != nil {
		return "", 0, err
	}
	space, err := s.space(ns, name)
	return ns, space, err
}

func eventFields() []filter.Field[*delivery.Event] {
	type field = filter.Field[*delivery.Event]
	return []field{
		{Name: "id", Text: func(e *delivery.Event) string { return e.ID }},
		{Name: "uid", Text: func(e *delivery.Event) string { return e.UID }},
		{Name: "type", Text: func(e *delivery.Event) string { return e.Type }},
		{Name: "subject", Text: func(e *delivery.Event) string { return e.Subject }},
		{Name: "source", Text: func(e *delivery.Event) string { return e.Source }},
		{Name: "ordering_key", Text: func(e *delivery.Event) string { return e.OrderingKey }},
		{Name: "time", Time: func(e *delivery.Event) time.Time { return e.Time }},
		{Name: "accept_time", Time: func(e *delivery.Event) time.Time { return e.AcceptTime }},
		{Name: "matched_subscriptions", Int: func(e *delivery.Event) int64 { return int64(e.Matched) }},
		{Name: "condition_error_count", Int: func(e *delivery.Event) int64 { return int64(e.FaultCount) }},
		{Name: "attributes", Map: func(e *delivery.Event) map[string]string { return e.Attributes }},
	}
}

func eventProto(ns string, ev *delivery.Event, payload bool) *grapnelv1.Event {
	m := &grapnelv1.Event{
		Name:                 eventName(ns, ev.ID),
		Id:                   ev.ID,
		Source:               ev.Source,
		Type:                 ev.Type,
		Subject:              ev.Subject,
		Time:                 stamp(ev.Time),
		DataContentType:      ev.ContentType,
		DataSchema:           ev.Schema,
		Attributes:           ev.Attributes,
		OrderingKey:          ev.OrderingKey,
		DeliverTime:          stamp(ev.DeliverTime),
		AcceptTime:           stamp(ev.AcceptTime),
		SizeBytes:            int32(len(ev.Payload)),
		MatchedSubscriptions: clampInt32(int64(ev.Matched)),
		SkippedSubscriptions: clampInt32(int64(ev.Skipped)),
		Uid:                  ev.UID,
		ConditionErrorCount:  clampInt32(int64(ev.FaultCount)),
	}
	for _, f := range ev.Faults {
		m.ConditionErrors = append(m.ConditionErrors, &grapnelv1.ConditionError{Subscription: subscriptionName(ns, f.Subscription), Error: f.Text})
	}
	if ev.Purged != nil {
		m.PayloadPurged, m.PurgeTime, m.SizeBytes = true, stamp(ev.Purged.Time), int32(ev.Purged.Bytes)
	}
	if ev.TTL > 0 {
		m.Ttl = durationpb.New(ev.TTL)
	}
	if payload && ev.Purged == nil {
		m.Payload, m.Headers = &grapnelv1.Event_Data{Data: ev.Payload}, ev.Headers
	}
	return m
}

// stamp is t for the wire; nil for the zero time.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
