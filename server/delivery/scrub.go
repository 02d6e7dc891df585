package delivery

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// What is purged is still in the journal's files: in tables, until a compaction drops the versions before; in the
// write-ahead log; in logs that are kept to be written over. A scrub looks for it in every table, has compacted what lies
// around that which it finds, and looks again, until there is none, and the files that had any are gone.

const (
	// scrubRest is how long a scrub rests for the time that it has read, and scrubRestMost the longest. It does after each
	// table, and after so many bytes of a larger one.
	scrubRest      = 1
	scrubRestMost  = 20 * time.Millisecond
	scrubRestBytes = 1 << 20
	// maxStale is how many places a look remembers as they are, and touchAtOnce how many keys are written anew in one commit.
	maxStale    = 1 << 14
	touchAtOnce = 256
)

// ErrStale says that files still hold what has been purged: somebody reads them, or a compaction is under way.
var ErrStale = errors.New("files with what was purged are still in use")

// Scrub sees to it that no file of the journal holds anything of what an erasure, which has come to its end in all
// partitions, selects, nor of what became of it. ErrStale says that it is to be tried again after a while.
func (j *Journal) Scrub(ctx context.Context, r *Replay, selects Selects) (Proof, error) {
	leave, err := j.enter()
	if err != nil {
		return Proof{}, err
	}
	defer leave()
	s := newScrub(j, r, selects)
	if err := s.begin(); err != nil {
		return Proof{}, err
	}
	for round := 0; ; round++ {
		if j.space.low() { // to compact takes room before it gives any
			return Proof{}, ErrDiskFull
		}
		if err := s.flush(ctx); err != nil {
			return Proof{}, err
		}
		if err := s.look(ctx); err != nil {
			return Proof{}, err
		}
		if len(s.found) == 0 {
			break
		}
		if round == maxRounds {
			return Proof{}, ErrStale
		}
		if round > 0 { // the versions lie together in a table that nothing has been added to
			if err := s.touch(ctx); err != nil {
				return Proof{}, err
			}
		}
		if err := s.compact(ctx); err != nil {
			return Proof{}, err
		}
	}
	if err := s.emptyLogs(ctx); err != nil {
		return Proof{}, err
	}
	for began := time.Now(); ; {
		left, err := s.left(ctx)
		switch {
		case err != nil:
			return Proof{}, err
		case !left:
			return Proof{Time: j.now(), Bytes: s.bytes}, nil
		case time.Since(began) > leaveFor:
			return Proof{}, ErrStale
		}
		if err := sleep(ctx, settleLook); err != nil {
			return Proof{}, err
		}
	}
}

const (
	// maxRounds is how often a scrub compacts before it gives those some time who read what is old.
	maxRounds = 4
	// nearTables is how many tables of the largest size may lie in a range that is compacted as one.
	nearTables = 4
	// leaveFor is how long the engine may take to remove files that it has done with.
	leaveFor = 2 * time.Second
)

// scrub is one Scrub.
type scrub struct {
	j       *Journal
	job     *Replay
	selects Selects
	// at is where the erasure stands, low and high bound what it has looked at, by partition; remains tells of deliveries.
	at        []cursor
	low, high []uint64
	remains   []func(LaneKey, uint64) (remains, error)
	// clean says of tables that have been looked through whether they hold nothing; found is where the others that are part of
	// the journal hold what, table by table and in order.
	clean map[uint64]bool
	found []stale
	// gone are the tables whose files were there at the last look although they were no part of the journal, or not yet.
	gone  map[uint64]bool
	bytes int64
	rests int
}

// stale is where a table holds what was purged: at these keys, and perhaps between them.
type stale struct {
	table       uint64
	first, last []byte
}

func newScrub(j *Journal, r *Replay, selects Selects) *scrub {
	return &scrub{j: j, job: r, selects: selects, clean: make(map[uint64]bool)}
}

