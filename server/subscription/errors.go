package subscription

import (
	"errors"
	"fmt"

	"github.com/grapnel/grapnel/server/keyspace"
)

// Errors that callers tell apart with errors.Is.
var (
	ErrNotFound         = keyspace.ErrNotFound
	ErrExists           = keyspace.ErrExists
	ErrInUse            = keyspace.ErrInUse
	ErrNamespaceDeleted = keyspace.ErrNamespaceDeleted
	// ErrNotDeleted means that there is no deletion to take back.
	ErrNotDeleted = errors.New("is not deleted")
	// ErrUnavailable means that etcd could not be reached in time. The write may or may not have
	// happened; the snapshot stays usable.
	ErrUnavailable = keyspace.ErrUnavailable
)

// Errors that callers take apart with errors.As.
type (
	NotFoundError = keyspace.NotFoundError
	InUseError    = keyspace.InUseError
	EtagError     = keyspace.EtagError
	InvalidError  = keyspace.InvalidError
	// StrangerError means that etcd belongs to another installation, BrokenError that one value in it is
	// damaged.
	StrangerError = keyspace.StrangerError
	BrokenError   = keyspace.BrokenError
	Violation     = keyspace.Violation
)

// QuotaError says that a quota of the namespace is used up.
type QuotaError struct {
	// Namespace is the ID; Quota is the field of grapnel.v1.Quota.
	Namespace string
	Quota     string
	Limit     int
}

func (e *QuotaError) Error() string {
	return fmt.Sprintf("namespaces/%s has reached its quota %s of %d", e.Namespace, e.Quota, e.Limit)
}
