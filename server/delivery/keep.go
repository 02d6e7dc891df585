package delivery

import (
	"bytes"
	"context"
	"errors"

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
	for _, f := range fates {
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
				if some = append(some, at); len(some) < keepBatch {
					return nil
				}
				return flush()
			})
			if err != nil {
				return err
			}
		}
	}
	return flush()
}

type rowAt struct {
	lane LaneKey
	seq  uint64
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
		if err := c.p.passOver(c.keep(rows[n].lane, rows[n].seq)); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// passOver logs an error of a record that cannot be read, so that the rest is not held up by it; others it returns.
func (p *partition) passOver(err error) error {
	var corrupt *CorruptError
	if !errors.As(err, &corrupt) && !pebble.IsCorruptionError(err) {
		return err
	}
	p.j.log.Error("retention passes over a record", "partition", p.number, "err", err)
	return nil
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
		if found, err := c.keepEvent(d, lane.Namespace, seq); err != nil || !found {
			return err
		}
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
	e, err := decodeEvent(record)
	if err != nil {
		return true, nil // it is not found by its id then
	}
	id := identityOf(e.Source, e.ID, e.OrderingKey)
	return true, c.copy(appendIdentityKey(nil, p.number, d, ns, id), appendKeptIdentity(nil, p.number, ns, id, seq))
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

// tidy erases kept events that have nothing open any more and are past their retention.
func (s *sweep) tidy(ctx context.Context) error {
	p := s.p
	return p.eachSpace(p.j.db, kept, func(ns NamespaceKey) error {
		keep := s.keep.Of(ns)
		if keep <= 0 {
			return nil
		}
		var some []uint64
		flush := func() error {
			if len(some) == 0 {
				return nil
			}
			seqs := some
			some = nil
			return s.do(ctx, func(c *commit) error {
				for _, seq := range seqs {
					if err := p.passOver(c.forget(ns, seq)); err != nil {
						return err
					}
				}
				return nil
			})
		}
		prefix := appendKind(nil, p.number, kept, ns, kindEvent)
		if err := p.j.scan(p.j.db, prefix, prefixEnd(prefix), func(key, _ []byte) error {
			seq, ok := recordSeq(kindEvent, key[recordPrefix:])
			if !ok {
				return p.j.corrupt(key, errBadKey)
			}
			if s.age(dayOf(seq)) < keep {
				return nil
			}
			if some = append(some, seq); len(some) < tidyBatch {
				return nil
			}
			return flush()
		}); err != nil {
			return err
		}
		return flush()
	})
}

// forget erases a kept event, unless one of its deliveries is open, or blocks its ordering key.
func (c *commit) forget(ns NamespaceKey, seq uint64) error {
	p := c.p
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
	var subs []SubscriptionKey
	if err := p.targets(c.r, kept, ns, seq, &head, func(list *targetList) {
		for i := range list.n {
			subs = append(subs, list.uid(i).SubscriptionKey())
		}
	}); err != nil {
		return err
	}
	for _, sub := range subs {
		lane := LaneKey{ns, sub}
		at, err := p.find(c.r, lane, seq)
		if err != nil || at != nil && at.open {
			return err
		}
		if at == nil {
			continue
		}
		if blocks, err := p.blocking(c.r, lane, at); err != nil || blocks {
			return err
		}
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

// forgetIn erases the records of an event in a day, but for its identity.
func (c *commit) forgetIn(day dayKey, ns NamespaceKey, seq uint64, subs []SubscriptionKey) error {
	p := c.p
	for _, sub := range subs {
		lane := LaneKey{ns, sub}
		c.delete(appendDeliveryKey(nil, p.number, day, lane, seq))
		c.delete(appendDeadKey(nil, p.number, day, lane, seq))
		if err := c.deleteKeys(appendAttempts(nil, p.number, day, lane, seq)); err != nil {
			return err
		}
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
