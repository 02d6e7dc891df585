package delivery

import (
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/grapnel/grapnel/server/delivery/highwater"
)

// A commit is how a partition changes: prepared, appended to the log, applied. Preparing reads what has been
// applied and changes nothing, so that a commit that the log refuses leaves no trace. All that the commit will have
// done beside its batch, in memory and to those who wait, is kept as its effects until it is applied.
type commit struct {
	p     *partition
	index Commit
	at    time.Time
	batch *pebble.Batch
	// r shows the partition with what has been prepared so far; only where there are edits, settles that may come after
	// one, or dead letters that wait for the turns of ordering keys.
	r pebble.Reader
	// firm: durable before anybody learns of it. Else it is visible at once and durable within 100 ms; losing it
	// only repeats attempts.
	firm bool
	// turns of ordering keys; nil while there are none to give.
	turns *turns
	effects
}

// effects of a commit.
type effects struct {
	lastSeq   uint64
	edited    bool      // a caller changed something
	memory    *memory   // replaced
	sweeping  *sweeping // replaced
	stored    []Publication
	ids       []uint64 // for the filter
	outcomes  []outcome
	steps     []step
	opened    []openChange
	news      []news // of namespaces that are watched
	answers   []answer
	settled   uint64
	duplicate uint64
	refused   uint64
}

// outcome is what an Append is to be told of one event.
type outcome struct {
	to *AppendResult
	AppendResult
}

// step is what the follower is to be told, in order.
type step struct {
	settled Settled // or, where nil
	edited  bool    // Edited, else Timed
	lane    LaneKey
	row     Row
}

// openChange changes how many deliveries of a lane are open.
type openChange struct {
	lane LaneKey
	by   int64
	job  uint64 // the replay that they are of; 0 for none
}

type answer struct {
	to  chan error
	err error
}

// prepare makes the commit of a round: settles, then edits, then appends, each seeing those before it. What is
// appended comes last because its jobs are settled without a look: nothing may have changed them.
func (p *partition) prepare(w work) *commit {
	c := &commit{p: p, index: p.index + 1, at: p.j.now(), r: p.j.db}
	c.lastSeq = p.lastSeq
	if size := batchSize(w); len(w.edits) > 0 || p.edited(w.settles) || takeTurns(w.settles) {
		c.batch = p.j.db.NewIndexedBatchWithSize(size)
		c.r = c.batch
	} else {
		c.batch = p.j.db.NewBatchWithSize(size)
	}
	for i := range w.settles {
		c.settle(&w.settles[i])
	}
	for _, e := range w.edits {
		c.answers = append(c.answers, answer{e.done, e.run(c)})
	}
	c.publish(w.appends)
	c.endTurns()
	c.firm = c.firm || len(c.stored) > 0
	c.putNews()
	if c.memory != nil {
		p.value = encodeMemory(p.value[:0], c.memory)
		c.set(appendTag(p.key[:0], p.number, tagPartition), p.value)
	}
	if !c.batch.Empty() {
		p.value = encodeCommitMark(p.value[:0], commitMark{c.index, c.lastSeq, InstantOf(c.at)})
		c.set(appendTag(p.key[:0], p.number, tagCommit), p.value)
	}
	return c
}

// edited reports whether a caller may have changed what is to be settled.
func (p *partition) edited(settles []settle) bool {
	for i := range settles {
		if settles[i].failing == nil && settles[i].job.AsOf < p.lastEdit {
			return true
		}
	}
	return false
}

// takeTurns reports whether settles make dead letters for ordered subscriptions.
func takeTurns(settles []settle) bool {
	for i := range settles {
		if to := settles[i].step.DeadLetter; to != nil && to.To.Ordered {
			return true
		}
	}
	return false
}

func batchSize(w work) int {
	size := 256 + 192*len(w.settles)
	for i := range w.appends {
		size += w.appends[i].bytes
	}
	return size
}

// append hands the commit to the replicated log, where there is one, and reports whether it stands. A single node
// has none: its Pebble is the log.
func (p *partition) append(*commit) bool {
	return p.j.refuse == nil || !p.j.refuse(p.number)
}

// apply makes the commit visible, and durable if it is firm, then has its effects happen. It does not fail: an
// error that leaves open what the disk holds ends the process.
func (p *partition) apply(c *commit) {
	for i := range c.stored {
		e := c.stored[i].Event
		if p.events.add(e) != e {
			p.j.die("two events have the sequence " + eventUID(p.j.id, p.number, e.Seq))
		}
	}
	if !c.batch.Empty() {
		p.visible.Lock()
		p.write(c)
		p.index, p.appliedSeq = c.index, c.lastSeq
		p.visible.Unlock()
		p.shown.Store(uint64(c.index))
	}
	_ = c.batch.Close()
	p.lastSeq = c.lastSeq
	if c.edited {
		p.lastEdit = c.index
	}
	if c.memory != nil {
		p.memory = *c.memory
		p.swept.Store(&c.memory.swept)
		p.keyed.Store(c.memory.keyed)
	}
	if c.sweeping != nil {
		p.sweeping = c.sweeping
	}
	p.ids.turn(dayOf(c.lastSeq))
	for _, id := range c.ids {
		p.ids.add(id)
	}
	p.j.counts.apply(c)
	p.j.metrics.applied(c)
	p.j.watches.applied(c)
	p.tell(c)
	for i := range c.outcomes {
		*c.outcomes[i].to = c.outcomes[i].AppendResult
	}
	for i := range p.parts {
		p.parts[i].call.finish()
	}
	clear(p.parts)
	p.parts = p.parts[:0]
	for _, a := range c.answers {
		a.to <- a.err
	}
}

