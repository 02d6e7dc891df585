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

	"github.com/grapnel/grapnel/server/delivery/highwater"
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
	// ErrPurged says that the payload of the event has been purged.
	ErrPurged = errors.New("the event's payload has been purged")
	// ErrInvalidCursor says that a cursor was not made by the journal.
	ErrInvalidCursor = errors.New("cursor is not valid")
	// ErrStranger says that what was noted of a journal is about another one.
	ErrStranger = errors.New("another journal is expected")
	// ErrRefused says that a commit was refused, so that nothing of it has happened. It may be tried again.
	ErrRefused = errors.New("the journal's log refused the commit")
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

// Damaged reports whether an error says that a part of the journal is damaged, which another try does not change.
func Damaged(err error) bool {
	var corrupt *CorruptError
	return errors.As(err, &corrupt) || pebble.IsCorruptionError(err)
}

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
	// HighWater is the path of a file that remembers, apart from the journal, what of it is durable, so that a
	// start that finds less says so; empty means none. It belongs beside Dir, not into it.
	HighWater string
	// AcceptLoss starts a journal all the same that holds less than was acknowledged.
	AcceptLoss bool
	// Logger is required to be told of trouble; nil discards.
	Logger *slog.Logger
	// Registerer takes the journal's metrics; nil means none.
	Registerer prometheus.Registerer
	// Fatal is called when the journal can no longer promise anything, such as after a failed sync. It
	// must not return; nil ends the process with status 70.
	Fatal func(reason string)

	fs     vfs.FS                      // tests
	now    func() time.Time            // tests: the journal's clock
	refuse func(partition uint16) bool // tests: what a replicated log may do to a commit
}

// Sink takes the result of an attempt, exactly once, from any goroutine.
type Sink interface {
	Complete(*Job, Result)
}

// AppendResult says what became of one event of an Append.
type AppendResult struct {
	// Event is the stored event; for a duplicate the original, or what is known of it once it is no longer
	// retained. Nil with Err.
	Event *Event
	// Duplicate says that the same event had been accepted before and nothing was queued.
	Duplicate bool
	Err       error
}

const (
	// layoutFormat is the version of the key layout; a journal of another one is refused.
	layoutFormat      = 2
	defaultPartitions = 16
	defaultCacheBytes = 64 << 20
	exitBroken        = 70
)

// Journal is the durable log and index of events, deliveries and attempts. All methods may be called
// concurrently.
type Journal struct {
	dir        string
	fs         vfs.FS
	id         [idBytes]byte
	db         *pebble.DB
	log        *slog.Logger
	now        func() time.Time
	fatal      func(string)
	refuse     func(partition uint16) bool
	partitions []*partition
	space      *Space
	metrics    *metrics
	counts     *counters
	eventBytes atomic.Int64
	opened     *pebble.Snapshot // what was there at Open; counted after Start
	follower   Follower
	started    atomic.Bool
	syncs      syncs
	watches    *watches
	marks      *highwater.File // nil when nothing is to be remembered
	logNumber  atomic.Uint64   // of the write-ahead log that is written to
	still      sync.RWMutex    // read-locked to write, locked while the log is copied

	stop       chan struct{}
	committers sync.WaitGroup
	background sync.WaitGroup

	// gate is held for reading by every method that reads the database, and taken by Close.
	gate   sync.RWMutex
	closed bool

	retaining sync.Mutex  // one sweep at a time
	reusing   sync.Mutex  // held while a log is begun on top of another, or emptied
	fresh     atomic.Bool // logs are begun on top of no other
}

// Open opens the journal in Options.Dir, or makes one, and replays what a crash left in its log. It refuses a
// journal of another format. It pairs with Close. Reading works from here on, everything else once Start has been
// called.
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
	if err := j.guard(o); err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	db, err := pebble.Open(o.Dir, j.pebbleOptions(o))
	if err != nil {
		return nil, fmt.Errorf("open journal %s: %w", o.Dir, err)
	}
	j.db = db
	if err := j.load(o); err != nil {
		return nil, errors.Join(fmt.Errorf("open journal %s: %w", o.Dir, err), db.Close())
	}
	if err := j.openMarks(o); err != nil {
		return nil, errors.Join(fmt.Errorf("open journal: %w", err), db.Close())
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
		o.now = clock{time.Now()}.now
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
	j := &Journal{
		dir: o.Dir, fs: o.fs, log: o.Logger.With("component", "journal"), now: o.now, fatal: o.Fatal, refuse: o.refuse,
		metrics: newMetrics(), counts: newCounters(), stop: make(chan struct{}),
		syncs: syncs{dirty: make(chan struct{}, 1)},
	}
	j.watches = newWatches(j)
	return j
}

// load reads or makes the meta record and finds where each partition stands.
func (j *Journal) load(o Options) error {
	m, err := j.meta(o.Partitions)
	if err != nil {
		return err
	}
	if o.Partitions != 0 && o.Partitions != m.partitions {
		return fmt.Errorf("it was made with %d partitions, which is for good, and cannot be opened with %d: leave the number out", m.partitions, o.Partitions)
	}
	j.id = m.id
	for i := range m.partitions {
		p := newPartition(j, uint16(i))
		if err := p.load(); err != nil {
			return err
		}
		j.partitions = append(j.partitions, p)
	}
	return j.watches.load()
}

