package delivery

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// Parts of what has ended go before the rest of it. What an event carries goes by an event, with all that quotes it, once none
// of its deliveries is open, those that were made again among them: as PurgeEvent has it go. Where a sweep has found one open,
// that is noted beside the event, and looked at again each hour. Attempts go by a delivery. Nothing is moved for either, and
// nothing that others do is slower for it.

// part is what a sweep erases of what has ended.
type part byte

const (
	whole    part = 0
	payloads part = 'p'
	attempts part = 'a'
)

const (
	// purgeTargets and purgeBytes bound the events that are purged in one commit, by the deliveries that they were made with and
	// their size; one alone may have more.
	purgeTargets = 256
	purgeBytes   = 1 << 20
	// findAtOnce is how many deliveries are looked up before a sweep rests.
	findAtOnce = 1024
)

// of is how long a part is kept that goes before the rest, which is kept for so long; 0 when it does not.
func (k Parts) of(some part, rest time.Duration) time.Duration {
	keep := k.Payloads
	if some == attempts {
		keep = k.Attempts
	}
	if rest > 0 && keep >= rest {
		return 0
	}
	return max(keep, 0)
}

// runParts erases what goes before the rest.
func (s *sweep) runParts(ctx context.Context) error {
	if len(s.keep.Parts) == 0 {
		return nil
	}
	hourly := s.now.Sub(s.p.retention.tidiedParts) >= tidyPartsEvery
	for _, some := range []part{payloads, attempts} {
		if some == attempts && !hourly {
			continue
		}
		own := *s // a commit that its caller has left may still read it
		own.part = some
		due, err := own.dueParts(ctx, hourly)
		if err != nil {
			return err
		}
		for _, d := range due {
			for _, f := range d.fates {
				if err := own.runPart(ctx, d.day, f, hourly); err != nil {
					return err
				}
			}
		}
		if !hourly {
			continue
		}
		for ns, keep := range own.partSpaces() {
			if err := own.tidyPart(ctx, ns, keep); err != nil {
				return err
			}
		}
	}
	if hourly {
		s.p.retention.tidiedParts = s.now
	}
	return nil
}

// partSpaces are the namespaces that keep the part for a shorter time than the rest.
func (s *sweep) partSpaces() map[NamespaceKey]time.Duration {
	all := make(map[NamespaceKey]time.Duration)
	for ns, parts := range s.keep.Parts {
		if d := parts.of(s.part, s.keep.Of(ns)); d > 0 {
			all[ns] = d
		}
	}
	return all
}

// dueParts finds the days and namespaces of which something of the part may be to go; if not all, only those days of which more
// goes with each sweep. It costs a look at each namespace that keeps it for a shorter time and has anything in a day.
func (s *sweep) dueParts(ctx context.Context, all bool) (due []dueDay, err error) {
	keep := s.partSpaces()
	if len(keep) == 0 {
		return nil, nil
	}
	spaces := slices.Sorted(maps.Keys(keep))
	snapshot := s.p.j.db.NewSnapshot()
	defer func() { err = errors.Join(err, snapshot.Close()) }()
	err = s.p.eachDay(snapshot, 0, func(day dayKey) error {
		d := dueDay{day: day}
		if err := ctx.Err(); err != nil || day == kept {
			return err
		}
		if err := s.eachOf(snapshot, day, spaces, func(ns NamespaceKey) {
			if f := (fate{ns: ns, below: s.below(day, keep[ns])}); f.below > 0 && (all || f.below != math.MaxUint64) {
				d.fates = append(d.fates, f)
			}
		}); err != nil {
			return err
		}
		if len(d.fates) > 0 {
			due = append(due, d)
		}
		return nil
	})
	return due, err
}

// eachOf visits those of some namespaces that have anything in a day. It costs a seek for each that is in both, and no more than
// one for each of the fewer.
func (s *sweep) eachOf(r pebble.Reader, d dayKey, spaces []NamespaceKey, visit func(NamespaceKey)) error {
	p := s.p
	first, last := appendDaySpace(nil, p.number, d, spaces[0]), appendDaySpace(nil, p.number, d, spaces[len(spaces)-1])
	return p.j.hop(r, first, prefixEnd(last), func(key []byte) ([]byte, error) {
		_, ns, _, _, ok := splitRecord(key)
		if !ok {
			return nil, p.j.corrupt(key, errBadKey)
		}
		i, found := slices.BinarySearch(spaces, ns)
		if found {
			visit(ns)
			i++
		}
		if i == len(spaces) {
			return prefixEnd(last), nil
		}
		return appendDaySpace(nil, p.number, d, spaces[i]), nil
	})
}

