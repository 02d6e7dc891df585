package delivery

import "time"

// clock goes on from the wall clock at its start by the monotonic one, so that sequences and due times know no
// jumps while the process lives.
type clock struct{ start time.Time }

func (c clock) now() time.Time { return c.start.Round(0).Add(time.Since(c.start)) }

// maxAhead is how far sequences may be ahead of the clock and still be continued: a small step back, or a clock
// that was set right. What is further ahead was given by a clock that was wrong.
const maxAhead = 24 * time.Hour

// The highest bits of the counter tell apart the sequences of one millisecond that were given before a wrong clock
// was noticed and after, up to maxHeals times. No clock gives as many within a millisecond as the bits below hold.
const (
	healBits = 3
	maxHeals = 1<<healBits - 1
)

const healShift = seqCounterBits - healBits

// nextSeq is the sequence of the next event.
func (p *partition) nextSeq(last uint64, now time.Time) uint64 {
	seq := max(last+1, seqAt(now))
	if seq > p.ahead.high {
		return seq
	}
	floor := seq>>seqCounterBits<<seqCounterBits | uint64(min(p.ahead.times, maxHeals))<<healShift
	return max(seq, floor)
}

// healsOf is how often a wrong clock had been noticed when a sequence was given that lies where one has been; maxHeals is that
// often or more.
func healsOf(seq uint64) int { return int(seq >> healShift & maxHeals) }

// heal brings a partition back whose newest sequence lies further ahead than maxAhead, because the clock was wrong
// when it was given. New sequences follow the present again; what lies ahead stays readable, is delivered, and
// counts as of now for retention. It reports whether memory has changed.
func (p *partition) heal(now time.Time) (bool, error) {
	limit := seqAt(now.Add(maxAhead))
	if p.lastSeq > limit {
		p.j.log.Warn("sequences lie in the future: the clock was wrong when they were given, or it is now",
			"partition", p.number, "newest", seqTime(p.lastSeq), "now", now)
		was := p.memory.ahead
		p.memory.ahead = aheadSpan{max(p.lastSeq, was.high), InstantOf(now), was.times + 1}
		last, err := p.lastSeqBefore(limit)
		if err != nil {
			return false, err
		}
		p.lastSeq = last
		return true, p.findAhead(now)
	}
	if p.memory.ahead.high == 0 {
		return false, nil
	}
	if p.memory.ahead.high < p.lastSeq {
		// The present has come by, and has been written down: no step back of the clock leads there again.
		p.memory.ahead.high, p.memory.ahead.noticed = 0, 0
		return true, nil
	}
	return false, p.findAhead(now)
}

// maxAheadDays bounds the days ahead that are looked through for known ids.
const maxAheadDays = 8

// findAhead lists the days ahead that have events.
func (p *partition) findAhead(now time.Time) error {
	p.aheadDays = nil
	from := min(dayOf(seqAt(now))+2, kept-1)
	return p.eachDay(p.j.db, from, func(day dayKey) error {
		if day != kept && len(p.aheadDays) < maxAheadDays {
			p.aheadDays = append(p.aheadDays, day)
		}
		return nil
	})
}

// lastSeqBefore finds the highest sequence of an event below a limit: by the namespaces of the last day that has
// any, and by what is kept.
func (p *partition) lastSeqBefore(limit uint64) (last uint64, err error) {
	var days []dayKey
	if err := p.eachDay(p.j.db, 0, func(day dayKey) error {
		if day <= dayOf(limit) {
			days = append(days, day)
		}
		return nil
	}); err != nil {
		return 0, err
	}
	for i := len(days) - 1; i >= 0 && last == 0; i-- {
		if last, err = p.lastSeqOf(days[i], limit); err != nil {
			return 0, err
		}
	}
	old, err := p.lastSeqOf(kept, limit)
	return max(last, old), err
}

// lastSeqOf is that of one day; 0 when it has none.
func (p *partition) lastSeqOf(day dayKey, limit uint64) (last uint64, err error) {
	err = p.eachSpace(p.j.db, day, func(ns NamespaceKey) error {
		for _, kind := range []byte{kindEvent, kindAgain} {
			prefix := appendKind(nil, p.number, day, ns, kind)
			if err := p.j.lastKey(p.j.db, prefix, appendU64(prefix[:len(prefix):len(prefix)], limit), func(key []byte) error {
				_, _, kind, rest, ok := splitRecord(key)
				seq, valid := recordSeq(kind, rest)
				if !ok || !valid {
					return p.j.corrupt(key, errBadKey)
				}
				last = max(last, seq)
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	})
	return last, err
}
