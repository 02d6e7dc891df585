package plugin

import (
	"errors"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

var errMalformed = errors.New("malformed message")

// requestFrame is an AttemptRequest as read from the stream. A frame that is no batch is kept whole in
// other.
type requestFrame struct {
	contents []content
	attempts []attempt
	other    *pluginv1.AttemptRequest
}

// content is a Content. It and the attempts refer to memory of their own, not to the frame's.
type content struct {
	messageID string
	body      []byte
	headers   []Header
	eventType string
}

type attempt struct {
	seq         uint64
	content     uint32
	ref         uint32
	number      uint32
	timeout     time.Duration
	created     int64
	traceparent string
	signHere    []uint32
	headers     []Header
	uri         string
	nonce       []byte
	ownership   bool
}

// Field numbers of the messages, as in plugin.proto.
const (
	fieldBatch = 2 // AttemptRequest

	fieldContents = 1 // AttemptBatch
	fieldAttempts = 2
)

func (f *requestFrame) parse(b []byte) error {
	clear(f.contents)
	clear(f.attempts)
	f.contents, f.attempts, f.other = f.contents[:0], f.attempts[:0], nil
	num, typ, n := protowire.ConsumeTag(b)
	if n < 0 || num != fieldBatch || typ != protowire.BytesType {
		f.other = &pluginv1.AttemptRequest{}
		return proto.Unmarshal(b, f.other)
	}
	batch, m := protowire.ConsumeBytes(b[n:])
	if m < 0 || n+m != len(b) {
		return errMalformed
	}
	return fields(batch, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case fieldContents:
			c, err := parseContent(slices.Clone(v))
			f.contents = append(f.contents, c)
			return err
		case fieldAttempts:
			a, err := parseAttempt(slices.Clone(v))
			f.attempts = append(f.attempts, a)
			return err
		}
		return nil
	})
}

// parseContent keeps b.
func parseContent(b []byte) (content, error) {
	var c content
	headers := 0
	err := fields(b, func(num protowire.Number, _ []byte, _ uint64) error {
		if num == 3 {
			headers++
		}
		return nil
	})
	if err != nil {
		return c, err
	}
	c.headers = make([]Header, 0, headers)
	return c, fields(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			c.messageID = text(v)
		case 2:
			c.body = v[:len(v):len(v)]
		case 3:
			h, err := parseHeader(v)
			c.headers = append(c.headers, h)
			return err
		case 4:
			c.eventType = text(v)
		}
		return nil
	})
}

// parseAttempt keeps b.
func parseAttempt(b []byte) (attempt, error) {
	var a attempt
	err := fields(b, func(num protowire.Number, v []byte, x uint64) error {
		switch num {
		case 1:
			a.seq = x
		case 2:
			a.content = uint32(x)
		case 3:
			a.ref = uint32(x)
		case 4:
			a.number = uint32(x)
		case 5:
			a.timeout = time.Duration(uint32(x)) * time.Millisecond
		case 6:
			a.created = int64(x)
		case 7:
			a.traceparent = text(v)
		case 8:
			var err error
			a.signHere, err = appendPacked(a.signHere, v, x)
			return err
		case 9:
			h, err := parseHeader(v)
			a.headers = append(a.headers, h)
			return err
		case 10:
			a.uri = text(v)
		case 11:
			a.nonce = v[:len(v):len(v)]
		case 12:
			a.ownership = x != 0
		}
		return nil
	})
	return a, err
}

// appendPacked reads repeated uint32 in either of its two encodings.
func appendPacked(to []uint32, v []byte, x uint64) ([]uint32, error) {
	if v == nil {
		return append(to, uint32(x)), nil
	}
	for len(v) > 0 {
		x, n := protowire.ConsumeVarint(v)
		if n < 0 {
			return to, errMalformed
		}
		to, v = append(to, uint32(x)), v[n:]
	}
	return to, nil
}

func parseHeader(b []byte) (Header, error) {
	var h Header
	err := fields(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			h.Name = text(v)
		case 2:
			h.Value = text(v)
		}
		return nil
	})
	return h, err
}

