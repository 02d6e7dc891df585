package wire

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"maps"
	"mime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
	"weak"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

// Shape is what a subscription makes of an event's payload. The zero Shape is the payload as it is.
type Shape struct {
	format      grapnelv1.PayloadShape_Format // 0 for raw
	gzip        bool
	contentType string
	// batch is the form of several events; 0 for one.
	batch grapnelv1.Batching_Format
	// made is what a transformer has made.
	made bool
	// empty has neither body nor headers.
	empty bool
}

// Empty is the shape of an ownership check, which carries no event.
func Empty() Shape { return Shape{empty: true} }

// ShapeOf is what a subscription asks for.
func ShapeOf(sub *grapnelv1.Subscription) Shape {
	ps := sub.GetPayloadShape()
	s := Shape{gzip: ps.GetCompression() == grapnelv1.PayloadShape_COMPRESSION_GZIP}
	if b := sub.GetBatching(); b != nil {
		s.batch = cmp.Or(b.GetFormat(), grapnelv1.Batching_FORMAT_JSON_ARRAY)
		return s
	}
	if s.made = sub.GetTransformer() != nil; s.made {
		return s
	}
	switch ps.GetFormat() {
	case grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS, grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS:
		s.format = ps.GetFormat()
	default:
		s.contentType = ps.GetContentType()
	}
	return s
}

// Batched reports whether the shape is that of several events.
func (s Shape) Batched() bool { return s.batch != 0 }

// Made reports whether the shape is that of what a transformer has made.
func (s Shape) Made() bool { return s.made }

// Shaped is an event in a shape; it does not change. A nil one stands for the payload as it is.
type Shaped struct {
	event *delivery.Event
	shape Shape
	body  []byte
	plain int // size of the body of several before it was compressed
	made  *delivery.Made
}

// Content is an event as it travels: once for all attempts of a batch that share it.
type Content struct {
	event  *delivery.Event
	shaped *Shaped
}

// ContentOf is an event as it is, or in a shape when shaped is not nil.
func ContentOf(ev *delivery.Event, shaped *Shaped) Content { return Content{ev, shaped} }

func (c Content) equal(to Content) bool {
	return c.event == to.event && (c.shaped == to.shaped || c.shaped != nil && to.shaped != nil && !c.shaped.shape.made && c.shaped.shape == to.shaped.shape)
}

// Body is what is sent.
func (c Content) Body() []byte {
	if c.shaped != nil {
		return c.shaped.body
	}
	return c.event.Payload
}

// Plain is the size of what is sent of several events when it is decompressed.
func (c Content) Plain() int { return c.shaped.plain }

// headers are those of every request that carries the event, in the order they are sent.
func (c Content) headers(yield func(name, value string) bool) {
	if c.shaped == nil {
		baseHeaders(c.event, c.event.ContentType, "", true, yield)
		return
	}
	s := c.shaped.shape
	encoding := ""
	if s.gzip {
		encoding = "gzip"
	}
	switch {
	case s.empty:
	case s.made:
		baseHeaders(c.event, c.shaped.made.ContentType, encoding, true, yield)
		for _, h := range c.shaped.made.Headers {
			if !yield(h.Name, h.Value) {
				return
			}
		}
	case s.batch != 0:
		baseHeaders(c.event, mediaOf(s.batch), encoding, false, yield)
	case s.format == grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS:
		baseHeaders(c.event, "application/cloudevents+json", encoding, false, yield)
	case s.format == grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS:
		baseHeaders(c.event, "application/json", encoding, true, yield)
	default:
		baseHeaders(c.event, cmp.Or(s.contentType, c.event.ContentType), encoding, true, yield)
	}
}

func baseHeaders(ev *delivery.Event, contentType, encoding string, attributes bool, yield func(name, value string) bool) {
	contentType = strings.TrimRight(contentType, " ") // else it would arrive otherwise than it is signed
	ok := (contentType == "" || yield("content-type", contentType)) &&
		(encoding == "" || yield("content-encoding", encoding)) &&
		yield("webhook-id", ev.UID)
	if ok && attributes {
		attributeHeaders(ev, yield)
	}
}

