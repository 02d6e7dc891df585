package salvage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Manifest is what has been found out about the file that says which tables and logs count.
type Manifest struct {
	// Path names the file; empty when none could be found.
	Path string
	// Reason says why it cannot be relied on; empty when it can. Otherwise every table and log counts, among them
	// such as had been replaced: rows may come back that had been erased or had changed.
	Reason string
	// Missing are tables that it names and that are not there.
	Missing []string
}

// Trusted says whether the manifest can be relied on.
func (m Manifest) Trusted() bool { return m.Reason == "" }

// damage says it for people, each line beginning with a path.
func (m Manifest) damage(dir string) []string {
	name := m.Path
	if name == "" {
		name = filepath.Join(dir, "MANIFEST-*")
	}
	lines := []string{name + ": DAMAGED: " + m.Reason}
	for _, missing := range m.Missing {
		lines = append(lines, missing+": MISSING")
	}
	return lines
}

// span is the part of a table that counts: the keys from first to last. Nil means all.
type span struct{ first, last []byte }

// role is what a manifest says about a table.
type role struct {
	// spans are the parts that count; none means all of it.
	spans []span
	// bytes is the size of the file; 0: it is not known.
	bytes int64
	// seq is the sequence number of all entries of a table that was made elsewhere and taken in; 0: each has its own.
	seq uint64
}

// version is what a manifest says.
type version struct {
	Manifest
	// tables that count, by number.
	tables map[uint64]role
	// needed are the logs that are not in the tables.
	needed  map[uint64]bool
	highest uint64 // number of a table
	// after is the first sequence number that it does not know of; the first needed log begins there or before. 0: not
	// known.
	after uint64
}

// readManifest has Pebble read the manifest of dir, beside empty logs of the same names: in memory, so that nothing is
// changed. Logs are their numbers.
func readManifest(dir string, names []string, logs []*logFile) version {
	v := version{}
	desc, err := pebble.Peek(dir, vfs.Default)
	switch {
	case err != nil:
		v.Reason = err.Error()
		return v
	case !desc.Exists:
		v.Reason = "there is no manifest"
		return v
	}
	v.Path = desc.ManifestFilename
	b, err := os.ReadFile(v.Path)
	if err != nil {
		v.Reason = err.Error()
		return v
	}
	s := chunks{b: b, manifest: true}.scan(func(_ int64, edit []byte, _ bool) {
		if last, ok := lastSequence(edit); ok {
			v.after = max(v.after, last+1, firstSequence)
		}
	})
	if len(s.gaps) > 0 {
		v.Reason = s.gaps[0].String()
		return v
	}
	if err := v.load(dir, names, logs); err != nil {
		v.Reason = err.Error()
		return v
	}
	v.needLogs(logs)
	if first, ok := firstNeeded(logs); ok && first > v.after && v.newerTables(names) {
		v.Reason = fmt.Sprintf("its end is missing: %d changes before the first log are not in the tables that it names", first-v.after)
	}
	if len(v.Missing) > 0 {
		v.Reason = fmt.Sprintf("%d of the tables that it names are missing", len(v.Missing))
	}
	return v
}

// needLogs notes which logs a start replays.
func (v version) needLogs(logs []*logFile) {
	for _, l := range logs {
		l.Needed = v.needed[l.Number]
	}
}

// firstNeeded is the sequence number with which the logs that are needed begin.
func firstNeeded(logs []*logFile) (uint64, bool) {
	for _, l := range logs {
		if l.Needed && l.first != 0 {
			return l.first, true
		}
	}
	return 0, false
}

// newerTables says whether there are tables that are newer than the manifest knows. A kill between a table and its
// entry leaves such ones, too.
func (v version) newerTables(names []string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		n, ok := numbered(name, ".sst")
		return ok && n > v.highest
	})
}

// firstSequence is the first sequence number that Pebble gives (pebble/internal/base).
const firstSequence = 10

// Tags of an edit that come before the last sequence number (pebble/internal/manifest/version_edit.go).
const (
	tagComparer       = 1
	tagLogNumber      = 2
	tagNextFile       = 3
	tagLastSequence   = 4
	tagPrevLog        = 9
	tagCreatedBacking = 105
	tagRemovedBacking = 106
)

// lastSequence is the highest sequence number that was given when an edit was made.
func lastSequence(edit []byte) (uint64, bool) {
	number := func() uint64 {
		n, size := binary.Uvarint(edit)
		edit = edit[max(size, 0):]
		return n
	}
	for len(edit) > 0 {
		switch number() {
		case tagLastSequence:
			return number(), true
		case tagComparer:
			n := number()
			edit = edit[min(n, uint64(len(edit))):]
		case tagLogNumber, tagNextFile, tagPrevLog, tagRemovedBacking:
			number()
		case tagCreatedBacking:
			number()
			number()
		default:
			return 0, false
		}
	}
	return 0, false
}

