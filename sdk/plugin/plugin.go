// Package plugin is the kit that plugin authors write with: a signer, a transport or a transformer is one function and
// one config struct, and Main makes a process of it that the Grapnel host can run.
//
//	func main() {
//		plugin.Main("acme/sign", "1.0.0",
//			plugin.Signer("acme-v2", func(c Config, _ plugin.Target) (plugin.SignFunc, error) {
//				return func(r *plugin.Request) error {
//					r.Set("acme-signature", sign(c.Key, r.MessageID, r.Created, r.Body))
//					return nil
//				}, nil
//			}))
//	}
//
// The package owns the handshake, the gRPC services of grapnel.plugin.v1, batching, flow control,
// recovery of panics, drain, heartbeats, logs and the JSON Schema of the config struct; an author needs
// neither gRPC nor go-plugin. It guarantees that every attempt the host sends is answered exactly once
// while the process lives, that a panic in one attempt spares the others, and that the process ends when
// its host does. It does not restart, retry or store anything: that is the host's.
//
// # Config structs
//
// The fields of a kind's config struct are its settings, under the names that encoding/json gives them. Strings,
// booleans, numbers, Duration, slices, arrays, maps with string keys, structs, pointers to these, any and
// json.RawMessage have a JSON Schema; a field of another type is an error of Serve, as is a tag that does not fit.
// The host and the kit check a config against the schema, so that build meets only what passes. Tags:
//
//	doc:"…"                   what it is, for people
//	required:"true"           it must be given; else it may be absent, and is then the default or zero
//	default:"…"               JSON, of strings and Durations without quotes
//	enum:"a,b"                the values there are
//	minimum, maximum          of numbers, and of Durations as in "100ms"
//	minLength, maxLength      of strings, in characters
//	pattern:"^…$"             a regular expression in the syntax of Go that a string must match somewhere
//	format:"uri"              a string is a date-time, email, hostname, ipv4, ipv6 or (absolute) uri
//	minItems, maxItems        of slices and arrays
//
// On slices, arrays and maps, tags about values are about their elements. A field of type Secret is no setting but a
// slot that takes the name of a stored secret, and must be a field of the config struct itself. Its tags:
//
//	slot:"key"                its name, required
//	doc, required             as above
//	kinds:"HMAC,OPAQUE"       kinds of secret that it accepts; any without it
//
// When a config is only checked, secrets may be absent: if one of a required slot is, build is not called. An optional
// slot may be empty at any time: ask Secret.Empty.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// SignFunc signs one request: it adds headers with r.Set or r.Add and may change the query of r.URL. It
// is pure: the same request gives the same bytes, so it takes the time from r.Created and randomness
// from r.Nonce, and does no I/O. It runs concurrently and must not keep r after it returns. Signatures that take longer
// than half a millisecond, or are over more than 512 KiB, wait for their turns, so that all of them together take a quarter
// of the process's processors; an attempt whose turn does not come in its time has failed by the plugin.
type SignFunc func(r *Request) error

// AttemptFunc makes one attempt. It ends when ctx does, whose deadline is the attempt's, and must not
// keep r after it returns, though strings and the body taken from r stay valid. A *Failure as error says
// what went wrong; any other error counts as the plugin's own fault.
type AttemptFunc func(ctx context.Context, r *Request) (*Response, error)

// TransformFunc makes what requests carry out of an event, or says with Drop that nothing is to be sent. Any other error is
// the plugin's own fault: the delivery is tried again. It runs once for each delivery, whose every attempt carries what it
// returned. It ends when ctx does, and does no I/O: what takes longer than some milliseconds waits for its turn, so that all
// of it together takes a quarter of the process's processors. It runs concurrently and must not keep e after it returns, though
// strings and the data taken from e stay valid.
type TransformFunc func(ctx context.Context, e *Event) (*Transformed, error)

// Event is an event as it was published. Attributes and Data are shared and must not be changed.
type Event struct {
	// MessageID is the webhook-id of every request that carries the event.
	MessageID string
	// ID, Source, Type, Subject, Schema and Attributes are its attributes as a CloudEvent.
	ID, Source, Type, Subject, Schema string
	// Attributes are those beside the others.
	Attributes map[string]string
	// Time is when it happened, or, where the publisher did not say, when it was accepted.
	Time time.Time
	// ContentType is Data's; empty means JSON.
	ContentType string
	Data        []byte
}