// attributeHeaders are the event's attributes in CloudEvents binary mode.
func attributeHeaders(ev *delivery.Event, yield func(name, value string) bool) {
	ok := yield("ce-specversion", "1.0") &&
		yield("ce-id", HeaderText(ev.ID)) &&
		yield("ce-source", HeaderText(ev.Source)) &&
		yield("ce-type", HeaderText(ev.Type)) &&
		(ev.Time.IsZero() || yield("ce-time", ev.Time.UTC().Format(time.RFC3339Nano))) &&
		(ev.Subject == "" || yield("ce-subject", HeaderText(ev.Subject))) &&
		(ev.Schema == "" || yield("ce-dataschema", HeaderText(ev.Schema)))
	if !ok || len(ev.Attributes) == 0 {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(ev.Attributes)) {
		if name == "traceparent" || name == "tracestate" && givenState(ev) != "" { // they go by their own names
			continue
		}
		if !yield("ce-"+name, HeaderText(ev.Attributes[name])) {
			return
		}
	}
}

// HeaderText is CloudEvents' percent-encoding of header values: space, double quote, percent, and all that
// is not printable ASCII.
func HeaderText(s string) string {
	const hex = "0123456789ABCDEF"
	plain := func(c byte) bool { return c > ' ' && c < 0x7f && c != '"' && c != '%' }
	i := 0
	for i < len(s) && plain(s[i]) {
		i++
	}
	if i == len(s) {
		return s
	}
	var out strings.Builder
	for i := range len(s) {
		if c := s[i]; plain(c) {
			out.WriteByte(c)
		} else {
			out.Write([]byte{'%', hex[c>>4], hex[c&15]})
		}
	}
	return out.String()
}

const shapeSlots = 64

// Shapes makes bodies; it is safe for concurrent use. Those of one event and shape that are wanted at about the same time, as in a fan-out,
// are made once; nothing is kept beyond the attempts that carry it, since the same bytes can be made again
// at any time.
type Shapes struct {
	made    [shapeSlots]atomic.Pointer[weak.Pointer[Shaped]]
	writers sync.Pool // of *gzip.Writer
}

// Get returns the event in the shape; nil for the zero Shape.
func (s *Shapes) Get(ev *delivery.Event, want Shape) *Shaped {
	if want == (Shape{}) {
		return nil
	}
	slot := &s.made[(ev.Seq*31+uint64(want.format)*7+uint64(len(want.contentType)))%shapeSlots]
	if w := slot.Load(); w != nil {
		if have := w.Value(); have != nil && have.event == ev && have.shape == want {
			return have
		}
	}
	made := &Shaped{event: ev, shape: want, body: s.body(ev, want)}
	w := weak.Make(made)
	slot.Store(&w)
	return made
}

// Made is an event as a transformer has made it.
func (s *Shapes) Made(ev *delivery.Event, made *delivery.Made, want Shape) Content {
	shaped := &Shaped{event: ev, shape: want, body: made.Body, made: made}
	if want.gzip {
		shaped.body = s.compress(made.Body)
	}
	return Content{ev, shaped}
}

func (s *Shapes) body(ev *delivery.Event, want Shape) []byte {
	body := ev.Payload
	switch want.format {
	case grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS:
		body = standardBody(ev)
	case grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS:
		body = cloudEvent(ev)
	}
	if want.gzip {
		body = s.compress(body)
	}
	return body
}

// gzipLevel is fixed, and the header carries no time, so that the same body gives the same bytes.
const gzipLevel = 6

func (s *Shapes) compress(body []byte) []byte {
	out := bytes.NewBuffer(make([]byte, 0, len(body)/2+64))
	w, ok := s.writers.Get().(*gzip.Writer)
	if ok {
		w.Reset(out)
	} else {
		w, _ = gzip.NewWriterLevel(out, gzipLevel) // the level is a valid one
	}
	_, _ = w.Write(body) // a bytes.Buffer takes all
	_ = w.Close()
	s.writers.Put(w)
	return out.Bytes()
}

