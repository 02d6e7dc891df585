package api

import (
	"context"
	"errors"
	"iter"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/eventtype"
)

// eventTypeOutputOnly are the fields of EventType that callers cannot set.
var eventTypeOutputOnly = []string{"name", "type", "create_time", "update_time", "etag"}

// CreateEventType registers a type. Its name is its idempotency key: a repeated call is RESOURCE_EXISTS.
func (s eventTypeService) CreateEventType(ctx context.Context, r *grapnelv1.CreateEventTypeRequest) (*grapnelv1.CreateEventTypeResponse, error) {
	ns, err := parseNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	name := eventTypeName(ns, r.GetEventTypeId())
	if err := s.writable(ns); err != nil {
		return nil, err
	}
	content := &grapnelv1.EventType{}
	if r.GetEventType() != nil {
		if err := applyMask(content, proto.CloneOf(r.GetEventType()), nil, eventTypeOutputOnly...); err != nil {
			return nil, err
		}
	}
	made, err := s.EventTypes.Create(ctx, ns, r.GetEventTypeId(), content, r.GetValidateOnly())
	if err != nil {
		return nil, toStatus(err, name)
	}
	return &grapnelv1.CreateEventTypeResponse{EventType: made.Proto}, nil
}

// GetEventType reads one type, and how its events fit.
func (s eventTypeService) GetEventType(_ context.Context, r *grapnelv1.GetEventTypeRequest) (*grapnelv1.GetEventTypeResponse, error) {
	found, err := s.find(r.GetName())
	if err != nil {
		return nil, err
	}
	status := &grapnelv1.EventTypeStatus{}
	var last *eventtype.Mismatch
	if status.Mismatches, last = found.Mismatches(); last != nil {
		status.LastMismatch, status.LastMismatchTime = last.Text, stamp(last.Time)
	}
	return &grapnelv1.GetEventTypeResponse{EventType: found.Proto, Status: status}, nil
}

// find looks a type up by its full name.
func (s eventTypeService) find(name string) (*eventtype.Type, error) {
	ns, id, err := parseName("name", name, collectionEventTypes)
	if err != nil {
		return nil, err
	}
	found := s.EventTypes.In(ns).Get(id)
	if found == nil {
		return nil, absent(name, s.EventTypes.Broken())
	}
	return found, nil
}

// ListEventTypes reads one page in the order of types, of one namespace or of all.
func (s eventTypeService) ListEventTypes(_ context.Context, r *grapnelv1.ListEventTypesRequest) (*grapnelv1.ListEventTypesResponse, error) {
	ns, err := s.listedNamespace(r.GetParent())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	wanted, err := parseFilter(r.GetFilter(), eventTypeFields())
	if err != nil {
		return nil, err
	}
	query := []string{"ListEventTypes", r.GetParent(), r.GetFilter()}
	after, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	list := func(ns, after string) iter.Seq[*eventtype.Type] { return s.EventTypes.In(ns).Types(after) }
	page := takePage(inNamespaces(s.Registry.Snapshot(), ns, after, list), size,
		func(t *eventtype.Type) bool { return wanted.Match(t.Brief) },
		func(t *eventtype.Type) string { return t.Namespace + "/" + t.ID },
		func(t *eventtype.Type) *grapnelv1.EventType {
			if r.GetIncludeSchemas() {
				return t.Proto
			}
			return t.Brief
		})
	out := &grapnelv1.ListEventTypesResponse{EventTypes: page.items, NextPageToken: s.pages.seal(page.next, query...)}
	if after == "" {
		out.Unreachable = s.unreachable(ns)
	}
	return out, nil
}

// maxUnreachable bounds the names of resources that a list lacks.
const maxUnreachable = 100

