package dispatch

import (
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/window"
)

const (
	// readers is how many goroutines read from disk.
	readers = 2
	// readAgain is how long a read that failed is not repeated.
	readAgain = time.Second
	// readJobs and readBytes bound one read.
	readJobs, readBytes = 512, 1 << 20
)

// reads holds the lanes that have asked for a read from disk; each at most once, see lane.reading.
type reads struct {
	mu    sync.Mutex
	lanes rota
	wake  chan struct{}
}

func (r *reads) push(l *lane) {
	r.mu.Lock()
	r.lanes.add(l)
	r.mu.Unlock()
	signal(r.wake)
}

func (r *reads) pop() *lane {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.lanes.take()
	if !r.lanes.empty() {
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
		case <-e.reads.wake:
		}
		for l := e.reads.pop(); l != nil && !e.stopping.Load(); l = e.reads.pop() {
			l.read()
		}
	}
}

// need is what a lane wants of the disk.
type need uint8

const (
	nothing need = iota
	aRead
	someRoom // it wants a read, and has to wait until there is room
)

// request is one read.
type request struct {
	partition uint16
	kind      delivery.Kind
	from      delivery.Pos
	until     delivery.Instant
	jobs      int
	bytes     int64
}

// wantRead asks for what an open lane needs, and for an alarm when its first timer is due.
func (l *lane) wantRead(g gate, now time.Time) {
	if l.reading && !l.hungryNow() {
		return
	}
	if !l.reading && g.isolated && l.sweepDue(now) {
		l.reading = true
		l.e.reads.push(l)
		return
	}
	switch _, need := l.plan(g, now); {
	case need == aRead && l.reading:
		if l.sated() { // otherwise it has just been fed
			l.e.reads.push(l)
		}
	case need == aRead:
		l.reading = true
		l.e.reads.push(l)
	case need == someRoom && !l.reading:
		l.reading = true
		l.hunger()
	}
}

func (l *lane) hungryNow() bool {
	b := &l.e.budget
	if b.hungry.Load() == 0 {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return l.hungry
}

// plan says what an open lane needs most.
func (l *lane) plan(g gate, now time.Time) (request, need) {
	fifo, timer := l.first(delivery.FIFO), l.first(delivery.Timer)
	if timer != nil {
		if due := timer.Next(delivery.Timer).Due; due > instant(now) {
			l.arm(due.Time())
			timer = nil
		}
	}
	if fifo == nil && timer == nil {
		return request{}, nothing
	}
	if now.Before(l.readAt) {
		l.arm(l.readAt)
		return request{}, nothing
	}
	r := l.room(g.sub)
	if r.bare {
		switch {
		case !l.fits(r) || l.full(g.sub):
			return request{}, nothing
		case r.jobs == 0:
			return request{}, someRoom
		case fifo == nil || timer != nil && l.timerTurn:
			return l.request(timer, delivery.Timer, r.jobs, r.bytes, now), aRead
		}
		return l.request(fifo, delivery.FIFO, r.jobs, r.bytes, now), aRead
	}
	// Half empty, so that reads are large.
	timers := room{jobs: min(r.jobs, max(timerJobs, 2*maxInFlight(g.sub))), bytes: min(r.bytes, readBytes)}
	switch {
	case timer != nil && l.timers.n <= timers.jobs/2 && l.timers.bytes <= timers.bytes/2 && (l.timerTurn || fifo == nil || l.fresh.n > 0):
		return l.request(timer, delivery.Timer, timers.jobs-l.timers.n, timers.bytes-l.timers.bytes, now), aRead
	case fifo != nil && l.fresh.n <= r.jobs/2 && l.fresh.bytes <= r.bytes/2:
		return l.request(fifo, delivery.FIFO, r.jobs-l.fresh.n, r.bytes-l.fresh.bytes, now), aRead
	case timer != nil && l.timers.n <= timers.jobs/2 && l.timers.bytes <= timers.bytes/2:
		return l.request(timer, delivery.Timer, timers.jobs-l.timers.n, timers.bytes-l.timers.bytes, now), aRead
	}
	return request{}, nothing
}

// first is the part whose position of a kind comes first, or nil.
func (l *lane) first(k delivery.Kind) *part {
	var first *part
	for i := range l.parts {
		p := &l.parts[i]
		if n := p.Next(k); n.Some && (first == nil || n.Before(first.Next(k))) {
			first = p
		}
	}
	return first
}

func (l *lane) request(p *part, k delivery.Kind, jobs int, bytes int64, now time.Time) request {
	return request{
		partition: p.number, kind: k, until: instant(now),
		jobs: min(max(jobs, 1), readJobs), bytes: min(max(bytes, 1), readBytes),
	}
}

// read makes the reads that the lane's state calls for: one of its backlog or its timers, or, when it is closed for
// long, a sweep.
func (l *lane) read() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.e.now()
	switch g := l.gate(now); {
	case g.expires() && l.sweepDue(now):
		l.sweep(now)
	case g.open():
		switch r, need := l.plan(g, now); need {
		case aRead:
			if jobs, ok := l.fetch(&r); ok {
				l.merge(r, jobs, len(jobs.Jobs))
			}
		case someRoom:
			l.hunger()
			return
		}
	}
	l.reading = false
	l.kick(l.e.now())
}

