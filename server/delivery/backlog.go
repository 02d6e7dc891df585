package delivery

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"time"

	"github.com/cockroachdb/pebble/v2"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

const (
	// backlogScan bounds how many records one Backlog passes over that are not Pending.
	backlogScan = 10_000
	// frontScan bounds how many Lanes passes over to find the first Pending one.
	frontScan = 1000
)

// Lanes yields every lane and partition that may have open work, for recovery. It seeks from lane to lane and
// reads no payload. An error ends it.
func (j *Journal) Lanes() iter.Seq2[LaneState, error] {
	return func(yield func(LaneState, error) bool) {
		for _, p := range j.partitions {
			// Nothing is held while the caller works, so that it may use the journal.
			states, err := j.laneStates(p.index)
			for _, state := range states {
				if !yield(state, nil) {
					return
				}
			}
			if err != nil {
				yield(LaneState{}, err)
				return
			}
		}
	}
}

func (j *Journal) laneStates(partition uint16) ([]LaneState, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	var states []LaneState
	err = j.eachLane(j.db, partition, func(lane LaneKey) error {
		state, err := j.laneState(partition, lane)
		if err == nil && (state.From != 0 || !state.NextDue.IsZero()) {
			states = append(states, state)
		}
		return err
	})
	return states, err
}

// eachLane visits the lanes that have deliveries in a partition.
func (j *Journal) eachLane(r pebble.Reader, partition uint16, visit func(LaneKey) error) error {
	return j.lanesUnder(r, appendTag(nil, partition, tagDelivery), visit)
}

// lanesUnder visits the lanes that have keys under a prefix of a tag or a namespace, seeking from one to the
// next.
func (j *Journal) lanesUnder(r pebble.Reader, prefix []byte, visit func(LaneKey) error) (err error) {
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: prefixEnd(prefix)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; {
		key := it.Key()
		lane, rest, valid := splitLane(key)
		if !valid {
			return j.corrupt(key, errBadKey)
		}
		next := prefixEnd(key[:len(key)-len(rest)])
		if err := visit(lane); err != nil {
			return err
		}
		ok = it.SeekGE(next)
	}
	return it.Error()
}

func (j *Journal) laneState(partition uint16, lane LaneKey) (LaneState, error) {
	state := LaneState{Lane: lane, Partition: partition}
	prefix := appendLane(nil, partition, tagDelivery, lane)
	from, seen := appendSeq(bytes.Clone(prefix), j.lowWater(partition, lane)), 0
	err := j.scan(j.db, from, prefixEnd(prefix), func(key, value []byte) error {
		delivery, next, err := j.peek(key, value)
		seen++
		if err != nil || (delivery != Pending || next != 0) && seen < frontScan {
			return err
		}
		state.From, _ = lastSeqOf(key)
		return errStopped
	})
	if err != nil && !errors.Is(err, errStopped) {
		return state, err
	}
	prefix = appendLane(nil, partition, tagTimer, lane)
	err = j.scan(j.db, prefix, prefixEnd(prefix), func(key, _ []byte) error {
		due, _, ok := splitTimer(key[len(prefix):])
		if !ok {
			return j.corrupt(key, errBadKey)
		}
		state.NextDue = time.Unix(0, due)
		return errStopped
	})
	if err != nil && !errors.Is(err, errStopped) {
		return state, err
	}
	return state, nil
}

// lowWater is the lane's mark; 0 when it has none or the mark cannot be read, which costs time only.
func (j *Journal) lowWater(partition uint16, lane LaneKey) uint64 {
	return j.lowWaterIn(j.db, partition, lane)
}

func (j *Journal) lowWaterIn(r pebble.Reader, partition uint16, lane LaneKey) uint64 {
	var rec storev1.LaneRecord
	if err := j.getIn(r, appendLaneKey(nil, partition, lane), &rec); err != nil {
		return 0
	}
	return rec.GetLowWater()
}

// Backlog reads jobs of a lane's FIFO in one partition, in order, from a sequence on: at most max, and no more
// after maxBytes of payload. next is where to go on; 0 means that there is nothing more now.
//
// It returns what is durable, and everything that onCommit had been given when Backlog was called, so that a
// lane that turns fresh jobs away finds them here. It may return a job just before onCommit is given it: a
// fresh job whose sequence is not above what has been read is to be dropped. Settles made before the call
// count. It must not be called from onCommit, nor under a lock that onCommit takes.
func (j *Journal) Backlog(lane LaneKey, partition uint16, from uint64, max int, maxBytes int) (jobs []*Job, next uint64, err error) {
	r, err := j.openReader(partition)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	handed := j.partitions[partition].handed.Load()
	if from > handed || max <= 0 {
		return nil, 0, nil
	}
	if err := r.open(); err != nil {
		return nil, 0, err
	}
	prefix := appendLane(nil, partition, tagDelivery, lane)
	lower, upper := appendSeq(bytes.Clone(prefix), from), appendSeq(bytes.Clone(prefix), handed+1)
	passed := 0
	err = j.scan(r.snapshot, lower, upper, func(key, value []byte) error {
		seq, ok := lastSeqOf(key)
		if !ok {
			return j.corrupt(key, errBadKey)
		}
		if len(jobs) >= max || maxBytes <= 0 && len(jobs) > 0 || passed >= backlogScan {
			next = seq
			return errStopped
		}
		state, due, err := j.peek(key, value)
		if err != nil || state != Pending || due != 0 {
			passed++
			return err
		}
		job, err := r.job(lane, seq, 0, key, value)
		if err != nil {
			return err
		}
		jobs = append(jobs, job)
		maxBytes -= len(job.Event.Payload)
		return nil
	})
	if err != nil && !errors.Is(err, errStopped) {
		return nil, 0, err
	}
	return jobs, next, nil
}

