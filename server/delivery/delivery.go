// Package delivery owns the promise made to a publisher and how it stands: events, their deliveries,
// the attempts at them, the pure rule that says what follows an attempt (Next), and the Journal that
// keeps it all on disk.
//
// A delivery moves like this; final states never change, but RetryDelivery reopens a failed one:
//
//	PENDING ──▶ IN_FLIGHT ──▶ SUCCEEDED
//	   │            │ ▲
//	   │            ▼ │
//	   │        SCHEDULED ──▶ EXHAUSTED | REJECTED
//	   └──────────┴─────────▶ CANCELLED            SKIPPED (at once, subscription disabled; or dropped by its transformer)
//
// IN_FLIGHT exists in memory only: on disk the delivery keeps the state it would have to be resumed in.
package delivery

import (
	"encoding/binary"
	"time"
)

// State of a delivery. The numbers are those of grapnel.v1.Delivery.State.
type State uint8

// States of a delivery.
const (
	Pending   State = 1
	Scheduled State = 2
	InFlight  State = 3
	Succeeded State = 4
	Exhausted State = 5
	Rejected  State = 6
	Cancelled State = 7
	Skipped   State = 8
)

// Final reports whether no further attempt follows by itself.
func (s State) Final() bool { return s >= Succeeded }

// Trigger says why a delivery was made. The numbers are those of grapnel.v1.Delivery.Trigger.
type Trigger uint8

// Triggers of a delivery.
const (
	// ByPublish: its event was published and matched.
	ByPublish Trigger = 1
	// ByReplay: a replay, or a caller who had a delivery that succeeded sent again.
	ByReplay Trigger = 2
	// ByDeadLetter: a delivery to a subscription that names this one ended without success.
	ByDeadLetter Trigger = 3
)

// Letter is what a dead letter says of the delivery that ended without success.
type Letter struct {
	// From is the last segment of the subscription's name that the delivery was for.
	From         string
	State        State
	Reason       string
	Attempts     int
	ResponseCode int
}

// Outcome of an attempt. The numbers are those of grapnel.v1.Attempt.Outcome.
type Outcome uint8

// Outcomes of an attempt.
const (
	OutcomeSucceeded   Outcome = 1
	OutcomeRetryable   Outcome = 2
	OutcomePermanent   Outcome = 3
	OutcomeTimedOut    Outcome = 4
	OutcomeUnreachable Outcome = 5
	OutcomePluginError Outcome = 6
	OutcomeInterrupted Outcome = 7
)

// String is the outcome's name in metrics and traces.
func (o Outcome) String() string {
	switch o {
	case OutcomeSucceeded:
		return "succeeded"
	case OutcomeRetryable:
		return "retryable"
	case OutcomePermanent:
		return "permanent"
	case OutcomeTimedOut:
		return "timed_out"
	case OutcomeUnreachable:
		return "unreachable"
	case OutcomePluginError:
		return "plugin_error"
	case OutcomeInterrupted:
		return "interrupted"
	}
	return "unknown"
}

// UID is the server-made UUID of a namespace or a subscription.
type UID [16]byte

// key is what stands for the UID in the journal's keys. Its last eight bytes hold 62 random bits, and a
// registry gives no two resources the same ones.
func (u UID) key() uint64 { return binary.BigEndian.Uint64(u[8:]) }

// NamespaceKey stands for a namespace in keys and lanes: a name that is used again is another namespace.
type NamespaceKey uint64

// SubscriptionKey stands for a subscription in keys, lanes and delivery ids.
type SubscriptionKey uint64

// NamespaceKey is the key of a namespace with this UID.
func (u UID) NamespaceKey() NamespaceKey { return NamespaceKey(u.key()) }

// SubscriptionKey is the key of a subscription with this UID.
func (u UID) SubscriptionKey() SubscriptionKey { return SubscriptionKey(u.key()) }

// LaneKey names the queue of one subscription.
type LaneKey struct {
	Namespace    NamespaceKey
	Subscription SubscriptionKey
}

