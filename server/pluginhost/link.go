package pluginhost

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	batchItems = 64
	batchBytes = 1 << 20
	slotBits   = 16
	maxWindow  = 1 << slotBits
)

var errProtocol = errors.New("protocol fault")

// link is one stream to a plugin: a queue in front, and a table of what was written and is unanswered.
// One goroutine sends; one receives. A seq is a rising count above the number of its slot, so that an
// answer finds its attempt without a map, and a wrong one finds nothing.
type link struct {
	// send writes a batch; it is called by the sender only. It calls read as soon as it does not look at the batch any more,
	// and before any of it can be answered.
	send func(batch []*pending) error
	// last says that what is written is on its way to its receiver; it is set before the first.
	last bool
	// done is the count up to which send looks at nothing any more.
	done atomic.Uint64

	mu      sync.Mutex // guards what follows
	more    sync.Cond
	idle    bool // the sender waits on more
	queue   []*pending
	head    int
	slots   []*pending
	free    []uint32
	count   uint64
	open    int
	stopped bool // nothing new is taken
	dead    bool
	// most bounds what is waiting and open while the machine is short of what attempts need; 0 is no bound. short is when
	// that was last seen, eased when the bound was raised.
	most         int
	short, eased time.Time
}

const (
	// leastOpen is how many attempts are made at a time however short the machine is.
	leastOpen = 8
	// easeEvery lets an eighth more in. A shortage is over when none was met for easeOver.
	easeEvery = time.Second
	easeOver  = 10 * time.Second
)

// shortage lowers what may be open to what is: an attempt could not be made for want of a descriptor, a socket or memory on
// this machine. It returns how many are made at a time now, and whether this is the first time since all was well.
func (l *link) shortage(now time.Time) (most int, first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first = l.most == 0
	if most := max(leastOpen, l.open); first || most < l.most {
		l.most = most
	}
	l.short, l.eased = now, now
	return l.most, first
}

// narrowed is how many attempts are made at a time because of a shortage; 0 without one.
func (l *link) narrowed(now time.Time) int {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ease(now)
	return l.most
}

// ease is called under the lock.
func (l *link) ease(now time.Time) {
	if now.Sub(l.short) >= easeOver {
		l.most = 0
	}
	for l.most > 0 && now.Sub(l.eased) >= easeEvery {
		l.eased = l.eased.Add(easeEvery)
		l.most += max(1, l.most/8)
	}
}

// outcome of handing an attempt to a link.
type outcome int

const (
	accepted outcome = iota
	// shut: the link takes nothing any more.
	shut
	// full: the machine is short of what attempts need.
	full
)

func newLink(window int, send func([]*pending) error) *link {
	l := &link{send: send}
	l.more.L = &l.mu
	l.widen(window)
	return l
}

// widen adds credits.
func (l *link) widen(by int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	by = min(by, maxWindow-len(l.slots))
	for range by {
		l.free = append(l.free, uint32(len(l.slots)))
		l.slots = append(l.slots, nil)
	}
	l.wake()
}

// window is how many may be unanswered at once.
func (l *link) window() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.slots)
}

func (l *link) wake() {
	if l.idle {
		l.idle = false
		l.more.Signal()
	}
}

// enqueue takes p, or says why not.
func (l *link) enqueue(p *pending) outcome {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped || l.dead {
		return shut
	}
	if l.most > 0 {
		if l.ease(time.Now()); l.most > 0 && l.open+l.waiting() >= l.most {
			return full
		}
	}
	l.queue = append(l.queue, p)
	if len(l.free) > 0 {
		l.wake()
	}
	return accepted
}

// run sends until the link dies, a send fails, or it is stopped and all is sent. It sends what is there and never waits for more.
func (l *link) run() error {
	batch := make([]*pending, 0, batchItems)
	for {
		var alive bool
		if batch, alive = l.next(batch[:0]); !alive {
			return nil
		}
		if err := l.send(batch); err != nil {
			return err
		}
		clear(batch)
	}
}