// load reads the version. Pebble may panic on a manifest that makes no sense.
func (v *version) load(dir string, names []string, logs []*logFile) (err error) {
	defer recoverTo(&err)
	fs := vfs.NewMem()
	if err := fs.MkdirAll(imageDir, 0o700); err != nil {
		return err
	}
	for _, name := range names {
		switch _, table := numbered(name, ".sst"); {
		case name == filepath.Base(v.Path) || isMarker(name):
			err = copyIn(fs, filepath.Join(dir, name), name)
		case table:
			err = touch(fs, name)
		}
		if err != nil {
			return err
		}
	}
	for _, l := range logs {
		if err := touch(fs, filepath.Base(l.Path)); err != nil {
			return err
		}
	}
	for {
		err := v.list(fs)
		number, ok := unknownTable(err)
		if !ok {
			return err
		}
		name := fmt.Sprintf("%06d.sst", number)
		v.Missing = append(v.Missing, filepath.Join(dir, name))
		if err := touch(fs, name); err != nil {
			return err
		}
	}
}

// unknownTable is the number of the table that an error says is not there; Pebble has no type for it.
func unknownTable(err error) (number uint64, ok bool) {
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return 0, false
	}
	_, text, _ := strings.Cut(err.Error(), "file ")
	digits, _, _ := strings.Cut(text, " ")
	number, err = strconv.ParseUint(digits, 10, 64)
	return number, err == nil
}

// imageDir is where the image of the directory is in memory.
const imageDir = "journal"

// list has Pebble list the tables of the image.
func (v *version) list(fs *vfs.MemFS) error {
	v.needed = map[uint64]bool{}
	db, err := pebble.Open(imageDir, &pebble.Options{
		FS: watched{fs, v.needed}, ReadOnly: true, DisableConsistencyCheck: true, ErrorIfNotExists: true, Logger: silent{},
		FormatMajorVersion: pebble.FormatNewest,
	})
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }() // nothing was written
	levels, err := db.SSTables()
	if err != nil {
		return err
	}
	v.tables = map[uint64]role{}
	for _, level := range levels {
		for _, t := range level {
			n := uint64(t.BackingSSTNum)
			r := v.tables[n]
			if t.Virtual {
				r.spans = append(r.spans, span{first: t.Smallest.UserKey, last: t.Largest.UserKey})
			} else {
				r.bytes = int64(t.Size)
			}
			if t.SmallestSeqNum == t.LargestSeqNum {
				r.seq = uint64(t.SmallestSeqNum)
			}
			v.tables[n] = r
			v.highest = max(v.highest, n)
		}
	}
	return nil
}

// watched sees which logs Pebble replays.
type watched struct {
	vfs.FS
	logs map[uint64]bool
}

func (w watched) Open(name string, options ...vfs.OpenOption) (vfs.File, error) {
	if n, ok := numbered(w.PathBase(name), ".log"); ok {
		w.logs[n] = true
	}
	return w.FS.Open(name, options...)
}

// takeIn adds the tables that were taken in by the logs that are needed; key is the number of such a table.
func (v *version) takeIn(logs []*logFile) {
	for _, l := range logs {
		for _, c := range l.changes {
			if n, size := binary.Uvarint(c.key); l.Needed && c.kind == pebble.InternalKeyKindIngestSST && size > 0 && v.tables != nil {
				v.tables[n] = role{seq: c.seq}
			}
		}
	}
}

// taken are the sequence numbers of tables that were taken in, each once.
func (v *version) taken() []uint64 {
	var taken []uint64
	for _, r := range v.tables {
		if r.seq != 0 {
			taken = append(taken, r.seq)
		}
	}
	slices.Sort(taken)
	return slices.Compact(taken)
}

// counts says whether a table is to be read. One that is newer than the manifest knows repeats what others have or what
// the manifest lost.
func (v version) counts(table uint64) (role, bool) {
	r, ok := v.tables[table]
	return r, ok || !v.Trusted() || table > v.highest
}

// isMarker says whether a file tells Pebble which manifest and format are in use.
func isMarker(name string) bool {
	ok, _ := filepath.Match("marker.*", name)
	return ok
}

func copyIn(fs *vfs.MemFS, from, name string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	out, err := fs.Create(fs.PathJoin(imageDir, name), vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = out.Write(b)
	return errors.Join(err, out.Close())
}

// touch makes an empty file.
func touch(fs *vfs.MemFS, name string) error {
	f, err := fs.Create(fs.PathJoin(imageDir, name), vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	return f.Close()
}

// silent keeps Pebble from writing to standard error. What it would say is in the errors that it returns.
type silent struct{}

func (silent) Infof(string, ...any)  {}
func (silent) Errorf(string, ...any) {}

func (silent) Eventf(context.Context, string, ...any) {}
func (silent) IsTracingEnabled(context.Context) bool  { return false }

// Fatalf must not return.
func (silent) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
