// Package wire is how events and attempts travel between the host and a plugin: the shapes of a body, the frames of the
// attempt stream, read and written without a message's struct, and the same as messages for what goes one by one. It knows
// no process and decides nothing.
package wire

import (
	"math"
	"math/rand/v2"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/grapnel/grapnel/internal/wire"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

// MaxResponse is how many bytes of a response's body are kept with an attempt.
const MaxResponse = 4096

// Attempt is one attempt as it travels.
type Attempt struct {
	// Seq is the attempt's name on its stream.
	Seq uint64
	// Ref is the transport's instance, SignHere the signers' that sign in the same process, in their order.
	Ref      uint32
	SignHere []uint32
	// Number is 1 for the first.
	Number  uint32
	Timeout time.Duration
	Created time.Time
	// Nonce are random bytes that all signers of one attempt share.
	Nonce [16]byte
	// Headers are what signers before have set, URI what they made of the target's; empty when they left it.
	Headers []delivery.Header
	URI     string
	// Ownership asks the receiver instead of delivering to it.
	Ownership bool
	// Answer has as much of the answer handed back as several events need that travel together.
	Answer bool
	// Trace is set where the event is sampled. Unsampled says that it is not, although others are.
	Trace     *Trace
	Unsampled bool
	// Content is what is carried.
	Content Content
}

// Batch is an AttemptRequest with a batch. It is used again for one batch after the other.
type Batch struct {
	attempts []*Attempt
	// contents are the batch's bodies; index is each attempt's place in it.
	contents []Content
	index    []uint32
}

// Add puts an attempt in. Attempts of one event mostly come one after the other, so looking from the end finds its
// content at once.
func (f *Batch) Add(a *Attempt) {
	at := len(f.contents) - 1
	for at >= 0 && !f.contents[at].equal(a.Content) {
		at--
	}
	if at < 0 {
		at = len(f.contents)
		f.contents = append(f.contents, a.Content)
	}
	f.attempts, f.index = append(f.attempts, a), append(f.index, uint32(at))
}

// Reset takes everything out.
func (f *Batch) Reset() {
	clear(f.attempts)
	clear(f.contents)
	f.attempts, f.contents, f.index = f.attempts[:0], f.contents[:0], f.index[:0]
}

// SizeHint implements wire.Writer.
func (f *Batch) SizeHint() int {
	n := 64 + 160*len(f.attempts)
	for _, c := range f.contents {
		n += 512 + len(c.Body())
	}
	return n
}

// Append implements wire.Writer.
func (f *Batch) Append(b []byte) []byte {
	b, frame := wire.Open(b, 2)
	for _, c := range f.contents {
		var at int
		b, at = wire.Open(b, 1)
		b = appendContent(b, c)
		b = wire.Shut(b, at)
	}
	for i, a := range f.attempts {
		var at int
		b, at = wire.Open(b, 2)
		b = a.append(b, f.index[i])
		b = wire.Shut(b, at)
	}
	return wire.Shut(b, frame)
}

// appendContent writes what all attempts at an event in one shape share.
func appendContent(b []byte, c Content) []byte {
	b = wire.AppendText(b, 1, c.event.UID)
	b = wire.AppendBytes(b, 2, c.Body())
	for name, value := range c.headers {
		b = wire.AppendHeader(b, 3, name, value)
	}
	return wire.AppendText(b, 4, c.event.Type)
}

func (a *Attempt) append(b []byte, content uint32) []byte {
	b = wire.AppendUint(b, 1, a.Seq)
	b = wire.AppendUint(b, 2, uint64(content))
	b = wire.AppendUint(b, 3, uint64(a.Ref))
	b = wire.AppendUint(b, 4, uint64(a.Number))
	b = wire.AppendUint(b, 5, uint64(a.Timeout.Milliseconds()))
	b = wire.AppendUint(b, 6, uint64(a.Created.UnixNano()))
	b = wire.AppendBytes(b, 11, a.Nonce[:])
	if a.Ownership {
		return wire.AppendUint(b, 12, 1)
	}
	if a.Answer {
		b = wire.AppendUint(b, 13, MaxAnswer)
	}
	b = protowire.AppendTag(b, 7, protowire.BytesType)
	b = append(b, traceparentLen)
	b = a.appendTraceparent(b)
	b = wire.AppendText(b, 14, a.tracestate())
	if len(a.SignHere) > 0 {
		at := 0
		b, at = wire.Open(b, 8)
		for _, ref := range a.SignHere {
			b = protowire.AppendVarint(b, uint64(ref))
		}
		b = wire.Shut(b, at)
	}
	for _, h := range a.Headers {
		b = wire.AppendHeader(b, 9, h.Name, h.Value)
	}
	return wire.AppendText(b, 10, a.URI)
}

const traceparentLen = 55

// Trace is what is told of the trace of an event that is sampled.
type Trace struct {
	// Receiver is the place of the attempt, Plugin that of all that is done for it.
	Receiver, Plugin delivery.Traceparent
	// State is the tracestate of both.
	State string
}

// appendTraceparent writes the trace context of an attempt: its own, where its event is sampled. Else it is the one that the
// publisher gave, or one that follows from the event's id, so that attempts at it can be told to belong together.
func (a *Attempt) appendTraceparent(b []byte) []byte {
	if a.Trace != nil {
		return a.Trace.Receiver.Append(b)
	}
	ev := a.Content.event
	if given, ok := delivery.ParseTraceparent(ev.Attributes["traceparent"]); ok {
		return given.Append(b)
	}
	b = append(b, "00-"...)
	hi, lo := hash128(ev.UID)
	b = appendHex(appendHex(b, hi), lo)
	b = append(b, '-')
	b = appendHex(b, rand.Uint64()|1)
	if a.Unsampled {
		return append(b, "-00"...)
	}
	return append(b, "-01"...)
}

// tracestate is what goes with the traceparent.
func (a *Attempt) tracestate() string {
	if a.Trace != nil {
		return a.Trace.State
	}
	return givenState(a.Content.event)
}

// givenState is the publisher's tracestate, where it goes with a traceparent and can be a header as it is; else it is empty.
func givenState(ev *delivery.Event) string {
	state := ev.Attributes["tracestate"]
	if state == "" || strings.ContainsFunc(state, func(r rune) bool { return r < ' ' || r > '~' }) {
		return ""
	}
	if _, ok := delivery.ParseTraceparent(ev.Attributes["traceparent"]); !ok {
		return ""
	}
	return state
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

// Response is an AttemptResponse as read. A frame without results is kept whole in Other.
type Response struct {
	Results []Result
	Other   *pluginv1.AttemptResponse
	// peer is the last one read: most attempts of a batch share theirs, which spares the copy.
	peer string
}

// maxPeer is the longest host:port that is taken.
const maxPeer = 512

// maxNote is the longest note that is taken.
const maxNote = 512

// Result is an AttemptResult; its text is its own.
type Result struct {
	Seq uint64
	// Answered says that there is a response: Status to Truncated. Otherwise there is a Failure.
	Answered  bool
	Status    int
	Headers   []delivery.Header
	Body      []byte
	Truncated bool
	// Note is what was wrong behind the status.
	Note    string
	Failure *pluginv1.Failure
	// Total is how long it took, as the plugin says.
	Total time.Duration
	Peer  string
	// Sent are the headers that signers and transport have added.
	Sent []delivery.Header
	// Timings are parts of Total, by what the plugin says.
	Timings Timings
}

// Part of an attempt's time that a plugin may tell, in the order in which they follow one another.
type Part int

// Parts of an attempt's time.
const (
	Sign Part = iota
	DNS
	Connect
	TLS
	FirstByte
	Body
	Parts
)

// Timings are how long each Part took, in microseconds; 0 is one that was not, or was not told.
type Timings [Parts]uint32

// Parse implements wire.Reader.
func (f *Response) Parse(b []byte) error {
	clear(f.Results)
	f.Results, f.Other = f.Results[:0], nil
	results, ok, err := wire.Only(b, 3)
	if err != nil {
		return err
	}
	if !ok {
		f.Other = &pluginv1.AttemptResponse{}
		return proto.Unmarshal(b, f.Other)
	}
	return wire.Fields(results, func(num protowire.Number, v []byte, _ uint64) error {
		if num != 1 {
			return nil
		}
		f.Results = append(f.Results, Result{})
		return f.parseResult(&f.Results[len(f.Results)-1], v)
	})
}

func (f *Response) parseResult(r *Result, b []byte) error {
	return wire.Fields(b, func(num protowire.Number, v []byte, x uint64) error {
		switch num {
		case 1:
			r.Seq = x
		case 2:
			r.Answered = true
			return r.parseResponse(v)
		case 3:
			r.Failure = &pluginv1.Failure{}
			return proto.Unmarshal(v, r.Failure)
		case 4:
			r.Total = time.Duration(x) * time.Microsecond
		case 5:
			if v = v[:min(len(v), maxPeer)]; string(v) != f.peer {
				f.peer = valid(v)
			}
			r.Peer = f.peer
		case 6:
			return appendParsed(&r.Sent, v)
		case 7:
			return wire.Fields(v, func(num protowire.Number, _ []byte, x uint64) error {
				if num >= 1 && num <= protowire.Number(Parts) {
					r.Timings[num-1] = uint32(min(x, math.MaxUint32)) //nolint:gosec // bounded
				}
				return nil
			})
		}
		return nil
	})
}

func (r *Result) parseResponse(b []byte) error {
	return wire.Fields(b, func(num protowire.Number, v []byte, x uint64) error {
		switch num {
		case 1:
			r.Status = int(uint32(x))
		case 2:
			return appendParsed(&r.Headers, v)
		case 3:
			if len(v) > MaxAnswer {
				v, r.Truncated = v[:MaxAnswer], true
			}
			r.Body = append([]byte(nil), v...)
		case 4:
			r.Truncated = r.Truncated || x != 0
		case 5:
			r.Note = valid(v[:min(len(v), maxNote)])
		}
		return nil
	})
}

func appendParsed(to *[]delivery.Header, b []byte) error {
	var h delivery.Header
	err := wire.Fields(b, func(num protowire.Number, v []byte, _ uint64) error {
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
