package subscription

import (
	"fmt"
	"slices"
	"strings"

	"github.com/grapnel/grapnel/internal/header"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// transformer checks who makes the body, and that nothing else does.
func (c *checker) transformer(field string, p *grapnelv1.Subscription, ns string) {
	b := p.Transformer
	if b == nil {
		return
	}
	if b.Plugin == "" {
		c.add(field+".plugin", "transformer.required", "is empty; want the name of a transformer, plugins/NAME, such as plugins/jq")
	}
	c.binding(field, b, ns)
	s := p.PayloadShape
	if s.Format != grapnelv1.PayloadShape_FORMAT_RAW {
		c.add("subscription.payload_shape.format", "transformer.format", "%v is one form of the body, and the transformer makes another; leave out one of the two", s.Format)
	}
	if s.ContentType != "" && s.Format == grapnelv1.PayloadShape_FORMAT_RAW {
		c.add("subscription.payload_shape.content_type", "transformer.content_type", "%q is the media type of the payload, and the transformer says that of its own; leave it out", s.ContentType)
	}
	if p.Batching != nil {
		c.add("subscription.batching", "transformer.batching", "requests with several deliveries have a form of their own, and the transformer makes the body of one; leave out one of the two")
	}
}

const (
	// maxMadeHeaders and maxMadeHeaderBytes bound the headers that a transformer adds.
	maxMadeHeaders     = 32
	maxMadeHeaderBytes = 8 << 10
)

// MadeFault says why what a transformer has made cannot be sent beside its body, whose size is no matter of this: its media
// type and the headers, by name and value, that it adds; empty when it can. signed are headers that signers set.
func MadeFault(contentType string, headers [][2]string, signed []string) string {
	if _, fault := mediaTypeFault(contentType); fault != "" {
		return "the content type " + fault
	}
	if len(headers) > maxMadeHeaders {
		return fmt.Sprintf("it adds %d headers; want at most %d", len(headers), maxMadeHeaders)
	}
	size := 0
	var seen []string
	for _, h := range headers {
		lower := strings.ToLower(h[0])
		size += len(h[0]) + len(h[1])
		switch why := reserved(lower); {
		case !isToken(h[0]) || len(h[0]) > maxHeaderName:
			return fmt.Sprintf("%.128q is not a header name; want letters, digits and hyphens, such as X-Team", h[0])
		case why != "":
			return fmt.Sprintf("it may not set the header %s: %s", lower, why)
		case header.Key(lower) == "content-encoding":
			return fmt.Sprintf("it may not set the header %s: payload_shape.compression does", lower)
		case slices.ContainsFunc(signed, func(name string) bool { return header.Key(name) == header.Key(lower) }):
			return fmt.Sprintf("it may not set the header %s: a signer does", lower)
		case slices.Contains(seen, lower):
			return fmt.Sprintf("it sets the header %s twice", lower)
		case !isFieldValue(h[1]) || h[1] != strings.TrimSpace(h[1]):
			return fmt.Sprintf("the value of the header %s holds a control character, or a blank at an end", lower)
		}
		seen = append(seen, lower)
	}
	if size > maxMadeHeaderBytes {
		return fmt.Sprintf("its headers have %d bytes; want at most %d", size, maxMadeHeaderBytes)
	}
	return ""
}
