package ingest

import (
	"errors"
	"fmt"
	"time"
)

// Refusals that are about the server or the namespace.
var (
	// ErrDraining means that the server is stopping; another one, or the next, will take the event.
	ErrDraining = errors.New("draining")
	// ErrNamespaceNotFound means that no such namespace is known.
	ErrNamespaceNotFound = errors.New("namespace does not exist")
	// ErrNamespaceDeleted means that the namespace waits to be erased.
	ErrNamespaceDeleted = errors.New("namespace is deleted")
)

// FieldError is a fault of one field of an event.
type FieldError struct {
	// Field is the field's path in grapnel.v1.Event.
	Field string
	// Description says in words what is wrong.
	Description string
	// Rule names the rule that was broken.
	Rule string
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Description }

// UnregisteredError means that the namespace wants types of events registered, and this one is not.
type UnregisteredError struct {
	Namespace string
}

func (e *UnregisteredError) Error() string {
	return "must be an event type that is registered in namespace " + e.Namespace + " (its require_event_types)"
}

// RateError means that the namespace publishes faster than its quota.
type RateError struct {
	Namespace string
	// Limit is events per second.
	Limit int
	// RetryAfter is when this event would fit.
	RetryAfter time.Duration
}

func (e *RateError) Error() string {
	return fmt.Sprintf("namespace %s may publish %d events a second (quota max_publish_rate)", e.Namespace, e.Limit)
}

// QuotaError means that a limit of the namespace is reached which waiting a moment does not lift.
type QuotaError struct {
	Namespace string
	// Name is the quota's field.
	Name string
	// Limit is its value.
	Limit int64
}

func (e *QuotaError) Error() string {
	return fmt.Sprintf("namespace %s has reached its quota %s of %d", e.Namespace, e.Name, e.Limit)
}
