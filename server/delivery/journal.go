package delivery

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

// Errors of the journal. Results may wrap them.
var (
	// ErrClosed says that the journal has been closed or not been started.
	ErrClosed = errors.New("journal is closed")
	// ErrDiskFull says that no more events are taken until there is room on the disk.
	ErrDiskFull = errors.New("journal's disk is full")
	// ErrEventConflict says that another event was accepted with this id.
	ErrEventConflict = errors.New("another event was accepted with this id")
	// ErrInvalidEvent says that an event cannot be stored as it is.
	ErrInvalidEvent = errors.New("event cannot be stored")
	// ErrNotFound says that there is no such event or delivery, or no longer.
	ErrNotFound = errors.New("not found in the journal")
	// ErrFinal says that the delivery has ended otherwise.
	ErrFinal = errors.New("delivery is final")
	// ErrInvalidState says that the delivery is not in a state that allows the change.
	ErrInvalidState = errors.New("delivery's state does not allow this")
	// ErrInvalidCursor says that a cursor was not made by the journal.
	ErrInvalidCursor = errors.New("cursor is not valid")
)

// CorruptError names the record that cannot be read. It is never skipped over.
type CorruptError struct {
	// Dir is the journal's directory.
	Dir string
	// Key is the record's key in readable form.
	Key string
	// Reason says what is wrong with it.
	Reason error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("journal %s: record %s: %v", e.Dir, e.Key, e.Reason)
}

// Unwrap returns the reason.
func (e *CorruptError) Unwrap() error { return e.Reason }

// Options of a Journal. Dir is required.
type Options struct {
	// Dir is the journal's own directory; it is made when missing.
	Dir string
	// Partitions is fixed when the journal is made; 0 means 16, or whatever an existing journal has.
	Partitions int
	// CacheBytes bounds the cache of what is on disk; 0 means 64 MiB.
	CacheBytes int64
	// MemTableBytes is the size at which what was written goes to a table on disk. Up to four times as much is
	// held in memory. 0 means 32 MiB.
	MemTableBytes int64
	// Space is the watch over a disk that the journal shares with other stores; it goes on from Start to Close.
	// Nil makes one of the journal's own out of the two fields that follow.
	Space *Space
	// MinFreeBytes is the free space below which Append is refused. 0 means 256 MiB, or a tenth of
	// the volume where that is less; below 0 means no watermark.
	MinFreeBytes int64
	// BallastBytes is kept in a file that is given up when the disk runs full nevertheless, so that
	// deliveries and deletions go on. 0 means 64 MiB, or a quarter of MinFreeBytes where that is
	// less; below 0 means none.
	BallastBytes int64
	// Logger is required to be told of trouble; nil discards.
	Logger *slog.Logger
	// Registerer takes the journal's metrics; nil means none.
	Registerer prometheus.Registerer
	// Fatal is called when the journal can no longer promise anything, such as after a failed sync. It
	// must not return; nil ends the process with status 70.
	Fatal func(reason string)

	fs  vfs.FS           // tests
	now func() time.Time // tests
}

// Sink takes the result of an attempt, exactly once, from any goroutine.
type Sink interface {
	Complete(*Job, Result)
}

// AppendResult says what became of one event of an Append.
type AppendResult struct {
	// Event is the stored event. For a duplicate it is the original, whose Targets may have lost
	// everything but their number once the original is no longer retained. Nil with Err.
	Event *Event
	// Duplicate says that the same event had been accepted before and nothing was queued.
	Duplicate bool
	Err       error
}

// LaneState is what recovery needs to know about one subscription's queue in one partition.
type LaneState struct {
	Lane      LaneKey
	Partition uint16
	// From is a sequence below which nothing of the FIFO is Pending; 0 means nothing is.
	From uint64
	// NextDue is the due time of the first timer; zero means none.
	NextDue time.Time
}

const (
	// layoutFormat is the version of the key layout; a journal of another one is refused.
	layoutFormat      = 1
	defaultPartitions = 16
	defaultCacheBytes = 64 << 20
	exitBroken        = 70
)

// Journal is the durable log and index of events, deliveries and attempts. All methods may be called
// concurrently.
type Journal struct {
	dir        string
	id         [5]byte
	db         *pebble.DB
	log        *slog.Logger
	now        func() time.Time
	fatal      func(string)
	partitions []*partition
	space      *Space
	metrics    *metrics
	counts     *counters
	opened     *pebble.Snapshot // what was there at Open; counted after Start
	onCommit   func([]*Job)
	onTimer    func(LaneKey, uint16, time.Time)
	started    atomic.Bool

	// written counts buffered commits, synced those that are known to be durable.
	written, synced atomic.Uint64
	dirty           chan struct{}
	stop            chan struct{}
	committers      sync.WaitGroup
	background      sync.WaitGroup

	// gate is held for reading by every method that reads the database, and taken by Close.
	gate   sync.RWMutex
	closed bool

	spaceMu sync.RWMutex
	spaces  map[string]struct{} // namespaces that have or had events
}

