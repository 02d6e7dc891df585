package salvage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/sstable/block"
	"github.com/cockroachdb/pebble/v2/sstable/block/blockkind"
	"github.com/cockroachdb/pebble/v2/sstable/colblk"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Table is what has been found out about one table.
type Table struct {
	// Path names the file.
	Path string
	// Bytes is the file's size.
	Bytes int64
	// Entries is how many it has, by its own account, and Read how many could be read; erasures count among them.
	Entries, Read uint64
	// Damage are the parts that cannot be read.
	Damage []TableDamage
}

// TableDamage is a part of a table that cannot be read.
type TableDamage struct {
	// Offset is where in the file it is, -1 when it is not one place.
	Offset int64
	// First and Last bound the keys of the lost entries: after First, up to Last. Nil means unbounded.
	First, Last []byte
	// Reason is what is wrong.
	Reason string
}

func (d TableDamage) String() string {
	if d.Offset < 0 {
		return d.Reason
	}
	return fmt.Sprintf("block at offset %d, keys after %x up to %x: %s", d.Offset, d.First, d.Last, d.Reason)
}

// Damaged says whether something of the table cannot be read.
func (t Table) Damaged() bool { return len(t.Damage) > 0 }

// Lost is how many entries cannot be read, as far as the table itself can tell.
func (t Table) Lost() uint64 { return t.Entries - min(t.Read, t.Entries) }

// tableFile reads a table's entries in order of key, and of those of one key the newest first. It passes over blocks
// that cannot be read.
type tableFile struct {
	Table
	role   role
	reader *sstable.Reader
	runs   []run
	it     sstable.Iterator
	loose  *loose // instead of runs
	// erased are its range deletions.
	erased []erasure
	change change
}

// run is a row of blocks that can be read, up to a damaged one or the table's end.
type run struct {
	after []byte // the keys of the damaged block before it are not above this; nil: there is none
	last  bool   // it reaches the table's end
}

// erasure is a deletion of the keys in [from, to) that are older than seq.
type erasure struct {
	from, to []byte
	seq      uint64
}

// openTable looks at every block of a table. An error is one of the file system; what is wrong with the table is in
// Damage.
func openTable(path string, r role) (*tableFile, error) {
	t := &tableFile{Table: Table{Path: path}, role: r}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	t.Bytes = info.Size()
	if err := t.open(); err != nil {
		t.damaged(-1, nil, nil, err)
		t.runs = nil
		t.loose, err = openLoose(path)
		if err != nil {
			return nil, errors.Join(err, t.close())
		}
	}
	return t, nil
}

func (t *tableFile) damaged(offset int64, first, last []byte, err error) {
	t.Damage = append(t.Damage, TableDamage{
		Offset: offset, First: bytes.Clone(first), Last: bytes.Clone(last), Reason: err.Error(),
	})
}

