package delivery

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// settleDelay is how long a settle waits for company; with a busy processor it stays below the
	// promised 20 ms.
	settleDelay = 10 * time.Millisecond
	// settleBatch settles are committed without waiting for more.
	settleBatch = 256
	// maxSettles bounds what waits while the disk is slow; Settle blocks above it.
	maxSettles = 1 << 15
	// A round takes no more appends than these.
	maxRoundEvents = 1024
	maxRoundBytes  = 4 << 20
	// maxRoundEdits bounds the edits of a round, whose reads keep everything else waiting.
	maxRoundEdits = 256
	// refusedPause is how long a partition waits whose log has refused a commit.
	refusedPause = 20 * time.Millisecond
)

// partition owns one partition's keys. Its committer goroutine is the only writer of them, so whatever it
// reads while it prepares a commit stays true until that commit is applied.
type partition struct {
	j      *Journal
	number uint16
	// visible is held for reading while a snapshot is taken, and for writing while a commit becomes visible and, if
	// it is firm, durable: a snapshot holds exactly the commits up to index.
	visible sync.RWMutex
	index   Commit
	// appliedSeq is the newest sequence as of index.
	appliedSeq uint64
	// swept is memory.swept for readers; ahead is memory.ahead, which only load changes.
	swept atomic.Pointer[sweptDays]
	ahead aheadSpan
	keyed atomic.Bool // memory.keyed for readers
	// shown is index a moment later, for those who may not wait for a disk.
	shown  atomic.Uint64
	events eventTable
	ids    idFilter
	// retention belongs to the one sweep that runs.
	retention retention

	wake  chan struct{}
	timer *time.Timer

	mu      sync.Mutex
	room    sync.Cond // settles has shrunk
	appends []appendPart
	settles []settle
	edits   []edit
	since   time.Time // when the first of settles came
	closing bool

	committer
}

// committer is what only the committer goroutine touches.
type committer struct {
	memory  memory
	lastSeq uint64
	// lastEdit is the newest commit in which a caller changed something: who has read the partition since knows.
	lastEdit  Commit
	aheadDays []dayKey
	// sweeping is what a sweep of retention is about to erase; nil before the first.
	sweeping *sweeping

	spare      []settle
	parts      []appendPart
	jobs       []Job
	key, value []byte
}

// edit is a change that reads before it writes, prepared by the committer.
type edit struct {
	run  func(*commit) error
	done chan error
}

// work is what one round takes.
type work struct {
	appends []appendPart
	settles []settle
	edits   []edit
}

func newPartition(j *Journal, number uint16) *partition {
	p := &partition{j: j, number: number, wake: make(chan struct{}, 1)}
	p.room.L = &p.mu
	p.events.bytes = &j.eventBytes
	p.timer = time.AfterFunc(time.Hour, p.signal)
	p.timer.Stop()
	return p
}

// load finds where the partition stands.
func (p *partition) load() error {
	var mark commitMark
	if _, err := p.j.get(p.j.db, appendTag(nil, p.number, tagCommit), func(value []byte) (err error) {
		mark, err = decodeCommitMark(value)
		return err
	}); err != nil {
		return err
	}
	key := appendTag(nil, p.number, tagPartition)
	found, err := p.j.get(p.j.db, key, func(value []byte) (err error) {
		p.memory, err = decodeMemory(value)
		return err
	})
	if err != nil {
		return err
	}
	p.index, p.appliedSeq, p.lastSeq, p.lastEdit = mark.index, mark.lastSeq, mark.lastSeq, mark.index
	p.shown.Store(uint64(p.index))
	p.memory.journal = p.j.id
	swept := p.memory.swept
	p.swept.Store(&swept)
	p.keyed.Store(p.memory.keyed)
	healed, err := p.heal(p.j.now())
	if err != nil {
		return err
	}
	p.ahead = p.memory.ahead
	if found && !healed {
		return nil
	}
	return p.j.db.Set(key, encodeMemory(nil, &p.memory), pebble.Sync)
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

// round prepares what waits, appends it to the log, and applies it.
func (p *partition) round(w work) {
	c := p.prepare(w)
	if p.append(c) {
		p.apply(c)
		p.recycle(w.settles)
		return
	}
	p.drop(c, w)
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
	w := work{appends: p.takeAppends(), settles: p.settles, edits: p.takeEdits()}
	p.settles, p.spare = p.spare, nil
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

func (p *partition) takeEdits() []edit {
	n := min(len(p.edits), maxRoundEdits)
	edits := p.edits[:n:n]
	p.edits = p.edits[n:]
	if len(p.edits) == 0 {
		p.edits = nil
	}
	return edits
}

// recycle gives the settles' memory back to the queue.
func (p *partition) recycle(settles []settle) {
	clear(settles)
	if cap(settles) > 4*settleBatch {
		settles = nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.spare == nil {
		p.spare = settles[:0]
	}
}

// do has an edit prepared by the committer and waits for it to be durable. When ctx ends first the edit is made
// all the same, with all that follows from it.
func (p *partition) do(ctx context.Context, run func(*commit) error) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
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

// close lets the committer end once it has done what waits.
func (p *partition) close() {
	p.mu.Lock()
	p.closing = true
	p.room.Broadcast()
	p.mu.Unlock()
	p.timer.Stop()
	p.signal()
}

// snapshot is taken between two commits; upTo is the newest that it holds.
func (p *partition) snapshot() (s *pebble.Snapshot, upTo Commit) {
	p.visible.RLock()
	defer p.visible.RUnlock()
	return p.j.db.NewSnapshot(), p.index
}

// eachDay visits the days that have records, from one on, kept last.
func (p *partition) eachDay(r pebble.Reader, from dayKey, visit func(dayKey) error) error {
	lower, upper := appendDay(nil, p.number, from), prefixEnd(appendTag(nil, p.number, tagRecord))
	return p.j.hop(r, lower, upper, func(key []byte) ([]byte, error) {
		day, _, _, _, ok := splitRecord(key)
		if !ok {
			return nil, p.j.corrupt(key, errBadKey)
		}
		end := prefixEnd(key[:bodyOffset+2])
		return end, visit(day)
	})
}

// eachSpace visits the namespaces that have records of a day.
func (p *partition) eachSpace(r pebble.Reader, day dayKey, visit func(NamespaceKey) error) error {
	prefix := appendDay(nil, p.number, day)
	return p.j.hop(r, prefix, prefixEnd(prefix), func(key []byte) ([]byte, error) {
		_, ns, _, _, ok := splitRecord(key)
		if !ok {
			return nil, p.j.corrupt(key, errBadKey)
		}
		end := prefixEnd(key[:bodyOffset+2+8])
		return end, visit(ns)
	})
}
