package dispatch

import (
	"sync/atomic"
	"time"

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

// putBack returns x to where it waited, or to the head: behind what is older, so that the order of its part
// survives several jobs coming back.
func (q *queue) putBack(x *entry) {
	for y := x.older; y != nil; y = y.older {
		if y.state.Load() == waiting {
			q.insert(y, x)
			return
		}
	}
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
