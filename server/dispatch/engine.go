// Package dispatch owns the way from a stored delivery to its attempt and back: which delivery is tried
// next, and when.
//
// An Engine keeps one lane for each subscription that has work. It guarantees
//
//   - at most one attempt of a delivery at a time, each started with the subscription as the snapshot has
//     it at that moment, and none for a paused, disabled or deleted one;
//   - that every result is settled in the journal, unless Stop had to abandon the attempt, in which case
//     the delivery is repeated after a restart;
//   - bounded memory, whatever waits: a lane holds a window of its deliveries, the rest stays in the
//     journal behind a read position (see part), and retries stay there until they are due;
//   - that a lane which is slow, closed or broken holds no more than its share of the slots.
//
// It does not know plugins, requests or etcd, and it keeps nothing on disk itself. How long a
// subscription has been failing is kept in memory only: after a restart disable_after counts afresh.
//
// Of two locks the left one is taken first:
//
//	lane.io → lane.start → lane.mu → ring.mu, alarms.mu, refills.mu, shard.mu, Engine.mu
//
// No lock but lane.io is held while the journal is read, and none but lane.io and lane.start while it
// is written or an attempt is handed over, because the journal calls Offer on the goroutine that does
// its writing.
package dispatch

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// Errors of the engine. Results may wrap them.
var (
	// ErrStopped says that the engine takes no more work.
	ErrStopped = errors.New("dispatch has stopped")
	// ErrTestLimit says that a subscription was tested less than a second ago.
	ErrTestLimit = errors.New("one test per second and subscription")
	// ErrUnspent says that nothing could be tried, because the plugin is not ready.
	ErrUnspent = errors.New("no attempt could be made")
)

// Queue is where waiting deliveries are read from.
type Queue interface {
	// Lanes lists every queue with open work, per partition.
	Lanes() iter.Seq2[delivery.LaneState, error]
	// Backlog reads the FIFO from a sequence on; next is 0 when nothing more is there now.
	Backlog(lane delivery.LaneKey, partition uint16, from uint64, limit, maxBytes int) (jobs []*delivery.Job, next uint64, err error)
	// Timers reads what is due until a time, first due first, and when the rest begins to be due.
	Timers(lane delivery.LaneKey, partition uint16, until time.Time, limit, maxBytes int) (jobs []*delivery.Job, nextDue time.Time, err error)
}

// Settler is where results are written.
type Settler interface {
	// Settle takes the job over. The writes of one partition are applied in the order of the calls.
	Settle(*delivery.Job, delivery.Step, *delivery.Attempt)
	// SetLowWater says that nothing of the FIFO below a sequence is pending once the writes so far are
	// applied.
	SetLowWater(lane delivery.LaneKey, partition uint16, seq uint64)
}

// Editor changes deliveries on behalf of callers, durably.
type Editor interface {
	Cancel(ctx context.Context, id delivery.ID, reason string) (*delivery.Delivery, error)
	Retry(ctx context.Context, id delivery.ID, ifAttempts int) (*delivery.Delivery, error)
	CancelLane(ctx context.Context, lane delivery.LaneKey, uid delivery.UID, reason string) (int, error)
}

// Counter counts open deliveries.
type Counter interface {
	OpenOf(delivery.LaneKey) int64
}

// Journal is what the engine needs of *delivery.Journal.
type Journal interface {
	Queue
	Settler
	Editor
	Counter
}

// Subscriptions is the current snapshot; nil stands for a subscription that does not exist. It is asked
// before each attempt and must be fast.
type Subscriptions interface {
	Subscription(namespace, id string) *subscription.Subscription
}

// Attempter makes attempts. Attempt returns at once; sink.Complete is called exactly once, from any
// goroutine, also from within Attempt. Neither sub nor job may be changed.
type Attempter interface {
	Attempt(sub *subscription.Subscription, job *delivery.Job, sink delivery.Sink)
}

// Options of an Engine. Journal, Subscriptions and Attempter are required.
type Options struct {
	Journal       Journal
	Subscriptions Subscriptions
	Attempter     Attempter
	// Slots bounds the attempts in flight over all lanes; 0 means 1024.
	Slots int
	// WindowBytes bounds what waits in memory over all lanes; 0 means 64 MiB. Beyond it each lane still
	// gets a delivery at a time.
	WindowBytes int64
	// Disable is called when a subscription's failure policy says so; nil means that nothing is ever
	// disabled. The engine calls it again later when it fails.
	Disable func(ctx context.Context, sub *subscription.Subscription, reason string) error
	// Logger nil discards.
	Logger *slog.Logger
	// Registerer takes the metrics; nil means none.
	Registerer prometheus.Registerer
}

// Engine dispatches deliveries. Its methods may be called from any goroutine.
type Engine struct {
	journal   Journal
	subs      Subscriptions
	attempter Attempter
	disable   func(ctx context.Context, sub *subscription.Subscription, reason string) error
	log       *slog.Logger
	metrics   *metrics

	slots       int
	share       int
	windowBytes int64

	inFlight atomic.Int64 // attempts that hold a slot
	memory   atomic.Int64 // bytes of the jobs in memory
	ready    atomic.Bool  // recovery is done; until then every job is left on disk
	stopping atomic.Bool  // takes no new work

	ring    ring
	alarms  alarms
	refills refills
	index   index
	tests   tests

	// taking ends when no new work is taken, work when what is under way is abandoned.
	taking, work       context.Context
	endTaking, endWork context.CancelFunc
	stopped            <-chan struct{} // taking.Done()
	drained            chan struct{}   // size 1: the last slot was released while stopping
	aside              sync.WaitGroup  // what runs beside Run: disabling, cancelling

	mu       sync.RWMutex
	lanes    map[delivery.LaneKey]*lane
	dirty    []*lane       // lanes to look after in the next round of upkeep
	running  chan struct{} // closed when Run's goroutines have ended; nil before Run
	finished chan struct{} // closed when Stop is done
	stops    bool          // Stop has been called
	closed   bool          // nothing more may start beside Run
}

// New makes an Engine that takes jobs at once and starts attempts when Run is called.
func New(o Options) *Engine {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Slots <= 0 {
		o.Slots = 1024
	}
	if o.WindowBytes <= 0 {
		o.WindowBytes = 64 << 20
	}
	e := &Engine{
		journal: o.Journal, subs: o.Subscriptions, attempter: o.Attempter, disable: o.Disable,
		log:   o.Logger.With("component", "dispatch"),
		slots: o.Slots, share: max(1, o.Slots/10), windowBytes: o.WindowBytes,
		lanes:   make(map[delivery.LaneKey]*lane),
		drained: make(chan struct{}, 1), finished: make(chan struct{}),
	}
	e.ring.wake = make(chan struct{}, 1)
	e.alarms.wake = make(chan struct{}, 1)
	e.refills.wake = make(chan struct{}, 1)
	e.taking, e.endTaking = context.WithCancel(context.Background())
	e.work, e.endWork = context.WithCancel(context.Background())
	e.stopped = e.taking.Done()
	e.metrics = newMetrics(e, o.Registerer)
	return e
}
