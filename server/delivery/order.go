package delivery

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// OrderKey stands for the ordering key of an event in keys and jobs; 0 is none. Of two keys that share one, the
// deliveries wait for each other, and nothing else.
type OrderKey uint64

// orderKeyOf is that of an event's ordering key.
func orderKeyOf(text string) OrderKey {
	if text == "" {
		return 0
	}
	var buffer [128]byte
	sum := sha256.Sum256(append(buffer[:0], text...))
	return OrderKey(max(binary.BigEndian.Uint64(sum[:]), 1))
}

// An ordering key of a lane is busy while one of its deliveries has its turn: it is in q or t, as others are, and a k
// record names it. Those that come meanwhile wait in o, where nobody looks at them. Who ends the delivery gives the turn
// to the first of them in the same commit, or does away with the k record. So of each key at most one delivery is in
// memory, however many wait, and a key that waits long costs nothing meanwhile. A delivery that fails for good with
// Step.Block keeps its turn until a caller retries or cancels it, or Unblock lets go of it; it is retained as long.

// turn is a k record: which delivery has it.
type turn struct {
	seq uint64
	// blocks: it has ended without success.
	blocks bool
	// older: one with a lower sequence waits, or has waited. Else nobody looks for one there, where those lay that have
	// had their turns.
	older bool
}

const (
	turnBlocks = 1 << iota
	turnOlder
)

func encodeTurn(b []byte, t turn) []byte {
	w := newRecord(b)
	flags := byte(0)
	if t.blocks {
		flags |= turnBlocks
	}
	if t.older {
		flags |= turnOlder
	}
	w.byte(flags)
	w.uint(t.seq)
	return w
}

func decodeTurn(value []byte) (t turn, err error) {
	d := readRecord(value)
	flags := d.byte()
	t.blocks, t.older = flags&turnBlocks != 0, flags&turnOlder != 0
	t.seq = d.uint()
	return t, d.err
}

// blocked is an o record: what a delivery's row will say when its turn comes.
type blocked struct {
	progress
	// recorded: it has a record of where it stands, because a caller has brought it back. Else it is PENDING.
	recorded bool
	// due is when its event is to be delivered, if that was still to come; 0 is at once.
	due Instant
	// age is for how long attempts may start once it has its turn, in microseconds.
	age uint64
}

func encodeBlocked(b []byte, w *blocked) []byte {
	e := encoder(encodeProgress(b, &w.progress))
	recorded := byte(0)
	if w.recorded {
		recorded = 1
	}
	e.byte(recorded)
	e.instant(w.due)
	e.uint(w.age)
	return e
}

func decodeBlocked(value []byte) (w blocked, err error) {
	d := readRecord(value)
	d.progress(&w.progress)
	w.recorded, w.due, w.age = d.byte() == 1, d.instant(), d.uint()
	return w, d.err
}

// laneOrder is an ordering key of a lane.
type laneOrder struct {
	lane LaneKey
	key  OrderKey
}

// turns is what a commit has to do with ordering keys.
type turns struct {
	// changed are the turns that the commit gives and, where seq is 0, does away with: its batch may not be read.
	changed map[laneOrder]turn
	// waiting walks o as it was before the commit.
	waiting *pebble.Iterator
	// without are the targets of stored events that wait for their turn.
	without map[*Target]struct{}
}

// has reports whether a target of a stored event waits for its turn.
func (t *turns) has(target *Target) bool {
	if t == nil || t.without == nil {
		return false
	}
	_, waits := t.without[target]
	return waits
}

func (c *commit) endTurns() {
	if c.turns != nil && c.turns.waiting != nil {
		_ = c.turns.waiting.Close() // reading has reported what matters
		c.turns.waiting = nil
	}
}

// turnOf reads who has the turn of an ordering key; the zero turn is nobody's.
func (c *commit) turnOf(lane LaneKey, key OrderKey) (turn, error) {
	if c.turns != nil {
		if t, ok := c.turns.changed[laneOrder{lane, key}]; ok {
			return t, nil
		}
	}
	return c.p.turnOf(c.r, lane, key)
}

func (p *partition) turnOf(r pebble.Reader, lane LaneKey, key OrderKey) (t turn, err error) {
	_, err = p.j.get(r, appendTurn(nil, p.number, lane, key), func(value []byte) (err error) {
		t, err = decodeTurn(value)
		return err
	})
	return t, err
}

// givesTurns is c.turns, made when needed.
func (c *commit) givesTurns() *turns {
	if c.turns == nil {
		c.turns = &turns{changed: make(map[laneOrder]turn)}
	}
	return c.turns
}

// setTurn gives the turn of an ordering key to a delivery; the zero turn ends it.
func (c *commit) setTurn(lane LaneKey, key OrderKey, t turn) {
	c.givesTurns().changed[laneOrder{lane, key}] = t
	p := c.p
	p.key = appendTurn(p.key[:0], p.number, lane, key)
	if t.seq == 0 {
		c.delete(p.key)
		return
	}
	p.value = encodeTurn(p.value[:0], t)
	c.set(p.key, p.value)
}

