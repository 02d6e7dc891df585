package api

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
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/eventtype"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
)

// errorDomain is google.rpc.ErrorInfo.domain of every error.
const errorDomain = "grapnel"

// Errors that adapters of the Plugins interface return.
var (
	ErrPluginUnavailable = errors.New("plugin is not serving")
	ErrUnknownPlugin     = errors.New("no such plugin")
)

// ErrConfigFull is returned by Options.Room when the configuration store has no room of its own left.
var ErrConfigFull = errors.New("the configuration store is full")

// Error is a refusal as the caller sees it. Its text, metadata and details are made for outsiders; the
// cause is for the log alone.
type Error struct {
	code     codes.Code
	reason   grapnelv1.ErrorReason
	message  string
	metadata map[string]string
	details  []protoadapt.MessageV1
	retry    time.Duration
	// field of the request that is at fault, when there is one.
	field string
	cause error
}

func (e *Error) Error() string { return e.message }

// Unwrap returns the cause, which is not shown to callers.
func (e *Error) Unwrap() error { return e.cause }

// Reason is the value name of ErrorReason without its prefix.
func (e *Error) Reason() string { return reasonText(e.reason) }

// pushback is what grpc's clients obey beside their own retry policy: milliseconds to wait, a negative
// number to forbid a retry, empty for neither.
func (e *Error) pushback() string {
	switch {
	case e.retry > 0:
		return strconv.FormatInt(max(1, e.retry.Milliseconds()), 10)
	case e.code == codes.ResourceExhausted:
		return "-1" // waiting does not lift a quota
	}
	return ""
}

// GRPCStatus makes Error an error of grpc's status package, bounded for trailers.
func (e *Error) GRPCStatus() *status.Status { return e.bounded() }

// item is the error of one element of a batch or a stream.
func (e *Error) item() *grapnelv1.ItemStatus {
	item := &grapnelv1.ItemStatus{
		Code:      codeName(e.code),
		Reason:    e.Reason(),
		Message:   e.message,
		Field:     e.field,
		Retryable: e.retry > 0 || e.code == codes.Unavailable || e.code == codes.Internal,
	}
	if e.retry > 0 {
		item.RetryDelay = durationpb.New(e.retry)
	}
	return item
}

// codeName is the code's name; that of nil is OK.
func (e *Error) codeName() string {
	if e == nil {
		return codeName(codes.OK)
	}
	return codeName(e.code)
}

// codeName is the name of a code as google.rpc.Code spells it.
func codeName(c codes.Code) string {
	switch c {
	case codes.OK:
		return "OK"
	case codes.Canceled:
		return "CANCELLED"
	}
	var b strings.Builder
	for i, r := range c.String() {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToUpper(b.String())
}

func reasonText(r grapnelv1.ErrorReason) string {
	return strings.TrimPrefix(r.String(), "ERROR_REASON_")
}

// Violation is one fault of a request: the field's proto path, what is wrong with it in words, and the
// rule's id.
type Violation struct {
	Field       string
	Description string
	Reason      string
}

// invalid refuses a request for its fields; all violations are told at once, as far as trailers carry them.
func invalid(faults ...Violation) *Error { return invalidAnd(0, faults...) }

// invalidAnd is invalid of these faults and as many more that nobody has written down.
func invalidAnd(unwritten int, faults ...Violation) *Error {
	bad := &errdetails.BadRequest{}
	told, said := tellable(faults)
	texts := make([]string, 0, said)
	for i, f := range told {
		f.Field, f.Description = strings.ToValidUTF8(f.Field, "\uFFFD"), strings.ToValidUTF8(f.Description, "\uFFFD")
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
			Field: f.Field, Description: f.Description, Reason: f.Reason,
		})
		text := f.Description
		if f.Field != "" {
			text = f.Field + ": " + f.Description
		}
		if i < said {
			texts = append(texts, text)
		}
	}
	e := &Error{
		code:    codes.InvalidArgument,
		reason:  grapnelv1.ErrorReason_ERROR_REASON_INVALID_FIELD,
		message: andMore(texts, len(faults)-said+unwritten),
		details: []protoadapt.MessageV1{bad},
	}
	if len(bad.GetFieldViolations()) > 0 {
		e.field = bad.GetFieldViolations()[0].GetField()
		e.metadata = map[string]string{"field": e.field}
	}
	return e
}