// MaxTransformed is the largest body that a transformer may make.
const MaxTransformed = 256 << 10

// Transformed is what requests carry instead of an event's payload.
type Transformed struct {
	// Body is sent exactly as it is, MaxTransformed bytes at most.
	Body []byte
	// ContentType of Body; empty means application/json.
	ContentType string
	// Headers for the request, 32 and 8 KiB at most: not those that a subscription may not have, that a signer sets, or
	// content-encoding.
	Headers []Header
}

// Drop is the error of a TransformFunc that nothing is to be sent for: the delivery ends as SKIPPED. The reason is for people,
// and holds no secret.
func Drop(reason string) error { return &dropError{reason} }

// DropReason is the reason of an error that is Drop's, or wraps one.
func DropReason(err error) (reason string, dropped bool) {
	var drop *dropError
	if errors.As(err, &drop) {
		return drop.reason, true
	}
	return "", false
}

type dropError struct{ reason string }

func (e *dropError) Error() string { return "dropped: " + e.reason }

// Header is one header field; the name is lower case.
type Header struct {
	Name  string
	Value string
}

// Request is what is to be signed and sent. Body is shared and must not be changed.
type Request struct {
	// MessageID is the webhook-id: the same on every attempt at every subscription.
	MessageID string
	// EventType is the type of the event, as published; of a batch, what all its events have in common, or empty.
	EventType string
	// Created is the host's time of this attempt; signers use it instead of a clock.
	Created time.Time
	// Nonce is 16 random bytes from the host; signers use it instead of a source of randomness.
	Nonce []byte
	// Method and URL come from the subscription; a signer may have changed the query.
	Method string
	URL    string
	// Headers in the order they are to be sent.
	Headers []Header
	Body    []byte
	// AttemptNumber is 1 for the first.
	AttemptNumber int
	// Traceparent is the W3C trace context to send, or empty; Tracestate what goes with it. Signers do not sign it.
	Traceparent, Tracestate string
	// MaxResponseBody is how much of a response's body the host keeps.
	MaxResponseBody int
	// Batch says that Body holds several events. The answer may name those that were not taken, in its body or in headers
	// webhook-failed-ids: both matter whatever the status, and are worth waiting for. Set only for kinds with the option
	// Batches.
	Batch bool
	// OwnershipCheck asks a transport to find out whether the receiver wants to be delivered to, in the way
	// its config says, instead of delivering; body and event headers are empty. A 2xx Response says yes, or
	// that the config asks for no check. Set only for kinds with the option OwnershipCheck.
	OwnershipCheck bool

	// Timings are for a transport to fill in, as far as it measures them.
	Timings Timings

	// base is how many headers were there before signers and transport added theirs.
	base int
}

// Timings are the parts of the time that an attempt took at its transport, one after the other; zero is a part that it did
// not have, or that nobody has measured. One that sends more than once adds up.
type Timings struct {
	// DNS, Connect and TLS are of a connection that was made for the attempt.
	DNS, Connect, TLS time.Duration
	// FirstByte is from when there was a connection to the first byte of the answer, or to the end of waiting for it; Body
	// from then until all was read that is.
	FirstByte, Body time.Duration
}

// Get returns the first value of the header, or "" when there is none. The name is compared without
// regard to case.
func (r *Request) Get(name string) string {
	for i := range r.Headers {
		if equalFold(r.Headers[i].Name, name) {
			return r.Headers[i].Value
		}
	}
	return ""
}

// Set replaces the header's values by one, or appends it.
func (r *Request) Set(name, value string) {
	for i := range r.Headers {
		if equalFold(r.Headers[i].Name, name) {
			r.Headers[i].Value = value
			r.deleteFrom(i+1, name)
			return
		}
	}
	r.Add(name, value)
}

// Add appends a value to the header.
func (r *Request) Add(name, value string) {
	r.Headers = append(r.Headers, Header{Name: lower(name), Value: value})
}

