package delivery

import (
	"cmp"
	"errors"
	"slices"
	"sort"

	"github.com/cockroachdb/pebble/v2"
)

// place is a delivery as it lies on disk.
type place struct {
	standing
	// day is where its records are: the sequence's, or kept.
	day dayKey
	// row is the open one; of an ended delivery it has the sequence only.
	row  Row
	open bool
	// waits: it is open, and waits for the turn of its ordering key; row has no kind then.
	waits bool
}

// home is where the records of an event are. Nothing is read for days that no sweep has touched.
func (p *partition) home(r pebble.Reader, ns NamespaceKey, seq uint64) (dayKey, error) {
	day := dayOf(seq)
	if !p.swept.Load().has(day) {
		return day, nil
	}
	moved, err := p.j.has(r, appendEventKey(nil, p.number, kept, ns, seq))
	if moved {
		return kept, err
	}
	return day, err
}

// homeOf is where the records of a delivery are, which may be one that was made again.
func (p *partition) homeOf(r pebble.Reader, lane LaneKey, seq uint64, again bool) (dayKey, error) {
	if !again {
		return p.home(r, lane.Namespace, seq)
	}
	day := dayOf(seq)
	if !p.swept.Load().has(day) {
		return day, nil
	}
	moved, err := p.j.has(r, appendAgainKey(nil, p.number, kept, lane, seq))
	if moved {
		return kept, err
	}
	return day, err
}

// find reads where a delivery stands; nil when there is none.
func (p *partition) find(r pebble.Reader, lane LaneKey, seq uint64) (*place, error) {
	day, err := p.home(r, lane.Namespace, seq)
	if err == nil && day != kept {
		day, err = p.homeOf(r, lane, seq, true)
	}
	if err != nil {
		return nil, err
	}
	at := &place{day: day, row: Row{Seq: seq}}
	recorded, err := p.readStanding(r, lane, at)
	if err == nil && !recorded && day == kept {
		// A sweep keeps an event's deliveries one after the other: this one is still where it was.
		at.day = dayOf(seq)
		if recorded, err = p.readStanding(r, lane, at); !recorded {
			at.day = kept
		}
	}
	if err != nil {
		return nil, err
	}
	if recorded {
		at.open = at.state == Scheduled
		if at.waits = at.open && at.due == 0; at.waits {
			at.row.Epoch = at.epoch
		} else if at.open {
			at.row = Row{Timer, at.due, seq, at.epoch}
		}
		return at, nil
	}
	return p.findPending(r, lane, at)
}