// Event is an accepted event. It is immutable once Append has returned; Payload and Attributes are
// shared by everything that reads it and must not be changed. Events of jobs are counted: see Journal.Hold.
type Event struct {
	Namespace   NamespaceKey
	ID          string
	Source      string
	Type        string
	Subject     string
	Time        time.Time
	ContentType string
	Schema      string
	Attributes  map[string]string
	Payload     []byte
	// DeliverTime is zero, or the time before which no attempt is made.
	DeliverTime time.Time
	// TTL is zero, or a bound on every target's MaxAge.
	TTL time.Duration
	// OrderingKey is empty, or what events have in common that ordered targets get one after another.
	OrderingKey string
	// Headers are what requests carry to those who let it through, names in lower case. They are shared as Attributes are.
	Headers map[string]string
	// Trace is nil, or where it stands in a trace that is recorded. It is shared and must not be changed.
	Trace *Trace
	// ContentHash covers what the publisher sent; equal hashes make a repeated ID a duplicate.
	ContentHash [16]byte

	// Set by Append, and when read back.
	Partition  uint16
	Seq        uint64
	AcceptTime time.Time
	// Matched is how many subscriptions it was queued for or skipped by, Skipped how many of them were disabled.
	Matched, Skipped int
	// UID is the webhook-id: derived from journal, partition and sequence; no dot in it.
	UID string
	// Faults are subscriptions whose conditions could not be evaluated for it, the first of FaultCount. Set by the
	// publisher of the event.
	Faults     []Fault
	FaultCount int
	// Purged is set when its payload has been purged; see PurgeEvent.
	Purged *Purged

	refs int32 // jobs and readers that hold it, 0 outside of its table, which guards it
}

// Fault is a condition that could not be evaluated for an event.
type Fault struct {
	// Subscription is the last segment of its name, Text says why.
	Subscription, Text string
}

// Publication is an event on its way into the journal, with the subscriptions it matched.
type Publication struct {
	Event   *Event
	Targets []Target
}

// Target is a matching subscription as it was when the event was accepted.
type Target struct {
	// Subscription is the last segment of its name, for people: keys and queues go by the UID.
	Subscription string
	UID          UID
	MaxAttempts  int
	MaxAge       time.Duration
	// Skip records the delivery as SKIPPED: the subscription is disabled.
	Skip bool
	// Ordered: events with one OrderingKey go to it one after another. MaxAge then counts from a delivery's turn.
	Ordered bool
}

// Job is a delivery in memory on its way to an attempt. Its owner is, in turn, the journal, the lane and
// the attempt; only the owner may change it.
type Job struct {
	ID ID
	// Event is shared by all jobs of the event that are in memory, and shows no targets.
	Event *Event
	// Kind, Due and Epoch are those of the row that the job was made of: see Row.
	Kind  Kind
	Epoch uint32
	Due   Instant
	// AsOf is the newest commit of the partition that the job takes into account.
	AsOf Commit
	// Attempts that have ended.
	Attempts    int
	MaxAttempts int
	// Expire is when the last attempt may start.
	Expire time.Time
	// Manual marks an attempt that a caller asked for.
	Manual bool
	// Parted says how small a batch must be that it goes in, after it has failed in others: see Company.
	Parted uint8
	// Indeterminate counts attempts that were in flight when a plugin died. They use up none of MaxAttempts.
	Indeterminate int
	// Suspicion counts plugin crashes since the last attempt that ended otherwise; see Watch. A job with any
	// is a suspect: its attempt may be what the plugin dies of, so it is made apart from others.
	Suspicion int
	// Replay is the job that made or reopened the delivery, 0 for none; it is the journal's.
	Replay uint64
	// Letter is set of a dead letter, which makes no further one. It is shared and not to be changed.
	Letter *Letter
	// Order is the ordering key that the delivery keeps busy; 0 is none. Gap is how many deliveries of it had ended
	// without success right before.
	Order OrderKey
	Gap   int
}

// Ready is since when an attempt could have been made, as far as the job knows; zero of one that had to wait for the turn of
// its ordering key.
func (j *Job) Ready() time.Time {
	switch {
	case j.Kind == Timer:
		return j.Due.Time()
	case j.Order != 0:
		return time.Time{}
	case j.ID.Seq == j.Event.Seq:
		return j.Event.AcceptTime
	}
	return j.ID.Time()
}

// Lane is the queue that the job belongs to.
func (j *Job) Lane() LaneKey { return LaneKey{j.Event.Namespace, j.ID.Subscription} }