// read notes that send does not look any more at what it was given. It is the sender's: nobody else raises count.
func (l *link) read() { l.done.Store(l.count) }

// next waits for work and a free slot. What it returns counts as written.
func (l *link) next(batch []*pending) ([]*pending, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting() > 0 && l.waiting() < batchItems/4 {
		// Others that are ready to run may have more: let them, so that batches fill without waiting.
		l.mu.Unlock()
		runtime.Gosched()
		l.mu.Lock()
	}
	for !l.dead && (l.waiting() == 0 || len(l.free) == 0) {
		if l.stopped && l.waiting() == 0 {
			return nil, false
		}
		l.idle = true
		l.more.Wait()
	}
	if l.dead {
		return nil, false
	}
	now := time.Now()
	for bytes := 0; l.waiting() > 0 && len(l.free) > 0 && len(batch) < batchItems; {
		p := l.queue[l.head]
		if bytes += len(p.Content.Body()); bytes > batchBytes && len(batch) > 0 {
			break
		}
		l.queue[l.head] = nil
		l.head++
		slot := l.free[len(l.free)-1]
		l.free = l.free[:len(l.free)-1]
		l.count++
		l.open++
		p.Seq = l.count<<slotBits | uint64(slot)
		p.stamp(now)
		if l.last {
			p.traced.Sent(now)
		}
		p.due = now.Add(p.plan.timeout + p.plan.grace)
		l.slots[slot] = p
		batch = append(batch, p)
	}
	if l.head == len(l.queue) {
		l.queue, l.head = l.queue[:0], 0
	} else if l.head > 1024 && l.head > len(l.queue)/2 {
		n := copy(l.queue, l.queue[l.head:])
		clear(l.queue[n:])
		l.queue, l.head = l.queue[:n], 0
	}
	return batch, true
}

func (l *link) waiting() int { return len(l.queue) - l.head }

// take removes the attempts that seqs answer, in their order. An unknown seq is a protocol fault, and so is one that was
// guessed: an attempt that the sender still looks at is not taken from under it.
func (l *link) take(seqs []uint64, to []*pending) ([]*pending, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return to, nil // its attempts have been completed otherwise
	}
	for _, seq := range seqs {
		slot := seq & (maxWindow - 1)
		if slot >= uint64(len(l.slots)) || l.slots[slot] == nil || l.slots[slot].Seq != seq || seq>>slotBits > l.done.Load() {
			return to, fmt.Errorf("%w: an answer to %d, which is unknown or answered", errProtocol, seq)
		}
		to = append(to, l.slots[slot])
		l.slots[slot] = nil
		l.free = append(l.free, uint32(slot))
		l.open--
	}
	if l.waiting() > 0 {
		l.wake()
	}
	return to, nil
}

// stop takes no new work; what was taken goes on.
func (l *link) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.wake()
}

// kill ends the link and hands out what it held: written and unanswered, and not written.
func (l *link) kill() (written, queued []*pending) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return nil, nil
	}
	l.dead = true
	l.more.Broadcast()
	for _, p := range l.slots {
		if p != nil {
			written = append(written, p)
		}
	}
	queued = append(queued, l.queue[l.head:]...)
	l.slots, l.queue, l.head, l.open = nil, nil, 0, 0
	return written, queued
}

// outstanding is how many attempts are written and unanswered.
func (l *link) outstanding() int {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

// overdue is how many answers are later than any honest one, and how long ago the first of them was asked for. Honest
// ones come within the attempt's timeout, or say that it is over.
func (l *link) overdue(now time.Time) (n int, longest time.Duration) {
	if l == nil {
		return 0, 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == 0 {
		return 0, 0
	}
	for _, p := range l.slots {
		if p != nil && now.After(p.due) {
			n++
			longest = max(longest, now.Sub(p.due)+p.plan.timeout+p.plan.grace)
		}
	}
	return n, longest
}
