package salvage_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/server/delivery/salvage"
)

//nolint:gochecknoglobals // a test flag
var more = flag.Int("salvage.seeds", 1, "how many times as many seeds")

func seeds(n int) uint64 {
	if testing.Short() {
		return 1
	}
	return uint64(n * *more)
}

// store is a database in use, with everything that was ever written to it.
type store struct {
	t       *testing.T
	dir     string
	db      *pebble.DB
	rng     *rand.Rand
	gate    *gate
	compact bool
	rows    map[string]string
	history map[string]map[string]bool // key → all values that it had
	batches int
}

// gate is a file system that holds back new tables while it is shut, so that logs stay needed.
type gate struct {
	vfs.FS
	shut sync.RWMutex // locked: it is shut
}

func (g *gate) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if strings.HasSuffix(name, ".sst") {
		g.shut.RLock()
		defer g.shut.RUnlock()
	}
	return g.FS.Create(name, c)
}

func options(fs vfs.FS) *pebble.Options {
	return &pebble.Options{
		FS: fs, FormatMajorVersion: pebble.FormatNewest, MemTableSize: 256 << 10, MemTableStopWritesThreshold: 100, L0StopWritesThreshold: 100,
		LBaseMaxBytes: 1 << 20, Logger: quiet{},
	}
}

type quiet struct{}

func (quiet) Infof(string, ...any)         {}
func (quiet) Errorf(string, ...any)        {}
func (quiet) Fatalf(f string, args ...any) { panic(fmt.Sprintf(f, args...)) }

func newStore(t *testing.T, seed uint64) *store {
	t.Helper()
	s := &store{
		t: t, dir: filepath.Join(t.TempDir(), "journal"), rng: rand.New(rand.NewPCG(seed, 5)),
		gate: &gate{FS: vfs.Default}, compact: true, rows: map[string]string{}, history: map[string]map[string]bool{},
	}
	s.open() // the first log of a database is of another format than the later ones
	s.close()
	s.open()
	return s
}