// Trial reports whether the job is of no delivery that the journal knows: one that is made up to try a subscription.
func (j *Job) Trial() bool { return j.ID.Seq == 0 }

// Row is the row that the job was made of.
func (j *Job) Row() Row { return Row{Kind: j.Kind, Due: j.Due, Seq: j.ID.Seq, Epoch: j.Epoch} }

// Delivery is where a delivery stands, joined with its event, as read by callers.
type Delivery struct {
	ID              ID
	Namespace       NamespaceKey
	EventID         string
	EventUID        string
	EventType       string
	Subscription    string
	SubscriptionUID UID
	State           State
	StateReason     string
	Attempts        int
	MaxAttempts     int
	NextAttempt     time.Time
	Expire          time.Time
	Last            *Attempt
	CreateTime      time.Time
	CompleteTime    time.Time
	Trigger         Trigger
	// ReplayJob is the id of the replay that made it; empty for none.
	ReplayJob string
	// OrderingGap is Job.Gap.
	OrderingGap int
	// WaitsForKey: an ordering key is busy, StateReason says with what.
	WaitsForKey bool
}

// Attempt is one try that ended.
type Attempt struct {
	Number          int
	Start           time.Time
	Duration        time.Duration
	Outcome         Outcome
	ResponseCode    int
	Error           string
	RetryAfter      time.Duration
	Peer            string
	Manual          bool
	ResponseBody    []byte
	ResponseHeaders []Header
	RequestHeaders  []Header
	// Batch is the webhook-id of a request that carries several deliveries, BatchSize how many it carried; empty and 0 where
	// a request carries one.
	Batch     string
	BatchSize int
}

// Header is one header field; the name is lower case.
type Header struct {
	Name  string
	Value string
}

// Cause says whose fault a failed attempt is.
type Cause uint8

// Causes of a failed attempt.
const (
	// CauseEndpoint is the receiver or the way to it.
	CauseEndpoint Cause = iota
	// CausePlugin never counts against the receiver.
	CausePlugin
	// CausePolicy is a refusal by Grapnel: egress denied.
	CausePolicy
	// CauseUnspent means that nothing was tried (plugin gone before the attempt was written, instance
	// being configured, no descriptor or socket left on this machine): the job is to be offered again, no attempt is
	// spent, none is recorded. Error says in words what is waited for.
	CauseUnspent
	// CauseCrowded means, of a batch of several, that nothing was tried because its transport carries no body of that
	// size: its jobs are to be offered again in smaller batches. No attempt is spent, none is recorded.
	CauseCrowded
	// CauseDropped means that the subscription's transformer wants nothing to be sent; Error is its reason. No attempt is
	// recorded.
	CauseDropped
)

// Made is what a transformer has made of an event for a subscription: what requests carry instead of its payload. It is
// shared and must not be changed.
type Made struct {
	// Body is MaxMade bytes at most.
	Body []byte
	// ContentType is Body's, never empty.
	ContentType string
	// Headers are added to those of the event.
	Headers []Header
}

// MaxMade is the largest body that a transformer may make.
const MaxMade = 256 << 10

// Result is how an attempt ended: a value, not an error.
type Result struct {
	Attempt
	Cause Cause
	// Indeterminate is set when the plugin died with the attempt written and unanswered.
	Indeterminate bool
	// Guilt says, of an indeterminate attempt, what its part in that may have been.
	Guilt Guilt
	// Refused are, of a batch that succeeded, the deliveries that its target has named as failed: by their places in it,
	// with a text for people each.
	Refused map[int]string
	// Made is set of a trial, see Job.Trial.
	Made *Made
}

// Guilt is what speaks for it that a plugin died of an attempt.
type Guilt uint8

// Degrees of guilt, each one more than the one before.
const (
	// GuiltNone: the process was killed from outside, or nobody knows.
	GuiltNone Guilt = iota
	// GuiltShared: the plugin ended by its own doing (it exited, faulted, hung or broke the protocol) with this
	// and other attempts in flight.
	GuiltShared
	// GuiltAlone: it ended by its own doing, and nothing else was in flight in that process.
	GuiltAlone
	// GuiltProven: so it is, and the same plugin does answer other attempts.
	GuiltProven
)
