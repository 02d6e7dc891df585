package delivery

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

const (
	// settleDelay is how long a settle waits for company; with a busy processor it stays below the
	// promised 20 ms.
	settleDelay = 10 * time.Millisecond
	// settleBatch settles are committed without waiting for more.
	settleBatch = 256
	// maxSettles bounds what waits while the disk is slow; Settle blocks above it.
	maxSettles = 1 << 15
	// syncDelay is how long a buffered commit waits for its sync; settleDelay and the sync itself come on
	// top and must stay below the promised 100 ms.
	syncDelay = 60 * time.Millisecond
	// A round takes no more appends than these.
	maxRoundEvents = 1024
	maxRoundBytes  = 4 << 20
)

// partition owns one partition's keys. Its committer goroutine is the only writer of them, so whatever it
// reads while it prepares a batch stays true until that batch is committed.
type partition struct {
	j     *Journal
	index uint16
	// handed is the highest sequence whose commit has returned. What lies above may be visible in Pebble
	// but may not be durable, so Backlog does not read it. It rises before onCommit is called: whoever is
	// told of a job can read it, and may have read it already.
	handed atomic.Uint64
	// reopened counts changes that make final deliveries open again; Retain starts over when it moves.
	reopened atomic.Uint64
	filter   *idFilter
	wake     chan struct{}
	timer    *time.Timer

	mu      sync.Mutex
	room    sync.Cond // settles has shrunk
	appends []appendPart
	settles []settle
	edits   []edit
	// settling is set while settles that have left the queue are not visible yet.
	settling bool
	since    time.Time // when the first of settles came
	closing  bool

	committer
}

// committer is what only the committer goroutine touches.
type committer struct {
	lastSeq  uint64
	spare    []settle
	parts    []appendPart
	jobs     []*Job
	timers   []laneTimer
	seen     map[eventKey]*Event
	now      time.Time
	key      []byte
	event    storev1.EventRecord
	delivery storev1.DeliveryRecord
	attempt  storev1.AttemptRecord
	idem     storev1.IdempotencyRecord
	edited   editedSet
	// lastSpace saves a look at the set of namespaces for most events.
	lastSpace string
}

type eventKey struct{ namespace, id string }

// laneTimer is a timer that an append made.
type laneTimer struct {
	lane LaneKey
	due  time.Time
}

// edit is a change that reads before it writes, run by the committer. A nil run only waits for the
// settles before it.
type edit struct {
	run  func() error
	done chan error
}

// work is what one round takes.
type work struct {
	appends []appendPart
	settles []settle
	edits   []edit
}

func newPartition(j *Journal, index uint16, lastSeq uint64) *partition {
	p := &partition{j: j, index: index, filter: newIDFilter(), wake: make(chan struct{}, 1)}
	p.room.L = &p.mu
	p.lastSeq = lastSeq
	p.handed.Store(lastSeq)
	p.seen = make(map[eventKey]*Event)
	p.timer = time.AfterFunc(time.Hour, p.signal)
	p.timer.Stop()
	return p
}

func (p *partition) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run commits until the partition is closed and nothing is left.
func (p *partition) run() {
	for {
		w, ok := p.take()
		if !ok {
			return
		}
		p.round(w)
	}
}

// take waits for work. Settles wait for company unless something else is to be committed.
func (p *partition) take() (work, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		due := len(p.settles) >= settleBatch || len(p.settles) > 0 && time.Since(p.since) >= settleDelay
		if due || len(p.appends) > 0 || len(p.edits) > 0 || p.closing {
			break
		}
		p.mu.Unlock()
		<-p.wake
		p.mu.Lock()
	}
	w := work{appends: p.takeAppends(), settles: p.settles, edits: p.edits}
	p.settles, p.spare = p.spare, nil
	p.edits = nil
	p.settling = len(w.settles) > 0
	p.room.Broadcast()
	return w, len(w.appends)+len(w.settles)+len(w.edits) > 0 || !p.closing
}

// takeAppends moves as many waiting appends as fit a round to p.parts.
func (p *partition) takeAppends() []appendPart {
	var n, events, bytes int
	for n < len(p.appends) && events < maxRoundEvents && bytes < maxRoundBytes {
		events += len(p.appends[n].entries)
		bytes += p.appends[n].bytes
		n++
	}
	p.parts = append(p.parts[:0], p.appends[:n]...)
	left := copy(p.appends, p.appends[n:])
	clear(p.appends[left:])
	p.appends = p.appends[:left]
	return p.parts
}

