package delivery

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// editBatch bounds the deliveries that CancelLane ends in one commit.
	editBatch = 512
	// retryWindow is how long a delivery whose time is up may still start the attempt a caller asks for.
	retryWindow = 24 * time.Hour
)

// Cancel ends an open delivery as CANCELLED, durably, or one that has failed and blocks its ordering key, which then
// goes on. A delivery that has been cancelled before is returned as it is; one that has ended otherwise is ErrFinal, an
// unknown one ErrNotFound. An attempt in flight is left to end and is added to the history.
func (j *Journal) Cancel(ctx context.Context, lane LaneKey, id ID, reason string) (*Delivery, error) {
	return j.edit(ctx, lane, id, func(c *commit, at *place) error {
		switch {
		case at.state == Cancelled:
			return nil
		case at.waits:
			return c.cancelWaiting(lane, at, reason)
		case at.state.Final():
			if blocks, err := c.p.blocking(c.r, lane, at); err != nil || !blocks {
				return cmp.Or(err, ErrFinal)
			}
		}
		return c.cancel(lane, at, reason)
	})
}

// cancel ends an open delivery that does not wait for its turn, or one that has failed and keeps it.
func (c *commit) cancel(lane LaneKey, at *place, reason string) error {
	if at.order == 0 {
		c.endCancelled(lane, at, reason)
		return nil
	}
	next, err := c.next(lane, at.order)
	if err != nil {
		return err
	}
	c.endCancelled(lane, at, turnReason(reason, false))
	c.endTurn(lane, at.row.Seq, &at.standing, &next, false)
	return nil
}

func (c *commit) endCancelled(lane LaneKey, at *place, reason string) {
	c.firm = true
	if at.open {
		c.dropOpen(lane, at)
		c.open(lane, -1, at.job)
	}
	at.open, at.waits = false, false
	at.state, at.reason, at.due, at.complete, at.manual = Cancelled, validText(reason), 0, InstantOf(c.at), false
	c.putStanding(at.day, lane, at.row.Seq, &at.standing)
	c.bury(at.day, lane, at.row.Seq, Cancelled)
}

// dropOpen takes the row of an open delivery away for a caller. Of what waits for its turn the follower knows nothing.
func (c *commit) dropOpen(lane LaneKey, at *place) {
	if at.waits {
		c.dropBlocked(lane, at.order, at.row.Seq)
		return
	}
	c.supersede(lane, at.row)
	c.dropRow(lane, at.row)
}

// Retry makes a delivery due now, durably, with one attempt more when its attempts are used up and a day more
// when its time is. A delivery of the FIFO is due anyway and stays as it is, and so is one that waits for the turn of its
// ordering key; where another one has that, a delivery that comes back waits for it. ErrPurged says that the payload of its event has been purged, ErrInvalidState that it has
// succeeded, or that ifAttempts is not negative and not the number of attempts that have ended.
func (j *Journal) Retry(ctx context.Context, lane LaneKey, id ID, ifAttempts int) (*Delivery, error) {
	return j.edit(ctx, lane, id, func(c *commit, at *place) error {
		switch {
		case at.state == Succeeded:
			return fmt.Errorf("%w: it has succeeded", ErrInvalidState)
		case ifAttempts >= 0 && ifAttempts != at.attempts:
			return fmt.Errorf("%w: %d attempts have ended", ErrInvalidState, at.attempts)
		case at.waits || at.open && at.row.Kind == FIFO:
			return nil
		}
		return c.retry(lane, at)
	})
}

// retry schedules a delivery for now.
func (c *commit) retry(lane LaneKey, at *place) error {
	at.manual = true
	return c.reopen(lane, at)
}

// reopen schedules a delivery, which may have ended, for now.
func (c *commit) reopen(lane LaneKey, at *place) error {
	if purged, err := c.p.purgedOf(c.r, lane.Namespace, at.eventSeq()); err != nil || purged {
		return cmp.Or(err, ErrPurged)
	}
	var t turn
	seq, others := at.row.Seq, false
	if at.open {
		c.dropOpen(lane, at)
	} else {
		if err := c.holdOrigin(lane, at); err != nil {
			return err
		}
		if at.order != 0 {
			var err error
			if t, err = c.turnOf(lane, at.order); err != nil {
				return err
			}
			others = t.seq != 0 && t.seq != seq
		}
		// A sweep that begins in this very round finds the row and moves it.
		from := at.day
		if from != kept && c.p.sweeping.takes(lane.Namespace, seq) {
			if err := c.keep(lane, seq); err != nil {
				return err
			}
			at.day = kept
		}
		// Nothing fails from here on.
		switch {
		case others:
			c.waitFor(lane, at.order, t, seq)
		case at.order != 0:
			c.setTurn(lane, at.order, turn{seq: seq, older: t.older})
		}
		c.unbury(from, lane, seq)
		c.unbury(at.day, lane, seq)
		c.open(lane, 1, at.job)
	}
	c.firm, c.edited = true, true
	at.open, at.state, at.reason, at.complete = true, Scheduled, "", 0
	at.due = max(InstantOf(c.at), 1)
	if at.row.Kind == Timer && at.due == at.row.Due {
		at.due++ // a row is never overwritten
	}
	at.epoch++
	at.indeterminate = 0                // the caller takes it out of quarantine
	at.suspicion = min(at.suspicion, 1) // and it is still tried apart from others
	at.maxAttempts = max(at.maxAttempts, at.attempts+1)
	if at.expire <= at.due {
		at.expire = InstantOf(c.at.Add(retryWindow))
	}
	if others {
		c.requeue(lane, at)
		return nil
	}
	at.row = Row{Timer, at.due, seq, at.epoch}
	c.putStanding(at.day, lane, seq, &at.standing)
	c.putTimer(lane, at.row, &at.progress)
	return nil
}

