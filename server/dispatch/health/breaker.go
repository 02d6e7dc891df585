package health

import "time"

const (
	// The breaker opens after so many attempts in a row without a connection or in time, after so many failures in a row, or
	// when of so many within three spans at least half have failed.
	inARow      = 5
	enoughFail  = 20
	span        = 10 * time.Second
	spans       = 3
	shortestGap = time.Second
	longestGap  = 15 * time.Minute
	// gap is the longest wait for the first probe; it doubles with each probe that fails.
	gap = 2 * time.Second
)

// Trip is what a breaker has opened for.
type Trip uint8

// What a breaker opens for.
const (
	NoTrip Trip = iota
	NoConnection
	AllFailed
	HalfFailed
)

// String is in words for people.
func (t Trip) String() string {
	switch t {
	case NoConnection:
		return "5 attempts in a row found no connection or timed out"
	case AllFailed:
		return "20 attempts in a row failed"
	case HalfFailed:
		return "half of the attempts within 30 s failed"
	}
	return ""
}

// BreakerState is where a breaker stands.
type BreakerState uint8

// States of a breaker.
const (
	BreakerClosed BreakerState = iota
	// BreakerOpen: no attempt starts before the time of the next probe.
	BreakerOpen
	// BreakerHalfOpen: one attempt may start, or is in flight, and decides.
	BreakerHalfOpen
)

// breaker is closed, open, or half open: open, with the time of its probe come, or its probe in flight.
type breaker struct {
	since instant // when it opened; 0: it is closed
	probe instant // when the next probe may start
	shut  instant // when a probe last closed it
	// era rises when it opens. While it is open, only the probe is of its era.
	era  uint32
	slot int32 // the newest span, counted from 1970
	last [spans]struct{ good, bad uint16 }
	// slow is connect failures and timeouts in a row, bad failures in a row, trips the probes that failed in a row.
	slow, bad, trips uint8
	why              Trip
	probing          bool
}

func (b *breaker) open() bool { return b.since != 0 }

// next is the time of the next probe; 0 when it is closed, or half open with its probe in flight.
func (b *breaker) next() instant {
	if b.probing || !b.open() {
		return 0
	}
	return b.probe
}

// ended follows an attempt while it is closed, and reports whether it opens. resting: the receiver has said for how long it
// is overloaded, which is another way to the same end.
func (b *breaker) ended(s Signal, resting bool, now instant, rnd float64) bool {
	if s == Overloaded && resting {
		return false
	}
	failed := s != Taken && s != Refused
	b.count(failed, now)
	if !failed {
		b.slow, b.bad = 0, 0
		if b.trips > 0 && b.sum(false) >= enoughFail {
			b.trips = 0
		}
		return false
	}
	b.bad = min(b.bad+1, enoughFail)
	if s == TimedOut || s == Unreachable {
		b.slow++
	} else {
		b.slow = 0
	}
	bad, good := b.sum(true), b.sum(false)
	switch {
	case b.slow >= inARow:
		b.trip(NoConnection, now, rnd)
	case b.bad >= enoughFail:
		b.trip(AllFailed, now, rnd)
	case bad+good >= enoughFail && bad >= good:
		b.trip(HalfFailed, now, rnd)
	default:
		return false
	}
	return true
}

// trip opens it.
func (b *breaker) trip(why Trip, now instant, rnd float64) {
	if now.since(b.shut) > longestGap {
		b.trips = 0
	}
	b.since, b.why = now, why
	b.era++
	b.wait(now, rnd)
}

// wait sets the time of the next probe.
func (b *breaker) wait(now instant, rnd float64) {
	most := min(gap<<min(b.trips, 16), longestGap)
	b.probe = now.add(shortestGap + time.Duration(rnd*float64(most-shortestGap)))
}

// probed follows an attempt of the present era while it is open. It reports false when that was no probe.
func (b *breaker) probed(s Signal, now instant, rnd float64) bool {
	if !b.probing {
		return false
	}
	b.probing = false
	if s == Taken || s == Refused {
		*b = breaker{era: b.era, trips: b.trips, shut: now}
		return true
	}
	b.trips = min(b.trips+1, 30)
	b.wait(now, rnd)
	return true
}

// unclear: nothing was learnt from what may have been the probe, and another one follows after as long a wait.
func (b *breaker) unclear(era uint32, now instant, rnd float64) {
	if b.probing && era == b.era {
		b.probing = false
		b.wait(now, rnd)
	}
}

// returned: the probe has not been made.
func (b *breaker) returned(era uint32) {
	if era == b.era {
		b.probing = false
	}
}

// halfOpen has the next probe be due now, and the waits begin anew.
func (b *breaker) halfOpen(now instant) {
	if b.open() {
		b.probe, b.trips = min(b.probe, now), 0
	}
}

func (b *breaker) count(failed bool, now instant) {
	slot := int32(int64(now) / int64(span)) //nolint:gosec // until the year 2650
	if gone := slot - b.slot; gone != 0 {
		last := b.last
		b.last = [spans]struct{ good, bad uint16 }{}
		if gone > 0 && gone < spans {
			copy(b.last[gone:], last[:])
		}
		b.slot = slot
	}
	c := &b.last[0]
	if c.good|c.bad >= 1<<15 { // only their proportion matters by then
		c.good, c.bad = c.good/2, c.bad/2
	}
	if failed {
		c.bad++
	} else {
		c.good++
	}
}

func (b *breaker) sum(failed bool) int {
	n := 0
	for _, c := range b.last {
		if failed {
			n += int(c.bad)
		} else {
			n += int(c.good)
		}
	}
	return n
}

// Breaker says where the breaker stands: since when it is open, when its next probe may start, and what it has opened for.
// The time of a probe that is due or in flight is in the past.
func (h *Health) Breaker(now time.Time) (s BreakerState, since, probe time.Time, why Trip) {
	b := &h.breaker
	if !b.open() {
		return BreakerClosed, time.Time{}, time.Time{}, NoTrip
	}
	s = BreakerHalfOpen
	next := b.probe
	if !b.probing {
		next = max(next, h.closed)
	}
	if next > at(now) && !b.probing {
		s = BreakerOpen
	}
	return s, b.since.time(), next.time(), b.why
}

// Isolated reports whether the breaker is open or half open.
func (h *Health) Isolated() bool { return h.breaker.open() }