// text views bytes that nobody changes any more as a string.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// fields calls each with every field of a message: with v for length-delimited ones (never nil), with x
// for the others.
func fields(b []byte, each func(num protowire.Number, v []byte, x uint64) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		var v []byte
		var x uint64
		switch typ {
		case protowire.BytesType:
			v, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			x, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return errMalformed
		}
		if typ == protowire.BytesType || typ == protowire.VarintType {
			if err := each(num, v, x); err != nil {
				return err
			}
		}
		b = b[n:]
	}
	return nil
}

// resultsFrame is an AttemptResponse with results.
type resultsFrame struct {
	results []result
}

// result is an AttemptResult.
type result struct {
	seq      uint64
	total    time.Duration
	peer     string
	response *Response // nil when failed
	failure  failure
	sent     []Header
	// full keeps the response's headers whatever its status.
	full bool
}

type failure struct {
	source  Source
	code    string
	message string
	wire    WireState
}

func (f *resultsFrame) sizeHint() int {
	n := 64
	for i := range f.results {
		n += 64 + len(f.results[i].peer)
		if r := f.results[i].response; r != nil {
			n += len(r.Body)
		}
	}
	return n
}

// append writes the frame. Lengths are written after their content, into room left for them, so that
// nothing is measured twice.
func (f *resultsFrame) append(b []byte) []byte {
	b, frame := open(b, 3)
	for i := range f.results {
		var at int
		b, at = open(b, 1)
		b = f.results[i].append(b)
		b = shut(b, at)
	}
	return shut(b, frame)
}

func (r *result) append(b []byte) []byte {
	b = appendUint(b, 1, r.seq)
	var at int
	if r.response != nil {
		b, at = open(b, 2)
		b = r.response.append(b, r.full)
	} else {
		b, at = open(b, 3)
		b = appendUint(b, 1, uint64(r.failure.source))
		b = appendText(b, 2, r.failure.code)
		b = appendText(b, 3, r.failure.message)
		b = appendUint(b, 4, uint64(r.failure.wire))
	}
	b = shut(b, at)
	b = appendUint(b, 4, uint64(r.total.Microseconds()))
	b = appendText(b, 5, r.peer)
	return appendHeaders(b, 6, r.sent)
}

func (r *Response) append(b []byte, full bool) []byte {
	b = appendUint(b, 1, uint64(uint32(r.Status)))
	if full || r.Status < 200 || r.Status > 299 {
		b = appendHeaders(b, 2, r.Headers)
	} else {
		for _, h := range r.Headers {
			if equalFold(h.Name, "retry-after") {
				b = appendHeaders(b, 2, []Header{h})
			}
		}
	}
	if len(r.Body) > 0 {
		b = protowire.AppendTag(b, 3, protowire.BytesType)
		b = protowire.AppendBytes(b, r.Body)
	}
	if r.Truncated {
		b = appendUint(b, 4, 1)
	}
	return b
}

func appendUint(b []byte, num protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), v)
}

func appendText(b []byte, num protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\uFFFD") // a receiver's header may hold anything
	}
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), s)
}

func appendHeaders(b []byte, num protowire.Number, headers []Header) []byte {
	for _, h := range headers {
		var at int
		b, at = open(b, num)
		b = appendText(b, 1, lower(h.Name))
		b = appendText(b, 2, h.Value)
		b = shut(b, at)
	}
	return b
}

// lengthRoom is what open leaves for a length: enough for 2 MiB, which gRPC's limits stay below or shut
// makes more of.
const lengthRoom = 3

// open begins a nested message.
func open(b []byte, num protowire.Number) ([]byte, int) {
	b = protowire.AppendTag(b, num, protowire.BytesType)
	return append(b, 0, 0, 0), len(b) + lengthRoom
}

// shut ends the nested message that began at.
func shut(b []byte, at int) []byte {
	n := len(b) - at
	if n >= 1<<(7*lengthRoom) {
		b = append(b, 0, 0)
		copy(b[at+2:], b[at:at+n])
		padded(b[at-lengthRoom:at+2], uint64(n))
		return b
	}
	padded(b[at-lengthRoom:at], uint64(n))
	return b
}

// padded writes a varint that fills its room: leading zero groups are valid, if longer than need be.
func padded(room []byte, n uint64) {
	for i := range room {
		room[i] = byte(n) | 0x80
		n >>= 7
	}
	room[len(room)-1] &= 0x7f
}
