package pluginhost

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/check"
	"github.com/grapnel/grapnel/server/subscription"
)

// A delivery that was in flight when a plugin crashed is a suspect: its next attempt may be what the plugin
// dies of once more. Suspects are tried in wards, which are processes of the same plugins beside those that
// serve everybody, started when they are needed and ended when they have been idle for a while. A crash there
// hits nobody but other suspects. There are two wards for each set of plugins that a subscription may need:
//
//   - The common ward takes all that were in flight at one crash: a few at first, and twice as many every
//     moment that it lives, so that after a kill a thousand innocents are through in no time, and whatever is
//     slow among them holds up nobody. When it crashes of its own doing, fewer yet were in flight.
//   - The cell takes those that were in flight when a ward crashed of its own doing, one at a time, so that
//     another crash says whose doing it was. Few wait for it, those first that were there at the most crashes;
//     the rest goes through the common ward again.
//
// Subscriptions that a process has named as what it died of are suspects with all they deliver, see accused.
//
// What follows from a crash is delivery.Next's to say.

const (
	// wardFirst and wardAfter are how many attempts a common ward begins with, at first and after a crash of its
	// own doing; it doubles every wardGrowth up to wardMost.
	wardFirst  = 64
	wardAfter  = 8
	wardMost   = 1024
	wardGrowth = 200 * time.Millisecond
	// cellQueue bounds what waits for a cell: those that wait hold slots of dispatch.
	cellQueue = 32
	// wardIdle is how long a ward stays up without a suspect.
	wardIdle = 30 * time.Second
	// wardPark is how long suspects wait for a ward's processes to come up.
	wardPark = 10 * time.Second
	// wardRetry bounds the pauses between a ward's restarts: its crashes harm nobody else.
	wardRetry = time.Second
)

// wards are a host's.
type wards struct {
	running sync.WaitGroup

	mu     sync.Mutex // guards what follows, and what is in the wards
	all    []*ward
	closed bool
}

// ward is a host of its own for the processes of one set of plugins.
type ward struct {
	*Host
	procs  []*supervisor // of the host above; another process is another ward
	cell   bool
	cancel context.CancelFunc
	busy   int
	queue  []*pending
	idle   *time.Timer // ends it
	// room is how many attempts at a time it began with since.
	room  int
	since time.Time
	grow  *time.Timer // tries again once there is more room
}

// admit takes a suspect. It returns false when that is no business of wards: their plugins are not running
// anyway, or the host stops.
func (h *Host) admit(p *pending) bool {
	procs, ok := h.servedBy(p.sub)
	if !ok {
		return false
	}
	placed := h.wards.place(h, p, procs)
	for _, w := range placed {
		w.try(&h.wards)
	}
	return len(placed) > 0
}

// servedBy are the processes that attempts of a subscription go through, if all are there: but for a transformer's, without
// which what it has made before is sent.
func (h *Host) servedBy(sub *subscription.Subscription) ([]*supervisor, bool) {
	message := sub.Proto()
	ids := []string{transportID(&h.kinds, message)}
	for _, pb := range check.Signers(message) {
		ids = append(ids, check.SignerID(pb))
	}
	if pb := message.GetTransformer(); pb != nil && h.kinds.absent(check.TransformerID(pb)) == "" {
		ids = append(ids, check.TransformerID(pb))
	}
	var procs []*supervisor
	for _, id := range ids {
		k := h.kinds.get(id)
		if k == nil || k.proc.conn.Load() == nil {
			return nil, false
		}
		if !slices.Contains(procs, k.proc) {
			procs = append(procs, k.proc)
		}
	}
	return procs, true
}