// schemaMismatch refuses an event for what its payload breaks of its type's schema. at stands before the fields of the event:
// "event." or nothing.
func schemaMismatch(at string, bad *eventtype.MismatchError) *Error {
	faults := make([]Violation, len(bad.Faults))
	for i, f := range bad.Faults {
		faults[i] = Violation{at + bad.Field + f.Pointer, f.Description, "schema." + f.Keyword}
	}
	e := invalidAnd(bad.More, faults...)
	e.reason = grapnelv1.ErrorReason_ERROR_REASON_SCHEMA_MISMATCH
	e.metadata["eventType"], e.metadata["schemaVersion"] = bad.Type, bad.Version
	return e
}

// unregistered refuses an event for its type; at is as for schemaMismatch.
func unregistered(at string, bad *ingest.UnregisteredError) *Error {
	e := invalid(Violation{at + "type", bad.Error(), "event_type.registered"})
	e.reason = grapnelv1.ErrorReason_ERROR_REASON_EVENT_TYPE_NOT_REGISTERED
	return e
}

// filterError refuses a filter: offset is the byte at which it went wrong, fields are those that exist.
func filterError(message string, offset int, fields []string) *Error {
	return &Error{
		code:    codes.InvalidArgument,
		reason:  grapnelv1.ErrorReason_ERROR_REASON_INVALID_FILTER,
		message: "filter: " + message,
		metadata: map[string]string{
			"field":  "filter",
			"offset": strconv.Itoa(offset),
			"fields": strings.Join(fields, ","),
		},
		field: "filter",
		details: []protoadapt.MessageV1{&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: "filter", Description: message, Reason: "filter"},
		}}},
	}
}

// pageTokenError refuses a page token.
func pageTokenError(message string) *Error {
	return &Error{
		code:     codes.InvalidArgument,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_INVALID_PAGE_TOKEN,
		message:  "page_token: " + message,
		metadata: map[string]string{"field": "page_token"},
		field:    "page_token",
		details: []protoadapt.MessageV1{&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: "page_token", Description: message, Reason: "page_token"},
		}}},
	}
}

// notFound says that a resource is not there. what is the noun for people, for example "subscription".
func notFound(name, what string) *Error {
	return &Error{
		code:     codes.NotFound,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_RESOURCE_NOT_FOUND,
		message:  what + " " + name + " does not exist",
		metadata: map[string]string{"resource": name},
		details:  []protoadapt.MessageV1{&errdetails.ResourceInfo{ResourceType: typeOf(name), ResourceName: name}},
	}
}

// absent says of a resource that is not known that it does not exist, or, when its name is among those that are broken, that
// it cannot be read.
func absent(name string, broken []string) *Error {
	if slices.Contains(broken, name) {
		return damaged(name, nil)
	}
	return notFound(name, noun(name))
}

// nameInKey is the name of a resource as the end of its key in etcd, or else other.
func nameInKey(key, other string) string {
	if i := strings.Index(key, "namespaces/"); i >= 0 {
		return key[i:]
	}
	return other
}

// damaged says that what is stored of a resource cannot be read; the log has the cause.
func damaged(name string, cause error) *Error {
	return &Error{
		code:     codes.DataLoss,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_DATA_DAMAGED,
		message:  "what is stored of " + noun(name) + " " + name + " is damaged and cannot be read: create it again, or restore etcd from a backup",
		metadata: map[string]string{"resource": name},
		details:  []protoadapt.MessageV1{&errdetails.ResourceInfo{ResourceType: typeOf(name), ResourceName: name}},
		cause:    cause,
	}
}