// readAgainBlocked fills at in of what was made again and waits for the turn of its event's ordering key, if it does.
func (p *partition) readAgainBlocked(r pebble.Reader, lane LaneKey, a *again, at *place) (bool, error) {
	e, err := p.readEvent(r, lane.Namespace, a.origin)
	if errors.Is(err, ErrNotFound) || err == nil && e.OrderingKey == "" {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return p.readBlocked(r, lane, orderKeyOf(e.OrderingKey), at)
}

func (p *partition) readStanding(r pebble.Reader, lane LaneKey, at *place) (bool, error) {
	return p.j.get(r, appendDeliveryKey(nil, p.number, at.day, lane, at.row.Seq), func(value []byte) (err error) {
		at.standing, err = decodeStanding(value)
		return err
	})
}

// findPending reads a delivery that has no record yet: it waits in the FIFO, for its event's delivery time, or for the
// turn of its ordering key.
func (p *partition) findPending(r pebble.Reader, lane LaneKey, at *place) (*place, error) {
	seq := at.row.Seq
	found, err := p.readRow(r, lane, Row{Kind: FIFO, Seq: seq}, at)
	if err != nil || found {
		return at, err
	}
	if a, err := p.readAgain(r, at.day, lane, seq); err != nil {
		return nil, err
	} else if a != nil {
		if found, err = p.readRow(r, lane, Row{Kind: Timer, Due: a.due, Seq: seq}, at); found {
			at.due = at.row.Due
		} else if err == nil {
			found, err = p.readAgainBlocked(r, lane, a, at)
		}
		if !found {
			return nil, err
		}
		return at, err
	}
	e, err := p.readEvent(r, lane.Namespace, seq)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if e.OrderingKey != "" {
		if found, err = p.readBlocked(r, lane, orderKeyOf(e.OrderingKey), at); err != nil || found {
			return at, err
		}
	}
	if e.DeliverTime.IsZero() {
		return nil, nil
	}
	if found, err = p.readRow(r, lane, Row{Kind: Timer, Due: InstantOf(e.DeliverTime), Seq: seq}, at); !found {
		return nil, err
	}
	at.due = at.row.Due
	return at, err
}

// readRow fills at in from an open row, if it is there.
func (p *partition) readRow(r pebble.Reader, lane LaneKey, row Row, at *place) (bool, error) {
	return p.j.get(r, appendRow(nil, p.number, lane, row), func(value []byte) (err error) {
		at.progress, err = decodeProgress(value)
		at.state, at.open = Pending, true
		row.Epoch = at.epoch
		at.row = row
		return err
	})
}

// readEvent reads one event whole; ErrNotFound when there is none.
func (p *partition) readEvent(r pebble.Reader, ns NamespaceKey, seq uint64) (e *Event, err error) {
	day, err := p.home(r, ns, seq)
	if err != nil {
		return nil, err
	}
	found, err := p.j.get(r, appendEventKey(nil, p.number, day, ns, seq), func(value []byte) (err error) {
		e, err = decodeEvent(value)
		return err
	})
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, ErrNotFound
	}
	p.place(e, ns, seq)
	return e, nil
}

// place completes an event that was read by what its key says.
func (p *partition) place(e *Event, ns NamespaceKey, seq uint64) {
	e.Namespace, e.Partition, e.Seq, e.UID = ns, p.number, seq, eventUID(p.j.id, p.number, seq)
}

// readHead reads what deliveries show of their event, but for targets that lie apart; ErrNotFound when there is none.
func (p *partition) readHead(r pebble.Reader, day dayKey, ns NamespaceKey, seq uint64) (h eventHead, err error) {
	found, err := p.j.get(r, appendEventKey(nil, p.number, day, ns, seq), func(value []byte) (err error) {
		h, err = decodeHead(value)
		return err
	})
	if err == nil && !found {
		err = ErrNotFound
	}
	return h, err
}

// targets has use read the targets of an event, which are lent to it: none where an event has none, or they were set
// aside.
func (p *partition) targets(r pebble.Reader, day dayKey, ns NamespaceKey, seq uint64, head *eventHead, use func(*targetList)) error {
	if !head.apart {
		use(&head.within)
		return nil
	}
	_, err := p.j.get(r, appendTargetsKey(nil, p.number, day, ns, seq), func(value []byte) error {
		list, err := decodeTargets(value)
		if err == nil {
			use(&list)
		}
		return err
	})
	return err
}

// readAgain reads what a delivery that was made again is of; nil when it was not.
func (p *partition) readAgain(r pebble.Reader, day dayKey, lane LaneKey, own uint64) (*again, error) {
	var a again
	found, err := p.j.get(r, appendAgainKey(nil, p.number, day, lane, own), func(value []byte) (err error) {
		a, err = decodeAgain(value)
		return err
	})
	if err != nil || !found {
		return nil, err
	}
	return &a, nil
}

// deliveryOf joins a delivery with its event.
func (p *partition) deliveryOf(r pebble.Reader, lane LaneKey, at *place) (*Delivery, error) {
	head, target, err := p.readJoined(r, lane, at)
	if err != nil {
		return nil, err
	}
	return p.show(r, lane, at, &head, &target), nil
}

