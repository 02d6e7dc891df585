package delivery

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// eraseByKey is how many rows a run of records may have to be erased one by one: a range costs every later
	// iterator, a delete only the rows next to it.
	eraseByKey = 4096
	// eraseAtOnce is how many rows go in one commit. A commit keeps those of all partitions waiting that come behind it.
	eraseAtOnce = 256
	// keepBatch is how many open deliveries move to kept in one commit, and keepBytes how much of them.
	keepBatch = 256
	keepBytes = 1 << 18
	// walkBelow is the retention below which a day is erased hour by hour and not as a whole.
	walkBelow = 2 * day
	// lookAgain is how long a day is not looked at again whose records are all younger than their retention.
	lookAgain = time.Hour
	// tidyEvery is how often kept events are looked through for those that have ended since, and tidyPartsEvery how often events
	// of which parts wait to go.
	tidyEvery      = 6 * time.Hour
	tidyPartsEvery = time.Hour
)

// Retention says how long records of what has ended are kept.
type Retention struct {
	// Of a namespace. Zero or less keeps everything.
	Of func(NamespaceKey) time.Duration
	// Dead is how long deliveries that ended without success stay after their end, with their events, if that is longer.
	// Nil, and zero or less, is no longer than others.
	Dead func(NamespaceKey) time.Duration
	// Shortest is a lower bound of what Of returns; zero when it is not known. Younger days are not looked at.
	Shortest time.Duration
	// Parts are the namespaces of which some things go before the rest.
	Parts map[NamespaceKey]Parts
}

// Parts says how long parts of what has ended are kept. Zero or less, and what is no less than the whole, is as long as the
// whole.
type Parts struct {
	// Payloads are what events carry, and what transformers have made of it: they go as PurgeEvent has them go, also where
	// something ended without success. Attempts are those that have failed.
	Payloads, Attempts time.Duration
}

// Retain erases, in one sweep, what is older than its namespace's retention: events, deliveries that have ended,
// attempts and ids. What is open stays whole, however old, with its event. A retention of two days or more is
// kept by the day, and so up to a day longer; a shorter one by the sweep; an event id stays known for a day in any
// case. A sweep costs what it erases, what is open of it, and a look at each day and namespace that is due. Parts that go
// earlier go by the same rules, attempts up to an hour later, and so do payloads that have waited for the end of something.
func (j *Journal) Retain(ctx context.Context, keep Retention) error {
	leave, err := j.enter()
	if err != nil {
		return err
	}
	defer leave()
	j.retaining.Lock()
	defer j.retaining.Unlock()
	var erased []span
	var failed error
	for _, p := range j.partitions {
		s := &sweep{p: p, keep: keep, now: j.now()}
		err := s.run(ctx)
		erased = append(erased, s.ranges...)
		if err != nil { // which is no reason to keep what is in the others
			failed = errors.Join(failed, fmt.Errorf("retain in partition %d: %w", p.number, err))
		}
		if ctx.Err() != nil || errors.Is(err, ErrClosed) {
			break
		}
	}
	j.counts.prune()
	return errors.Join(failed, j.reclaim(ctx, erased))
}

// retention is what a partition remembers between sweeps.
type retention struct {
	// quiet says until when a day need not be looked at.
	quiet map[dayKey]time.Time
	// tidied is when kept was last looked through, tidiedParts when for parts, and purged when for purges that were cut short.
	tidied, tidiedParts, purged time.Time
	// below is how far days have been erased that go hour by hour.
	below map[spaceDay]uint64
}

type spaceDay struct {
	day dayKey
	ns  NamespaceKey
}

// fate is what a sweep does with the records of a namespace in a day.
type fate struct {
	ns NamespaceKey
	// from is the first sequence that goes: what lies before it went in an earlier sweep. below is the first that
	// stays; all go when it is math.MaxUint64.
	from, below uint64
}

// sweeping is what a sweep is about to erase: nothing when it has no fates.
type sweeping struct {
	day   dayKey
	fates []fate // by namespace
}

// takes reports whether the records of an event are about to go.
func (s *sweeping) takes(ns NamespaceKey, seq uint64) bool {
	if s == nil || dayOf(seq) != s.day {
		return false
	}
	i, found := slices.BinarySearchFunc(s.fates, ns, func(f fate, ns NamespaceKey) int { return cmp.Compare(f.ns, ns) })
	return found && seq < s.fates[i].below
}

