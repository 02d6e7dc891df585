package api

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// Bounds of an event, as in its proto.
const (
	maxEventID        = 128
	maxEventType      = 128
	maxEventText      = 256
	maxContentType    = 128
	maxAttributes     = 32
	maxAttributeName  = 20
	maxAttributeValue = 256
	maxOrderingKey    = 128 // bytes
	maxHeaders        = 16
	maxHeaderBytes    = 4 << 10
	// maxHeaderBlock bounds what the attributes of CloudEvents, and headers, take together as HTTP headers. Servers refuse requests
	// with too much of that, the strictest of those in wide use from 16 KiB on, of which some is for other headers.
	maxHeaderBlock  = 12 << 10
	maxDeliverAhead = 7 * 24 * time.Hour
	minTTL          = time.Second
	maxTTL          = 30 * 24 * time.Hour
)

// eventOf checks an event as a publisher sent it and makes it the domain's, defaults filled in. The paths
// of the faults are those inside Event. The payload's bytes are shared with e, which must not change any
// more.
//
// These are the rules of the proto, written out: publishing is the one path on which reflection over the
// rules would show.
func eventOf(ns string, e *grapnelv1.Event, now time.Time) (*delivery.Event, []Violation) {
	if e == nil {
		return nil, []Violation{{"", "is required", "required"}}
	}
	var c checks
	c.unknown(e)
	c.attributesOf(e)
	headers := c.headersOf(e)
	ev := &delivery.Event{
		ID:          e.GetId(),
		Source:      e.GetSource(),
		Type:        e.GetType(),
		Subject:     e.GetSubject(),
		Time:        now,
		ContentType: e.GetDataContentType(),
		Schema:      e.GetDataSchema(),
		Attributes:  e.GetAttributes(),
		OrderingKey: e.GetOrderingKey(),
		Headers:     headers,
	}
	c.times(e, ev, now)
	standard := c.payload(e, ev)
	if len(c.faults) > 0 {
		return nil, c.faults
	}
	if ev.ID != "" {
		ev.ContentHash = contentHash(e, ev.Payload)
	}
	if ev.Source == "" {
		ev.Source = "//grapnel/" + ns
	}
	if ev.ContentType == "" {
		ev.ContentType = standard
	}
	return ev, nil
}

// publishedOf is eventOf for an event that is to be stored: the types of operational events, their source, and the
// attributes of dead letters are the server's.
func publishedOf(ns string, e *grapnelv1.Event, now time.Time) (*delivery.Event, []Violation) {
	ev, faults := eventOf(ns, e, now)
	if t := e.GetType(); subscription.Operational(t) {
		faults = append(faults, Violation{"type", "must not begin with " + subscription.OperationalPrefix +
			", as " + quote(t) + " does: those are the types of operational events, which the server makes itself; choose another beginning", "event_type_reserved"})
	}
	if source := e.GetSource(); strings.HasPrefix(source, subscription.OperationalSource) {
		faults = append(faults, Violation{"source", "must not begin with " + subscription.OperationalSource +
			", as " + quote(source) + " does: that is the source of operational events, which the server makes itself; leave it empty for //grapnel/" +
			ns + ", or choose another beginning", "event_source_reserved"})
	}
	if len(e.GetAttributes()) > 0 {
		faults = append(faults, reservedAttributes(e.GetAttributes())...)
	}
	return ev, faults
}

// reservedAttributes are those that say of what a dead letter is one. Nobody else's events have them.
func reservedAttributes(attributes map[string]string) (faults []Violation) {
	for name := range attributes {
		if strings.HasPrefix(name, delivery.LetterPrefix) {
			faults = append(faults, Violation{"attributes[" + quote(name) + "]", "must not begin with " + delivery.LetterPrefix +
				": those are the attributes of dead letters, which the server sets itself; choose another name", "attribute_reserved"})
		}
	}
	slices.SortFunc(faults, func(a, b Violation) int { return strings.Compare(a.Field, b.Field) })
	return faults
}

// under puts the field that holds the event before the paths of its faults.
func under(field string, faults []Violation) []Violation {
	for i := range faults {
		if faults[i].Field == "" {
			faults[i].Field = field
		} else {
			faults[i].Field = field + "." + faults[i].Field
		}
	}
	return faults
}

