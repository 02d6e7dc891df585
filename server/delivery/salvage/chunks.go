package salvage

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Pebble's logs and manifests are blocks of 32 KiB, filled with chunks that do not cross them; a record is one
// chunk or several (pebble/record/record.go). A chunk's header: checksum, length, type; in logs also the log's
// number, and in newer ones how much of the log had been synced when it was written.
const (
	blockBytes     = 32 << 10
	manifestHeader = 7
	logHeader      = manifestHeader + 4
	syncHeader     = logHeader + 8
)

// Places of a chunk in its record.
const (
	wholeRecord = iota
	firstOfRecord
	middleOfRecord
	lastOfRecord
)

// Gap is a part of a file that cannot be read although what follows it can. From is the first byte of it, To
// the first that can be read again.
type Gap struct {
	From, To int64
	// Reason is what is wrong at From.
	Reason string
	// Synced says that a later part of the file tells that From had been synced: it is damage, and not what a power
	// loss leaves of data that nobody was promised.
	Synced bool
}

func (g Gap) String() string {
	text := fmt.Sprintf("%d bytes at offset %d cannot be read: %s", g.To-g.From, g.From, g.Reason)
	if g.Synced {
		text += "; they had been synced"
	}
	return text
}

// Ending is how the readable part of a file ends.
type Ending int

const (
	// Closed: in order, a log by its mark, a manifest with the file.
	Closed Ending = iota
	// Cut: with zeros or with what is no chunk of this file, and nothing readable behind it. A killed writer
	// leaves that, and so does damage to the last records.
	Cut
)

// chunk is one that has been read.
type chunk struct {
	place  int
	size   int // with its header
	data   []byte
	synced int64  // -1: it does not say
	closes bool   // it is the mark at the end of a closed log
	former bool   // it is one of the log that the file was before
	reason string // why it is none
}

// chunks reads those of one file.
type chunks struct {
	b []byte
	// number is the log's; a chunk with another one was left by the file's former use.
	number uint32
	// manifest: there are no numbers, and headers are short.
	manifest bool
}

// header is how long the shortest is.
func (c chunks) header() int {
	if c.manifest {
		return manifestHeader
	}
	return logHeader
}

// at reads the chunk at off, which must lie in b with a shortest header before the end of its block.
func (c chunks) at(off int) chunk {
	block := c.b[off:min(len(c.b), off-off%blockBytes+blockBytes)]
	sum := binary.LittleEndian.Uint32(block)
	size := int(binary.LittleEndian.Uint16(block[4:]))
	kind := int(block[6])
	if sum == 0 && size == 0 && kind == 0 {
		return chunk{reason: "there are zeros"}
	}
	header, first := c.header(), 1
	if !c.manifest {
		switch {
		case kind >= 5 && kind <= 8:
			first = 5
		case kind >= 9 && kind <= 12:
			header, first = syncHeader, 9
		default:
			return chunk{reason: fmt.Sprintf("chunks have no type %d", kind)}
		}
	} else if kind < 1 || kind > 4 {
		return chunk{reason: fmt.Sprintf("chunks have no type %d", kind)}
	}
	if header > len(block) {
		return chunk{reason: "the chunk's header is cut off"}
	}
	if !c.manifest {
		number := binary.LittleEndian.Uint32(block[manifestHeader:])
		if number == c.number+1 && sum == 0 && size == 0 && kind == 5 {
			return chunk{closes: true, size: header}
		}
		if number != c.number {
			former := number < c.number && header+size <= len(block) && maskedChecksum(block[6:header+size]) == sum
			return chunk{former: former, reason: fmt.Sprintf("the chunk is of log %06d", number)}
		}
	}
	if header+size > len(block) {
		return chunk{reason: fmt.Sprintf("the chunk's length of %d goes beyond its block", size)}
	}
	if maskedChecksum(block[6:header+size]) != sum {
		return chunk{reason: "the chunk's checksum is wrong"}
	}
	found := chunk{place: kind - first, size: header + size, data: block[header : header+size], synced: -1}
	if header == syncHeader {
		found.synced = int64(binary.LittleEndian.Uint64(block[logHeader:]))
	}
	return found
}

