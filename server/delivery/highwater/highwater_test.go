package highwater_test

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/server/delivery/highwater"
)

const journal = "0123456789"

func create(t testing.TB, path string, marks ...highwater.Mark) *highwater.File {
	t.Helper()
	f, err := highwater.Create(path, journal, marks)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close(false) })
	return f
}

func read(t testing.TB, path string) highwater.State {
	t.Helper()
	s, err := highwater.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWhatIsNotedIsReadByOthersAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	f := create(t, path, highwater.Mark{Commit: 5, Seq: 50, Log: 2}, highwater.Mark{})
	f.Note(1, highwater.Mark{Commit: 7, Seq: 70, Log: 3})
	f.Note(0, highwater.Mark{Commit: 4, Seq: 999}) // below: changes nothing
	f.Note(0, highwater.Mark{Commit: 6})           // settles only: the newest event stays
	want := highwater.State{
		Source: path, Journal: journal,
		Marks: []highwater.Mark{{Commit: 6, Seq: 50, Log: 2}, {Commit: 7, Seq: 70, Log: 3}},
	}
	if diff := cmp.Diff(want, read(t, path)); diff != "" {
		t.Error("read beside the writer:", diff)
	}
	if diff := cmp.Diff(want, f.State()); diff != "" {
		t.Error("state:", diff)
	}
	if err := f.Close(true); err != nil {
		t.Fatal(err)
	}
	f.Note(0, highwater.Mark{Commit: 100})
	want.Clean = true
	if diff := cmp.Diff(want, read(t, path)); diff != "" {
		t.Error("after a clean close:", diff)
	}
	if err := f.Sync(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("sync after close: %v", err)
	}
}

// Only what closed in order says so: not one that was closed otherwise, nor the next one in its place.
func TestCleanIsSaidOnlyOfTheLastUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	if err := create(t, path, highwater.Mark{Commit: 1}).Close(false); err != nil {
		t.Fatal(err)
	}
	if read(t, path).Clean {
		t.Error("clean after a close that was not")
	}
	if err := create(t, path, highwater.Mark{Commit: 1}).Close(true); err != nil {
		t.Fatal(err)
	}
	create(t, path, highwater.Mark{Commit: 1})
	if read(t, path).Clean {
		t.Error("clean while in use")
	}
}

func TestMissingFileAndStrangersAreToldApart(t *testing.T) {
	dir := t.TempDir()
	if _, err := highwater.Read(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for name, content := range map[string]string{"empty": "", "foreign": strings.Repeat("no marks here ", 5000)} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var damage *highwater.DamageError
		if _, err := highwater.Read(path); !errors.As(err, &damage) || damage.Source != path {
			t.Errorf("%s: %v", name, err)
		}
	}
	path := filepath.Join(dir, "other")
	create(t, path, highwater.Mark{})
	s := read(t, path)
	if err := s.CheckJournal("9876543210"); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("another journal's: %v", err)
	}
	if err := s.CheckJournal(journal); err != nil {
		t.Errorf("this journal's: %v", err)
	}
}

func TestWhatCannotBeMarksIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	for name, err := range map[string]error{
		"no partition": second(highwater.Create(path, journal, nil)),
		"too many":     second(highwater.Create(path, journal, make([]highwater.Mark, highwater.MaxPartitions+1))),
		"no id":        second(highwater.Create(path, "", make([]highwater.Mark, 1))),
		"long id":      second(highwater.Create(path, strings.Repeat("x", 33), make([]highwater.Mark, 1))),
		"no directory": second(highwater.Create(filepath.Join(path, "x"), journal, make([]highwater.Mark, 1))),
	} {
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 0 {
		t.Errorf("it left %v", entries)
	}
}

func second[T any](_ T, err error) error { return err }

// A new file replaces the old one as a whole; one that cannot be made leaves the old one.
func TestCreateReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	if err := create(t, path, highwater.Mark{Commit: 9}, highwater.Mark{Commit: 9}).Close(true); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := highwater.Create(path, journal, make([]highwater.Mark, 1)); err == nil {
		t.Fatal("made in spite of the directory in its way")
	}
	if s := read(t, path); !s.Clean || len(s.Marks) != 2 {
		t.Errorf("the old one is now %+v", s)
	}
	if err := os.Remove(path + ".new"); err != nil {
		t.Fatal(err)
	}
	create(t, path, highwater.Mark{Commit: 3})
	if s := read(t, path); s.Clean || len(s.Marks) != 1 || s.Marks[0].Commit != 3 {
		t.Errorf("the new one is %+v", s)
	}
}