// checks collects faults.
type checks struct {
	faults []Violation
}

func (c *checks) fault(field, rule, description string) {
	c.faults = append(c.faults, Violation{field, description, rule})
}

// unknown refuses fields that this server does not know: what they ask for would not happen.
func (c *checks) unknown(e *grapnelv1.Event) {
	for _, m := range [...]protoreflect.Message{
		e.ProtoReflect(), e.GetTime().ProtoReflect(), e.GetDeliverTime().ProtoReflect(), e.GetTtl().ProtoReflect(),
	} {
		if m.IsValid() && len(m.GetUnknown()) > 0 {
			c.fault("", "unknown_field", unknownField(m))
		}
	}
	if json := e.GetJson(); json != nil {
		form := form{}
		form.look("json", json.ProtoReflect())
		c.faults = append(c.faults, form.faults...)
	}
}

// attributesOf checks the CloudEvents attributes.
func (c *checks) attributesOf(e *grapnelv1.Event) {
	if id := e.GetId(); id != "" && !isEventID(id) {
		c.fault("id", "event_id", "must be up to 128 characters without control characters")
	}
	switch t := e.GetType(); {
	case t == "":
		c.fault("type", "event_type", "is required, for example order.created")
	case !isEventType(t):
		c.fault("type", "event_type", "must be 1 to 128 characters without control characters")
	}
	c.text("source", e.GetSource(), false)
	c.text("subject", e.GetSubject(), true)
	c.text("data_schema", e.GetDataSchema(), false)
	if n := len(e.GetOrderingKey()); n > maxOrderingKey {
		c.fault("ordering_key", "string.max_bytes", "takes "+strconv.Itoa(n)+" bytes; at most "+strconv.Itoa(maxOrderingKey)+" are allowed")
	}
	if t := e.GetDataContentType(); t != "" && !isMediaType(t) {
		c.fault("data_content_type", "media_type", "must be a media type such as application/json, up to 128 characters")
	}
	attributes := e.GetAttributes()
	if n := headerBlock(e); n > maxHeaderBlock {
		c.fault("attributes", "header_block", "take "+strconv.Itoa(n)+" bytes as HTTP headers, with id, source, type, subject, data_schema and headers; at most "+
			strconv.Itoa(maxHeaderBlock)+" are allowed, and what is not ASCII takes three for each byte")
	}
	if len(attributes) > maxAttributes {
		c.fault("attributes", "map.max_pairs", "has "+strconv.Itoa(len(attributes))+" entries; at most "+strconv.Itoa(maxAttributes)+" are allowed")
		return
	}
	if len(attributes) == 0 {
		return
	}
	for name, value := range attributes {
		if !isAttributeName(name) || !isText(value, maxAttributeValue, true) {
			c.badAttributes(attributes)
			return
		}
	}
}

// headerBlock is what the attributes of an event take as headers, each as "ce-name: value".
func headerBlock(e *grapnelv1.Event) int {
	const around = len("ce-: \r\n")
	n := headerBytes(e.GetId()) + headerBytes(e.GetSource()) + headerBytes(e.GetType()) + headerBytes(e.GetSubject()) + headerBytes(e.GetDataSchema())
	for name, value := range e.GetAttributes() {
		n += around + len(name) + headerBytes(value)
	}
	for name, value := range e.GetHeaders() {
		n += len(": \r\n") + len(name) + len(value)
	}
	return n
}

// headersOf are the event's headers, names in lower case, checked.
func (c *checks) headersOf(e *grapnelv1.Event) map[string]string {
	given := e.GetHeaders()
	if len(given) == 0 {
		return nil
	}
	if len(given) > maxHeaders {
		c.fault("headers", "map.max_pairs", "has "+strconv.Itoa(len(given))+" entries; at most "+strconv.Itoa(maxHeaders)+" are allowed")
		return nil
	}
	size := 0
	headers := make(map[string]string, len(given))
	for _, name := range slices.Sorted(maps.Keys(given)) {
		field, lower, value := "headers["+quote(name)+"]", strings.ToLower(name), given[name]
		size += len(name) + len(value)
		fault := subscription.EventHeaderFault(name)
		switch _, twice := headers[lower]; {
		case fault != "":
			c.fault(field, "header_name", fault)
		case twice:
			c.fault(field, "header_name", "is there twice; names do not depend on case")
		case !isHeaderValue(value):
			c.fault(field, "header_value", "must be printable ASCII without a blank at either end; what is not, and line breaks, cannot travel in a header")
		}
		headers[lower] = value
	}
	if size > maxHeaderBytes {
		c.fault("headers", "header_block", "take "+strconv.Itoa(size)+" bytes, names and values; at most "+strconv.Itoa(maxHeaderBytes)+" are allowed")
	}
	return headers
}

