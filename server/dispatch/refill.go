package dispatch

import (
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

const (
	// readers is how many goroutines read from disk.
	readers = 2
	// readAgain is how long a read that failed is not repeated.
	readAgain = time.Second
	// handover is longer than the journal ever takes, after it has told the engine of a job, to let reads
	// see it. It does so only once Offer has returned.
	handover = time.Second
	// recheck is when to look again for what a read may have missed because of that.
	recheck = 20 * time.Millisecond
)

// refills holds the lanes that have asked for a read from disk; each at most once.
type refills struct {
	mu    sync.Mutex
	lanes []*lane
	wake  chan struct{}
}

func (r *refills) push(l *lane) {
	r.mu.Lock()
	r.lanes = append(r.lanes, l)
	r.mu.Unlock()
	signal(r.wake)
}

func (r *refills) pop() *lane {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.lanes) == 0 {
		return nil
	}
	l := r.lanes[0]
	r.lanes[0] = nil
	r.lanes = r.lanes[1:]
	if len(r.lanes) > 0 {
		signal(r.wake) // for the other readers
	}
	return l
}

// readDisk serves the lanes that have asked, one read at a time, until the engine stops.
func (e *Engine) readDisk() {
	for {
		select {
		case <-e.stopped:
			return
		case <-e.refills.wake:
		}
		for l := e.refills.pop(); l != nil && !e.stopping.Load(); l = e.refills.pop() {
			l.refill()
		}
	}
}

// refill makes the reads that the lane's state calls for: of its backlog and its timers, or, when it is
// closed, a sweep.
func (l *lane) refill() {
	l.io.Lock()
	defer l.io.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	switch g := l.gate(now); {
	case g.open:
		if l.wantsFIFO(g.sub, now) {
			l.readFIFO(g)
		}
		if l.wantsTimers(g.sub, now) {
			l.readTimers(g)
		}
	case g.sweep && l.sweepDue(now):
		l.mu.Unlock()
		l.sweep()
		l.mu.Lock()
	}
	l.queuedRead = false
	l.kick(time.Now())
}

// readFIFO reads on from the oldest read position. l.io and l.mu are held, l.mu not while reading.
func (l *lane) readFIFO(g gate) {
	var p *part
	for _, q := range l.parts {
		if q != nil && q.from != 0 && (p == nil || q.from < p.from) {
			p = q
		}
	}
	if p == nil {
		return
	}
	from, began := p.from, time.Now()
	limit, bytes := l.window(g.sub)
	limit, bytes = min(max(limit-l.fresh.n, 1), readJobs), min(max(bytes-l.fresh.bytes, 1), readBytes)
	l.mu.Unlock()
	jobs, next, err := l.e.journal.Backlog(l.key, p.number, from, limit, int(bytes))
	l.mu.Lock()
	if err != nil {
		l.readFailed("backlog not read", err)
		return
	}
	if p.from != from { // something was shed: read again from there
		return
	}
	for _, j := range jobs {
		if j.ID.Seq >= from && !l.e.index.has(j.ID) {
			l.admit(p, j)
		}
	}
	l.advance(p, from, next, began)
	if len(jobs) == 0 && p.from != 0 {
		l.readAt = time.Now().Add(recheck)
	}
}

// advance moves a read position past what has been read. next is as Backlog returned it.
func (l *lane) advance(p *part, from, next uint64, began time.Time) {
	if next == 0 && p.left > p.loaded && began.Sub(p.leftAt) < handover {
		// The read may have been too early for what was left last.
		next = max(from, p.loaded+1)
	}
	l.setFrom(p, next)
	l.touch()
}

func (l *lane) readFailed(what string, err error) {
	l.e.log.Error(what, "namespace_id", l.key.Namespace, "subscription_id", l.key.Subscription, "err", err)
	now := time.Now()
	l.closeUntil(now, now.Add(readAgain))
}

// markReading starts to keep what happens to timers, in every part that has one due by a time. It is
// called with l.io and l.mu held.
func (l *lane) markReading(until int64) {
	for _, p := range l.parts {
		if p != nil && p.nextDue != 0 && p.nextDue <= until {
			p.reading, p.low, p.settled = true, 0, nil
		}
	}
}

