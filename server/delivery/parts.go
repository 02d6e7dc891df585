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

// part is what a sweep erases of what has ended.
type part byte

const (
	whole    part = 0
	payloads part = 'p'
	attempts part = 'a'
)

type partDay struct {
	part part
	day  dayKey
}

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
	defer func() { s.part = whole }()
	tidy := s.now.Sub(s.p.retention.tidiedParts) >= tidyPartsEvery
	for _, s.part = range []part{payloads, attempts} {
		due, err := s.dueParts(ctx)
		if err != nil {
			return err
		}
		for _, d := range due {
			if err := s.erase(ctx, d.day, d.fates, s.eraseParts); err != nil {
				return err
			}
		}
		if tidy {
			if err := s.tidyParts(ctx); err != nil {
				return err
			}
		}
	}
	if tidy {
		s.p.retention.tidiedParts = s.now
	}
	return nil
}

// eraseParts erases the part of a day, and notes how far.
func (s *sweep) eraseParts(ctx context.Context, d dayKey, fates []fate) error {
	for _, f := range fates {
		run := s.purgePayloads
		if s.part == attempts {
			run = s.eraseAttempts
		}
		if err := run(ctx, d, f); err != nil {
			return err
		}
		if err := s.do(ctx, func(c *commit) error {
			c.set(appendSweptKey(nil, s.p.number, d, f.ns, s.part), encodeSwept(f.below))
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// sweptTo is up to which sequence the part of a namespace's day has been erased.
func (p *partition) sweptTo(r pebble.Reader, d dayKey, ns NamespaceKey, some part) (seq uint64, err error) {
	_, err = p.j.get(r, appendSweptKey(nil, p.number, d, ns, some), func(value []byte) (err error) {
		seq, err = decodeSwept(value)
		return err
	})
	return seq, p.passOver(err) // it is found out again
}

func encodeSwept(seq uint64) []byte {
	w := newRecord(nil)
	w.uint(seq)
	return w
}

func decodeSwept(value []byte) (uint64, error) {
	d := readRecord(value)
	seq := d.uint()
	return seq, d.err
}

// dueParts finds the days and namespaces of which the part is to go. It costs a look at each namespace that keeps it for a
// shorter time and has anything in a day.
func (s *sweep) dueParts(ctx context.Context) (due []dueDay, err error) {
	p := s.p
	keep, shortest := make(map[NamespaceKey]time.Duration), time.Duration(math.MaxInt64)
	for ns, parts := range s.keep.Parts {
		if d := parts.of(s.part, s.keep.Of(ns)); d > 0 {
			keep[ns], shortest = d, min(shortest, d)
		}
	}
	if len(keep) == 0 {
		return nil, nil
	}
	spaces := slices.Sorted(maps.Keys(keep))
	if p.retention.quietParts == nil {
		p.retention.quietParts = make(map[partDay]time.Time)
	}
	seen := make(map[partDay]time.Time)
	snapshot := p.j.db.NewSnapshot()
	defer func() { err = errors.Join(err, snapshot.Close()) }()
	err = p.eachDay(snapshot, 0, func(day dayKey) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if day == kept || s.age(day) < shortest-24*time.Hour {
			return nil
		}
		at := partDay{s.part, day}
		if until := p.retention.quietParts[at]; s.now.Before(until) {
			seen[at] = until
			return nil
		}
		d := dueDay{day: day}
		if err := s.eachOf(snapshot, day, spaces, func(ns NamespaceKey) error {
			f := fate{ns: ns, below: s.below(day, keep[ns])}
			if f.below == 0 {
				return nil
			}
			var err error
			if f.from, err = p.sweptTo(snapshot, day, ns, s.part); err != nil {
				return err
			}
			if any, err := s.any(snapshot, day, f); err != nil || !any {
				return err
			}
			d.fates = append(d.fates, f)
			return nil
		}); err != nil {
			return err
		}
		if len(d.fates) > 0 {
			due = append(due, d)
		} else if s.age(day) >= 0 {
			seen[at] = s.now.Add(lookAgain)
		}
		return nil
	})
	maps.DeleteFunc(p.retention.quietParts, func(at partDay, _ time.Time) bool { return at.part == s.part })
	maps.Copy(p.retention.quietParts, seen)
	return due, err
}

// eachOf visits those of some namespaces that have anything in a day. It costs a seek for each that is in both, and no more than
// one for each of the fewer.
func (s *sweep) eachOf(r pebble.Reader, d dayKey, spaces []NamespaceKey, visit func(NamespaceKey) error) error {
	p := s.p
	first, last := appendDaySpace(nil, p.number, d, spaces[0]), appendDaySpace(nil, p.number, d, spaces[len(spaces)-1])
	return p.j.hop(r, first, prefixEnd(last), func(key []byte) ([]byte, error) {
		_, ns, _, _, ok := splitRecord(key)
		if !ok {
			return nil, p.j.corrupt(key, errBadKey)
		}
		i, found := slices.BinarySearch(spaces, ns)
		if found {
			if err := visit(ns); err != nil {
				return nil, err
			}
			i++
		}
		if i == len(spaces) {
			return prefixEnd(last), nil
		}
		return appendDaySpace(nil, p.number, d, spaces[i]), nil
	})
}

// any reports whether there are events, or deliveries that were made again, in what is to go.
func (s *sweep) any(r pebble.Reader, d dayKey, f fate) (found bool, err error) {
	for _, kind := range []byte{kindEvent, kindAgain} {
		prefix := appendKind(nil, s.p.number, d, f.ns, kind)
		prefix = prefix[:len(prefix):len(prefix)]
		if err := s.p.j.iterate(r, appendU64(prefix, f.from), appendU64(prefix, f.below), func(it *pebble.Iterator) error {
			found = found || it.First()
			return nil
		}); err != nil || found {
			return found, err
		}
	}
	return false, nil
}

// purgePayloads purges what events carry of which nothing is open: what is was moved to kept. Events come last: what is noted
// of them is that all is purged.
func (s *sweep) purgePayloads(ctx context.Context, d dayKey, f fate) error {
	p := s.p
	prefix := appendKind(nil, p.number, d, f.ns, kindMade)
	prefix = prefix[:len(prefix):len(prefix)]
	if err := s.eraseSpan(ctx, appendU64(prefix, f.from), appendU64(prefix, f.below)); err != nil {
		return err
	}
	for _, kind := range []byte{kindDelivery, kindAttempt} {
		if err := s.someOf(ctx, d, f, kind, func(_, value []byte) (bool, error) { return quotes(kind, value), nil }, func(keys [][]byte) error {
			return s.rewrite(ctx, keys, func(c *commit, key, value []byte) error { return c.stripRecord(kind, key, value) })
		}); err != nil {
			return err
		}
	}
	return s.someOf(ctx, d, f, kindEvent, func(_, _ []byte) (bool, error) { return true, nil }, func(keys [][]byte) error {
		return s.rewrite(ctx, keys, func(c *commit, key, value []byte) error { return c.purgeRecord(key, value, true) })
	})
}

// rewrite has records written anew as they are in the commit that does it, some at a time. What cannot be read is passed over.
func (s *sweep) rewrite(ctx context.Context, keys [][]byte, with func(c *commit, key, value []byte) error) error {
	for some := range slices.Chunk(keys, eraseAtOnce) {
		if err := s.do(ctx, func(c *commit) error {
			for _, key := range some {
				var value []byte
				found, err := s.p.j.get(c.r, key, func(v []byte) error {
					value = bytes.Clone(v)
					return nil
				})
				if err == nil && found {
					err = with(c, key, value)
				}
				if err := s.p.passOver(err); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// eraseAttempts erases attempts of deliveries that have ended: those of what is open were moved to kept.
func (s *sweep) eraseAttempts(ctx context.Context, d dayKey, f fate) error {
	return s.eraseKind(ctx, d, f, kindAttempt)
}

// tidyParts does the same with what was kept, and has ended since.
func (s *sweep) tidyParts(ctx context.Context) error {
	for _, ns := range slices.Sorted(maps.Keys(s.keep.Parts)) {
		keep := s.keep.Parts[ns].of(s.part, s.keep.Of(ns))
		if keep <= 0 {
			continue
		}
		tidy := s.tidyPayloads
		if s.part == attempts {
			tidy = s.tidyAttempts
		}
		if err := tidy(ctx, ns, keep); err != nil {
			return err
		}
	}
	return nil
}

// outlived reports whether a kept sequence is older than a part is kept.
func (s *sweep) outlived(seq uint64, keep time.Duration) bool {
	if s.ahead(dayOf(seq)) || keep >= walkBelow {
		return s.age(dayOf(seq)) >= keep
	}
	return s.now.Sub(seqTime(seq)) >= keep
}

func (s *sweep) tidyPayloads(ctx context.Context, ns NamespaceKey, keep time.Duration) error {
	p := s.p
	return s.someOf(ctx, kept, fate{ns: ns, below: math.MaxUint64}, kindEvent, func(key, value []byte) (bool, error) {
		seq, _ := recordSeq(kindEvent, key[recordPrefix:])
		if !s.outlived(seq, keep) {
			return false, nil
		}
		head, err := decodeHead(value)
		if err != nil {
			return false, p.passOver(p.j.corrupt(key, err))
		}
		return !head.purged, nil
	}, func(keys [][]byte) error {
		for some := range slices.Chunk(keys, tidyBatch) {
			if err := s.purgeKept(ctx, ns, some); err != nil {
				return err
			}
		}
		return nil
	})
}

// purgeKept purges those of some kept events of which nothing is to stay.
func (s *sweep) purgeKept(ctx context.Context, ns NamespaceKey, keys [][]byte) error {
	p := s.p
	seqs := make([]uint64, len(keys))
	for i, key := range keys {
		seqs[i], _ = recordSeq(kindEvent, key[recordPrefix:])
	}
	unread, err := p.purge(ctx, ns, seqs, func(c *commit, seq uint64) (bool, error) {
		head, err := p.readHead(c.r, kept, ns, seq)
		if errors.Is(err, ErrNotFound) {
			return false, nil
		}
		stays := true
		if err == nil {
			_, stays, err = s.anyStays(c.r, ns, seq, &head)
		}
		return err == nil && !stays, p.passOver(err)
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

func (s *sweep) tidyAttempts(ctx context.Context, ns NamespaceKey, keep time.Duration) error {
	p := s.p
	var last rowAt
	goes := false
	return s.someOf(ctx, kept, fate{ns: ns, below: math.MaxUint64}, kindAttempt, func(key, _ []byte) (bool, error) {
		seq, _ := recordSeq(kindAttempt, key[recordPrefix:])
		lane := LaneKey{ns, SubscriptionKey(binary.BigEndian.Uint64(key[recordPrefix:]))}
		at := rowAt{lane, seq}
		if at == last {
			return goes, nil
		}
		last, goes = at, false
		if !s.outlived(seq, keep) {
			return false, nil
		}
		place, err := p.find(p.j.db, lane, seq)
		if err == nil {
			var stays bool
			stays, err = s.stays(p.j.db, lane, place)
			goes = err == nil && !stays
		}
		return goes, p.passOver(err)
	}, func(keys [][]byte) error { return s.eraseKeys(ctx, keys) })
}