// write is the only place where anything is written once the partition has been started.
func (p *partition) write(c *commit) {
	opts := pebble.NoSync
	if c.firm {
		opts = pebble.Sync
	}
	p.j.still.RLock()
	defer p.j.still.RUnlock()
	written := p.j.syncs.written.Load()
	start := p.j.syncs.begin(c.firm)
	if err := c.batch.Commit(opts); err != nil {
		p.j.die("commit: " + err.Error())
	}
	if c.firm {
		p.j.syncs.end(start)
		p.j.metrics.synced(time.Since(start))
		p.j.syncs.done(written)
		p.j.durable(p.number, highwater.Mark{Commit: uint64(c.index), Seq: c.lastSeq, Log: p.j.logNumber.Load()})
		return
	}
	p.j.metrics.buffered.Add(1)
	p.j.syncs.buffered()
}

// maxOffer bounds the jobs that are offered at once, and so the memory that a large event's take.
const maxOffer = 1024

// tell has the follower know, in order: rows that were settled or edited, then fresh ones.
func (p *partition) tell(c *commit) {
	for i := range c.steps {
		switch s := &c.steps[i]; {
		case s.settled != nil:
			s.settled.Settled(c.index)
		case s.edited:
			p.j.follower.Edited(c.index, s.lane, p.number, s.row.Seq, s.row.Epoch)
		default:
			p.j.follower.Timed(c.index, s.lane, p.number, s.row)
		}
	}
	for i := range c.stored {
		p.offer(c, &c.stored[i])
	}
	p.flush(c)
	for i := range c.stored {
		p.events.release(c.stored[i].Event)
	}
}

// offer collects the jobs of a stored event, and tells of its timers.
func (p *partition) offer(c *commit, pub *Publication) {
	e := pub.Event
	start, deferred := startOf(e)
	order := orderKeyOf(e.OrderingKey)
	for i := range pub.Targets {
		t := &pub.Targets[i]
		if t.Skip || c.turns.has(t) {
			continue
		}
		key := t.UID.SubscriptionKey()
		if deferred {
			p.j.follower.Timed(c.index, LaneKey{e.Namespace, key}, p.number, Row{Timer, InstantOf(start), e.Seq, 1})
			continue
		}
		p.jobs = append(p.jobs, Job{
			ID: ID{e.Seq, p.number, key}, Event: e, Epoch: 1, AsOf: c.index,
			MaxAttempts: max(t.MaxAttempts, 1), Expire: start.Add(maxAge(t.MaxAge, e.TTL)), Order: t.order(order),
		})
		if len(p.jobs) == maxOffer {
			p.flush(c)
		}
	}
}

func (p *partition) flush(c *commit) {
	if len(p.jobs) > 0 {
		p.j.follower.Offer(c.index, p.jobs)
		clear(p.jobs)
		p.jobs = p.jobs[:0]
	}
}

// drop forgets a refused commit: the settles wait for the next one, callers are told.
func (p *partition) drop(c *commit, w work) {
	_ = c.batch.Close()
	for i := range c.outcomes {
		*c.outcomes[i].to = AppendResult{Err: ErrRefused}
	}
	for i := range w.appends {
		w.appends[i].call.finish()
	}
	clear(w.appends)
	for _, e := range w.edits {
		e.done <- ErrRefused
	}
	p.mu.Lock()
	if !p.closing { // else they are made again after the next start
		p.settles = append(w.settles, p.settles...)
		p.since = time.Now()
	}
	wait := !p.closing
	p.mu.Unlock()
	if wait {
		time.Sleep(refusedPause)
		p.signal()
	}
}

func (c *commit) set(key, value []byte) {
	op := c.batch.SetDeferred(len(key), len(value))
	copy(op.Key, key)
	copy(op.Value, value)
	_ = op.Finish() // fails on keys only that the index of the batch cannot hold
}

func (c *commit) delete(key []byte) {
	op := c.batch.DeleteDeferred(len(key))
	copy(op.Key, key)
	_ = op.Finish()
}

// putRow adds an open row: a delivery that waits for its first attempt, or for a time.
func (c *commit) putRow(lane LaneKey, row Row, pr *progress) {
	p := c.p
	p.key = appendRow(p.key[:0], p.number, lane, row)
	p.value = encodeProgress(p.value[:0], pr)
	c.set(p.key, p.value)
}

// dropRow takes an open row away.
func (c *commit) dropRow(lane LaneKey, row Row) {
	c.p.key = appendRow(c.p.key[:0], c.p.number, lane, row)
	c.delete(c.p.key)
}

// putTimer adds a row that waits for a time, or whose turn has come, and has the follower told.
func (c *commit) putTimer(lane LaneKey, row Row, pr *progress) {
	c.putRow(lane, row, pr)
	c.steps = append(c.steps, step{lane: lane, row: row})
}

// putStanding writes where a delivery stands.
func (c *commit) putStanding(day dayKey, lane LaneKey, seq uint64, s *standing) {
	p := c.p
	p.key = appendDeliveryKey(p.key[:0], p.number, day, lane, seq)
	p.value = encodeStanding(p.value[:0], s)
	c.set(p.key, p.value)
	c.changed(lane, seq, s)
}

func (c *commit) open(lane LaneKey, by int64, job uint64) {
	c.opened = append(c.opened, openChange{lane, by, job})
}