// fetch reads. l.mu is held, but not while the journal is read. Without ok there is nothing to merge.
func (l *lane) fetch(r *request) (read delivery.Read, ok bool) {
	if r.from, ok = l.window(r.partition).Want(r.kind, r.until); !ok {
		return read, false
	}
	l.mu.Unlock()
	read, err := l.e.journal.Read(l.key, r.partition, r.kind, r.from, r.until, r.jobs, int(r.bytes))
	for _, aside := range read.Aside {
		l.e.log.Error("delivery passed over, its row cannot be read", l.attrs("partition", r.partition, "err", aside)...)
	}
	l.mu.Lock()
	i, found := l.partAt(r.partition)
	if found {
		_, found = l.parts[i].Reading()
	}
	switch {
	case !found: // the partition was stopped meanwhile
		l.giveUp(read.Jobs)
		return read, false
	case err != nil:
		l.e.log.Error("backlog not read", l.attrs("partition", r.partition, "err", err)...)
		l.parts[i].Failed()
		l.readAt = l.e.now().Add(readAgain)
		l.giveUp(read.Jobs)
		return read, false
	}
	return read, true
}

func (l *lane) attrs(more ...any) []any {
	return append([]any{"namespace_key", l.key.Namespace, "subscription_key", l.key.Subscription}, more...)
}

func (l *lane) giveUp(jobs []delivery.Job) {
	for i := range jobs {
		l.e.journal.Release(jobs[i].Event)
	}
}

// merge takes the first n jobs of a read as far as the window wants them, and returns their entries.
func (l *lane) merge(r request, read delivery.Read, n int) []*entry {
	rows, next := make([]delivery.Row, n), read.Next
	for i := range rows {
		rows[i] = read.Jobs[i].Row()
	}
	if n < len(read.Jobs) {
		next = read.Jobs[n].Row().Pos()
	}
	taken := l.window(r.partition).Merge(rows, next, read.UpTo, l.heldIn(r.partition))
	entries, now := make([]*entry, 0, len(taken)), l.e.now()
	var near *entry
	for i := range read.Jobs {
		j := &read.Jobs[i]
		if len(taken) == 0 || taken[0] != j.Row() {
			l.e.journal.Release(j.Event)
			continue
		}
		taken = taken[1:]
		near = l.admit(j, near, now)
		entries = append(entries, near)
	}
	l.tidy(r.partition)
	return entries
}

// sweepJobs is how many expired deliveries a sweep ends at a time.
const sweepJobs = 256

func (l *lane) sweepDue(now time.Time) bool { return !l.sweepAt.IsZero() && !l.sweepAt.After(now) }

// sweep looks through a lane that makes no attempts, because its subscription is paused, disabled or not there or its
// breaker is open, for what has expired. It looks at the first row of each partition and kind, and stops there while that stays: what expires
// behind it is found when it has gone, or when the lane opens. l.mu is held.
func (l *lane) sweep(now time.Time) {
	next := now.Add(sweepLatest)
	var numbers []uint16
	for i := range l.parts {
		numbers = append(numbers, l.parts[i].number)
	}
	for _, number := range numbers {
		for _, k := range []delivery.Kind{delivery.FIFO, delivery.Timer} {
			if look := l.sweepPart(number, k, now); look.Before(next) {
				next = look
			}
		}
	}
	if soonest := now.Add(sweepEvery); next.Before(soonest) {
		next = soonest
	}
	l.sweepAt = next
}

// sweepPart returns when to look again.
func (l *lane) sweepPart(partition uint16, k delivery.Kind, now time.Time) time.Time {
	r := request{partition: partition, kind: k, until: instant(now), jobs: 1, bytes: readBytes}
	never := now.Add(sweepLatest)
	for {
		i, ok := l.partAt(partition)
		if !ok {
			return never
		}
		first := l.parts[i].Next(k)
		switch {
		case !first.Some:
			return never
		case k == delivery.Timer && first.Due > r.until:
			return first.Due.Time()
		}
		if !l.gate(now).expires() {
			return now
		}
		read, ok := l.fetch(&r)
		if !ok {
			return now.Add(sweepEvery)
		}
		n := 0
		for n < len(read.Jobs) && now.After(read.Jobs[n].Expire) && !read.Jobs[n].Expire.IsZero() {
			n++
		}
		stays := n < len(read.Jobs)
		if stays {
			never = laterOf(read.Jobs[n].Expire, now)
		}
		l.end(l.merge(r, read, n))
		if stays {
			return never
		}
		r.jobs = sweepJobs
	}
}

// end settles entries that have expired. l.mu is held, but not while they are settled.
func (l *lane) end(expired []*entry) {
	for _, x := range expired {
		l.queueOf(x).remove(x)
		x.stage = window.Settling
	}
	l.mu.Unlock()
	for _, x := range expired {
		l.e.expire(x)
	}
	l.mu.Lock()
}
