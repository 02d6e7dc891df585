package dispatch

import (
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/window"
)

// Offer takes fresh jobs of one partition, in the order of their sequences, whose commit has returned. It
// keeps what fits and leaves the rest on disk. It never blocks for long: no lock that it takes is held while
// anything is read, written or handed over.
func (e *Engine) Offer(c delivery.Commit, jobs []delivery.Job) {
	if len(jobs) == 0 {
		return
	}
	phase := e.phase(jobs[0].ID.Partition)
	if phase == dropped {
		return
	}
	now := e.now()
	var l *lane
	var g gate
	for i := range jobs {
		j := &jobs[i]
		if key := j.Lane(); l == nil || l.key != key {
			if l != nil {
				l.kick(now)
				l.mu.Unlock()
			}
			l = e.lane(key)
			g = l.gate(now)
		}
		l.offer(c, j, phase == started && l.roomFor(g, now), now)
	}
	l.kick(now)
	l.mu.Unlock()
}

// roomFor reports whether a fresh job may come to memory.
func (l *lane) roomFor(g gate, now time.Time) bool {
	if !g.open() && (g.isolated || g.until.IsZero() || g.until.Sub(now) > shedAfter) {
		return false
	}
	r := l.room(g.sub)
	if r.bare {
		return r.jobs > 0 && l.fits(r)
	}
	return l.fresh.n < r.jobs && l.fresh.bytes < r.bytes
}

func (l *lane) offer(c delivery.Commit, j *delivery.Job, room bool, now time.Time) {
	p := j.ID.Partition
	switch l.window(p).Offer(j.Row(), c, room, l.heldIn(p)) {
	case window.Take:
		l.e.journal.Hold(j.Event)
		l.admit(j, nil, now)
	case window.Known:
		l.tidy(p)
	}
}

// Timed takes note of a timer that commit c made. It is read when it is due.
func (e *Engine) Timed(c delivery.Commit, key delivery.LaneKey, partition uint16, row delivery.Row) {
	if e.phase(partition) == dropped {
		return
	}
	l := e.lane(key)
	defer l.mu.Unlock()
	l.window(partition).Offer(row, c, false, l.heldIn(partition))
	l.tidy(partition)
	l.kick(e.now())
}

// Edited follows a caller's change: what waits is forgotten; an attempt is let end, and becomes history.
func (e *Engine) Edited(c delivery.Commit, key delivery.LaneKey, partition uint16, seq uint64, epoch uint32) {
	l := e.find(key)
	if l == nil {
		return
	}
	defer l.mu.Unlock()
	i, ok := l.partAt(partition)
	if !ok {
		return
	}
	x := l.held[place{seq, partition}]
	switch l.parts[i].Edited(seq, epoch, c, l.heldIn(partition)) {
	case window.Drop:
		l.queueOf(x).remove(x)
		l.forget(x)
	case window.Mark:
		x.marked = true
	}
	l.tidy(partition)
	l.kick(e.now())
}

// Settled implements delivery.Settled. What follows the row is told by Timed.
func (x *entry) Settled(c delivery.Commit) {
	l := x.lane
	l.mu.Lock()
	defer l.mu.Unlock()
	if x.gone {
		return
	}
	l.window(x.ID.Partition).Ended(x.Row(), c)
	l.forget(x)
	l.tidy(x.ID.Partition)
	l.kick(l.e.now())
}
