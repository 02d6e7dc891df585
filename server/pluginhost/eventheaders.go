package pluginhost

import (
	"fmt"
	"slices"
	"strings"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/subscription"
)

// maxEventHeaderBytes bounds the headers that are made of one event, names and values, in bytes.
const maxEventHeaderBytes = 8 << 10

// eventHeaders are the headers of a subscription's requests that depend on the event: those that are made of its attributes,
// and those that it may bring. Immutable.
type eventHeaders struct {
	made    []madeHeader
	allowed []string // lower case, sorted
}

type madeHeader struct {
	name  string // lower case
	parts []subscription.HeaderPart
}

// eventHeadersOf is what a subscription asks for; nil when that is nothing.
func eventHeadersOf(sub *grapnelv1.Subscription) *eventHeaders {
	if len(sub.GetHeaderTemplates()) == 0 && len(sub.GetAllowedEventHeaders()) == 0 || sub.GetBatching() != nil {
		return nil
	}
	h := &eventHeaders{}
	for name, text := range sub.GetHeaderTemplates() {
		if parts, err := subscription.ParseHeaderTemplate(text); err == nil { // as all that are stored
			h.made = append(h.made, madeHeader{strings.ToLower(name), parts})
		}
	}
	slices.SortFunc(h.made, func(a, b madeHeader) int { return strings.Compare(a.name, b.name) })
	for _, name := range sub.GetAllowedEventHeaders() {
		h.allowed = append(h.allowed, strings.ToLower(name))
	}
	slices.Sort(h.allowed)
	return h
}

// names are those of all headers that requests may have of an event, lower case; none of a nil eventHeaders.
func (h *eventHeaders) names() []string {
	if h == nil {
		return nil
	}
	all := slices.Clone(h.allowed)
	for _, m := range h.made {
		all = append(all, m.name)
	}
	return all
}

// of are the headers of one event, but for those that its transformer has set; transformed may be nil. The error says that
// they are too large.
func (h *eventHeaders) of(ev *delivery.Event, transformed *delivery.Made) ([]delivery.Header, error) {
	var out []delivery.Header
	left := maxEventHeaderBytes
	add := func(name, value string) bool {
		left -= len(name) + len(value)
		out = append(out, delivery.Header{Name: name, Value: value})
		return left >= 0
	}
	set := func(name string) bool {
		return transformed != nil && slices.ContainsFunc(transformed.Headers, func(h delivery.Header) bool { return h.Name == name })
	}
	for _, m := range h.made {
		if set(m.name) {
			continue
		}
		if value, ok := m.value(ev, left); ok && !add(m.name, value) {
			return nil, errEventHeaders()
		}
	}
	if len(ev.Headers) == 0 {
		return out, nil
	}
	for _, name := range h.allowed {
		if value, brought := ev.Headers[name]; brought && !set(name) && !add(name, value) {
			return nil, errEventHeaders()
		}
	}
	return out, nil
}

func errEventHeaders() error {
	return fmt.Errorf("header_templates and allowed_event_headers make more than %d bytes of headers of the event: publish fewer or shorter attributes and headers", maxEventHeaderBytes)
}

// value is false for an event that has nothing for a placeholder. It is cut off where it is longer than most anyway.
func (m *madeHeader) value(ev *delivery.Event, most int) (string, bool) {
	if len(m.parts) == 1 {
		value := field(ev, &m.parts[0])
		return wire.HeaderText(value), value != ""
	}
	var b strings.Builder
	for i := range m.parts {
		p := &m.parts[i]
		if p.Field == "" {
			b.WriteString(p.Literal)
			continue
		}
		value := field(ev, p)
		if value == "" {
			return "", false
		}
		if b.Len() <= most {
			b.WriteString(wire.HeaderText(value))
		}
	}
	return b.String(), true
}

func field(ev *delivery.Event, p *subscription.HeaderPart) string {
	switch p.Field {
	case "id":
		return ev.ID
	case "source":
		return ev.Source
	case "type":
		return ev.Type
	case "subject":
		return ev.Subject
	case "time":
		if !ev.Time.IsZero() {
			return ev.Time.UTC().Format(time.RFC3339Nano)
		}
	case "data_content_type":
		return ev.ContentType
	case "data_schema":
		return ev.Schema
	case "ordering_key":
		return ev.OrderingKey
	case "attributes":
		return ev.Attributes[p.Attribute]
	}
	return ""
}