// runPart has the part of a namespace's day go.
func (s *sweep) runPart(ctx context.Context, d dayKey, f fate, hourly bool) error {
	if s.part == attempts {
		return s.eraseAttempts(ctx, d, f.ns, func(seq uint64) bool { return seq < f.below })
	}
	p := s.p
	mark := appendSweptKey(nil, p.number, d, f.ns)
	if _, err := p.j.get(p.j.db, mark, func(value []byte) error {
		m, err := decodeSwept(value)
		if err == nil && m.heals == p.ahead.times { // else there may be sequences below it that came later
			f.from = m.to
		}
		return err
	}); p.passOver(err) != nil { // one that is damaged is found out again
		return err
	}
	if any, err := s.any(d, f); err != nil {
		return err
	} else if any {
		if err := s.purgeSpan(ctx, d, f); err != nil {
			return err
		}
		if !s.ahead(d) { // else what is given later may come before
			if err := s.do(ctx, func(c *commit) error {
				// No further than what there has been: a clock that is set back gives what lies behind that and before below.
				c.set(mark, encodeSwept(swept{min(f.below, c.lastSeq+1), p.ahead.times}))
				return nil
			}); err != nil {
				return err
			}
		}
	}
	if !hourly {
		return nil
	}
	return s.purgeWaiting(ctx, d, f.ns)
}

// any reports whether there are events in what is to go.
func (s *sweep) any(d dayKey, f fate) (found bool, err error) {
	if f.from >= f.below {
		return false, nil
	}
	lower, upper := appendEventKey(nil, s.p.number, d, f.ns, f.from), appendEventKey(nil, s.p.number, d, f.ns, f.below)
	err = s.p.j.iterate(s.p.j.db, lower, upper, func(it *pebble.Iterator) error {
		found = it.First()
		return nil
	})
	return found, err
}

// purgeSpan purges the events of a day in which nothing is open, and notes of the others that they wait for that: many in one
// commit where they are as events mostly are, the others one by one.
func (s *sweep) purgeSpan(ctx context.Context, d dayKey, f fate) error {
	p := s.p
	return s.someOf(ctx, d, f, kindEvent, s.carries, func(keys [][]byte) error {
		seqs := seqsOf(keys)
		for len(seqs) > 0 && !p.swept.Load().has(d) && !p.j.watches.watched(f.ns) {
			made := make(chan purgedRun, 1)
			if err := s.do(ctx, func(c *commit) error {
				r, err := c.purgeRun(s, d, f.ns, seqs)
				made <- r
				return err
			}); err != nil {
				return err
			}
			r := <-made
			seqs = seqs[r.n:]
			if _, err := s.purgeThose(ctx, f.ns, r.others, true); err != nil {
				return err
			}
		}
		_, err := s.purgeThose(ctx, f.ns, seqs, true)
		return err
	})
}

// carries reports whether an event's record has not been purged, or not as a whole. One that cannot be read is passed over.
func (s *sweep) carries(key, value []byte) (bool, error) {
	head, err := decodeHead(value)
	carries := !head.purged
	if err == nil && head.purged {
		var e *Event
		if e, err = decodeEvent(value); err == nil {
			carries = !e.Purged.done
		}
	}
	if err != nil {
		return false, s.p.passOver(s.p.j.corrupt(key, err))
	}
	return carries, nil
}

func seqsOf(keys [][]byte) []uint64 {
	seqs := make([]uint64, len(keys))
	for i, key := range keys {
		seqs[i], _ = recordSeq(kindEvent, key[recordPrefix:])
	}
	return seqs
}

// purgeWaiting looks at the events of a day again that were found open.
func (s *sweep) purgeWaiting(ctx context.Context, d dayKey, ns NamespaceKey) error {
	p := s.p
	prefix := appendSweptKey(nil, p.number, d, ns)
	for from, end := appendU64(slices.Clone(prefix), 0), prefixEnd(prefix); from != nil; {
		var keys [][]byte
		if err := p.j.scan(p.j.db, from, end, func(key, _ []byte) error {
			if len(keys) == eraseByKey {
				return errStopped
			}
			if len(key) != len(prefix)+8 {
				return p.j.corrupt(key, errBadKey)
			}
			keys = append(keys, bytes.Clone(key))
			return nil
		}); errors.Is(err, errStopped) {
			from = append(bytes.Clone(keys[len(keys)-1]), 0)
		} else if err != nil {
			return err
		} else {
			from = nil
		}
		seqs := make([]uint64, len(keys))
		for i, key := range keys {
			seqs[i] = binary.BigEndian.Uint64(key[len(prefix):])
		}
		over, err := s.purgeThose(ctx, ns, seqs, false)
		if err != nil {
			return err
		}
		keys = keys[:0]
		for _, seq := range over {
			keys = append(keys, appendWaitKey(nil, p.number, d, ns, seq))
		}
		if err := s.eraseKeys(ctx, keys); err != nil {
			return err
		}
	}
	return nil
}

