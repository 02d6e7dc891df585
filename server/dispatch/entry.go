package dispatch

import (
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/dispatch/window"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// entryBytes is what an entry takes with its place in the lane's index.
	entryBytes = 256
	// eventBytes and attributeBytes are about what an event takes beside its payload.
	eventBytes     = 400
	attributeBytes = 64
)

// entry is a job in memory: a row that its lane's window holds. It is the sink of its own attempt and is told of its
// own settling, which saves look-ups and allocations. All but the job is guarded by lane.mu; the job is, while Settling,
// the journal's.
type entry struct {
	delivery.Job
	lane       *lane
	prev, next *entry                     // in the queue that it stands in: lane.fresh, lane.timers or lane.flying
	sub        *subscription.Subscription // as the attempt was started with
	at         moment                     // when the attempt was started, or, of one that waits, since when it is in memory
	weight     int                        // what it counts for in a batch
	stage      window.Stage
	marked     bool // a caller has ended or replaced its row: it must not wait again
	gone       bool // abandoned, or its partition is: nothing of it counts any more
	target     uint32
	mark       health.Mark
	visit      visit
	bill       bill
	pool       *pool // that it holds a place of while it flies; nil is none
	// parcel is what it travels in with others, or carries; nil for neither. See gather.go.
	parcel *parcel
}

// moment is a time in nanoseconds since 1970, which takes a third of the room.
type moment int64

func momentOf(t time.Time) moment { return moment(t.UnixNano()) }

func (m moment) time() time.Time { return time.Unix(0, int64(m)) }

// place is where a row stands, within a lane.
type place struct {
	seq       uint64
	partition uint16
}

func (x *entry) place() place { return place{x.ID.Seq, x.ID.Partition} }

// size is what it counts for in its lane, its event in full.
func (x *entry) size() int64 {
	if x.carries() {
		return entryBytes + x.parcel.bytes
	}
	return entryBytes + eventBytes + int64(len(x.Event.Payload)) + attributeBytes*int64(len(x.Event.Attributes)+len(x.Event.Headers))
}

func (x *entry) before(y *entry) bool { return x.Row().Pos().Before(y.Row().Pos()) }

// repeats reports whether it has been tried before, and nobody has asked for another attempt.
func (x *entry) repeats() bool { return x.Attempts > 0 && !x.Manual }

// expired reports whether it is to end without another attempt: its time is over, or its payload is purged.
func (x *entry) expired(now time.Time) bool {
	return !x.Expire.IsZero() && now.After(x.Expire) || x.Event.Purged != nil
}

// queue is a list of entries linked by prev and next.
type queue struct {
	head, tail *entry
	n          int
	bytes      int64
	weight     int
	firsts     int // of them that are no repeats
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
	q.bytes += x.size()
	q.weight += x.weight
	if !x.repeats() {
		q.firsts++
	}
}

func (q *queue) push(x *entry) { q.insert(q.tail, x) }

// add puts x in its place in the order of rows. near is nil or an entry of the queue that comes before x; without it
// the search begins at the tail.
func (q *queue) add(x, near *entry) {
	if near != nil {
		for near.next != nil && near.next.before(x) {
			near = near.next
		}
		q.insert(near, x)
		return
	}
	after := q.tail
	for after != nil && x.before(after) {
		after = after.prev
	}
	q.insert(after, x)
}

// putBack returns x, which came from about the head.
func (q *queue) putBack(x *entry) {
	var after *entry
	for y := q.head; y != nil && y.before(x); y = y.next {
		after = y
	}
	q.insert(after, x)
}

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
	q.bytes -= x.size()
	q.weight -= x.weight
	if !x.repeats() {
		q.firsts--
	}
}
