// Package pluginhost owns that attempts run in other processes: it starts plugin processes, keeps them
// running, tells them which instances there are, hands them attempts in batches and turns their answers
// into delivery.Results.
//
// It guarantees that every Attempt is completed exactly once, whatever the plugin does; that an attempt
// which was written to a process that died without an answer comes back as indeterminate, and one that
// was not comes back unspent; that a broken plugin is a status and never ends the server; and that no
// secret's value shows up in a log or an error. It does not retry, schedule or judge receivers.
//
// A plugin process moves like this:
//
//	starting ──▶ serving ──▶ backoff ──▶ starting …
//	    └──────────────────────▲ │
//	                             └──▶ failed (5 crashes in 5 minutes; tried again every 30 s)
//
// Crashes count for this that are a plugin's own doing. A process that somebody else's signal ends while it serves, as
// the kernel does for want of memory, is back within a second, however often that happens.
//
// Update replaces a plugin while attempts are at hand: the new process starts beside the old one, and only once it
// has described itself and opened its streams do the kinds move over, in one step. What waits for the old process
// goes to the new one; what was written to it is answered by it, and then it ends.
//
// Deliveries that were in flight at a crash are tried in processes apart, see wards.
//
// Lock order: Host.updating, Host.mu, kindTable.mu, process.mu; planTable.shard, then link. Nothing is completed, and
// no plugin is called, under any of them.
package pluginhost

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/check"
	"github.com/grapnel/grapnel/server/pluginhost/process"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/subscription"
	"github.com/grapnel/grapnel/server/tracing"
)

var (
	// ErrUnavailable means that the plugin a caller asked about is not running just now.
	ErrUnavailable = check.ErrUnavailable
	// ErrUnknownPlugin means that no plugin offers the kind a caller asked about.
	ErrUnknownPlugin = errors.New("no such plugin")
)

// SecretVersion is one live version of a secret.
type SecretVersion struct {
	Number int
	Value  []byte
	// Expire is zero for the newest.
	Expire time.Time
}

// Options configure a Host.
type Options struct {
	// Plugins to run. Of two that want to offer the same kind, or to be the default for the same URI scheme, it is the
	// builtin one, or the first in this order.
	Plugins []Spec
	// Dir is where sockets go, and this Host's alone: it is made anew, with mode 0700, and what a killed predecessor has
	// left in it is removed. When its path is too long for a socket, or it cannot hold one, a private directory under the
	// system's temporary one is used, whose name follows from Dir's; when it is empty, any.
	Dir string
	// EgressAllow are the ranges that plugins may connect to although they are private or reserved.
	EgressAllow []netip.Prefix
	// EgressDeny are ranges that they may not connect to whatever is allowed, with a port or without: 10.0.0.0/8,
	// 127.0.0.1/32:7071.
	EgressDeny []string
	// UserAgent is what transports say they are; empty means grapnel.
	UserAgent string
	// Secrets returns the live versions of a secret by resource name, newest first. Required.
	Secrets func(name string) ([]SecretVersion, bool)
	// Failed is told of each plugin that has failed, at each of its crashes until it is heard, and then once until it has
	// been well for five minutes. It must not block. Nil is told nothing.
	Failed func(Failure) (heard bool)
	// Tracer makes the spans of attempts at events that are sampled; nil makes none.
	Tracer *tracing.Tracer
	// Bodies keeps what transformers make; nil keeps nothing.
	Bodies Bodies
	// MadeBytes bounds what transformers have made and attempts at hand carry; 0 means 32 MiB. Beyond it deliveries of
	// subscriptions with a transformer wait.
	MadeBytes int64
	// Logger defaults to one that discards.
	Logger *slog.Logger
	// Registerer is optional.
	Registerer prometheus.Registerer
}

// Failure is of a plugin whose process has crashed again and again by its own doing.
type Failure struct {
	// Plugin is the name of what the process serves as, or that of its file, Version its version where that is known.
	Plugin, Version string
	// Crashes is how many there were within five minutes, Reason how the last one ended, without secrets.
	Crashes int
	Reason  string
	// Time is now, RetryTime when it is started again.
	Time, RetryTime time.Time
}

// Bodies is where what transformers have made is kept, before it is first sent.
type Bodies interface {
	// Made returns what was kept for a delivery; nil when nothing was.
	Made(job *delivery.Job) (*delivery.Made, error)
	// KeepMade keeps it durably, and returns what is kept: what was before, if anything was.
	KeepMade(ctx context.Context, job *delivery.Job, made *delivery.Made) (*delivery.Made, error)
}

