package plugin

import (
	"math"
	"slices"
	"time"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/grapnel/grapnel/internal/wire"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

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
	tracestate  string
	signHere    []uint32
	headers     []Header
	uri         string
	nonce       []byte
	ownership   bool
	// maxAnswer is Attempt.max_response_body.
	maxAnswer uint32
}

// Field numbers of the messages, as in plugin.proto.
const (
	fieldBatch = 2 // AttemptRequest

	fieldContents = 1 // AttemptBatch
	fieldAttempts = 2
)

// Parse implements wire.Reader.
func (f *requestFrame) Parse(b []byte) error {
	clear(f.contents)
	clear(f.attempts)
	f.contents, f.attempts, f.other = f.contents[:0], f.attempts[:0], nil
	batch, ok, err := wire.Only(b, fieldBatch)
	if err != nil {
		return err
	}
	if !ok {
		f.other = &pluginv1.AttemptRequest{}
		return proto.Unmarshal(b, f.other)
	}
	return wire.Fields(batch, func(num protowire.Number, v []byte, _ uint64) error {
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
	err := wire.Fields(b, func(num protowire.Number, _ []byte, _ uint64) error {
		if num == 3 {
			headers++
		}
		return nil
	})
	if err != nil {
		return c, err
	}
	c.headers = make([]Header, 0, headers)
	return c, wire.Fields(b, func(num protowire.Number, v []byte, _ uint64) error {
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
	err := wire.Fields(b, func(num protowire.Number, v []byte, x uint64) error {
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
		case 13:
			a.maxAnswer = uint32(x)
		case 14:
			a.tracestate = text(v)
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
			return to, wire.ErrMalformed
		}
		to, v = append(to, uint32(x)), v[n:]
	}
	return to, nil
}

func parseHeader(b []byte) (Header, error) {
	var h Header
	err := wire.Fields(b, func(num protowire.Number, v []byte, _ uint64) error {
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
	// sign is how long signers of this process took.
	sign    time.Duration
	timings Timings
	// full keeps the response's headers whatever its status, batch those that name what was not taken.
	full, batch bool
}

type failure struct {
	source  Source
	code    string
	message string
	wire    WireState
}

// SizeHint implements wire.Writer.
func (f *resultsFrame) SizeHint() int {
	n := 64
	for i := range f.results {
		n += 64 + len(f.results[i].peer)
		if r := f.results[i].response; r != nil {
			n += len(r.Body)
		}
	}
	return n
}

// Append implements wire.Writer.
func (f *resultsFrame) Append(b []byte) []byte {
	b, frame := wire.Open(b, 3)
	for i := range f.results {
		var at int
		b, at = wire.Open(b, 1)
		b = f.results[i].append(b)
		b = wire.Shut(b, at)
	}
	return wire.Shut(b, frame)
}

func (r *result) append(b []byte) []byte {
	b = wire.AppendUint(b, 1, r.seq)
	var at int
	if r.response != nil {
		b, at = wire.Open(b, 2)
		b = r.response.append(b, r.full, r.batch)
	} else {
		b, at = wire.Open(b, 3)
		b = wire.AppendUint(b, 1, uint64(r.failure.source))
		b = wire.AppendText(b, 2, r.failure.code)
		b = wire.AppendText(b, 3, r.failure.message)
		b = wire.AppendUint(b, 4, uint64(r.failure.wire))
	}
	b = wire.Shut(b, at)
	b = wire.AppendUint(b, 4, uint64(r.total.Microseconds()))
	b = wire.AppendText(b, 5, r.peer)
	b = appendHeaders(b, 6, r.sent)
	return r.appendTimings(b)
}

// appendTimings leaves out what nobody has measured.
func (r *result) appendTimings(b []byte) []byte {
	if r.sign == 0 && r.timings == (Timings{}) {
		return b
	}
	t := &r.timings
	b, at := wire.Open(b, 7)
	for i, d := range [...]time.Duration{r.sign, t.DNS, t.Connect, t.TLS, t.FirstByte, t.Body} {
		if d > 0 {
			b = wire.AppendUint(b, protowire.Number(i+1), uint64(micros(d)))
		}
	}
	return wire.Shut(b, at)
}

// micros is a duration on the wire.
func micros(d time.Duration) uint32 {
	return uint32(min(max(d.Microseconds(), 0), math.MaxUint32)) //nolint:gosec // bounded
}

func (r *Response) append(b []byte, full, batch bool) []byte {
	b = wire.AppendUint(b, 1, uint64(uint32(r.Status)))
	if full || r.Status < 200 || r.Status > 299 {
		b = appendHeaders(b, 2, r.Headers)
	} else {
		for _, h := range r.Headers {
			if equalFold(h.Name, "retry-after") || batch && equalFold(h.Name, "webhook-failed-ids") {
				b = appendHeaders(b, 2, []Header{h})
			}
		}
	}
	if len(r.Body) > 0 {
		b = wire.AppendBytes(b, 3, r.Body)
	}
	if r.Truncated {
		b = wire.AppendUint(b, 4, 1)
	}
	if r.Note != "" {
		b = wire.AppendText(b, 5, r.Note)
	}
	return b
}

func appendHeaders(b []byte, num protowire.Number, headers []Header) []byte {
	for _, h := range headers {
		b = wire.AppendHeader(b, num, lower(h.Name), h.Value)
	}
	return b
}
