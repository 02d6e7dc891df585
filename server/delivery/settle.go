package delivery

import (
	"slices"
	"time"
)

// settle is a queued Settle or SetFailing. It holds a copy of the job, which the caller may change as soon as
// Settle has returned.
type settle struct {
	job     Job
	step    Step
	attempt *Attempt
	done    Settled
	// failing, where set, makes it a SetFailing.
	failing *failing
}

// Settle records how a delivery goes on: the step, and the attempt that led to it, which is nil when none
// was made (expired, cancelled). The attempt's Number rules over job.Attempts, which may or may not count
// it yet; job.Indeterminate and job.Suspicion must count it. The attempt must not be changed afterwards. Settle
// returns at once unless the disk is far behind; the record is visible within 20 ms, when done is told, and durable
// within 100 ms, and those of one partition become so in order. A crash may forget it, and the attempt is then made
// again with the same message id. Once the journal is closed it does nothing, and done is not told.
//
// A job whose row a caller has changed since it was made does not apply: the attempt becomes history, but a success
// ends the delivery if it is open.
func (j *Journal) Settle(job *Job, step Step, attempt *Attempt, done Settled) {
	if !step.State.Final() && step.State != Scheduled || int(job.ID.Partition) >= len(j.partitions) {
		return // unspent: nothing has changed
	}
	j.partitions[job.ID.Partition].queue(func(s *settle) {
		s.job, s.step, s.attempt, s.done = *job, step, attempt, done
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

// settle prepares one settle. In the common case, success at the first attempt, that is a row deleted, a record
// put, and no read.
func (c *commit) settle(s *settle) {
	if s.failing != nil {
		c.noteFailing(s.failing)
		return
	}
	lane, seq, from := s.job.Lane(), s.job.ID.Seq, len(c.steps)
	day, err := c.p.homeOf(c.r, lane, seq, s.job.Event.Seq != seq)
	if err == nil && (c.edited || s.job.AsOf < c.p.lastEdit) {
		var current bool
		if current, err = c.current(lane, s.job.Row()); err == nil && !current {
			err = c.settleStale(day, lane, s)
			c.told(s, from, err)
			return
		}
	}
	if err == nil {
		err = c.settleRow(day, lane, s.job.Row(), progressOf(&s.job), s)
	}
	c.told(s, from, err)
}

// told has the one who settled know, after all. A settle that could not be made for want of a readable record is
// made again after the next start. from is where the steps of the settle begin.
func (c *commit) told(s *settle, from int, err error) {
	if err != nil {
		c.p.j.log.Error("delivery not settled", "delivery_id", s.job.ID.String(), "err", err)
	}
	if s.done == nil {
		return
	}
	// Before the rows that follow.
	for from < len(c.steps) && c.steps[from].edited {
		from++
	}
	c.steps = slices.Insert(c.steps, from, step{settled: s.done})
}

func progressOf(job *Job) progress {
	pr := progress{
		epoch: job.Epoch, attempts: job.Attempts, maxAttempts: job.MaxAttempts, expire: InstantOf(job.Expire),
		indeterminate: job.Indeterminate, suspicion: job.Suspicion, parted: job.Parted, manual: job.Manual, job: job.Replay, letter: job.Letter,
		order: job.Order, gap: job.Gap,
	}
	if job.Event.Seq != job.ID.Seq {
		pr.origin = job.Event.Seq
	}
	return pr
}

// current reports whether an open row is as a job has it.
func (c *commit) current(lane LaneKey, row Row) (bool, error) {
	epoch := uint32(0)
	found, err := c.p.j.get(c.r, appendRow(nil, c.p.number, lane, row), func(value []byte) error {
		pr, err := decodeProgress(value)
		epoch = pr.epoch
		return err
	})
	return found && epoch == row.Epoch, err
}

// settleRow moves a delivery from an open row to what the step says.
func (c *commit) settleRow(day dayKey, lane LaneKey, row Row, pr progress, s *settle) error {
	var next successor
	turnEnds := pr.order != 0 && s.step.State.Final()
	if turnEnds {
		var err error
		if next, err = c.next(lane, pr.order); err != nil {
			return err
		}
	}
	last, err := c.history(day, lane, row.Seq, &pr, s)
	if err != nil {
		return err
	}
	st := standing{progress: pr, state: s.step.State, reason: s.step.Reason, last: last}
	st.manual, st.attempted = false, s.attempt != nil
	c.dropRow(lane, row)
	c.settled++
	if s.step.State == Scheduled {
		st.epoch++
		st.due = InstantOf(s.step.Due)
		c.putStanding(day, lane, row.Seq, &st)
		c.putTimer(lane, Row{Timer, st.due, row.Seq, st.epoch}, &st.progress)
		return nil
	}
	if turnEnds && st.state != Succeeded && st.state != Skipped {
		st.reason = turnReason(st.reason, s.step.Block)
	}
	c.settleEnd(day, lane, row.Seq, &st, s.step.DeadLetter)
	if turnEnds {
		c.endTurn(lane, row.Seq, &st, &next, s.step.Block)
	}
	return nil
}

// settleEnd writes how a delivery has ended, and who gets its event then if not nobody.
func (c *commit) settleEnd(day dayKey, lane LaneKey, seq uint64, st *standing, letter *DeadLetter) {
	st.complete = InstantOf(c.at)
	c.putStanding(day, lane, seq, st)
	if st.state != Succeeded {
		c.bury(day, lane, seq, st.state)
		c.deadLetter(lane, seq, st, letter)
	}
	c.open(lane, -1, st.job)
}

// history counts the attempt of a settle. One that did not succeed gets a record of its own with its bodies, which
// later attempts do not overwrite. It returns the latest attempt that ended, which without one of now is on record.
func (c *commit) history(day dayKey, lane LaneKey, seq uint64, pr *progress, s *settle) (*Attempt, error) {
	p := c.p
	if s.attempt == nil {
		if pr.attempts == 0 {
			return nil, nil
		}
		var last *Attempt
		_, err := p.j.get(c.r, appendDeliveryKey(nil, p.number, day, lane, seq), func(value []byte) error {
			st, err := decodeStanding(value)
			last = st.last
			return err
		})
		return last, err
	}
	if pr.attempts++; s.attempt.Number > 0 {
		pr.attempts = s.attempt.Number
	}
	a := s.attempt
	if a.Number != pr.attempts {
		renumbered := *a
		renumbered.Number = pr.attempts
		a = &renumbered
	}
	if s.step.State != Succeeded {
		c.putAttempt(day, lane, seq, a)
	}
	return a, nil
}

func (c *commit) putAttempt(day dayKey, lane LaneKey, seq uint64, a *Attempt) {
	p := c.p
	p.key = appendAttemptKey(p.key[:0], p.number, day, lane, seq, a.Number)
	p.value = encodeAttempt(p.value[:0], a)
	c.set(p.key, p.value)
	if cap(p.value) > 1<<20 {
		p.value = nil
	}
}

// bury notes that a delivery has ended without success.
func (c *commit) bury(day dayKey, lane LaneKey, seq uint64, state State) {
	c.p.key = appendDeadKey(c.p.key[:0], c.p.number, day, lane, seq)
	c.p.value = encodeDead(c.p.value[:0], dead{InstantOf(c.at), state})
	c.set(c.p.key, c.p.value)
}

func (c *commit) unbury(day dayKey, lane LaneKey, seq uint64) {
	c.p.key = appendDeadKey(c.p.key[:0], c.p.number, day, lane, seq)
	c.delete(c.p.key)
}

// settleStale handles a settle of a delivery that a caller has changed since the job was made: what the caller
// asked for stands, and the attempt is kept as history. A success wins over a retry.
func (c *commit) settleStale(day dayKey, lane LaneKey, s *settle) error {
	at, err := c.p.find(c.r, lane, s.job.ID.Seq)
	if err != nil || at == nil || s.attempt == nil {
		return err // dropped with its namespace, or retained no longer
	}
	own := *s
	own.attempt = new(Attempt)
	*own.attempt = *s.attempt
	own.attempt.Number = 0
	purged, err := c.p.purgedOf(c.r, lane.Namespace, at.eventSeq())
	if err != nil {
		return err
	}
	if purged {
		own.attempt.strip()
	}
	if at.open && s.step.State == Succeeded {
		return c.settleOpen(lane, at, &own)
	}
	if !at.open && at.last != nil && at.last.Outcome == OutcomeSucceeded {
		c.putAttempt(at.day, lane, s.job.ID.Seq, at.last) // it is the latest no more, and has no record of its own
	}
	st := at.standing
	own.step.State = Cancelled // anything that keeps the attempt as a record of its own
	if st.last, err = c.history(day, lane, s.job.ID.Seq, &st.progress, &own); err != nil {
		return err
	}
	st.attempted = true
	if !at.open {
		c.putStanding(at.day, lane, s.job.ID.Seq, &st)
		return nil
	}
	if at.waits {
		at.standing = st
		c.requeue(lane, at)
		return nil
	}
	// The row moves, so that it knows of the attempt.
	c.supersede(lane, at.row)
	c.dropRow(lane, at.row)
	st.epoch++
	st.state, st.due = Scheduled, max(at.row.Due+1, InstantOf(c.at))
	c.putStanding(at.day, lane, s.job.ID.Seq, &st)
	c.putTimer(lane, Row{Timer, st.due, s.job.ID.Seq, st.epoch}, &st.progress)
	return nil
}

// settleOpen ends, with a success that came late, a delivery that is open as another row.
func (c *commit) settleOpen(lane LaneKey, at *place, s *settle) error {
	if !at.waits {
		c.supersede(lane, at.row)
		return c.settleRow(at.day, lane, at.row, at.progress, s)
	}
	st := standing{progress: at.progress, state: Succeeded}
	var err error
	if st.last, err = c.history(at.day, lane, at.row.Seq, &st.progress, s); err != nil {
		return err
	}
	st.manual, st.attempted = false, true
	c.dropBlocked(lane, at.order, at.row.Seq)
	c.settleEnd(at.day, lane, at.row.Seq, &st, nil)
	c.settled++
	return nil
}

// supersede has the follower know that a row goes by a caller's hand.
func (c *commit) supersede(lane LaneKey, row Row) {
	c.edited = true
	c.steps = append(c.steps, step{edited: true, lane: lane, row: row})
}

// failing is a note of since when a lane's target has been failing; the zero time is none.
type failing struct {
	lane  LaneKey
	since time.Time
}

// failingHome is the partition that keeps a lane's note.
func (j *Journal) failingHome(lane LaneKey) *partition {
	h := (uint64(lane.Subscription) ^ uint64(lane.Namespace)) * 0x9e3779b97f4a7c15
	return j.partitions[h>>32%uint64(len(j.partitions))]
}

// SetFailing notes since when a lane's target has been failing without a success; the zero time says that it is
// not. It is durable within 100 ms.
func (j *Journal) SetFailing(lane LaneKey, since time.Time) {
	j.failingHome(lane).queue(func(s *settle) { s.failing = &failing{lane, since} })
}

func (c *commit) noteFailing(f *failing) {
	p := c.p
	p.key = appendLane(p.key[:0], p.number, tagFailing, f.lane)
	if f.since.IsZero() {
		c.delete(p.key)
		return
	}
	w := newRecord(p.value[:0])
	w.time(f.since)
	p.value = w
	c.set(p.key, p.value)
}

// Failing reads the notes of SetFailing: one for each lane whose target has been failing.
func (j *Journal) Failing() (map[LaneKey]time.Time, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	notes := make(map[LaneKey]time.Time)
	for _, p := range j.partitions {
		prefix := appendTag(nil, p.number, tagFailing)
		err := j.scan(j.db, prefix, prefixEnd(prefix), func(key, value []byte) error {
			lane, ok := splitLane(key)
			d := readRecord(value)
			since := d.time()
			if !ok || d.err != nil {
				return j.corrupt(key, errBadKey)
			}
			notes[lane] = since
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return notes, nil
}