// purgeThose purges those of some events of which nothing is open. Of what waits for that it notes so, if it is to. over are
// those that wait for nothing any more: they are gone, or have been purged.
func (s *sweep) purgeThose(ctx context.Context, ns NamespaceKey, seqs []uint64, note bool) (over []uint64, err error) {
	p := s.p
	var ready, waiting []uint64
	targets, size, found := 0, 0, 0
	begin, asOf := time.Now(), p.shownIndex()
	purge := func() error {
		some := ready
		ready, targets, size = nil, 0, 0
		if len(some) == 0 {
			return nil
		}
		err := s.purgeReady(ctx, ns, some, note, asOf)
		asOf = p.shownIndex()
		return err
	}
	for _, seq := range seqs {
		l, err := s.lookAt(p.j.db, ns, seq, true)
		if err := p.passOver(err); err != nil {
			return nil, err
		}
		if err != nil {
			continue
		}
		switch l.stands {
		case partOver:
			over = append(over, seq)
		case partWaits:
			waiting = append(waiting, seq)
		case partReady:
			ready, targets, size = append(ready, seq), targets+l.targets, size+l.size
			if targets >= purgeTargets || size >= purgeBytes || len(ready) >= tidyBatch {
				if err := purge(); err != nil {
					return nil, err
				}
			}
		}
		if found += l.targets + 1; found >= findAtOnce {
			if err := sleep(ctx, min(restFor*time.Since(begin), restMost)); err != nil {
				return nil, err
			}
			found, begin = 0, time.Now()
		}
	}
	if err := purge(); err != nil || !note {
		return over, err
	}
	for some := range slices.Chunk(waiting, eraseAtOnce) {
		if err := s.do(ctx, func(c *commit) error {
			for _, seq := range some {
				c.set(appendWaitKey(nil, p.number, dayOf(seq), ns, seq), nil)
			}
			return nil
		}); err != nil {
			return nil, err
		}
	}
	return over, nil
}

// partStands is how an event stands of which a part is to go.
type partStands uint8

const (
	partOver partStands = iota
	partWaits
	partReady
)

type lookedAt struct {
	stands        partStands
	targets, size int
}

// lookAt reads how an event stands; not own: as for its own deliveries, which have ended.
func (s *sweep) lookAt(r pebble.Reader, ns NamespaceKey, seq uint64, own bool) (l lookedAt, err error) {
	p := s.p
	day, err := p.home(r, ns, seq)
	if err != nil {
		return l, err
	}
	var head eventHead
	done := false
	found, err := p.j.get(r, appendEventKey(nil, p.number, day, ns, seq), func(value []byte) (err error) {
		l.size = len(value)
		if head, err = decodeHead(value); err == nil && head.purged {
			var e *Event
			if e, err = decodeEvent(value); err == nil {
				done = e.Purged.done
			}
		}
		return err
	})
	if err != nil || !found || done {
		return l, err
	}
	subs, stays, err := s.anyStays(r, day, ns, seq, &head, own)
	l.targets = len(subs)
	if l.stands = partReady; stays && !head.purged {
		l.stands = partWaits
	}
	return l, err
}

// purgeReady purges events, but for those of which something has been opened since they were looked at: what has ended is only
// opened again by edits, of which a partition knows the last.
func (s *sweep) purgeReady(ctx context.Context, ns NamespaceKey, seqs []uint64, note bool, asOf Commit) error {
	p := s.p
	first, edited := true, false
	unread, err := p.purge(ctx, ns, seqs, func(c *commit, seq uint64) (bool, error) {
		if first { // this edits, too
			first, edited = false, c.edited || p.lastEdit > asOf
		}
		l, err := s.lookAt(c.r, ns, seq, edited)
		if err == nil && l.stands == partWaits && note {
			c.set(appendWaitKey(nil, p.number, dayOf(seq), ns, seq), nil)
		}
		return err == nil && l.stands == partReady, p.passOver(err)
	}, func(*commit, PurgeCounts) error { return nil }, func() { _ = sleep(ctx, restMost) })
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	for _, one := range unread {
		err = errors.Join(err, p.passOver(one))
	}
	if err != nil {
		return err
	}
	return sleep(ctx, restMost)
}

