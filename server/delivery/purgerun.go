package delivery

import (
	"bytes"
	"cmp"
	"errors"
	"slices"
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
	kind       byte
	key, value []byte
}

// purgeRun purges events that lie in a day alone, in ascending order, as many as a commit may: with one look at the day for
// all of them, and one for each subscription. Those that were sent again are left to others.
func (c *commit) purgeRun(s *sweep, d dayKey, ns NamespaceKey, seqs []uint64) (r purgedRun, err error) {
	p := c.p
	var run []runEvent
	lanes := make(map[SubscriptionKey][]int)
	bounds := func(kind byte, first, last uint64) (lower, upper []byte) {
		prefix := appendKind(nil, p.number, d, ns, kind)
		return appendU64(bytes.Clone(prefix), first), appendU64(prefix, last+1)
	}
	size, targets := 0, 0
	last := seqs[min(len(seqs), tidyBatch)-1]
	lower, upper := bounds(kindEvent, seqs[0], last)
	err = p.j.scan(c.r, lower, upper, func(key, value []byte) error {
		seq, _ := recordSeq(kindEvent, key[recordPrefix:])
		for r.n < len(seqs) && seqs[r.n] < seq { // gone
			r.n++
		}
		if r.n == len(seqs) || seqs[r.n] != seq {
			return nil
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
			lanes[sub] = append(lanes[sub], len(run))
		}
		size, targets = size+len(value), targets+len(head.within.keys())
		run = append(run, runEvent{seq: seq, key: bytes.Clone(key), value: bytes.Clone(value)})
		return nil
	})
	switch {
	case err == nil:
		r.n = min(len(seqs), tidyBatch)
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
	for _, kind := range []byte{kindReplay, kindMade} {
		lower, upper := bounds(kind, run[0].seq, run[len(run)-1].seq)
		if err := p.j.scan(c.r, lower, upper, func(key, _ []byte) error {
			seq, _ := recordSeq(kind, key[recordPrefix:])
			if e, ok := at(seq); ok && kind == kindReplay {
				again[seq] = true
			} else if ok {
				e.made = append(e.made, bytes.Clone(key))
			}
			return nil
		}); err != nil {
			return r, err
		}
	}
	for sub, of := range lanes {
		if err := c.lookAlong(s, d, LaneKey{ns, sub}, run, of); err != nil {
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
				if err := p.passOver(c.stripRecord(q.kind, q.key, q.value)); err != nil {
					return r, err
				}
			}
			if err := p.passOver(c.purgeRecord(e.key, e.value, true)); err != nil {
				return r, err
			}
		}
	}
	return r, nil
}

// lookAlong looks at the deliveries of a subscription that some events of a run have: whether they stay, and what quotes.
func (c *commit) lookAlong(s *sweep, d dayKey, lane LaneKey, run []runEvent, of []int) error {
	p := c.p
	seen := make(map[uint64]*runEvent, len(of))
	for _, i := range of {
		seen[run[i].seq] = &run[i]
	}
	ended := make(map[uint64]bool, len(of))
	first, last := run[of[0]].seq, run[of[len(of)-1]].seq
	for _, kind := range []byte{kindDelivery, kindAttempt} {
		prefix := appendU64(appendKind(nil, p.number, d, lane.Namespace, kind), uint64(lane.Subscription))
		if err := p.j.scan(c.r, appendU64(bytes.Clone(prefix), first), appendU64(bytes.Clone(prefix), last+1), func(key, value []byte) error {
			seq, _ := recordSeq(kind, key[recordPrefix:])
			e := seen[seq]
			if e == nil {
				return nil
			}
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
			if quotes(kind, value) {
				e.quoting = append(e.quoting, runRecord{kind, bytes.Clone(key), bytes.Clone(value)})
			}
			return nil
		}); err != nil {
			return err
		}
	}
	for seq, e := range seen {
		if ended[seq] {
			continue
		}
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
