package health

import (
	"slices"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

const (
	// strangers is how many attempts to a new host may be in flight before it has answered anybody.
	strangers = 8
	// entryEvery is how often one may start beside those, as long as none of them is answered or fails; the more seldom the
	// more there are.
	entryEvery = 250 * time.Millisecond
	// known is after how many answers there is no bound any more for one that was down.
	known = 64
	// mostTrips bounds the wait for a probe, 32 s: there is one for all.
	mostTrips = 4
	// Witnesses is how many namespaces must have seen a host fail before one that has not believes it.
	Witnesses = 3
	// company is how many lanes must have.
	company = 2
)

// Origin is what is known of a host that several lanes deliver to, as far as connections and answers in time go: what an
// answer says is between the lane and its receiver. It is pure, as Health is, and promises:
//
//  1. It is down after 5 attempts in a row of at least two lanes that found no connection or no answer in time, and that all
//     started after the last answer to anybody. An answer to anybody ends that, whether it is a success or not.
//  2. While it is down there is one time, that of the next probe: no attempt starts before, and then one. The next wait is
//     drawn as a breaker's is, from a range that ends at 32 s.
//  3. A namespace that has not seen it fail believes it only when three others have, so that nobody closes it for others.
//     The caller does not ask for lanes whose own last attempt was answered: they go on, and so find out for all.
//  4. Such lanes have few attempts in flight, all together, while it has answered nobody or failed since: 8, and beside
//     them now and then another one, after a quarter of a second at first; when it is up again 2, and one more with each answer. A namespace that has none in
//     flight may have one beside them, as long as fewer than that many have some.
//
// The zero Origin is a new one. It is not safe for concurrent use.
type Origin struct {
	breaker  breaker // of which the counts of attempts are not used
	answered instant // when it last answered anybody
	// lanes and spaces are who has seen it fail since, as many as matter.
	lanes  [company]delivery.LaneKey
	spaces [Witnesses]delivery.NamespaceKey
	run    uint8 // failures since
	// risen: it was down, and has earned so many answers since.
	risen  bool
	earned uint8
	// entered is when the last attempt started that was let in.
	entered instant
}

// Entry says whether an attempt may start.
type Entry uint8

// Entries to an origin.
const (
	Stay  Entry = iota
	Enter       // it may
	Probe       // it may, and decides
)

// Party is who wants to start an attempt, one whose own last attempt was not answered.
type Party struct {
	Space delivery.NamespaceKey
	// Flying are the attempts of such lanes in flight there, Own those of the namespace, and Spaces the namespaces that have
	// some.
	Flying, Own, Spaces int
}

// Admit says whether a party may start an attempt.
func (o *Origin) Admit(p Party, now time.Time) Entry {
	if o.Down(p.Space) {
		if o.breaker.probing || o.breaker.probe > at(now) {
			return Stay
		}
		return Probe
	}
	room := o.room()
	if room < 0 || p.Flying < room || p.Own == 0 && p.Spaces < room || !now.Before(o.NextEntry(p.Flying)) {
		return Enter
	}
	return Stay
}

// room is how many attempts may be in flight that were let in; negative: any number.
func (o *Origin) room() int {
	switch {
	case o.risen:
		return afterProbe + int(o.earned)
	case o.answered == 0 || o.run > 0:
		return strangers
	}
	return -1
}

// Down reports whether it is down for a namespace.
func (o *Origin) Down(space delivery.NamespaceKey) bool {
	return o.breaker.open() && (o.spaces[Witnesses-1] != 0 || slices.Contains(o.spaces[:], space))
}

// Calm reports whether nothing is held against it, and any number may come.
func (o *Origin) Calm() bool { return !o.breaker.open() && o.room() < 0 }

// State says where it stands: since when it is down, and when the next probe may start. The time of a probe that is due or
// in flight is in the past.
func (o *Origin) State(now time.Time) (s BreakerState, since, probe time.Time) {
	switch b := &o.breaker; {
	case !b.open():
		return BreakerClosed, time.Time{}, time.Time{}
	case b.probing || b.probe <= at(now):
		return BreakerHalfOpen, b.since.time(), b.probe.time()
	default:
		return BreakerOpen, b.since.time(), b.probe.time()
	}
}

// NextProbe is when the next probe may start; the zero time while one is in flight, and while it is not down.
func (o *Origin) NextProbe() time.Time { return o.breaker.next().time() }

// NextEntry is when another attempt may start beside so many in flight, if it is not down and none of them ends before.
func (o *Origin) NextEntry(flying int) time.Time {
	return o.entered.add(entryEvery * time.Duration(max(1, flying/strangers))).time()
}

// Shut is when a probe last found that it is up again; zero when none has.
func (o *Origin) Shut() time.Time { return o.breaker.shut.time() }

// Started notes that an attempt starts that Admit has let in. The era is for Ended and Returned.
func (o *Origin) Started(e Entry, now time.Time) (era uint32) {
	o.entered = at(now)
	if e == Probe {
		o.breaker.probing = true
	}
	return o.breaker.era
}

// Returned notes that nothing came of a probe.
func (o *Origin) Returned(era uint32) { o.breaker.returned(era) }

// Meeting is how an attempt of any lane ended.
type Meeting struct {
	Lane delivery.LaneKey
	// Entry and Era are those it started with; a lane that was not asked to be admitted has neither.
	Entry  Entry
	Era    uint32
	Signal Signal
	// Started is when it started.
	Started time.Time
	// Random is uniform in [0, 1).
	Random float64
}

// Ended learns from an attempt, and reports whether the host is down since, or up again.
func (o *Origin) Ended(m *Meeting, now time.Time) (down, up bool) {
	n := at(now)
	probe := m.Entry == Probe && m.Era == o.breaker.era
	switch {
	case m.Signal == Ignored || m.Signal == Forbidden:
		if probe {
			o.breaker.unclear(m.Era, n, m.Random)
		}
		return false, false
	case m.Signal != TimedOut && m.Signal != Unreachable:
		return false, o.answers(n)
	case at(m.Started) <= o.answered:
		return false, false // others had an answer meanwhile
	}
	o.witness(m.Lane)
	if o.breaker.open() {
		if probe {
			o.breaker.trips = min(o.breaker.trips, mostTrips-1)
			o.breaker.probed(m.Signal, n, m.Random)
		}
		return false, false
	}
	o.run = min(o.run+1, inARow)
	if o.run < inARow || o.lanes[company-1] == (delivery.LaneKey{}) {
		return false, false
	}
	o.breaker.trip(NoConnection, n, m.Random)
	return true, false
}

func (o *Origin) answers(now instant) (up bool) {
	o.answered = now
	o.run, o.lanes, o.spaces = 0, [company]delivery.LaneKey{}, [Witnesses]delivery.NamespaceKey{}
	if o.breaker.open() {
		o.breaker = breaker{era: o.breaker.era, trips: o.breaker.trips, shut: now}
		o.risen, o.earned = true, 0
		return true
	}
	if o.risen {
		o.earned++
		o.risen = o.earned < known
	}
	return false
}

// Answered notes that somebody was answered at a time, of which nothing else was told.
func (o *Origin) Answered(t time.Time) { o.answered = max(o.answered, at(t)) }

// witness notes who has seen it fail.
func (o *Origin) witness(who delivery.LaneKey) {
	if i := slices.Index(o.lanes[:], delivery.LaneKey{}); i >= 0 && !slices.Contains(o.lanes[:i], who) {
		o.lanes[i] = who
	}
	if i := slices.Index(o.spaces[:], 0); i >= 0 && !slices.Contains(o.spaces[:i], who.Namespace) {
		o.spaces[i] = who.Namespace
	}
}

// Open has the next probe be due now. Its waits go on as they were: they are not one caller's.
func (o *Origin) Open(now time.Time) {
	if o.breaker.open() {
		o.breaker.probe = min(o.breaker.probe, at(now))
	}
}