// holdOrigin keeps the event of an ended delivery that was made again, which may have outlived it.
func (c *commit) holdOrigin(lane LaneKey, at *place) error {
	if at.origin == 0 {
		return nil
	}
	day, err := c.p.home(c.r, lane.Namespace, at.origin)
	if err != nil {
		return err
	}
	if found, err := c.p.j.has(c.r, appendEventKey(nil, c.p.number, day, lane.Namespace, at.origin)); err != nil || !found {
		return errors.Join(err, errEventGone)
	}
	_, err = c.holdEvent(day, lane.Namespace, at.origin)
	return err
}

// edit finds a delivery on its committer, lets change decide, and returns how it stands afterwards.
func (j *Journal) edit(ctx context.Context, lane LaneKey, id ID, change func(*commit, *place) error) (*Delivery, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	if int(id.Partition) >= len(j.partitions) || lane.Subscription != id.Subscription {
		return nil, ErrNotFound
	}
	p := j.partitions[id.Partition]
	var d *Delivery
	err = p.do(ctx, func(c *commit) error {
		at, err := p.find(c.r, lane, id.Seq)
		if err != nil {
			return err
		}
		if at == nil {
			return ErrNotFound
		}
		// First all that may fail: an edit that is answered with an error has changed nothing.
		head, target, err := p.readJoined(c.r, lane, at)
		if err != nil {
			return err
		}
		if err := change(c, at); err != nil {
			return err
		}
		d = p.show(c.r, lane, at, &head, &target)
		return nil
	})
	if err != nil {
		return nil, err // d may still be in the committer's hands
	}
	return d, nil
}

// CancelLane cancels all open deliveries of a subscription and says how many it has cancelled. When it fails half way,
// what has been cancelled stays so; call it again. Deliveries that cannot be read are passed over, and the error names
// them. Where while is set, each commit asks it, and the rest stays open from the moment it says false: what is accepted
// after that is never cancelled. It must be fast.
func (j *Journal) CancelLane(ctx context.Context, lane LaneKey, reason string, while func() bool) (int, error) {
	leave, err := j.enter()
	if err != nil {
		return 0, err
	}
	defer leave()
	total := 0
	var unread []error
	for _, p := range j.partitions {
		found, err := p.anyOpen(lane)
		w := &cancelling{aside: make(map[uint64]error)}
		for more := found; more && err == nil; {
			var n int
			n, more, err = p.cancelSome(ctx, lane, reason, while, w)
			total += n
		}
		if err != nil {
			return total, fmt.Errorf("cancel deliveries of subscription %016x: %w", uint64(lane.Subscription), err)
		}
		unread = slices.AppendSeq(unread, maps.Values(w.aside))
	}
	if len(unread) > 0 {
		return total, fmt.Errorf("cancel deliveries of subscription %016x: %d cannot be read: %w", uint64(lane.Subscription), len(unread),
			errors.Join(unread[:min(len(unread), maxNamed)]...))
	}
	return total, nil
}

// maxNamed bounds the records that one error names.
const maxNamed = 8

// anyOpen reports whether a lane has open rows, or ordering keys that are blocked, and spares the committer where it has none.
func (p *partition) anyOpen(lane LaneKey) (bool, error) {
	for _, tag := range []byte{tagFIFO, tagTimer, tagBlocked, tagTurn} {
		prefix, found := appendLane(nil, p.number, tag, lane), false
		err := p.j.iterate(p.j.db, prefix, prefixEnd(prefix), func(it *pebble.Iterator) error {
			found = it.First()
			return nil
		})
		if found || err != nil {
			return found, err
		}
	}
	return false, nil
}

// cancelling is how far the open deliveries of a lane have been cancelled. They are walked until a walk finds none, each
// time on from where the last commit ended: what it has erased would be walked again.
type cancelling struct {
	tag  int
	from []byte
	n    int // of this walk
	// aside are deliveries that cannot be read.
	aside map[uint64]error
}

