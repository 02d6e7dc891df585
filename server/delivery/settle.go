package delivery

import (
	"errors"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/cockroachdb/pebble/v2"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

// settle is a queued Settle or SetLowWater. It holds a copy of the job, which the caller may change as
// soon as Settle has returned.
type settle struct {
	job     Job
	step    Step
	attempt *Attempt
	lane    LaneKey
	// lowWater marks a SetLowWater to job.ID.Seq.
	lowWater bool
}

// Settle records how a delivery goes on: the step, and the attempt that led to it, which is nil when none
// was made (expired, cancelled). The attempt's Number rules over job.Attempts, which may or may not count
// it yet; job.Indeterminate and job.Suspicion must count it. The attempt must not be changed afterwards. Settle returns at once
// unless the disk is far behind; the record is visible within 20 ms and durable within 100 ms, and those
// of one partition become so in order. A crash may forget it, and the attempt is then made again with the
// same message id. Once the journal is closed it does nothing.
func (j *Journal) Settle(job *Job, step Step, attempt *Attempt) {
	if !step.State.Final() && step.State != Scheduled || int(job.ID.Partition) >= len(j.partitions) {
		return // unspent: nothing has changed
	}
	p := j.partitions[job.ID.Partition]
	p.queue(func(s *settle) {
		s.job, s.step, s.attempt, s.lane = *job, step, attempt, job.Lane()
	})
}

// SetLowWater notes that no delivery of the lane's FIFO below seq is Pending, once the settles made before
// it are recorded. Recovery starts there.
func (j *Journal) SetLowWater(lane LaneKey, partition uint16, seq uint64) {
	if int(partition) >= len(j.partitions) {
		return
	}
	p := j.partitions[partition]
	p.queue(func(s *settle) {
		s.lane, s.job.ID.Seq, s.lowWater = lane, seq, true
	})
}

// queue adds a settle that fill fills in place.
func (p *partition) queue(fill func(*settle)) {
	p.mu.Lock()
	for len(p.settles) >= maxSettles && !p.closing {
		p.room.Wait()
	}
	if p.closing || !p.j.started.Load() {
		p.mu.Unlock()
		return
	}
	p.settles = append(p.settles, settle{})
	n := len(p.settles)
	fill(&p.settles[n-1])
	if n == 1 {
		p.since = time.Now()
		p.timer.Reset(settleDelay)
	}
	p.mu.Unlock()
	if n == settleBatch {
		p.signal()
	}
}

// applySettle adds one settle to the batch. In the common case, success at the first attempt, that is one
// record and no read.
func (p *partition) applySettle(b *pebble.Batch, s *settle) {
	if s.lowWater {
		p.key = appendLaneKey(p.key[:0], p.index, s.lane)
		putRecord(b, p.key, &storev1.LaneRecord{LowWater: s.job.ID.Seq})
		return
	}
	if p.edited.touches(s) {
		p.settleEdited(b, s)
		return
	}
	p.writeSettle(b, s)
}

func (p *partition) writeSettle(b *pebble.Batch, s *settle) {
	job, rec := &s.job, &p.delivery
	before, made := job.Attempts, job.Attempts
	if s.attempt != nil {
		made = attemptNumber(s)
		before = made - 1
	}
	rec.Reset()
	rec.State, rec.Ordinal, rec.SubscriptionUid = uint32(s.step.State), uint32(job.ID.Ordinal), job.SubscriptionUID[:]
	rec.MaxAttempts, rec.ExpireTime = uint32(job.MaxAttempts), toNano(job.Expire)
	rec.AttemptCount, rec.IndeterminateCount = uint32(made), uint32(job.Indeterminate)
	rec.Suspicion = uint32(job.Suspicion)
	rec.StateReason = validText(s.step.Reason)
	p.addAttempt(b, s, rec, made)
	p.moveIndex(b, s, rec, before)
	p.key = appendDeliveryKey(p.key[:0], p.index, s.lane, job.ID.Seq)
	putRecord(b, p.key, rec)
	p.j.metrics.settled.Add(1)
}

func attemptNumber(s *settle) int {
	if s.attempt.Number > 0 {
		return s.attempt.Number
	}
	return s.job.Attempts + 1
}

// addAttempt embeds the attempt in the delivery's record. One that did not succeed gets a record of its own
// with its bodies, which later attempts do not overwrite.
func (p *partition) addAttempt(b *pebble.Batch, s *settle, rec *storev1.DeliveryRecord, number int) {
	if s.attempt == nil {
		if number > 0 {
			rec.LastAttempt = p.lastAttempt(s.lane, s.job.ID.Seq, number)
		}
		return
	}
	success := s.step.State == Succeeded
	attemptRecord(&p.attempt, s.attempt, true)
	p.attempt.Number = uint32(number)
	if !success {
		p.key = appendAttemptKey(p.key[:0], p.index, s.lane, s.job.ID.Seq, number)
		putRecord(b, p.key, &p.attempt)
		p.attempt.ResponseBody, p.attempt.ResponseHeaders, p.attempt.RequestHeaders = nil, nil, nil
	}
	rec.LastAttempt = &p.attempt
}

// lastAttempt reads an attempt's record without its bodies; nil when there is none.
func (p *partition) lastAttempt(lane LaneKey, seq uint64, number int) *storev1.AttemptRecord {
	p.key = appendAttemptKey(p.key[:0], p.index, lane, seq, number)
	var rec storev1.AttemptRecord
	if err := p.j.get(p.key, &rec); err != nil {
		return nil
	}
	rec.ResponseBody, rec.ResponseHeaders, rec.RequestHeaders = nil, nil, nil
	return &rec
}

// moveIndex replaces the timer and index entries of the state that the job came from by those of the new
// one, fills the record's times, and counts. before is the number of attempts on record so far.
func (p *partition) moveIndex(b *pebble.Batch, s *settle, rec *storev1.DeliveryRecord, before int) {
	job, to := &s.job, s.step.State
	fromTimer := !job.Due.IsZero()
	if fromTimer {
		p.deleteTimer(b, s.lane, toNano(job.Due), job.ID.Seq)
		if before == 0 || to.Final() {
			// Without attempts it may have been Pending until a time, or Scheduled by a caller.
			p.deleteIndex(b, s.lane, Pending, job.ID.Seq)
			p.deleteIndex(b, s.lane, Scheduled, job.ID.Seq)
		}
	}
	if to == Scheduled {
		rec.NextAttemptTime = toNano(s.step.Due)
		p.putTimer(b, s.lane, rec.NextAttemptTime, job.ID.Seq)
		p.putIndex(b, s.lane, Scheduled, job.ID.Seq)
		return
	}
	rec.CompleteTime = p.now.UnixNano()
	if to != Succeeded {
		p.putIndex(b, s.lane, to, job.ID.Seq)
	}
	p.j.counts.add(s.lane, -1)
}

// settleEdited handles a settle of a delivery that a caller has changed since the job was made: what the
// caller asked for stands, and the attempt is kept as history. A success wins over a retry.
func (p *partition) settleEdited(b *pebble.Batch, s *settle) {
	key := appendDeliveryKey(nil, p.index, s.lane, s.job.ID.Seq)
	var rec storev1.DeliveryRecord
	if err := p.j.get(key, &rec); err != nil {
		if !errors.Is(err, ErrNotFound) {
			p.j.log.Error("settle of an edited delivery", "delivery_id", s.job.ID.String(), "err", err)
		}
		return // dropped with its namespace, or retained no longer
	}
	state := State(rec.GetState())
	if gone, ok := p.edited.lanes[laneIncarnation{s.lane, s.job.SubscriptionUID}]; ok && s.step.State == Scheduled {
		// CancelLane may have passed by already.
		s.step = Step{State: Cancelled, Reason: gone.reason}
	}
	current := !state.Final() && rec.GetNextAttemptTime() == toNano(s.job.Due)
	if current || !state.Final() && s.step.State == Succeeded {
		s.job.Attempts = int(rec.GetAttemptCount())
		s.job.MaxAttempts = int(rec.GetMaxAttempts())
		s.job.Due = fromNano(rec.GetNextAttemptTime())
		s.attempt = renumbered(s.attempt, s.job.Attempts+1)
		p.edited.forget(s.job.ID)
		p.writeSettle(b, s)
		return
	}
	if s.attempt == nil {
		return
	}
	number := int(rec.GetAttemptCount()) + 1
	rec.AttemptCount = uint32(number)
	s.step.State = Cancelled // anything that keeps the attempt as a record of its own
	p.addAttempt(b, s, &rec, number)
	putRecord(b, key, &rec)
}

func renumbered(a *Attempt, number int) *Attempt {
	if a == nil || a.Number == number {
		return a
	}
	c := *a
	c.Number = number
	return &c
}

// validText makes text from outside fit to be stored.
func validText(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// editedSet remembers what callers have changed while jobs of the old state may still be in memory.
type editedSet struct {
	ids    map[ID]time.Time
	lanes  map[laneIncarnation]cancelled
	spaces map[string]uint64
}

type laneIncarnation struct {
	lane LaneKey
	uid  UID
}

type cancelled struct {
	at     time.Time
	reason string
}

const (
	// editedFor is longer than any job stays in memory unsettled.
	editedFor = 48 * time.Hour
	// editedMax bounds the memory of single edits; the oldest are forgotten.
	editedMax = 1 << 16
)

// touches reports whether the settle's delivery may have been changed by a caller.
func (s *editedSet) touches(v *settle) bool {
	if len(s.ids)+len(s.lanes)+len(s.spaces) == 0 {
		return false
	}
	if _, ok := s.ids[v.job.ID]; ok {
		return true
	}
	if _, ok := s.lanes[laneIncarnation{v.lane, v.job.SubscriptionUID}]; ok {
		return true
	}
	upTo, ok := s.spaces[v.lane.Namespace]
	return ok && v.job.ID.Seq <= upTo
}

func (s *editedSet) add(id ID, now time.Time) {
	if s.ids == nil {
		s.ids = make(map[ID]time.Time)
	}
	if len(s.ids) >= editedMax {
		s.expire(now)
	}
	s.ids[id] = now
}

// expire forgets old edits, and half of the rest if that does not make room.
func (s *editedSet) expire(now time.Time) {
	for id, at := range s.ids {
		if now.Sub(at) > editedFor {
			delete(s.ids, id)
		}
	}
	for lane, c := range s.lanes {
		if now.Sub(c.at) > editedFor {
			delete(s.lanes, lane)
		}
	}
	for id := range s.ids {
		if len(s.ids) <= editedMax/2 {
			break
		}
		delete(s.ids, id)
	}
}

func (s *editedSet) forget(id ID) { delete(s.ids, id) }

func (s *editedSet) addLane(lane LaneKey, uid UID, reason string, now time.Time) {
	if s.lanes == nil {
		s.lanes = make(map[laneIncarnation]cancelled)
	}
	s.lanes[laneIncarnation{lane, uid}] = cancelled{now, reason}
}

func (s *editedSet) addSpace(namespace string, upTo uint64) {
	if s.spaces == nil {
		s.spaces = make(map[string]uint64)
	}
	s.spaces[namespace] = upTo
}