// exists says that a resource is already there.
func exists(name, what string) *Error {
	return &Error{
		code:     codes.AlreadyExists,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_RESOURCE_EXISTS,
		message:  what + " " + name + " exists already",
		metadata: map[string]string{"resource": name},
		details:  []protoadapt.MessageV1{&errdetails.ResourceInfo{ResourceType: typeOf(name), ResourceName: name}},
	}
}

// eventConflict says that the id of an event was used before for other content.
func eventConflict(name string) *Error {
	return &Error{
		code:     codes.AlreadyExists,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_EVENT_ID_CONFLICT,
		message:  "event " + name + " was published before with other content; a retry must be the same, another event needs another id",
		metadata: map[string]string{"resource": name},
		field:    "id",
		details:  []protoadapt.MessageV1{&errdetails.ResourceInfo{ResourceType: typeOf(name), ResourceName: name}},
	}
}

// etagMismatch says that the resource changed since it was read.
func etagMismatch(current string) *Error {
	return &Error{
		code:     codes.Aborted,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_ETAG_MISMATCH,
		message:  "the resource has changed since it was read; read it again and repeat the change",
		metadata: map[string]string{"currentEtag": current},
	}
}

// inUse says who still refers to the resource.
func inUse(name string, users []string) *Error {
	const most = 10
	failure := &errdetails.PreconditionFailure{}
	for _, u := range users[:min(len(users), most)] {
		failure.Violations = append(failure.Violations, &errdetails.PreconditionFailure_Violation{
			Type: "IN_USE", Subject: u, Description: u + " refers to " + name,
		})
	}
	message := name + " is in use"
	if len(users) > 0 {
		message += " by " + strings.Join(users[:min(len(users), most)], ", ")
	}
	if len(users) > most {
		message += " and " + strconv.Itoa(len(users)-most) + " more"
	}
	return &Error{
		code:     codes.FailedPrecondition,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_RESOURCE_IN_USE,
		message:  message,
		metadata: map[string]string{"resource": name, "users": strconv.Itoa(len(users))},
		details:  []protoadapt.MessageV1{failure},
	}
}

// invalidState says that the resource is not in a state that allows the call.
func invalidState(name, message string) *Error {
	return &Error{
		code:     codes.FailedPrecondition,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_INVALID_STATE,
		message:  message,
		metadata: map[string]string{"resource": name},
		details: []protoadapt.MessageV1{&errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{
			{Type: "STATE", Subject: name, Description: message},
		}}},
	}
}

// payloadPurged says that nothing of the event can be sent again.
func payloadPurged(name string) *Error {
	e := invalidState(name, "the payload of its event has been purged, and cannot be sent again")
	e.reason = grapnelv1.ErrorReason_ERROR_REASON_PAYLOAD_PURGED
	return e
}

// quota says that a limit is reached which waiting a little does not lift.
func quota(subject, description string) *Error {
	return &Error{
		code:     codes.ResourceExhausted,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_QUOTA_EXCEEDED,
		message:  description,
		metadata: map[string]string{"subject": subject},
		details: []protoadapt.MessageV1{&errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{
			{Subject: subject, Description: description},
		}}},
	}
}

// rateLimited says that the same call may succeed after the wait.
func rateLimited(subject, description string, retryAfter time.Duration) *Error {
	e := quota(subject, description)
	e.reason = grapnelv1.ErrorReason_ERROR_REASON_RATE_LIMITED
	return e.after(retryAfter)
}

// unavailable says that the server cannot serve the call just now.
func unavailable(reason grapnelv1.ErrorReason, message string, retryAfter time.Duration) *Error {
	return (&Error{code: codes.Unavailable, reason: reason, message: message}).after(retryAfter)
}