// open finds the runs. Pebble may panic where a checksum does not cover what is wrong.
func (t *tableFile) open() (err error) {
	defer recoverTo(&err)
	f, err := vfs.Default.Open(t.Path)
	if err != nil {
		return err
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	t.reader, err = sstable.NewReader(context.Background(), readable, new(pebble.Options).MakeReaderOptions())
	if err != nil {
		return errors.Join(err, f.Close())
	}
	properties, err := t.reader.ReadPropertiesBlock(context.Background(), nil)
	if err != nil {
		return err
	}
	t.Entries = properties.NumEntries
	if err := t.findErasures(); err != nil {
		t.damaged(-1, nil, nil, fmt.Errorf("range deletions: %w", err))
	}
	return t.findRuns()
}

func (t *tableFile) close() error {
	var err error
	if t.it != nil {
		_ = t.it.Close() // repeats what was wrong with a block
		t.it = nil
	}
	if t.reader != nil {
		err = t.reader.Close()
		t.reader = nil
	}
	if t.loose != nil {
		err = errors.Join(err, t.loose.close())
		t.loose = nil
	}
	return err
}

// seqOf is the sequence number of an entry that has this one in the file.
func (t *tableFile) seqOf(seq uint64) uint64 { return max(seq, t.role.seq) }

func (t *tableFile) findErasures() error {
	it, err := t.reader.NewRawRangeDelIter(context.Background(), sstable.NoFragmentTransforms, sstable.NoReadEnv)
	if err != nil || it == nil {
		return err
	}
	defer it.Close()
	s, err := it.First()
	for ; s != nil; s, err = it.Next() {
		for _, k := range s.Keys {
			t.Read++
			t.erased = append(t.erased, erasure{from: bytes.Clone(s.Start), to: bytes.Clone(s.End), seq: t.seqOf(uint64(k.SeqNum()))})
		}
	}
	return err
}

// findRuns reads the index and all data blocks, for their checksums.
func (t *tableFile) findRuns() error {
	layout, err := t.reader.Layout()
	if err != nil {
		return err
	}
	for _, filter := range layout.Filter { // it costs no entry, but Pebble trips over it
		if err := t.readable(filter.Handle, blockkind.Filter, noMetadata); err != nil {
			t.damaged(-1, nil, nil, fmt.Errorf("filter: %w", err))
		}
	}
	var (
		before []byte // the separator of the block before: its keys are not above it
		good   bool
	)
	for _, h := range layout.Index {
		err := t.eachBlock(h, func(separator []byte, data block.Handle) {
			err := t.readable(data, blockkind.SSTableData, noMetadata)
			if err != nil {
				t.damaged(int64(data.Offset), before, separator, err)
				good = false
			} else {
				if !good {
					t.runs = append(t.runs, run{after: bytes.Clone(before)})
				}
				good = true
			}
			before = append(before[:0], separator...)
		})
		if err != nil {
			return err
		}
	}
	if good {
		t.runs[len(t.runs)-1].last = true
	}
	return nil
}

func noMetadata(*block.Metadata, []byte) error { return nil }

// readable reads a block for its checksum.
func (t *tableFile) readable(h block.Handle, kind block.Kind, init func(*block.Metadata, []byte) error) error {
	b, err := t.reader.BlockReader().Read(context.Background(), block.NoReadEnv, nil, h, kind, init)
	if err != nil {
		return err
	}
	b.Release()
	return nil
}

// eachBlock visits the entries of an index block.
func (t *tableFile) eachBlock(h block.Handle, visit func(separator []byte, data block.Handle)) error {
	b, err := t.reader.BlockReader().Read(
		context.Background(), block.NoReadEnv, nil, h, blockkind.Index, colblk.InitIndexBlockMetadata)
	if err != nil {
		return err
	}
	defer b.Release()
	var it colblk.IndexIter
	if err := it.Init(t.reader.Comparer, b.BlockData(), sstable.NoTransforms); err != nil {
		return err
	}
	defer it.Close()
	for ok := it.First(); ok; ok = it.Next() {
		data, err := it.BlockHandleWithProperties()
		if err != nil {
			return err
		}
		visit(it.Separator(), data.Handle)
	}
	return nil
}

// next moves to the next entry. False: there is none.
func (t *tableFile) next() bool {
	for {
		ok, err := t.step()
		if err != nil {
			t.damaged(-1, nil, nil, err)
		}
		if !ok {
			return false
		}
		t.Read++
		if t.counts() {
			return true
		}
	}
}

// counts says whether the entry is in the part of the table that counts.
func (t *tableFile) counts() bool {
	for _, s := range t.role.spans {
		if bytes.Compare(s.first, t.change.key) <= 0 && bytes.Compare(t.change.key, s.last) <= 0 {
			return true
		}
	}
	return len(t.role.spans) == 0
}

func (t *tableFile) step() (ok bool, err error) {
	defer recoverTo(&err)
	if t.loose != nil {
		return t.stepLoose(), nil
	}
	for len(t.runs) > 0 {
		ok, failed := t.move()
		if ok {
			return true, nil
		}
		last := t.runs[0].last
		t.runs = t.runs[1:]
		_ = t.it.Close()
		t.it = nil
		if failed != nil && last {
			return false, failed
		}
	}
	return false, nil
}

// stepLoose is step where there is no index. At the end it says how far it came.
func (t *tableFile) stepLoose() bool {
	c, ok := t.loose.next()
	if !ok {
		d := &t.Damage[len(t.Damage)-1]
		d.Reason += fmt.Sprintf("; without its index the table can be read up to offset %d of %d", t.loose.at, t.Bytes)
		t.loose.release()
		return false
	}
	c.seq = t.seqOf(c.seq)
	t.change = c
	return true
}

// move goes one entry on in the run; false at its end, with an error if that is a damaged block.
func (t *tableFile) move() (bool, error) {
	begin := t.it == nil
	if begin {
		it, err := t.reader.NewIter(sstable.NoTransforms, nil, nil, sstable.AssertNoBlobHandles)
		if err != nil {
			return false, err
		}
		t.it = it
	}
	step, after := t.it.Next, t.runs[0].after
	if begin {
		step = t.it.First
	}
	if begin && after != nil { // no key is between the separator and this one
		step = from(t.it.SeekGE, append(after, 0))
	}
	kv := step()
	if kv == nil {
		return false, t.it.Error()
	}
	value, _, err := kv.Value(nil)
	if err != nil {
		return false, err
	}
	t.change = change{kind: kv.Kind(), seq: t.seqOf(uint64(kv.SeqNum())), key: kv.K.UserKey, value: value}
	return true, nil
}

// none is the nil of a type that Pebble has no public name for.
func none[T any](func() T) (nothing T) { return nothing }

// from is a seek to a key, as a step, without its flags; Pebble has no public names for their types.
func from[T, F any](seek func([]byte, F) T, key []byte) func() T {
	var flags F
	return func() T { return seek(key, flags) }
}

// recoverTo turns a panic into an error.
func recoverTo(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("it makes no sense: %v", r)
	}
}
