package delivery

import (
	"bytes"
	"errors"
	"fmt"
	"iter"

	"github.com/cockroachdb/pebble/v2"
)

var errStopped = errors.New("stopped")

// Lanes yields every lane and partition that has open rows, for recovery; a lane that has rows of both kinds comes
// twice. It seeks from lane to lane and reads no payload. An error ends it.
func (j *Journal) Lanes() iter.Seq2[LaneState, error] {
	return func(yield func(LaneState, error) bool) {
		for _, p := range j.partitions {
			for state, err := range j.LanesOf(p.number) {
				if !yield(state, err) || err != nil {
					return
				}
			}
		}
	}
}

// LanesOf is Lanes for one partition.
func (j *Journal) LanesOf(partition uint16) iter.Seq2[LaneState, error] {
	return func(yield func(LaneState, error) bool) {
		for _, kind := range []Kind{FIFO, Timer} {
			// Nothing is held while the caller works, so that it may use the journal.
			states, err := j.laneStates(partition, kind)
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

func (j *Journal) laneStates(partition uint16, kind Kind) (states []LaneState, err error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	prefix := appendTag(nil, partition, tagOf(kind))
	skip := make([]byte, 0, laneEnd)
	err = j.hop(j.db, prefix, prefixEnd(prefix), func(key []byte) ([]byte, error) {
		lane, row, ok := splitRow(key)
		if !ok {
			return nil, j.corrupt(key, errBadKey)
		}
		state := LaneState{Lane: lane, Partition: partition}
		if kind == FIFO {
			state.FIFO = row.Pos()
		} else {
			state.Timer = row.Pos()
		}
		states = append(states, state)
		skip = laneAfter(append(skip[:0], key[:laneEnd]...))
		return skip, nil
	})
	return states, err
}

// laneAfter makes the prefix of a lane the first key behind it, in place.
func laneAfter(prefix []byte) []byte {
	for i := len(prefix) - 1; i > 0; i-- {
		if prefix[i]++; prefix[i] != 0 {
			return prefix
		}
	}
	return prefix
}

func tagOf(kind Kind) byte {
	if kind == FIFO {
		return tagFIFO
	}
	return tagTimer
}

// Read reads open rows of one kind of a lane in one partition, in order, from a place on: at most limit, and no
// more after maxBytes of events that were not in memory; of timers only those due by until. It sees exactly the
// commits up to Read.UpTo. A row that cannot be read, or whose event cannot, is passed over and told of by name; it
// stays on disk. Rows stay until they are settled, so that a second call returns the same ones.
func (j *Journal) Read(lane LaneKey, partition uint16, kind Kind, from Pos, until Instant, limit, maxBytes int) (found Read, err error) {
	leave, err := j.enter()
	if err != nil {
		return Read{}, err
	}
	defer leave()
	if int(partition) >= len(j.partitions) || !from.Some {
		return Read{}, nil
	}
	p := j.partitions[partition]
	snapshot, upTo := p.snapshot()
	r := rowReader{p: p, snapshot: snapshot, lane: lane, found: Read{UpTo: upTo}}
	defer func() { err = errors.Join(err, r.close()) }()
	lower := appendPos(nil, partition, lane, kind, from)
	upper := prefixEnd(appendLane(nil, partition, tagOf(kind), lane))
	err = j.scan(snapshot, lower, upper, func(key, value []byte) error {
		_, row, ok := splitRow(key)
		if !ok {
			return j.corrupt(key, errBadKey)
		}
		n := len(r.found.Jobs)
		if n+len(r.found.Aside) >= limit || r.bytes >= maxBytes && n > 0 || kind == Timer && row.Due > until {
			r.found.Next = row.Pos()
			return errStopped
		}
		if err := r.job(row, value); err != nil {
			if errors.Is(err, errUnreadable) {
				return err
			}
			r.found.Aside = append(r.found.Aside, err)
		}
		return nil
	})
	if err != nil && !errors.Is(err, errStopped) {
		for i := range r.found.Jobs {
			j.Release(r.found.Jobs[i].Event)
		}
		return Read{}, err
	}
	return r.found, nil
}

// errUnreadable marks faults of the disk, which are not the row's.
var errUnreadable = errors.New("journal cannot be read")

// seekAfter is how many events a read looks up one by one before it opens an iterator, which costs as much as many
// look-ups.
const seekAfter = 8

// rowReader makes jobs from one snapshot.
type rowReader struct {
	p        *partition
	snapshot *pebble.Snapshot
	lane     LaneKey
	events   *pebble.Iterator
	looked   int
	bytes    int
	key      []byte
	found    Read
}

func (r *rowReader) close() (err error) {
	if r.events != nil {
		err = r.events.Close()
	}
	return errors.Join(err, r.snapshot.Close())
}

// job adds the job of a row.
func (r *rowReader) job(row Row, value []byte) error {
	pr, err := decodeProgress(value)
	if err != nil {
		return r.p.j.corrupt(appendRow(nil, r.p.number, r.lane, row), err)
	}
	seq := row.Seq
	if pr.origin != 0 {
		seq = pr.origin
	}
	e, err := r.event(seq)
	if err != nil {
		return fmt.Errorf("delivery %s: %w", ID{row.Seq, r.p.number, r.lane.Subscription}, err)
	}
	r.found.Jobs = append(r.found.Jobs, Job{
		ID: ID{row.Seq, r.p.number, r.lane.Subscription}, Event: e, Kind: row.Kind, Epoch: pr.epoch, Due: row.Due,
		AsOf: r.found.UpTo, Attempts: pr.attempts, MaxAttempts: pr.maxAttempts, Expire: pr.expire.Time(),
		Manual: pr.manual, Indeterminate: pr.indeterminate, Suspicion: pr.suspicion, Parted: pr.parted, Replay: pr.job, Letter: pr.letter,
		Order: pr.order, Gap: pr.gap,
	})
	return nil
}

// event finds the event in memory, else on disk, and holds it.
func (r *rowReader) event(seq uint64) (*Event, error) {
	p, ns := r.p, r.lane.Namespace
	if e := p.events.find(ns, seq); e != nil {
		return e, nil
	}
	day, err := p.home(r.snapshot, ns, seq)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnreadable, err)
	}
	r.key = appendEventKey(r.key[:0], p.number, day, ns, seq)
	value, done, err := r.value(r.key)
	if err != nil {
		return nil, err
	}
	e, err := decodeEvent(value)
	if closed := done(); err == nil {
		err = closed
	}
	if err != nil {
		return nil, p.j.corrupt(r.key, err)
	}
	p.place(e, ns, seq)
	r.bytes += int(e.size())
	return p.events.add(e), nil
}

// value reads a record that must be there.
func (r *rowReader) value(key []byte) (value []byte, done func() error, err error) {
	nothing := func() error { return nil }
	if r.looked++; r.looked <= seekAfter {
		value, closer, err := r.snapshot.Get(key)
		if errors.Is(err, pebble.ErrNotFound) {
			return nil, nothing, r.p.j.corrupt(key, errMissing)
		}
		if err != nil {
			return nil, nothing, r.p.j.corrupt(key, err)
		}
		return value, closer.Close, nil
	}
	if r.events == nil {
		prefix := appendTag(nil, r.p.number, tagRecord)
		r.events, err = r.snapshot.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: prefixEnd(prefix)})
		if err != nil {
			return nil, nothing, fmt.Errorf("%w: %w", errUnreadable, err)
		}
	}
	// The rows are in order, and so a seek is a short step ahead.
	if !r.events.SeekGE(key) || !bytes.Equal(r.events.Key(), key) {
		if err := r.events.Error(); err != nil {
			_ = r.events.Close()
			r.events, r.looked = nil, 0 // a damaged block ends an iterator
			return nil, nothing, r.p.j.corrupt(key, err)
		}
		return nil, nothing, r.p.j.corrupt(key, errMissing)
	}
	value, err = r.events.ValueAndErr()
	return value, nothing, err
}

var errMissing = errors.New("record is missing")
