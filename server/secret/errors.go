package secret

import (
	"errors"
	"fmt"
	"strings"

	"github.com/grapnel/grapnel/server/keyspace"
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrNotFound is wrapped by a *NotFoundError that names what is missing.
	ErrNotFound = errors.New("not found")
	// ErrExists is wrapped with the name that is taken.
	ErrExists = errors.New("already exists")
	// ErrInUse is wrapped by an *InUseError that names the users.
	ErrInUse = errors.New("still in use")
	// ErrTooManyVersions refuses a rotation while ten versions are live.
	ErrTooManyVersions = errors.New("ten versions are live")
	// ErrNamespaceDeleted refuses changes in a namespace that waits to be erased.
	ErrNamespaceDeleted = errors.New("namespace is deleted")
	// ErrWrongKey means that a stored value was not sealed under the key given.
	ErrWrongKey = errors.New("sealed under another key")
	// ErrTampered means that a sealed value is damaged or belongs to another secret or version.
	ErrTampered = errors.New("sealed value is damaged or belongs to another record")
	// ErrUnavailable means that etcd could not be reached in time. The write may or may not have
	// happened; Versions goes on from memory.
	ErrUnavailable = keyspace.ErrUnavailable
)

// NotFoundError names what is missing. It matches ErrNotFound.
type NotFoundError struct {
	// Name is the full resource name.
	Name string
}

func (e *NotFoundError) Error() string { return e.Name + " not found" }

// Unwrap makes it match ErrNotFound.
func (e *NotFoundError) Unwrap() error { return ErrNotFound }

// InUseError says which subscriptions refer to a secret. It matches ErrInUse.
type InUseError struct {
	Name string
	// Users are full resource names, at most ten of them.
	Users []string
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("%s is still in use by %s", e.Name, strings.Join(e.Users, ", "))
}

// Unwrap makes it match ErrInUse.
func (e *InUseError) Unwrap() error { return ErrInUse }

// EtagError says that the etag sent is not the current one.
type EtagError struct {
	Name string
	// Current is the etag of the stored secret.
	Current string
}

func (e *EtagError) Error() string {
	return fmt.Sprintf("%s has changed: its etag is now %q", e.Name, e.Current)
}

// InvalidError lists what is wrong with a request. It never holds the value given.
type InvalidError struct {
	Violations []Violation
}

// Violation is one fault in one field.
type Violation struct {
	// Field is the proto path from the request, such as value.
	Field string
	// Description says what would be right.
	Description string
	// Reason is stable, for machines, such as "secret.hmac_prefix".
	Reason string
}

func (e *InvalidError) Error() string {
	texts := make([]string, len(e.Violations))
	for i, v := range e.Violations {
		texts[i] = v.Field + ": " + v.Description
	}
	return strings.Join(texts, "; ")
}
