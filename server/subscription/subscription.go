// Package subscription owns tenants and who gets what: Namespace and Subscription, their rules, their
// storage in etcd by compare-and-set, and the immutable snapshot that the publish path matches on.
package subscription

import (
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Subscription is one subscription as stored, compiled for matching and dispatch. Immutable.
type Subscription struct {
	// Proto is the stored message with all defaults filled in; it must not be changed.
	Proto *grapnelv1.Subscription
	// Namespace and ID are the segments of the name.
	Namespace string
	ID        string
	// UID is Proto.uid, parsed.
	UID [16]byte
	// Revision is etcd's modification revision of the stored value; it rises with each change.
	Revision int64

	// What dispatch needs, unpacked.
	AttemptTimeout time.Duration
	MaxInFlight    int
	MaxRate        float64
	MaxAttempts    int
	MaxAge         time.Duration
	// Schedule holds the delays before attempt 2, 3, …; the backoff form is unrolled into it.
	Schedule     []time.Duration
	Jitter       float64
	IgnoreGone   bool
	DisableAfter time.Duration

	// … compiled globs and condition, unexported
}

// Namespace is one tenant as stored. Immutable.
type Namespace struct {
	// Proto is the stored message; quota fields that are zero take the defaults below when read through
	// Quota.
	Proto    *grapnelv1.Namespace
	ID       string
	Revision int64
}
