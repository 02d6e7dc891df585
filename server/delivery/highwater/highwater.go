// Package highwater remembers, apart from the journal, what of it is durable: for each partition the newest commit
// whose sync has returned. A journal that is found to hold less has lost something, whatever its own checksums
// say: its log's end was cut off, a file was deleted, a directory not mounted.
//
// A File takes such marks at the cost of a store to memory and keeps them through kill -9; Encode makes the few
// bytes that serve as a second copy elsewhere. At a start:
//
//	known, err := highwater.Read(path)            // what was there; nothing is changed
//	err = known.Compare(found)                    // a *LossError names what is missing
//	file, err := highwater.Create(path, id, found)
//
// What is remembered may lag behind the journal, after a power loss by about a second. It is never ahead.
package highwater

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strings"
)

// Mark says what of one partition is durable. The zero Mark: nothing yet.
type Mark struct {
	// Commit is the index of the newest commit that has been synced.
	Commit uint64
	// Seq is the sequence of the newest event in it or before it.
	Seq uint64
	// Log is the number of the log file that was written to when the mark was noted; 0 means unknown. A log
	// that Commit is in has this number or a lower one.
	Log uint64
}

// State is what one place remembers of a journal.
type State struct {
	// Source names the place for people: the file's path, for instance.
	Source string
	// Journal is the id of the journal that this is about.
	Journal string
	// Clean says that the journal was closed in order, so that Marks is all there was.
	Clean bool
	// Marks has one for each partition, by number.
	Marks []Mark
	// Torn are partitions of which one of two copies of the mark cannot be read. The mark may be one behind
	// the newest. A kill in the middle of a store leaves that, and so does damage.
	Torn []uint16
	// Lost are partitions of which neither copy can be read: the mark is zero and means nothing.
	Lost []uint16
}

// MaxPartitions is how many marks a State may have.
const MaxPartitions = 1 << 16

// maxJournal is the most bytes that a journal's id may have.
const maxJournal = 32

// DamageError says that what should be marks cannot be read as such, or not all of it. What it was is unknown.
type DamageError struct {
	// Source is the place: the file's path, for instance.
	Source string
	// Reason says what is wrong.
	Reason string
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("high-water marks %s cannot be read: %s", e.Source, e.Reason)
}

// LossError says that a journal holds less than is known to have been durable.
type LossError struct {
	// Source is the place that knows.
	Source string
	// Losses has one for each partition that lacks something, by number.
	Losses []Loss
}

// Loss is what one partition lacks: the commits after Found up to Known, and with them events of sequences after
// Found.Seq up to Known.Seq, if these differ.
type Loss struct {
	Partition    uint16
	Found, Known Mark
}

// Commits is how many are missing.
func (l Loss) Commits() uint64 { return l.Known.Commit - l.Found.Commit }

// Commits is how many are missing from all partitions.
func (e *LossError) Commits() (n uint64) {
	for _, l := range e.Losses {
		n += l.Commits()
	}
	return n
}

// Log is the highest number of a log file that something missing was in; 0 means unknown.
func (e *LossError) Log() (log uint64) {
	for _, l := range e.Losses {
		log = max(log, l.Known.Log)
	}
	return log
}

// shownLosses is how many partitions the error's text tells of one by one.
const shownLosses = 4

func (e *LossError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d commits that were durable are missing from %d partitions, according to %s", e.Commits(), len(e.Losses), e.Source)
	if log := e.Log(); log != 0 {
		fmt.Fprintf(&b, " when %06d.log was written", log)
	}
	for i, l := range e.Losses {
		if i == shownLosses {
			fmt.Fprintf(&b, "; and %d more", len(e.Losses)-i)
			break
		}
		fmt.Fprintf(&b, "; partition %d: %d of %d", l.Partition, l.Commits(), l.Known.Commit)
		if l.Known.Seq > l.Found.Seq {
			fmt.Fprintf(&b, ", events after sequence %d up to %d", l.Found.Seq, l.Known.Seq)
		}
	}
	return b.String()
}

// Doubt says in words which marks are older than they were or say nothing, because their copies cannot be read; nil when
// all can be relied on. It is to be told, as a loss in those partitions may not be noticed.
func (s State) Doubt() error {
	if len(s.Torn)+len(s.Lost) == 0 {
		return nil
	}
	return &DamageError{Source: s.Source, Reason: fmt.Sprintf(
		"of %d of %d partitions both copies are damaged, of %d one is", len(s.Lost), len(s.Marks), len(s.Torn))}
}

// Compare holds what a journal was found to contain, by partition, against what s remembers. It returns a
// *LossError when something is missing, otherwise nil. A partition whose mark is lost says nothing.
func (s State) Compare(found []Mark) error {
	e := &LossError{Source: s.Source}
	for i, known := range s.Marks {
		var has Mark
		if i < len(found) {
			has = found[i]
		}
		if has.Commit < known.Commit {
			e.Losses = append(e.Losses, Loss{Partition: uint16(i), Found: has, Known: known})
		}
	}
	if len(e.Losses) == 0 {
		return nil
	}
	return e
}

