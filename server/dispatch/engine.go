// Package dispatch owns the way from a stored delivery to its attempt and back: which delivery is tried
// next, and when.
//
// An Engine keeps a lane for each subscription that has open deliveries. It guarantees
//
//   - at most one attempt of a delivery at a time, each started with the subscription as the snapshot has
//     it at that moment, and none for one that is paused, disabled, deleted or not in the snapshot, or whose
//     namespace is, or while all dispatch is paused;
//   - that a delivery is cancelled for a deletion that was seen, never because configuration is absent:
//     then its lane is parked, and Status says so;
//   - that every result is settled in the journal, unless Stop had to abandon the attempt, in which case
//     the delivery is repeated after a restart;
//   - bounded memory, whatever waits and for however many lanes: see budget. The rest stays in the journal,
//     behind the positions of a window.Window for each lane and partition, and so do retries until they are due;
//   - that lanes which hang, are slow or have not proven themselves never hold, all together, the slots and the
//     memory that the others need: see slots and budget.
//
// A lane costs nothing while nothing is open in it; what was learnt of its target is kept apart for a while
// (see health), and since when it has been failing is kept by the journal.
//
// It does not know plugins, requests or etcd, and it keeps nothing on disk itself. Its clock is the journal's.
//
// Of two locks the left one is taken first:
//
//	lane.start, lane.noting → lane.mu → Engine.mu, ring.mu, pool.mu, origin.mu, origins.mu → alarms.mu, graves.mu, unblocks.mu, budget.mu → reads.mu,
//	                                    statistics.mu → series.mu
//
// No lock but lane.start and lane.noting is held while the journal is read or written or an attempt is handed over, because the
// journal calls the Engine, its Follower, on the goroutine that does its writing. No attempt is handed over on that
// goroutine either.
package dispatch

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
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
	// Now is the clock that due and expire times are on. It never jumps.
	Now() time.Time
	// Lanes lists every lane and partition with open work, LanesOf those of one partition.
	Lanes() iter.Seq2[delivery.LaneState, error]
	LanesOf(partition uint16) iter.Seq2[delivery.LaneState, error]
	// Read reads open rows of one kind from a place on, in order: at most limit, and no more after maxBytes of
	// events that were not in memory yet; of Timer only what is due by until. Its events are held.
	Read(lane delivery.LaneKey, partition uint16, kind delivery.Kind, from delivery.Pos, until delivery.Instant,
		limit, maxBytes int) (delivery.Read, error)
}

// Events counts who holds an event in memory.
type Events interface {
	Hold(*delivery.Event)
	Release(*delivery.Event)
	// EventBytes is the size of all that are held, each once.
	EventBytes() int64
}

// Settler is where results are written.
type Settler interface {
	// Settle records how a held row goes on, and calls done once its commit is visible. It may wait for the disk, so no
	// lock is held. It does not change the job.
	Settle(job *delivery.Job, step delivery.Step, attempt *delivery.Attempt, done delivery.Settled)
	// SetFailing notes since when a lane's target has been failing; the zero time: it is not. Failing reads all notes.
	SetFailing(lane delivery.LaneKey, since time.Time)
	Failing() (map[delivery.LaneKey]time.Time, error)
}

// Editor changes deliveries on behalf of callers, durably. The engine is told of each change as a Follower.
type Editor interface {
	Cancel(ctx context.Context, lane delivery.LaneKey, id delivery.ID, reason string) (*delivery.Delivery, error)
	Retry(ctx context.Context, lane delivery.LaneKey, id delivery.ID, ifAttempts int) (*delivery.Delivery, error)
	CancelLane(ctx context.Context, lane delivery.LaneKey, reason string, while func() bool) (int, error)
	// Unblock lets go of ordering keys that deliveries block which have failed. BlockedLanes have such keys.
	Unblock(ctx context.Context, lane delivery.LaneKey, while func() bool) (int, error)
	BlockedLanes() ([]delivery.LaneKey, error)
}

// Counter counts open deliveries.
type Counter interface {
	OpenOf(delivery.LaneKey) int64
}