// timing is what tests shorten.
type timing struct {
	start       time.Duration // process to handshake
	call        time.Duration // Describe, Configure and the like
	backoffMin  time.Duration
	backoffMax  time.Duration
	stable      time.Duration // serving this long forgets earlier crashes
	failedRetry time.Duration
	park        time.Duration // longest wait of an attempt for a process to come back
	grace       time.Duration // past an attempt's timeout, before its plugin counts as hung
	heartbeat   time.Duration
	sweep       time.Duration
	term        time.Duration // SIGTERM to SIGKILL
	dump        time.Duration // SIGQUIT to SIGKILL, for a hung process to say where it hangs
	drain       time.Duration // longest wait for attempts at a stop
	retire      time.Duration // how long an instance that was replaced stays
	idle        time.Duration // how long one stays that nobody uses; longer than any attempt
	many        int           // where there are more plans than that,
	lately      time.Duration // those go that were not used for so long, the longest first
	fade        time.Duration // how long its secrets are still looked for then: longer than any attempt
}

func defaultTiming() timing {
	return timing{
		start: 10 * time.Second, call: 10 * time.Second,
		backoffMin: 100 * time.Millisecond, backoffMax: 30 * time.Second,
		stable: time.Minute, failedRetry: 30 * time.Second,
		park: 500 * time.Millisecond, grace: 5 * time.Second,
		heartbeat: 5 * time.Second, sweep: 250 * time.Millisecond,
		term: 5 * time.Second, dump: time.Second, drain: 65 * time.Second, retire: 2 * time.Second, idle: 10 * time.Minute, many: 32_768, lately: 10 * time.Second, fade: 2 * time.Minute,
	}
}

const (
	failedAfter  = 5
	failedWithin = 5 * time.Minute
	killedPause  = 3 // pauses before a process that is killed while it serves grow this often: to 800 ms
)

// Host runs plugins. All methods are safe for concurrent use.
type Host struct {
	opts    Options
	log     *slog.Logger
	timing  timing
	metrics *metrics
	dirs    *process.Dirs // shared with wards

	kinds kindTable
	plans planTable
	// swept is when the last sweep was, in nanoseconds since 1970.
	swept      atomic.Int64
	generation atomic.Uint64
	parking    parking
	shapes     wire.Shapes
	wards      wards
	accused    accused
	own        *ownImage
	above      *Host       // of a ward
	free       sync.Pool   // of *pending: one per attempt is garbage enough to show
	closed     atomic.Bool // no attempt is taken any more
	closing    *closing    // shared with wards
	made       *madeBytes  // shared with wards
	ended      chan struct{}

	updating sync.Mutex         // held through an Update
	mu       sync.Mutex         // guards what follows
	procs    []*supervisor      // all that are supervised, also those that are to take a place and those that leave
	running  context.Context    //nolint:containedctx // Run's; nil before it, and once it ends
	stop     context.CancelFunc // ends Run
	workers  sync.WaitGroup     // one for each process while running
}

// New checks the options and makes the socket directory; it starts nothing.
func New(opts Options) (*Host, error) {
	dirs := &process.Dirs{}
	if err := dirs.Make(opts.Dir); err != nil {
		return nil, fmt.Errorf("pluginhost: %w", err)
	}
	return newHost(opts, dirs)
}

