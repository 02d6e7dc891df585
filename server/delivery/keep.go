package delivery

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// keepOpen moves the open deliveries of a day to kept, with their events, and those that block an ordering key.
func (s *sweep) keepOpen(ctx context.Context, d dayKey, fates []fate) (err error) {
	p := s.p
	snapshot := p.j.db.NewSnapshot()
	defer func() { err = errors.Join(err, snapshot.Close()) }()
	var some []rowAt
	flush := func() error {
		batch := some
		some = nil
		for len(batch) > 0 {
			left := make(chan int, 1)
			if err := s.do(ctx, func(c *commit) error {
				n, err := c.keepSome(batch)
				left <- n
				return err
			}); err != nil {
				return err
			}
			batch = batch[<-left:]
		}
		return nil
	}
	add := func(at rowAt) error {
		if some = append(some, at); len(some) < keepBatch {
			return nil
		}
		return flush()
	}
	for _, f := range fates {
		if err := s.keepDead(snapshot, d, f, add); err != nil {
			return err
		}
		if err := s.keepReplayed(snapshot, d, f, add); err != nil {
			return err
		}
		for _, tag := range []byte{tagFIFO, tagTimer, tagBlocked, tagTurn} {
			prefix := appendSpace(nil, p.number, tag, f.ns)
			err := p.j.scan(snapshot, prefix, prefixEnd(prefix), func(key, value []byte) error {
				at, ok := keepAt(key, value)
				if !ok {
					return p.j.corrupt(key, errBadKey)
				}
				if dayOf(at.seq) != d || at.seq < f.from || at.seq >= f.below {
					return nil
				}
				return add(at)
			})
			if err != nil {
				return err
			}
		}
	}
	return flush()
}

// rowAt is a delivery; with a lane that has no subscription it is an event alone.
type rowAt struct {
	lane LaneKey
	seq  uint64
}

// keepDead adds deliveries that ended without success and have a retention of their own that is not over.
func (s *sweep) keepDead(r pebble.Reader, d dayKey, f fate, add func(rowAt) error) error {
	p, since := s.p, s.deadSince(f.ns)
	if since == 0 {
		return nil
	}
	prefix := appendKind(nil, p.number, d, f.ns, kindDead)
	return p.j.scan(r, prefix, prefixEnd(prefix), func(key, value []byte) error {
		seq, ok := recordSeq(kindDead, key[recordPrefix:])
		if !ok || len(key) != recordPrefix+16 {
			return p.j.corrupt(key, errBadKey)
		}
		z, err := decodeDead(value)
		if err != nil {
			return p.passOver(p.j.corrupt(key, err))
		}
		if seq < f.from || seq >= f.below || z.at < since {
			return nil
		}
		return add(rowAt{LaneKey{f.ns, SubscriptionKey(binary.BigEndian.Uint64(key[recordPrefix+8:]))}, seq})
	})
}

// keepReplayed adds events that were sent again as deliveries which are open, or dead and not to go yet.
func (s *sweep) keepReplayed(r pebble.Reader, d dayKey, f fate, add func(rowAt) error) error {
	p := s.p
	prefix := appendKind(nil, p.number, d, f.ns, kindReplay)
	return p.j.scan(r, prefix, prefixEnd(prefix), func(key, _ []byte) error {
		rest := key[recordPrefix:]
		if len(rest) != 24 {
			return p.j.corrupt(key, errBadKey)
		}
		seq, own := binary.BigEndian.Uint64(rest), binary.BigEndian.Uint64(rest[8:])
		if seq < f.from || seq >= f.below {
			return nil
		}
		lane := LaneKey{f.ns, SubscriptionKey(binary.BigEndian.Uint64(rest[16:]))}
		at, err := p.find(r, lane, own)
		if err != nil {
			return p.passOver(err)
		}
		if stays, err := s.stays(r, lane, at); err != nil || !stays {
			return p.passOver(err)
		}
		return add(rowAt{LaneKey{Namespace: f.ns}, seq})
	})
}

// deadSince is when deliveries of a namespace ended that stay although they are dead; 0 when none does. They keep no part
// longer than others.
func (s *sweep) deadSince(ns NamespaceKey) Instant {
	if s.keep.Dead == nil || s.part != whole {
		return 0
	}
	if keep := s.keep.Dead(ns); keep > 0 {
		return InstantOf(s.now.Add(-keep))
	}
	return 0
}