func isHeaderValue(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return s == strings.TrimSpace(s)
}

// headerBytes is how long s is in a header: what is not printable ASCII, blanks, quotes and percent signs take three.
func headerBytes(s string) int {
	n := len(s)
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '"' || c == '%' {
			n += 2
		}
	}
	return n
}

// badAttributes tells the faults of attributes in the order of their names.
func (c *checks) badAttributes(attributes map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(attributes)) {
		field := "attributes[" + quote(name) + "]"
		switch {
		case isReserved(name):
			c.fault(field, "attribute_name", "is a name of CloudEvents itself; use the field of the event")
		case !isAttributeName(name):
			c.fault(field, "attribute_name", "must be named with 1 to 20 lower-case letters and digits")
		}
		if !isText(attributes[name], maxAttributeValue, true) {
			c.fault(field, "text", "must be at most 256 printable characters")
		}
	}
}

func (c *checks) text(field, s string, spaces bool) {
	if isText(s, maxEventText, spaces) {
		return
	}
	if spaces {
		c.fault(field, "text", "must be at most 256 printable characters")
		return
	}
	c.fault(field, "text", "must be at most 256 printable characters without spaces")
}

// times reads time, deliver_time and ttl.
func (c *checks) times(e *grapnelv1.Event, ev *delivery.Event, now time.Time) {
	if t := e.GetTime(); t != nil {
		if t.CheckValid() != nil {
			c.fault("time", "timestamp", "is not a time between the years 1 and 9999")
		}
		ev.Time = t.AsTime()
	}
	if t := e.GetDeliverTime(); t != nil {
		switch at := t.AsTime(); {
		case t.CheckValid() != nil:
			c.fault("deliver_time", "timestamp", "is not a time between the years 1 and 9999")
		case at.After(now.Add(maxDeliverAhead)):
			c.fault("deliver_time", "deliver_time", "must be at most 7 days ahead")
		case at.After(now):
			ev.DeliverTime = at
		}
	}
	if d := e.GetTtl(); d != nil {
		ev.TTL = d.AsDuration()
		if d.CheckValid() != nil || ev.TTL < minTTL || ev.TTL > maxTTL {
			c.fault("ttl", "duration.gte_lte", "must be between 1s and 30 days (2592000s)")
		}
	}
}

// payload takes the bytes that will be sent and returns their standard content type.
func (c *checks) payload(e *grapnelv1.Event, ev *delivery.Event) string {
	switch p := e.GetPayload().(type) {
	case *grapnelv1.Event_Data:
		ev.Payload = p.Data
	case *grapnelv1.Event_Text:
		ev.Payload = []byte(p.Text)
	case *grapnelv1.Event_Json:
		b, err := compactJSON(p.Json.AsInterface())
		if err != nil || !isJSON(p.Json) {
			c.fault("json", "json", "cannot be written as JSON: numbers must be finite and every value set")
		}
		ev.Payload = b
		return "application/json"
	}
	if e.GetDataContentType() == "" && isJSONText(ev.Payload) {
		return "application/json"
	}
	return "application/octet-stream"
}

// isJSONText reports whether b is one JSON text in UTF-8, as RFC 8259 has it.
func isJSONText(b []byte) bool {
	for _, c := range b {
		switch {
		case c == ' ', c == '\t', c == '\n', c == '\r':
			continue
		case c == '{', c == '[', c == '"', c == '-', c >= '0' && c <= '9', c == 't', c == 'f', c == 'n':
			return json.Valid(b) && utf8.Valid(b)
		}
		return false
	}
	return false
}

