package health

import (
	"math"
	"time"
)

const (
	// afterProbe is the limit when the breaker has closed: the probe was one.
	afterProbe = 2
	// window is how long answers are gathered to compare how long they take; where enough come sooner, at least shortWindow.
	window      = time.Second
	shortWindow = 100 * time.Millisecond
	enough      = 50
	// learn is how many answers say how long they take while few are in flight.
	learn = 8
	// Answers that take up to twice what they take while few are in flight, or slack more, are as usual.
	usual = 2
	slack = 25 * time.Millisecond
)

// Reason says what a limit is due to.
type Reason uint8

// What a limit below the subscription's is due to.
const (
	// ForStart: it grows while it is used.
	ForStart Reason = iota
	ForTimeouts
	ForOverload
	ForLatency
	ForBreaker
	ForRestart
	// ForSubscription: it is what the subscription allows.
	ForSubscription
)

// String is in words for people.
func (r Reason) String() string {
	switch r {
	case ForStart:
		return "slow start: it grows while it is used"
	case ForTimeouts:
		return "halved when attempts timed out"
	case ForOverload:
		return "halved when the receiver answered 429 or 503"
	case ForLatency:
		return "lowered because answers took longer the more were in flight"
	case ForBreaker:
		return "slow start after the breaker was open"
	case ForRestart:
		return "the receiver was failing when the server started"
	}
	return "max_in_flight"
}

// limit is how many attempts may be in flight. Where few answers come it goes by additive increase and multiplicative
// decrease alone; where enough come in a window it grows by its root a window, and is lowered in proportion to how much
// longer answers take than usual.
type limit struct {
	n         float32 // 0: nothing is known, and one attempt may be made
	threshold float32 // slow start ends here; 0 is never
	cut       instant // when it was last halved
	usedAt    instant // when at least half of it was last in flight
	began     instant // of the window
	sum       time.Duration
	base      time.Duration // what answers take while few are in flight; 0: not known
	samples   uint32
	why       Reason
	many      bool // enough answers came in the last window
	used      bool // so much was in flight in this window
}

func (l *limit) of(most int) int { return min(max(int(l.n), 1), most) }

// reset begins slow start anew, and where the receiver has said how much is too much for it, up to what it was.
func (l *limit) reset() {
	threshold := float32(0)
	if l.why == ForOverload || l.why == ForLatency {
		threshold = max(afterProbe, l.n)
	}
	*l = limit{n: 1, threshold: threshold, why: ForBreaker}
}

func (l *limit) started(inFlight int, now instant) {
	if 2*inFlight >= int(l.n) {
		l.usedAt = now
	}
}

// halve takes half back, unless the attempt started before it was last halved.
func (l *limit) halve(why Reason, started, now instant) bool {
	if started < l.cut {
		return false
	}
	l.lower(l.n/2, why)
	l.cut = now
	return true
}

func (l *limit) lower(to float32, why Reason) {
	l.n = max(1, to)
	l.threshold, l.why = l.n, why
}

// answered learns from an answer of a receiver that is well, and reports whether the limit was lowered.
func (l *limit) answered(started instant, served time.Duration, most int, now instant) bool {
	l.n = min(l.n, float32(most))
	if started <= l.usedAt && started >= l.cut { // one that is not used says nothing
		l.used = true
		switch {
		case l.threshold == 0 || l.n < l.threshold:
			l.n++
		case !l.many:
			l.n += 1 / l.n
		}
		l.n = min(l.n, float32(most))
	}
	if l.began == 0 {
		l.began = now
	}
	l.samples++
	l.sum += served
	if l.base == 0 && l.samples == learn {
		l.base = l.sum / learn
	}
	elapsed := now.since(l.began)
	if elapsed < shortWindow {
		return false
	}
	mean := l.sum / time.Duration(l.samples)
	if elapsed < window && (l.samples < enough || elapsed < mean) {
		return false
	}
	l.many = l.samples >= enough
	cut := false
	if l.many {
		cut = l.compare(mean, most)
	} else {
		l.base = 0 // what is usual is learnt anew
	}
	l.began, l.samples, l.sum, l.used = now, 0, 0, false
	return cut
}

// compare follows a window with enough answers.
func (l *limit) compare(mean time.Duration, most int) bool {
	switch {
	case mean < l.base:
		l.base -= (l.base - mean) / 2
	case !l.used || l.n < 3: // it is not for us that they take longer
		l.base += (mean - l.base) / 8
	}
	if most := max(usual*l.base, l.base+slack); mean > most {
		l.lower(l.n*max(0.5, float32(most)/float32(mean)), ForLatency)
		return true
	}
	if l.used && l.cut < l.began && l.threshold != 0 && l.n >= l.threshold {
		l.n = min(l.n+float32(math.Sqrt(float64(l.n))), float32(most))
	}
	return false
}

// LimitReason says what the limit is due to, of at most so many.
func (h *Health) LimitReason(most int) Reason {
	switch {
	case h.breaker.open():
		return ForBreaker
	case h.limit.n == 0 && h.failing != 0:
		return ForRestart
	case h.Limit(most) >= most:
		return ForSubscription
	}
	return h.limit.why
}

// Lowered reports whether the limit was taken back for a sign of overload, and has not grown well beyond that since.
func (h *Health) Lowered() bool { return h.limit.threshold != 0 && h.limit.n <= 2*h.limit.threshold }