// Journal is what the engine needs of *delivery.Journal.
type Journal interface {
	Queue
	Events
	Settler
	Editor
	Counter
}

// Subscriptions is the current snapshot. It is asked before each attempt and must be fast.
type Subscriptions interface {
	// Subscription is nil when the snapshot has none, or its namespace is deleted.
	Subscription(lane delivery.LaneKey) *subscription.Subscription
	// Deleted reports whether the deletion of the subscription, or of its namespace, has been seen: its deliveries are to
	// be cancelled. What is in neither is parked.
	Deleted(lane delivery.LaneKey) bool
	// DeadLetter is who gets what ends without success for the subscription; nil when nobody does.
	DeadLetter(sub *subscription.Subscription) *delivery.DeadLetter
	// EndReason says, in words for people, why what a lane has open that is Deleted ends.
	EndReason(lane delivery.LaneKey) string
	// Weight is how much a namespace gets where there is less than all want, beside the others; from 1 on.
	Weight(ns delivery.NamespaceKey) int
	// Closed says, in words for people, why no attempts are made in the subscription's namespace or at all; empty when
	// they are.
	Closed(lane delivery.LaneKey) string
}

// Attempter makes attempts. Attempt returns at once; sink.Complete is called exactly once, from any
// goroutine, also from within Attempt. Neither sub nor job may be changed.
type Attempter interface {
	Attempt(sub *subscription.Subscription, job *delivery.Job, sink delivery.Sink)
	// AttemptBatch is Attempt for one request with all the jobs, of a subscription with batching. The sink is called once, with
	// the first of them.
	AttemptBatch(sub *subscription.Subscription, jobs []*delivery.Job, sink delivery.Sink)
}

// Options of an Engine. Journal, Subscriptions and Attempter are required.
type Options struct {
	Journal       Journal
	Subscriptions Subscriptions
	Attempter     Attempter
	// Slots bounds the attempts in flight over all lanes; 0 means 4096.
	Slots int
	// Starts is how many attempts may start in a second, at about even intervals, for lanes that hang or are slow, and how
	// many for those that were never answered, but for attempts that are; 0 means 700 for each processor that Go uses.
	Starts int
	// Window is how many attempts the plugin of a subscription's transport takes at once; 0 is no bound but Slots. It
	// must be fast. Nil: none has one.
	Window func(sub *subscription.Subscription) int
	// WindowBytes bounds what is in memory over all lanes, waiting or in flight; 0 means 64 MiB. See budget for
	// the quarter more that lanes may use which have proven themselves and have nothing in memory.
	WindowBytes int64
	// StatsBytes bounds the statistics of lanes; 0 means 16 MiB. Beyond it the lanes that were busy least recently
	// are counted in totals over all namespaces only.
	StatsBytes int64
	// Disable is called when a subscription's failure policy says so; nil means that nothing is ever
	// disabled. The engine calls it again later when it fails.
	Disable func(ctx context.Context, sub *subscription.Subscription, reason string) error
	// Tell is told of incidents. It must neither block nor call the engine, since attempts go on behind it; nil is told
	// nothing.
	Tell func(Incident)
	// WorkedOff is called when nothing is open any more for a subscription that is Deleted, some seconds after the
	// last was cancelled. It may be nil, and is called again when that is true again.
	WorkedOff func(lane delivery.LaneKey)
	// Logger nil discards.
	Logger *slog.Logger
	// Registerer takes the metrics; nil means none.
	Registerer prometheus.Registerer
}

