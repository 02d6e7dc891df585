package salvage

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/batchrepr"
)

// Log is what has been found out about one file of the write-ahead log.
type Log struct {
	// Path names the file.
	Path string
	// Number is the log's.
	Number uint64
	// Needed says that tables do not hold all of it: a start replays it.
	Needed bool
	// Bytes is the file's size. Intact is how much of it, from the front, can be read without a gap.
	Bytes, Intact int64
	// Gaps are parts that cannot be read with others behind them that can.
	Gaps []Gap
	// Ending is how what can be read ends, at End. A log that was followed by another, or by an orderly stop,
	// must be Closed.
	Ending Ending
	End    int64
	// Batches can be read; Behind counts those of them that come after the first gap.
	Batches, Behind int
	// Skipped is how many changes are missing, by the sequence numbers, before the log or between its batches. A table
	// that was taken in from elsewhere while the log was written counts as one, if it has been compacted since.
	Skipped uint64
	// Newest: no other log has a higher number.
	Newest bool
}

// Damaged says whether something that was written is certainly gone from the log. That the newest log's end was cut
// off cannot be seen in it: the high-water marks tell.
func (l Log) Damaged() bool {
	return l.Needed && (len(l.Gaps) > 0 || l.Skipped > 0 || l.Ending == Cut && !l.Newest)
}

// text says it for people.
func (l Log) text() []string {
	if !l.Needed {
		return []string{"is in the tables"}
	}
	var lines []string
	if l.Skipped > 0 {
		lines = append(lines, fmt.Sprintf("%d changes are missing before or in it", l.Skipped))
	}
	for _, g := range l.Gaps {
		lines = append(lines, g.String())
	}
	summary := fmt.Sprintf("%d batches can be read", l.Batches)
	if len(l.Gaps) > 0 {
		summary += fmt.Sprintf(", intact up to offset %d, %d batches behind it", l.Intact, l.Behind)
	}
	switch {
	case l.Ending == Closed:
		summary += "; it was closed in order"
	case l.Newest:
		summary += fmt.Sprintf("; it ends at offset %d without having been closed, as after a kill", l.End)
	default:
		summary += fmt.Sprintf("; its end is missing from offset %d on", l.End)
	}
	return append(lines, summary)
}

// change is one entry of a batch. Key and value belong to the log's content.
type change struct {
	kind       pebble.InternalKeyKind
	seq        uint64
	key, value []byte
}

// logFile is a log with its content.
type logFile struct {
	Log
	changes []change
	// first and after are the sequence numbers of the first batch and after the last one; 0 if there is none.
	first, after uint64
	// holes are the sequence numbers that are missing between batches.
	holes []hole
}

// hole are the sequence numbers from one on and below another.
type hole struct{ from, to uint64 }

// readLog reads a log in full. Memory: the file, and once more what is in it if it is to be kept.
func readLog(path string, number uint64, keep bool) (*logFile, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	l := &logFile{Log: Log{Path: path, Number: number, Bytes: int64(len(b)), Needed: true}}
	s := chunks{b: b, number: uint32(number)}.scan(func(offset int64, record []byte, behind bool) {
		if !l.take(record, keep) {
			l.Gaps = append(l.Gaps, Gap{From: offset, To: offset + int64(len(record)), Reason: "the batch makes no sense"})
			return
		}
		l.Batches++
		if behind {
			l.Behind++
		}
	})
	l.Gaps = append(l.Gaps, s.gaps...)
	slices.SortFunc(l.Gaps, func(a, b Gap) int { return int(a.From - b.From) })
	l.Intact, l.Ending, l.End = s.intact, s.ending, s.end
	if len(l.Gaps) > 0 {
		l.Intact = min(l.Intact, l.Gaps[0].From)
	}
	return l, nil
}

// take adds a batch's changes, or only counts them; false if it is not one.
func (l *logFile) take(record []byte, keep bool) bool {
	h, ok := batchrepr.ReadHeader(record)
	if !ok {
		return false
	}
	if h.Count == 0 {
		return true // it was written for its sync
	}
	if keep {
		changes, ok := decodeBatch(slices.Clone(record), uint64(h.SeqNum))
		if !ok || len(changes) != int(h.Count) {
			return false
		}
		l.changes = append(l.changes, changes...)
	}
	first := uint64(h.SeqNum)
	if l.first == 0 {
		l.first = first
	}
	if l.after != 0 && first > l.after {
		l.holes = append(l.holes, hole{l.after, first})
	}
	l.after = first + uint64(h.Count)
	return true
}

// decodeBatch returns what is in a batch; the changes refer to record. Pebble's reader may leave the slice when the
// record is none of its own.
func decodeBatch(record []byte, seq uint64) (changes []change, ok bool) {
	defer func() {
		if recover() != nil {
			changes, ok = nil, false
		}
	}()
	r := batchrepr.Read(record)
	for {
		kind, key, value, more, err := r.Next()
		if err != nil {
			return nil, false
		}
		if !more {
			return changes, true
		}
		if kind == pebble.InternalKeyKindLogData {
			continue
		}
		changes = append(changes, change{kind: kind, seq: seq + uint64(len(changes)), key: key, value: value})
	}
}

// readLogs reads the logs of a directory in order of their numbers.
func readLogs(dir string, names []string, keep bool) ([]*logFile, error) {
	var logs []*logFile
	for _, name := range names {
		number, ok := numbered(name, ".log")
		if !ok {
			continue
		}
		l, err := readLog(filepath.Join(dir, name), number, keep)
		if err != nil {
			return nil, err
		}
		logs = append(logs, l)
	}
	slices.SortFunc(logs, func(a, b *logFile) int { return int(int64(a.Number) - int64(b.Number)) })
	return logs, nil
}

// linkLogs notes what is missing in needed logs and between them, as each begins where the one before it ended, and the
// first at after or before; 0: that is not known. Taken are sequence numbers that are in no log: those of tables that
// were taken in.
func linkLogs(logs []*logFile, after uint64, taken []uint64) {
	for i, l := range logs {
		l.Newest = i == len(logs)-1
		if !l.Needed {
			l.changes = nil
			continue
		}
		if after != 0 && l.first > after {
			l.holes = append(l.holes, hole{after, l.first})
		}
		after = max(after, l.after)
		for _, h := range l.holes {
			l.Skipped += h.to - h.from
			for _, seq := range taken {
				if h.from <= seq && seq < h.to {
					l.Skipped--
				}
			}
		}
	}
}

// numbered is the number of a file named like 000123.log.
func numbered(name, suffix string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, suffix)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, err == nil
}
