package delivery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// sending is a delivery to be made of an event that is on record: a replay, or a dead letter. It has a sequence of its
// own in its event's partition, and is otherwise a delivery as any other; receivers see the event's webhook-id.
type sending struct {
	ns      NamespaceKey
	origin  uint64
	to      Target
	trigger Trigger
	// job is the replay that makes it, 0 for none, and jobID its name.
	job    uint64
	jobID  string
	letter *Letter
}

// send adds a delivery of an event that is on record, and returns its place. ErrNotFound says that the event is there
// no longer, ErrPurged that its payload is not; nothing has been added then.
func (c *commit) send(s *sending) (*place, error) {
	p := c.p
	from, err := p.home(c.r, s.ns, s.origin)
	if err != nil {
		return nil, err
	}
	head, err := p.readHead(c.r, from, s.ns, s.origin)
	if err != nil {
		return nil, err
	}
	if head.purged {
		return nil, ErrPurged
	}
	day, err := c.holdEvent(from, s.ns, s.origin)
	if err != nil {
		return nil, err
	}
	own := p.nextSeq(c.lastSeq, c.at)
	c.lastSeq = own
	lane := LaneKey{s.ns, s.to.UID.SubscriptionKey()}
	due := InstantOf(c.at)
	at := &place{day: dayOf(own), open: true, row: Row{Timer, due, own, 1}}
	at.progress = progress{
		epoch: 1, maxAttempts: max(s.to.MaxAttempts, 1), expire: InstantOf(c.at.Add(maxAge(s.to.MaxAge, 0))),
		origin: s.origin, job: s.job, letter: s.letter,
	}
	at.state, at.due = Pending, due
	if err := c.takeTurn(lane, at, s, from); err != nil {
		return nil, err
	}
	p.key = appendAgainKey(p.key[:0], p.number, at.day, lane, own)
	p.value = encodeAgain(p.value[:0], &again{
		origin: s.origin, trigger: s.trigger, job: s.jobID, due: due, made: InstantOf(c.at), target: s.to, id: head.id, eventType: head.eventType,
	})
	c.set(p.key, p.value)
	p.key = appendReplayKey(p.key[:0], p.number, day, lane, s.origin, own)
	w := newRecord(p.value[:0])
	w.uint(s.job)
	p.value = w
	c.set(p.key, p.value)
	if at.waits {
		c.putBlocked(lane, own, &blocked{progress: at.progress, due: due, age: uint64(maxAge(s.to.MaxAge, 0) / time.Microsecond)})
	} else {
		c.putTimer(lane, at.row, &at.progress)
	}
	c.open(lane, 1, s.job)
	c.changed(lane, own, &at.standing)
	return at, nil
}

// takeTurn gives what is sent again to an ordered subscription the turn of its ordering key, or has it wait for it, in the
// order in which it is made. The event lies in a day.
func (c *commit) takeTurn(lane LaneKey, at *place, s *sending, day dayKey) error {
	if !s.to.Ordered {
		return nil
	}
	if found, err := c.p.j.get(c.r, appendEventKey(nil, c.p.number, day, s.ns, s.origin), func(value []byte) (err error) {
		at.order, err = decodeOrder(value)
		return err
	}); err != nil || !found || at.order == 0 {
		return err
	}
	t, err := c.turnOf(lane, at.order)
	if err != nil {
		return err
	}
	if at.waits = t.seq != 0; at.waits {
		at.row, at.due = Row{Seq: at.row.Seq, Epoch: at.epoch}, 0
		c.waitFor(lane, at.order, t, at.row.Seq)
		return nil
	}
	c.setTurn(lane, at.order, turn{seq: at.row.Seq})
	return nil
}

// holdEvent keeps a sweep that has begun from erasing an event that lies in a day, and returns where it is from now on.
// ErrNotFound says that it is not there.
func (c *commit) holdEvent(day dayKey, ns NamespaceKey, seq uint64) (dayKey, error) {
	if day == kept || !c.p.sweeping.takes(ns, seq) {
		return day, nil
	}
	found, err := c.keepEvent(day, ns, seq)
	if err == nil && !found {
		err = ErrNotFound
	}
	return kept, err
}

// maxReason bounds what a dead letter says of why the delivery ended.
const maxReason = 512