func (r *Request) deleteFrom(from int, name string) {
	for i := from; i < len(r.Headers); {
		if !equalFold(r.Headers[i].Name, name) {
			i++
			continue
		}
		r.Headers = append(r.Headers[:i], r.Headers[i+1:]...)
		if i < r.base {
			r.base--
		}
	}
}

// equalFold spares the general comparison where lengths differ or the names are one and the same,
// which is nearly always.
func equalFold(a, b string) bool {
	return len(a) == len(b) && (a == b || strings.EqualFold(a, b))
}

func lower(s string) string {
	for i := range len(s) {
		if c := s[i]; 'A' <= c && c <= 'Z' {
			return strings.ToLower(s)
		}
	}
	return s
}

// Response is the receiver's answer. Transports other than HTTP map theirs onto HTTP's status codes.
type Response struct {
	Status int
	// Headers matter only when the status is not 2xx; retry-after always, and webhook-failed-ids where Request.Batch is set.
	Headers []Header
	// Body is the start of the body, Request.MaxResponseBody bytes at most.
	Body []byte
	// Truncated says that there was more.
	Truncated bool
	// Note says what was wrong behind the status, for people; empty when nothing was.
	Note string
	// Peer is the host:port connected to, when known.
	Peer string
}

// Source says whose fault a failure is. The numbers are those of grapnel.plugin.v1.Failure.Source.
type Source int

// Sources of failure.
const (
	// SourceEndpoint is the receiver or the way to it; it counts against the subscription.
	SourceEndpoint Source = 1
	// SourcePlugin is the plugin itself; it never counts against the subscription.
	SourcePlugin Source = 2
	// SourcePolicy is a refusal: egress denied, body too large.
	SourcePolicy Source = 3
	// SourceConfig is an instance that has to be configured again.
	SourceConfig Source = 4
)

// WireState says what may have reached the receiver. The numbers are those of
// grapnel.plugin.v1.Failure.WireState.
type WireState int

// Wire states; the zero value is read as MaybeSent.
const (
	NotSent   WireState = 1
	MaybeSent WireState = 2
	Sent      WireState = 3
)

// Codes of Failure that the host knows.
const (
	CodeDNS       = "dns"
	CodeConnect   = "connect"
	CodeTLS       = "tls"
	CodeTimeout   = "timeout"
	CodeReset     = "reset"
	CodeProtocol  = "protocol"
	CodeEgress    = "egress"
	CodeCancelled = "cancelled"
	CodeSign      = "sign"
	CodeTransform = "transform"
	CodeConfig    = "config"
	CodePanic     = "panic"
	// CodeShortage goes with SourcePlugin and NotSent: this machine has no descriptor, socket or memory left for
	// the attempt. It is nobody's fault but the machine's, and says that fewer attempts fit.
	CodeShortage = "shortage"
)

// Failure is an attempt that got no answer. Message is for people: no secret, no internal address.
type Failure struct {
	Source    Source
	Code      string
	Message   string
	WireState WireState
	// Peer is the host:port connected to, when known.
	Peer string
}

// Error is the code and the message.
func (f *Failure) Error() string {
	if f.Message == "" {
		return f.Code
	}
	return fmt.Sprintf("%s: %s", f.Code, f.Message)
}

// Target is where an instance's requests go, and what the host says about sending them.
type Target struct {
	Method  string
	URL     string
	Headers []Header
	// MaxInFlight is the most attempts the host will have in flight for the instance.
	MaxInFlight int
	// Egress says which addresses may be dialled; never nil.
	Egress *Egress
	// UserAgent is for the user-agent header.
	UserAgent string

	life *life
}

// Problem is one complaint about a config, returned by the function given to Check.
type Problem struct {
	// Pointer is an RFC 6901 pointer: /config/…, /secrets/SLOT or /target/uri; empty means the whole.
	Pointer string
	// Code is stable and for machines; empty means config.invalid.
	Code string
	// Summary says what is wrong, what was given and what would be right. Never a secret's value.
	Summary string
	// Warning marks what works but looks wrong.
	Warning bool
}