// readJoined reads what a delivery shows of its event.
func (p *partition) readJoined(r pebble.Reader, lane LaneKey, at *place) (head eventHead, target Target, err error) {
	if at.origin != 0 {
		a, err := p.readAgain(r, at.day, lane, at.row.Seq)
		if err != nil || a == nil {
			return head, target, errors.Join(err, ErrNotFound)
		}
		return eventHead{id: a.id, eventType: a.eventType, accept: a.made.Time(), again: a}, a.target, nil
	}
	day, err := p.home(r, lane.Namespace, at.row.Seq) // a sweep keeps an event before its deliveries
	if err != nil {
		return head, target, err
	}
	if head, err = p.readHead(r, day, lane.Namespace, at.row.Seq); err != nil {
		return head, target, err
	}
	err = p.targets(r, day, lane.Namespace, at.row.Seq, &head, func(list *targetList) { target = list.target(lane.Subscription) })
	return head, target, err
}

// show is how a delivery looks to callers, with what it waits for.
func (p *partition) show(r pebble.Reader, lane LaneKey, at *place, head *eventHead, target *Target) *Delivery {
	d := p.join(lane, at, head, target)
	if d.WaitsForKey = at.waits; at.waits {
		d.StateReason = p.waitText(r, lane, at.order)
	}
	return d
}

func (p *partition) join(lane LaneKey, at *place, head *eventHead, target *Target) *Delivery {
	d := &Delivery{
		ID: ID{at.row.Seq, p.number, lane.Subscription}, Namespace: lane.Namespace,
		EventID: head.id, EventUID: eventUID(p.j.id, p.number, at.row.Seq), EventType: head.eventType,
		Subscription: target.Subscription, SubscriptionUID: target.UID,
		State: at.state, StateReason: at.reason, Attempts: at.attempts, MaxAttempts: at.maxAttempts,
		NextAttempt: at.due.Time(), Expire: at.expire.Time(), Last: at.last,
		CreateTime: head.accept, CompleteTime: at.complete.Time(), Trigger: ByPublish, OrderingGap: at.gap,
	}
	if a := head.again; a != nil {
		d.EventUID, d.Trigger, d.ReplayJob = eventUID(p.j.id, p.number, a.origin), a.trigger, a.job
	}
	return d
}

// Event reads the latest event of a namespace with this id; ErrNotFound when there is none or it is no longer
// retained.
func (j *Journal) Event(ns NamespaceKey, eventID string) (*Event, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	var latest *Event
	for _, p := range j.idPartitions(ns, eventID) {
		seqs, err := p.sequences(ns, eventID)
		if err != nil {
			return nil, err
		}
		for _, seq := range seqs {
			if latest != nil && cmp.Or(cmp.Compare(seq, latest.Seq), cmp.Compare(p.number, latest.Partition)) < 0 {
				break
			}
			e, err := p.readEvent(j.db, ns, seq)
			if err == nil && e.ID != eventID || errors.Is(err, ErrNotFound) {
				continue // two ids of one hash, or erased
			}
			if err != nil {
				return nil, err
			}
			latest = e
			break
		}
	}
	if latest == nil {
		return nil, ErrNotFound
	}
	return latest, nil
}

// idPartitions are those in which an event with an id may lie: the id's own, and those that have had events with an
// ordering key.
func (j *Journal) idPartitions(ns NamespaceKey, eventID string) []*partition {
	home := j.partitions[partitionOf(ns, eventID, len(j.partitions))]
	all := []*partition{home}
	for _, p := range j.partitions {
		if p != home && p.keyed.Load() {
			all = append(all, p)
		}
	}
	return all
}

// EventByUID reads an event of a namespace by its webhook-id; ErrNotFound when there is none, it is no longer
// retained, or this is no webhook-id of this journal.
func (j *Journal) EventByUID(ns NamespaceKey, uid string) (*Event, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	partition, seq, ok := parseUID(j.id, uid)
	if !ok || int(partition) >= len(j.partitions) {
		return nil, ErrNotFound
	}
	return j.partitions[partition].readEvent(j.db, ns, seq)
}