// deadLetter sends the event of a delivery that has just ended without success to the subscription that is to get it
// then, in the same commit. A dead letter has none of its own, so that nothing goes in circles.
func (c *commit) deadLetter(lane LaneKey, seq uint64, st *standing, to *DeadLetter) {
	if to == nil || st.letter != nil || st.state != Exhausted && st.state != Rejected {
		return
	}
	letter := &Letter{From: to.From, State: st.state, Reason: st.reason[:min(len(st.reason), maxReason)], Attempts: st.attempts}
	if st.last != nil {
		letter.ResponseCode = st.last.ResponseCode
	}
	origin := seq
	if st.origin != 0 {
		origin = st.origin
	}
	if _, err := c.send(&sending{ns: lane.Namespace, origin: origin, to: to.To, trigger: ByDeadLetter, letter: letter}); errors.Is(err, ErrPurged) {
		return
	} else if err != nil {
		c.p.j.log.Error("dead letter not made", "delivery_id", ID{seq, c.p.number, lane.Subscription}.String(), "err", err)
		return
	}
	// Durable before it is sent: a crash that forgot it would have the delivery tried again, which has been given up.
	c.firm = true
}

// Resend makes a new delivery of a delivery's event to a subscription, durably, whatever became of the delivery. It is
// due now. ErrNotFound says that there is no such delivery, ErrPurged that the payload of its event has been purged, ErrInvalidState that its event is no longer retained, or
// that ifAttempts is not negative and not the number of attempts that have ended.
func (j *Journal) Resend(ctx context.Context, lane LaneKey, id ID, to Target, ifAttempts int) (*Delivery, error) {
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
		if ifAttempts >= 0 && ifAttempts != at.attempts {
			return fmt.Errorf("%w: %d attempts have ended", ErrInvalidState, at.attempts)
		}
		made, err := c.send(&sending{ns: lane.Namespace, origin: at.eventSeq(), to: to, trigger: ByReplay})
		if errors.Is(err, ErrNotFound) {
			return errEventGone
		}
		if err != nil {
			return err
		}
		c.firm = true
		d, err = p.deliveryOf(c.r, LaneKey{lane.Namespace, to.UID.SubscriptionKey()}, made)
		return err
	})
	if err != nil {
		return nil, err // d may still be in the committer's hands
	}
	return d, nil
}

var errEventGone = fmt.Errorf("%w: its event is no longer retained", ErrInvalidState)

// eventSeq is the sequence of the delivery's event.
func (at *place) eventSeq() uint64 {
	if at.origin != 0 {
		return at.origin
	}
	return at.row.Seq
}

// eachReplay visits the deliveries as which an event was sent again, until visit returns an error.
func (p *partition) eachReplay(r pebble.Reader, day dayKey, ns NamespaceKey, seq uint64, visit func(lane LaneKey, own, job uint64) error) error {
	prefix := appendReplays(nil, p.number, day, ns, seq)
	return p.j.scan(r, prefix, prefixEnd(prefix), func(key, value []byte) error {
		if len(key) != len(prefix)+16 {
			return p.j.corrupt(key, errBadKey)
		}
		d := readRecord(value)
		job := d.uint()
		if d.err != nil {
			return p.j.corrupt(key, d.err)
		}
		rest := key[len(prefix):]
		lane := LaneKey{ns, SubscriptionKey(binary.BigEndian.Uint64(rest[8:]))}
		return visit(lane, binary.BigEndian.Uint64(rest), job)
	})
}

// dead is a z record: when and how a delivery ended without success.
type dead struct {
	at    Instant
	state State
}

func encodeDead(b []byte, z dead) []byte {
	w := newRecord(b)
	w.instant(z.at)
	w.byte(byte(z.state))
	return w
}

func decodeDead(value []byte) (z dead, err error) {
	d := readRecord(value)
	z.at, z.state = d.instant(), State(d.byte())
	return z, d.err
}

// again is a g record: what a delivery that was made again is of. It outlives the event.
type again struct {
	origin  uint64
	trigger Trigger
	job     string
	// due and made are when it was to be attempted first, and when it was made.
	due, made Instant
	target    Target // name and UID
	// Of the event.
	id, eventType string
}

func encodeAgain(b []byte, a *again) []byte {
	w := newRecord(b)
	w.uint(a.origin)
	w.byte(byte(a.trigger))
	w.text(a.job)
	w.instant(a.due)
	w.instant(a.made)
	w = append(w, a.target.UID[:]...)
	w.text(a.target.Subscription)
	w.text(a.id)
	w.text(a.eventType)
	return w
}

func decodeAgain(value []byte) (a again, err error) {
	d := readRecord(value)
	a.origin, a.trigger, a.job, a.due, a.made = d.uint(), Trigger(d.byte()), d.text(), d.instant(), d.instant()
	copy(a.target.UID[:], d.fixed(len(a.target.UID)))
	a.target.Subscription, a.id, a.eventType = d.text(), d.text(), d.text()
	return a, d.err
}
