package dispatch

import (
	"cmp"
	"math/bits"
	"slices"
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// Stats are counters over a window, kept in memory since the engine started.
type Stats struct {
	// Lane is the zero value for a total.
	Lane delivery.LaneKey
	// Attempts ended.
	Attempts int64
	// FailedAttempts did not succeed.
	FailedAttempts int64
	// Succeeded deliveries.
	Succeeded int64
	// Failed deliveries: exhausted or rejected.
	Failed int64
	// Open deliveries now.
	Open int64
	// InFlight attempts now.
	InFlight int64
	// P50 and P99 of the time from accept to success; 0 when nothing succeeded.
	P50, P99 time.Duration
	// OldestDue is the age of the oldest delivery that is due; see Engine.OldestDue.
	OldestDue time.Duration
	// Breakers is how many lanes have a breaker that is open or half open now.
	Breakers int64
	// HostsDown is how many lanes wait because the host is down that they share with others.
	HostsDown int64
}

const (
	minutes = 60
	hours   = 24
	// bucketBytes and seriesBytes are about what they take, with a histogram of some steps.
	bucketBytes, seriesBytes = 128, 192
)

// statistics holds a series for each lane that counted something within a day, as far as limit allows.
type statistics struct {
	limit int64

	mu    sync.Mutex
	lanes map[delivery.LaneKey]*series
	bytes int64
	// rest is what the lanes counted that had to go.
	rest *series
}

// series holds counters by minute for an hour and by hour for a day, in the order of time, where something was counted.
type series struct {
	mu      sync.Mutex
	minutes []bucket
	hours   []bucket
	gone    bool // not among the statistics any more
}

type bucket struct {
	slot                                  int64 // minutes or hours since 1970
	attempts, failed, succeeded, failures uint32
	latency                               histogram
}

// at returns the bucket of a slot, which is the last one or later, and lets go of what is older than a number of slots.
func at(buckets []bucket, slot int64, keep int64) []bucket {
	if n := len(buckets); n > 0 && buckets[n-1].slot >= slot {
		return buckets
	}
	return append(recent(buckets, slot, keep), bucket{slot: slot})
}

// recent is without the buckets that are older than a number of slots.
func recent(buckets []bucket, slot int64, keep int64) []bucket {
	old := 0
	for old < len(buckets) && buckets[old].slot <= slot-keep {
		old++
	}
	return slices.Delete(buckets, 0, old)
}

// count adds to the counters of now. It returns how many bytes the series has grown by, and false if it is gone.
func (s *series) count(now time.Time, f func(*bucket)) (int64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.minutes) + len(s.hours)
	minute := now.Unix() / 60
	s.minutes = at(s.minutes, minute, minutes+1)
	s.hours = at(s.hours, minute/60, hours+1)
	f(&s.minutes[len(s.minutes)-1])
	f(&s.hours[len(s.hours)-1])
	return bucketBytes * int64(len(s.minutes)+len(s.hours)-before), !s.gone
}

func (s *series) size() int64 { return seriesBytes + bucketBytes*int64(len(s.minutes)+len(s.hours)) }

// each counts in the lane's series. l.mu is held.
func (l *lane) each(now time.Time, f func(*bucket)) {
	st := &l.e.statistics
	if l.series == nil {
		l.series = st.of(l.key)
	}
	grown, kept := l.series.count(now, f)
	if !kept { // it was counted in what is gone; the next one begins anew
		l.series = nil
		return
	}
	if grown > 0 {
		st.grow(grown)
	}
}

func (st *statistics) of(key delivery.LaneKey) *series {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := st.lanes[key]
	if s == nil {
		s = &series{}
		st.lanes[key] = s
		st.bytes += seriesBytes
	}
	return s
}

// grow accounts for bytes, and has the series go that were not counted in for longest when there are too many.
func (st *statistics) grow(bytes int64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.bytes += bytes
	if st.bytes <= st.limit {
		return
	}
	type aged struct {
		key  delivery.LaneKey
		last int64
	}
	ages := make([]aged, 0, len(st.lanes))
	for key, s := range st.lanes {
		s.mu.Lock()
		a := aged{key: key}
		if n := len(s.minutes); n > 0 {
			a.last = s.minutes[n-1].slot
		}
		s.mu.Unlock()
		ages = append(ages, a)
	}
	slices.SortFunc(ages, func(a, b aged) int { return cmp.Compare(a.last, b.last) })
	for _, a := range ages {
		if st.bytes <= st.limit-st.limit/8 {
			return
		}
		st.drop(a.key)
	}
}