// pluginUnavailable says that the plugin a resource needs is not serving.
func pluginUnavailable(name, message string) *Error {
	return &Error{
		code:     codes.FailedPrecondition,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_PLUGIN_UNAVAILABLE,
		message:  message,
		metadata: map[string]string{"resource": name},
		details: []protoadapt.MessageV1{&errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{
			{Type: "PLUGIN", Subject: name, Description: message},
		}}},
	}
}

// ownershipRefused says that a target was asked whether it wants deliveries and did not say yes. answer is
// what came back, code the protocol's status or 0.
func ownershipRefused(name, answer string, code int) *Error {
	const field = "subscription.uri"
	description := "the receiver was asked whether it wants deliveries and did not agree: " + answer
	e := &Error{
		code:     codes.FailedPrecondition,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_OWNERSHIP_REFUSED,
		message:  field + ": " + description,
		metadata: map[string]string{"resource": name},
		field:    field,
		details: []protoadapt.MessageV1{&errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{
			{Type: "OWNERSHIP", Subject: field, Description: description},
		}}},
	}
	if code != 0 {
		e.metadata["responseCode"] = strconv.Itoa(code)
	}
	return e
}

// internal hides its cause behind neutral words; the interceptor logs it and adds the request id.
func internal(cause error) *Error {
	return &Error{
		code:    codes.Internal,
		reason:  grapnelv1.ErrorReason_ERROR_REASON_INTERNAL,
		message: "internal error; the server's log has the cause under the request id",
		cause:   cause,
	}
}

// unknownMethod answers calls of methods that are not served.
func unknownMethod(method string) *Error {
	return &Error{
		code:     codes.Unimplemented,
		reason:   grapnelv1.ErrorReason_ERROR_REASON_UNKNOWN_METHOD,
		message:  "this server does not serve " + method,
		metadata: map[string]string{"method": method},
	}
}

func abandoned(code codes.Code, message string, cause error) *Error {
	return &Error{code: code, reason: grapnelv1.ErrorReason_ERROR_REASON_ABANDONED, message: message, cause: cause}
}

// after adds RetryInfo.
func (e *Error) after(d time.Duration) *Error {
	if d <= 0 {
		d = time.Second
	}
	e.retry = d
	e.details = append(e.details, &errdetails.RetryInfo{RetryDelay: durationpb.New(d)})
	return e
}

// withRequest adds RequestInfo to an internal error.
func (e *Error) withRequest(id string) *Error {
	if e.code != codes.Internal {
		return e
	}
	c := *e
	c.metadata = maps.Clone(e.metadata)
	c.details = append(c.details[:len(c.details):len(c.details)], &errdetails.RequestInfo{RequestId: id})
	return &c
}

// serverFault reports whether an operator should look at the error.
func (e *Error) serverFault() bool { return e.code == codes.Internal }

// toStatus turns any error into the one that the caller sees. resource is the name the request was about;
// errors that say "not found" without saying what take it. nil stays nil.
func toStatus(err error, resource string) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	for _, translate := range []func(error, string) *Error{fromContext, fromStore, fromDelivery, fromIngest, fromPlugin} {
		if e := translate(err, resource); e != nil {
			e.cause = err
			return e
		}
	}
	return internal(err)
}

// fromReceive is toStatus for what reading a message of a caller says. What grpc itself refuses it has answered
// already, without our details; log and metrics get them.
func fromReceive(err error) *Error {
	if own, ok := errors.AsType[*Error](err); ok {
		return own
	}
	switch status.Code(err) {
	case codes.ResourceExhausted:
		e := messageTooLarge("the message", 0)
		e.message, e.metadata = status.Convert(err).Message(), nil
		return e
	case codes.Internal, codes.Unimplemented:
		return unreadable(err)
	case codes.Unavailable:
		return abandoned(codes.Canceled, "the connection broke", err)
	}
	return toStatus(err, "")
}

