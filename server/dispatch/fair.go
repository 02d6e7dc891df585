package dispatch

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

const (
	// byteCost is what a byte of a delivery counts for, as time that a slot is held: 10 ms a MiB.
	byteCost = 10 * time.Nanosecond
	// guess is how long the first attempt of a lane is taken to hold its slot.
	guess = 10 * time.Millisecond
	// leastCost is what an attempt counts for at least.
	leastCost = 50 * time.Microsecond
	// mostDebt is what those who come back have had too much of, at most.
	mostDebt = int64(10 * time.Second)
	// costWeight is the share of one turn in the average.
	costWeight = 16
)

// turns is deficit round robin: those in it have their turns one after the other, each as long as it has had less than its
// share of what all had, by weight. It is kept on a clock of its own: had is what one has had, by weight, and in a round
// those have turns who have had less than until. When nobody has, the next round begins, which gives each about one turn more:
// so a turn costs a constant time on the average, however many there are. Who was not there saves up nothing but what
// a turn costs, but has its turn first, the last to come before those who came earlier: who has little to send waits least
// then, and nobody for more than the turns of a round. It is guarded by its owner; the zero value is empty.
type turns[M any] struct {
	head, tail *seat[M]
	n          int
	// until ends the round; quantum is what turns cost, a moving average, by weight.
	until, quantum int64
}

// seat is a place in turns.
type seat[M any] struct {
	of   M
	next *seat[M]
	had  int64
	// born is when it, or the youngest of it, was made, in nanoseconds since 1970; 0 where that is not known.
	born int64
	// more is what attempts have cost beyond what was taken for them, and is added to had when it matters.
	more atomic.Int64
	// heavy is its weight; 0 is 1.
	heavy int64
	in    bool
}

func (s *seat[M]) weight() int64 { return max(1, s.heavy) }

// add puts a seat in, if it is not: at the start if it has had less than its share, or was never in and is younger than who
// is there, else at the end.
func (t *turns[M]) add(s *seat[M]) {
	if s.in {
		return
	}
	first := s.had == 0
	t.correct(s)
	s.had = max(s.had, t.until-t.quantum, 1)
	if s.had < t.until && !first || first && (t.head == nil || s.born >= t.head.born) {
		t.front(s)
	} else {
		t.back(s)
	}
}

// correct adds what attempts have cost beyond what was taken for them.
func (t *turns[M]) correct(s *seat[M]) {
	if more := s.more.Load(); more != 0 {
		s.had = min(s.had+s.more.Swap(0)/s.weight(), t.until+mostDebt)
	}
}

func (t *turns[M]) front(s *seat[M]) {
	s.in, s.next, t.head = true, t.head, s
	if t.tail == nil {
		t.tail = s
	}
	t.n++
}

// back puts a seat at the end that has been taken out.
func (t *turns[M]) back(s *seat[M]) {
	t.append(s)
	t.n++
}

func (t *turns[M]) append(s *seat[M]) {
	s.in = true
	if t.tail == nil {
		t.head = s
	} else {
		t.tail.next = s
	}
	t.tail = s
}

func (t *turns[M]) shift() *seat[M] {
	s := t.head
	t.head, s.next, s.in = s.next, nil, false
	if t.head == nil {
		t.tail = nil
	}
	return s
}

// take takes out the seat whose turn it is, of those that may; nil when none may. Who may not saves up nothing either.
func (t *turns[M]) take(may func(M) bool) *seat[M] {
	for {
		least := int64(math.MaxInt64)
		for range t.n {
			s := t.shift()
			if may == nil || may(s.of) {
				t.correct(s)
				if s.had < t.until {
					t.n--
					return s
				}
				least = min(least, s.had)
			} else {
				s.had = max(s.had, t.until-t.quantum)
			}
			t.append(s)
		}
		if least == math.MaxInt64 {
			return nil
		}
		t.until = least + max(t.quantum, 1)
	}
}

// charge has a seat pay for a turn, whether it is in or not.
func (t *turns[M]) charge(s *seat[M], cost int64) {
	cost /= s.weight()
	s.had += cost
	t.quantum += (cost - t.quantum) / costWeight
}

// toPay is what an attempt of the lane is taken to cost. l.mu is held.
func (l *lane) toPay(x *entry, as standing) bill {
	took := l.health.Latency()
	if took == 0 {
		took = guess
	}
	return bill{uint32(min(x.cost(took)/int64(time.Microsecond), math.MaxUint32)), as} //nolint:gosec // within bounds
}

func (b bill) cost() int64 { return int64(b.paid) * int64(time.Microsecond) }

// bill is what an attempt has been charged for, where slots were scarce.
type bill struct {
	paid uint32 // in microseconds; 0: nothing
	as   standing
}

// cost is what an attempt costs that holds its slot for so long.
func (x *entry) cost(took time.Duration) int64 {
	return int64(max(took, leastCost) + time.Duration(x.size())*byteCost)
}

// square corrects what an attempt was charged for. A trial counts for one, however long it hangs, for it is trials that those
// on trial share; one that was answered costs nothing.
func (x *entry) square(cost int64) {
	switch {
	case x.bill.as != unknown, cost == 0: // nothing came of it
	case x.lane.standing == proven:
		cost = 0
	default:
		cost = x.bill.cost()
	}
	if b := x.bill; b.paid != 0 && cost != b.cost() {
		x.lane.seats[b.as].more.Add(cost - b.cost())
		x.lane.tenant.spaces[b.as].seat.more.Add(cost - b.cost())
	}
	x.bill = bill{}
}

// space is what a namespace has waiting for its turn, of one standing.
type space struct {
	seat  seat[*space]
	lanes turns[*lane]
	// tenant is the namespace.
	tenant *tenant
}

func newTenant(key delivery.NamespaceKey) *tenant {
	t := &tenant{key: key}
	for st := range t.spaces {
		s := &t.spaces[st]
		s.tenant, s.seat.of = t, s
	}
	return t
}