// queueUp gives an accepted delivery its turn, which it reports, or has it wait for it.
func (c *commit) queueUp(target *Target, lane LaneKey, row Row, pr *progress, age time.Duration) bool {
	t, err := c.turnOf(lane, pr.order)
	if err == nil && t.seq == 0 {
		c.setTurn(lane, pr.order, turn{seq: row.Seq})
		return true
	}
	if err != nil { // it is not known that nobody has it
		c.p.j.log.Error("ordering key waits, who has its turn cannot be read", "partition", c.p.number, "err", err)
	}
	c.waitFor(lane, pr.order, t, row.Seq)
	c.putBlocked(lane, row.Seq, &blocked{progress: *pr, due: row.Due, age: uint64(max(age, 0) / time.Microsecond)})
	given := c.givesTurns()
	if given.without == nil {
		given.without = make(map[*Target]struct{})
	}
	given.without[target] = struct{}{}
	return false
}

// waitFor notes that a delivery comes to wait for another's turn, if it is older.
func (c *commit) waitFor(lane LaneKey, key OrderKey, t turn, seq uint64) {
	if seq < t.seq && !t.older {
		t.older = true
		c.setTurn(lane, key, t)
	}
}

func (c *commit) putBlocked(lane LaneKey, seq uint64, w *blocked) {
	p := c.p
	p.key = appendBlockedRow(p.key[:0], p.number, lane, w.order, seq)
	p.value = encodeBlocked(p.value[:0], w)
	c.set(p.key, p.value)
}

func (c *commit) dropBlocked(lane LaneKey, key OrderKey, seq uint64) {
	c.p.key = appendBlockedRow(c.p.key[:0], c.p.number, lane, key, seq)
	c.delete(c.p.key)
}

// successor is who has the turn next, with all that there is to read before anything is changed. Without a sequence
// nobody waits.
type successor struct {
	seq uint64
	blocked
	// after is the turn that it comes after.
	after turn
	// day and standing are those of one that is recorded.
	day      dayKey
	standing standing
}

// next finds who has the turn of an ordering key after the one who has it now.
func (c *commit) next(lane LaneKey, key OrderKey) (successor, error) {
	t, err := c.turnOf(lane, key)
	if err != nil {
		return successor{}, err
	}
	from := uint64(0)
	if t.seq != 0 && !t.older {
		from = t.seq + 1
	}
	next, err := c.successor(lane, key, from)
	next.after = t
	return next, err
}

// successor finds who waits for the turn of an ordering key, from a sequence on. What cannot be read is passed over,
// and told of: it goes on waiting until it is set aside.
func (c *commit) successor(lane LaneKey, key OrderKey, from uint64) (next successor, err error) {
	p := c.p
	prefix := appendBlocked(nil, p.number, lane, key)
	err = c.waiting(prefix, func(it *pebble.Iterator) error {
		for ok := it.SeekGE(appendU64(prefix[:len(prefix):len(prefix)], from)); ok; ok = it.Next() {
			_, order, seq, valid := splitBlocked(it.Key())
			if !bytes.HasPrefix(it.Key(), prefix) {
				return nil
			}
			value, err := it.ValueAndErr()
			if err != nil {
				return err
			}
			next = successor{seq: seq}
			if next.blocked, err = decodeBlocked(value); err == nil && valid && order == next.order {
				err = c.readRecorded(lane, &next)
			} else if err == nil {
				err = errBadKey
			}
			if err == nil {
				return nil
			}
			p.j.log.Error("delivery cannot have its turn, its row cannot be read", "partition", p.number, "err", p.j.corrupt(it.Key(), err))
			next = successor{}
		}
		return nil
	})
	return next, err
}

func (c *commit) readRecorded(lane LaneKey, next *successor) error {
	if !next.recorded {
		return nil
	}
	at, err := c.p.find(c.r, lane, next.seq)
	if err == nil && (at == nil || !at.waits) {
		err = errMissing
	}
	if err == nil {
		next.day, next.standing = at.day, at.standing
	}
	return err
}

// waiting has use walk the rows that wait. Without edits one iterator does for the commit, which costs more than all else:
// no two settles of a round are of one key. An edit has to see what the commit has done so far.
func (c *commit) waiting(prefix []byte, use func(*pebble.Iterator) error) error {
	p := c.p
	if c.batch.Indexed() {
		return p.j.iterate(c.r, prefix, prefixEnd(prefix), use)
	}
	given := c.givesTurns()
	if given.waiting == nil {
		all := appendTag(nil, p.number, tagBlocked)
		it, err := p.j.db.NewIter(&pebble.IterOptions{LowerBound: all, UpperBound: prefixEnd(all)})
		if err != nil {
			return fmt.Errorf("journal %s: %w", p.j.dir, err)
		}
		given.waiting = it
	}
	err := use(given.waiting)
	if failed := given.waiting.Error(); failed != nil {
		c.endTurns() // a damaged block ends an iterator
		err = errors.Join(err, p.j.unread("from "+keyText(prefix), failed))
	}
	return err
}