// Engine dispatches deliveries. Its methods may be called from any goroutine. It is the journal's Follower.
type Engine struct {
	journal   Journal
	subs      Subscriptions
	attempter Attempter
	disable   func(ctx context.Context, sub *subscription.Subscription, reason string) error
	workedOff func(lane delivery.LaneKey)
	tell      func(Incident)
	log       *slog.Logger
	metrics   *metrics

	slots      slots
	pools      pools
	origins    origins
	budget     budget
	statistics statistics

	ready    atomic.Bool // recovery is done; until then every job is left on disk
	stopping atomic.Bool // takes no new work

	ring   ring
	alarms alarms
	reads  reads
	graves graves
	// unblocks are lanes whose ordering keys are to be let go of.
	unblocks unblocks
	tests    tests

	// taking ends when no new work is taken, work when what is under way is abandoned.
	taking, work       context.Context
	endTaking, endWork context.CancelFunc
	stopped            <-chan struct{} // taking.Done()
	drained            chan struct{}   // size 1: the last slot was released while stopping
	aside              sync.WaitGroup  // what runs beside Run: disabling
	disables           chan struct{}   // a place for each that runs at once

	mu    sync.RWMutex
	lanes map[delivery.LaneKey]*lane
	// tenants are the namespaces of lanes.
	tenants map[delivery.NamespaceKey]*tenant
	// healths is what is known of targets of lanes that have nothing open.
	healths map[delivery.LaneKey]health.Health
	// partitions says how those stand that were not started with all others.
	partitions map[uint16]phase
	running    chan struct{} // closed when Run's goroutines have ended; nil before Run
	finished   chan struct{} // closed when Stop is done
	stops      bool          // Stop has been called
	closed     bool          // nothing more may start beside Run
}

const (
	defaultSlots = 4096
	// startsEach is the default of Options.Starts for each processor. New connections cost it some tenths of a millisecond each.
	startsEach         = 700
	defaultWindowBytes = 64 << 20
	defaultStatsBytes  = 16 << 20
	// disablesAtOnce bounds the calls of Options.Disable.
	disablesAtOnce = 4
)

// New makes an Engine that takes jobs at once and starts attempts when Run is called.
func New(o Options) *Engine {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Slots <= 0 {
		o.Slots = defaultSlots
	}
	if o.Starts <= 0 {
		o.Starts = startsEach * runtime.GOMAXPROCS(0)
	}
	if o.WindowBytes <= 0 {
		o.WindowBytes = defaultWindowBytes
	}
	if o.StatsBytes <= 0 {
		o.StatsBytes = defaultStatsBytes
	}
	e := &Engine{
		journal: o.Journal, subs: o.Subscriptions, attempter: o.Attempter, disable: o.Disable, workedOff: o.WorkedOff, tell: o.Tell,
		log:        o.Logger.With("component", "dispatch"),
		slots:      slots{total: int64(o.Slots), every: time.Second / time.Duration(o.Starts)},
		pools:      pools{window: o.Window},
		budget:     budget{limit: o.WindowBytes, events: o.Journal},
		statistics: statistics{limit: o.StatsBytes, lanes: make(map[delivery.LaneKey]*series), rest: &series{}},
		lanes:      make(map[delivery.LaneKey]*lane), tenants: make(map[delivery.NamespaceKey]*tenant), healths: make(map[delivery.LaneKey]health.Health),
		partitions: make(map[uint16]phase),
		drained:    make(chan struct{}, 1), finished: make(chan struct{}),
		disables: make(chan struct{}, disablesAtOnce),
	}
	e.ring.weight = o.Subscriptions.Weight
	e.ring.wake = make(chan struct{}, 1)
	e.alarms.wake = make(chan struct{}, 1)
	e.reads.wake = make(chan struct{}, 1)
	e.graves.wake = make(chan struct{}, 1)
	e.unblocks.wake = make(chan struct{}, 1)
	e.taking, e.endTaking = context.WithCancel(context.Background())
	e.work, e.endWork = context.WithCancel(context.Background())
	e.stopped = e.taking.Done()
	e.metrics = newMetrics(e, o.Registerer)
	return e
}

// now is the journal's clock.
func (e *Engine) now() time.Time { return e.journal.Now() }

// instant is the last instant that has come at a time.
func instant(now time.Time) delivery.Instant {
	return delivery.InstantOf(now.Truncate(time.Microsecond))
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// laneOf is the lane of a subscription.
func laneOf(sub *subscription.Subscription) delivery.LaneKey {
	return delivery.LaneKey{
		Namespace:    delivery.UID(sub.NamespaceUID).NamespaceKey(),
		Subscription: delivery.UID(sub.UID).SubscriptionKey(),
	}
}