// place puts p in the queue of a ward, and returns the wards whose queues have changed; none when p cannot be
// placed. The most suspected go first into a cell: what a plugin dies of was there at every crash, others only
// at some.
func (ws *wards) place(h *Host, p *pending, procs []*supervisor) []*ward {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.closed {
		return nil
	}
	if p.suspicion > 1 {
		if cell := ws.open(h, procs, true); cell != nil {
			placed := []*ward{cell}
			if left := cell.lock(p); left != nil {
				elsewhere := ws.common(h, left, procs)
				if elsewhere == nil {
					cell.queue = append(cell.queue, left) // it must wait somewhere
				}
				placed = append(placed, elsewhere...)
			}
			return placed
		}
	}
	return ws.common(h, p, procs)
}

// common puts p in the queue of the common ward.
func (ws *wards) common(h *Host, p *pending, procs []*supervisor) []*ward {
	w := ws.open(h, procs, false)
	if w == nil {
		return nil
	}
	return w.take(p)
}

// lock is for a cell; it returns the one that has no room for it.
func (w *ward) lock(p *pending) *pending {
	w.idle.Stop()
	at := len(w.queue)
	for at > 0 && w.queue[at-1].suspicion < p.suspicion {
		at--
	}
	w.queue = slices.Insert(w.queue, at, p)
	if len(w.queue) <= cellQueue {
		return nil
	}
	last := w.queue[cellQueue]
	w.queue = slices.Delete(w.queue, cellQueue, cellQueue+1)
	return last
}

// take is for a common ward.
func (w *ward) take(p *pending) []*ward {
	w.idle.Stop()
	if w.busy == 0 && len(w.queue) == 0 {
		w.since = time.Now()
	}
	w.queue = append(w.queue, p)
	return []*ward{w}
}

// open returns the ward, which is made when there is none.
func (ws *wards) open(h *Host, procs []*supervisor, cell bool) *ward {
	for _, w := range ws.all {
		if w.cell == cell && slices.Equal(w.procs, procs) {
			return w
		}
	}
	w, err := h.newWard(procs, cell)
	if err != nil {
		h.log.Error("suspects cannot be tried apart from others", "err", err)
		return nil
	}
	w.idle = time.AfterFunc(wardIdle, func() { ws.leave(w) })
	w.grow = time.AfterFunc(wardGrowth, func() { w.try(ws) })
	ws.all = append(ws.all, w)
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	ws.running.Go(func() { _ = w.Run(ctx) })
	return w
}

func (h *Host) newWard(procs []*supervisor, cell bool) (*ward, error) {
	opts := h.opts
	opts.Plugins, opts.Registerer = nil, nil
	opts.Logger = h.opts.Logger.With(slog.Bool("suspects", true))
	for _, p := range procs {
		opts.Plugins = append(opts.Plugins, p.spec)
	}
	host, err := newHost(opts, h.dirs)
	if err != nil {
		return nil, err
	}
	host.above, host.metrics, host.timing, host.own, host.closing, host.made = h, h.metrics, h.timing, h.own, h.closing, h.made
	host.timing.park = max(host.timing.park, wardPark)
	host.timing.backoffMax = min(host.timing.backoffMax, wardRetry)
	host.timing.failedRetry = min(host.timing.failedRetry, wardRetry)
	return &ward{Host: host, procs: procs, cell: cell, room: wardFirst}, nil
}

// limit is how many attempts it takes at a time.
func (w *ward) limit(now time.Time) int {
	if w.cell {
		return 1
	}
	return min(wardMost, w.room<<min(now.Sub(w.since)/wardGrowth, 10))
}

// try starts what waits, as much as the ward takes at a time.
func (w *ward) try(ws *wards) {
	for {
		ws.mu.Lock()
		if len(w.queue) == 0 || w.busy >= w.limit(time.Now()) {
			if len(w.queue) > 0 && !w.cell {
				w.grow.Reset(wardGrowth)
			}
			ws.mu.Unlock()
			return
		}
		p := w.queue[0]
		w.queue[0] = nil
		w.queue = w.queue[1:]
		w.busy++
		ws.mu.Unlock()
		p.sink = &watched{ws: ws, ward: w, sink: p.sink}
		w.route(p)
	}
}

