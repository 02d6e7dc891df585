package client

import (
	"context"
	"iter"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// EventTypes is the event types of one namespace. IDs are types as events have them, such as order.created.
type EventTypes struct {
	c         *Client
	namespace string
}

// EventTypes returns those of a namespace; "-" lists all namespaces.
func (c *Client) EventTypes(namespace string) EventTypes { return EventTypes{c, namespace} }

// Create registers a type; content may be nil. ErrExists when it is registered already.
func (e EventTypes) Create(ctx context.Context, id string, content *grapnelv1.EventType) (*grapnelv1.EventType, error) {
	r, err := e.c.EventTypeService().CreateEventType(ctx, &grapnelv1.CreateEventTypeRequest{
		Parent: namespaceName(e.namespace), EventTypeId: id, EventType: content,
	})
	return r.GetEventType(), err
}

// List lists them in the order of types; IncludeBodies fills the texts of schemas and examples.
func (e EventTypes) List(ctx context.Context, opts ...ListOption) iter.Seq2[*grapnelv1.EventType, error] {
	o := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.EventType, string, error) {
		r, err := e.c.EventTypeService().ListEventTypes(ctx, &grapnelv1.ListEventTypesRequest{
			Parent: namespaceName(e.namespace), PageSize: o.pageSize, PageToken: token, Filter: o.filter, IncludeSchemas: o.bodies,
		})
		return r.GetEventTypes(), r.GetNextPageToken(), err
	})
}

// Get reads one.
func (e EventTypes) Get(ctx context.Context, id string) (*grapnelv1.EventType, error) {
	name, err := e.name(id)
	if err != nil {
		return nil, err
	}
	r, err := e.c.EventTypeService().GetEventType(ctx, &grapnelv1.GetEventTypeRequest{Name: name})
	return r.GetEventType(), err
}

// Update reads a type, lets change alter it, and stores the result if nobody stored another in between; else it starts
// again, as Subscriptions.Update does.
func (e EventTypes) Update(ctx context.Context, id string, change func(*grapnelv1.EventType) error) (*grapnelv1.EventType, error) {
	return update(func() (*grapnelv1.EventType, error) { return e.Get(ctx, id) }, change,
		func(wanted *grapnelv1.EventType) (*grapnelv1.EventType, error) {
			r, err := e.c.EventTypeService().UpdateEventType(ctx, &grapnelv1.UpdateEventTypeRequest{EventType: wanted, UpdateMask: everyField()})
			return r.GetEventType(), err
		})
}

// Delete removes one.
func (e EventTypes) Delete(ctx context.Context, id string) error {
	name, err := e.name(id)
	if err != nil {
		return err
	}
	_, err = e.c.EventTypeService().DeleteEventType(ctx, &grapnelv1.DeleteEventTypeRequest{Name: name})
	return err
}

// Sample returns a payload, JSON, that a version of a type's schema allows; version "" is the one for events without
// data_schema. ErrInvalidState says that none can be made, and why.
func (e EventTypes) Sample(ctx context.Context, id, version string) (string, error) {
	name, err := e.name(id)
	if err != nil {
		return "", err
	}
	r, err := e.c.EventTypeService().SampleEventType(ctx, &grapnelv1.SampleEventTypeRequest{Name: name, Version: version})
	return r.GetPayload(), err
}

func (e EventTypes) name(id string) (string, error) {
	return resourceName(e.namespace, "eventTypes", id)
}