// stays reports whether a delivery, nil if there is none, stays however old its event is: it is open, or dead and not to go
// yet, or blocks its ordering key.
func (s *sweep) stays(r pebble.Reader, lane LaneKey, at *place) (bool, error) {
	if at == nil || at.open {
		return at != nil, nil
	}
	if since := s.deadSince(lane.Namespace); since != 0 && at.state != Succeeded && at.complete >= since {
		return true, nil
	}
	return s.p.blocking(r, lane, at)
}

// keepAt is the delivery that a q, t, o or k record keeps; of a k record none but one that has failed and blocks its key,
// and so has no other.
func keepAt(key, value []byte) (at rowAt, ok bool) {
	if lane, _, ok := splitTurn(key); ok {
		t, err := decodeTurn(value)
		if err != nil || !t.blocks {
			return rowAt{}, true
		}
		return rowAt{lane, t.seq}, true
	}
	at.lane, ok = splitLane(key)
	if ok {
		at.seq, ok = openSeq(key)
	}
	return at, ok
}

// keepSome moves deliveries until a commit is full, and says how many it has moved.
func (c *commit) keepSome(rows []rowAt) (n int, err error) {
	start := c.batch.Len()
	for n < len(rows) && (n == 0 || c.batch.Len()-start < keepBytes) {
		at := rows[n]
		err := error(nil)
		if at.lane.Subscription != 0 {
			err = c.keep(at.lane, at.seq)
		} else {
			err = c.keepAlone(at.lane.Namespace, at.seq)
		}
		if err := c.p.passOver(err); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// passOver logs an error of a record that cannot be read, so that the rest is not held up by it; others it returns.
func (p *partition) passOver(err error) error {
	if !Damaged(err) {
		return err
	}
	p.j.log.Error("retention passes over a record", "partition", p.number, "err", err)
	return nil
}

// keepAlone moves an event without its deliveries to kept, unless it is there.
func (c *commit) keepAlone(ns NamespaceKey, seq uint64) error {
	moved, err := c.p.j.has(c.r, appendEventKey(nil, c.p.number, kept, ns, seq))
	if err == nil && !moved {
		_, err = c.keepEvent(dayOf(seq), ns, seq)
	}
	return err
}

// keep copies a delivery's records, and those of its event, from their day to kept. Those of the day are left to be
// erased; from now on kept rules.
func (c *commit) keep(lane LaneKey, seq uint64) error {
	p, d := c.p, dayOf(seq)
	moved, err := p.j.has(c.r, appendEventKey(nil, p.number, kept, lane.Namespace, seq))
	if err != nil {
		return err
	}
	if !moved {
		found, err := c.keepEvent(d, lane.Namespace, seq)
		if err == nil && !found { // it is no event's own, but was made again
			from, to := appendAgainKey(nil, p.number, d, lane, seq), appendAgainKey(nil, p.number, kept, lane, seq)
			found, err = c.copyOnce(from, to)
		}
		if err != nil || !found {
			return err
		}
	}
	if _, err := c.copyOnce(appendDeadKey(nil, p.number, d, lane, seq), appendDeadKey(nil, p.number, kept, lane, seq)); err != nil {
		return err
	}
	// What a sweep that was cut short has moved has gone on since.
	record := appendDeliveryKey(nil, p.number, kept, lane, seq)
	if moved, err := p.j.has(c.r, record); err != nil {
		return err
	} else if !moved {
		if err := c.copy(appendDeliveryKey(nil, p.number, d, lane, seq), record); err != nil {
			return err
		}
		if err := c.copy(appendDeadKey(nil, p.number, d, lane, seq), appendDeadKey(nil, p.number, kept, lane, seq)); err != nil {
			return err
		}
	}
	prefix := appendAttempts(nil, p.number, d, lane, seq)
	type pair struct{ key, value []byte }
	var attempts []pair // an iterator does not see what is added to its batch, but is not to be disturbed either
	if err := p.j.scan(c.r, prefix, prefixEnd(prefix), func(key, value []byte) error {
		attempts = append(attempts, pair{append(appendAttempts(nil, p.number, kept, lane, seq), key[len(prefix):]...), bytes.Clone(value)})
		return nil
	}); err != nil {
		return err
	}
	for _, a := range attempts {
		c.set(a.key, a.value)
	}
	return nil
}

// keepEvent copies an event, if it is there, from its day to kept; one that is damaged as it is.
func (c *commit) keepEvent(d dayKey, ns NamespaceKey, seq uint64) (bool, error) {
	p := c.p
	var record []byte
	found, err := p.j.get(c.r, appendEventKey(nil, p.number, d, ns, seq), func(value []byte) error {
		record = bytes.Clone(value)
		return nil
	})
	if err != nil || !found {
		return found, err
	}
	c.set(appendEventKey(nil, p.number, kept, ns, seq), record)
	if err := c.copy(appendTargetsKey(nil, p.number, d, ns, seq), appendTargetsKey(nil, p.number, kept, ns, seq)); err != nil {
		return true, err
	}
	if err := c.keepAll(appendReplays(nil, p.number, d, ns, seq), appendReplays(nil, p.number, kept, ns, seq)); err != nil {
		return true, err
	}
	if err := c.keepAll(appendMade(nil, p.number, d, ns, seq), appendMade(nil, p.number, kept, ns, seq)); err != nil {
		return true, err
	}
	e, err := decodeEvent(record)
	if err != nil {
		return true, nil // it is not found by its id then
	}
	id := identityOf(e.Source, e.ID, e.OrderingKey)
	return true, c.copy(appendIdentityKey(nil, p.number, d, ns, id), appendKeptIdentity(nil, p.number, ns, id, seq))
}

// keepAll copies the records of a prefix to another.
func (c *commit) keepAll(prefix, to []byte) error {
	var rest, values [][]byte
	if err := c.p.j.scan(c.r, prefix, prefixEnd(prefix), func(key, value []byte) error {
		rest, values = append(rest, bytes.Clone(key[len(prefix):])), append(values, bytes.Clone(value))
		return nil
	}); err != nil {
		return err
	}
	for i := range rest {
		c.set(append(to[:len(to):len(to)], rest[i]...), values[i])
	}
	return nil
}

// copyOnce copies a record, if it is there and has not been copied yet, and reports whether it is there.
func (c *commit) copyOnce(from, to []byte) (bool, error) {
	if found, err := c.p.j.has(c.r, from); err != nil || !found {
		return false, err
	}
	if moved, err := c.p.j.has(c.r, to); err != nil || moved {
		return true, err
	}
	return true, c.copy(from, to)
}

// copy copies a record, if it is there.
func (c *commit) copy(from, to []byte) error {
	var value []byte
	found, err := c.p.j.get(c.r, from, func(v []byte) error {
		value = bytes.Clone(v)
		return nil
	})
	if found && err == nil {
		c.set(to, value)
	}
	return err
}

// tidyBatch is how many kept events are looked at in one commit.
const tidyBatch = 64

// tidy erases what was kept, has nothing open any more and is past its retention.
func (s *sweep) tidy(ctx context.Context) error {
	p := s.p
	return p.eachSpace(p.j.db, kept, func(ns NamespaceKey) error {
		keep := s.keep.Of(ns)
		if keep <= 0 {
			return nil
		}
		// Events last: theirs are what the others are of.
		if err := s.tidyKind(ctx, ns, keep, kindAgain); err != nil {
			return err
		}
		return s.tidyKind(ctx, ns, keep, kindEvent)
	})
}

// tidyKind looks through the kept records of one kind.
func (s *sweep) tidyKind(ctx context.Context, ns NamespaceKey, keep time.Duration, kind byte) error {
	p := s.p
	var some []rowAt
	flush := func() error {
		if len(some) == 0 {
			return nil
		}
		batch := some
		some = nil
		return s.do(ctx, func(c *commit) error {
			for _, at := range batch {
				forget := c.forget
				if kind == kindAgain {
					forget = c.forgetAgain
				}
				if err := p.passOver(forget(s, at)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	prefix := appendKind(nil, p.number, kept, ns, kind)
	if err := p.j.scan(p.j.db, prefix, prefixEnd(prefix), func(key, _ []byte) error {
		seq, ok := recordSeq(kind, key[recordPrefix:])
		if !ok || kind == kindAgain && len(key) != recordPrefix+16 {
			return p.j.corrupt(key, errBadKey)
		}
		if s.age(dayOf(seq)) < keep {
			return nil
		}
		at := rowAt{LaneKey{Namespace: ns}, seq}
		if kind == kindAgain {
			at.lane.Subscription = SubscriptionKey(binary.BigEndian.Uint64(key[recordPrefix+8:]))
		}
		if some = append(some, at); len(some) < tidyBatch {
			return nil
		}
		return flush()
	}); err != nil {
		return err
	}
	return flush()
}

// forgetAgain erases a kept delivery that was made again, unless it is to stay.
func (c *commit) forgetAgain(s *sweep, row rowAt) error {
	p := c.p
	at, err := p.find(c.r, row.lane, row.seq)
	if err != nil {
		return err
	}
	if stays, err := s.stays(c.r, row.lane, at); err != nil || stays {
		return err
	}
	for _, day := range []dayKey{kept, dayOf(row.seq)} {
		c.delete(appendAgainKey(nil, p.number, day, row.lane, row.seq))
		if err := c.forgetDelivery(day, row.lane, row.seq); err != nil {
			return err
		}
	}
	return nil
}

// forgetDelivery erases the records of a delivery in a day.
func (c *commit) forgetDelivery(day dayKey, lane LaneKey, seq uint64) error {
	c.delete(appendDeliveryKey(nil, c.p.number, day, lane, seq))
	c.delete(appendDeadKey(nil, c.p.number, day, lane, seq))
	return c.deleteKeys(appendAttempts(nil, c.p.number, day, lane, seq))
}

// forget erases a kept event, unless one of its deliveries is to stay.
func (c *commit) forget(s *sweep, row rowAt) error {
	p, ns, seq := c.p, row.lane.Namespace, row.seq
	e, err := p.readEvent(c.r, ns, seq)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	head, err := p.readHead(c.r, kept, ns, seq)
	if err != nil {
		return err
	}
	subs, stays, err := s.anyStays(c.r, kept, ns, seq, &head, true)
	if err != nil || stays {
		return err
	}
	c.delete(appendKeptIdentity(nil, p.number, ns, identityOf(e.Source, e.ID, e.OrderingKey), seq))
	if err := c.forgetIn(kept, ns, seq, subs); err != nil {
		return err
	}
	// A sweep that was cut short has left it in its day, too, as it was then.
	left, err := p.j.has(c.r, appendEventKey(nil, p.number, dayOf(seq), ns, seq))
	if err != nil || !left {
		return err
	}
	return c.forgetIn(dayOf(seq), ns, seq, subs)
}

// anyStays reports whether one of the deliveries of an event, which lies in a day or in kept, is to stay, and to whom it went; not
// own: of those that were made again.
func (s *sweep) anyStays(r pebble.Reader, day dayKey, ns NamespaceKey, seq uint64, head *eventHead, own bool) (subs []SubscriptionKey, stays bool, err error) {
	p := s.p
	if err := p.targets(r, day, ns, seq, head, func(list *targetList) { subs = append(subs, list.keys()...) }); err != nil {
		return nil, false, err
	}
	one := func(lane LaneKey, own uint64) error {
		at, err := p.find(r, lane, own)
		if err != nil {
			return err
		}
		if stays, err = s.stays(r, lane, at); err == nil && stays {
			err = errStopped
		}
		return err
	}
	for i := 0; own && i < len(subs) && err == nil; i++ {
		err = one(LaneKey{ns, subs[i]}, seq)
	}
	if err == nil {
		err = p.eachReplay(r, day, ns, seq, func(lane LaneKey, own, _ uint64) error { return one(lane, own) })
	}
	if stays {
		err = nil
	}
	return subs, stays, err
}

// forgetIn erases the records of an event in a day, but for its identity.
func (c *commit) forgetIn(day dayKey, ns NamespaceKey, seq uint64, subs []SubscriptionKey) error {
	p := c.p
	for _, sub := range subs {
		if err := c.forgetDelivery(day, LaneKey{ns, sub}, seq); err != nil {
			return err
		}
	}
	if err := c.deleteKeys(appendReplays(nil, p.number, day, ns, seq)); err != nil {
		return err
	}
	if err := c.deleteKeys(appendMade(nil, p.number, day, ns, seq)); err != nil {
		return err
	}
	c.delete(appendTargetsKey(nil, p.number, day, ns, seq))
	c.delete(appendEventKey(nil, p.number, day, ns, seq))
	return nil
}

// deleteKeys erases the keys of a prefix one by one.
func (c *commit) deleteKeys(prefix []byte) error {
	var keys [][]byte
	err := c.p.j.iterate(c.r, prefix, prefixEnd(prefix), func(it *pebble.Iterator) error {
		for ok := it.First(); ok; ok = it.Next() {
			keys = append(keys, bytes.Clone(it.Key()))
		}
		return nil
	})
	for _, key := range keys {
		c.delete(key)
	}
	return err
}