// fromStatus is toStatus for the services of grpc itself, health and reflection, which make statuses of
// their own.
func fromStatus(err error) *Error {
	st, ok := status.FromError(err)
	if !ok {
		return toStatus(err, "")
	}
	e := &Error{code: st.Code(), message: st.Message(), cause: err}
	switch st.Code() {
	case codes.OK:
		return nil
	case codes.NotFound:
		e.reason = grapnelv1.ErrorReason_ERROR_REASON_RESOURCE_NOT_FOUND
	case codes.InvalidArgument:
		e.reason = grapnelv1.ErrorReason_ERROR_REASON_INVALID_FIELD
	case codes.Unimplemented:
		e.reason = grapnelv1.ErrorReason_ERROR_REASON_UNKNOWN_METHOD
	case codes.Canceled, codes.DeadlineExceeded:
		e.reason = grapnelv1.ErrorReason_ERROR_REASON_ABANDONED
	case codes.Unavailable:
		e.reason = grapnelv1.ErrorReason_ERROR_REASON_DRAINING
	case codes.ResourceExhausted:
		e.reason = grapnelv1.ErrorReason_ERROR_REASON_RATE_LIMITED
	default:
		e.reason = grapnelv1.ErrorReason_ERROR_REASON_INTERNAL
	}
	if own, ok := errors.AsType[*Error](err); ok {
		return own
	}
	return e
}

func fromContext(err error, _ string) *Error {
	switch {
	case errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded:
		return abandoned(codes.DeadlineExceeded, "the call's deadline passed before there was an answer; what it asked for may or may not have happened", err)
	case errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled:
		return abandoned(codes.Canceled, "the caller gave up before there was an answer; what it asked for may or may not have happened", err)
	}
	return nil
}

// fromStore maps the errors of subscription, secret and eventtype, which share their words.
func fromStore(err error, resource string) *Error {
	if e, ok := errors.AsType[*subscription.InvalidError](err); ok {
		faults := make([]Violation, 0, len(e.Violations))
		for _, v := range e.Violations {
			faults = append(faults, Violation{v.Field, v.Description, v.Reason})
		}
		return invalidAnd(e.More, faults...)
	}
	if e, ok := errors.AsType[*subscription.EtagError](err); ok {
		return etagMismatch(e.Current)
	}
	if e, ok := errors.AsType[*subscription.QuotaError](err); ok {
		return quota(namespaceName(e.Namespace), e.Error())
	}
	if e, ok := errors.AsType[*eventtype.FullError](err); ok {
		return quota(namespaceName(e.Namespace), e.Error())
	}
	if e, ok := errors.AsType[*eventtype.NoSampleError](err); ok {
		return invalidState(resource, e.Error())
	}
	if e, ok := errors.AsType[*subscription.InUseError](err); ok {
		return inUse(e.Name, e.Users)
	}
	if e, ok := errors.AsType[*subscription.NotFoundError](err); ok {
		missing := notFound(e.Name, noun(e.Name))
		if e.Field != "" {
			missing.field = e.Field
			missing.metadata["field"] = e.Field
		}
		return missing
	}
	if e, ok := errors.AsType[*subscription.BrokenError](err); ok {
		return damaged(nameInKey(e.Key, resource), err)
	}
	if errors.Is(err, eventtype.ErrDamaged) {
		return damaged(resource, err)
	}
	switch {
	case errors.Is(err, subscription.ErrNotFound):
		return notFound(resource, noun(resource))
	case errors.Is(err, subscription.ErrExists):
		return exists(resource, noun(resource))
	case errors.Is(err, subscription.ErrInUse):
		return inUse(resource, nil)
	case errors.Is(err, subscription.ErrNamespaceDeleted):
		return invalidState(resource, "the namespace of "+resource+" is deleted")
	case errors.Is(err, subscription.ErrUnavailable):
		return storeUnavailable()
	case errors.Is(err, ErrConfigFull):
		return storeFull("configuration", "the configuration store has reached its quota; deliveries, events and deletions go on, new configuration is refused until something is deleted")
	case errors.Is(err, secret.ErrTooManyVersions):
		return invalidState(resource, resource+" has ten live versions; wait until one expires, or rotate with a shorter overlap")
	}
	return nil
}