const encodingVersion = 1

// Encode returns s in few bytes, to be kept in another place; Decode reads them. Source, Torn and Lost are not in
// them, and a lost mark is zero.
func (s State) Encode() []byte {
	b := make([]byte, 0, 64+8*len(s.Marks))
	b = append(b, encodingVersion)
	b = binary.AppendUvarint(b, uint64(len(s.Journal)))
	b = append(b, s.Journal...)
	var clean byte
	if s.Clean {
		clean = 1
	}
	b = append(b, clean)
	b = binary.AppendUvarint(b, uint64(len(s.Marks)))
	for _, m := range s.Marks {
		b = binary.AppendUvarint(b, m.Commit)
		b = binary.AppendUvarint(b, m.Seq)
		b = binary.AppendUvarint(b, m.Log)
	}
	return binary.LittleEndian.AppendUint32(b, checksum(b))
}

// Decode reads what Encode made; source names the place that it was kept in. Anything else is a *DamageError.
func Decode(source string, b []byte) (State, error) {
	damage := func(reason string) (State, error) { return State{}, &DamageError{Source: source, Reason: reason} }
	body := len(b) - 4
	if body < 1 {
		return damage(fmt.Sprintf("it has %d bytes", len(b)))
	}
	if checksum(b[:body]) != binary.LittleEndian.Uint32(b[body:]) {
		return damage("its checksum is wrong")
	}
	r := reader{rest: b[:body]}
	if v := r.byte(); v != encodingVersion {
		return damage(fmt.Sprintf("version %d is not known to this release", v))
	}
	s := State{Source: source, Journal: string(r.bytes(maxJournal)), Clean: r.byte() == 1}
	n := r.uvarint()
	if n > uint64(len(r.rest)) || n > MaxPartitions {
		return damage(fmt.Sprintf("%d marks cannot be in it", n))
	}
	s.Marks = make([]Mark, n)
	for i := range s.Marks {
		s.Marks[i] = Mark{Commit: r.uvarint(), Seq: r.uvarint(), Log: r.uvarint()}
	}
	if r.short || len(r.rest) > 0 {
		return damage("its length is wrong")
	}
	return s, nil
}