func TestLossIsToldByPartition(t *testing.T) {
	known := highwater.State{Source: "here", Marks: []highwater.Mark{
		{Commit: 10, Seq: 100, Log: 7}, {Commit: 20, Seq: 200, Log: 8}, {Commit: 30, Seq: 300}, {Commit: 5, Seq: 50},
	}}
	found := []highwater.Mark{{Commit: 10, Seq: 100}, {Commit: 15, Seq: 150}, {Commit: 29, Seq: 300}}
	var loss *highwater.LossError
	if err := known.Compare(found); !errors.As(err, &loss) {
		t.Fatalf("compared: %v", err)
	}
	want := []highwater.Loss{
		{Partition: 1, Found: found[1], Known: known.Marks[1]},
		{Partition: 2, Found: found[2], Known: known.Marks[2]},
		{Partition: 3, Known: known.Marks[3]},
	}
	if diff := cmp.Diff(want, loss.Losses); diff != "" {
		t.Error(diff)
	}
	if loss.Commits() != 5+1+5 || loss.Log() != 8 {
		t.Errorf("%d commits, log %d", loss.Commits(), loss.Log())
	}
	const text = "11 commits that were durable are missing from 3 partitions, according to here when 000008.log was written; " +
		"partition 1: 5 of 20, events after sequence 150 up to 200; partition 2: 1 of 30; " +
		"partition 3: 5 of 5, events after sequence 0 up to 50"
	if loss.Error() != text {
		t.Errorf("it says %q", loss.Error())
	}
	found = append(found, highwater.Mark{Commit: 5})
	found[1].Commit, found[2].Commit = 21, 30 // more than was noted: the newest marks went with the power
	if err := known.Compare(found); err != nil {
		t.Errorf("nothing is missing, but: %v", err)
	}
	many := highwater.State{Marks: slices.Repeat([]highwater.Mark{{Commit: 1}}, 1000)}
	if text := many.Compare(nil).Error(); len(text) > 300 || !strings.Contains(text, "and 996 more") {
		t.Errorf("a thousand losses: %q", text)
	}
}

// noted makes a file with three partitions and some history, closed without order, and returns what was durable.
func noted(t *testing.T, path string) []highwater.Mark {
	t.Helper()
	f := create(t, path, make([]highwater.Mark, 3)...)
	for n := range uint64(20) {
		f.Note(uint16(n%3), highwater.Mark{Commit: n + 1, Seq: 10 * n, Log: n / 4})
		if n == 10 {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	return f.State().Marks
}

// checkDamaged holds what is read of a damaged file against the truth: no mark is above it, and none is below
// without a word.
func checkDamaged(t *testing.T, what any, s highwater.State, err error, truth []highwater.Mark) {
	t.Helper()
	var damage *highwater.DamageError
	if errors.As(err, &damage) {
		return
	}
	if err != nil || len(s.Marks) != len(truth) || s.Clean {
		t.Fatalf("%v: %+v, %v", what, s, err)
	}
	for i, m := range s.Marks {
		if m.Commit > truth[i].Commit || m.Seq > truth[i].Seq || m.Log > truth[i].Log {
			t.Fatalf("%v: partition %d is said to be at %+v but is at %+v", what, i, m, truth[i])
		}
		if (s.Doubt() == nil) != (len(s.Torn)+len(s.Lost) == 0) {
			t.Fatalf("%v: doubt %v of %+v", what, s.Doubt(), s)
		}
		told := slices.Contains(s.Torn, uint16(i)) || slices.Contains(s.Lost, uint16(i))
		if m != truth[i] && !told {
			t.Fatalf("%v: partition %d is at %+v, read %+v without a word", what, i, truth[i], m)
		}
		if slices.Contains(s.Lost, uint16(i)) && m != (highwater.Mark{}) {
			t.Fatalf("%v: partition %d is lost and yet %+v", what, i, m)
		}
	}
}

func TestEveryFlippedBitIsFound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	truth := noted(t, path)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at, b := range good {
		if b == 0 && at%16 != 0 {
			continue // what only fills a page is tried here and there
		}
		for bit := range 8 {
			if _, err := f.WriteAt([]byte{b ^ 1<<bit}, int64(at)); err != nil {
				t.Fatal(err)
			}
			s := read(t, path)
			if s.Lost != nil {
				t.Fatalf("byte %d, bit %d: one flip took both copies: %+v", at, bit, s)
			}
			checkDamaged(t, at, s, nil, truth)
		}
		if _, err := f.WriteAt([]byte{b}, int64(at)); err != nil {
			t.Fatal(err)
		}
	}
}

// overwrite puts other bytes in the file that Read then reads without an error.
func overwrite(t *testing.T, path string, b []byte) highwater.State {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return read(t, path)
}

func TestDamageNeverRaisesAMark(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	truth := noted(t, path)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	lost, torn := 0, 0
	for i := range 3000 {
		bad := slices.Clone(good)
		switch from, to := rng.IntN(len(bad)), rng.IntN(len(bad)); rng.IntN(4) {
		case 0: // cut off
			bad = bad[:from]
		case 1: // part of it is something else
			for k := min(from, to); k < max(from, to); k++ {
				bad[k] = byte(rng.Uint32())
			}
		case 2: // part of it is zero
			clear(bad[min(from, to):max(from, to)])
		case 3: // part of it is from elsewhere in it, in whole slots
			n := 64 * (1 + rng.IntN(70))
			copy(bad[from/64*64:], bytesFrom(good, to/64*64, n))
		}
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := highwater.Read(path)
		checkDamaged(t, i, s, err, truth)
		lost += len(s.Lost)
		torn += len(s.Torn)
	}
	if lost == 0 || torn == 0 {
		t.Errorf("%d marks lost, %d torn: the damage did not reach them", lost, torn)
	}
}

func bytesFrom(b []byte, at, n int) []byte { return b[at:min(len(b), at+n)] }

// A slot that a kill left half written gives way to the other one, which is one note older.
func TestTornSlotFallsBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	f := create(t, path, highwater.Mark{})
	f.Note(0, highwater.Mark{Commit: 1, Seq: 1})
	f.Note(0, highwater.Mark{Commit: 2, Seq: 2})
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f.Note(0, highwater.Mark{Commit: 3, Seq: 3})
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var changed []int
	for i := range after {
		if after[i] != before[i] {
			changed = append(changed, i)
		}
	}
	for n := 1; n < len(changed); n++ { // the first n bytes were stored
		torn := slices.Clone(before)
		for _, i := range changed[:n] {
			torn[i] = after[i]
		}
		s := overwrite(t, path, torn)
		if s.Marks[0].Commit != 2 || !slices.Equal(s.Torn, []uint16{0}) {
			t.Fatalf("%d bytes in: %+v", n, s)
		}
	}
}