// Receivers lists the subscriptions that an event has, or had, deliveries to, those that were made again, too, in no order
// and some twice. ErrNotFound when the event is no longer retained.
func (j *Journal) Receivers(e *Event) ([]SubscriptionKey, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	if int(e.Partition) >= len(j.partitions) {
		return nil, ErrNotFound
	}
	p, r := j.partitions[e.Partition], j.db.NewSnapshot() // an event may be moved from its day meanwhile
	defer r.Close()
	day, err := p.home(r, e.Namespace, e.Seq)
	if err != nil {
		return nil, err
	}
	head, err := p.readHead(r, day, e.Namespace, e.Seq)
	if err != nil {
		return nil, err
	}
	var subs []SubscriptionKey
	if err := p.targets(r, day, e.Namespace, e.Seq, &head, func(list *targetList) { subs = list.keys() }); err != nil {
		return nil, err
	}
	err = p.eachReplay(r, day, e.Namespace, e.Seq, func(lane LaneKey, _, _ uint64) error {
		subs = append(subs, lane.Subscription)
		return nil
	})
	return subs, err
}

// sequences finds the events that were accepted with an id, newest first.
func (p *partition) sequences(ns NamespaceKey, eventID string) ([]uint64, error) {
	var days []dayKey
	if err := p.eachDay(p.j.db, 0, func(day dayKey) error {
		days = append(days, day)
		return nil
	}); err != nil {
		return nil, err
	}
	hash := identityOf("", eventID, "").id
	var seqs []uint64
	for _, day := range days {
		prefix := appendU64(appendKind(nil, p.number, day, ns, kindIdentity), hash)
		err := p.j.scan(p.j.db, prefix, prefixEnd(prefix), func(key, value []byte) error {
			k, err := decodeKnown(value)
			if err != nil {
				return p.j.corrupt(key, err)
			}
			seqs = append(seqs, k.seq)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(seqs)
	slices.Reverse(seqs)
	return slices.Compact(seqs), nil
}

// Delivery reads one delivery of a namespace; ErrNotFound when there is none or it is no longer retained. A settle
// shows within 20 ms.
func (j *Journal) Delivery(ns NamespaceKey, id ID) (*Delivery, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	d, _, err := j.readDelivery(ns, id)
	return d, err
}

func (j *Journal) readDelivery(ns NamespaceKey, id ID) (*Delivery, *place, error) {
	if int(id.Partition) >= len(j.partitions) {
		return nil, nil, ErrNotFound
	}
	p, lane := j.partitions[id.Partition], LaneKey{ns, id.Subscription}
	r, _ := p.snapshot() // else a retry could slip from row to row between two looks
	defer r.Close()
	at, err := p.find(r, lane, id.Seq)
	if err != nil {
		return nil, nil, err
	}
	if at == nil {
		return nil, nil, ErrNotFound
	}
	d, err := p.deliveryOf(r, lane, at)
	return d, at, err
}

// Attempts reads the attempts of a delivery that have ended, first to last, with what is kept of bodies and
// headers.
func (j *Journal) Attempts(ns NamespaceKey, id ID) ([]Attempt, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	d, at, err := j.readDelivery(ns, id)
	if err != nil {
		return nil, err
	}
	var attempts []Attempt
	prefix := appendAttempts(nil, id.Partition, at.day, LaneKey{ns, id.Subscription}, id.Seq)
	err = j.scan(j.db, prefix, prefixEnd(prefix), func(key, value []byte) error {
		a, err := decodeAttempt(value)
		if err != nil {
			return j.corrupt(key, err)
		}
		attempts = append(attempts, *a)
		return nil
	})
	if err != nil {
		return nil, err
	}
	// A success has no record of its own.
	if d.Last != nil && !slices.ContainsFunc(attempts, func(a Attempt) bool { return a.Number == d.Last.Number }) {
		attempts = append(attempts, *d.Last)
		sort.Slice(attempts, func(a, b int) bool { return attempts[a].Number < attempts[b].Number })
	}
	return attempts, nil
}
