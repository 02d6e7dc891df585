package client

import (
	"context"
	"errors"
	"fmt"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// What is known about an event whose publishing ended in an error, to be tested with errors.Is.
var (
	// ErrNotStored: the event is not stored. It may be published again, also under another ID.
	ErrNotStored = errors.New("not stored")
	// ErrMaybeStored: the event was sent, and no answer says what became of it. Publish it again with the
	// same ID to find out; under another ID it might be stored twice.
	ErrMaybeStored = errors.New("it may be stored all the same")
)

// PublishError is why an event is not known to be stored. It is ErrNotStored or ErrMaybeStored, and
// everything that Err is.
type PublishError struct {
	// ID is the event's, also when it was made by this package.
	ID string
	// MaybeStored tells ErrMaybeStored from ErrNotStored.
	MaybeStored bool
	// Err is the cause: an *Error of the server, ErrBufferFull, ErrClosed, or the context's error.
	Err error
}

// Error returns the cause, and that the event may be stored if so.
func (e *PublishError) Error() string {
	if e.MaybeStored {
		return fmt.Sprintf("%v; %v", e.Err, ErrMaybeStored)
	}
	return e.Err.Error()
}

// Unwrap returns the cause.
func (e *PublishError) Unwrap() error { return e.Err }

// Is reports whether target is what is known about the event.
func (e *PublishError) Is(target error) bool {
	if e.MaybeStored {
		return target == ErrMaybeStored
	}
	return target == ErrNotStored
}

// verdict is what an error of a try means for what was sent.
type verdict int

const (
	refused  verdict = iota // not stored, nor would it be next time
	deferred                // not stored now; waiting helps
	lost                    // nothing is known; the same call may well get through
	odd                     // nothing is known; something is wrong with the call, the server or what lies between
)

// known reports whether the try stored nothing.
func (v verdict) known() bool { return v <= deferred }

func verdictOf(e *Error) verdict {
	switch e.Code {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied, codes.Unauthenticated,
		codes.FailedPrecondition, codes.OutOfRange, codes.Unimplemented:
		return refused
	case codes.Unavailable:
		if e.Reason != "" {
			return deferred // an answer of Grapnel's own; without one the connection may have broken at any time
		}
		return lost
	case codes.DeadlineExceeded, codes.Canceled, codes.Aborted:
		return lost
	case codes.ResourceExhausted:
		switch {
		case errors.Is(e, ErrQuotaExceeded), errors.Is(e, ErrMessageTooLarge):
			return refused
		case e.Retryable():
			return deferred
		}
		return odd // gRPC's own: a message that was too large, perhaps the answer
	}
	return odd
}

// aboutAll reports whether a refusal is about the namespace, the caller or the server, and so about every
// event of a call alike.
func aboutAll(e *Error) bool {
	switch e.Code {
	case codes.NotFound, codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition, codes.Unimplemented:
		return true
	case codes.ResourceExhausted:
		return errors.Is(e, ErrQuotaExceeded)
	}
	return false
}

// maxFrame is the largest message that a server reads, 4 MiB, less what surrounds an event in it.
const maxFrame = 4<<20 - 1<<10

// maxParent is more than any name of a namespace.
const maxParent = 256

// maxDepth is how deep a payload given as JSON may nest: gRPC's peers in Go give up at 10 000 messages.
const maxDepth = 10_000 - 8

// check returns why an event could not be sent to its namespace or read there at all, as the refusal that it
// would be; nil when it can. Everything else is the server's to judge. buffer is overwritten and returned,
// perhaps grown.
func check(parent string, e *grapnelv1.Event, buffer []byte) ([]byte, *Error) {
	switch {
	case !utf8.ValidString(parent) || len(parent) > maxParent:
		return buffer, invalid("parent", "must look like namespaces/NAME", "namespace_name")
	case e == nil:
		return buffer, invalidEvent("", "is required", "required")
	}
	size := proto.Size(e)
	if size > maxFrame {
		return buffer, invalidEvent("", fmt.Sprintf("is %d bytes in all; a message takes at most %d", size, maxFrame), "event_bytes")
	}
	wire, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(buffer[:0], e)
	if err != nil {
		if field := invalidText(e.ProtoReflect()); field != "" {
			return buffer, invalidEvent(field, "must be valid UTF-8", "utf8")
		}
		return buffer, invalidEvent("", "cannot be encoded: "+err.Error(), "encoding")
	}
	if e.GetJson() != nil {
		if err := (proto.UnmarshalOptions{RecursionLimit: maxDepth}).Unmarshal(wire, &grapnelv1.Event{}); err != nil {
			return wire, invalidEvent("json", "cannot be read back: "+err.Error(), "encoding")
		}
	}
	return wire, nil
}

func invalidEvent(field, description, rule string) *Error {
	path := "event"
	if field != "" {
		path += "." + field
	}
	return invalid(path, description, rule)
}

func invalid(path, description, rule string) *Error {
	e := newError(codes.InvalidArgument, path+": "+description)
	e.Reason = string(ErrInvalidField)
	e.Violations = []Violation{{Field: path, Description: description, Reason: rule}}
	return e
}

// invalidText names the first field of an event whose text is not UTF-8; empty when there is none.
func invalidText(m protoreflect.Message) (field string) {
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				if !utf8.ValidString(k.String()) || fd.MapValue().Kind() == protoreflect.StringKind && !utf8.ValidString(v.String()) {
					field = string(fd.Name())
				}
				return field == ""
			})
		case fd.Kind() == protoreflect.StringKind && !fd.IsList() && !utf8.ValidString(v.String()):
			field = string(fd.Name())
		}
		return field == ""
	})
	if field == "" && m.Has(m.Descriptor().Fields().ByName("json")) {
		field = "json"
	}
	return field
}

// Publish publishes one event to a namespace and returns when it is stored durably. It repeats what may be
// repeated, always with the same ID, so that the event is accepted once. The error is a *PublishError, which
// says whether the event may be stored all the same.
func (c *Client) Publish(ctx context.Context, namespace string, e Event) (*grapnelv1.PublishResponse, error) {
	event := e.proto()
	parent := namespaceName(namespace)
	if _, err := check(parent, event, nil); err != nil {
		return nil, &PublishError{ID: event.GetId(), Err: err}
	}
	r, err := c.PublishService().Publish(ctx, &grapnelv1.PublishRequest{Parent: parent, Event: event})
	if err != nil {
		cause := FromError(err)
		return nil, &PublishError{ID: event.GetId(), MaybeStored: cause.lost || !verdictOf(cause).known(), Err: cause}
	}
	return r, nil
}
