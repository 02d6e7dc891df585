package dispatch

import (
	"cmp"
	"math/bits"
	"slices"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// Stats are counters over a window, kept in memory since the engine started.
type Stats struct {
	// Lane is the zero value for a total.
	Lane delivery.LaneKey
	// Events accepted.
	Events int64
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
}

const (
	minutes = 60
	hours   = 24
)

// series holds a lane's counters by minute for an hour and by hour for a day. Buckets are made when
// something is counted.
type series struct {
	minutes [minutes]*bucket
	hours   [hours]*bucket
}

type bucket struct {
	slot                                          int64 // minutes or hours since 1970
	events, attempts, failed, succeeded, failures uint32
	latency                                       histogram
}

func bucketAt(ring []*bucket, slot int64) *bucket {
	b := &ring[slot%int64(len(ring))]
	if *b == nil {
		*b = &bucket{slot: slot}
	} else if (*b).slot != slot {
		**b = bucket{slot: slot}
	}
	return *b
}

// each calls f for the current minute and hour. l.mu is held.
func (l *lane) each(now time.Time, f func(*bucket)) {
	if l.stats == nil {
		l.stats = &series{}
	}
	minute := now.Unix() / 60
	f(bucketAt(l.stats.minutes[:], minute))
	f(bucketAt(l.stats.hours[:], minute/60))
}

func (l *lane) countEvent(now time.Time) {
	l.each(now, func(b *bucket) { b.events++ })
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

// sum adds what the lane counted within the window.
func (s *series) sum(st *Stats, h *histogram, now time.Time, window time.Duration) {
	ring, unit := s.minutes[:], time.Minute
	if window > minutes*time.Minute {
		ring, unit = s.hours[:], time.Hour
	}
	slot := now.Unix() / int64(unit/time.Second)
	first := slot - int64((window+unit-1)/unit)
	for _, b := range ring {
		if b == nil || b.slot < first || b.slot > slot {
			continue
		}
		st.Events += int64(b.events)
		st.Attempts += int64(b.attempts)
		st.FailedAttempts += int64(b.failed)
		st.Succeeded += int64(b.succeeded)
		st.Failed += int64(b.failures)
		h.merge(&b.latency)
	}
}

// Stats sums up a namespace, or all with "", over a window of a minute to a day, and the top
// subscriptions with the most failed attempts. Windows are rounded up to whole minutes, above an hour to
// whole hours.
func (e *Engine) Stats(ns string, window time.Duration, top int) (total Stats, per []Stats) {
	now := time.Now()
	var all histogram
	for _, l := range e.allLanes() {
		if ns != "" && l.key.Namespace != ns {
			continue
		}
		st, h := l.statsOver(now, window)
		total.add(&st)
		all.merge(&h)
		if top > 0 {
			st.P50, st.P99 = h.quantile(0.5), h.quantile(0.99)
			per = append(per, st)
		}
	}
	total.P50, total.P99 = all.quantile(0.5), all.quantile(0.99)
	slices.SortFunc(per, func(a, b Stats) int {
		return cmp.Or(-cmp.Compare(a.FailedAttempts, b.FailedAttempts), -cmp.Compare(a.Attempts, b.Attempts),
			cmp.Compare(a.Lane.Namespace, b.Lane.Namespace), cmp.Compare(a.Lane.Subscription, b.Lane.Subscription))
	})
	return total, per[:min(len(per), max(top, 0))]
}

func (s *Stats) add(o *Stats) {
	s.Events += o.Events
	s.Attempts += o.Attempts
	s.FailedAttempts += o.FailedAttempts
	s.Succeeded += o.Succeeded
	s.Failed += o.Failed
	s.Open += o.Open
	s.InFlight += o.InFlight
	s.OldestDue = max(s.OldestDue, o.OldestDue)
}

func (l *lane) statsOver(now time.Time, window time.Duration) (Stats, histogram) {
	st := Stats{Lane: l.key, Open: l.e.journal.OpenOf(l.key)}
	var h histogram
	l.mu.Lock()
	defer l.mu.Unlock()
	st.InFlight = int64(l.flying.n)
	st.OldestDue = l.oldestDue(now)
	if l.stats != nil {
		l.stats.sum(&st, &h, now, window)
	}
	return st, h
}

// OldestDue is the age of the oldest delivery of a namespace, or of all with "", that is due and not
// done. What waits for a paused, disabled or deleted subscription does not count.
func (e *Engine) OldestDue(ns string) time.Duration {
	now := time.Now()
	oldest := time.Duration(0)
	for _, l := range e.allLanes() {
		if ns == "" || l.key.Namespace == ns {
			l.mu.Lock()
			oldest = max(oldest, l.oldestDue(now))
			l.mu.Unlock()
		}
	}
	return oldest
}

func (l *lane) oldestDue(now time.Time) time.Duration {
	if l.gate(now).sweep {
		return 0
	}
	first := l.due
	for _, p := range l.parts {
		if p != nil && p.oldest != nil {
			first = earlier(first, accepted(p.oldest.id.Seq))
		} else if p != nil && p.from != 0 {
			first = earlier(first, accepted(p.from))
		}
	}
	for _, q := range []*queue{&l.retries, &l.flying} {
		for x := q.head; x != nil; x = x.next {
			first = earlier(first, x.due)
		}
	}
	if first == 0 {
		return 0
	}
	return max(0, now.Sub(time.Unix(0, first)))
}

// accepted is when a sequence was given, in unix nanoseconds: its upper bits are milliseconds.
func accepted(seq uint64) int64 { return int64(seq>>16) * int64(time.Millisecond) }
