package delivery

import "encoding/hex"

// Trace is where an event stands in a distributed trace (W3C Trace Context) that is recorded.
type Trace struct {
	ID [16]byte
	// Span is that of its publication.
	Span [8]byte
	// State is what the publisher's tracestate says, MaxTraceState bytes at most.
	State string
}

// String is the trace's id as people write it.
func (t *Trace) String() string { return hex.EncodeToString(t.ID[:]) }

// MaxTraceState is the longest tracestate that is kept.
const MaxTraceState = 512

// Traceparent is a place in a trace as W3C Trace Context writes it.
type Traceparent struct {
	ID   [16]byte
	Span [8]byte
	// Flags say in their lowest bit that the trace is recorded.
	Flags byte
}

// traceparentLen is how long one is in version 00.
const traceparentLen = 55

// ParseTraceparent reads one; of later versions, what version 00 has. It reports false for what is none.
func ParseTraceparent(s string) (t Traceparent, ok bool) {
	if len(s) < traceparentLen || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return t, false
	}
	for i := range traceparentLen {
		c := s[i]
		if i != 2 && i != 35 && i != 52 && !('0' <= c && c <= '9' || 'a' <= c && c <= 'f') {
			return t, false
		}
	}
	if version := s[:2]; version == "ff" || len(s) > traceparentLen && (version == "00" || s[traceparentLen] != '-') {
		return t, false
	}
	var flags [1]byte
	_, _ = hex.Decode(t.ID[:], []byte(s[3:35])) // the digits are checked
	_, _ = hex.Decode(t.Span[:], []byte(s[36:52]))
	_, _ = hex.Decode(flags[:], []byte(s[53:55]))
	t.Flags = flags[0]
	return t, t.ID != [16]byte{} && t.Span != [8]byte{}
}

// Append writes it.
func (t Traceparent) Append(b []byte) []byte {
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, t.ID[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, t.Span[:])
	b = append(b, '-')
	return hex.AppendEncode(b, []byte{t.Flags})
}