func newHost(opts Options, dirs *process.Dirs) (*Host, error) {
	if opts.Secrets == nil {
		return nil, errors.New("pluginhost: option Secrets is required")
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.UserAgent == "" {
		opts.UserAgent = "grapnel"
	}
	h := &Host{opts: opts, own: &ownImage{}, dirs: dirs, ended: make(chan struct{}), closing: &closing{over: make(chan struct{})}, made: newMadeBytes(opts.MadeBytes), log: opts.Logger.With("component", "pluginhost"), timing: defaultTiming(), metrics: newMetrics(opts.Registerer)}
	specs, err := identify(opts.Plugins)
	if err != nil {
		return nil, fmt.Errorf("pluginhost: %w", err)
	}
	specs, disabled := parted(specs)
	h.kinds.settle(specs, disabled)
	for _, k := range specs {
		h.procs = append(h.procs, newSupervisor(h, k, holding))
	}
	return h, nil
}

// closing is the time that a stop has.
type closing struct {
	once sync.Once
	over chan struct{} // closed at its end
	by   atomic.Int64  // Unix nanoseconds, where that is known beforehand
}

func (c *closing) end() { c.once.Do(func() { close(c.over) }) }

// left is how long a stop may still take, longest at most.
func (c *closing) left(longest time.Duration) time.Duration {
	if by := c.by.Load(); by != 0 {
		longest = min(longest, time.Until(time.Unix(0, by)))
	}
	return max(0, longest)
}

// Close stops what Run runs, and returns when that has ended: attempts at hand may end until ctx does, then the processes
// are killed. It returns ctx's error when it came to that, and may be called before Run, which then returns at once.
func (h *Host) Close(ctx context.Context) error {
	h.mu.Lock()
	h.closed.Store(true)
	stop := h.stop
	h.mu.Unlock()
	if by, ok := ctx.Deadline(); ok {
		h.closing.by.Store(by.UnixNano())
	}
	defer context.AfterFunc(ctx, h.closing.end)()
	if stop == nil {
		return nil
	}
	stop()
	<-h.ended
	return ctx.Err()
}

// Run supervises the plugins until ctx ends, then drains and stops them; see Close for a stop that is bounded. It
// returns nil.
func (h *Host) Run(ctx context.Context) error {
	defer close(h.ended)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h.mu.Lock()
	h.running, h.stop = ctx, cancel
	if h.closed.Load() {
		cancel()
	}
	for _, p := range h.procs {
		h.launch(p)
	}
	h.mu.Unlock()
	sweeping, stopSweeping := context.WithCancel(context.WithoutCancel(ctx))
	var sweeper sync.WaitGroup
	sweeper.Go(func() { h.sweep(sweeping) })
	<-ctx.Done()
	h.mu.Lock()
	h.running = nil // nothing is launched any more
	h.mu.Unlock()
	h.workers.Go(h.wards.close)
	h.workers.Wait()
	h.closed.Store(true)
	stopSweeping()
	sweeper.Wait()
	h.releaseParked(time.Time{})
	if h.above == nil {
		h.dirs.Remove()
	}
	return nil
}

// processes are all that are supervised just now.
func (h *Host) processes() []*supervisor {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.procs)
}

// Ready returns when all builtin plugins serve, or with ctx's error and what is wrong.
func (h *Host) Ready(ctx context.Context) error {
	for _, p := range h.processes() {
		if !p.spec.Builtin {
			continue
		}
		if err := p.awaitServing(ctx); err != nil {
			return fmt.Errorf("plugin %s: %w", p.displayName(), err)
		}
	}
	return nil
}

// Drain takes no new attempts and returns when those at hand have ended, or with ctx's error.
func (h *Host) Drain(ctx context.Context) error {
	h.closed.Store(true)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for h.metrics.open.Load() > 0 {
		select {
		case <-ctx.Done():
			return fmt.Errorf("drain plugins: %d attempts at hand: %w", h.metrics.open.Load(), ctx.Err())
		case <-tick.C:
		}
	}
	return nil
}

// Pids are the running processes by plugin name, for tests and demonstrations. Of two that share a name, as in
// an upgrade, it is the one that takes attempts.
func (h *Host) Pids() map[string]int {
	pids := map[string]int{}
	for _, p := range h.processes() {
		if c := p.conn.Load(); c != nil {
			pids[p.displayName()] = c.child.Pid()
		}
	}
	return pids
}

// Attempt hands one attempt to the plugins of the subscription. It returns at once; sink.Complete is
// called exactly once, from any goroutine. With no plugin there to do it the result is CauseUnspent,
// after a short wait for one to come back.
func (h *Host) Attempt(sub *subscription.Subscription, job *delivery.Job, sink delivery.Sink) {
	h.metrics.open.Add(1)
	p := h.newPending(sub, job, sink)
	h.trace(p)
	if h.closed.Load() {
		go h.unspent(p, "the server is stopping") // never on the caller's own stack
		return
	}
	h.route(p)
}

// AttemptBatch is Attempt for jobs that travel in one request, of a subscription with batching. Sink.Complete is called once
// for all, with the first.
func (h *Host) AttemptBatch(sub *subscription.Subscription, jobs []*delivery.Job, sink delivery.Sink) {
	h.metrics.open.Add(1)
	p := h.newPending(sub, jobs[0], sink)
	p.jobs = jobs
	h.trace(p)
	if h.closed.Load() {
		go h.unspent(p, "the server is stopping") // never on the caller's own stack
		return
	}
	h.route(p)
}

