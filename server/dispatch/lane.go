package dispatch

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// States of an entry.
//
//	waiting ⇄ inFlight ──▶ settling ──▶ gone
//	   ⇅         │  ▲________│ (unspent: back to waiting)
//	  held       ├──▶ cancelling ──▶ settling
//	             └──▶ gone (abandoned)
//
// Leaving inFlight and cancelling is by compare-and-swap, so that of an attempt's end, its cancellation
// and its abandonment one wins. Every other change is made under lane.mu.
const (
	waiting uint32 = iota
	inFlight
	cancelling // in flight, and to be settled as CANCELLED
	settling
	held // a caller's change is being written
	gone
)

// entry is a job in memory. It is the sink of its own attempt, which saves every look-up at the end.
type entry struct {
	lane *lane
	part *part
	job  *delivery.Job
	// id and due are copies: the job is the journal's once it is settled.
	id  delivery.ID
	due int64

	prev, next   *entry // in the queue that it stands in: lane.fresh, lane.retries or lane.flying
	older, newer *entry // in part.oldest … part.newest; jobs of the FIFO only

	size    int64
	state   atomic.Uint32
	sub     *subscription.Subscription // as the attempt was started with
	started time.Time
	reason  string // why it is cancelling
}

// fifo reports whether the job comes from the FIFO and not from a timer.
func (x *entry) fifo() bool { return x.due == 0 }

// queue is a list of entries linked by prev and next.
type queue struct {
	head, tail *entry
	n          int
	bytes      int64
}

// insert puts x behind after, or first when after is nil.
func (q *queue) insert(after, x *entry) {
	x.prev = after
	if after == nil {
		x.next, q.head = q.head, x
	} else {
		x.next, after.next = after.next, x
	}
	if x.next == nil {
		q.tail = x
	} else {
		x.next.prev = x
	}
	q.n++
	q.bytes += x.size
}

func (q *queue) push(x *entry) { q.insert(q.tail, x) }

func (q *queue) remove(x *entry) {
	if x.prev == nil {
		q.head = x.next
	} else {
		x.prev.next = x.next
	}
	if x.next == nil {
		q.tail = x.prev
	} else {
		x.next.prev = x.prev
	}
	x.prev, x.next = nil, nil
	q.n--
	q.bytes -= x.size
}

// putBack returns x to the head, behind what is older, so that the order of the queue survives several
// jobs coming back.
func (q *queue) putBack(x *entry) {
	var after *entry
	for y := q.head; y != nil && y.before(x); y = y.next {
		after = y
	}
	q.insert(after, x)
}

func (x *entry) before(y *entry) bool {
	if x.due != y.due {
		return x.due < y.due
	}
	return x.id.Seq < y.id.Seq
}

// lane is the queue of one subscription.
type lane struct {
	e   *Engine
	key delivery.LaneKey
	// queued says that the lane is on the ring.
	queued atomic.Bool

	// io is held while the lane's deliveries are read from the journal, and while a caller's change of
	// one of them is written: what was read cannot be out of date when it arrives in memory.
	io sync.Mutex
	// start is held from the last look at the snapshot until the attempt has been handed over. Changed
	// passes through it, so that no attempt to an old target starts after Changed has returned.
	start sync.Mutex

	mu    sync.Mutex
	parts []*part // by partition; nil where nothing was seen
	// fresh and retries wait, flying holds slots.
	fresh, retries, flying queue
	retryTurn              bool // the next one is a retry, if there is any
	running                bool // a goroutine is starting attempts and will look again before it leaves
	backlogs               int  // parts with a read position
	due                    int64
	queuedRead             bool // asked for a read
	readAt                 time.Time
	armed                  time.Time
	evicted                bool
	dirty                  bool

	// What keeps the lane closed, beside the subscription's state.
	closed    time.Time // no attempt before this
	park      time.Duration
	cancels   int  // CancelLane is at work
	disabling bool // Disable is at work
	sweepAt   time.Time

	limiter *rate.Limiter
	limit   float64
	// failing is when the run of failures without a success began.
	failing time.Time
	stats   *series
}

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

