package dispatch

import (
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// part is what a lane knows about one partition.
//
// Of the FIFO, each delivery that is durable and not settled is exactly one of
//
//	in memory       seq <= loaded, and on the list oldest … newest
//	left on disk    seq >= from, from != 0, from > loaded
//	still to come   its Offer has not been called: seq is above all that was offered
//
// Offer keeps it so: a job goes to memory only while from is 0, else it is left; one at or below loaded
// was read from disk before its Offer came and is dropped. A read starts at from and ends in one of two
// ways: with a position to go on from, or with none. Then from becomes 0, unless something above loaded was
// left so shortly before the read, or during it, that the read may have been too early to see it. A read
// that finds from changed (something was shed) is thrown away. What is shed goes back to disk from the
// smallest sequence on, but never what is at or below begun: of that, later ones may have been settled
// already.
//
// Of timers, memory holds some that were due, by their id in the engine's index; nextDue is at or before
// the first of the rest. The journal's reads show all that was settled or scheduled before them. What is
// settled or scheduled in the meantime is kept in settled and low until the read has been merged.
type part struct {
	number uint16

	oldest, newest *entry
	loaded         uint64 // highest sequence that came to memory
	begun          uint64 // highest sequence whose attempt was started
	from           uint64 // read position; 0 means that nothing was left on disk
	left           uint64 // highest sequence left on disk
	leftAt         time.Time
	lowWater       uint64 // as last told to the journal

	nextDue    int64 // unix nanoseconds; 0 means no timer
	timers     int   // jobs of timers in memory
	timerBytes int64
	reading    bool
	low        int64
	settled    map[timerKey]struct{}
	told       int64 // the first that Timer told of and reads may not see yet
	toldAt     time.Time
}

type timerKey struct {
	seq uint64
	due int64
}

func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// earlier returns the smaller one of two times of which 0 means none.
func earlier(a, b int64) int64 {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}

func (l *lane) part(number uint16) *part {
	if int(number) >= len(l.parts) {
		l.parts = append(l.parts, make([]*part, int(number)+1-len(l.parts))...)
	}
	if l.parts[number] == nil {
		l.parts[number] = &part{number: number}
	}
	return l.parts[number]
}

func (l *lane) setFrom(p *part, from uint64) {
	if (p.from == 0) != (from == 0) {
		if from == 0 {
			l.backlogs--
		} else {
			l.backlogs++
		}
	}
	p.from = from
}

// leave notes that a job of the FIFO stays on disk. Jobs are left in the order of their sequences.
func (l *lane) leave(p *part, seq uint64, now time.Time) {
	if p.from == 0 {
		l.setFrom(p, seq)
	}
	p.left, p.leftAt = max(p.left, seq), now
}

// lower notes that a timer is due at a time.
func (l *lane) lower(p *part, due int64) {
	p.nextDue = earlier(p.nextDue, due)
	if p.reading {
		p.low = earlier(p.low, due)
	}
	l.due = earlier(l.due, due)
}

func (l *lane) recountDue() {
	l.due = 0
	for _, p := range l.parts {
		if p != nil {
			l.due = earlier(l.due, p.nextDue)
		}
	}
}

// admit takes a job into memory.
func (l *lane) admit(p *part, j *delivery.Job) {
	x := &entry{lane: l, part: p, job: j, id: j.ID, due: unixNano(j.Due)}
	x.size = sizeOf(j)
	l.e.memory.Add(x.size)
	l.e.index.put(x)
	if !x.fifo() {
		p.timers++
		p.timerBytes += x.size
		l.retries.push(x)
		return
	}
	p.link(x)
	p.loaded = max(p.loaded, x.id.Seq)
	l.fresh.push(x)
}

func sizeOf(j *delivery.Job) int64 { return 768 + int64(len(j.Event.Payload)) }

// link adds the newest entry.
func (p *part) link(x *entry) {
	x.older = p.newest
	if x.older == nil {
		p.oldest = x
	} else {
		x.older.newer = x
	}
	p.newest = x
}

func (p *part) unlink(x *entry) {
	if x.older == nil {
		p.oldest = x.newer
	} else {
		x.older.newer = x.newer
	}
	if x.newer == nil {
		p.newest = x.older
	} else {
		x.newer.older = x.older
	}
	x.older, x.newer = nil, nil
}

// forget removes an entry that stands in no queue any more. What is settled is noted for a read of
// timers that is under way.
func (l *lane) forget(x *entry, settled bool) {
	p := x.part
	if x.fifo() {
		p.unlink(x)
	} else {
		p.timers--
		p.timerBytes -= x.size
		if settled && p.reading {
			if p.settled == nil {
				p.settled = make(map[timerKey]struct{})
			}
			p.settled[timerKey{x.id.Seq, x.due}] = struct{}{}
		}
	}
	x.state.Store(gone)
	l.e.index.remove(x.id)
	l.e.memory.Add(-x.size)
	l.touch()
}

// touch asks for the lane's upkeep.
func (l *lane) touch() {
	if l.dirty {
		return
	}
	l.dirty = true
	l.e.mu.Lock()
	l.e.dirty = append(l.e.dirty, l)
	l.e.mu.Unlock()
}

// queueOf is where a waiting entry stands.
func (l *lane) queueOf(x *entry) *queue {
	if x.fifo() {
		return &l.fresh
	}
	return &l.retries
}

// shed gives what waits in memory back to the disk, except what the part's rule forbids. It is called
// when a lane closes for long.
func (l *lane) shed() {
	for x := l.fresh.tail; x != nil; {
		prev := x.prev
		if p := x.part; x.id.Seq > p.begun {
			l.fresh.remove(x)
			l.forget(x, false)
			if p.from == 0 || x.id.Seq < p.from {
				l.setFrom(p, x.id.Seq)
			}
			p.loaded = min(p.loaded, x.id.Seq-1)
		}
		x = prev
	}
	for x := l.retries.head; x != nil; {
		next := x.next
		l.retries.remove(x)
		l.forget(x, false)
		l.lower(x.part, x.due)
		x = next
	}
}
