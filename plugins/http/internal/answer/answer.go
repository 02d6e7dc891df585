// Package answer is what the HTTP clients of this transport hand back, whichever version they speak: an answer, or how
// far the request came without one.
package answer

import (
	"errors"
	"io"
	"net/http"
	"time"
)

const (
	// MaxHeader is how much of a response's header is read, each field counted as 32 bytes more than it has.
	MaxHeader = 64 << 10
	// MaxDrain is how much of a body is read past what is kept, so that the connection can be used again.
	MaxDrain = 64 << 10
	// MaxInterim is how many interim responses (1xx) may come before the answer. Reading one costs as much as an answer does.
	MaxInterim = 100
	// Drip is how long the rest of a response that says yes may take: its body tells nothing that is kept.
	Drip = time.Second
)

var (
	// ErrInterim is a server that sends more interim responses than MaxInterim.
	ErrInterim = errors.New("the receiver sends interim responses without end")
	// ErrStatus is a status that is none: it has three digits, the first of them not 0 (RFC 9110, section 15). Those from 600
	// on are in no class, and taken as they are.
	ErrStatus = errors.New("the receiver answered with a status that is no number from 100 to 999")
)

// Sent is what of a request may have reached the server.
type Sent int

// How far a request has come.
const (
	Nothing Sent = iota
	Maybe
	All
)

// Answer is what the server said, as far as it was read. A status that was read counts, whatever came behind it.
type Answer struct {
	Status    int
	Header    http.Header
	Body      []byte
	Truncated bool   // of Body, or of what should have come before it
	Peer      string // host:port
	// Note says what was wrong behind the status; empty when nothing was.
	Note string
}

// Timings are the parts of the time that a request took; zero is a part that it did not have, or that nobody has measured.
// A request that goes out twice has the sum.
type Timings struct {
	// DNS, Connect and TLS are of a connection that was made for it.
	DNS, Connect, TLS time.Duration
	// FirstByte is from when there was a connection to the first byte of an answer, Body from then to the end of what is read.
	FirstByte, Body time.Duration
}

// Add adds the time that it took to connect.
func (t *Timings) Add(dns, connect, tls time.Duration) {
	t.DNS += dns
	t.Connect += connect
	t.TLS += tls
}

// Error is a request without an answer.
type Error struct {
	Sent Sent
	Peer string // empty when there was no connection
	// Fresh says that the connection had carried no request before.
	Fresh bool
	Err   error
}

// Error is the text of Err.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// Wants is what the caller needs of a response.
type Wants struct {
	// Body is how much of the body to keep.
	Body int
	// Whole says that the body of a response that says yes is worth waiting for.
	Whole bool
}

// Patient reports whether the rest of a response with the status may take its time.
func (w Wants) Patient(status int) bool { return w.Whole || status/100 != 2 }

// Read keeps the start of a response's body and drains the rest within bounds. whole says that the end was reached, so
// that the connection is where the next response begins. It has no error: the response stands without its body.
func Read(resp *http.Response, w Wants) (kept []byte, truncated, whole bool) {
	if resp.Body == http.NoBody || resp.ContentLength == 0 {
		return nil, false, true
	}
	size := 512
	if resp.ContentLength > 0 {
		size = int(min(resp.ContentLength, int64(w.Body)))
	}
	kept = make([]byte, 0, min(size, w.Body))
	var err error
	for err == nil && len(kept) < w.Body {
		if len(kept) == cap(kept) {
			kept = append(kept, 0)[:len(kept)]
		}
		var n int
		n, err = resp.Body.Read(kept[len(kept):min(cap(kept), w.Body)])
		kept = kept[:len(kept)+n]
	}
	switch {
	case errors.Is(err, io.EOF):
		return kept, false, true
	case err != nil:
		return kept, true, false
	}
	n, err := io.Copy(io.Discard, io.LimitReader(resp.Body, MaxDrain))
	return kept, err != nil || n > 0, err == nil && n < MaxDrain
}