// maskedChecksum is a CRC-32C, turned so that a chunk with checksums in it does not look like one
// (pebble/internal/crc).
func maskedChecksum(b []byte) uint32 {
	return masked(crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

func masked(sum uint32) uint32 { return (sum>>15 | sum<<17) + 0xa282ead8 }

// next is where the next chunk after off can be: off itself, or the next block if a header does not fit before it.
func (c chunks) next(off int) int {
	if left := blockBytes - off%blockBytes; left < c.header() {
		return off + left
	}
	return off
}

// padding says whether a block ends here early, as it does where a long header did not fit.
func (c chunks) padding(off int) bool {
	left := blockBytes - off%blockBytes
	if c.manifest || left >= syncHeader || off+left > len(c.b) {
		return false
	}
	for _, b := range c.b[off : off+left] {
		if b != 0 {
			return false
		}
	}
	return true
}

// resume finds the first chunk at or after off, len(b) if there is none. Between damaged bytes it may begin
// anywhere. The mark at the end has no checksum, and records of a former log may hold the same bytes: behind a chunk of
// one it is none.
func (c chunks) resume(off int) int {
	former := false
	for ; off+c.header() <= len(c.b); off++ {
		if off = c.next(off); off+c.header() > len(c.b) {
			break
		}
		if kind := c.b[off+6]; kind == 0 || kind > 12 {
			continue
		}
		found := c.at(off)
		if found.reason == "" && !(found.closes && former) {
			return off
		}
		former = former || found.former
	}
	return len(c.b)
}

// scanned is what a scan has found out.
type scanned struct {
	// intact is where the first thing that cannot be read begins, or the end.
	intact int64
	gaps   []Gap
	ending Ending
	// end is where the readable part ends.
	end int64
}

// scan visits all whole records in order; behind says that there was a gap before. Record is valid during the
// visit.
func (c chunks) scan(visit func(offset int64, record []byte, behind bool)) scanned {
	var (
		s      = scanned{intact: -1, ending: Cut}
		record []byte
		start  = -1 // of the record that is being read
	)
	off := 0
	for {
		off = c.next(off)
		if off+c.header() > len(c.b) {
			if c.manifest && off >= len(c.b) && start < 0 {
				s.ending = Closed
			}
			break
		}
		found := c.at(off)
		if found.reason != "" {
			if c.padding(off) {
				off += blockBytes - off%blockBytes
				continue
			}
			from := off
			if start >= 0 {
				from = start
			}
			to := c.resume(off + 1)
			if to == len(c.b) {
				break
			}
			s.gaps = append(s.gaps, Gap{From: int64(from), To: int64(to), Reason: found.reason})
			off, start = to, -1
			continue
		}
		for i := range s.gaps {
			s.gaps[i].Synced = s.gaps[i].Synced || found.synced > s.gaps[i].From
		}
		if found.closes {
			if start < 0 {
				s.ending = Closed
			}
			break
		}
		switch {
		case found.place == wholeRecord:
			visit(int64(off), found.data, len(s.gaps) > 0)
			start = -1
		case found.place == firstOfRecord:
			record, start = append(record[:0], found.data...), off
		case start < 0: // the rest of a record whose begin is in a gap
			if n := len(s.gaps); n > 0 {
				s.gaps[n-1].To = int64(off + found.size)
			}
		default:
			record = append(record, found.data...)
			if found.place == lastOfRecord {
				visit(int64(start), record, len(s.gaps) > 0)
				start = -1
			}
		}
		off += found.size
	}
	s.end = int64(min(off, len(c.b)))
	if start >= 0 {
		s.end = int64(start)
	}
	s.intact = s.end
	if len(s.gaps) > 0 {
		s.intact = s.gaps[0].From
	}
	return s
}