// standardBody is the envelope that Standard Webhooks advises: {"type", "timestamp", "data"}.
func standardBody(ev *delivery.Event) []byte {
	b := make([]byte, 0, len(ev.Payload)*4/3+128)
	b = appendType(append(b, '{'), ev)
	return appendData(b, ev)
}

func appendType(b []byte, ev *delivery.Event) []byte {
	at := ev.Time
	if at.IsZero() {
		at = ev.AcceptTime
	}
	b = appendMember(b, "type", ev.Type)
	return appendMember(b, "timestamp", at.UTC().Format(time.RFC3339Nano))
}

// appendData writes the last member of an object.
func appendData(b []byte, ev *delivery.Event) []byte {
	if isJSON(ev) {
		return append(append(append(b, `"data":`...), ev.Payload...), '}')
	}
	if ev.ContentType != "" {
		b = appendMember(b, "datacontenttype", ev.ContentType)
	}
	return appendBase64(b, ev.Payload)
}

// cloudEvent is the event in the JSON format of CloudEvents 1.0, structured mode. Its traceparent attribute
// is among the extensions: in this mode the event carries it itself.
func cloudEvent(ev *delivery.Event) []byte {
	b := make([]byte, 0, len(ev.Payload)*4/3+512)
	return appendCloudEvent(b, ev, ev.Attributes)
}

func appendCloudEvent(b []byte, ev *delivery.Event, extensions map[string]string) []byte {
	b = appendMember(append(b, '{'), "specversion", "1.0")
	b = appendMember(b, "id", ev.ID)
	b = appendMember(b, "source", ev.Source)
	b = appendMember(b, "type", ev.Type)
	if !ev.Time.IsZero() {
		b = appendMember(b, "time", ev.Time.UTC().Format(time.RFC3339Nano))
	}
	for _, m := range [...][2]string{{"subject", ev.Subject}, {"dataschema", ev.Schema}, {"datacontenttype", ev.ContentType}} {
		if m[1] != "" {
			b = appendMember(b, m[0], m[1])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(extensions)) {
		b = appendMember(b, name, extensions[name])
	}
	switch {
	case len(ev.Payload) == 0:
		b[len(b)-1] = '}' // instead of the comma: an event without data
		return b
	case isJSON(ev):
		return append(append(append(b, `"data":`...), ev.Payload...), '}')
	}
	return appendBase64(b, ev.Payload)
}

// isJSON reports whether the payload can stand in JSON as it is. Its media type must say so as well: 12 as
// text/plain is text. Without a media type JSON is what CloudEvents assumes.
func isJSON(ev *delivery.Event) bool {
	if ev.ContentType != "" {
		media, _, err := mime.ParseMediaType(ev.ContentType)
		if err != nil || media != "application/json" && media != "text/json" && !strings.HasSuffix(media, "+json") {
			return false
		}
	}
	return json.Valid(ev.Payload) && utf8.Valid(ev.Payload) // the former lets any bytes stand in strings
}

func appendBase64(b, payload []byte) []byte {
	b = append(b, `"data_base64":"`...)
	return append(base64.StdEncoding.AppendEncode(b, payload), `"}`...)
}

// appendMember writes a member with a text value, and the comma behind it.
func appendMember(b []byte, name, value string) []byte {
	b = append(appendJSON(b, name), ':')
	return append(appendJSON(b, value), ',')
}

// appendJSON writes a JSON string. Only what must be escaped is: the bytes are part of what is signed, so
// they may not depend on a library's taste.
func appendJSON(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	for _, r := range s { // what is not UTF-8 comes as U+FFFD
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r < ' ':
			b = append(b, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		default:
			b = utf8.AppendRune(b, r)
		}
	}
	return append(b, '"')
}