// Timers reads jobs of a lane in one partition that are due by until, in order of their due times: at most max,
// and no more after maxBytes of payload. They stay until they are settled, so that a second call returns the
// same ones. nextDue is the due time of the first one not returned, which may be before until; zero means
// that there is none. Settles made before the call count; the rules of Backlog for callers hold here too.
func (j *Journal) Timers(lane LaneKey, partition uint16, until time.Time, max int, maxBytes int) (jobs []*Job, nextDue time.Time, err error) {
	r, err := j.openReader(partition)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	if err := r.open(); err != nil {
		return nil, time.Time{}, err
	}
	prefix, handed := appendLane(nil, partition, tagTimer, lane), j.partitions[partition].handed.Load()
	err = j.scan(r.snapshot, prefix, prefixEnd(prefix), func(key, _ []byte) error {
		due, seq, ok := splitTimer(key[len(prefix):])
		if !ok {
			return j.corrupt(key, errBadKey)
		}
		if seq > handed {
			return nil // not durable yet
		}
		if len(jobs) >= max || maxBytes <= 0 && len(jobs) > 0 || due > until.UnixNano() {
			nextDue = time.Unix(0, due)
			return errStopped
		}
		dkey := appendDeliveryKey(nil, partition, lane, seq)
		value, closer, err := r.snapshot.Get(dkey)
		if err != nil {
			return j.missing(dkey, err)
		}
		job, err := r.job(lane, seq, due, dkey, value)
		if err = errors.Join(err, closer.Close()); err != nil {
			return err
		}
		jobs = append(jobs, job)
		maxBytes -= len(job.Event.Payload)
		return nil
	})
	if err != nil && !errors.Is(err, errStopped) {
		return nil, time.Time{}, err
	}
	return jobs, nextDue, nil
}

// missing is the error for a record that another one says must be there.
func (j *Journal) missing(key []byte, err error) error {
	if errors.Is(err, pebble.ErrNotFound) {
		return j.corrupt(key, errors.New("record is missing"))
	}
	return err
}

// reader makes jobs of one partition from one snapshot.
type reader struct {
	j         *Journal
	partition uint16
	leave     func()
	snapshot  *pebble.Snapshot
	events    *pebble.Iterator
	key       []byte
}

// openReader waits until earlier settles are visible.
func (j *Journal) openReader(partition uint16) (*reader, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	if int(partition) >= len(j.partitions) {
		leave()
		return nil, ErrNotFound
	}
	if err := j.partitions[partition].barrier(context.Background()); err != nil {
		leave()
		return nil, err
	}
	return &reader{j: j, partition: partition, leave: leave}, nil
}

func (r *reader) open() (err error) {
	r.snapshot = r.j.db.NewSnapshot()
	prefix := appendTag(nil, r.partition, tagEvent)
	r.events, err = r.snapshot.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: prefixEnd(prefix)})
	return err
}

func (r *reader) close() (err error) {
	if r.events != nil {
		err = r.events.Close()
	}
	if r.snapshot != nil {
		err = errors.Join(err, r.snapshot.Close())
	}
	r.leave()
	return err
}

// job joins a delivery's record with its event.
func (r *reader) job(lane LaneKey, seq uint64, due int64, key, value []byte) (*Job, error) {
	var rec storev1.DeliveryRecord
	if err := r.j.decode(key, value, &rec); err != nil {
		return nil, err
	}
	r.key = appendEventKey(r.key[:0], r.partition, lane.Namespace, seq)
	// The FIFO is in order, and so a seek is a short step ahead.
	if !r.events.SeekGE(r.key) || !bytes.Equal(r.events.Key(), r.key) {
		if err := r.events.Error(); err != nil {
			return nil, err
		}
		return nil, r.j.missing(r.key, pebble.ErrNotFound)
	}
	event, err := r.events.ValueAndErr()
	if err != nil {
		return nil, err
	}
	e, err := r.j.eventOf(r.partition, lane.Namespace, seq, r.key, event)
	if err != nil {
		return nil, err
	}
	return jobOf(&rec, e, lane, due), nil
}