// Open opens the journal in Options.Dir, or makes one, and replays what a crash left in its log; no repair is
// ever needed. It refuses a journal of an unknown format. It pairs with Close. Reading works from here on,
// everything else once Start has been called.
func Open(o Options) (*Journal, error) {
	j := newJournal(&o)
	if o.Dir == "" {
		return nil, errors.New("open journal: no directory")
	}
	if o.Partitions < 0 || o.Partitions > maxPartitions {
		return nil, fmt.Errorf("open journal: %d partitions; 1 to %d are possible", o.Partitions, maxPartitions)
	}
	if err := o.fs.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	j.space = newSpace(o, j.log)
	db, err := pebble.Open(o.Dir, j.pebbleOptions(o))
	if err != nil {
		return nil, fmt.Errorf("open journal %s: %w", o.Dir, err)
	}
	j.db = db
	if err := j.load(o); err != nil {
		return nil, errors.Join(fmt.Errorf("open journal %s: %w", o.Dir, err), db.Close())
	}
	if err := j.metrics.register(o.Registerer, j); err != nil {
		return nil, errors.Join(fmt.Errorf("open journal: %w", err), db.Close())
	}
	j.space.fillBallast()
	j.opened = db.NewSnapshot()
	return j, nil
}

func newJournal(o *Options) *Journal {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.fs == nil {
		o.fs = vfs.Default
	}
	if o.now == nil {
		o.now = time.Now
	}
	if o.CacheBytes <= 0 {
		o.CacheBytes = defaultCacheBytes
	}
	if o.MemTableBytes <= 0 {
		o.MemTableBytes = defaultMemTableBytes
	}
	if o.Fatal == nil {
		o.Fatal = func(string) { os.Exit(exitBroken) }
	}
	return &Journal{
		dir: o.Dir, log: o.Logger.With("component", "journal"), now: o.now, fatal: o.Fatal,
		metrics: newMetrics(), counts: newCounters(), spaces: make(map[string]struct{}),
		dirty: make(chan struct{}, 1), stop: make(chan struct{}),
		onTimer: func(LaneKey, uint16, time.Time) {},
	}
}

// load reads or makes the meta record and finds where each partition stands.
func (j *Journal) load(o Options) error {
	meta, err := j.meta(o.Partitions)
	if err != nil {
		return err
	}
	if o.Partitions != 0 && o.Partitions != int(meta.GetPartitions()) {
		return fmt.Errorf("it was made with %d partitions, which is for good, and cannot be opened with %d: leave the number out", meta.GetPartitions(), o.Partitions)
	}
	copy(j.id[:], meta.GetJournalId())
	for i := range meta.GetPartitions() {
		last, err := j.recoverPartition(uint16(i))
		if err != nil {
			return err
		}
		j.partitions = append(j.partitions, newPartition(j, uint16(i), last))
	}
	return nil
}

// meta reads the meta record, and writes one into an empty database.
func (j *Journal) meta(partitions int) (*storev1.MetaRecord, error) {
	var meta storev1.MetaRecord
	err := j.get(metaKey(), &meta)
	if err == nil {
		switch n := meta.GetPartitions(); {
		case meta.GetFormat() != layoutFormat:
			return nil, j.corrupt(metaKey(), fmt.Errorf("format %d is not known to this release", meta.GetFormat()))
		case n == 0 || n > maxPartitions || len(meta.GetJournalId()) != len(j.id):
			return nil, j.corrupt(metaKey(), errors.New("record makes no sense"))
		}
		return &meta, nil
	}
	if !errors.Is(err, ErrNotFound) {
		return nil, err
	}
	if err := j.scan(j.db, nil, nil, func(key, _ []byte) error {
		return j.corrupt(metaKey(), fmt.Errorf("record is missing, but there is %s", keyText(key)))
	}); err != nil {
		return nil, err
	}
	if partitions == 0 {
		partitions = defaultPartitions
	}
	_, _ = rand.Read(j.id[:]) // never fails
	meta.Format, meta.Partitions, meta.JournalId = layoutFormat, uint32(partitions), j.id[:]
	b := j.db.NewBatch()
	putRecord(b, metaKey(), &meta)
	if err := b.Commit(pebble.Sync); err != nil {
		return nil, err
	}
	return &meta, b.Close()
}

