package wire

import (
	"maps"
	"slices"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

const (
	// MaxTogether is the largest body of several events that is sent, before it is compressed.
	MaxTogether = 1 << 20
	// MaxAnswer is how many bytes are read of the answer to several events, which may name those that were not taken.
	MaxAnswer = 64 << 10
	// FailedIDs is the header in which an answer may name them.
	FailedIDs = "webhook-failed-ids"
	// uidAttribute is the extension of a CloudEvent in a batch that holds its webhook-id.
	uidAttribute = "webhookid"
)

func mediaOf(f grapnelv1.Batching_Format) string {
	switch f {
	case grapnelv1.Batching_FORMAT_NDJSON:
		return "application/x-ndjson"
	case grapnelv1.Batching_FORMAT_CLOUDEVENTS:
		return "application/cloudevents-batch+json"
	}
	return "application/json"
}

// Together is several events as one content, in a shape that is Batched. The same events in the same order give the same.
func (s *Shapes) Together(events []*delivery.Event, want Shape) Content {
	size := 64
	for _, ev := range events {
		size += len(ev.Payload)*4/3 + 512
	}
	body := make([]byte, 0, size)
	if want.batch == grapnelv1.Batching_FORMAT_NDJSON {
		for _, ev := range events {
			from := len(body)
			body = appendEvent(body, ev)
			oneLine(body[from:])
			body = append(body, '\n')
		}
	} else {
		body = append(body, '[')
		for i, ev := range events {
			if i > 0 {
				body = append(body, ',')
			}
			if want.batch == grapnelv1.Batching_FORMAT_CLOUDEVENTS {
				body = appendCloudEvent(body, ev, withUID(ev))
			} else {
				body = appendEvent(body, ev)
			}
		}
		body = append(body, ']')
	}
	plain := len(body)
	if want.gzip {
		body = s.compress(body)
	}
	whole := &delivery.Event{UID: delivery.BatchUID(events), Type: events[0].Type}
	if slices.ContainsFunc(events, func(ev *delivery.Event) bool { return ev.Type != whole.Type }) {
		whole.Type = ""
	}
	return Content{whole, &Shaped{event: whole, shape: want, body: body, plain: plain}}
}

// ID is the webhook-id.
func (c Content) ID() string { return c.event.UID }

// withUID are an event's extensions with its webhook-id.
func withUID(ev *delivery.Event) map[string]string {
	extensions := make(map[string]string, len(ev.Attributes)+1)
	maps.Copy(extensions, ev.Attributes)
	extensions[uidAttribute] = ev.UID
	return extensions
}

// oneLine turns the line breaks of JSON into blanks: in texts there are none.
func oneLine(b []byte) {
	for i, c := range b {
		if c == '\n' || c == '\r' {
			b[i] = ' '
		}
	}
}

// appendEvent writes an event as a batch in JSON has it: the envelope of Standard Webhooks with the webhook-id, and with the
// attributes that headers have of an event that travels by itself.
func appendEvent(b []byte, ev *delivery.Event) []byte {
	b = appendMember(append(b, '{'), "id", ev.UID)
	b = appendType(b, ev)
	b = append(b, `"attributes":{`...)
	b = appendMember(b, "id", ev.ID)
	b = appendMember(b, "source", ev.Source)
	if !ev.Time.IsZero() {
		b = appendMember(b, "time", ev.Time.UTC().Format(time.RFC3339Nano))
	}
	for _, m := range [...][2]string{{"subject", ev.Subject}, {"dataschema", ev.Schema}} {
		if m[1] != "" {
			b = appendMember(b, m[0], m[1])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(ev.Attributes)) {
		b = appendMember(b, name, ev.Attributes[name])
	}
	b[len(b)-1] = '}'
	return appendData(append(b, ','), ev)
}