// sweep is one sweep of one partition.
type sweep struct {
	p    *partition
	keep Retention
	now  time.Time
	// part is what goes now; none is all.
	part part
	// ranges are what was erased by one, in the order of keys or not.
	ranges []span
}

// span is the keys from start on that lie before end.
type span struct{ start, end []byte }

func (s *sweep) run(ctx context.Context) error {
	p := s.p
	due, err := s.due(ctx)
	if err != nil {
		return err
	}
	for _, d := range due {
		if err := s.erase(ctx, d.day, d.fates); err != nil {
			return err
		}
	}
	if s.now.Sub(p.retention.purged) >= tidyPartsEvery {
		if err := s.purgeBegun(ctx); err != nil {
			return err
		}
		p.retention.purged = s.now
	}
	if err := s.runParts(ctx); err != nil {
		return err
	}
	if s.now.Sub(p.retention.tidied) >= tidyEvery {
		if err := s.tidy(ctx); err != nil {
			return err
		}
		p.retention.tidied = s.now
	}
	return nil
}

type dueDay struct {
	day   dayKey
	fates []fate
}

// due finds the days and namespaces that have something to erase.
func (s *sweep) due(ctx context.Context) (due []dueDay, err error) {
	p := s.p
	if p.retention.quiet == nil {
		p.retention.quiet = make(map[dayKey]time.Time)
		p.retention.below = make(map[spaceDay]uint64)
	}
	snapshot := p.j.db.NewSnapshot()
	defer func() { err = errors.Join(err, snapshot.Close()) }()
	seen := make(map[dayKey]time.Time)
	err = p.eachDay(snapshot, 0, func(day dayKey) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if day == kept || s.age(day) < s.keep.Shortest-24*time.Hour {
			return nil
		}
		if until := p.retention.quiet[day]; s.now.Before(until) {
			seen[day] = until
			return nil
		}
		d := dueDay{day: day}
		if err := p.eachSpace(snapshot, day, func(ns NamespaceKey) error {
			f := fate{ns: ns, below: s.below(day, s.keep.Of(ns))}
			if f.below != math.MaxUint64 {
				f.from = p.retention.below[spaceDay{day, ns}]
			}
			if f.from < f.below {
				d.fates = append(d.fates, f)
			}
			return nil
		}); err != nil {
			return err
		}
		if len(d.fates) == 0 {
			seen[day] = s.now.Add(lookAgain)
		} else {
			due = append(due, d)
		}
		return nil
	})
	p.retention.quiet = seen
	maps.DeleteFunc(p.retention.below, func(at spaceDay, _ uint64) bool { return s.age(at.day) >= 2*walkBelow })
	return due, err
}

// age of a day: since its end, or, when a clock that was wrong has made it, since that was noticed.
func (s *sweep) age(d dayKey) time.Duration {
	if s.ahead(d) {
		return s.now.Sub(s.p.ahead.noticed.Time())
	}
	return s.now.Sub(seqTime(firstSeq(d + 1)))
}

func (s *sweep) ahead(d dayKey) bool {
	first := firstSeq(d)
	return first > seqAt(s.now.Add(maxAhead)) && first <= s.p.ahead.high
}

// below is the first sequence of a day that stays: 0 when all of it does, math.MaxUint64 when nothing does.
func (s *sweep) below(d dayKey, keep time.Duration) uint64 {
	if keep <= 0 {
		return 0
	}
	if s.age(d) >= max(keep, dedupWindow) {
		return math.MaxUint64
	}
	if limit := seqAt(s.now.Add(-keep)); keep < walkBelow && limit > firstSeq(d) && !s.ahead(d) {
		return min(limit, firstSeq(d+1))
	}
	return 0
}

// erase moves what is open of the given namespaces in a day to kept, then erases their records.
func (s *sweep) erase(ctx context.Context, d dayKey, fates []fate) error {
	p := s.p
	if err := p.do(ctx, func(c *commit) error {
		c.sweeping = &sweeping{d, fates}
		if swept := p.memory.swept.with(d, s.ahead(d)); swept != p.memory.swept {
			m := p.memory
			m.swept = swept
			c.memory, c.firm = &m, true
		}
		return nil
	}); err != nil {
		return err
	}
	err := s.keepOpen(ctx, d, fates)
	if err == nil {
		err = s.eraseRuns(ctx, d, fates)
	}
	// Also when ctx has ended: a day that is not being erased need not move anything.
	done := p.do(context.WithoutCancel(ctx), func(c *commit) error {
		c.sweeping = &sweeping{}
		return nil
	})
	return errors.Join(err, done)
}

