// Package replay runs the journal's replays, and its erasures: which go on at once, how fast, to whom, and when one has come
// to its end. What a replay has done is in the journal, in the same commits as the deliveries it has made, so that a Runner
// holds nothing that a crash could lose. So it is with an erasure, which ends when no file of the journal holds any more what
// it has purged.
//
// It makes room for live traffic: steps of all replays are made one after the other, each a small commit, at their
// replay's pace and with a rest between; and a replay that has openAhead deliveries open waits for their receivers.
// Configuration that is absent is not deleted: a replay whose subscription the snapshot does not show waits, and fails
// only when the deletion has been seen.
package replay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// Running is how many replays of a namespace may go on at once.
	Running = 3
	// openAhead bounds the deliveries of one replay that are open.
	openAhead = 4096
	// stepMost bounds what one commit makes, and stepsPerSecond is how many a slow replay makes.
	stepMost       = 256
	stepsPerSecond = 4
	// restFor is how long a replay rests for the time that a step has taken, and restMost the longest.
	restFor  = 1
	restMost = 20 * time.Millisecond
	// lookAgain is how long a replay waits that cannot go on, at first; each time twice as long, up to lookLatest,
	// or faultLatest after a fault of which nobody knows when it passes.
	lookAgain   = 100 * time.Millisecond
	lookLatest  = 2 * time.Second
	faultLatest = time.Minute
	// behindMost is how much a replay makes up for that has fallen behind its pace.
	behindMost = 250 * time.Millisecond
	// toldFor is how long after its end a replay may be told of: less than an event's id is remembered.
	toldFor = 20 * time.Hour
	// DefaultRate is how many deliveries a replay makes a second that does not say.
	DefaultRate = 50
)

// Journal is what a Runner needs of *delivery.Journal.
type Journal interface {
	Partitions() int
	Counted() bool
	Replays(ns delivery.NamespaceKey) ([]*delivery.Replay, error)
	Replay(ns delivery.NamespaceKey, key uint64) (*delivery.Replay, error)
	ReplayOpen(ns delivery.NamespaceKey, key uint64) int64
	CreateReplay(ctx context.Context, r *delivery.Replay, running int) (*delivery.Replay, error)
	StartReplay(ctx context.Context, ns delivery.NamespaceKey, key uint64) error
	EndReplay(ctx context.Context, ns delivery.NamespaceKey, key uint64, state delivery.ReplayState, reason string) (*delivery.Replay, error)
	AdvanceReplay(ctx context.Context, r *delivery.Replay, partition uint16, pick *delivery.Picker, limit int) (delivery.Advance, error)
	CountReplay(ctx context.Context, pick *delivery.Picker, turn func(look func() error) error) (delivery.ReplayCounts, error)
	OpenIn(ns delivery.NamespaceKey) int64
	BeginErasure(ctx context.Context, r *delivery.Replay) error
	AdvanceErasure(ctx context.Context, r *delivery.Replay, partition uint16, selects delivery.Selects, rest func()) (delivery.Advance, error)
	CountErasure(ctx context.Context, r *delivery.Replay, selects delivery.Selects, turn func(look func() error) error) (*delivery.Replay, error)
	Scrub(ctx context.Context, r *delivery.Replay, selects delivery.Selects) (delivery.Proof, error)
	EndErasure(ctx context.Context, ns delivery.NamespaceKey, key uint64, proof delivery.Proof) (*delivery.Replay, error)
}

// Registry is what a Runner needs of *subscription.Registry.
type Registry interface {
	Snapshot() *subscription.Snapshot
}

// Selection is what a replay's filter selects of the deliveries of a namespace.
type Selection struct {
	// None: nothing at all.
	None bool
	// States and Subscription narrow it where they are known.
	States       []delivery.State
	Subscription delivery.SubscriptionKey
	Since, Until time.Time
	// Match has the last word.
	Match func(*delivery.Delivery) bool
}

// Options of a Runner. Journal, Registry and Select are required.
type Options struct {
	Journal  Journal
	Registry Registry
	// Select reads the filter of a replay of a namespace; one that was stored is known to be valid.
	Select func(namespace string, spec *delivery.ReplaySpec) (*Selection, error)
	// Erases reads what an erasure selects; one that was stored is known to be valid. Required where there are erasures.
	Erases func(spec *delivery.ReplaySpec) (delivery.Selects, error)
	// Copied reports whether a copy of the journal is on disk, or about to be, that may hold what has been purged. Nil: never.
	Copied func() bool
	// Ended is told of each replay that has ended, at least once: those that have within the last toldFor are told of
	// again at a start. It must not block. Nil is told nothing.
	Ended func(*delivery.Replay)
	// Logger nil discards.
	Logger *slog.Logger
	// Registerer takes the metrics; nil means none.
	Registerer prometheus.Registerer
}

// ErrStopped says that the server is about to end: nothing more is begun.
var ErrStopped = errors.New("replays have stopped")