func (s *store) open() {
	s.t.Helper()
	o := options(s.gate)
	o.DisableAutomaticCompactions = !s.compact
	db, err := pebble.Open(s.dir, o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.db = db
}

func (s *store) close() {
	s.t.Helper()
	if err := s.db.Close(); err != nil {
		s.t.Fatal(err)
	}
}

// write makes batches as a journal does: rows that are new, that change, that go, and ranges that go.
func (s *store) write(batches int) {
	s.t.Helper()
	for range batches {
		b := s.db.NewBatch()
		for range 1 + s.rng.IntN(8) {
			key := fmt.Sprintf("%02d/%05d", s.rng.IntN(8), s.rng.IntN(3000))
			switch _, there := s.rows[key]; {
			case there && s.rng.IntN(3) == 0:
				_ = b.Delete([]byte(key), nil)
				delete(s.rows, key)
			default:
				value := make([]byte, s.rng.IntN(1200)+8)
				for i := 0; i+8 <= len(value); i += 8 {
					binary.LittleEndian.PutUint64(value[i:], s.rng.Uint64())
				}
				_ = b.Set([]byte(key), value, nil)
				s.rows[key] = string(value)
				if s.history[key] == nil {
					s.history[key] = map[string]bool{}
				}
				s.history[key][string(value)] = true
			}
		}
		if s.batches++; s.batches%100 == 0 {
			from, to := s.aRange()
			_ = b.DeleteRange([]byte(from), []byte(to), nil)
			maps.DeleteFunc(s.rows, func(k, _ string) bool { return k >= from && k < to })
		}
		if err := b.Commit(pebble.NoSync); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := s.db.LogData(nil, pebble.Sync); err != nil {
		s.t.Fatal(err)
	}
}

func (s *store) aRange() (from, to string) {
	part, at := s.rng.IntN(8), s.rng.IntN(3000)
	return fmt.Sprintf("%02d/%05d", part, at), fmt.Sprintf("%02d/%05d", part, at+50)
}

// image is what kill -9 would leave just now: a copy of all files, while no table is being made.
func (s *store) image() string {
	s.t.Helper()
	to := filepath.Join(s.t.TempDir(), "journal")
	check(s.t, os.Mkdir(to, 0o700))
	entries, err := os.ReadDir(s.dir)
	check(s.t, err)
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(s.dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it is no longer needed, and going
		}
		check(s.t, err)
		check(s.t, os.WriteFile(filepath.Join(to, e.Name()), b, 0o600))
	}
	return to
}

// killed is a directory as after a kill: tables, several logs that are not in them, the newest one not closed.
func killed(t *testing.T, seed uint64) (*store, string) {
	t.Helper()
	s := newStore(t, seed)
	s.write(2000)
	s.close()
	s.compact = false
	s.open()
	s.gate.shut.Lock()
	s.write(300)
	dir := s.image()
	s.gate.shut.Unlock()
	s.close()
	return s, dir
}

// stopped is a directory after an orderly stop.
func stopped(t *testing.T, seed uint64) (*store, string) {
	t.Helper()
	s := newStore(t, seed)
	s.write(2000)
	s.close()
	return s, s.image()
}

// in is s for a subtest, which has a copy of dir for itself.
func (s *store) in(t *testing.T, dir string) (*store, string) {
	t.Helper()
	own := &store{t: t, rows: s.rows, history: s.history}
	to := filepath.Join(t.TempDir(), "journal")
	check(t, os.CopyFS(to, os.DirFS(dir)))
	return own, to
}

// salvaged copies dir and returns the rows of the copy, as Pebble reads them, after holding against each other what
// must agree: Check, Copy, and that dir has not changed.
func (s *store) salvaged(dir string) (map[string]string, *salvage.Report) {
	s.t.Helper()
	before := sums(s.t, dir)
	checked, err := salvage.Check(context.Background(), dir)
	if err != nil {
		s.t.Fatal(err)
	}
	to := filepath.Join(s.t.TempDir(), "salvaged")
	report, err := salvage.Copy(context.Background(), dir, to, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if diff := cmp.Diff(before, sums(s.t, dir)); diff != "" {
		s.t.Error("the journal was changed:", diff)
	}
	checked.To = to
	if diff := cmp.Diff(checked, report); diff != "" {
		s.t.Error("check and copy differ:", diff)
	}
	if left, _ := filepath.Glob(filepath.Join(to, "rows-*")); len(left) > 0 {
		s.t.Error("left behind:", left)
	}
	rows := readRows(s.t, to)
	if report.Rows != uint64(len(rows)) {
		s.t.Errorf("%d rows reported, %d there", report.Rows, len(rows))
	}
	for key, value := range rows {
		if !s.history[key][value] {
			s.t.Errorf("row %s has a value that it never had", key)
		}
	}
	return rows, report
}

func readRows(t *testing.T, dir string) map[string]string {
	t.Helper()
	db, err := pebble.Open(dir, options(vfs.Default))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	it, err := db.NewIter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	rows := map[string]string{}
	for ok := it.First(); ok; ok = it.Next() {
		rows[string(it.Key())] = string(it.Value())
	}
	if err := it.Error(); err != nil {
		t.Fatal(err)
	}
	return rows
}

func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		sums[path] = fmt.Sprintf("%x", sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sums
}

// missing counts rows of want that are not in got as they are.
func missing(want, got map[string]string) (n int) {
	for key, value := range want {
		if got[key] != value {
			n++
		}
	}
	return n
}

func text(t *testing.T, r *salvage.Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestWhatIsIntactIsCopiedAsItIs(t *testing.T) {
	for seed := range seeds(2) {
		for name, make := range map[string]func(*testing.T, uint64) (*store, string){"killed": killed, "stopped": stopped} {
			t.Run(fmt.Sprint(name, seed), func(t *testing.T) {
				t.Parallel()
				s, dir := make(t, seed)
				rows, report := s.salvaged(dir)
				if len(rows) != len(s.rows) || missing(s.rows, rows) > 0 {
					t.Errorf("%d rows of %d, %d wrong", len(rows), len(s.rows), missing(s.rows, rows))
					t.Log(text(t, report))
				}
				if report.Damaged() || report.Lost() > 0 {
					t.Errorf("damage was seen where there is none:\n%s", text(t, report))
				}
				needed := slices.DeleteFunc(slices.Clone(report.Logs), func(l salvage.Log) bool { return !l.Needed })
				if name == "killed" && (len(needed) < 2 || len(report.Tables) < 2) {
					t.Errorf("%d logs and %d tables are too few for this test", len(needed), len(report.Tables))
				}
			})
		}
	}
}

// neededLogs are those of a killed directory that a start replays, oldest first.
func neededLogs(t *testing.T, dir string) []salvage.Log {
	t.Helper()
	r, err := salvage.Check(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(r.Logs, func(l salvage.Log) bool { return !l.Needed })
}

func flip(t *testing.T, path string, at int64) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// One flipped bit in a log costs the batches whose bytes it is in, and everything in front of them and behind them is
// there.
func TestFlippedLog(t *testing.T) {
	for seed := range seeds(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			s, dir := killed(t, seed)
			logs := neededLogs(t, dir)
			l := logs[s.rng.IntN(len(logs))]
			at := s.rng.Int64N(l.End)
			flip(t, l.Path, at)
			rows, report := s.salvaged(dir)
			if n := missing(s.rows, rows); n > 8+50 { // of a batch; its range deletion may be gone
				t.Errorf("%d rows are gone", n)
			}
			if !report.Damaged() {
				t.Errorf("bit at %d of %d not seen:\n%s", at, l.End, text(t, report))
			}
			i := slices.IndexFunc(report.Logs, func(r salvage.Log) bool { return r.Path == l.Path })
			found := report.Logs[i]
			if len(found.Gaps) == 0 || found.Gaps[0].From > at || found.Gaps[0].To <= at || found.Batches < l.Batches-1 {
				t.Errorf("bit at %d: %+v", at, found)
			}
			if !strings.Contains(text(t, report), l.Path+": DAMAGED") {
				t.Errorf("it says\n%s", text(t, report))
			}
		})
	}
}

// A log that went from between others is missed by its sequence numbers.
func TestDeletedLog(t *testing.T) {
	s, dir := killed(t, 1)
	logs := neededLogs(t, dir)
	if len(logs) < 3 {
		t.Fatalf("only %d logs", len(logs))
	}
	if err := os.Remove(logs[1].Path); err != nil {
		t.Fatal(err)
	}
	_, report := s.salvaged(dir)
	if !report.Damaged() || report.Lost() == 0 {
		t.Errorf("it says\n%s", text(t, report))
	}
}

// A log that others follow must have been closed.
func TestTruncatedLog(t *testing.T) {
	s, dir := killed(t, 2)
	l := neededLogs(t, dir)[0]
	if err := os.Truncate(l.Path, l.End/2); err != nil {
		t.Fatal(err)
	}
	_, report := s.salvaged(dir)
	if !report.Damaged() || report.Lost() == 0 || !strings.Contains(text(t, report), "its end is missing") {
		t.Errorf("it says\n%s", text(t, report))
	}
}

// Of a table with damaged blocks every other block is copied.
func TestFlippedTable(t *testing.T) {
	for seed := range seeds(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			s, dir := killed(t, seed)
			tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
			if err != nil {
				t.Fatal(err)
			}
			path := tables[s.rng.IntN(len(tables))]
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			flips, part := 1, info.Size()
			if seed%2 == 0 { // several, in what has an index behind it
				flips, part = 1+s.rng.IntN(4), info.Size()*8/10
			}
			for range flips {
				flip(t, path, s.rng.Int64N(part))
			}
			rows, report := s.salvaged(dir)
			i := slices.IndexFunc(report.Tables, func(r salvage.Table) bool { return r.Path == path })
			if i < 0 {
				t.Skip("the table does not count")
			}
			table := report.Tables[i]
			if n := missing(s.rows, rows); n > flips*40 || !table.Damaged() {
				t.Errorf("%d rows are gone:\n%s", n, text(t, report))
			}
			if len(table.Damage) > flips || table.Read == 0 {
				t.Errorf("%+v", table)
			}
		})
	}
}

