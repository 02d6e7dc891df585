package subscription

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/grapnel/grapnel/internal/header"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// maxEventHeaders is how many headers a subscription may make of an event, and how many it may let through.
const maxEventHeaders = 32

// HeaderPart is a piece of the value of a header that is made of each event: a literal, or what the event has there.
type HeaderPart struct {
	// Literal is sent as it is.
	Literal string
	// Field is empty of a literal, else a field of the event as conditions name it, data_schema or ordering_key. Attribute is
	// the name of an extension attribute where the field is attributes.
	Field, Attribute string
}

// placeholders are for people.
const placeholders = "{event.id}, {event.source}, {event.type}, {event.subject}, {event.time}, {event.data_content_type}, {event.data_schema}, " +
	"{event.ordering_key} and {event.attributes.NAME}"

// ParseHeaderTemplate reads a text in which {NAME} is a placeholder, at least one, and a literal brace is doubled.
func ParseHeaderTemplate(text string) ([]HeaderPart, error) {
	var parts []HeaderPart
	var plain strings.Builder
	flush := func() {
		if plain.Len() > 0 {
			parts = append(parts, HeaderPart{Literal: plain.String()})
			plain.Reset()
		}
	}
	found := false
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c != '{' && c != '}':
			plain.WriteByte(c)
		case i+1 < len(text) && text[i+1] == c:
			plain.WriteByte(c)
			i++
		case c == '}':
			return nil, fmt.Errorf("the } at character %d closes nothing; a literal brace is written twice: }}", i+1)
		default:
			end := strings.IndexByte(text[i:], '}')
			if end < 0 {
				return nil, fmt.Errorf("the { at character %d is never closed; a literal brace is written twice: {{", i+1)
			}
			part, err := parsePlaceholder(text[i+1 : i+end])
			if err != nil {
				return nil, fmt.Errorf("%w (at character %d)", err, i+1)
			}
			flush()
			parts, found = append(parts, part), true
			i += end
		}
	}
	flush()
	if !found {
		return nil, errors.New("holds no placeholder, such as {event.type}; what is the same for every event goes into headers")
	}
	return parts, nil
}

func parsePlaceholder(name string) (HeaderPart, error) {
	field, _ := strings.CutPrefix(name, "event.")
	switch name {
	case "event.id", "event.source", "event.type", "event.subject", "event.time", "event.data_content_type", "event.data_schema", "event.ordering_key":
		return HeaderPart{Field: field}, nil
	}
	attribute, ok := strings.CutPrefix(field, "attributes.")
	switch {
	case !ok || field == name:
		return HeaderPart{}, fmt.Errorf("{%.64s} is not a placeholder; there are %s", name, placeholders)
	case !isAttributeName(attribute):
		return HeaderPart{}, fmt.Errorf("{%.64s} cannot be: extension attributes are named with 1 to 20 lower-case letters and digits", name)
	case slices.Contains([]string{"id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "specversion", "data"}, attribute):
		return HeaderPart{}, fmt.Errorf("{%s} cannot be: that is no extension attribute, but CloudEvents' own; there are %s", name, placeholders)
	}
	return HeaderPart{Field: "attributes", Attribute: attribute}, nil
}

// isAttributeName reports whether s has the form of an extension attribute's name.
func isAttributeName(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return s != "" && len(s) <= 20
}

// eventHeaders checks the headers that depend on the event, beside the static ones.
func (c *checker) eventHeaders(made, allowed string, p *grapnelv1.Subscription) {
	if len(p.HeaderTemplates) > maxEventHeaders {
		c.add(made, "map.max_pairs", "has %d headers; want at most %d", len(p.HeaderTemplates), maxEventHeaders)
	}
	if len(p.AllowedEventHeaders) > maxEventHeaders {
		c.add(allowed, "repeated.max_items", "has %d names; want at most %d", len(p.AllowedEventHeaders), maxEventHeaders)
	}
	if p.Batching != nil {
		const why = "cannot be combined with batching: a request with several deliveries has no headers of one event; leave out one of the two"
		if len(p.HeaderTemplates) > 0 {
			c.add(made, "batching.headers", why)
		}
		if len(p.AllowedEventHeaders) > 0 {
			c.add(allowed, "batching.headers", why)
		}
	}
	seen := map[string]string{}
	for name := range p.Headers {
		seen[strings.ToLower(name)] = "headers"
	}
	for _, name := range sortedKeys(p.HeaderTemplates) {
		if at := fmt.Sprintf("%s[%q]", made, name); c.eventHeader(at, name, "header_templates", seen) {
			c.headerTemplate(at, p.HeaderTemplates[name])
		}
	}
	for i, name := range p.AllowedEventHeaders {
		c.eventHeader(fmt.Sprintf("%s[%d]", allowed, i), name, "allowed_event_headers", seen)
	}
}

// eventHeader checks a header's name, which must not be in another place too, or in this one twice.
func (c *checker) eventHeader(at, name, place string, seen map[string]string) bool {
	if fault := EventHeaderFault(name); fault != "" {
		c.add(at, "headers.name", "%s", fault)
		return false
	}
	lower := strings.ToLower(name)
	if other, ok := seen[lower]; ok {
		c.add(at, "headers.unique", "%q is in %s already; names do not depend on case, and one place says what a header is", name, other)
	}
	seen[lower] = place
	return true
}

func (c *checker) headerTemplate(at, text string) {
	if !c.headerValue(at, text) {
		return
	}
	if _, err := ParseHeaderTemplate(text); err != nil {
		c.add(at, "header_templates.syntax", "%v", err)
	}
}

// EventHeaderFault says why the header of this name may not depend on an event; empty when it may.
func EventHeaderFault(name string) string {
	switch why := reserved(name); {
	case !isToken(name) || len(name) > maxHeaderName:
		return fmt.Sprintf("%.128q is not a header name; want letters, digits and hyphens, such as X-Team", name)
	case why != "":
		return fmt.Sprintf("%q cannot be set here: %s", name, why)
	case header.Key(name) == "content-encoding":
		return fmt.Sprintf("%q cannot be set here: it says how to read the body, and payload_shape.compression sets it", name)
	}
	return ""
}