// round makes one batch of all appends and settles, commits it, hands the fresh jobs over, answers the
// appends and then runs the edits.
func (p *partition) round(w work) {
	p.now = p.j.now()
	if len(w.appends)+len(w.settles) > 0 {
		b := p.j.db.NewBatchWithSize(batchSize(w))
		for i := range w.settles {
			p.applySettle(b, &w.settles[i])
		}
		fresh := p.applyAppends(b, w.appends)
		p.commit(b, fresh)
		p.handed.Store(p.lastSeq)
	}
	p.recycle(w.settles)
	if len(p.jobs) > 0 {
		jobs := p.jobs
		p.jobs = nil // onCommit keeps the slice
		p.j.onCommit(jobs)
	}
	for _, t := range p.timers {
		p.j.onTimer(t.lane, p.index, t.due)
	}
	p.timers = p.timers[:0]
	for i := range w.appends {
		w.appends[i].call.finish()
	}
	clear(w.appends)
	p.runEdits(w.edits)
}

func batchSize(w work) int {
	size := 256 + 256*len(w.settles)
	for i := range w.appends {
		size += w.appends[i].bytes + 512*len(w.appends[i].entries)
	}
	return size
}

// recycle gives the settles' memory back to the queue.
func (p *partition) recycle(settles []settle) {
	clear(settles)
	if cap(settles) > 4*settleBatch {
		settles = nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spare = settles[:0]
	p.settling = false
}

// runEdits runs edits in order, each in a batch of its own so that it sees those before it, and syncs once.
func (p *partition) runEdits(edits []edit) {
	wrote := p.j.written.Load()
	errs := make([]error, len(edits))
	for i, e := range edits {
		if e.run != nil {
			errs[i] = e.run()
		}
	}
	if p.j.written.Load() != wrote {
		p.j.syncWAL()
	}
	for i, e := range edits {
		e.done <- errs[i]
	}
}

// commit is the only way in which anything is written once the journal has been opened: one batch of one
// partition. When it returns the batch is visible, and durable if sync is set. A replicated journal
// appends the batch to its log here. It does not fail: an error that leaves open what the disk holds
// ends the process.
func (p *partition) commit(b *pebble.Batch, sync bool) {
	if b.Empty() {
		_ = b.Close()
		return
	}
	written := p.j.written.Load()
	opts := pebble.NoSync
	if sync {
		opts = pebble.Sync
	}
	start := time.Now()
	if err := b.Commit(opts); err != nil {
		p.j.die("commit: " + err.Error())
	}
	_ = b.Close()
	if sync {
		p.j.metrics.synced(time.Since(start))
		p.j.nowSynced(written)
		return
	}
	p.j.metrics.buffered.Add(1)
	p.j.written.Add(1)
	select {
	case p.j.dirty <- struct{}{}:
	default:
	}
}

// do runs an edit on the committer goroutine and waits for it to be durable. When ctx ends first the edit
// may still be made.
func (p *partition) do(ctx context.Context, run func() error) error {
	done := make(chan error, 1)
	p.mu.Lock()
	if p.closing || !p.j.started.Load() {
		p.mu.Unlock()
		return ErrClosed
	}
	p.edits = append(p.edits, edit{run: run, done: done})
	p.mu.Unlock()
	p.signal()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// barrier waits until all settles made before it are visible; it costs nothing when there are none.
func (p *partition) barrier(ctx context.Context) error {
	p.mu.Lock()
	idle := len(p.settles) == 0 && !p.settling
	p.mu.Unlock()
	if idle {
		return nil
	}
	return p.do(ctx, nil)
}

// close lets the committer end once it has done what waits.
func (p *partition) close() {
	p.mu.Lock()
	p.closing = true
	p.room.Broadcast()
	p.mu.Unlock()
	p.timer.Stop()
	p.signal()
}

// nowSynced notes that the first n buffered commits are durable.
func (j *Journal) nowSynced(n uint64) {
	for {
		old := j.synced.Load()
		if old >= n || j.synced.CompareAndSwap(old, n) {
			return
		}
	}
}

// syncWAL makes all buffered commits durable. The log is one file, so syncing any later record will do.
func (j *Journal) syncWAL() {
	n := j.written.Load()
	if j.synced.Load() >= n {
		return
	}
	if err := j.db.LogData([]byte("sync"), pebble.Sync); err != nil {
		j.die("sync: " + err.Error())
	}
	j.nowSynced(n)
}

// syncLoop keeps buffered commits from staying unsynced for longer than syncDelay.
func (j *Journal) syncLoop() {
	for {
		select {
		case <-j.stop:
			return
		case <-j.dirty:
		}
		timer := time.NewTimer(syncDelay)
		select {
		case <-j.stop:
			timer.Stop()
			return
		case <-timer.C:
		}
		j.syncWAL()
	}
}

// Flush returns when all settles made before it are durable and visible.
func (j *Journal) Flush(ctx context.Context) error {
	for _, p := range j.partitions {
		if err := p.barrier(ctx); err != nil {
			return err
		}
	}
	j.syncWAL()
	return nil
}
