package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/pluginhost/process"
)

// supervisor keeps one spec running: one goroutine starts a process, waits for its end, and starts it again.
type supervisor struct {
	host *Host
	key  string
	spec Spec
	log  *slog.Logger
	// conn is nil while the process takes no attempts; leaving is set instead while it drains.
	conn    atomic.Pointer[conn]
	leaving atomic.Pointer[conn]

	place  place                   // guarded by the host's mu
	cancel context.CancelCauseFunc // guarded by the host's mu; nil until it is launched

	mu       sync.Mutex // guards what follows
	name     string
	version  string
	protocol string
	state    state
	changed  chan struct{} // closed and replaced at each change of state
	started  time.Time
	restarts int
	image    process.Image // what was started last
	lastErr  string
	// refusal is why a process that was to replace this one did not.
	refusal error
	crashes []crash   // of the last failedWithin
	crashed time.Time // the latest
	last    []string  // what it wrote before that
	told    bool      // that it has failed, since it last had not
}

type state int

const (
	starting state = iota
	serving
	backoff
	failed
	stopped
)

func newSupervisor(h *Host, k keyed, in place) *supervisor {
	return &supervisor{
		host: h, key: k.key, spec: k.spec, place: in, name: k.spec.label(), changed: make(chan struct{}),
		log: h.log.With("plugin", k.spec.label()),
	}
}

// launch starts the supervisor. The host's mu is held, and the host runs.
func (h *Host) launch(p *supervisor) {
	ctx, cancel := context.WithCancelCause(h.running)
	p.cancel = cancel
	h.workers.Go(func() {
		defer cancel(nil)
		p.run(ctx)
		h.mu.Lock()
		defer h.mu.Unlock()
		if p.place != holding {
			h.procs = without(h.procs, p)
		}
	})
}

func without(procs []*supervisor, p *supervisor) []*supervisor {
	var rest []*supervisor
	for _, q := range procs {
		if q != p {
			rest = append(rest, q)
		}
	}
	return rest
}

func (p *supervisor) displayName() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.name
}

// about names the process for people, with its version where that is known.
func (p *supervisor) about() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.TrimSpace(p.name + " " + p.version)
}

// crash is an end that nobody asked for.
type crash struct {
	at     time.Time
	killed bool
}

// killedError is the end of a life that says nothing against the plugin: somebody else's signal made it, what one
// subscription brought, or a shortage of this machine.
type killedError struct {
	error
	served bool // until then
}

// runs reports whether the process is what spec asks for, to the file.
func (p *supervisor) runs(spec Spec) bool {
	if !p.spec.equal(spec) {
		return false
	}
	p.mu.Lock()
	seen := p.image
	p.mu.Unlock()
	return spec.SHA256 != "" || seen.Current(spec.Path)
}

func (p *supervisor) setState(s state) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = s
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *supervisor) setRefusal(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusal = err
}

// took notes what a process that is about to serve says of itself.
func (p *supervisor) took(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.name, p.version, p.protocol = c.name, c.version, c.protocol
	p.started, p.refusal = time.Now(), nil
}

// carryOn goes on counting where the process before it ends.
func (p *supervisor) carryOn(before *supervisor) {
	before.mu.Lock()
	restarts := before.restarts
	before.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.restarts += restarts
}

func (p *supervisor) serves() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state == serving
}

func (p *supervisor) awaitServing(ctx context.Context) error {
	for {
		p.mu.Lock()
		s, changed, lastErr := p.state, p.changed, p.lastErr
		p.mu.Unlock()
		if s == serving {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if lastErr != "" {
				return fmt.Errorf("%w (%s)", ctx.Err(), lastErr)
			}
			return ctx.Err()
		}
	}
}

