package pluginhost

import (
	"errors"
	"fmt"
	"slices"
)

// place is what a process is to the plugin whose name it runs under.
type place int

const (
	// holding: the kinds are, or will be, its own.
	holding place = iota
	// succeeding: it starts beside the holder, to take the kinds over.
	succeeding
	// departing: it was replaced or removed, and drains.
	departing
)

var (
	errReplaced = errors.New("it was replaced or removed")
	errUnwanted = errors.New("the plugin was removed while it started")
)

// Update makes the plugins that run those of specs; it returns at once, and Plugins shows what becomes of it. New ones
// start. Those that are missing from specs, or disabled, drain and stop, and their kinds are gone. One that changed, in its spec or,
// when it is not pinned, in its file, is started anew beside the running process, which keeps its kinds until the
// new one has described itself, taken its settings and opened its streams; if it does not come to that, the running
// one stays, and its status says why. What did not run anyway is replaced at once. Builtin plugins are left as they
// are. An Update that gives back what runs ends a replacement that is under way.
func (h *Host) Update(specs []Spec) {
	h.updating.Lock()
	defer h.updating.Unlock()
	wanted, err := identify(specs)
	if err != nil {
		h.log.Error("update plugins", "err", err)
		return
	}
	wanted, disabled := parted(wanted)
	h.kinds.settle(wanted, disabled)
	keys := map[string]bool{}
	for _, k := range wanted {
		keys[k.key] = true
	}
	for _, p := range h.processes() {
		if !p.spec.Builtin && !keys[p.key] {
			h.remove(p)
		}
	}
	for _, k := range wanted {
		if !k.spec.Builtin {
			h.reconcile(k)
		}
	}
}

// reconcile sees to one plugin.
func (h *Host) reconcile(k keyed) {
	holder, next := h.at(k.key, holding), h.at(k.key, succeeding)
	if next != nil && next.runs(k.spec) {
		return // it is on its way
	}
	if next != nil {
		h.dismiss(next)
	}
	switch {
	case holder == nil:
		h.add(newSupervisor(h, k, holding))
	case holder.runs(k.spec):
		holder.setRefusal(nil)
	case holder.conn.Load() == nil:
		// Nothing is lost by not waiting for the new one. The kinds stay known until it has its own.
		h.dismiss(holder)
		h.add(newSupervisor(h, k, holding))
	default:
		h.add(newSupervisor(h, k, succeeding))
	}
}

// at finds the process that has a plugin's place.
func (h *Host) at(key string, in place) *supervisor {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.atLocked(key, in)
}

func (h *Host) atLocked(key string, in place) *supervisor {
	i := slices.IndexFunc(h.procs, func(p *supervisor) bool { return p.key == key && p.place == in })
	if i < 0 {
		return nil
	}
	return h.procs[i]
}

func (h *Host) add(p *supervisor) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.procs = append(h.procs, p)
	if h.running != nil {
		h.launch(p)
	}
}

// remove ends a plugin for good: its kinds go at once, its process once it has drained.
func (h *Host) remove(p *supervisor) {
	h.kinds.remove(p.key)
	h.dismiss(p)
}

// dismiss has a process drain and end; what waits for it goes elsewhere.
func (h *Host) dismiss(p *supervisor) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.place = departing
	if p.cancel == nil { // it was never launched
		h.procs = slices.DeleteFunc(h.procs, func(q *supervisor) bool { return q == p })
		return
	}
	p.cancel(errReplaced)
}

// install gives a process that is ready to serve its kinds, and with them its place: from here on attempts come to
// it, and the one before it drains.
func (h *Host) install(p *supervisor, c *conn) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.place == departing {
		return errUnwanted
	}
	select {
	case <-c.broken:
		return c.cause
	default:
	}
	p.conn.Store(c) // before the kinds, so that nobody finds one without the other
	evicted, err := h.kinds.set(p, c.kinds, p.place == holding)
	if err != nil {
		p.conn.Store(nil)
		return err
	}
	for _, q := range evicted {
		if other := q.conn.Load(); other != nil {
			other.fail(fmt.Errorf("plugin %s, which stands before it, offers one of its kinds", p.spec.label()))
		}
	}
	p.took(c)
	if p.place == succeeding {
		p.place = holding
		for _, q := range h.procs {
			if q != p && q.key == p.key && q.place == holding {
				q.place = departing
				p.carryOn(q)
				q.cancel(errReplaced)
			}
		}
		h.metrics.upgrades.WithLabelValues("taken").Inc()
	}
	return nil
}

// refuse notes that a process could not take its plugin's place; the one that has it stays.
func (h *Host) refuse(p *supervisor, err error) {
	h.metrics.upgrades.WithLabelValues("refused").Inc()
	p.log.Error("plugin was not replaced", "err", err)
	if holder := h.at(p.key, holding); holder != nil {
		holder.setRefusal(fmt.Errorf("not replaced by %s: %w", p.about(), err))
	}
}

// handOver has another process do what waits for this one. What was written stays with it.
func (c *conn) handOver() {
	c.stopping.Store(true) // before the senders find that there is no more to send
	c.host.plans.dropConn(c.host, c)
	for _, l := range []*link{c.attempts, c.signs, c.transforms} {
		for _, p := range l.unqueue() {
			c.host.plans.drop(c.host, p.plan)
			c.host.restart(p)
		}
	}
}

// unqueue stops the link and takes out what was not written.
func (l *link) unqueue() []*pending {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	queued := slices.Clone(l.queue[l.head:])
	clear(l.queue)
	l.queue, l.head = l.queue[:0], 0
	l.wake()
	return queued
}

// dropConn drops all plans that lead to a process, and has those that are being made made again.
func (t *planTable) dropConn(h *Host, c *conn) {
	for i := range t.shards {
		s := &t.shards[i]
		var dropped []*plan
		s.mu.Lock()
		for uid, pl := range s.plans {
			if slices.ContainsFunc(pl.refs, func(r retired) bool { return r.conn == c }) {
				delete(s.plans, uid)
				dropped = append(dropped, pl)
			}
		}
		for _, m := range s.making {
			m.stale = true
		}
		s.mu.Unlock()
		for _, pl := range dropped {
			h.retire(pl)
		}
	}
}