// watched is the sink of an attempt in a ward.
type watched struct {
	ws   *wards
	ward *ward
	sink delivery.Sink
}

// Complete implements delivery.Sink.
func (s *watched) Complete(job *delivery.Job, r delivery.Result) {
	s.ws.mu.Lock()
	s.ward.busy--
	if r.Indeterminate && r.Guilt != delivery.GuiltNone {
		s.ward.room, s.ward.since = wardAfter, time.Now()
	}
	if s.ward.busy == 0 && len(s.ward.queue) == 0 {
		s.ward.idle.Reset(wardIdle)
	}
	s.ws.mu.Unlock()
	s.sink.Complete(job, r)
	s.ward.try(s.ws)
}

// leave ends a ward that nobody needs.
func (ws *wards) leave(w *ward) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if w.busy > 0 || len(w.queue) > 0 {
		return
	}
	ws.all = slices.DeleteFunc(ws.all, func(other *ward) bool { return other == w })
	w.cancel()
}

// close gives back what waits, lets the rest end, and returns when all wards have.
func (ws *wards) close() {
	ws.mu.Lock()
	ws.closed = true
	all := ws.all
	ws.all = nil
	waiting := make([][]*pending, len(all))
	for i, w := range all {
		w.idle.Stop()
		waiting[i], w.queue = w.queue, nil
	}
	ws.mu.Unlock()
	for i, w := range all {
		for _, p := range waiting[i] {
			w.unspent(p, "the server is stopping")
		}
		w.cancel()
	}
	ws.running.Wait()
}

// each calls f with the host of every ward.
func (ws *wards) each(f func(*Host)) {
	ws.mu.Lock()
	all := slices.Clone(ws.all)
	ws.mu.Unlock()
	for _, w := range all {
		f(w.Host)
	}
}

// guilts says for each of the attempts that a process held, which has ended, what speaks for it that the process died of
// it. Where the process has named a culprit, only the culprit's count.
func (c *conn) guilts(held []*pending) func(*pending) delivery.Guilt {
	of, known := c.culprit()
	if !known {
		all := c.guilt(deliveries(held))
		return func(*pending) delivery.Guilt { return all }
	}
	c.accuse(of)
	its := 0
	for _, p := range held {
		if p.sub.UID == of.uid {
			its += max(1, len(p.jobs))
		}
	}
	guilt := c.guilt(its)
	return func(p *pending) delivery.Guilt {
		if p.sub.UID != of.uid {
			return delivery.GuiltNone
		}
		return guilt
	}
}

// deliveries is how many they carry.
func deliveries(held []*pending) int {
	n := 0
	for _, p := range held {
		n += max(1, len(p.jobs))
	}
	return n
}

// guilt says what speaks for it that the process, which has ended, died of one of the attempts that it held.
func (c *conn) guilt(held int) delivery.Guilt {
	switch {
	case !c.ownDoing():
		return delivery.GuiltNone
	case held > 1:
		return delivery.GuiltShared
	case c.answered.Load() || c.host.above != nil && c.host.above.answers(c.proc.spec):
		return delivery.GuiltProven
	}
	return delivery.GuiltAlone
}

// answers reports whether the process that serves everybody with this plugin has answered an attempt.
func (h *Host) answers(spec Spec) bool {
	return slices.ContainsFunc(h.processes(), func(p *supervisor) bool {
		c := p.conn.Load()
		return c != nil && c.answered.Load() && p.spec.equal(spec)
	})
}

// ownDoing tells a plugin that ended by itself from one that was killed. In doubt it was killed.
func (c *conn) ownDoing() bool {
	if c.stopping.Load() {
		return false
	}
	return errors.Is(c.cause, errHangs) || errors.Is(c.cause, errProtocol) || c.child.EndedItself()
}