// Window is how many attempts the process that sends for a subscription takes at once; 0 while that is not known.
func (h *Host) Window(sub *subscription.Subscription) int {
	pl := h.plans.get(sub.UID)
	if pl == nil || pl.transport == nil {
		return 0
	}
	return pl.transport.attempts.window()
}

// Changed drops what was configured for subscriptions that changed.
func (h *Host) Changed(changes []subscription.Change) {
	for _, c := range changes {
		switch {
		case c.New == nil && c.Old != nil:
			h.plans.invalidate(h, c.Old.UID)
		case c.New != nil:
			h.plans.invalidate(h, c.New.UID)
		}
	}
	h.wards.each(func(w *Host) { w.Changed(changes) })
}

// SecretChanged has every instance that uses the secret configured again before its next attempt.
func (h *Host) SecretChanged(name string) {
	for _, uid := range h.plans.using(name) {
		h.plans.invalidate(h, uid)
	}
	h.wards.each(func(w *Host) { w.SecretChanged(name) })
}

// sweep looks after deadlines, parked attempts and retired instances, with one ticker for all.
func (h *Host) sweep(ctx context.Context) {
	tick := time.NewTicker(h.timing.sweep)
	defer tick.Stop()
	last := time.Now()
	idled := last
	var awake time.Time // since when this process has run without a break
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if now.Sub(last) > h.timing.sweep+h.timing.grace/2 {
				awake = now // it was stopped or starved itself: the answers may lie there unread
			}
			last = now
			h.swept.Store(now.UnixNano())
			if now.Sub(idled) > min(h.timing.idle/10, h.timing.lately) {
				idled = now
				h.plans.idle(h, now)
			}
			h.releaseParked(now)
			for _, p := range h.processes() {
				for _, c := range []*conn{p.conn.Load(), p.leaving.Load()} {
					if c != nil {
						c.sweep(now, now.Sub(awake) < h.timing.grace)
					}
				}
			}
		}
	}
}

// parking holds attempts whose plugin is not there.
type parking struct {
	mu      sync.Mutex // guards waiting
	waiting []*pending
}

// park keeps p until a process comes up, or its time of waiting is over.
func (h *Host) park(p *pending) {
	now := time.Now()
	if p.parkUntil.IsZero() {
		p.parkUntil = now.Add(h.timing.park)
	}
	h.parking.mu.Lock()
	over := h.closed.Load() || !now.Before(p.parkUntil) // under the lock: releaseParked comes after closed
	if !over {
		h.parking.waiting = append(h.parking.waiting, p)
	}
	h.parking.mu.Unlock()
	if over {
		h.unspent(p, h.absence(p.sub.Proto()))
	}
}

// absence says which of a subscription's plugins is not there.
func (h *Host) absence(sub *grapnelv1.Subscription) string {
	if h.above != nil {
		return h.above.absence(sub)
	}
	for _, pb := range check.Signers(sub) {
		if why := h.kinds.absent(check.SignerID(pb)); why != "" {
			return why
		}
	}
	if pb := sub.GetTransformer(); pb != nil {
		if why := h.kinds.absent(check.TransformerID(pb)); why != "" {
			return why
		}
	}
	return cmp.Or(h.kinds.absent(transportID(&h.kinds, sub)), "the plugin is being started")
}

// unpark has all parked attempts look for their plugin again.
func (h *Host) unpark() {
	h.parking.mu.Lock()
	waiting := h.parking.waiting
	h.parking.waiting = nil
	h.parking.mu.Unlock()
	for _, p := range waiting {
		h.route(p)
	}
}

// releaseParked gives back attempts that have waited long enough; a zero now means all.
func (h *Host) releaseParked(now time.Time) {
	var over []*pending
	h.parking.mu.Lock()
	h.parking.waiting = slices.DeleteFunc(h.parking.waiting, func(p *pending) bool {
		if !now.IsZero() && now.Before(p.parkUntil) && !h.closed.Load() {
			return false
		}
		over = append(over, p)
		return true
	})
	h.parking.mu.Unlock()
	for _, p := range over {
		h.unspent(p, h.absence(p.sub.Proto()))
	}
}