// readTimers reads the timers that are due. l.io and l.mu are held, l.mu not while reading.
func (l *lane) readTimers(g gate) {
	now := time.Now()
	l.markReading(now.UnixNano())
	for p := l.nextReading(); p != nil; p = l.nextReading() {
		l.readTimersOf(p, g, now)
		p.reading, p.settled = false, nil
	}
	l.recountDue()
}

// nextReading is the marked part whose timers have been due for longest: when there is not room for all,
// the others come first the next time.
func (l *lane) nextReading() *part {
	var first *part
	for _, p := range l.parts {
		if p != nil && p.reading && (first == nil || p.nextDue < first.nextDue) {
			first = p
		}
	}
	return first
}

// readTimersOf reads one part's due timers. Those in memory are still on disk too, before the others:
// they are read again and left out.
func (l *lane) readTimersOf(p *part, g gate, now time.Time) {
	room, bytes := l.retryRoom(g.sub)
	if room == 0 {
		return
	}
	limit, size := room+p.timers, int(bytes+p.timerBytes)
	l.mu.Unlock()
	jobs, nextDue, err := l.e.journal.Timers(l.key, p.number, now, limit, size)
	l.mu.Lock()
	if err != nil {
		l.readFailed("timers not read", err)
		return
	}
	admitted := 0
	for _, j := range jobs {
		if l.admitTimer(p, j) {
			admitted++
		}
	}
	l.rearm(p, nextDue, now, admitted > 0)
}

// rearm sets when the part's next read of timers is due, after a read that began at a time.
func (l *lane) rearm(p *part, nextDue, began time.Time, progress bool) {
	next := earlier(unixNano(nextDue), p.low)
	soon := began.Add(recheck).UnixNano()
	if !progress && next != 0 {
		next = max(next, soon)
	}
	if p.told != 0 && began.Sub(p.toldAt) < handover {
		next = earlier(next, max(p.told, soon))
	} else {
		p.told = 0
	}
	p.nextDue = next
}

func (l *lane) admitTimer(p *part, j *delivery.Job) bool {
	if _, ok := p.settled[timerKey{j.ID.Seq, unixNano(j.Due)}]; ok || l.e.index.has(j.ID) || j.Due.IsZero() {
		return false
	}
	l.admit(p, j)
	return true
}

// Offer takes fresh jobs of one partition, in the order of their sequences, whose commit has returned. It
// keeps what fits the window of its lane and leaves the rest on disk. It never blocks for long: no lock
// that it takes is held while anything is read, written or handed over.
func (e *Engine) Offer(jobs []*delivery.Job) {
	now := time.Now()
	var l *lane
	for _, j := range jobs {
		if l == nil || l.key.Subscription != j.Subscription || l.key.Namespace != j.Event.Namespace {
			if l != nil {
				l.kick(now)
				l.mu.Unlock()
			}
			l = e.lane(j.Lane())
		}
		l.offer(j, now)
	}
	if l != nil {
		l.kick(now)
		l.mu.Unlock()
	}
}

func (l *lane) offer(j *delivery.Job, now time.Time) {
	l.countEvent(now)
	p := l.part(j.ID.Partition)
	if !j.Due.IsZero() {
		l.tell(p, j.Due, now)
		return
	}
	seq := j.ID.Seq
	if seq <= p.loaded {
		return
	}
	if p.from != 0 || !l.e.ready.Load() {
		l.leave(p, seq, now)
		return
	}
	if g := l.gate(now); g.open || !g.until.IsZero() && g.until.Sub(now) <= shedAfter {
		jobs, bytes := l.window(g.sub)
		if l.fresh.n < jobs && l.fresh.bytes < bytes {
			l.admit(p, j)
			return
		}
	}
	l.leave(p, seq, now)
}

// Timer takes note of a timer that the journal made by itself, for an event with a deliver time.
func (e *Engine) Timer(key delivery.LaneKey, partition uint16, due time.Time) {
	now := time.Now()
	l := e.lane(key)
	defer l.mu.Unlock()
	l.countEvent(now)
	l.tell(l.part(partition), due, now)
	l.kick(now)
}

// tell notes a timer that reads may not see yet.
func (l *lane) tell(p *part, due, now time.Time) {
	p.told, p.toldAt = earlier(p.told, due.UnixNano()), now
	l.lower(p, due.UnixNano())
}
