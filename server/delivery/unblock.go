package delivery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/cockroachdb/pebble/v2"
)

// Unblock lets go of the ordering keys of a subscription that deliveries block which have failed: the next ones have
// their turn, durably. It says how many there were. When it fails half way, call it again. While is as for CancelLane.
func (j *Journal) Unblock(ctx context.Context, lane LaneKey, while func() bool) (int, error) {
	leave, err := j.enter()
	if err != nil {
		return 0, err
	}
	defer leave()
	total := 0
	for _, p := range j.partitions {
		from := OrderKey(0)
		for more := true; more; {
			type some struct {
				n    int
				keys []OrderKey
			}
			done := make(chan some, 1)
			// The keys are looked for in the commit, so that what was settled before is seen.
			if err := p.do(ctx, func(c *commit) error {
				var did some
				defer func() { done <- did }()
				if while != nil && !while() {
					return nil
				}
				keys, err := p.blockedKeys(c.r, lane, from)
				if err != nil {
					return err
				}
				did.keys = keys
				did.n, err = c.unblock(lane, keys)
				return err
			}); err != nil {
				return total, fmt.Errorf("unblock ordering keys of subscription %016x: %w", uint64(lane.Subscription), err)
			}
			did := <-done
			total += did.n
			if more = len(did.keys) == editBatch; more {
				from = did.keys[editBatch-1]
			}
		}
	}
	return total, nil
}

// blockedKeys finds ordering keys of a lane that are blocked, from one on.
func (p *partition) blockedKeys(r pebble.Reader, lane LaneKey, from OrderKey) (keys []OrderKey, err error) {
	lower, upper := appendTurn(nil, p.number, lane, from), prefixEnd(appendLane(nil, p.number, tagTurn, lane))
	err = p.j.scan(r, lower, upper, func(key, value []byte) error {
		_, order, ok := splitTurn(key)
		t, err := decodeTurn(value)
		if err != nil || !ok || !t.blocks {
			return nil
		}
		if keys = append(keys, order); len(keys) == editBatch {
			return errStopped
		}
		return nil
	})
	if errors.Is(err, errStopped) {
		err = nil
	}
	return keys, err
}

func (c *commit) unblock(lane LaneKey, keys []OrderKey) (n int, err error) {
	for _, key := range keys {
		t, err := c.turnOf(lane, key)
		if err != nil || !t.blocks {
			continue
		}
		next, err := c.next(lane, key)
		if err != nil {
			return n, err
		}
		at, err := c.p.find(c.r, lane, t.seq)
		if err := c.p.passOver(err); err != nil { // one that cannot be read lets go of its key as others do
			return n, err
		}
		c.firm = true
		gap := 1
		if at != nil && !at.open {
			gap += at.gap
			at.reason = strings.TrimSuffix(at.reason, reasonBlocks) + reasonGoesOn
			c.putStanding(at.day, lane, t.seq, &at.standing)
		}
		c.passOn(lane, key, &next, gap)
		n++
	}
	return n, nil
}

// BlockedLanes are the subscriptions of which an ordering key is blocked by a delivery that has failed. It costs as much
// as there are keys that are busy.
func (j *Journal) BlockedLanes() ([]LaneKey, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	found := make(map[LaneKey]struct{})
	var lanes []LaneKey
	for _, p := range j.partitions {
		prefix := appendTag(nil, p.number, tagTurn)
		err := j.hop(j.db, prefix, prefixEnd(prefix), func(key []byte) ([]byte, error) {
			lane, ok := splitLane(key)
			if !ok {
				return nil, j.corrupt(key, errBadKey)
			}
			end := prefixEnd(key[:laneEnd])
			if _, known := found[lane]; known {
				return end, nil
			}
			keys, err := p.blockedKeys(j.db, lane, 0)
			if len(keys) > 0 {
				found[lane] = struct{}{}
				lanes = append(lanes, lane)
			}
			return end, err
		})
		if err != nil {
			return nil, err
		}
	}
	return lanes, nil
}

// freeTurns lets go of the ordering keys that nothing would end any more, because a record was set aside or is lost with
// what was damaged. It costs a look at each key that is busy.
func (j *Journal) freeTurns(snapshot *pebble.Snapshot) {
	for _, p := range j.partitions {
		if err := p.freeTurns(snapshot); err != nil && !errors.Is(err, errStopped) && !errors.Is(err, ErrClosed) {
			j.log.Error("look for ordering keys that wait for nobody", "partition", p.number, "err", err)
		}
	}
}

func (p *partition) freeTurns(snapshot *pebble.Snapshot) error {
	var some []laneOrder
	flush := func() error {
		keys := some
		some = nil
		if len(keys) == 0 {
			return nil
		}
		p.j.log.Warn("ordering keys go on whose turn was nobody's: a record of theirs was set aside, or is lost", "partition", p.number, "keys", len(keys))
		return p.do(context.Background(), func(c *commit) error {
			for _, k := range keys {
				if err := p.passOver(c.freeTurn(k)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	looked := 0
	look := func(k laneOrder, t turn) error {
		if looked++; looked%1024 == 0 && p.j.stopped() {
			return errStopped
		}
		if held, err := p.turnHeld(snapshot, k.lane, t); err != nil || held {
			return p.passOver(err)
		}
		if some = append(some, k); len(some) < editBatch {
			return nil
		}
		return flush()
	}
	prefix := appendTag(nil, p.number, tagTurn)
	if err := p.j.scan(snapshot, prefix, prefixEnd(prefix), func(key, value []byte) error {
		lane, order, ok := splitTurn(key)
		t, err := decodeTurn(value)
		if err != nil || !ok {
			return nil // whose turn it is cannot be known
		}
		return look(laneOrder{lane, order}, t)
	}); err != nil {
		return err
	}
	prefix = appendTag(nil, p.number, tagBlocked)
	if err := p.j.hop(snapshot, prefix, prefixEnd(prefix), func(key []byte) ([]byte, error) {
		lane, order, _, ok := splitBlocked(key)
		if !ok {
			return append(bytes.Clone(key), 0), nil
		}
		next := prefixEnd(key[:laneEnd+8])
		there, err := p.j.has(snapshot, appendTurn(nil, p.number, lane, order))
		if err == nil && !there {
			err = look(laneOrder{lane, order}, turn{})
		}
		return next, err
	}); err != nil {
		return err
	}
	return flush()
}

// turnHeld reports whether the delivery that has a turn is there and will end it.
func (p *partition) turnHeld(r pebble.Reader, lane LaneKey, t turn) (bool, error) {
	if t.seq == 0 {
		return false, nil
	}
	if untried, err := p.j.has(r, appendRow(nil, p.number, lane, Row{Kind: FIFO, Seq: t.seq})); err != nil || untried {
		return untried, err
	}
	at, err := p.find(r, lane, t.seq)
	if err != nil || at == nil {
		return false, err
	}
	if t.blocks {
		return !at.open && at.state != Succeeded && at.state != Cancelled, nil
	}
	return at.open && !at.waits, nil
}

// freeTurn gives the turn of an ordering key that nobody holds to the first that waits for it.
func (c *commit) freeTurn(k laneOrder) error {
	t, err := c.turnOf(k.lane, k.key)
	if err != nil {
		return err
	}
	if held, err := c.p.turnHeld(c.r, k.lane, t); err != nil || held {
		return err
	}
	next, err := c.successor(k.lane, k.key, 0)
	if err != nil || t.seq == 0 && next.seq == 0 {
		return err
	}
	c.firm = true
	c.passOn(k.lane, k.key, &next, 1)
	return nil
}