// run supervises until ctx ends, or until a process that was to take a place cannot.
func (p *supervisor) run(ctx context.Context) {
	defer p.setState(stopped)
	for short := 0; ; {
		p.setState(starting)
		began := time.Now()
		err := p.live(ctx)
		if ctx.Err() != nil {
			return
		}
		if p.succeeding() {
			p.host.refuse(p, err)
			return
		}
		var killed killedError
		switch {
		case time.Since(began) >= p.host.timing.stable:
			short = 0
		case errors.As(err, &killed) && killed.served:
			short = min(short, killedPause)
		}
		short++
		timer := time.NewTimer(p.ended(err, short))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

func (p *supervisor) succeeding() bool {
	p.host.mu.Lock()
	defer p.host.mu.Unlock()
	return p.place == succeeding
}

// live is one life of the process, from its start to its end, and returns why it ended.
func (p *supervisor) live(ctx context.Context) error {
	c, err := p.start(ctx)
	if process.Short(err) {
		return killedError{fmt.Errorf("%s: %w", shortWords, err), false}
	}
	if err != nil {
		return err
	}
	if err := p.host.install(p, c); err != nil {
		return p.abandon(c, err)
	}
	return p.serve(ctx, c)
}

// serve lets attempts in until the process ends or ctx does, and returns why it ended.
func (p *supervisor) serve(ctx context.Context, c *conn) error {
	p.setState(serving)
	p.log.Info("plugin serves", "version", c.version, "pid", c.child.Pid())
	p.host.unpark()
	select {
	case <-ctx.Done():
		p.leaving.Store(c)
		p.conn.CompareAndSwap(c, nil) // before the links close, lest attempts be planned for them again and again
		if errors.Is(context.Cause(ctx), errReplaced) {
			c.handOver()
		}
		c.stop()
		p.leaving.Store(nil)
		p.log.Info("plugin stopped", "version", c.version, "pid", c.child.Pid())
		return ctx.Err()
	case <-c.broken:
	}
	p.conn.Store(nil)
	cause := c.cause.Error()
	if broken := new(brokenError); errors.As(c.cause, &broken) {
		cause = c.told() // it stands where tenants read it, too
		p.log.Warn("plugin said as a stream ended", "stream", broken.what, "text", broken.why)
	}
	if errors.Is(c.cause, errHangs) {
		p.host.metrics.hangs.Inc()
		c.child.Dump(p.host.timing.dump)
	} else if c.ended() && !errors.Is(c.cause, errProtocol) {
		cause = c.child.Why() // the better reason
	}
	killed := c.child.KilledByOthers() // before it is the server that kills what is left
	c.end(c.name + ": " + c.told())
	p.noteOutput(c)
	if _, laid := c.culprit(); laid && c.answered.Load() {
		return killedError{errors.New(cause), true} // it works for others
	}
	if killed && !errors.Is(c.cause, errProtocol) && !errors.Is(c.cause, errHangs) {
		return killedError{errors.New(cause), true}
	}
	return errors.New(cause)
}

// noteOutput keeps what a process wrote last, without secrets.
func (p *supervisor) noteOutput(c *conn) {
	last := c.out.Last()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = last
}

// ended notes the end of a life and says how long to wait before the next.
func (p *supervisor) ended(err error, short int) time.Duration {
	t := p.host.timing
	now := time.Now()
	p.mu.Lock()
	p.restarts++
	p.lastErr = err.Error()
	p.crashed = now
	var killed killedError
	p.crashes = append(p.recent(now), crash{now, errors.As(err, &killed)})
	own := 0
	for _, c := range p.crashes {
		if !c.killed {
			own++
		}
	}
	fails := own >= failedAfter && killed.error == nil
	tells := fails && !p.told && p.host.above == nil && p.host.opts.Failed != nil
	p.told = p.told && own >= failedAfter
	failure := Failure{Plugin: p.name, Version: p.version, Crashes: own, Reason: p.lastErr, Time: now, RetryTime: now.Add(t.failedRetry)}
	p.mu.Unlock()
	if tells && p.host.opts.Failed(failure) {
		p.mu.Lock()
		p.told = true
		p.mu.Unlock()
	}
	p.host.metrics.restarts.WithLabelValues(p.displayName()).Inc()
	if fails {
		p.setState(failed)
		p.log.Error("plugin failed", "crashes", own, "retry_in", t.failedRetry, "err", err)
		return t.failedRetry
	}
	p.setState(backoff)
	delay := min(t.backoffMax, t.backoffMin<<min(short-1, 20))
	delay = delay/2 + rand.N(delay/2+1)
	p.log.Warn("plugin ended", "retry_in", delay, "err", err)
	return delay
}

// recent are the crashes that still count.
func (p *supervisor) recent(now time.Time) []crash {
	for len(p.crashes) > 0 && now.Sub(p.crashes[0].at) > failedWithin {
		p.crashes = p.crashes[1:]
	}
	return p.crashes
}

// maxAttributes is how many are taken of one of a plugin's log records.
const maxAttributes = 32

// logRecords passes a plugin's own log on.
func (p *supervisor) logRecords(c *conn, batch *pluginv1.LogBatch) {
	for _, r := range batch.GetRecords() {
		var level slog.Level
		_ = level.UnmarshalText([]byte(r.GetLevel())) // an unknown one is info
		names := slices.Sorted(maps.Keys(r.GetAttributes()))
		names = names[:min(len(names), maxAttributes)]
		attrs := make([]slog.Attr, 0, len(names))
		for _, k := range names {
			attrs = append(attrs, slog.String(c.said(k), c.said(r.GetAttributes()[k])))
		}
		p.log.LogAttrs(c.ctx, level, "plugin log",
			slog.String("text", c.said(r.GetMessage())),
			slog.Attr{Key: "attributes", Value: slog.GroupValue(attrs...)})
	}
	if n := batch.GetDropped(); n > 0 {
		p.log.Warn("plugin logs too much", "dropped", n)
	}
}
