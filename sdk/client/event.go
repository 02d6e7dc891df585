package client

import (
	"encoding/json"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Event is what happened. Only Type is required.
type Event struct {
	// ID is unique in the namespace and makes publishing idempotent: the same ID with the same content
	// is accepted once, with other content it is ErrEventIDConflict. Empty: a fresh UUIDv7.
	ID string
	// Source is a URI reference; empty means //grapnel/NAMESPACE.
	Source string
	// Type is for example order.created.
	Type string
	// Subject is what the event is about, for example an order's number.
	Subject string
	// Time is when it happened; zero means when it was accepted.
	Time time.Time
	// ContentType of Data; empty means application/json when Data is JSON, else application/octet-stream.
	ContentType string
	// DataSchema is the URI of Data's schema.
	DataSchema string
	// Attributes are CloudEvents extension attributes, with names of a to z and 0 to 9.
	Attributes map[string]string
	// Headers are carried by requests to subscriptions that allow them, in allowed_event_headers: at most 16, of 4 KiB in sum,
	// values of printable ASCII. Not for secrets.
	Headers map[string]string
	// Data is the body, sent byte for byte as it is here.
	Data []byte
	// DeliverTime delays the first attempt, 7 days at most; zero means at once.
	DeliverTime time.Time
	// OrderingKey is what events have in common that ordered subscriptions get one after another, in the order in which
	// they were accepted: up to 128 bytes. Empty: their order does not matter. Events with another key are other events,
	// whatever their IDs.
	OrderingKey string
	// TTL lowers for how long failed attempts are repeated; zero leaves it to the subscriptions.
	TTL time.Duration
}

// NewID returns a fresh event ID, a UUIDv7: sortable by the time it was made.
func NewID() string { return uuid.Must(uuid.NewV7()).String() }

// proto returns the event in wire form, with an ID.
func (e Event) proto() *grapnelv1.Event {
	p := &grapnelv1.Event{
		Id:              e.ID,
		Source:          e.Source,
		Type:            e.Type,
		Subject:         e.Subject,
		DataContentType: e.ContentType,
		DataSchema:      e.DataSchema,
		Attributes:      e.Attributes,
		Headers:         e.Headers,
		Payload:         &grapnelv1.Event_Data{Data: e.Data},
		OrderingKey:     e.OrderingKey,
	}
	if p.Id == "" {
		p.Id = NewID()
	}
	if p.DataContentType == "" && json.Valid(e.Data) {
		p.DataContentType = "application/json"
	}
	if !e.Time.IsZero() {
		p.Time = timestamppb.New(e.Time)
	}
	if !e.DeliverTime.IsZero() {
		p.DeliverTime = timestamppb.New(e.DeliverTime)
	}
	if e.TTL != 0 {
		p.Ttl = durationpb.New(e.TTL)
	}
	return p
}

// payloadSize is what the server's windows count.
func payloadSize(e *grapnelv1.Event) int {
	switch p := e.GetPayload().(type) {
	case *grapnelv1.Event_Data:
		return len(p.Data)
	case *grapnelv1.Event_Text:
		return len(p.Text)
	case *grapnelv1.Event_Json:
		// Never smaller than the compact text by more than a few bytes per value.
		return 2 * protoSize(p.Json)
	}
	return 0
}
