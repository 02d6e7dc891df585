package salvage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/sstable/block"
	"github.com/cockroachdb/pebble/v2/sstable/block/blockkind"
	"github.com/cockroachdb/pebble/v2/sstable/colblk"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Of a data block: Pebble's header with its version and the number of columns, behind four bytes of the block's own.
const (
	columnsOffset = 4
	columnsHeader = 7
	columnBytes   = 5
	// bundle is that of Pebble's key schema.
	bundle = 16
	// maxBlock is more than any block of a journal has: the largest event, and the rows that fill the rest.
	maxBlock = 64 << 20
	// kinds of compression are below this.
	maxCompression = 16
)

// errNoData says that a block is none of data.
var errNoData = errors.New("the block is none of data")

// loose are the data blocks of a table whose index, or what leads to it, cannot be read. They lie at its front, one
// behind the other; how long each is only its checksum tells.
type loose struct {
	b      []byte
	at     int // where the next block begins
	reader block.Reader
	schema colblk.KeySchema
	// columns are the header of a data block, as the first one has it.
	columns []byte
	it      colblk.DataBlockIter
	begun   bool // it is on an entry
	held    bool // it is on a block
}

func openLoose(path string) (*loose, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f, err := vfs.Default.Open(path)
	if err != nil {
		return nil, err
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	l := &loose{b: b, schema: colblk.DefaultKeySchema(pebble.DefaultComparer, bundle)}
	l.reader.Init(readable, block.ReaderOptions{LoggerAndTracer: silent{}}, block.ChecksumTypeCRC32c)
	l.it.InitOnce(&l.schema, pebble.DefaultComparer, nil)
	return l, nil
}

func (l *loose) close() error {
	l.release()
	return l.reader.Close()
}

// release gives the block back.
func (l *loose) release() {
	_ = l.it.Close() // never fails
	l.held, l.begun = false, false
}

// next moves to the next entry and returns it; false when no more blocks can be found.
func (l *loose) next() (change, bool) {
	for {
		kv := none(l.it.Next)
		switch {
		case l.begun:
			kv = l.it.Next()
		case l.held:
			kv = l.it.First()
		}
		if kv != nil {
			l.begun = true
			return change{kind: kv.Kind(), seq: uint64(kv.SeqNum()), key: kv.K.UserKey, value: kv.InPlaceValue()}, true
		}
		if !l.nextBlock() {
			return change{}, false
		}
	}
}

func (l *loose) nextBlock() bool {
	length, ok := l.length()
	if !ok {
		return false
	}
	handle, err := l.reader.Read(context.Background(), block.NoReadEnv, nil,
		block.Handle{Offset: uint64(l.at), Length: uint64(length)}, blockkind.SSTableData, l.init)
	if err != nil {
		return false
	}
	if err := l.it.InitHandle(pebble.DefaultComparer, handle, sstable.NoTransforms); err != nil {
		handle.Release()
		return false
	}
	l.held, l.begun = true, false
	l.at += length + block.TrailerLen
	return true
}

// length is that of the block that begins at l.at.
func (l *loose) length() (int, bool) {
	table := crc32.MakeTable(crc32.Castagnoli)
	sum := uint32(0)
	for i := l.at; i+block.TrailerLen <= len(l.b) && i-l.at <= maxBlock; i++ {
		sum = crc32.Update(sum, table, l.b[i:i+1])
		if i > l.at && l.b[i] < maxCompression && binary.LittleEndian.Uint32(l.b[i+1:]) == masked(sum) {
			return i - l.at, true
		}
	}
	return 0, false
}

// init refuses blocks that are not of data: Pebble's decoder takes what it gets.
func (l *loose) init(metadata *block.Metadata, data []byte) error {
	columns := len(l.schema.ColumnTypes) + 5
	if len(data) < columnsOffset+columnsHeader+columns*columnBytes {
		return errNoData
	}
	header := data[columnsOffset:]
	kinds := []byte{header[0], header[1], header[2]} // version, number of columns
	for i := range columns {
		kinds = append(kinds, header[columnsHeader+i*columnBytes])
	}
	if int(binary.LittleEndian.Uint16(header[1:])) != columns || l.columns != nil && !bytes.Equal(l.columns, kinds) {
		return errNoData
	}
	l.columns = kinds
	return colblk.InitDataBlockMetadata(&l.schema, metadata, data)
}