// eraseRuns erases the records of a day: neighbours that go as a whole in one run.
func (s *sweep) eraseRuns(ctx context.Context, d dayKey, fates []fate) error {
	p := s.p
	for i := 0; i < len(fates); {
		if fates[i].below != math.MaxUint64 {
			if err := s.eraseBelow(ctx, d, fates[i]); err != nil {
				return err
			}
			p.retention.below[spaceDay{d, fates[i].ns}] = fates[i].below
			i++
			continue
		}
		end := i + 1
		for end < len(fates) && fates[end].below == math.MaxUint64 {
			end++
		}
		// The run ends where a namespace stays that lies between two that go.
		start := appendDaySpace(nil, p.number, d, fates[i].ns)
		next, err := s.firstOther(d, fates[i:end])
		if err != nil {
			return err
		}
		if next < end-i {
			end = i + next
		}
		if err := s.eraseSpan(ctx, start, prefixEnd(appendDaySpace(nil, p.number, d, fates[end-1].ns))); err != nil {
			return err
		}
		i = end
	}
	return nil
}

// firstOther is how many of the fates follow each other without another namespace in between.
func (s *sweep) firstOther(d dayKey, fates []fate) (n int, err error) {
	lower := appendDaySpace(nil, s.p.number, d, fates[0].ns)
	upper := prefixEnd(appendDaySpace(nil, s.p.number, d, fates[len(fates)-1].ns))
	err = s.p.j.hop(s.p.j.db, lower, upper, func(key []byte) ([]byte, error) {
		_, ns, _, _, ok := splitRecord(key)
		if !ok {
			return nil, s.p.j.corrupt(key, errBadKey)
		}
		if n < len(fates) && fates[n].ns == ns {
			n++
			return prefixEnd(key[:bodyOffset+2+8]), nil
		}
		return nil, errStopped
	})
	if errors.Is(err, errStopped) {
		err = nil
	}
	return max(n, 1), err
}

// eraseSpan erases all keys of a span: one by one when they are few, else by a range.
func (s *sweep) eraseSpan(ctx context.Context, start, end []byte) error {
	var keys [][]byte
	err := s.p.j.scan(s.p.j.db, start, end, func(key, _ []byte) error {
		if len(keys) >= eraseByKey {
			return errStopped
		}
		keys = append(keys, bytes.Clone(key))
		return nil
	})
	if err != nil && !errors.Is(err, errStopped) {
		return err
	}
	if err == nil {
		return s.eraseKeys(ctx, keys)
	}
	s.ranges = append(s.ranges, span{start, end})
	return s.do(ctx, func(c *commit) error {
		c.deleteSpan(start, end)
		return nil
	})
}