// Runner runs replays. Its methods may be called from any goroutine; those that create and cancel need Run.
type Runner struct {
	journal  Journal
	registry Registry
	choose   func(string, *delivery.ReplaySpec) (*Selection, error)
	erases   func(*delivery.ReplaySpec) (delivery.Selects, error)
	copied   func() bool
	tell     func(*delivery.Replay)
	log      *slog.Logger
	metrics  *metrics

	// step lets one replay at a time make a step, of all namespaces in turn, and count one count at a time look.
	step, count chan struct{}
	// scrub lets one erasure at a time have files looked through.
	scrub chan struct{}

	mu      sync.Mutex
	jobs    map[name]*job
	running context.Context // nil before Run and after it
	workers sync.WaitGroup
}

type name struct {
	ns  delivery.NamespaceKey
	key uint64
}

// job is a replay that has not ended.
type job struct {
	*delivery.Replay
	cancel context.CancelFunc
	begun  bool // it is noted that it runs
	proof  delivery.Proof
	// done is closed when the replay has ended, or the server is about to.
	done chan struct{}

	mu      sync.Mutex
	waiting string
}

// New makes a Runner.
func New(o Options) *Runner {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Copied == nil {
		o.Copied = func() bool { return false }
	}
	r := &Runner{
		erases: o.Erases, copied: o.Copied, journal: o.Journal, registry: o.Registry, choose: o.Select, tell: o.Ended, log: o.Logger.With("component", "replay"),
		step: make(chan struct{}, 1), count: make(chan struct{}, 1), scrub: make(chan struct{}, 1), jobs: make(map[name]*job),
	}
	r.metrics = newMetrics(r, o.Registerer)
	return r
}

// Run goes on with the replays that have not ended, and with those that are created, until ctx ends and they have all
// stopped. They go on after the next start. Call it once.
func (r *Runner) Run(ctx context.Context) error {
	known, err := r.journal.Replays(0)
	if err != nil {
		return fmt.Errorf("read the replays: %w", err)
	}
	r.mu.Lock()
	r.running = ctx
	for _, one := range known {
		if !one.State.Ended() {
			r.begin(one)
		} else {
			r.ended(one) // the server may have ended before it could be told
		}
	}
	r.mu.Unlock()
	<-ctx.Done()
	r.mu.Lock()
	r.running = nil
	r.mu.Unlock()
	r.workers.Wait()
	return nil
}

