package delivery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// minIdempotency keeps event ids known for the whole of dedupWindow, whatever the retention.
	minIdempotency = 2 * day
	// retainTries bounds how often a sweep starts over because deliveries were reopened meanwhile.
	retainTries = 3
)

var errMoved = errors.New("deliveries were reopened during the sweep")

// Retain erases, in one sweep, what is older than its namespace's retention: events, deliveries, attempts and
// ids. What is open stays whole, however old. A retention of zero or less keeps everything. It reads one entry
// per open delivery that is older than the retention, and erases by range.
func (j *Journal) Retain(ctx context.Context, retention func(namespace string) time.Duration) error {
	leave, err := j.enter()
	if err != nil {
		return err
	}
	defer leave()
	for _, namespace := range j.spaceNames() {
		keep := retention(namespace)
		if keep <= 0 {
			continue
		}
		for _, p := range j.partitions {
			if err := p.retain(ctx, namespace, keep); err != nil {
				return fmt.Errorf("retain namespace %q: %w", namespace, err)
			}
		}
	}
	return nil
}

func (p *partition) retain(ctx context.Context, namespace string, keep time.Duration) error {
	for try := 1; ; try++ {
		moves := p.reopened.Load()
		spans, err := p.expired(ctx, namespace, seqAt(p.j.now().Add(-keep)))
		if err != nil || len(spans) == 0 {
			return err
		}
		err = p.do(ctx, func() error {
			if p.reopened.Load() != moves {
				return errMoved
			}
			b := p.j.db.NewBatch()
			for _, s := range spans {
				deleteSpan(b, s.start, s.end)
			}
			p.keepSeq(b)
			p.commit(b, false)
			return nil
		})
		if errors.Is(err, errMoved) && try < retainTries {
			continue
		}
		if errors.Is(err, errMoved) {
			return nil // the next sweep will do it
		}
		return err
	}
}

type span struct{ start, end []byte }

// expiry collects what may be erased of one namespace in one partition, from one snapshot.
type expiry struct {
	p         *partition
	snapshot  *pebble.Snapshot
	namespace string
	limit     uint64
	spans     []span
}

func (p *partition) expired(ctx context.Context, namespace string, limit uint64) (spans []span, err error) {
	x := &expiry{p: p, snapshot: p.j.db.NewSnapshot(), namespace: namespace, limit: limit}
	defer func() { err = errors.Join(err, x.snapshot.Close()) }()
	var all []uint64
	prefix := appendSpace(nil, p.index, tagDelivery, namespace)
	err = p.j.lanesUnder(x.snapshot, prefix, func(lane LaneKey) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		open, err := x.lane(lane)
		all = append(all, open...)
		return err
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(all)
	all = slices.Compact(all)
	if err := x.gaps(appendSpace(nil, p.index, tagEvent, namespace), all); err != nil {
		return nil, err
	}
	oldest := limit
	if len(all) > 0 {
		oldest = all[0]
	}
	err = x.ids(min(oldest, seqAt(p.j.now().Add(-minIdempotency))))
	return x.spans, err
}

// lane collects what may be erased of a lane and returns the open sequences below the limit.
func (x *expiry) lane(lane LaneKey) (open []uint64, err error) {
	j, index := x.p.j, x.p.index
	err = j.eachOpen(x.snapshot, index, lane, x.limit, func(seq uint64) error {
		open = append(open, seq)
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(open)
	for _, tag := range []byte{tagDelivery, tagAttempt} {
		if err := x.gaps(appendLane(nil, index, tag, lane), open); err != nil {
			return nil, err
		}
	}
	for _, state := range []State{Exhausted, Rejected, Cancelled, Skipped} {
		if err := x.gaps(appendStatePrefix(nil, index, lane, state), nil); err != nil {
			return nil, err
		}
	}
	if len(open) == 0 {
		return nil, x.laneRecord(lane)
	}
	return open, nil
}

// laneRecord drops the low-water mark of a lane that has nothing left.
func (x *expiry) laneRecord(lane LaneKey) error {
	prefix := appendLane(nil, x.p.index, tagDelivery, lane)
	left, err := x.any(appendSeq(bytes.Clone(prefix), x.limit), prefixEnd(prefix))
	if err != nil || left {
		return err
	}
	key := appendLaneKey(nil, x.p.index, lane)
	x.spans = append(x.spans, span{key, prefixEnd(key)})
	return nil
}

// gaps adds the spans of prefix below the limit that hold something and leave the open sequences out.
func (x *expiry) gaps(prefix []byte, open []uint64) error {
	from := uint64(0)
	for i := 0; i <= len(open); i++ {
		to := x.limit
		if i < len(open) {
			to = open[i]
		}
		if from < to {
			start, end := appendSeq(bytes.Clone(prefix), from), appendSeq(bytes.Clone(prefix), to)
			found, err := x.any(start, end)
			if err != nil {
				return err
			}
			if found {
				x.spans = append(x.spans, span{start, end})
			}
		}
		from = to + 1
	}
	return nil
}

func (x *expiry) any(start, end []byte) (found bool, err error) {
	it, err := x.snapshot.NewIter(&pebble.IterOptions{LowerBound: start, UpperBound: end})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	return it.First(), it.Error()
}

// ids adds the days of event ids that end before limit.
func (x *expiry) ids(limit uint64) error {
	days, err := x.p.j.days(x.p.index)
	if err != nil {
		return err
	}
	for _, d := range days {
		if uint64(d)+1 > uint64(dayOf(limit)) {
			continue
		}
		prefix := appendName(appendDay(nil, x.p.index, d), x.namespace)
		found, err := x.any(prefix, prefixEnd(prefix))
		if err != nil {
			return err
		}
		if found {
			x.spans = append(x.spans, span{prefix, prefixEnd(prefix)})
		}
	}
	return nil
}
