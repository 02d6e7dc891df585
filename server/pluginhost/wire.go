package pluginhost

import (
	"errors"
	"math/rand/v2"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

var errMalformed = errors.New("malformed message")

// batchFrame is an AttemptRequest with a batch.
type batchFrame struct {
	batch []*pending
	// contents are the batch's bodies; index is each attempt's place in it.
	contents []content
	index    []uint32
}

// fill makes the table of contents. Attempts of one event mostly come one after the other, so looking
// from the end finds them at once.
func (f *batchFrame) fill(batch []*pending) {
	f.batch, f.contents, f.index = batch, f.contents[:0], f.index[:0]
	for _, p := range batch {
		c := p.content()
		at := len(f.contents) - 1
		for at >= 0 && !f.contents[at].equal(c) {
			at--
		}
		if at < 0 {
			at = len(f.contents)
			f.contents = append(f.contents, c)
		}
		f.index = append(f.index, uint32(at))
	}
}

func (f *batchFrame) forget() {
	f.batch = nil
	clear(f.contents)
}

func (f *batchFrame) sizeHint() int {
	n := 64 + 160*len(f.batch)
	for _, c := range f.contents {
		n += 512 + len(c.body())
	}
	return n
}

// append writes the frame. Lengths are written after their content, into room left for them.
func (f *batchFrame) append(b []byte) []byte {
	b, frame := open(b, 2)
	for _, c := range f.contents {
		var at int
		b, at = open(b, 1)
		b = appendContent(b, c)
		b = shut(b, at)
	}
	for i, p := range f.batch {
		var at int
		b, at = open(b, 2)
		b = appendAttempt(b, p, f.index[i])
		b = shut(b, at)
	}
	return shut(b, frame)
}

// appendContent writes what all attempts at an event in one shape share.
func appendContent(b []byte, c content) []byte {
	b = appendText(b, 1, c.event.UID)
	b = protowire.AppendTag(b, 2, protowire.BytesType)
	b = protowire.AppendBytes(b, c.body())
	for name, value := range c.headers {
		b = appendHeader(b, 3, name, value)
	}
	return appendText(b, 4, c.event.Type)
}

func appendAttempt(b []byte, p *pending, content uint32) []byte {
	b = appendUint(b, 1, p.seq)
	b = appendUint(b, 2, uint64(content))
	b = appendUint(b, 3, uint64(p.plan.ref))
	b = appendUint(b, 4, uint64(p.job.Attempts+1))
	b = appendUint(b, 5, uint64(p.plan.timeout.Milliseconds()))
	b = appendUint(b, 6, uint64(p.created.UnixNano()))
	if p.ownership {
		return appendUint(b, 12, 1)
	}
	b = protowire.AppendTag(b, 7, protowire.BytesType)
	b = append(b, traceparentLen)
	b = appendTraceparent(b, p.job.Event)
	if len(p.plan.local) > 0 {
		at := 0
		b, at = open(b, 8)
		for _, ref := range p.plan.local {
			b = protowire.AppendVarint(b, uint64(ref))
		}
		b = shut(b, at)
		b = protowire.AppendTag(b, 11, protowire.BytesType)
		b = protowire.AppendBytes(b, p.nonce[:])
	}
	for _, h := range p.headers {
		b = appendHeader(b, 9, h.Name, h.Value)
	}
	return appendText(b, 10, p.uri)
}

const traceparentLen = 55

// appendTraceparent writes the trace context of an attempt: the event's trace, or one that follows from
// its id, and a span of its own.
func appendTraceparent(b []byte, ev *delivery.Event) []byte {
	b = append(b, "00-"...)
	given := ev.Attributes["traceparent"]
	flags := "01"
	if validTraceparent(given) {
		b = append(b, given[3:35]...)
		flags = given[53:55]
	} else {
		hi, lo := hash128(ev.UID)
		b = appendHex(appendHex(b, hi), lo)
	}
	b = append(b, '-')
	b = appendHex(b, rand.Uint64()|1)
	b = append(b, '-')
	return append(b, flags...)
}

func validTraceparent(s string) bool {
	if len(s) != traceparentLen || s[:3] != "00-" || s[35] != '-' || s[52] != '-' {
		return false
	}
	for i := 3; i < len(s); i++ {
		c := s[i]
		if i != 35 && i != 52 && !('0' <= c && c <= '9' || 'a' <= c && c <= 'f') {
			return false
		}
	}
	return s[3:35] != strings.Repeat("0", 32) && s[36:52] != strings.Repeat("0", 16)
}

// hash128 is FNV-1a twice from two starts; all it has to be is stable and spread.
func hash128(s string) (hi, lo uint64) {
	hi, lo = 0xcbf29ce484222325, 0x84222325cbf29ce4
	for i := range len(s) {
		hi = (hi ^ uint64(s[i])) * 0x100000001b3
		lo = (lo ^ uint64(s[i])) * 0x100000001b3
	}
	return hi | 1, lo
}

func appendHex(b []byte, v uint64) []byte {
	const hex = "0123456789abcdef"
	for shift := 60; shift >= 0; shift -= 4 {
		b = append(b, hex[v>>shift&15])
	}
	return b
}

// responseFrame is an AttemptResponse as read. A frame without results is kept whole in other.
type responseFrame struct {
	results []result
	other   *pluginv1.AttemptResponse
	// peer is the last one read: most attempts of a batch share theirs, which spares the copy.
	peer string
}

// result is an AttemptResult; its text is its own.
type result struct {
	seq       uint64
	answered  bool
	status    int
	headers   []delivery.Header
	body      []byte
	truncated bool
	failure   *pluginv1.Failure
	total     time.Duration
	peer      string
	sent      []delivery.Header
}

func (f *responseFrame) parse(b []byte) error {
	clear(f.results)
	f.results, f.other = f.results[:0], nil
	num, typ, n := protowire.ConsumeTag(b)
	if n < 0 || num != 3 || typ != protowire.BytesType {
		f.other = &pluginv1.AttemptResponse{}
		return proto.Unmarshal(b, f.other)
	}
	results, m := protowire.ConsumeBytes(b[n:])
	if m < 0 || n+m != len(b) {
		return errMalformed
	}
	return fields(results, func(num protowire.Number, v []byte, _ uint64) error {
		if num != 1 {
			return nil
		}
		f.results = append(f.results, result{})
		return f.parseResult(&f.results[len(f.results)-1], v)
	})
}

func (f *responseFrame) parseResult(r *result, b []byte) error {
	return fields(b, func(num protowire.Number, v []byte, x uint64) error {
		switch num {
		case 1:
			r.seq = x
		case 2:
			r.answered = true
			return r.parseResponse(v)
		case 3:
			r.failure = &pluginv1.Failure{}
			return proto.Unmarshal(v, r.failure)
		case 4:
			r.total = time.Duration(x) * time.Microsecond
		case 5:
			if string(v) != f.peer {
				f.peer = valid(v)
			}
			r.peer = f.peer
		case 6:
			return appendParsed(&r.sent, v)
		}
		return nil
	})
}

func (r *result) parseResponse(b []byte) error {
	return fields(b, func(num protowire.Number, v []byte, x uint64) error {
		switch num {
		case 1:
			r.status = int(uint32(x))
		case 2:
			return appendParsed(&r.headers, v)
		case 3:
			if len(v) > maxResponse {
				v, r.truncated = v[:maxResponse], true
			}
			r.body = append([]byte(nil), v...)
		case 4:
			r.truncated = r.truncated || x != 0
		}
		return nil
	})
}

func appendParsed(to *[]delivery.Header, b []byte) error {
	var h delivery.Header
	err := fields(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			h.Name = strings.ToLower(valid(v))
		case 2:
			h.Value = valid(v)
		}
		return nil
	})
	*to = append(*to, h)
	return err
}