// A table that has lost its index, its footer or its end is read from the front as far as it goes.
func TestTableWithoutIndex(t *testing.T) {
	origin, image := killed(t, 5)
	for name, damage := range map[string]func(b []byte) []byte{
		"footer":     func(b []byte) []byte { b[len(b)-20] ^= 1; return b },
		"magic":      func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"properties": func(b []byte) []byte { b[len(b)-400] ^= 1; return b },
		"index":      func(b []byte) []byte { b[len(b)-1500] ^= 1; return b },
		"half":       func(b []byte) []byte { return b[:len(b)/2] },
		"last byte":  func(b []byte) []byte { return b[:len(b)-1] },
		"empty":      func(b []byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, dir := origin.in(t, image)
			before, err := salvage.Check(context.Background(), dir)
			check(t, err)
			largest := slices.MaxFunc(before.Tables, func(a, b salvage.Table) int { return int(a.Bytes - b.Bytes) })
			b, err := os.ReadFile(largest.Path)
			check(t, err)
			check(t, os.WriteFile(largest.Path, damage(b), 0o600))
			rows, report := s.salvaged(dir)
			i := slices.IndexFunc(report.Tables, func(r salvage.Table) bool { return r.Path == largest.Path })
			table := report.Tables[i]
			want := largest.Read
			switch name {
			case "half":
				want = want * 4 / 10
			case "empty":
				want = 0
			}
			if !table.Damaged() || table.Read < want-50 && want > 0 {
				t.Errorf("%d of %d entries:\n%s", table.Read, largest.Read, text(t, report))
			}
			if name != "half" && name != "empty" && missing(s.rows, rows) > 50 {
				t.Errorf("%d rows are gone:\n%s", missing(s.rows, rows), text(t, report))
			}
		})
	}
}