// meta reads the meta record, and writes one into an empty database.
func (j *Journal) meta(partitions int) (m meta, err error) {
	found, err := j.get(j.db, metaKey(), func(value []byte) (err error) {
		m, err = decodeMeta(value)
		return err
	})
	switch {
	case err != nil:
		return m, err
	case found && m.format != layoutFormat:
		return m, fmt.Errorf("its format is %d, this release knows %d only: start with an empty directory, "+
			"or with the release that made this one", m.format, layoutFormat)
	case found && (m.partitions < 1 || m.partitions > maxPartitions):
		return m, j.corrupt(metaKey(), errors.New("record makes no sense"))
	case found:
		return m, nil
	}
	if err := j.scan(j.db, nil, nil, func(key, _ []byte) error {
		return j.corrupt(metaKey(), fmt.Errorf("record is missing, but there is %s", keyText(key)))
	}); err != nil {
		return m, err
	}
	if partitions == 0 {
		partitions = defaultPartitions
	}
	m.format, m.partitions = layoutFormat, partitions
	_, _ = rand.Read(m.id[:]) // never fails
	return m, j.db.Set(metaKey(), encodeMeta(nil, m), pebble.Sync)
}

// Start begins to take work, with a follower that learns of every commit. Call it once.
func (j *Journal) Start(f Follower) {
	j.follower = f
	j.started.Store(true)
	for _, p := range j.partitions {
		j.committers.Go(p.run)
	}
	snapshot := j.opened
	j.opened = nil
	j.background.Go(func() {
		defer snapshot.Close()
		j.loadFilters(snapshot)
		j.countOpen(snapshot)
		j.freeTurns(snapshot)
	})
	j.background.Go(j.syncLoop)
	j.background.Go(j.watches.tellAll)
	j.background.Go(j.watches.trimAll)
	if j.marks != nil {
		j.background.Go(j.keepMarks)
	}
	j.background.Go(func() { j.space.watch(j.stop) })
}

// Now is the journal's clock: the wall clock when the journal was opened plus the monotonic time since, so that it
// never jumps. Due times, expire times and sequences are on it.
func (j *Journal) Now() time.Time { return j.now() }

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
	j.sync()
	err = errors.Join(err, j.db.Close())
	if j.marks != nil {
		err = errors.Join(err, j.marks.Close(err == nil))
	}
	if err != nil {
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

func (j *Journal) corrupt(key []byte, reason error) error {
	return &CorruptError{Dir: j.dir, Key: keyText(key), Reason: reason}
}

// get has a record decoded, whose memory is lent for the call. It reports whether there is one; a record that
// cannot be decoded is a *CorruptError.
func (j *Journal) get(r pebble.Reader, key []byte, decode func(value []byte) error) (bool, error) {
	value, closer, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, j.unread(keyText(key), err)
	}
	defer closer.Close()
	if err := decode(value); err != nil {
		return true, j.corrupt(key, err)
	}
	return true, nil
}

// unread is the error of a read that failed. Damage comes with what can be done about it.
func (j *Journal) unread(what string, err error) error {
	failed := fmt.Errorf("journal %s: read %s: %w", j.dir, what, err)
	if !pebble.IsCorruptionError(err) {
		return failed
	}
	return fmt.Errorf("%w; `grapnel journal check %s` shows what is damaged, `grapnel journal salvage %s NEW-DIR` copies the rest",
		failed, j.dir, j.dir)
}

// has reports whether there is such a key.
func (j *Journal) has(r pebble.Reader, key []byte) (bool, error) {
	return j.get(r, key, func([]byte) error { return nil })
}

// iterate opens an iterator over [lower, upper) for the time of a function.
func (j *Journal) iterate(r pebble.Reader, lower, upper []byte, use func(*pebble.Iterator) error) (err error) {
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return fmt.Errorf("journal %s: %w", j.dir, err)
	}
	defer func() {
		if failed := errors.Join(it.Error(), it.Close()); failed != nil {
			err = errors.Join(err, j.unread("from "+keyText(lower), failed))
		}
	}()
	return use(it)
}

// scan visits the keys in [lower, upper) in order; key and value are valid during the visit only.
func (j *Journal) scan(r pebble.Reader, lower, upper []byte, visit func(key, value []byte) error) error {
	return j.iterate(r, lower, upper, func(it *pebble.Iterator) error {
		for ok := it.First(); ok; ok = it.Next() {
			value, err := it.ValueAndErr()
			if err != nil {
				return err
			}
			if err := visit(it.Key(), value); err != nil {
				return err
			}
		}
		return nil
	})
}

// hop visits the first key of [lower, upper) and of what follows where skip says: from prefix to prefix by seeks,
// whatever lies within them.
func (j *Journal) hop(r pebble.Reader, lower, upper []byte, visit func(key []byte) (skip []byte, err error)) error {
	return j.iterate(r, lower, upper, func(it *pebble.Iterator) error {
		for ok := it.First(); ok; {
			skip, err := visit(it.Key())
			if err != nil {
				return err
			}
			ok = it.SeekGE(skip)
		}
		return nil
	})
}

// lastKey visits the last key of [lower, upper), if there is one.
func (j *Journal) lastKey(r pebble.Reader, lower, upper []byte, visit func(key []byte) error) error {
	return j.iterate(r, lower, upper, func(it *pebble.Iterator) error {
		if it.Last() {
			return visit(it.Key())
		}
		return nil
	})
}