// lane returns the lane with its mutex held, and makes it when needed.
func (e *Engine) lane(key delivery.LaneKey) *lane {
	for {
		e.mu.RLock()
		l := e.lanes[key]
		e.mu.RUnlock()
		if l == nil {
			l = e.addLane(key)
		}
		l.mu.Lock()
		if !l.evicted {
			return l
		}
		l.mu.Unlock()
	}
}

func (e *Engine) addLane(key delivery.LaneKey) *lane {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.lanes[key]
	if l == nil {
		l = &lane{e: e, key: key}
		e.lanes[key] = l
	}
	return l
}

// allLanes is a copy: a lane's mutex must not be taken under the engine's.
func (e *Engine) allLanes() []*lane {
	e.mu.RLock()
	defer e.mu.RUnlock()
	all := make([]*lane, 0, len(e.lanes))
	for _, l := range e.lanes {
		all = append(all, l)
	}
	return all
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
	older := p.newest
	for older != nil && older.id.Seq > x.id.Seq { // only after a caller's change that failed
		older = older.older
	}
	p.link(older, x)
	p.loaded = max(p.loaded, x.id.Seq)
	if older == p.newest.older {
		l.fresh.push(x)
	} else {
		l.fresh.putBack(x)
	}
}

func sizeOf(j *delivery.Job) int64 { return 768 + int64(len(j.Event.Payload)) }

