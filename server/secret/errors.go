package secret

import (
	"errors"

	"github.com/grapnel/grapnel/server/keyspace"
)

// Errors that callers tell apart with errors.Is.
var (
	ErrNotFound = keyspace.ErrNotFound
	ErrExists   = keyspace.ErrExists
	// ErrInUse is wrapped by an *InUseError that names the subscriptions.
	ErrInUse            = keyspace.ErrInUse
	ErrNamespaceDeleted = keyspace.ErrNamespaceDeleted
	// ErrTooManyVersions refuses a rotation while ten versions are live.
	ErrTooManyVersions = errors.New("ten versions are live")
	// ErrWrongKey means that a stored value was not sealed under the key given.
	ErrWrongKey = errors.New("sealed under another key")
	// ErrTampered means that a sealed value is damaged or belongs to another secret or version.
	ErrTampered = errors.New("sealed value is damaged or belongs to another record")
	// ErrUnavailable means that etcd could not be reached in time. The write may or may not have
	// happened; Versions goes on from memory.
	ErrUnavailable = keyspace.ErrUnavailable
)

// Errors that callers take apart with errors.As.
type (
	NotFoundError = keyspace.NotFoundError
	InUseError    = keyspace.InUseError
	EtagError     = keyspace.EtagError
	// InvalidError never holds the value given.
	InvalidError = keyspace.InvalidError
	// StrangerError means that etcd belongs to another installation.
	StrangerError = keyspace.StrangerError
	Violation     = keyspace.Violation
)
