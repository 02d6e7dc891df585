package subscription

import (
	"fmt"
	"mime"
	"slices"
	"strings"

	"github.com/grapnel/grapnel/internal/header"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// maxContentType is the longest media type, parameters included.
const maxContentType = 128

// shape checks what the body of a request is made of.
func (c *checker) shape(field string, p *grapnelv1.Subscription) {
	s := p.PayloadShape
	if _, known := grapnelv1.PayloadShape_Format_name[int32(s.Format)]; !known {
		c.add(field+".format", "enum.defined_only", "%d is not a format; want %s", s.Format, choices(grapnelv1.PayloadShape_Format_name))
	}
	if _, known := grapnelv1.PayloadShape_Compression_name[int32(s.Compression)]; !known {
		c.add(field+".compression", "enum.defined_only", "%d is not a compression; want %s", s.Compression, choices(grapnelv1.PayloadShape_Compression_name))
	}
	c.contentType(field+".content_type", s)
	for _, name := range sortedKeys(p.Headers) {
		if header.Key(name) == "content-encoding" && s.Compression == grapnelv1.PayloadShape_COMPRESSION_GZIP {
			c.add(fmt.Sprintf("subscription.headers[%q]", name), "headers.reserved", "%q cannot be set here: payload_shape.compression sets it", name)
		}
	}
}

// contentType checks the media type that is sent instead of the event's. It goes into a header.
func (c *checker) contentType(field string, s *grapnelv1.PayloadShape) {
	given := s.ContentType
	if given == "" {
		return
	}
	if s.Format != grapnelv1.PayloadShape_FORMAT_RAW {
		c.add(field, "content_type.format", "%q goes with FORMAT_RAW only: another format has a media type of its own", given)
		return
	}
	if code, fault := mediaTypeFault(given); fault != "" {
		c.add(field, code, "%s", fault)
	}
}

// mediaTypeFault says why a text is no media type to be sent, with a code; empty when it is one.
func mediaTypeFault(given string) (code, fault string) {
	if len(given) > maxContentType {
		return "string.max_len", fmt.Sprintf("has %d characters; want at most %d", len(given), maxContentType)
	}
	for i := range len(given) {
		if b := given[i]; b < ' ' || b >= 0x7f {
			return "content_type.characters", fmt.Sprintf("holds a line break, another control character or a character outside ASCII at position %d; want a media type, such as application/xml", i)
		}
	}
	kind, _, err := mime.ParseMediaType(given)
	major, minor, ok := strings.Cut(kind, "/")
	switch {
	case err != nil || !ok || !isToken(major) || !isToken(minor):
		return "content_type.syntax", fmt.Sprintf("%q is not a media type; want one such as application/xml or text/csv; charset=utf-8", given)
	case given != strings.TrimSpace(given):
		return "content_type.syntax", fmt.Sprintf("%q begins or ends with a blank, which is not kept on the way; leave it out", given)
	}
	return "", ""
}

// choices lists the values of an enum but the one that means nothing was chosen.
func choices(names map[int32]string) string {
	var out []string
	for number, name := range names {
		if number != 0 {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// shapeWarnings is Warnings for the payload's shape.
func shapeWarnings(p *grapnelv1.Subscription) []string {
	signed := slices.ContainsFunc(p.GetSigners(), func(s *grapnelv1.PluginBinding) bool { return s.GetPlugin() != noSigner })
	if p.GetPayloadShape().GetCompression() != grapnelv1.PayloadShape_COMPRESSION_GZIP || !signed {
		return nil
	}
	return []string{"payload_shape.compression is gzip and signatures cover the compressed bytes: " +
		"the receiver has to verify the body as it came, before it or its framework decompresses it"}
}
