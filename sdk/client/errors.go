package client

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Errors of the server, to be tested with errors.Is against any error of this package.
var (
	// ErrNotFound: the resource does not exist, or not any more.
	ErrNotFound = reasonError("RESOURCE_NOT_FOUND")
	// ErrExists: the name is taken.
	ErrExists = reasonError("RESOURCE_EXISTS")
	// ErrEventIDConflict: the event ID was used before with other content.
	ErrEventIDConflict = reasonError("EVENT_ID_CONFLICT")
	// ErrEtagMismatch: the resource changed since it was read; read it again and redo.
	ErrEtagMismatch = reasonError("ETAG_MISMATCH")
	// ErrInvalidField: the request is wrong; Error.Violations names every field.
	ErrInvalidField = reasonError("INVALID_FIELD")
	// ErrSchemaMismatch: an event's payload is not what the schema of its type allows; Error.Violations names each place,
	// with a JSON Pointer behind event.payload.
	ErrSchemaMismatch = reasonError("SCHEMA_MISMATCH")
	// ErrEventTypeNotRegistered: the namespace wants types of events registered.
	ErrEventTypeNotRegistered = reasonError("EVENT_TYPE_NOT_REGISTERED")
	// ErrInvalidFilter: a list's filter did not parse or names an unknown field.
	ErrInvalidFilter = reasonError("INVALID_FILTER")
	// ErrInvalidPageToken: a page token is malformed or belongs to another query.
	ErrInvalidPageToken = reasonError("INVALID_PAGE_TOKEN")
	// ErrInUse: something still refers to the resource.
	ErrInUse = reasonError("RESOURCE_IN_USE")
	// ErrInvalidState: the resource is not in a state that allows the call.
	ErrInvalidState = reasonError("INVALID_STATE")
	// ErrPayloadPurged: the payload of the event has been purged, and nothing of it can be sent again.
	ErrPayloadPurged = reasonError("PAYLOAD_PURGED")
	// ErrQuotaExceeded: a limit of the namespace is reached; waiting does not help.
	ErrQuotaExceeded = reasonError("QUOTA_EXCEEDED")
	// ErrRateLimited: too fast; Error.RetryAfter says how long to wait.
	ErrRateLimited = reasonError("RATE_LIMITED")
	// ErrStoreFull: the server's disk is nearly full; events are refused until there is room.
	ErrStoreFull = reasonError("STORE_FULL")
	// ErrDraining: the server is about to stop; retry reaches another one, or the same one later.
	ErrDraining = reasonError("DRAINING")
	// ErrPluginUnavailable: the plugin is absent, disabled or unhealthy.
	ErrPluginUnavailable = reasonError("PLUGIN_UNAVAILABLE")
	// ErrOwnershipRefused: the target was asked whether it wants deliveries and did not say yes.
	ErrOwnershipRefused = reasonError("OWNERSHIP_REFUSED")
	// ErrMessageTooLarge: the request or the answer is larger than a message may be, 4 MiB.
	ErrMessageTooLarge = reasonError("MESSAGE_TOO_LARGE")
	// ErrResumeTokenExpired: what has changed since the token is not kept any more; list what there is, and watch anew.
	ErrResumeTokenExpired = reasonError("RESUME_TOKEN_EXPIRED")
	// ErrSlowConsumer: who watches has not read for a while; a watch of this package goes on by itself.
	ErrSlowConsumer = reasonError("SLOW_CONSUMER")
	// ErrDataDamaged: what is stored of the resource cannot be read; it can be created again.
	ErrDataDamaged = reasonError("DATA_DAMAGED")
	// ErrUnauthenticated: credentials are missing or wrong.
	ErrUnauthenticated = codeError(codes.Unauthenticated)
	// ErrPermissionDenied: the credentials do not allow the call.
	ErrPermissionDenied = codeError(codes.PermissionDenied)
	// ErrUnavailable: any UNAVAILABLE, whatever its reason, such as no server within reach.
	ErrUnavailable = codeError(codes.Unavailable)
)

// Errors of this package itself.
var (
	// ErrClosed: the client or the publisher was closed.
	ErrClosed = errors.New("closed")
	// ErrBufferFull: a publisher with Refuse has no room for the event.
	ErrBufferFull = errors.New("the publisher's buffer is full")
)

// Error is an answer of the server other than OK, or the lack of one.
type Error struct {
	// Code is the gRPC status code.
	Code codes.Code
	// Reason is a value name of grapnelv1.ErrorReason without its prefix, such as ETAG_MISMATCH. Empty
	// when the error does not come from Grapnel's own code, for example when no server was reached.
	Reason string
	// Message is English text for people.
	Message string
	// Metadata holds what is dynamic in Message, such as currentEtag. May be nil.
	Metadata map[string]string
	// Violations are all faults of a wrong request.
	Violations []Violation
	// RetryAfter is how long the server asks to wait; 0 when it does not say.
	RetryAfter time.Duration
	// RequestID finds the request in the server's log. Often empty.
	RequestID string

	status *status.Status
	// lost is set when an earlier try of the same publish may have stored it.
	lost bool
}