// passOn gives the turn of an ordering key to the next, or to nobody. gap is how many have ended without success right
// before it.
func (c *commit) passOn(lane LaneKey, key OrderKey, next *successor, gap int) {
	if next.seq == 0 {
		c.setTurn(lane, key, turn{})
		return
	}
	now := InstantOf(c.at)
	c.dropBlocked(lane, key, next.seq)
	c.setTurn(lane, key, turn{seq: next.seq})
	pr := next.progress
	pr.gap += gap
	pr.expire = max(pr.expire, max(now, next.due)+Instant(min(next.age, 1<<60)))
	row := Row{Kind: FIFO, Seq: next.seq, Epoch: pr.epoch}
	st := standing{state: Pending}
	switch {
	case next.recorded:
		row.Kind, row.Due = Timer, max(now, 1)
		st = next.standing
	case next.due > now, next.origin != 0: // what is sent again has its row at the time that its record says
		row.Kind, row.Due = Timer, next.due
	}
	if st.progress, st.due = pr, row.Due; next.recorded {
		c.putStanding(next.day, lane, next.seq, &st)
	} else {
		c.changed(lane, next.seq, &st)
	}
	c.putTimer(lane, row, &pr)
}

// endTurn is what becomes of an ordering key whose turn a delivery had that has ended.
func (c *commit) endTurn(lane LaneKey, seq uint64, ended *standing, next *successor, blocks bool) {
	switch {
	case ended.state == Succeeded:
		c.passOn(lane, ended.order, next, 0)
	case ended.state == Skipped: // dropped, which leaves no gap
		c.firm = c.firm || next.seq != 0
		c.passOn(lane, ended.order, next, ended.gap)
	case blocks:
		c.setTurn(lane, ended.order, turn{seq: seq, blocks: true, older: next.after.older})
	default:
		// Durable before the next one begins: a crash that forgot it would have this one tried again, and succeed after it.
		c.firm = c.firm || next.seq != 0
		c.passOn(lane, ended.order, next, ended.gap+1)
	}
}

// Why an ordering key goes on, or does not, behind the reason why a delivery has ended without success.
const (
	reasonGoesOn = "; its ordering key goes on without it"
	reasonBlocks = "; its ordering key waits until it is retried or cancelled"
)

func turnReason(reason string, blocks bool) string {
	if blocks {
		return reason + reasonBlocks
	}
	return reason + reasonGoesOn
}

// blocking reports whether a delivery that has ended keeps its ordering key waiting.
func (p *partition) blocking(r pebble.Reader, lane LaneKey, at *place) (bool, error) {
	if at.open || at.order == 0 || at.state == Succeeded || at.state == Cancelled {
		return false, nil
	}
	t, err := p.turnOf(r, lane, at.order)
	return t.blocks && t.seq == at.row.Seq, err
}

// cancelWaiting ends a delivery that waits for its turn; the one behind it will tell of the gap.
func (c *commit) cancelWaiting(lane LaneKey, at *place, reason string) error {
	next, err := c.successor(lane, at.order, at.row.Seq+1)
	if err != nil {
		return err
	}
	if next.seq != 0 {
		next.gap += at.gap + 1
		c.putBlocked(lane, next.seq, &next.blocked)
		if next.recorded {
			next.standing.gap = next.gap
			c.putStanding(next.day, lane, next.seq, &next.standing)
		} else {
			c.changed(lane, next.seq, &standing{progress: next.progress, state: Pending})
		}
	}
	c.endCancelled(lane, at, reason)
	return nil
}

// requeue brings a delivery back that is not its key's turn: it waits, and is the first to have it if it is the oldest.
func (c *commit) requeue(lane LaneKey, at *place) {
	at.waits, at.due = true, 0
	at.row = Row{Seq: at.row.Seq, Epoch: at.epoch}
	c.putStanding(at.day, lane, at.row.Seq, &at.standing)
	c.putBlocked(lane, at.row.Seq, &blocked{progress: at.progress, recorded: true, age: uint64(retryWindow / time.Microsecond)})
}

// readBlocked fills at in from a row that waits for its turn, if it is there.
func (p *partition) readBlocked(r pebble.Reader, lane LaneKey, key OrderKey, at *place) (bool, error) {
	seq := at.row.Seq
	return p.j.get(r, appendBlockedRow(nil, p.number, lane, key, seq), func(value []byte) error {
		w, err := decodeBlocked(value)
		at.progress, at.state, at.open, at.waits = w.progress, Pending, true, true
		at.row = Row{Seq: seq, Epoch: w.epoch}
		return err
	})
}

// waitText says what a delivery waits for that has not got its turn.
func (p *partition) waitText(r pebble.Reader, lane LaneKey, key OrderKey) string {
	t, err := p.turnOf(r, lane, key)
	switch {
	case err != nil || t.seq == 0:
		return "waits for its ordering key"
	case t.blocks:
		return fmt.Sprintf("waits for its ordering key: delivery %s has failed, and is to be retried or cancelled first", ID{t.seq, p.number, lane.Subscription})
	}
	return fmt.Sprintf("waits for its ordering key: it is the turn of delivery %s", ID{t.seq, p.number, lane.Subscription})
}