// purgeBegun completes purges that were cut short, whoever has begun them. It costs a look at each namespace of which something is kept.
func (s *sweep) purgeBegun(ctx context.Context) error {
	p := s.p
	var spaces []NamespaceKey
	if err := p.eachSpace(p.j.db, kept, func(ns NamespaceKey) error {
		spaces = append(spaces, ns)
		return nil
	}); err != nil {
		return err
	}
	for _, ns := range spaces {
		prefix := appendSweptKey(nil, p.number, kept, ns)
		for from := prefix; ; { // what cannot be purged stays, and holds up nothing behind it
			var begun [][]byte
			if err := p.j.scan(p.j.db, from, prefixEnd(prefix), func(key, _ []byte) error {
				if len(key) != len(prefix)+8 {
					return p.j.corrupt(key, errBadKey)
				}
				if begun = append(begun, bytes.Clone(key)); len(begun) == eraseByKey {
					return errStopped
				}
				return nil
			}); err != nil && !errors.Is(err, errStopped) {
				return err
			}
			for _, key := range begun {
				if err := s.completePurge(ctx, ns, key, binary.BigEndian.Uint64(key[len(prefix):])); err != nil {
					return err
				}
			}
			if len(begun) < eraseByKey {
				break
			}
			from = append(begun[len(begun)-1], 0)
		}
	}
	return nil
}

// completePurge completes the purge of an event of which the row at key says that it was begun.
func (s *sweep) completePurge(ctx context.Context, ns NamespaceKey, key []byte, seq uint64) error {
	unread, err := s.p.purge(ctx, ns, []uint64{seq}, nil, func(*commit, PurgeCounts) error { return nil }, func() { _ = sleep(ctx, restMost) })
	if errors.Is(err, ErrNotFound) { // retained no longer
		err = s.eraseKeys(ctx, [][]byte{key})
	}
	for _, one := range unread {
		err = errors.Join(err, s.p.passOver(one))
	}
	return err
}

// eraseAttempts erases the attempts of those deliveries of a day that are old and have ended.
func (s *sweep) eraseAttempts(ctx context.Context, d dayKey, ns NamespaceKey, old func(seq uint64) bool) error {
	p := s.p
	var last rowAt
	goes := false
	return s.someOf(ctx, d, fate{ns: ns, below: math.MaxUint64}, kindAttempt, func(key, _ []byte) (bool, error) {
		seq, _ := recordSeq(kindAttempt, key[recordPrefix:])
		at := rowAt{LaneKey{ns, SubscriptionKey(binary.BigEndian.Uint64(key[recordPrefix:]))}, seq}
		if at == last {
			return goes, nil
		}
		last, goes = at, false
		if !old(seq) {
			return false, nil
		}
		place, err := p.find(p.j.db, at.lane, seq)
		if err == nil {
			var stays bool
			stays, err = s.stays(p.j.db, at.lane, place)
			goes = err == nil && !stays
		}
		return goes, p.passOver(err)
	}, func(keys [][]byte) error { return s.eraseKeys(ctx, keys) })
}

// tidyPart does the same with what was kept, and has ended since.
func (s *sweep) tidyPart(ctx context.Context, ns NamespaceKey, keep time.Duration) error {
	old := func(seq uint64) bool {
		if d := dayOf(seq); s.ahead(d) || keep >= walkBelow {
			return s.age(d) >= keep
		}
		return s.now.Sub(seqTime(seq)) >= keep
	}
	if s.part == attempts {
		return s.eraseAttempts(ctx, kept, ns, old)
	}
	return s.someOf(ctx, kept, fate{ns: ns, below: math.MaxUint64}, kindEvent, func(key, value []byte) (bool, error) {
		if seq, _ := recordSeq(kindEvent, key[recordPrefix:]); !old(seq) {
			return false, nil
		}
		return s.carries(key, value)
	}, func(keys [][]byte) error {
		_, err := s.purgeThose(ctx, ns, seqsOf(keys), false)
		return err
	})
}

// swept says up to which sequence payloads have gone, or been noted, in a day of a namespace, as of so many times that a wrong
// clock had been noticed.
type swept struct {
	to    uint64
	heals int
}

func encodeSwept(m swept) []byte {
	w := newRecord(nil)
	w.uint(m.to)
	w.int(m.heals)
	return w
}

func decodeSwept(value []byte) (swept, error) {
	d := readRecord(value)
	m := swept{d.uint(), d.int()}
	return m, d.err
}