// What was taken in from elsewhere is as new as the moment of that, whatever its entries say; whether Pebble noted it in the
// log or not.
func TestTableTakenIn(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		s := newStore(t, 6)
		s.close()
		s.compact = false // what has been compacted no longer tells that it was taken in
		s.open()
		s.write(200)
		check(t, s.db.DeleteRange([]byte("00"), []byte("99"), pebble.Sync))
		if flushed { // nothing in memory is where the table goes
			check(t, s.db.Flush())
			check(t, s.db.Set([]byte("99/x"), []byte("before"), pebble.Sync))
		}
		s.rows = map[string]string{}
		path := s.table("taken in", 1000)
		check(t, s.db.Ingest(context.Background(), []string{path}))
		s.write(20)
		if flushed {
			s.rows["99/x"], s.history["99/x"] = "before", map[string]bool{"before": true}
		}
		s.close()
		rows, report := s.salvaged(s.dir)
		if len(rows) != len(s.rows) || missing(s.rows, rows) > 0 || report.Damaged() {
			t.Errorf("flushed %v: %d rows of %d, %d wrong\n%s", flushed, len(rows), len(s.rows), missing(s.rows, rows), text(t, report))
		}
	}
}

// table makes one that can be taken in.
func (s *store) table(value string, rows int) string {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), "table")
	f, err := vfs.Default.Create(path, vfs.WriteCategoryUnspecified)
	check(s.t, err)
	o := options(vfs.Default)
	o.EnsureDefaults()
	w := sstable.NewWriter(objstorageprovider.NewFileWritable(f), o.MakeWriterOptions(6, s.db.TableFormat()))
	for i := range rows {
		key := fmt.Sprintf("%02d/%05d", i/200, i)
		check(s.t, w.Set([]byte(key), []byte(value)))
		s.rows[key] = value
		s.history[key] = map[string]bool{value: true}
	}
	check(s.t, w.Close())
	return path
}