func (s *scrub) begin() error {
	for _, p := range s.j.partitions {
		at, err := p.cursor(s.j.db, s.job.Namespace, s.job.Key)
		if err != nil {
			return err
		}
		low, high := s.job.erasedRange(&at)
		s.at, s.low, s.high = append(s.at, at), append(s.low, low), append(s.high, high)
		s.remains = append(s.remains, p.remainsOfEvents(s.j.db, s.job.Namespace))
	}
	return nil
}

// flush has all that is in memory in tables.
func (s *scrub) flush(ctx context.Context) error {
	flushed, err := s.j.db.AsyncFlush()
	if err != nil {
		return fmt.Errorf("flush what was purged: %w", err)
	}
	select {
	case <-flushed:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// table is one that the journal consists of.
type table struct {
	number uint64
	size   uint64
}

func (s *scrub) tables() (all []table, err error) {
	levels, err := s.j.db.SSTables()
	if err != nil {
		return nil, fmt.Errorf("list the tables: %w", err)
	}
	for _, level := range levels {
		for i := range level {
			all = append(all, table{uint64(level[i].BackingSSTNum), level[i].Size})
		}
	}
	return all, nil
}

// tablesOnDisk are the numbers of the tables in the journal's directory.
func (s *scrub) tablesOnDisk() (numbers []uint64, err error) {
	names, err := s.j.fs.List(s.j.dir)
	if err != nil {
		return nil, fmt.Errorf("list the journal's files: %w", err)
	}
	for _, name := range names {
		base, ok := strings.CutSuffix(name, ".sst")
		if n, err := strconv.ParseUint(base, 10, 64); ok && err == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}

// look looks through all tables that it has not looked through before, until there are no others: a table does not change.
// What is written after it has listed them is made of these; what was there then and is none of them is to be gone at the end.
func (s *scrub) look(ctx context.Context) error {
	for again := true; again; {
		all, err := s.tables()
		if err != nil {
			return err
		}
		onDisk, err := s.tablesOnDisk() // after the others: one that was dropped in between is among those
		if err != nil {
			return err
		}
		live := make(map[uint64]bool, len(all))
		for _, t := range all {
			live[t.number] = true
		}
		s.gone = make(map[uint64]bool)
		for _, n := range onDisk {
			if !live[n] && !s.clean[n] {
				s.gone[n] = true
			}
		}
		s.found = slices.DeleteFunc(s.found, func(at stale) bool { return !live[at.table] })
		again = false
		for _, t := range all {
			if _, looked := s.clean[t.number]; looked {
				continue
			}
			found, err := s.lookInto(ctx, t, s.found)
			if errors.Is(err, fs.ErrNotExist) { // compacted meanwhile, into others
				again = true
				continue
			}
			if err != nil {
				return err
			}
			s.clean[t.number] = len(found) == 0 || found[len(found)-1].table != t.number
			s.found = found
		}
		again = again && len(s.found) == 0
	}
	return nil
}

// lookInto looks through a table for what is purged, and adds where that is.
func (s *scrub) lookInto(ctx context.Context, t table, found []stale) (_ []stale, err error) {
	path := s.j.fs.PathJoin(s.j.dir, fmt.Sprintf("%06d.sst", t.number))
	f, err := s.j.fs.Open(path)
	if err != nil {
		return nil, err
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	reader, err := sstable.NewReader(ctx, readable, new(pebble.Options).MakeReaderOptions())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read table %s: %w", path, err), f.Close())
	}
	defer func() { err = errors.Join(err, reader.Close()) }()
	it, err := reader.NewIter(sstable.NoTransforms, nil, nil, sstable.AssertNoBlobHandles)
	if err != nil {
		return nil, fmt.Errorf("read table %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	s.bytes += int64(t.size)
	read, began := 0, time.Now()
	for kv := it.First(); kv != nil; {
		key := kv.K.UserKey
		if read += len(key) + kv.V.Len(); read >= scrubRestBytes {
			if err := s.rest(ctx, time.Since(began)); err != nil {
				return nil, err
			}
			read, began = 0, time.Now()
		}
		skip, ours := s.skip(key)
		if !ours {
			if skip == nil {
				break
			}
			kv = from(it.SeekGE, skip)
			continue
		}
		if kind := kv.Kind(); kind == pebble.InternalKeyKindSet || kind == pebble.InternalKeyKindSetWithDelete {
			value, _, err := kv.Value(nil)
			if err != nil {
				return nil, fmt.Errorf("read table %s: %w", path, err)
			}
			holds, err := s.holds(key, value)
			if err != nil {
				return nil, err
			}
			if holds {
				own := bytes.Clone(key)
				found = coarser(append(found, stale{t.number, own, own}))
			}
		}
		kv = it.Next()
	}
	if err := it.Error(); err != nil {
		return nil, fmt.Errorf("read table %s: %w", path, err)
	}
	return found, s.rest(ctx, time.Since(began))
}

// coarser joins neighbours in a table once there are too many, unless other namespaces lie between them.
func coarser(all []stale) []stale {
	if len(all) < maxStale || len(all)&(len(all)-1) != 0 { // and as many again, if none could be joined
		return all
	}
	n := 0
	for i := 0; i < len(all); i++ {
		all[n] = all[i]
		if i+1 < len(all) && all[i+1].table == all[n].table && bytes.Equal(spaceOf(all[i+1].last), spaceOf(all[n].first)) {
			i++
			all[n].last = all[i].last
		}
		n++
	}
	clear(all[n:])
	return all[:n]
}

// spaceOf is what all keys of a kind in a namespace begin with, those of records: of a day.
func spaceOf(key []byte) []byte {
	if key[tagOffset] == tagRecord {
		return key[:bodyOffset+2+8]
	}
	return key[:bodyOffset+8]
}

// rest rests after it has read for so long.
func (s *scrub) rest(ctx context.Context, took time.Duration) error {
	s.rests++
	return sleep(ctx, min(scrubRest*took, scrubRestMost))
}

// from is a seek to a key without its flags, for whose type Pebble has no public name.
func from[T, F any](seek func([]byte, F) T, key []byte) T {
	var flags F
	return seek(key, flags)
}

// skip says of a key that is none of the namespace's where the next may be; nil at the end.
func (s *scrub) skip(key []byte) (next []byte, ours bool) {
	if len(key) < bodyOffset {
		return append(bytes.Clone(key), 0), false
	}
	partition, tag := binary.BigEndian.Uint16(key), key[tagOffset]
	if int(partition) >= len(s.j.partitions) {
		return nil, false
	}
	at := bodyOffset
	switch tag {
	case tagRecord:
		at += 2
	case tagFIFO, tagTimer, tagBlocked, tagNews:
	default:
		return prefixEnd(key[:bodyOffset]), false
	}
	if len(key) < at+8 {
		return append(bytes.Clone(key), 0), false
	}
	switch ns := NamespaceKey(binary.BigEndian.Uint64(key[at:])); {
	case ns == s.job.Namespace:
		return nil, true
	case ns < s.job.Namespace:
		return appendU64(bytes.Clone(key[:at]), uint64(s.job.Namespace)), false
	}
	return prefixEnd(key[:at]), false
}

// holds reports whether a record holds anything of what the erasure selects. What cannot be read is passed over: the erasure
// has counted it.
func (s *scrub) holds(key, value []byte) (bool, error) {
	p := s.j.partitions[binary.BigEndian.Uint16(key)]
	purged := func(lane LaneKey, seq uint64) (bool, error) {
		left, err := s.remains[p.number](lane, seq)
		if err != nil {
			return false, err
		}
		return s.isGone(key, left)
	}
	switch key[tagOffset] {
	case tagRecord:
		return s.recordHolds(p, key, value, purged)
	case tagNews:
		after, err := p.stripNews(s.job.Namespace, key, value, nil, purged)
		return after != nil, p.passOver(err)
	case tagBlocked:
		lane, _, seq, ok := splitBlocked(key)
		w, err := decodeBlocked(value)
		if !ok || err != nil || !(&standing{progress: w.progress}).strip() {
			return false, nil
		}
		return purged(lane, seq)
	}
	lane, row, ok := splitRow(key)
	pr, err := decodeProgress(value)
	if !ok || err != nil || !(&standing{progress: pr}).strip() {
		return false, nil
	}
	return purged(lane, row.Seq)
}

// isGone reports whether what a record quotes of an event is to be nowhere any more: it has been purged, or the event is retained no
// longer and may have been before, and then the record is there no longer either. Whose one is that outlives its event cannot be told.
func (s *scrub) isGone(key []byte, left remains) (bool, error) {
	if left != remainsNone {
		return left == remainsPurged, nil
	}
	there, err := s.j.has(s.j.db, key)
	return !there && err == nil, err
}

// recordHolds is holds for an r key.
func (s *scrub) recordHolds(p *partition, key, value []byte, purged func(LaneKey, uint64) (bool, error)) (bool, error) {
	_, ns, kind, rest, ok := splitRecord(key)
	seq, hasSeq := recordSeq(kind, rest)
	if !ok || !hasSeq {
		return false, nil
	}
	switch kind {
	case kindEvent:
		if at := &s.at[p.number]; seq < s.low[p.number] || seq >= s.high[p.number] || !at.before(seq) {
			return false, nil
		}
		e, err := decodeEvent(value)
		if err != nil || e.Purged != nil || !s.job.Spec.spans(e) {
			return false, nil
		}
		p.place(e, ns, seq)
		return s.selects(e), nil
	case kindMade:
		left, err := p.remainsOf(s.j.db, ns, seq)
		if err != nil {
			return false, err
		}
		return s.isGone(key, left)
	case kindDelivery, kindAttempt:
		if !quotes(kind, value) {
			return false, nil
		}
	default:
		return false, nil
	}
	return purged(LaneKey{ns, SubscriptionKey(binary.BigEndian.Uint64(rest))}, seq)
}

// touch writes some of the records that are stale anew, so that a compaction meets the tables that hold what they were before.
func (s *scrub) touch(ctx context.Context) error {
	var keys [][]byte
	for _, at := range s.found {
		if keys = append(keys, at.first); !bytes.Equal(at.first, at.last) {
			keys = append(keys, at.last)
		}
	}
	for some := range slices.Chunk(keys, touchAtOnce) {
		byPartition := make(map[uint16][][]byte)
		for _, key := range some {
			n := binary.BigEndian.Uint16(key)
			byPartition[n] = append(byPartition[n], key)
		}
		for n, keys := range byPartition {
			if err := s.j.partitions[n].do(ctx, func(c *commit) error {
				for _, key := range keys {
					if err := c.touch(key); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				return err
			}
		}
	}
	return s.flush(ctx)
}

// touch writes a record as it is, or erases it once more. Open rows are written once only; those that hold anything are gone.
func (c *commit) touch(key []byte) error {
	var value []byte
	found, err := c.p.j.get(c.r, key, func(v []byte) error {
		value = bytes.Clone(v)
		return nil
	})
	switch {
	case err != nil:
		return err
	case !found:
		c.delete(key)
	case key[tagOffset] == tagRecord || key[tagOffset] == tagNews:
		c.set(key, value)
	}
	return nil
}

// compact has compacted what lies around that which is stale, as little as can be.
func (s *scrub) compact(ctx context.Context) error {
	spans, err := s.spans()
	if err != nil {
		return err
	}
	for _, at := range spans {
		began := time.Now()
		if err := s.j.db.Compact(ctx, at.start, at.end, false); err != nil {
			return fmt.Errorf("compact what was purged: %w", err)
		}
		if err := sleep(ctx, min(scrubRest*time.Since(began), time.Second)); err != nil {
			return err
		}
	}
	return nil
}

// spans are the ranges around what is stale. A compaction writes whole tables anew: what lies no further apart than a few of
// them is one range.
func (s *scrub) spans() (spans []span, err error) {
	all, err := s.tables()
	if err != nil {
		return nil, err
	}
	var near uint64
	for _, t := range all {
		near = max(near, nearTables*t.size)
	}
	var part func(places []stale) error
	part = func(places []stale) error {
		at := span{start: places[0].first}
		for _, p := range places {
			if bytes.Compare(p.last, at.end) > 0 {
				at.end = p.last
			}
		}
		at.end = append(bytes.Clone(at.end), 0)
		size, err := s.j.db.EstimateDiskUsage(at.start, at.end)
		if err != nil {
			return fmt.Errorf("measure what was purged: %w", err)
		}
		if half := len(places) / 2; half > 0 && size > near {
			return errors.Join(part(places[:half]), part(places[half:]))
		}
		spans = append(spans, at)
		return nil
	}
	err = part(slices.SortedFunc(slices.Values(s.found), func(a, b stale) int { return bytes.Compare(a.first, b.first) }))
	return spans, err
}

// left reports whether files are on disk that may hold what was purged.
func (s *scrub) left(ctx context.Context) (bool, error) {
	all, err := s.tables()
	if err != nil {
		return false, err
	}
	for _, t := range all {
		if !s.gone[t.number] { // else it was being written
			continue
		}
		found, err := s.lookInto(ctx, t, nil)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
		if err == nil && len(found) == 0 {
			delete(s.gone, t.number)
		}
	}
	onDisk, err := s.tablesOnDisk()
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(onDisk, func(n uint64) bool { return s.gone[n] }), nil
}

// emptyLogs has no log hold what was written before. The engine keeps logs that it has done with, to write the next over
// them: they are emptied.
func (s *scrub) emptyLogs(ctx context.Context) error {
	// No log that is begun from here on has anything of an older one at its end.
	s.j.fresh.Store(true)
	defer s.j.fresh.Store(false)
	last := s.j.logNumber.Load()
	if err := s.flush(ctx); err != nil { // all up to it are in tables from here on
		return err
	}
	s.j.still.RLock() // a copy that is being made has listed its logs, and not yet copied them
	defer s.j.still.RUnlock()
	s.j.reusing.Lock()
	defer s.j.reusing.Unlock()
	names, err := s.j.fs.List(s.j.dir)
	if err != nil {
		return fmt.Errorf("list the journal's files: %w", err)
	}
	for _, name := range names {
		base, ok := strings.CutSuffix(name, ".log")
		n, err := strconv.ParseUint(base, 10, 64)
		if !ok || err != nil || n > last {
			continue
		}
		f, err := s.j.fs.Create(s.j.fs.PathJoin(s.j.dir, name), vfs.WriteCategoryUnspecified)
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			return fmt.Errorf("empty log %s: %w", name, err)
		}
	}
	dir, err := s.j.fs.OpenDir(s.j.dir)
	if err == nil {
		err = errors.Join(dir.Sync(), dir.Close())
	}
	if err != nil {
		return fmt.Errorf("empty the logs: %w", err)
	}
	return nil
}

// reusedLogs is a file system on which no log is emptied while it is about to be written over, and none is written over while
// logs are to be fresh.
type reusedLogs struct {
	vfs.FS
	j *Journal
}

// ReuseForWrite is FS's.
func (r reusedLogs) ReuseForWrite(from, to string, category vfs.DiskWriteCategory) (vfs.File, error) {
	r.j.reusing.Lock()
	defer r.j.reusing.Unlock()
	if r.j.fresh.Load() {
		if err := r.FS.Remove(from); err != nil {
			return nil, err
		}
		return r.FS.Create(to, category)
	}
	return r.FS.ReuseForWrite(from, to, category)
}

// Unwrap returns the file system below.
func (r reusedLogs) Unwrap() vfs.FS { return r.FS }