// valid copies bytes that should be text into one that is.
func valid(b []byte) string {
	if utf8.Valid(b) {
		return string(b)
	}
	return strings.ToValidUTF8(string(b), "\uFFFD")
}

// fields calls each with every field of a message: with v for length-delimited ones, with x for varints.
func fields(b []byte, each func(num protowire.Number, v []byte, x uint64) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		var v []byte
		var x uint64
		known := true
		switch typ {
		case protowire.BytesType:
			v, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			x, n = protowire.ConsumeVarint(b)
		default:
			known = false
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return errMalformed
		}
		if known {
			if err := each(num, v, x); err != nil {
				return err
			}
		}
		b = b[n:]
	}
	return nil
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
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), s)
}

func appendHeader(b []byte, num protowire.Number, name, value string) []byte {
	b, at := open(b, num)
	b = appendText(b, 1, name)
	b = appendText(b, 2, value)
	return shut(b, at)
}

// lengthRoom is what open leaves for a length.
const lengthRoom = 3

// open begins a nested message.
func open(b []byte, num protowire.Number) ([]byte, int) {
	b = protowire.AppendTag(b, num, protowire.BytesType)
	return append(b, 0, 0, 0), len(b) + lengthRoom
}

// shut ends the nested message that began at. A length is padded to its room, which protobuf allows; one
// that needs more moves the message.
func shut(b []byte, at int) []byte {
	n := len(b) - at
	room := lengthRoom
	if n >= 1<<(7*lengthRoom) {
		b = append(b, 0, 0)
		copy(b[at+2:], b[at:at+n])
		room += 2
	}
	for i, v := 0, uint64(n); i < room; i++ {
		b[at-lengthRoom+i] = byte(v) | 0x80
		v >>= 7
	}
	b[at-lengthRoom+room-1] &= 0x7f
	return b
}