func newError(code codes.Code, message string) *Error {
	return &Error{Code: code, Message: message, status: status.New(code, message)}
}

// Violation is one fault of a request.
type Violation struct {
	// Field is the path in the request, in proto names, such as subscription.event_types[1]; or the
	// subject of a failed precondition or quota.
	Field string
	// Description says in words what is wrong.
	Description string
	// Reason is the rule that was broken, or empty.
	Reason string
}

// Error returns the message, every violation that the message does not show already, and the reason.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Message)
	if e.Message == "" {
		b.WriteString("no message")
	}
	for _, v := range e.Violations {
		if strings.Contains(e.Message, v.Description) {
			continue
		}
		fmt.Fprintf(&b, "; %s: %s", v.Field, v.Description)
	}
	name := e.Reason
	if name == "" {
		name = CodeName(e.Code)
	}
	fmt.Fprintf(&b, " (%s)", name)
	return b.String()
}

// Unwrap returns the gRPC status as an error.
func (e *Error) Unwrap() error { return e.status.Err() }

// GRPCStatus lets status.FromError and status.Code see through the error.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Is reports whether target is the sentinel for this error's reason or code. A call that ended because
// its context did also is context.DeadlineExceeded or context.Canceled.
func (e *Error) Is(target error) bool {
	switch t := target.(type) {
	case reasonError:
		return e.Reason == string(t)
	case codeError:
		return e.Code == codes.Code(t)
	}
	switch e.Code {
	case codes.DeadlineExceeded:
		return target == context.DeadlineExceeded
	case codes.Canceled:
		return target == context.Canceled
	}
	return false
}

// Retryable reports whether sending the same request again may succeed, given that it is idempotent as
// publishing with an ID is. It never is for a quota, a conflict or a wrong request.
func (e *Error) Retryable() bool {
	switch e.Code {
	case codes.Unavailable, codes.DeadlineExceeded:
		return true
	case codes.ResourceExhausted:
		// Without a reason or a wait it may be a message that is too large, which stays so.
		return !e.Is(ErrQuotaExceeded) && !e.Is(ErrMessageTooLarge) && (e.RetryAfter > 0 || e.Reason != "")
	}
	return false
}

type reasonError string

func (e reasonError) Error() string {
	return strings.ToLower(strings.ReplaceAll(string(e), "_", " "))
}

type codeError codes.Code

func (e codeError) Error() string {
	return strings.ToLower(strings.ReplaceAll(CodeName(codes.Code(e)), "_", " "))
}

// CodeName is the canonical name of a code, such as INVALID_ARGUMENT.
func CodeName(c codes.Code) string {
	if c == codes.Canceled {
		return "CANCELLED"
	}
	var b strings.Builder
	for i, r := range c.String() {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	if c == codes.OK {
		return "OK"
	}
	return strings.ToUpper(b.String())
}

// FromError returns err as *Error: nil for nil, err's own when it is or wraps one, and otherwise one
// made from its gRPC status (UNKNOWN when it has none). Calls through Client return *Error already.
func FromError(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	// The innermost status: gRPC wraps the last answer into one about its retries.
	var answer interface{ GRPCStatus() *status.Status }
	st := status.FromContextError(err)
	if errors.As(err, &answer) {
		st = answer.GRPCStatus()
	}
	e = &Error{Code: st.Code(), Message: st.Message(), status: st}
	for _, detail := range st.Details() {
		e.add(detail)
	}
	return e
}

func (e *Error) add(detail any) {
	switch d := detail.(type) {
	case *errdetails.ErrorInfo:
		if d.GetDomain() == "grapnel" {
			e.Reason, e.Metadata = d.GetReason(), maps.Clone(d.GetMetadata())
		}
	case *errdetails.BadRequest:
		for _, v := range d.GetFieldViolations() {
			e.Violations = append(e.Violations, Violation{v.GetField(), v.GetDescription(), v.GetReason()})
		}
	case *errdetails.PreconditionFailure:
		for _, v := range d.GetViolations() {
			e.Violations = append(e.Violations, Violation{v.GetSubject(), v.GetDescription(), v.GetType()})
		}
	case *errdetails.QuotaFailure:
		for _, v := range d.GetViolations() {
			e.Violations = append(e.Violations, Violation{v.GetSubject(), v.GetDescription(), v.GetQuotaMetric()})
		}
	case *errdetails.RetryInfo:
		e.RetryAfter = d.GetRetryDelay().AsDuration()
	case *errdetails.RequestInfo:
		e.RequestID = d.GetRequestId()
	}
}

// itemError turns the outcome of one element of a batch or stream into an error.
func itemError(s *grapnelv1.ItemStatus) *Error {
	var code codes.Code
	if err := code.UnmarshalJSON([]byte(strconv.Quote(s.GetCode()))); err != nil || code == codes.OK {
		code = codes.Unknown
	}
	e := newError(code, s.GetMessage())
	e.Reason = s.GetReason()
	e.RetryAfter = max(s.GetRetryDelay().AsDuration(), 0)
	if s.GetField() != "" {
		e.Violations = slices.Insert(e.Violations, 0, Violation{Field: s.GetField(), Description: s.GetMessage()})
	}
	return e
}