// cancelSome cancels up to editBatch deliveries in one commit, and reports whether there may be more. When it returns an
// error, w may still be in the committer's hands.
func (p *partition) cancelSome(ctx context.Context, lane LaneKey, reason string, while func() bool, w *cancelling) (n int, more bool, err error) {
	var done struct {
		n    int
		more bool
	}
	if err := p.do(ctx, func(c *commit) (err error) {
		// Here, and not before: what waits for this very commit may have been accepted since the caller looked.
		if while != nil && !while() {
			return nil
		}
		done.n, done.more, err = c.cancelOpen(lane, reason, w)
		return err
	}); err != nil {
		return 0, false, err
	}
	return done.n, done.more, nil
}

func (c *commit) cancelOpen(lane LaneKey, reason string, w *cancelling) (n int, more bool, err error) {
	var seqs []uint64
	// What waits for its turn first, so that nothing has one that goes in any case.
	tags := [...]byte{tagBlocked, tagFIFO, tagTimer}
	for ; w.tag < len(tags) && len(seqs) < editBatch; w.tag, w.from = w.tag+1, nil {
		prefix := appendLane(nil, c.p.number, tags[w.tag], lane)
		if w.from == nil {
			w.from = prefix
		}
		err := c.p.j.scan(c.r, w.from, prefixEnd(prefix), func(key, _ []byte) error {
			seq, ok := openSeq(key)
			if !ok {
				return c.p.j.corrupt(key, errBadKey)
			}
			if _, unread := w.aside[seq]; unread {
				return nil
			}
			if seqs = append(seqs, seq); len(seqs) < editBatch {
				return nil
			}
			w.from = append(bytes.Clone(key), 0)
			return errStopped
		})
		if errors.Is(err, errStopped) {
			break
		}
		if err != nil {
			return 0, false, err
		}
	}
	for _, seq := range seqs {
		at, err := c.p.find(c.r, lane, seq)
		switch {
		case err != nil:
		case at == nil || !at.open:
			err = fmt.Errorf("delivery %s waits and has ended", ID{seq, c.p.number, lane.Subscription})
		case at.waits:
			c.endCancelled(lane, at, reason)
		default:
			err = c.cancel(lane, at, reason)
		}
		if err != nil {
			w.aside[seq] = err
			continue
		}
		n++
	}
	if w.n += n; w.tag < len(tags) {
		return n, true, nil
	}
	if more, err = c.endBlocked(lane); w.n > 0 {
		w.tag, w.from, w.n, more = 0, nil, 0, true
	}
	return n, more, err
}

// openSeq is the sequence of a q, t or o key.
func openSeq(key []byte) (uint64, bool) {
	if _, _, seq, ok := splitBlocked(key); ok {
		return seq, true
	}
	_, row, ok := splitRow(key)
	return row.Seq, ok
}

// endBlocked ends the turns of deliveries that have failed.
func (c *commit) endBlocked(lane LaneKey) (more bool, err error) {
	keys, err := c.p.blockedKeys(c.r, lane, 0)
	for _, key := range keys {
		if t, err := c.turnOf(lane, key); err == nil && t.blocks {
			c.firm = true
			c.setTurn(lane, key, turn{})
		}
	}
	return len(keys) == editBatch, err
}

// DropNamespace erases everything of a namespace, open deliveries included, durably. What is in memory of them
// finds nothing to settle.
func (j *Journal) DropNamespace(ctx context.Context, ns NamespaceKey) error {
	leave, err := j.enter()
	if err != nil {
		return err
	}
	defer leave()
	for _, p := range j.partitions {
		if err := p.do(ctx, func(c *commit) error { return c.dropNamespace(ns) }); err != nil {
			return fmt.Errorf("drop namespace %016x: %w", uint64(ns), err)
		}
	}
	j.counts.drop(ns)
	return j.watches.dropped(ctx, ns)
}

func (c *commit) dropNamespace(ns NamespaceKey) error {
	p := c.p
	for _, tag := range []byte{tagFIFO, tagTimer, tagTurn, tagBlocked, tagFailing, tagJob, tagErasure, tagCursor, tagNews, tagWatched} {
		c.deletePrefix(appendSpace(nil, p.number, tag, ns))
	}
	if err := p.eachDay(p.j.db, 0, func(day dayKey) error {
		c.deletePrefix(appendDaySpace(nil, p.number, day, ns))
		return nil
	}); err != nil {
		return err
	}
	c.firm, c.edited = true, true
	return nil
}

func (c *commit) deletePrefix(prefix []byte) { c.deleteSpan(prefix, prefixEnd(prefix)) }

// deleteSpan erases [start, end).
func (c *commit) deleteSpan(start, end []byte) {
	if err := c.batch.DeleteRange(start, end, nil); err != nil {
		c.p.j.die("erase: " + err.Error())
	}
}
