package keyspace

import (
	"errors"
	"fmt"
	"strings"
)

// Errors of those who keep resources in a Space; callers tell them apart with errors.Is. The packages that
// own the resources name them again, so that nobody else needs this one.
var (
	// ErrNotFound is wrapped by a *NotFoundError that names what is missing.
	ErrNotFound = errors.New("not found")
	// ErrExists is wrapped with the name that is taken.
	ErrExists = errors.New("already exists")
	// ErrInUse is wrapped by an *InUseError that names the users.
	ErrInUse = errors.New("still in use")
	// ErrNamespaceDeleted refuses changes in a namespace that waits to be erased.
	ErrNamespaceDeleted = errors.New("namespace is deleted")
)

// NotFoundError names what is missing. It matches ErrNotFound.
type NotFoundError struct {
	// Name is the full resource name.
	Name string
	// Field is the request field that named it, empty when it was the resource acted on.
	Field string
}

func (e *NotFoundError) Error() string { return e.Name + " not found" }

// Unwrap makes it match ErrNotFound.
func (e *NotFoundError) Unwrap() error { return ErrNotFound }

// InUseError says what still refers to a resource. It matches ErrInUse.
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
	// Current is the etag of the stored value.
	Current string
}

func (e *EtagError) Error() string {
	return fmt.Sprintf("%s has changed: its etag is now %q", e.Name, e.Current)
}

// InvalidError lists everything that is wrong with a request. It never holds a secret value.
type InvalidError struct {
	Violations []Violation
	// More is how many there are beside Violations, which nobody has written down.
	More int
}

// BrokenError says that a stored value is not what was written: a bit has flipped on disk, or somebody else
// wrote it.
type BrokenError struct {
	// Key is the full key in etcd.
	Key string
}

func (e *BrokenError) Error() string {
	return e.Key + " in etcd is damaged, its checksum is wrong: create it again, or restore etcd from a backup"
}

// Violation is one fault in one field.
type Violation struct {
	// Field is the proto path from the request, such as subscription.event_types[1].
	Field string
	// Description says what was given, unless that is a secret, and what would be right.
	Description string
	// Reason is stable, for machines, such as "uri.scheme".
	Reason string
}

func (e *InvalidError) Error() string {
	texts := make([]string, len(e.Violations))
	for i, v := range e.Violations {
		texts[i] = v.Field + ": " + v.Description
	}
	return strings.Join(texts, "; ")
}