// recoverPartition finds the highest sequence given so far, and the namespaces.
func (j *Journal) recoverPartition(partition uint16) (last uint64, err error) {
	var rec storev1.PartitionRecord
	if err := j.get(appendTag(nil, partition, tagPartition), &rec); err != nil && !errors.Is(err, ErrNotFound) {
		return 0, err
	}
	last = rec.GetLastSeq()
	prefix := appendTag(nil, partition, tagEvent)
	it, err := j.db.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: prefixEnd(prefix)})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; {
		name, _, valid := splitName(it.Key()[bodyOffset:])
		if !valid {
			return 0, j.corrupt(it.Key(), errBadKey)
		}
		j.addSpace(name)
		end := prefixEnd(appendSpace(nil, partition, tagEvent, name))
		if it.SeekLT(end) {
			seq, valid := lastSeqOf(it.Key())
			if !valid {
				return 0, j.corrupt(it.Key(), errBadKey)
			}
			last = max(last, seq)
		}
		ok = it.SeekGE(end)
	}
	return last, it.Error()
}

// Start begins to take work. onCommit gets the jobs of fresh deliveries that are due, of one partition and in
// order of sequence, once they are durable. It is called by the partition's committer and must neither block
// nor call Backlog, Timers, Flush or an edit. OnTimer, where wanted, comes before Start. Call it once.
func (j *Journal) Start(onCommit func([]*Job)) {
	j.onCommit = onCommit
	j.started.Store(true)
	for _, p := range j.partitions {
		j.committers.Go(p.run)
	}
	snapshot := j.opened
	j.opened = nil
	j.background.Go(func() {
		j.loadFilters(snapshot)
		j.countOpen(snapshot)
	})
	j.background.Go(j.syncLoop)
	j.background.Go(func() { j.space.watch(j.stop) })
}

// OnTimer registers a function that is told of timers made by appends, for events with a delivery time, under
// the same rules as onCommit. Call it before Start.
func (j *Journal) OnTimer(f func(lane LaneKey, partition uint16, due time.Time)) { j.onTimer = f }

// Partitions is how many there are.
func (j *Journal) Partitions() int { return len(j.partitions) }

// ID tells this journal from every other: ten hexadecimal digits, drawn when it was made.
func (j *Journal) ID() string { return hex.EncodeToString(j.id[:]) }

// Close does what has been queued, makes it durable and closes the journal. Everything afterwards gets
// ErrClosed. Only the first call does anything.
func (j *Journal) Close() error {
	for _, p := range j.partitions {
		p.close()
	}
	j.committers.Wait()
	j.gate.Lock()
	defer j.gate.Unlock()
	if j.closed {
		return nil
	}
	j.closed = true
	close(j.stop)
	j.background.Wait()
	j.metrics.unregister()
	var err error
	if j.opened != nil {
		err = j.opened.Close()
	}
	j.syncWAL()
	if err = errors.Join(err, j.db.Close()); err != nil {
		return fmt.Errorf("close journal: %w", err)
	}
	return nil
}

// enter keeps the database open until the returned function is called.
func (j *Journal) enter() (leave func(), err error) {
	j.gate.RLock()
	if j.closed {
		j.gate.RUnlock()
		return nil, ErrClosed
	}
	return j.gate.RUnlock, nil
}

func (j *Journal) stopped() bool {
	select {
	case <-j.stop:
		return true
	default:
		return false
	}
}

// die ends the process; the goroutine that found out goes no further in any case.
func (j *Journal) die(reason string) {
	j.log.Error("journal cannot go on", "err", reason)
	j.fatal(reason)
	select {}
}

func (j *Journal) addSpace(name string) {
	j.spaceMu.RLock()
	_, known := j.spaces[name]
	j.spaceMu.RUnlock()
	if known {
		return
	}
	j.spaceMu.Lock()
	defer j.spaceMu.Unlock()
	j.spaces[name] = struct{}{}
}

// spaceNames are the namespaces that have or had events.
func (j *Journal) spaceNames() []string {
	j.spaceMu.RLock()
	defer j.spaceMu.RUnlock()
	names := make([]string, 0, len(j.spaces))
	for name := range j.spaces {
		names = append(names, name)
	}
	return names
}

// get reads a record; ErrNotFound when there is none.
func (j *Journal) get(key []byte, m proto.Message) error { return j.getIn(j.db, key, m) }

func (j *Journal) getIn(r pebble.Reader, key []byte, m proto.Message) error {
	value, closer, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("journal %s: read %s: %w", j.dir, keyText(key), err)
	}
	defer closer.Close()
	return j.decode(key, value, m)
}

// scan visits the keys in [lower, upper) in order; key and value are valid during the visit only.
func (j *Journal) scan(r pebble.Reader, lower, upper []byte, visit func(key, value []byte) error) (err error) {
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		if err := visit(it.Key(), value); err != nil {
			return err
		}
	}
	return it.Error()
}