// reader takes values off a slice; short is set once one is not there.
type reader struct {
	rest  []byte
	short bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.rest)
	if n <= 0 {
		r.rest, r.short = nil, true
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

func (r *reader) byte() byte {
	if len(r.rest) == 0 {
		r.short = true
		return 0
	}
	v := r.rest[0]
	r.rest = r.rest[1:]
	return v
}

// bytes takes a length, at most limit, and what it counts.
func (r *reader) bytes(limit uint64) []byte {
	n := r.uvarint()
	if n > limit || n > uint64(len(r.rest)) {
		r.rest, r.short = nil, true
		return nil
	}
	v := r.rest[:n]
	r.rest = r.rest[n:]
	return v
}

// checksum is CRC-32C, which finds every change of up to 32 neighbouring bits.
func checksum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

// Read returns what the file at path remembers, whoever may be writing to it. Without a file the error is
// fs.ErrNotExist, for one that is nothing of the kind a *DamageError.
func Read(path string) (State, error) {
	f, err := os.Open(path)
	if err != nil {
		return State{}, fmt.Errorf("read high-water marks: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(layoutOf(MaxPartitions).size)))
	if err != nil {
		return State{}, fmt.Errorf("read high-water marks: %w", err)
	}
	h, torn, err := readHeaders(b)
	if err != nil {
		return State{}, &DamageError{Source: path, Reason: err.Error()}
	}
	s := State{Source: path, Journal: h.journal, Clean: h.clean && !torn, Marks: make([]Mark, h.partitions)}
	at, salt := layoutOf(h.partitions), saltOf(h.journal)
	for i := range s.Marks {
		var best slot
		read := 0
		for copy := range copies {
			if c, ok := readSlot(at.slot(b, i, copy), salt, i, copy); ok {
				read++
				if c.generation > best.generation {
					best = c
				}
			}
		}
		s.Marks[i] = best.Mark
		switch read {
		case 0:
			s.Lost = append(s.Lost, uint16(i))
		case 1:
			s.Torn = append(s.Torn, uint16(i))
		}
	}
	return s, nil
}

// CheckJournal says in words that s is about another journal than the one with this id.
func (s State) CheckJournal(id string) error {
	if s.Journal == id {
		return nil
	}
	return fmt.Errorf("high-water marks %s are those of journal %q, not of %q", s.Source, s.Journal, id)
}

func checkMarks(journal string, marks []Mark) error {
	switch {
	case len(marks) == 0 || len(marks) > MaxPartitions:
		return fmt.Errorf("%d partitions; 1 to %d are possible", len(marks), MaxPartitions)
	case journal == "" || len(journal) > maxJournal:
		return fmt.Errorf("a journal's id of %d bytes; 1 to %d are possible", len(journal), maxJournal)
	}
	return nil
}

// The file: a header, an array of slots, another array of slots, the header again, each beginning on a page of
// its own, so that one bad page leaves a copy of everything.
const (
	copies    = 2
	pageBytes = 4096
	slotBytes = 64 // a cache line, for partitions are noted at the same time

	headerMagic   = "grapnel high-water marks"
	formatVersion = 1
)

// layout says where things are in a file of so many partitions.
type layout struct{ array, size int }

func layoutOf(partitions int) layout {
	array := (partitions*slotBytes + pageBytes - 1) / pageBytes * pageBytes
	return layout{array: array, size: 2*pageBytes + copies*array}
}

func (l layout) slotOffset(partition, copy int) int {
	return pageBytes + copy*l.array + partition*slotBytes
}

// slot is a slot's bytes, nil if b ends before it does.
func (l layout) slot(b []byte, partition, copy int) []byte {
	from := l.slotOffset(partition, copy)
	if from+slotBytes > len(b) {
		return nil
	}
	return b[from : from+slotBytes]
}

// headerOffset is where a copy of the header is.
func (l layout) headerOffset(copy int) int {
	if copy == 0 {
		return 0
	}
	return l.size - pageBytes
}

type header struct {
	journal    string
	partitions int
	clean      bool
}

func (h header) encode() []byte {
	b := make([]byte, pageBytes)
	n := copy(b, headerMagic)
	b[n], b[n+1] = formatVersion, byte(len(h.journal))
	if h.clean {
		b[n+2] = 1
	}
	binary.LittleEndian.PutUint32(b[n+3:], uint32(h.partitions))
	copy(b[n+7:], h.journal)
	sum := n + 7 + maxJournal
	binary.LittleEndian.PutUint32(b[sum:], checksum(b[:sum]))
	return b
}

func decodeHeader(b []byte) (header, error) {
	const n = len(headerMagic)
	const sum = n + 7 + maxJournal
	if len(b) < sum+4 || string(b[:n]) != headerMagic {
		return header{}, errors.New("it does not begin as such a file does")
	}
	if checksum(b[:sum]) != binary.LittleEndian.Uint32(b[sum:]) {
		return header{}, errors.New("its header's checksum is wrong")
	}
	h := header{partitions: int(binary.LittleEndian.Uint32(b[n+3:])), clean: b[n+2] == 1}
	switch size := int(b[n+1]); {
	case b[n] != formatVersion:
		return header{}, fmt.Errorf("format %d is not known to this release", b[n])
	case size > maxJournal || h.partitions < 1 || h.partitions > MaxPartitions:
		return header{}, errors.New("its header makes no sense")
	default:
		h.journal = string(b[n+7 : n+7+size])
	}
	return h, nil
}

// readHeaders finds the header in either place. The second is a page before the end, wherever the first is not
// there to tell. Torn says that the two do not say the same.
func readHeaders(b []byte) (h header, torn bool, err error) {
	first, err := decodeHeader(b)
	at := max(0, len(b)-pageBytes)
	if err == nil {
		at = min(len(b), layoutOf(first.partitions).headerOffset(1))
	}
	second, err2 := decodeHeader(b[at:])
	switch {
	case err != nil && err2 != nil:
		return header{}, false, err
	case err != nil:
		return second, false, nil
	case err2 != nil:
		return first, false, nil
	}
	return first, first != second, nil
}

type slot struct {
	Mark
	// generation rises with every store to the partition's slots, from 1 on.
	generation uint64
}

// encode fills a slot. Partition, copy and salt are in it so that one in another's place is not taken for it.
func (s slot) encode(b []byte, salt uint32, partition, copy int) {
	binary.LittleEndian.PutUint64(b[0:], s.Commit)
	binary.LittleEndian.PutUint64(b[8:], s.Seq)
	binary.LittleEndian.PutUint64(b[16:], s.Log)
	binary.LittleEndian.PutUint64(b[24:], s.generation)
	binary.LittleEndian.PutUint32(b[32:], salt)
	binary.LittleEndian.PutUint16(b[36:], uint16(partition))
	binary.LittleEndian.PutUint16(b[38:], uint16(copy))
	binary.LittleEndian.PutUint32(b[40:], checksum(b[:40]))
}

func readSlot(b []byte, salt uint32, partition, copy int) (s slot, ok bool) {
	if b == nil || checksum(b[:40]) != binary.LittleEndian.Uint32(b[40:]) ||
		binary.LittleEndian.Uint32(b[32:]) != salt ||
		int(binary.LittleEndian.Uint16(b[36:])) != partition ||
		int(binary.LittleEndian.Uint16(b[38:])) != copy {
		return slot{}, false
	}
	s.Commit = binary.LittleEndian.Uint64(b[0:])
	s.Seq = binary.LittleEndian.Uint64(b[8:])
	s.Log = binary.LittleEndian.Uint64(b[16:])
	s.generation = binary.LittleEndian.Uint64(b[24:])
	return s, true
}

func saltOf(journal string) uint32 { return checksum([]byte(journal)) }