// Without its manifest a journal has all its rows; some that were erased may be back, and that is said.
func TestManifestGone(t *testing.T) {
	origin, image := killed(t, 3)
	for name, damage := range map[string]func(t *testing.T, dir, manifest string){
		"deleted": func(t *testing.T, _, manifest string) { check(t, os.Remove(manifest)) },
		"emptied": func(t *testing.T, _, manifest string) { check(t, os.Truncate(manifest, 0)) },
		"flipped": func(t *testing.T, _, manifest string) { flip(t, manifest, 100) },
		"garbage": func(t *testing.T, _, manifest string) {
			check(t, os.WriteFile(manifest, bytes.Repeat([]byte("garbage "), 1000), 0o600))
		},
		"no marker": func(t *testing.T, dir, _ string) {
			markers, _ := filepath.Glob(filepath.Join(dir, "marker.manifest*"))
			for _, m := range markers {
				check(t, os.Remove(m))
			}
		},
		"truncated": func(t *testing.T, _, manifest string) {
			info, err := os.Stat(manifest)
			check(t, err)
			check(t, os.Truncate(manifest, info.Size()/2))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, dir := origin.in(t, image)
			desc, err := pebble.Peek(dir, vfs.Default)
			check(t, err)
			damage(t, dir, desc.ManifestFilename)
			rows, report := s.salvaged(dir)
			if n := missing(s.rows, rows); n > 0 {
				t.Errorf("%d of %d rows are gone:\n%s", n, len(s.rows), text(t, report))
			}
			if report.Manifest.Trusted() || !strings.Contains(text(t, report), "may come back") {
				t.Errorf("it says\n%s", text(t, report))
			}
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestMissingTableIsNamed(t *testing.T) {
	s, dir := killed(t, 4)
	r, err := salvage.Check(context.Background(), dir)
	check(t, err)
	largest := slices.MaxFunc(r.Tables, func(a, b salvage.Table) int { return int(a.Bytes - b.Bytes) })
	check(t, os.Remove(largest.Path))
	_, report := s.salvaged(dir)
	if !slices.Contains(report.Manifest.Missing, largest.Path) || !strings.Contains(text(t, report), largest.Path+": MISSING") {
		t.Errorf("it says\n%s", text(t, report))
	}
}

func TestRefusals(t *testing.T) {
	s := newStore(t, 1)
	to := filepath.Join(t.TempDir(), "salvaged")
	if _, err := salvage.Copy(context.Background(), s.dir, to, nil); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("in use: %v", err)
	}
	s.close()
	if _, err := salvage.Copy(context.Background(), s.dir, s.dir, nil); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("onto itself: %v", err)
	}
	if _, err := salvage.Check(context.Background(), to); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	for _, file := range []string{"", "notes.txt"} {
		dir := t.TempDir()
		if file != "" {
			if err := os.WriteFile(filepath.Join(dir, file), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := salvage.Check(context.Background(), dir); !errors.Is(err, salvage.ErrNone) {
			t.Errorf("a directory with %q: %v", file, err)
		}
		if left, _ := os.ReadDir(dir); len(left) > 1 || len(left) == 1 && left[0].Name() != file {
			t.Errorf("left behind: %v", left)
		}
	}
	lock := filepath.Join(s.dir, "LOCK")
	if err := os.Remove(lock); err != nil {
		t.Fatal(err)
	}
	if _, err := salvage.Check(context.Background(), s.dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(lock); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a lock file was left where there was none: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.open()
	s.write(2000)
	s.close()
	if _, err := salvage.Copy(ctx, s.dir, to, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(to)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A log is written over an older one, whose records are behind its end then. One of them may hold the bytes of the mark at
// the end of a closed log, which has no checksum.
func TestWhatTheLogWasBeforeIsNoDamage(t *testing.T) {
	_, dir := killed(t, 1)
	logs := neededLogs(t, dir)
	l := logs[len(logs)-1]
	b, err := os.ReadFile(l.Path)
	check(t, err)
	const block, room = 32 << 10, 200
	b = b[:l.End]
	if left := block - len(b)%block; left < room {
		b = append(b, make([]byte, left)...)
	}
	b = append(b, "the end of a record"...)
	var number uint32
	_, err = fmt.Sscanf(filepath.Base(l.Path), "%06d.log", &number)
	check(t, err)
	mark := binary.LittleEndian.AppendUint32([]byte{0, 0, 0, 0, 0, 0, 5}, number+1)
	for range 2 {
		chunk := append(binary.LittleEndian.AppendUint32([]byte{5}, number-1), mark...)
		sum := crc32.Checksum(chunk, crc32.MakeTable(crc32.Castagnoli))
		b = binary.LittleEndian.AppendUint32(b, (sum>>15|sum<<17)+0xa282ead8)
		b = append(binary.LittleEndian.AppendUint16(b, uint16(len(mark))), chunk...)
	}
	check(t, os.WriteFile(l.Path, b, 0o600))
	report, err := salvage.Check(t.Context(), dir)
	check(t, err)
	if report.Damaged() {
		t.Errorf("damaged:\n%s", text(t, report))
	}
}