// unreachable are the types of a namespace, or of all, that cannot be read and of which nothing is known.
func (s eventTypeService) unreachable(ns string) (names []string) {
	for _, name := range s.EventTypes.Broken() {
		in, id, err := parseName("", name, collectionEventTypes)
		if err == nil && (ns == "" || ns == in) && s.EventTypes.In(in).Get(id) == nil && len(names) < maxUnreachable {
			names = append(names, name)
		}
	}
	return names
}

// eventTypeFields are what a filter over event types may name.
func eventTypeFields() []filter.Field[*grapnelv1.EventType] {
	type kind = *grapnelv1.EventType
	const prefix = "ENFORCEMENT_"
	return []filter.Field[kind]{
		{Name: "type", Text: kind.GetType},
		{Name: "deprecated", Values: []string{"true", "false"}, Text: func(t kind) string {
			if t.GetDeprecated() {
				return "true"
			}
			return "false"
		}},
		{Name: "enforcement", Values: []string{"OFF", "WARN", "REJECT"}, Prefix: prefix, Text: func(t kind) string {
			if t.GetEnforcement() == grapnelv1.EventType_ENFORCEMENT_UNSPECIFIED {
				return "OFF"
			}
			return strings.TrimPrefix(t.GetEnforcement().String(), prefix)
		}},
		{Name: "version", Texts: func(t kind) []string {
			var versions []string
			for _, v := range t.GetSchemas() {
				versions = append(versions, v.GetVersion())
			}
			return versions
		}},
		{Name: "create_time", Time: func(t kind) time.Time { return t.GetCreateTime().AsTime() }},
		{Name: "update_time", Time: func(t kind) time.Time { return t.GetUpdateTime().AsTime() }},
	}
}

// UpdateEventType changes the fields that the mask names, under an etag when one is sent.
func (s eventTypeService) UpdateEventType(ctx context.Context, r *grapnelv1.UpdateEventTypeRequest) (*grapnelv1.UpdateEventTypeResponse, error) {
	name := r.GetEventType().GetName()
	ns, id, err := parseName("event_type.name", name, collectionEventTypes)
	if err != nil {
		return nil, err
	}
	if err := s.writable(ns); err != nil {
		return nil, err
	}
	mutate := func(stored *grapnelv1.EventType) error {
		mask := r.GetUpdateMask()
		if stored.GetCreateTime() == nil {
			mask = nil // made anew: everything in the request counts
		}
		return applyMask(stored, proto.CloneOf(r.GetEventType()), mask, eventTypeOutputOnly...)
	}
	changed, err := s.EventTypes.Update(ctx, ns, id, r.GetEventType().GetEtag(), mutate, eventtype.UpdateOptions{
		AllowMissing: r.GetAllowMissing(), ValidateOnly: r.GetValidateOnly(),
	})
	if err != nil {
		return nil, toStatus(err, name)
	}
	return &grapnelv1.UpdateEventTypeResponse{EventType: changed.Proto}, nil
}

// DeleteEventType removes a type.
func (s eventTypeService) DeleteEventType(ctx context.Context, r *grapnelv1.DeleteEventTypeRequest) (*grapnelv1.DeleteEventTypeResponse, error) {
	ns, id, err := parseName("name", r.GetName(), collectionEventTypes)
	if err != nil {
		return nil, err
	}
	err = s.EventTypes.Delete(ctx, ns, id, r.GetEtag())
	if err != nil && !(r.GetAllowMissing() && errors.Is(err, eventtype.ErrNotFound)) {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.DeleteEventTypeResponse{}, nil
}

// SampleEventType makes a payload that a type's schema allows.
func (s eventTypeService) SampleEventType(ctx context.Context, r *grapnelv1.SampleEventTypeRequest) (*grapnelv1.SampleEventTypeResponse, error) {
	found, err := s.find(r.GetName())
	if err != nil {
		return nil, err
	}
	payload, version, err := found.Sample(ctx, r.GetVersion())
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.SampleEventTypeResponse{Payload: string(payload), Version: version}, nil
}