func (p *part) link(older, x *entry) {
	x.older = older
	if older == nil {
		x.newer, p.oldest = p.oldest, x
	} else {
		x.newer, older.newer = older.newer, x
	}
	if x.newer == nil {
		p.newest = x
	} else {
		x.newer.older = x
	}
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

// gate says whether attempts may start now. When not, until is when to look again; zero means that
// something else will call.
type gate struct {
	sub   *subscription.Subscription
	open  bool
	until time.Time
	// sweep: the lane is closed for so long that deliveries expire, or for good.
	sweep bool
}

func (l *lane) gate(now time.Time) gate {
	if l.e.stopping.Load() || l.cancels > 0 || l.disabling {
		return gate{}
	}
	sub := l.e.subs.Subscription(l.key.Namespace, l.key.Subscription)
	switch {
	case sub == nil || !active(sub):
		return gate{sub: sub, sweep: true}
	case now.Before(l.closed):
		return gate{sub: sub, until: l.closed}
	}
	return gate{sub: sub, open: true}
}

func active(sub *subscription.Subscription) bool {
	switch sub.Proto.GetState() {
	case grapnelv1.Subscription_STATE_PAUSED, grapnelv1.Subscription_STATE_DISABLED:
		return false
	}
	return true
}

// close keeps the lane from starting attempts until a time.
func (l *lane) closeUntil(now, until time.Time) {
	if until.After(l.closed) {
		l.closed = until
	}
	if until.Sub(now) > shedAfter {
		l.shed()
	}
}

const (
	// shedAfter is how long a lane may be closed and keep its window.
	shedAfter = 5 * time.Second
	// sweepEvery is how often a closed lane is looked through for what has expired.
	sweepEvery = time.Minute
	readJobs   = 512
	readBytes  = 1 << 20
)

// window is how much may wait in memory. It is wide while there is room, so that a burst need not be
// read back from disk, and narrow when all lanes together hold much.
func (l *lane) window(sub *subscription.Subscription) (jobs int, bytes int64) {
	used, total := l.e.memory.Load(), l.e.windowBytes
	least := 2 * maxInFlight(sub)
	switch {
	case used < total/2 && (sub == nil || sub.MaxRate == 0):
		return max(8192, least), 8 << 20
	case used < total:
		return max(256, least), 1 << 20
	}
	return 4, 64 << 10
}

func maxInFlight(sub *subscription.Subscription) int {
	if sub == nil || sub.MaxInFlight <= 0 {
		return 16
	}
	return sub.MaxInFlight
}

// kick starts what the lane's state calls for: a read from disk, an alarm, a place on the ring.
func (l *lane) kick(now time.Time) {
	e := l.e
	if !e.ready.Load() || e.stopping.Load() {
		return
	}
	work := l.fresh.n + l.retries.n
	if work == 0 && l.backlogs == 0 && l.due == 0 {
		return
	}
	g := l.gate(now)
	if !g.open {
		l.kickClosed(g, now)
		return
	}
	l.sweepAt = time.Time{}
	if !l.queuedRead && (l.wantsFIFO(g.sub, now) || l.wantsTimers(g.sub, now)) {
		l.queuedRead = true
		e.refills.push(l)
	}
	if work > 0 && !l.running && !l.full(g.sub) {
		e.ring.push(l)
	}
}

func (l *lane) kickClosed(g gate, now time.Time) {
	if !g.until.IsZero() {
		l.arm(g.until)
	}
	if !g.sweep || l.queuedRead {
		return
	}
	if l.sweepAt.IsZero() {
		l.shed()
		l.sweepAt = now
		if g.sub != nil {
			l.sweepAt = now.Add(sweepEvery)
		}
	}
	if l.sweepAt.After(now) {
		l.arm(l.sweepAt)
		return
	}
	l.queuedRead = true
	l.e.refills.push(l)
}

// wantsFIFO reports whether the window runs low and the disk has more.
func (l *lane) wantsFIFO(sub *subscription.Subscription, now time.Time) bool {
	if l.backlogs == 0 {
		return false
	}
	if now.Before(l.readAt) {
		l.arm(l.readAt)
		return false
	}
	jobs, bytes := l.window(sub)
	return l.fresh.n <= jobs/2 && l.fresh.bytes <= bytes/2
}

// wantsTimers reports whether timers are due and there is room for them.
func (l *lane) wantsTimers(sub *subscription.Subscription, now time.Time) bool {
	if l.due == 0 {
		return false
	}
	if l.due > now.UnixNano() {
		l.arm(fromWall(now, l.due))
		return false
	}
	jobs, _ := l.retryRoom(sub)
	return jobs > 0
}

// retryRoom is how many jobs of timers may come to memory.
func (l *lane) retryRoom(sub *subscription.Subscription) (jobs int, bytes int64) {
	jobs, bytes = l.window(sub)
	jobs, bytes = min(jobs, max(256, 2*maxInFlight(sub))), min(bytes, readBytes)
	if l.retries.n > jobs/2 || l.retries.bytes > bytes/2 {
		return 0, 0
	}
	return jobs - l.retries.n, bytes - l.retries.bytes
}

// arm asks for a kick at a time.
func (l *lane) arm(at time.Time) {
	if !l.armed.IsZero() && !at.Before(l.armed) {
		return
	}
	l.armed = at
	l.e.alarms.set(l, at)
}

// fromWall turns a wall clock time into one on the clock that now also carries, which never jumps.
func fromWall(now time.Time, nanos int64) time.Time {
	left := nanos - now.UnixNano()
	return now.Add(time.Duration(left))
}

// allow takes a token of the subscription's rate, or closes the lane until there is one.
func (l *lane) allow(sub *subscription.Subscription, now time.Time) bool {
	if sub.MaxRate <= 0 {
		l.limiter = nil
		return true
	}
	if l.limiter == nil || l.limit != sub.MaxRate {
		l.limit = sub.MaxRate
		l.limiter = rate.NewLimiter(rate.Limit(sub.MaxRate), max(1, int(math.Ceil(sub.MaxRate/10))))
	}
	r := l.limiter.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait == 0 {
		return true
	}
	r.CancelAt(now)
	l.closeUntil(now, now.Add(wait))
	return false
}
