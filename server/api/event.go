package api

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
)

// GetEvent reads one event, with its payload when asked.
func (s eventService) GetEvent(_ context.Context, r *grapnelv1.GetEventRequest) (*grapnelv1.GetEventResponse, error) {
	ns, id, err := parseName("name", r.GetName(), collectionEvents)
	if err != nil {
		return nil, err
	}
	ev, err := s.Journal.Event(ns, id)
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.GetEventResponse{Event: eventProto(ev, r.GetIncludePayload())}, nil
}

// ListEvents reads one page, newest first, without payloads. A page may be short, or empty, before the end.
func (s eventService) ListEvents(_ context.Context, r *grapnelv1.ListEventsRequest) (*grapnelv1.ListEventsResponse, error) {
	ns, err := s.existingNamespace("parent", r.GetParent())
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
	q := delivery.EventQuery{Namespace: ns, Limit: size, After: after}
	if !f.Empty() {
		q.Match = f.Match
		q.Since, q.Until = f.Between("accept_time")
	}
	page, err := s.Journal.Events(q)
	if err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	out := &grapnelv1.ListEventsResponse{NextPageToken: s.pages.seal(page.Next, query...)}
	for _, ev := range page.Events {
		out.Events = append(out.Events, eventProto(ev, false))
	}
	return out, nil
}

// existingNamespace reads the name of a namespace that must be there, deleted or not.
func (s *Server) existingNamespace(field, name string) (string, error) {
	ns, err := parseNamespace(field, name)
	if err != nil {
		return "", err
	}
	if s.Registry.Snapshot().Namespace(ns) == nil {
		return "", notFound(name, "namespace")
	}
	return ns, nil
}

func eventFields() []filter.Field[*delivery.Event] {
	type field = filter.Field[*delivery.Event]
	return []field{
		{Name: "type", Text: func(e *delivery.Event) string { return e.Type }},
		{Name: "subject", Text: func(e *delivery.Event) string { return e.Subject }},
		{Name: "source", Text: func(e *delivery.Event) string { return e.Source }},
		{Name: "accept_time", Time: func(e *delivery.Event) time.Time { return e.AcceptTime }},
		{Name: "attributes", Map: func(e *delivery.Event) map[string]string { return e.Attributes }},
	}
}

func eventProto(ev *delivery.Event, payload bool) *grapnelv1.Event {
	m := &grapnelv1.Event{
		Name:                 eventName(ev.Namespace, ev.ID),
		Id:                   ev.ID,
		Source:               ev.Source,
		Type:                 ev.Type,
		Subject:              ev.Subject,
		Time:                 stamp(ev.Time),
		DataContentType:      ev.ContentType,
		DataSchema:           ev.Schema,
		Attributes:           ev.Attributes,
		DeliverTime:          stamp(ev.DeliverTime),
		AcceptTime:           stamp(ev.AcceptTime),
		SizeBytes:            int32(len(ev.Payload)),
		MatchedSubscriptions: int32(len(ev.Targets)),
		Uid:                  ev.UID,
	}
	if ev.TTL > 0 {
		m.Ttl = durationpb.New(ev.TTL)
	}
	if payload {
		m.Payload = &grapnelv1.Event_Data{Data: ev.Payload}
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
