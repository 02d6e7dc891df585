package delivery

import (
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/cockroachdb/pebble/v2"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

// readEvent reads one event whole.
func (j *Journal) readEvent(partition uint16, namespace string, seq uint64) (*Event, error) {
	key := appendEventKey(nil, partition, namespace, seq)
	value, closer, err := j.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("journal %s: read %s: %w", j.dir, keyText(key), err)
	}
	defer closer.Close()
	return j.eventOf(partition, namespace, seq, key, value)
}

// readHead reads what deliveries show of their event.
func (j *Journal) readHead(partition uint16, namespace string, seq uint64) (*eventHead, error) {
	key := appendEventKey(nil, partition, namespace, seq)
	value, closer, err := j.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("journal %s: read %s: %w", j.dir, keyText(key), err)
	}
	defer closer.Close()
	head, err := j.head(key, value)
	return &head, err
}

// Event reads the latest event of this id; ErrNotFound when there is none or it is no longer retained.
func (j *Journal) Event(namespace, eventID string) (*Event, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	partition := partitionOf(namespace, eventID, len(j.partitions))
	seqs, err := j.sequences(partition, namespace, eventID)
	if err != nil {
		return nil, err
	}
	for _, seq := range seqs {
		e, err := j.readEvent(partition, namespace, seq)
		if err == nil || !errors.Is(err, ErrNotFound) {
			return e, err
		}
	}
	return nil, ErrNotFound
}

// sequences finds the events that were accepted with an id, newest first.
func (j *Journal) sequences(partition uint16, namespace, eventID string) ([]uint64, error) {
	days, err := j.days(partition)
	if err != nil {
		return nil, err
	}
	var seqs []uint64
	for _, d := range slices.Backward(days) {
		var rec storev1.IdempotencyRecord
		err := j.get(appendIdempotencyKey(nil, partition, d, namespace, eventID), &rec)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		seqs = append(seqs, rec.GetSeq())
	}
	return seqs, nil
}

// days lists the days of which a partition has idempotency records, in order.
func (j *Journal) days(partition uint16) (days []uint32, err error) {
	prefix := appendTag(nil, partition, tagIdempotency)
	it, err := j.db.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: prefixEnd(prefix)})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; {
		d, valid := dayOfKey(it.Key())
		if !valid {
			return nil, j.corrupt(it.Key(), errBadKey)
		}
		days = append(days, d)
		ok = it.SeekGE(prefixEnd(appendDay(nil, partition, d)))
	}
	return days, it.Error()
}

// locate finds lane and event of a delivery by its ID alone: one look-up per namespace.
func (j *Journal) locate(id ID) (LaneKey, *eventHead, error) {
	if int(id.Partition) >= len(j.partitions) {
		return LaneKey{}, nil, ErrNotFound
	}
	for _, namespace := range j.spaceNames() {
		lane, head, err := j.locateIn(namespace, id)
		if err == nil || !errors.Is(err, ErrNotFound) {
			return lane, head, err
		}
	}
	return LaneKey{}, nil, ErrNotFound
}

func (j *Journal) locateIn(namespace string, id ID) (LaneKey, *eventHead, error) {
	if int(id.Partition) >= len(j.partitions) {
		return LaneKey{}, nil, ErrNotFound
	}
	head, err := j.readHead(id.Partition, namespace, id.Seq)
	if err != nil {
		return LaneKey{}, nil, err
	}
	if int(id.Ordinal) >= len(head.targets) {
		return LaneKey{}, nil, ErrNotFound
	}
	return LaneKey{namespace, head.targets[id.Ordinal]}, head, nil
}

// Delivery reads one delivery; ErrNotFound when there is none or it is no longer retained. A settle shows
// within 20 ms. With many namespaces, DeliveryIn is cheaper.
func (j *Journal) Delivery(id ID) (*Delivery, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	lane, head, err := j.locate(id)
	if err != nil {
		return nil, err
	}
	return j.readDelivery(id, lane, head)
}

// DeliveryIn is Delivery for a caller that knows the namespace; a delivery of another one is ErrNotFound.
func (j *Journal) DeliveryIn(namespace string, id ID) (*Delivery, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	lane, head, err := j.locateIn(namespace, id)
	if err != nil {
		return nil, err
	}
	return j.readDelivery(id, lane, head)
}

func (j *Journal) readDelivery(id ID, lane LaneKey, head *eventHead) (*Delivery, error) {
	var rec storev1.DeliveryRecord
	if err := j.get(appendDeliveryKey(nil, id.Partition, lane, id.Seq), &rec); err != nil {
		return nil, err
	}
	return deliveryOf(id, lane, &rec, head), nil
}

// Attempts reads the attempts of a delivery that have ended, first to last, with what is kept of bodies and
// headers.
func (j *Journal) Attempts(id ID) ([]Attempt, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	lane, head, err := j.locate(id)
	if err != nil {
		return nil, err
	}
	d, err := j.readDelivery(id, lane, head)
	if err != nil {
		return nil, err
	}
	var attempts []Attempt
	prefix := appendSeq(appendLane(nil, id.Partition, tagAttempt, lane), id.Seq)
	err = j.scan(j.db, prefix, prefixEnd(prefix), func(key, value []byte) error {
		var rec storev1.AttemptRecord
		if err := j.decode(key, value, &rec); err != nil {
			return err
		}
		attempts = append(attempts, *attemptOf(&rec))
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
