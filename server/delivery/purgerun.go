package delivery

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"slices"

	"github.com/cockroachdb/pebble/v2"
)

// purgedRun is what has become of the first n of some events.
type purgedRun struct {
	n int
	// others are to be looked at one by one.
	others []uint64
}

// runEvent is one of the events that are purged in one commit.
type runEvent struct {
	seq        uint64
	key, value []byte
	stays      bool
	// quoting are the records of its deliveries that may quote it, made the keys of what transformers have made of it.
	quoting []runRecord
	made    [][]byte
}

type runRecord struct {
	key []byte
	// after is what it is to be; nil where it is to go.
	after []byte
}

// purgeRun purges events that lie in a day alone, in ascending order, as many as a commit may: with one look at the day for
// all of them, and one for each subscription. Those that were sent again are left to others.
func (c *commit) purgeRun(s *sweep, d dayKey, ns NamespaceKey, seqs []uint64) (r purgedRun, err error) {
	p := c.p
	var run []runEvent
	lanes := make(map[SubscriptionKey][]uint64)
	size, targets := 0, 0
	some := seqs[:min(len(seqs), tidyBatch)]
	err = c.along(appendKind(nil, p.number, d, ns, kindEvent), some, func(seq uint64, key, value []byte) error {
		for seqs[r.n] < seq { // gone
			r.n++
		}
		if size >= purgeBytes || targets >= purgeTargets {
			return errStopped
		}
		r.n++
		head, err := decodeHead(value)
		if err != nil || head.apart || head.purged {
			r.others = append(r.others, seq)
			return nil
		}
		for _, sub := range head.within.keys() {
			lanes[sub] = append(lanes[sub], seq)
		}
		size, targets = size+len(value), targets+len(head.within.keys())
		run = append(run, runEvent{seq: seq, key: bytes.Clone(key), value: bytes.Clone(value)})
		return nil
	})
	switch {
	case err == nil:
		r.n = len(some)
	case !errors.Is(err, errStopped):
		return r, err
	}
	if len(run) == 0 {
		return r, nil
	}
	at := func(seq uint64) (*runEvent, bool) {
		i, found := slices.BinarySearchFunc(run, seq, func(e runEvent, seq uint64) int { return cmp.Compare(e.seq, seq) })
		if !found {
			return nil, false
		}
		return &run[i], true
	}
	again := make(map[uint64]bool)
	all := make([]uint64, len(run))
	for i := range run {
		all[i] = run[i].seq
	}
	for _, kind := range []byte{kindReplay, kindMade} {
		if err := c.along(appendKind(nil, p.number, d, ns, kind), all, func(seq uint64, key, _ []byte) error {
			if e, _ := at(seq); kind == kindReplay {
				again[seq] = true
			} else {
				e.made = append(e.made, bytes.Clone(key))
			}
			return nil
		}); err != nil {
			return r, err
		}
	}
	for sub, of := range lanes {
		if err := c.lookAlong(s, d, LaneKey{ns, sub}, of, at); err != nil {
			return r, err
		}
	}
	for i := range run {
		switch e := &run[i]; {
		case again[e.seq]:
			r.others = append(r.others, e.seq)
		case e.stays:
			c.set(appendWaitKey(nil, p.number, d, ns, e.seq), nil)
		default:
			for _, key := range e.made {
				c.delete(key)
			}
			for _, q := range e.quoting {
				if q.after == nil {
					c.delete(q.key)
				} else {
					c.set(q.key, q.after)
				}
			}
			if err := p.passOver(c.purgeRecord(e.key, e.value, true)); err != nil {
				return r, err
			}
		}
	}
	return r, nil
}

// along visits the records of some sequences, which ascend, where these follow a prefix: it comes by what lies between them by seeks.
func (c *commit) along(prefix []byte, seqs []uint64, visit func(seq uint64, key, value []byte) error) error {
	prefix = prefix[:len(prefix):len(prefix)]
	return c.p.j.iterate(c.r, appendU64(prefix, seqs[0]), appendU64(prefix, seqs[len(seqs)-1]+1), func(it *pebble.Iterator) error {
		for ok := it.First(); ok; {
			key := it.Key()
			if len(key) < len(prefix)+8 {
				return c.p.j.corrupt(key, errBadKey)
			}
			seq := binary.BigEndian.Uint64(key[len(prefix):])
			for seqs[0] < seq {
				seqs = seqs[1:]
			}
			if seqs[0] != seq {
				ok = it.SeekGE(appendU64(prefix, seqs[0]))
				continue
			}
			value, err := it.ValueAndErr()
			if err != nil {
				return err
			}
			if err := visit(seq, key, value); err != nil {
				return err
			}
			ok = it.Next()
		}
		return nil
	})
}

// lookAlong looks at the deliveries of a subscription that some events of a run have, at which at finds them: whether they stay,
// and what quotes.
func (c *commit) lookAlong(s *sweep, d dayKey, lane LaneKey, of []uint64, at func(seq uint64) (*runEvent, bool)) error {
	p := c.p
	ended := make(map[uint64]bool, len(of))
	for _, kind := range []byte{kindDelivery, kindAttempt} {
		prefix := appendU64(appendKind(nil, p.number, d, lane.Namespace, kind), uint64(lane.Subscription))
		if err := c.along(prefix, of, func(seq uint64, key, value []byte) error {
			e, _ := at(seq)
			if kind == kindDelivery {
				st, err := decodeStanding(value)
				if err != nil {
					e.stays = true
					return p.passOver(p.j.corrupt(key, err))
				}
				stays := st.state == Scheduled
				if !stays {
					if stays, err = s.stays(c.r, lane, &place{standing: st, day: d, row: Row{Seq: seq}}); err != nil {
						return err
					}
				}
				e.stays, ended[seq] = e.stays || stays, true
			}
			after, quotes, err := p.stripped(kind, key, value)
			if quotes {
				e.quoting = append(e.quoting, runRecord{bytes.Clone(key), after})
			}
			return p.passOver(err)
		}); err != nil {
			return err
		}
	}
	for _, seq := range of {
		if ended[seq] {
			continue
		}
		e, _ := at(seq)
		place, err := p.find(c.r, lane, seq) // it waits, or was skipped
		if err == nil {
			var stays bool
			stays, err = s.stays(c.r, lane, place)
			e.stays = e.stays || stays
		}
		if err != nil {
			e.stays = true
			if err := p.passOver(err); err != nil {
				return err
			}
		}
	}
	return nil
}
