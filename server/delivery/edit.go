package delivery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

const (
	// editBatch bounds how long CancelLane holds a committer.
	editBatch = 500
	// retryWindow is how long a delivery whose time is up may still start the attempt a caller asks for.
	retryWindow = 24 * time.Hour
)

// Cancel ends an open delivery as CANCELLED, durably. A delivery that has been cancelled before is returned
// as it is; one that has ended otherwise is ErrFinal, an unknown one ErrNotFound. An attempt in flight is
// left to end and is added to the history.
func (j *Journal) Cancel(ctx context.Context, id ID, reason string) (*Delivery, error) {
	return j.edit(ctx, id, func(p *partition, lane LaneKey, rec *storev1.DeliveryRecord) error {
		switch state := State(rec.GetState()); {
		case state == Cancelled:
			return nil
		case state.Final():
			return ErrFinal
		}
		b := p.j.db.NewBatch()
		p.cancel(b, lane, id.Seq, rec, reason)
		p.edited.add(id, p.now)
		p.commit(b, false) // runEdits syncs
		return nil
	})
}

// cancel adds the end of an open delivery to the batch.
func (p *partition) cancel(b *pebble.Batch, lane LaneKey, seq uint64, rec *storev1.DeliveryRecord, reason string) {
	p.unlink(b, lane, seq, rec)
	rec.State, rec.StateReason = uint32(Cancelled), validText(reason)
	rec.NextAttemptTime, rec.CompleteTime, rec.Manual = 0, p.now.UnixNano(), false
	p.putIndex(b, lane, Cancelled, seq)
	p.key = appendDeliveryKey(p.key[:0], p.index, lane, seq)
	putRecord(b, p.key, rec)
	p.j.counts.add(lane, -1)
}

// unlink takes away the timer and the index entry of a delivery's present state.
func (p *partition) unlink(b *pebble.Batch, lane LaneKey, seq uint64, rec *storev1.DeliveryRecord) {
	if rec.GetNextAttemptTime() != 0 {
		p.deleteTimer(b, lane, rec.GetNextAttemptTime(), seq)
	}
	p.deleteIndex(b, lane, State(rec.GetState()), seq)
}

// Retry makes a delivery due now, durably, with one attempt more when its attempts are used up and a day more
// when its time is. A delivery of the FIFO is due anyway and stays as it is. ErrInvalidState says that it has
// succeeded, or that ifAttempts is not negative and not the number of attempts that have ended.
func (j *Journal) Retry(ctx context.Context, id ID, ifAttempts int) (*Delivery, error) {
	return j.edit(ctx, id, func(p *partition, lane LaneKey, rec *storev1.DeliveryRecord) error {
		state := State(rec.GetState())
		switch {
		case state == Succeeded:
			return fmt.Errorf("%w: it has succeeded", ErrInvalidState)
		case ifAttempts >= 0 && ifAttempts != int(rec.GetAttemptCount()):
			return fmt.Errorf("%w: %d attempts have ended", ErrInvalidState, rec.GetAttemptCount())
		case state == Pending && rec.GetNextAttemptTime() == 0:
			return nil
		}
		b := p.j.db.NewBatch()
		p.unlink(b, lane, id.Seq, rec)
		rec.State, rec.StateReason, rec.CompleteTime = uint32(Scheduled), "", 0
		rec.NextAttemptTime, rec.Manual = p.now.UnixNano(), true
		rec.IndeterminateCount = 0                 // the caller takes it out of quarantine
		rec.Suspicion = min(rec.GetSuspicion(), 1) // and it is still tried apart from others
		rec.MaxAttempts = max(rec.GetMaxAttempts(), rec.GetAttemptCount()+1)
		if rec.GetExpireTime() <= rec.GetNextAttemptTime() {
			rec.ExpireTime = p.now.Add(retryWindow).UnixNano()
		}
		p.putTimer(b, lane, rec.GetNextAttemptTime(), id.Seq)
		p.putIndex(b, lane, Scheduled, id.Seq)
		p.key = appendDeliveryKey(p.key[:0], p.index, lane, id.Seq)
		putRecord(b, p.key, rec)
		if state.Final() {
			p.j.counts.add(lane, 1)
			p.reopened.Add(1)
		}
		p.edited.add(id, p.now)
		p.commit(b, false)
		return nil
	})
}

// edit reads a delivery on its committer, lets change decide, and returns how it stands afterwards.
func (j *Journal) edit(ctx context.Context, id ID, change func(*partition, LaneKey, *storev1.DeliveryRecord) error) (*Delivery, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	lane, head, err := j.locate(id)
	if err != nil {
		return nil, err
	}
	p := j.partitions[id.Partition]
	var rec storev1.DeliveryRecord
	err = p.do(ctx, func() error {
		key := appendDeliveryKey(nil, p.index, lane, id.Seq)
		if err := j.get(key, &rec); err != nil {
			return err
		}
		return change(p, lane, &rec)
	})
	if err != nil {
		return nil, err // rec may still be in the committer's hands
	}
	return deliveryOf(id, lane, &rec, head), nil
}

// CancelLane cancels all open deliveries of one incarnation of a subscription and says how many there were.
// When it fails half way, what has been cancelled stays so; call it again.
func (j *Journal) CancelLane(ctx context.Context, lane LaneKey, uid UID, reason string) (int, error) {
	leave, err := j.enter()
	if err != nil {
		return 0, err
	}
	defer leave()
	total := 0
	for _, p := range j.partitions {
		n, err := p.cancelLane(ctx, lane, uid, reason)
		total += n
		if err != nil {
			return total, fmt.Errorf("cancel deliveries of %s/%s: %w", lane.Namespace, lane.Subscription, err)
		}
	}
	return total, nil
}