// Create stores a replay and begins it; see delivery.Journal.CreateReplay.
func (r *Runner) Create(ctx context.Context, one *delivery.Replay) (*delivery.Replay, error) {
	r.mu.Lock()
	stopped := r.running == nil
	r.mu.Unlock()
	if stopped {
		return nil, ErrStopped
	}
	made, err := r.journal.CreateReplay(ctx, one, Running)
	if err != nil {
		// A caller who has left may have one all the same, which a look at what there is begins.
		if ctx.Err() != nil {
			r.adopt(one.Namespace)
		}
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !made.State.Ended() {
		r.begin(made)
	}
	return made, nil
}

// adopt begins replays of a namespace that are stored and not known.
func (r *Runner) adopt(ns delivery.NamespaceKey) {
	r.mu.Lock()
	ctx := r.running
	r.mu.Unlock()
	if ctx == nil {
		return
	}
	r.workers.Go(func() {
		if !sleep(ctx, time.Second) { // until its commit has been made
			return
		}
		known, err := r.journal.Replays(ns)
		if err != nil {
			r.log.Error("replays not read", "err", err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, one := range known {
			if !one.State.Ended() {
				r.begin(one)
			}
		}
	})
}

// begin starts a replay's goroutine, unless it has one. r.mu is held.
func (r *Runner) begin(one *delivery.Replay) {
	key := name{one.Namespace, one.Key}
	if r.jobs[key] != nil || r.running == nil {
		return
	}
	ctx, cancel := context.WithCancel(r.running)
	j := &job{Replay: one, cancel: cancel, done: make(chan struct{})}
	r.jobs[key] = j
	r.workers.Go(func() {
		r.run(ctx, j)
		cancel()
		r.mu.Lock()
		delete(r.jobs, key)
		r.mu.Unlock()
		close(j.done)
	})
}

func (r *Runner) find(ns delivery.NamespaceKey, key uint64) *job {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.jobs[name{ns, key}]
}

// WaitReason says what a replay that goes on waits for; empty when nothing holds it back.
func (r *Runner) WaitReason(ns delivery.NamespaceKey, key uint64) string {
	j := r.find(ns, key)
	if j == nil {
		return ""
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.waiting
}

// Wait returns when a replay has ended, when the server is about to, or when ctx ends.
func (r *Runner) Wait(ctx context.Context, ns delivery.NamespaceKey, key uint64) {
	j := r.find(ns, key)
	if j == nil {
		return
	}
	select {
	case <-j.done:
	case <-ctx.Done():
	}
}

// Cancel ends a replay as CANCELLED, durably; one that has ended is returned as it is. What it has made goes on.
func (r *Runner) Cancel(ctx context.Context, ns delivery.NamespaceKey, key uint64) (*delivery.Replay, error) {
	if j := r.find(ns, key); j != nil {
		j.cancel()
		select {
		case <-j.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	ended, err := r.journal.EndReplay(ctx, ns, key, delivery.ReplayCancelled, "")
	if err == nil {
		r.ended(ended)
	}
	return ended, err
}

// ended tells of a replay that has ended not long ago.
func (r *Runner) ended(one *delivery.Replay) {
	if r.tell != nil && !one.Spec.Erase && time.Since(one.DoneTime) < toldFor {
		r.tell(one)
	}
}

// Count counts what a replay of a namespace would make now, and makes nothing. It takes as long as a look at all that it
// would look at.
func (r *Runner) Count(ctx context.Context, one *delivery.Replay) (delivery.ReplayCounts, error) {
	pick, held := r.picker(one)
	if held.reason != "" {
		return delivery.ReplayCounts{}, errors.New(held.reason)
	}
	if pick == nil {
		return delivery.ReplayCounts{}, nil
	}
	return r.journal.CountReplay(ctx, pick, r.turn(ctx))
}

// CountErasure counts what an erasure of a namespace would purge now, and purges nothing.
func (r *Runner) CountErasure(ctx context.Context, one *delivery.Replay) (*delivery.Replay, error) {
	selects, err := r.erases(&one.Spec)
	if err != nil {
		return nil, err
	}
	return r.journal.CountErasure(ctx, one, selects, r.turn(ctx))
}

// turn has counts look one at a time, with rests.
func (r *Runner) turn(ctx context.Context) func(look func() error) error {
	return func(look func() error) error {
		select {
		case r.count <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		began := time.Now()
		err := look()
		<-r.count
		if err == nil && !sleep(ctx, min(restFor*time.Since(began), restMost)) {
			err = context.Cause(ctx)
		}
		return err
	}
}

// held is why a replay cannot go on, for now or for good; nothing holds it without a reason.
type held struct {
	reason string
	ends   bool
}

// picker says what a replay selects as the configuration is now. A nil one selects nothing.
func (r *Runner) picker(one *delivery.Replay) (*delivery.Picker, held) {
	snapshot := r.registry.Snapshot()
	ns := snapshot.NamespaceByKey(uint64(one.Namespace))
	if ns == nil || ns.Deleted() {
		_, gone := snapshot.Deleted(uint64(one.Namespace))
		return nil, held{"the namespace is deleted", gone || ns != nil}
	}
	if ns.State == grapnelv1.Namespace_STATE_DISABLED {
		return nil, held{"the namespace is disabled", false}
	}
	spec := &one.Spec
	pick := &delivery.Picker{Namespace: one.Namespace, Since: spec.Since, Until: spec.Until}
	var to *subscription.Subscription
	if spec.UID != (delivery.UID{}) {
		key := uint64(spec.UID.SubscriptionKey())
		if to = snapshot.SubscriptionByKey(key); to == nil {
			_, gone := snapshot.Deleted(key)
			return nil, held{"subscription " + spec.Subscription + " is deleted", gone}
		}
		if disabled(to) {
			return nil, held{"subscription " + spec.Subscription + " is disabled", false}
		}
	}
	if spec.Missing {
		if to == nil {
			return nil, held{"it names no subscription", true}
		}
		pick.Missing = spec.UID.SubscriptionKey()
		pick.Event = func(e *delivery.Event) (delivery.Target, delivery.Verdict) {
			c := ingest.Candidate(e)
			if !to.Wants(&c) {
				return delivery.Target{}, delivery.Pass
			}
			return targetOf(to), delivery.Take
		}
		return pick, held{}
	}
	selection, err := r.choose(ns.ID, spec)
	if err != nil {
		return nil, held{"its filter cannot be read: " + err.Error(), true}
	}
	if selection.None {
		return nil, held{}
	}
	pick.States, pick.Subscription, pick.Again = selection.States, selection.Subscription, spec.Retry
	if to != nil && !spec.Retry {
		pick.To = spec.UID.SubscriptionKey()
	}
	pick.Since, pick.Until = later(pick.Since, selection.Since), earlier(pick.Until, selection.Until)
	pick.Delivery = func(d *delivery.Delivery) (delivery.Target, delivery.Verdict) {
		if !selection.Match(d) {
			return delivery.Target{}, delivery.Pass
		}
		if to != nil && !spec.Retry {
			return targetOf(to), delivery.Take
		}
		own := snapshot.SubscriptionByKey(uint64(d.ID.Subscription))
		if own == nil || disabled(own) || spec.Retry && d.State == delivery.Succeeded {
			return delivery.Target{}, delivery.Skip
		}
		return targetOf(own), delivery.Take
	}
	return pick, held{}
}

func disabled(sub *subscription.Subscription) bool {
	return sub.State == grapnelv1.Subscription_STATE_DISABLED
}

func targetOf(sub *subscription.Subscription) delivery.Target {
	return delivery.Target{Subscription: sub.ID, UID: sub.UID, MaxAttempts: sub.MaxAttempts, MaxAge: sub.MaxAge, Ordered: sub.Ordered}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// earlier takes the zero time for none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
