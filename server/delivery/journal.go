package delivery

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
)

// Errors of the journal. Results may wrap them.
var (
	// ErrClosed says that the journal has been closed or not been started.
	ErrClosed = errors.New("journal is closed")
	// ErrDiskFull says that no more events are taken until there is room on the disk.
	ErrDiskFull = errors.New("journal's disk is full")
	// ErrEventConflict says that another event was accepted with this id.
	ErrEventConflict = errors.New("another event was accepted with this id")
	// ErrInvalidEvent says that an event cannot be stored as it is.
	ErrInvalidEvent = errors.New("event cannot be stored")
	// ErrNotFound says that there is no such event or delivery, or no longer.
	ErrNotFound = errors.New("not found in the journal")
	// ErrFinal says that the delivery has ended otherwise.
	ErrFinal = errors.New("delivery is final")
	// ErrInvalidState says that the delivery is not in a state that allows the change.
	ErrInvalidState = errors.New("delivery's state does not allow this")
	// ErrInvalidCursor says that a cursor was not made by the journal.
	ErrInvalidCursor = errors.New("cursor is not valid")
)

// CorruptError names the record that cannot be read. It is never skipped over.
type CorruptError struct {
	// Dir is the journal's directory.
	Dir string
	// Key is the record's key in readable form.
	Key string
	// Reason says what is wrong with it.
	Reason error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("journal %s: record %s: %v", e.Dir, e.Key, e.Reason)
}

// Unwrap returns the reason.
func (e *CorruptError) Unwrap() error { return e.Reason }

// Options of a Journal. Dir is required.
type Options struct {
	// Dir is the journal's own directory; it is made when missing.
	Dir string
	// Partitions is fixed when the journal is made; 0 means 16, or whatever an existing journal has.
	Partitions int
	// CacheBytes bounds the cache of what is on disk; 0 means 64 MiB.
	CacheBytes int64
	// MinFreeBytes is the free space below which Append is refused. 0 means 256 MiB, or a tenth of
	// the volume where that is less; below 0 means no watermark.
	MinFreeBytes int64
	// BallastBytes is kept in a file that is given up when the disk runs full nevertheless, so that
	// deliveries and deletions go on. 0 means 64 MiB, or a quarter of MinFreeBytes where that is
	// less; below 0 means none.
	BallastBytes int64
	// Logger is required to be told of trouble; nil discards.
	Logger *slog.Logger
	// Registerer takes the journal's metrics; nil means none.
	Registerer prometheus.Registerer
	// Fatal is called when the journal can no longer promise anything, such as after a failed sync. It
	// must not return; nil ends the process with status 70.
	Fatal func(reason string)

	fs  vfs.FS           // tests
	now func() time.Time // tests
}

// Sink takes the result of an attempt, exactly once, from any goroutine.
type Sink interface {
	Complete(*Job, Result)
}

// AppendResult says what became of one event of an Append.
type AppendResult struct {
	// Event is the stored event. For a duplicate it is the original, whose Targets may have lost
	// everything but their number once the original is no longer retained. Nil with Err.
	Event *Event
	// Duplicate says that the same event had been accepted before and nothing was queued.
	Duplicate bool
	Err       error
}

// LaneState is what recovery needs to know about one subscription's queue in one partition.
type LaneState struct {
	Lane      LaneKey
	Partition uint16
	// From is a sequence below which nothing of the FIFO is Pending; 0 means nothing is.
	From uint64
	// NextDue is the due time of the first timer; zero means none.
	NextDue time.Time
}

// Query selects deliveries, newest first. Namespace is required, zero values select all.
type Query struct {
	Namespace    string
	Subscription string
	EventID      string
	States       []State
	// Since is inclusive and Until exclusive, by creation time.
	Since, Until time.Time
	// Match is applied last; nil matches all.
	Match func(*Delivery) bool
	// Limit is 50 when 0, and 1000 at most.
	Limit int
	// After is the Next of the previous page.
	After string
}

// Page of deliveries. It may be short or empty and still have a Next: a call reads a bounded number of
// records.
type Page struct {
	Deliveries []*Delivery
	// Next is empty on the last page.
	Next string
}

// EventQuery selects events, newest first. Namespace is required.
type EventQuery struct {
	Namespace    string
	Since, Until time.Time
	// Match is applied last; nil matches all.
	Match func(*Event) bool
	// Limit is 50 when 0, and 1000 at most.
	Limit int
	// After is the Next of the previous page.
	After string
}

// EventPage is like Page.
type EventPage struct {
	Events []*Event
	Next   string
}