func (p *partition) cancelLane(ctx context.Context, lane LaneKey, uid UID, reason string) (int, error) {
	sweep := &laneSweep{p: p, lane: lane, uid: uid, reason: reason}
	for done := false; !done; {
		result := make(chan sweepStep, 1)
		err := p.do(ctx, func() error {
			p.edited.addLane(lane, uid, reason, p.now)
			done, err := sweep.step()
			result <- sweepStep{done, sweep.cancelled}
			return err
		})
		if err != nil {
			return 0, err
		}
		r := <-result
		if done = r.done; done {
			return r.cancelled, nil
		}
	}
	return 0, nil
}

// sweepStep is how far a laneSweep is; a value, because the sweep belongs to the committer.
type sweepStep struct {
	done      bool
	cancelled int
}

// laneSweep walks the open deliveries of a lane in one partition, a bounded piece at a time.
type laneSweep struct {
	p         *partition
	lane      LaneKey
	uid       UID
	reason    string
	phase     int // index into the sources: Scheduled, Pending with a time, FIFO
	from      uint64
	cancelled int
}

// step cancels up to editBatch deliveries. It runs on the committer.
func (s *laneSweep) step() (done bool, err error) {
	b := s.p.j.db.NewBatch()
	defer func() {
		if err != nil {
			_ = b.Close()
			return
		}
		s.p.commit(b, false)
	}()
	for n := 0; s.phase < 3; s.phase, s.from = s.phase+1, 0 {
		prefix, start := s.bounds()
		more, err := s.p.scanSeqs(prefix, start, func(seq uint64) (bool, error) {
			s.from = seq + 1
			n++
			cancelled, err := s.cancelOne(b, seq)
			if cancelled {
				s.cancelled++
			}
			return n < editBatch, err
		})
		if err != nil || more {
			return false, err
		}
	}
	return true, nil
}

func (s *laneSweep) bounds() (prefix []byte, from uint64) {
	switch s.phase {
	case 0:
		return appendStatePrefix(nil, s.p.index, s.lane, Scheduled), s.from
	case 1:
		return appendStatePrefix(nil, s.p.index, s.lane, Pending), s.from
	}
	return appendLane(nil, s.p.index, tagDelivery, s.lane), max(s.from, s.p.j.lowWater(s.p.index, s.lane))
}

func (s *laneSweep) cancelOne(b *pebble.Batch, seq uint64) (bool, error) {
	var rec storev1.DeliveryRecord
	key := appendDeliveryKey(nil, s.p.index, s.lane, seq)
	if err := s.p.j.get(key, &rec); err != nil {
		if errors.Is(err, ErrNotFound) {
			return false, nil
		}
		return false, err
	}
	if State(rec.GetState()).Final() || string(rec.GetSubscriptionUid()) != string(s.uid[:]) {
		return false, nil
	}
	// In the third phase the batch may already hold the end of what was Scheduled.
	if s.phase == 2 && rec.GetNextAttemptTime() != 0 {
		return false, nil
	}
	s.p.cancel(b, s.lane, seq, &rec, s.reason)
	return true, nil
}

// scanSeqs calls visit with the sequences that end the keys of prefix, from from on, until it returns false
// (more is true then).
func (p *partition) scanSeqs(prefix []byte, from uint64, visit func(seq uint64) (bool, error)) (more bool, err error) {
	it, err := p.j.db.NewIter(&pebble.IterOptions{LowerBound: appendSeq(prefix, from), UpperBound: prefixEnd(prefix)})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; ok = it.Next() {
		seq, valid := lastSeqOf(it.Key())
		if !valid {
			return false, p.j.corrupt(it.Key(), errBadKey)
		}
		goOn, err := visit(seq)
		if err != nil {
			return false, err
		}
		if !goOn {
			return true, nil
		}
	}
	return false, it.Error()
}

var errBadKey = errors.New("key does not fit the layout")

// DropNamespace erases everything of a namespace, open deliveries included, durably.
func (j *Journal) DropNamespace(ctx context.Context, namespace string) error {
	leave, err := j.enter()
	if err != nil {
		return err
	}
	defer leave()
	for _, p := range j.partitions {
		if err := p.do(ctx, func() error { return p.drop(namespace) }); err != nil {
			return fmt.Errorf("drop namespace %q: %w", namespace, err)
		}
	}
	j.counts.drop(namespace)
	return nil
}

func (p *partition) drop(namespace string) error {
	b := p.j.db.NewBatch()
	for _, tag := range []byte{tagEvent, tagDelivery, tagTimer, tagIndex, tagAttempt, tagLane} {
		deletePrefix(b, appendSpace(nil, p.index, tag, namespace))
	}
	days, err := p.j.days(p.index)
	if err != nil {
		_ = b.Close()
		return err
	}
	for _, d := range days {
		deletePrefix(b, appendName(appendDay(nil, p.index, d), namespace))
	}
	p.keepSeq(b)
	p.edited.addSpace(namespace, p.lastSeq)
	p.reopened.Add(1) // a sweep of Retain must look again
	p.commit(b, false)
	return nil
}

// keepSeq notes the highest sequence, whose event may be about to be erased.
func (p *partition) keepSeq(b *pebble.Batch) {
	putRecord(b, appendTag(nil, p.index, tagPartition), &storev1.PartitionRecord{LastSeq: p.lastSeq})
}

func deletePrefix(b *pebble.Batch, prefix []byte) { deleteSpan(b, prefix, prefixEnd(prefix)) }

func deleteSpan(b *pebble.Batch, start, end []byte) {
	_ = b.DeleteRange(start, end, nil) // fails only on batches that are indexed
}
