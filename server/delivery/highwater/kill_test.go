package highwater_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery/highwater"
)

const (
	childEnv      = "GRAPNEL_HIGHWATER_CHILD"
	killPartition = 4
)

// What has been noted survives kill -9 at any moment, and what was not durable is never claimed.
func TestKillLosesNoMark(t *testing.T) {
	if dir := os.Getenv(childEnv); dir != "" {
		noteUntilKilled(t, dir)
	}
	kills := 20
	if testing.Short() {
		kills = 5
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for range kills {
		dir := t.TempDir()
		cmd := exec.Command(os.Args[0], "-test.run=^TestKillLosesNoMark$")
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it notes
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rng.IntN(20_000)) * time.Microsecond) // the moment is what varies
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		checkKilled(t, dir)
	}
}

func checkKilled(t *testing.T, dir string) {
	t.Helper()
	s := read(t, filepath.Join(dir, "marks"))
	if s.Clean || len(s.Lost) > 0 {
		t.Fatalf("after the kill: %+v", s)
	}
	durable, returned := counters(t, dir, "durable"), counters(t, dir, "returned")
	for i, m := range s.Marks {
		least := returned[i]
		if slices.Contains(s.Torn, uint16(i)) {
			t.Logf("partition %d was killed in the middle of a store", i)
		}
		if m.Commit > durable[i] || m.Commit < least || m.Seq != 2*m.Commit {
			t.Errorf("partition %d: mark %+v; %d were durable, %d notes had returned", i, m, durable[i], least)
		}
	}
}

// noteUntilKilled stands for a journal: a commit is durable once its number is in the file "durable"; then it is
// noted, and when the note has returned that is said in "returned".
func noteUntilKilled(t *testing.T, dir string) {
	f := create(t, filepath.Join(dir, "marks"), make([]highwater.Mark, killPartition)...)
	durable, returned := openCounters(t, dir, "durable"), openCounters(t, dir, "returned")
	var started, wg sync.WaitGroup
	started.Add(killPartition)
	for p := range uint16(killPartition) {
		wg.Go(func() {
			for n := uint64(1); ; n++ {
				setCounter(durable, p, n)
				f.Note(p, highwater.Mark{Commit: n, Seq: 2 * n})
				setCounter(returned, p, n)
				if n == 10 {
					started.Done()
				}
				if p == 0 && n%1000 == 0 {
					_ = f.Sync()
				}
			}
		})
	}
	started.Wait()
	fmt.Print("notes")
	wg.Wait() // for ever
}

func openCounters(t *testing.T, dir, name string) *os.File {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func setCounter(f *os.File, i uint16, n uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], n)
	if _, err := f.WriteAt(b[:], 8*int64(i)); err != nil {
		panic(err)
	}
}

func counters(t *testing.T, dir, name string) []uint64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	n := make([]uint64, len(b)/8)
	for i := range n {
		n[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	return n
}