func (s *sweep) eraseKeys(ctx context.Context, keys [][]byte) error {
	for some := range slices.Chunk(keys, eraseAtOnce) {
		if err := s.do(ctx, func(c *commit) error {
			for _, key := range some {
				c.delete(key)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

const (
	// restFor is how long a sweep rests for the time that a commit of its took, and restMost the longest.
	restFor  = 24
	restMost = 4 * time.Millisecond
)

// do makes a commit of a sweep, and rests, so that publishers hardly meet it: a million rows that go one by one take about
// 15 s. When the disk is full nothing is as urgent.
func (s *sweep) do(ctx context.Context, run func(*commit) error) error {
	begin := time.Now()
	if err := s.p.do(ctx, run); err != nil || s.p.j.space.low() {
		return err
	}
	return sleep(ctx, min(restFor*time.Since(begin), restMost))
}

// eraseBelow erases a namespace's records of a day below a sequence; the ids stay until the day goes.
func (s *sweep) eraseBelow(ctx context.Context, d dayKey, f fate) error {
	for _, kind := range []byte{kindEvent, kindTargets, kindDead, kindAgain, kindReplay, kindMade} {
		prefix := appendKind(nil, s.p.number, d, f.ns, kind)
		prefix = prefix[:len(prefix):len(prefix)]
		if err := s.eraseSpan(ctx, appendU64(prefix, f.from), appendU64(prefix, f.below)); err != nil {
			return err
		}
	}
	for _, kind := range []byte{kindDelivery, kindAttempt} {
		if err := s.eraseKind(ctx, d, f, kind); err != nil {
			return err
		}
	}
	return nil
}

// eraseKind erases records of a kind, one by one.
func (s *sweep) eraseKind(ctx context.Context, d dayKey, f fate, kind byte) error {
	return s.someOf(ctx, d, f, kind, func(_, _ []byte) (bool, error) { return true, nil }, func(keys [][]byte) error { return s.eraseKeys(ctx, keys) })
}

// lookAtOnce is how many records a sweep looks at before it rests.
const lookAtOnce = 16 << 10

// someOf has those records of a kind changed that are wanted, some at a time, between which nothing is held open. Where the lane
// comes before the sequence it goes from lane to lane: what stays costs a seek for each.
func (s *sweep) someOf(ctx context.Context, d dayKey, f fate, kind byte, wanted func(key, value []byte) (bool, error), change func(keys [][]byte) error) error {
	prefix := appendKind(nil, s.p.number, d, f.ns, kind)
	group := recordPrefix
	if kind == kindDelivery || kind == kindAttempt {
		group += 8
	}
	for from, end := prefix, prefixEnd(prefix); from != nil; {
		var keys [][]byte
		var next []byte
		begin, looked := time.Now(), 0
		if err := s.p.j.iterate(s.p.j.db, from, end, func(it *pebble.Iterator) error {
			for ok := it.First(); ok; {
				key := it.Key()
				seq, known := recordSeq(kind, key[recordPrefix:])
				if !known {
					return s.p.j.corrupt(key, errBadKey)
				}
				switch {
				case seq < f.from:
					ok = it.SeekGE(appendU64(bytes.Clone(key[:group]), f.from))
					continue
				case seq >= f.below:
					ok = it.SeekGE(prefixEnd(key[:group]))
					continue
				}
				if looked++; looked > lookAtOnce || len(keys) == eraseByKey {
					next = bytes.Clone(key)
					return nil
				}
				value, err := it.ValueAndErr()
				if err != nil {
					return err
				}
				if want, err := wanted(key, value); err != nil {
					return err
				} else if want {
					keys = append(keys, bytes.Clone(key))
				}
				ok = it.Next()
			}
			return nil
		}); err != nil {
			return err
		}
		if next != nil {
			if err := sleep(ctx, min(restFor*time.Since(begin), restMost)); err != nil {
				return err
			}
		}
		if err := change(keys); err != nil {
			return err
		}
		from = next
	}
	return nil
}

const (
	// settleFor is how long the engine may take to drop whole tables after a sweep, and settleLook how often it is looked at.
	settleFor  = 10 * time.Second
	settleLook = 100 * time.Millisecond
	// near is how many bytes may lie between two ranges that are compacted as one.
	near = 8 << 20
)

// reclaim has ranges that were erased leave nothing behind: every iterator that comes to a table with a range reads all of
// that table's. Tables that lie in one as a whole are dropped without being read, and are waited for; only what is left at the
// ends is compacted. Rows that were erased one by one cost their neighbours only, and the engine looks after them by itself.
func (j *Journal) reclaim(ctx context.Context, erased []span) error {
	if len(erased) == 0 || ctx.Err() != nil {
		return context.Cause(ctx)
	}
	flushed, err := j.db.AsyncFlush()
	if err != nil {
		return fmt.Errorf("flush what was erased: %w", err)
	}
	select {
	case <-flushed:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	slices.SortFunc(erased, func(a, b span) int { return bytes.Compare(a.start, b.start) })
	for last, begin := uint64(math.MaxUint64), time.Now(); time.Since(begin) < settleFor; {
		size, err := j.sizeOf(erased...)
		if err != nil || size == last {
			break
		}
		last = size
		if err := sleep(ctx, settleLook); err != nil {
			return err
		}
	}
	for i := 0; i < len(erased); {
		all := erased[i]
		for i++; i < len(erased); i++ {
			if between, err := j.sizeOf(span{all.end, erased[i].start}); err != nil || between > near {
				break
			}
			all.end = erased[i].end
		}
		begin := time.Now()
		if err := j.db.Compact(ctx, all.start, all.end, false); err != nil {
			return fmt.Errorf("compact what was erased: %w", err)
		}
		if err := sleep(ctx, min(restFor*time.Since(begin), time.Second)); err != nil {
			return err
		}
	}
	return nil
}

// sizeOf is about how many bytes of tables lie in spans.
func (j *Journal) sizeOf(spans ...span) (size uint64, err error) {
	for _, s := range spans {
		if bytes.Compare(s.start, s.end) >= 0 {
			continue
		}
		n, err := j.db.EstimateDiskUsage(s.start, s.end)
		if err != nil {
			return 0, fmt.Errorf("estimate what was erased: %w", err)
		}
		size += n
	}
	return size, nil
}

// sleep returns the cause when ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