func fromDelivery(err error, resource string) *Error {
	switch {
	case errors.Is(err, delivery.ErrNotFound):
		return notFound(resource, noun(resource))
	case errors.Is(err, delivery.ErrEventConflict):
		return eventConflict(resource)
	case errors.Is(err, delivery.ErrFinal):
		return invalidState(resource, "the delivery has ended already and cannot be cancelled")
	case errors.Is(err, delivery.ErrPurged):
		return payloadPurged(resource)
	case errors.Is(err, delivery.ErrInvalidState):
		return invalidState(resource, "the delivery is not in a state that allows this call")
	case errors.Is(err, delivery.ErrDiskFull):
		return storeFull("disk", "the server's disk is nearly full; deliveries and deletions go on, new events and changes of configuration are refused until there is room")
	case errors.Is(err, delivery.ErrInvalidEvent):
		return invalid(Violation{"event", err.Error(), "event"})
	case errors.Is(err, delivery.ErrInvalidCursor):
		return pageTokenError("the page token does not fit this server's journal; begin at the first page")
	case errors.Is(err, delivery.ErrRefused):
		return unavailable(grapnelv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE, "the journal could not store it; nothing has changed", time.Second)
	case errors.Is(err, delivery.ErrClosed):
		return unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the server is stopping", time.Second)
	}
	return nil
}

func fromIngest(err error, resource string) *Error {
	if e, ok := errors.AsType[*ingest.FieldError](err); ok {
		return invalid(Violation{"event." + e.Field, e.Description, e.Rule})
	}
	if e, ok := errors.AsType[*eventtype.MismatchError](err); ok {
		return schemaMismatch("event.", e)
	}
	if e, ok := errors.AsType[*ingest.UnregisteredError](err); ok {
		return unregistered("event.", e)
	}
	if e, ok := errors.AsType[*ingest.RateError](err); ok {
		return rateLimited(namespaceName(e.Namespace), e.Error(), e.RetryAfter)
	}
	if e, ok := errors.AsType[*ingest.QuotaError](err); ok {
		return quota(namespaceName(e.Namespace), e.Error())
	}
	switch {
	case errors.Is(err, ingest.ErrDraining):
		return unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the server is stopping and takes no more events", time.Second)
	case errors.Is(err, ingest.ErrNamespaceNotFound):
		return notFound(resource, "namespace")
	case errors.Is(err, ingest.ErrNamespaceDeleted):
		return invalidState(resource, "namespace "+resource+" is deleted and takes no more events")
	}
	return nil
}

func fromPlugin(err error, resource string) *Error {
	switch {
	case errors.Is(err, ErrPluginUnavailable):
		return pluginUnavailable(resource, "a plugin that "+resource+" needs is not serving: "+err.Error())
	case errors.Is(err, ErrUnknownPlugin):
		return notFound(resource, noun(resource))
	}
	return nil
}

// storeFull says that what is to be stored has to wait until an operator or a deletion makes room.
func storeFull(subject, description string) *Error {
	e := rateLimited(subject, description, 30*time.Second)
	e.reason = grapnelv1.ErrorReason_ERROR_REASON_STORE_FULL
	return e
}

func storeUnavailable() *Error {
	return unavailable(grapnelv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE,
		"the configuration store cannot be reached; deliveries go on, changes have to wait", 2*time.Second)
}

// noun is the word for a resource, out of its name.
func noun(name string) string {
	switch t := strings.TrimPrefix(typeOf(name), "grapnel.v1."); t {
	case "":
	case "EventType":
		return "event type"
	default:
		return strings.ToLower(t)
	}
	return "resource"
}

// panicked is the internal error of a recovered panic.
func panicked(value any, stack []byte) *Error {
	return internal(fmt.Errorf("panic: %v\n%s", value, stack))
}
