package eventtype

import (
	"errors"
	"fmt"

	"github.com/grapnel/grapnel/server/eventtype/schema"
	"github.com/grapnel/grapnel/server/keyspace"
)

// Errors that callers tell apart with errors.Is.
var (
	ErrNotFound         = keyspace.ErrNotFound
	ErrExists           = keyspace.ErrExists
	ErrNamespaceDeleted = keyspace.ErrNamespaceDeleted
	// ErrUnavailable means that etcd could not be reached in time. The write may or may not have happened.
	ErrUnavailable = keyspace.ErrUnavailable
	// ErrDamaged means that a type is registered and what is stored of it cannot be read. Create registers it again.
	ErrDamaged = errors.New("is damaged")
	// errChanged has a write begin again: what is stored has changed since its new content was checked.
	errChanged = errors.New("changed meanwhile")
)

// Errors that callers take apart with errors.As.
type (
	NotFoundError = keyspace.NotFoundError
	EtagError     = keyspace.EtagError
	InvalidError  = keyspace.InvalidError
	// StrangerError means that etcd belongs to another installation.
	StrangerError = keyspace.StrangerError
	Violation     = keyspace.Violation
)

// MismatchError says that an event is not what the schema of its type allows.
type MismatchError struct {
	// Type is that of the event, and Version the schema's.
	Type, Version string
	// Field of the event is at fault; the pointers of Faults go into it.
	Field string
	// Faults are the first ones, and More says how many there are beside them.
	Faults []schema.Fault
	More   int
}

func (e *MismatchError) Error() string {
	return e.Field + ": " + (&schema.Mismatch{Faults: e.Faults, More: e.More}).Error()
}

// NoSampleError says why there is no sample of a type.
type NoSampleError struct {
	Name string
	Why  string
}

func (e *NoSampleError) Error() string { return "no sample of " + e.Name + ": " + e.Why }

// FullError says that a namespace has as much registered as it may.
type FullError struct {
	Namespace string
}

func (e *FullError) Error() string {
	return fmt.Sprintf("the event types of namespace %s would take more than %d MiB, with a KiB counted for each beside its texts; delete some, or versions that are no longer used",
		e.Namespace, MaxNamespaceBytes>>20)
}