// drop adds a lane's counters to the rest. st.mu is held.
func (st *statistics) drop(key delivery.LaneKey) {
	s := st.lanes[key]
	delete(st.lanes, key)
	s.mu.Lock()
	defer s.mu.Unlock()
	st.bytes -= s.size()
	s.gone = true
	st.rest.mu.Lock()
	defer st.rest.mu.Unlock()
	st.rest.minutes = merged(st.rest.minutes, s.minutes)
	st.rest.hours = merged(st.rest.hours, s.hours)
}

// merged adds up two lists of buckets by slot.
func merged(a, b []bucket) []bucket {
	for i := range b {
		at, ok := slices.BinarySearchFunc(a, b[i].slot, func(x bucket, slot int64) int { return cmp.Compare(x.slot, slot) })
		if !ok {
			a = slices.Insert(a, at, bucket{slot: b[i].slot})
		}
		x := &a[at]
		x.attempts += b[i].attempts
		x.failed += b[i].failed
		x.succeeded += b[i].succeeded
		x.failures += b[i].failures
		x.latency.merge(&b[i].latency)
	}
	return a
}

// tidy lets go of what is older than any window.
func (st *statistics) tidy(now time.Time) {
	minute := now.Unix() / 60
	shrink := func(s *series) (freed int64, empty bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		before := s.size()
		s.minutes, s.hours = recent(s.minutes, minute, minutes+1), recent(s.hours, minute/60, hours+1)
		empty = len(s.minutes)+len(s.hours) == 0
		return before - s.size(), empty
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	shrink(st.rest)
	for key, s := range st.lanes {
		freed, empty := shrink(s)
		st.bytes -= freed
		if empty {
			st.drop(key)
		}
	}
}

func (l *lane) count(now time.Time, o delivery.Outcome, s delivery.State, since time.Duration) {
	l.each(now, func(b *bucket) {
		b.attempts++
		if o != delivery.OutcomeSucceeded {
			b.failed++
		}
		b.end(s)
		if s == delivery.Succeeded {
			b.latency.add(since)
		}
	})
}

// countEnd counts a delivery that ended without an attempt.
func (l *lane) countEnd(now time.Time, s delivery.State) {
	l.each(now, func(b *bucket) { b.end(s) })
}

func (b *bucket) end(s delivery.State) {
	switch s {
	case delivery.Succeeded:
		b.succeeded++
	case delivery.Exhausted, delivery.Rejected:
		b.failures++
	}
}

// histogram counts durations in steps of about 1.4. It holds only the steps between the smallest and the
// largest seen.
type histogram struct {
	low    int
	counts []uint32
}

// step is the number of a duration's step: two for each power of two of microseconds.
func step(d time.Duration) int {
	us := uint64(max(d.Microseconds(), 1))
	k := bits.Len64(us) - 1
	if k == 0 {
		return 0
	}
	return 2*k + int(us>>(k-1)&1)
}

// bounds of a step.
func bounds(step int) (from, to time.Duration) {
	k, half := step/2, time.Duration(step%2)
	base := time.Microsecond << k
	return base + half*base/2, base + (half+1)*base/2
}

func (h *histogram) add(d time.Duration) { h.addStep(step(d), 1) }

func (h *histogram) addStep(s int, n uint32) {
	if len(h.counts) == 0 {
		h.low = s
	}
	if s < h.low {
		h.counts = append(make([]uint32, h.low-s), h.counts...)
		h.low = s
	}
	for s-h.low >= len(h.counts) {
		h.counts = append(h.counts, 0)
	}
	h.counts[s-h.low] += n
}

func (h *histogram) merge(o *histogram) {
	for i, n := range o.counts {
		if n > 0 {
			h.addStep(o.low+i, n)
		}
	}
}

// quantile is the duration below which the share q lies, 0 when nothing was counted.
func (h *histogram) quantile(q float64) time.Duration {
	total := 0.0
	for _, n := range h.counts {
		total += float64(n)
	}
	below := 0.0
	for i, n := range h.counts {
		if n > 0 && below+float64(n) >= q*total {
			from, to := bounds(h.low + i)
			return from + time.Duration((q*total-below)/float64(n)*float64(to-from))
		}
		below += float64(n)
	}
	return 0
}

// sum adds what was counted within the window.
func (s *series) sum(st *Stats, h *histogram, now time.Time, window time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	buckets, unit := s.minutes, time.Minute
	if window > minutes*time.Minute {
		buckets, unit = s.hours, time.Hour
	}
	slot := now.Unix() / int64(unit/time.Second)
	first := slot - int64((window+unit-1)/unit)
	for i := range buckets {
		b := &buckets[i]
		if b.slot < first || b.slot > slot {
			continue
		}
		st.Attempts += int64(b.attempts)
		st.FailedAttempts += int64(b.failed)
		st.Succeeded += int64(b.succeeded)
		st.Failed += int64(b.failures)
		h.merge(&b.latency)
	}
}

// Stats sums up a namespace, or all with 0, over a window of a minute to a day, and the top
// subscriptions with the most failed attempts. Windows are rounded up to whole minutes, above an hour to
// whole hours. See Options.StatsBytes for what a namespace's total may lack.
func (e *Engine) Stats(ns delivery.NamespaceKey, window time.Duration, top int) (total Stats, per []Stats) {
	now := e.now()
	var all histogram
	for key, found := range e.known(ns) {
		st, h := e.statsOver(key, found, now, window)
		total.add(&st)
		all.merge(&h)
		if top > 0 {
			st.P50, st.P99 = h.quantile(0.5), h.quantile(0.99)
			per = append(per, st)
		}
	}
	if ns == 0 {
		e.statistics.rest.sum(&total, &all, now, window)
	}
	total.P50, total.P99 = all.quantile(0.5), all.quantile(0.99)
	slices.SortFunc(per, func(a, b Stats) int {
		return cmp.Or(-cmp.Compare(a.FailedAttempts, b.FailedAttempts), -cmp.Compare(a.Attempts, b.Attempts),
			cmp.Compare(a.Lane.Namespace, b.Lane.Namespace), cmp.Compare(a.Lane.Subscription, b.Lane.Subscription))
	})
	return total, per[:min(len(per), max(top, 0))]
}

// known are the series of all lanes that have one or have something open; nil where there is none.
func (e *Engine) known(ns delivery.NamespaceKey) map[delivery.LaneKey]*series {
	found := make(map[delivery.LaneKey]*series)
	e.statistics.mu.Lock()
	for key, s := range e.statistics.lanes {
		if ns == 0 || key.Namespace == ns {
			found[key] = s
		}
	}
	e.statistics.mu.Unlock()
	e.mu.RLock()
	defer e.mu.RUnlock()
	for key := range e.lanes {
		if _, ok := found[key]; !ok && (ns == 0 || key.Namespace == ns) {
			found[key] = nil
		}
	}
	return found
}

func (s *Stats) add(o *Stats) {
	s.Attempts += o.Attempts
	s.FailedAttempts += o.FailedAttempts
	s.Succeeded += o.Succeeded
	s.Failed += o.Failed
	s.Open += o.Open
	s.InFlight += o.InFlight
	s.Breakers += o.Breakers
	s.HostsDown += o.HostsDown
	s.OldestDue = max(s.OldestDue, o.OldestDue)
}

func (e *Engine) statsOver(key delivery.LaneKey, s *series, now time.Time, window time.Duration) (Stats, histogram) {
	st := Stats{Lane: key, Open: e.journal.OpenOf(key)}
	var h histogram
	if l := e.find(key); l != nil {
		st.InFlight = int64(l.inFlight())
		st.OldestDue = l.oldestDue(now)
		if l.health.Isolated() {
			st.Breakers = 1
		}
		if since, _ := l.hostState(now); !since.IsZero() {
			st.HostsDown = 1
		}
		l.mu.Unlock()
	}
	if s != nil {
		s.sum(&st, &h, now, window)
	}
	return st, h
}

// InFlightNow is how many attempts are in flight over all lanes.
func (e *Engine) InFlightNow() int { return int(e.slots.used.Load()) }

// OldestDue is the age of the oldest delivery of a namespace, or of all with 0, that is due and not
// done. What waits for a subscription that is paused, disabled, deleted or not there does not count.
func (e *Engine) OldestDue(ns delivery.NamespaceKey) time.Duration {
	now := e.now()
	oldest := time.Duration(0)
	for _, l := range e.allLanes() {
		if ns == 0 || l.key.Namespace == ns {
			l.mu.Lock()
			oldest = max(oldest, l.oldestDue(now))
			l.mu.Unlock()
		}
	}
	return oldest
}

func (l *lane) oldestDue(now time.Time) time.Duration {
	if l.gate(now).lasting {
		return 0
	}
	first := now
	look := func(p delivery.Pos, k delivery.Kind) {
		if at := dueAt(p, k); p.Some && at.Before(first) {
			first = at
		}
	}
	for i := range l.parts {
		for _, k := range []delivery.Kind{delivery.FIFO, delivery.Timer} {
			look(l.parts[i].Next(k), k)
		}
	}
	for _, q := range []*queue{&l.fresh, &l.timers} {
		if q.head != nil {
			look(q.head.Row().Pos(), q.head.Kind)
		}
	}
	for _, q := range []*queue{&l.flying, &l.strays} {
		for x := q.head; x != nil; x = x.next {
			look(x.Row().Pos(), x.Kind)
		}
	}
	return now.Sub(first)
}

// dueAt is when a row is due: of the FIFO, when its sequence was given, whose upper bits are milliseconds.
func dueAt(p delivery.Pos, k delivery.Kind) time.Time {
	if k == delivery.FIFO {
		return delivery.ID{Seq: p.Seq}.Time()
	}
	return p.Due.Time()
}