// After a Sync, and so after a clean close, no single page is needed to know the marks.
func TestSyncedMarksAreThereTwice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	f := create(t, path, make([]highwater.Mark, 3)...)
	for n := range uint64(20) {
		f.Note(uint16(n%3), highwater.Mark{Commit: n + 1, Seq: n})
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	truth := f.State().Marks
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for page := 0; page < len(good); page += 4096 {
		bad := slices.Clone(good)
		clear(bad[page : page+4096])
		if s := overwrite(t, path, bad); !slices.Equal(s.Marks, truth) {
			t.Errorf("without the page at %d: %+v, want %+v", page, s, truth)
		}
	}
}

// A file that is cut off under the server takes nothing with it; Sync says so.
func TestFileCutOffWhileMapped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	f := create(t, path, highwater.Mark{})
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	f.Note(0, highwater.Mark{Commit: 1})
	f.Note(0, highwater.Mark{Commit: 2})
	if got := f.State().Marks[0].Commit; got != 2 {
		t.Errorf("commit %d", got)
	}
	s, err := highwater.Read(path)
	checkDamaged(t, "cut off", s, err, f.State().Marks)
	if err := f.Sync(); err == nil {
		t.Log("this system let the file grow again") // or it is not mapped
	} else if !strings.Contains(err.Error(), path) {
		t.Errorf("sync: %v", err)
	}
}

func TestConcurrentNotes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	f := create(t, path, make([]highwater.Mark, 4)...)
	var wg sync.WaitGroup
	for w := range uint64(8) {
		wg.Go(func() {
			for n := range uint64(2000) {
				f.Note(uint16(n%4), highwater.Mark{Commit: n*8 + w, Seq: n})
				if n%500 == 0 {
					if err := f.Sync(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	want := f.State().Marks
	for i, m := range want {
		if m.Commit != uint64(1996+i)*8+7 {
			t.Errorf("partition %d is at %d", i, m.Commit)
		}
	}
	if diff := cmp.Diff(want, read(t, path).Marks); diff != "" {
		t.Error(diff)
	}
}

func TestEncodingIsReadBack(t *testing.T) {
	want := highwater.State{Journal: journal, Clean: true, Marks: []highwater.Mark{
		{}, {Commit: 1 << 40, Seq: 1<<64 - 1, Log: 12}, {Commit: 3},
	}}
	b := want.Encode()
	got, err := highwater.Decode("there", b)
	want.Source = "there"
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Fatal(err, diff)
	}
	for i := range b {
		for bit := range 8 {
			bad := slices.Clone(b)
			bad[i] ^= 1 << bit
			var damage *highwater.DamageError
			if _, err := highwater.Decode("there", bad); !errors.As(err, &damage) {
				t.Fatalf("byte %d, bit %d: %v", i, bit, err)
			}
		}
		if _, err := highwater.Decode("there", b[:i]); err == nil {
			t.Fatalf("cut at %d: taken", i)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(highwater.State{Journal: journal, Marks: make([]highwater.Mark, 3)}.Encode())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := highwater.Decode("", b)
		if err != nil {
			return
		}
		again, err := highwater.Decode("", s.Encode())
		if diff := cmp.Diff(s, again); err != nil || diff != "" {
			t.Error(err, diff)
		}
	})
}

func BenchmarkNote(b *testing.B) {
	f := create(b, filepath.Join(b.TempDir(), "marks"), make([]highwater.Mark, 16)...)
	var n uint64
	for b.Loop() {
		n++
		f.Note(uint16(n%16), highwater.Mark{Commit: n, Seq: n, Log: 7})
	}
}

func BenchmarkNoteAndSyncEachSecond(b *testing.B) {
	f := create(b, filepath.Join(b.TempDir(), "marks"), make([]highwater.Mark, 16)...)
	var n uint64
	for b.Loop() {
		n++
		for p := range uint16(16) {
			f.Note(p, highwater.Mark{Commit: n, Seq: n, Log: 7})
		}
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
	}
}