// isJSON reports whether v is something that JSON has: AsInterface would make texts of numbers that are not
// finite, and nulls of values that are not set.
func isJSON(v *structpb.Value) bool {
	switch k := v.GetKind().(type) {
	case nil:
		return false
	case *structpb.Value_NumberValue:
		return !math.IsNaN(k.NumberValue) && !math.IsInf(k.NumberValue, 0)
	case *structpb.Value_ListValue:
		for _, e := range k.ListValue.GetValues() {
			if !isJSON(e) {
				return false
			}
		}
	case *structpb.Value_StructValue:
		for _, e := range k.StructValue.GetFields() {
			if !isJSON(e) {
				return false
			}
		}
	}
	return true
}

// compactJSON writes v without white space, keys in order, and no more escapes than JSON needs.
func compactJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// contentHash is over all that the publisher sent except the id, before defaults, so that the same call
// sent again has the same hash at any time. It is kept on disk for the deduplication window: a change of
// it makes conflicts out of repeats sent across an upgrade.
func contentHash(e *grapnelv1.Event, payload []byte) [16]byte {
	b := make([]byte, 0, 512)
	form := byte(1)
	if len(e.GetHeaders()) > 0 {
		form = 2
	}
	b = append(b, form)
	for _, s := range [...]string{e.GetSource(), e.GetType(), e.GetSubject(), e.GetDataContentType(), e.GetDataSchema()} {
		b = appendString(b, s)
	}
	b = appendStamp(b, e.GetTime() != nil, e.GetTime().GetSeconds(), e.GetTime().GetNanos())
	b = appendStamp(b, e.GetDeliverTime() != nil, e.GetDeliverTime().GetSeconds(), e.GetDeliverTime().GetNanos())
	b = appendStamp(b, e.GetTtl() != nil, e.GetTtl().GetSeconds(), e.GetTtl().GetNanos())
	b = binary.AppendUvarint(b, uint64(len(e.GetAttributes())))
	if len(e.GetAttributes()) > 0 {
		for _, name := range slices.Sorted(maps.Keys(e.GetAttributes())) {
			b = appendString(b, name)
			b = appendString(b, e.GetAttributes()[name])
		}
	}
	if form == 2 {
		b = binary.AppendUvarint(b, uint64(len(e.GetHeaders())))
		names := slices.SortedFunc(maps.Keys(e.GetHeaders()), func(a, b string) int { return strings.Compare(strings.ToLower(a), strings.ToLower(b)) })
		for _, name := range names {
			b = appendString(b, strings.ToLower(name))
			b = appendString(b, e.GetHeaders()[name])
		}
	}
	// What is sent counts, not how it was given, but the default content type depends on that.
	_, given := e.GetPayload().(*grapnelv1.Event_Json)
	b = appendStamp(b, given, int64(len(payload)), 0)
	h := sha256.New()
	h.Write(b)
	h.Write(payload)
	var sum [sha256.Size]byte
	h.Sum(sum[:0])
	return [16]byte(sum[:16])
}

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendStamp(b []byte, set bool, seconds int64, nanos int32) []byte {
	if !set {
		b = append(b, 0)
	} else {
		b = append(b, 1)
	}
	b = binary.AppendVarint(b, seconds)
	return binary.AppendVarint(b, int64(nanos))
}

func isEventType(s string) bool {
	return s != "" && utf8.ValidString(s) && isText(s, maxEventType, true)
}

// isMediaType is loose: two parts of printable ASCII around a slash.
func isMediaType(s string) bool {
	if len(s) > maxContentType {
		return false
	}
	slash := -1
	for i := range len(s) {
		switch c := s[i]; {
		case c == '/' && slash < 0:
			slash = i
		case c < ' ' || c > '~' || c == ' ' && slash < 0:
			return false
		}
	}
	return slash > 0 && slash < len(s)-1
}

func isAttributeName(s string) bool {
	if s == "" || len(s) > maxAttributeName || isReserved(s) {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// isReserved tells the names that CloudEvents gives a meaning.
func isReserved(s string) bool {
	switch s {
	case "id", "source", "type", "subject", "time", "data", "specversion", "datacontenttype", "dataschema":
		return true
	}
	return false
}

// isText reports whether s has at most most characters, none of which is a control character, which could
// not travel in a header.
func isText(s string, most int, spaces bool) bool {
	if len(s) > most && utf8.RuneCountInString(s) > most {
		return false
	}
	for _, r := range s {
		if r < ' ' || r >= 0x7f && r <= 0x9f || r == ' ' && !spaces {
			return false
		}
	}
	return true
}
