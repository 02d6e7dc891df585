package salvage_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/grapnel/grapnel/server/delivery/salvage"
)

func TestGuardLetsPass(t *testing.T) {
	_, dead := killed(t, 1)
	_, orderly := stopped(t, 1)
	other := t.TempDir()
	check(t, os.WriteFile(filepath.Join(other, "ballast"), []byte("x"), 0o600))
	first := newStore(t, 2)
	first.close()
	begun := filepath.Join(other, "begun") // killed while it was made
	check(t, os.Mkdir(begun, 0o700))
	check(t, os.WriteFile(filepath.Join(begun, "MANIFEST-000001"), nil, 0o600))
	young := filepath.Join(other, "young")
	db, err := pebble.Open(young, options(vfs.Default))
	check(t, err)
	check(t, db.Set([]byte("a"), []byte("b"), pebble.Sync))
	check(t, db.Close())
	for name, dir := range map[string]string{
		"young": young, "begun": begun, "killed": dead, "stopped": orderly, "missing": filepath.Join(other, "none"), "no journal": other, "new": first.dir,
	} {
		if doubt, err := salvage.Guard(dir); err != nil || doubt {
			t.Errorf("%s: doubt %v, %v", name, doubt, err)
		}
	}
	first.open()
	defer first.close()
	if _, err := salvage.Guard(first.dir); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("in use: %v", err)
	}
}

// A power loss keeps any part of what had not been synced. That is no damage.
func TestGuardLetsPassAfterPowerLoss(t *testing.T) {
	for seed := range seeds(20) {
		rng := rand.New(rand.NewPCG(seed, 9))
		mem := vfs.NewCrashableMem()
		o := options(mem)
		o.MemTableSize = 64 << 10
		var crashed *vfs.MemFS
		for range 2 { // the first log of a database is of another format
			db, err := pebble.Open("journal", o)
			check(t, err)
			for i := range 300 {
				durable := pebble.NoSync
				if rng.IntN(20) == 0 {
					durable = pebble.Sync
				}
				check(t, db.Set(fmt.Appendf(nil, "%05d", i), make([]byte, rng.IntN(3000)), durable))
			}
			crashed = mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
			check(t, db.Close())
		}
		dir := filepath.Join(t.TempDir(), "journal")
		if _, err := vfs.Clone(crashed, vfs.Default, "journal", dir); err != nil {
			t.Fatal(err)
		}
		if _, err := salvage.Guard(dir); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
}

// Whatever is done to one file, the loss of rows that are not at the newest log's end does not pass in silence: the guard
// refuses or doubts. Those at its end are for the high-water marks.
func TestNothingPassesInSilence(t *testing.T) {
	origin, image := killed(t, 7)
	newest := func(t *testing.T, dir string) string {
		logs := neededLogs(t, dir)
		return logs[len(logs)-1].Path
	}
	last := newest(t, image)
	for seed := range seeds(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			s, dir := origin.in(t, image)
			rng := rand.New(rand.NewPCG(seed, 3))
			pattern := []string{"*.log", "MANIFEST-*", "*.sst"}[rng.IntN(3)]
			files, err := filepath.Glob(filepath.Join(dir, pattern))
			check(t, err)
			file := files[rng.IntN(len(files))]
			info, err := os.Stat(file)
			check(t, err)
			at := rng.Int64N(info.Size())
			what := fmt.Sprintf("%s at %d of %d", filepath.Base(file), at, info.Size())
			switch kind := rng.IntN(3); {
			case kind == 0 && pattern == "*.sst":
				t.Skip("a table's blocks are looked at when they are read")
			case kind == 0:
				flip(t, file, at)
			case filepath.Base(file) == filepath.Base(last):
				t.Skip("the end of the newest log leaves no trace")
			case kind == 1:
				check(t, os.Truncate(file, at))
			default:
				check(t, os.Remove(file))
			}
			doubt, err := salvage.Guard(dir)
			var damage *salvage.DamageError
			switch {
			case errors.As(err, &damage):
				if !strings.Contains(err.Error(), dir+string(filepath.Separator)) || !strings.Contains(err.Error(), "grapnel journal salvage") {
					t.Errorf("%s: the refusal names no file or command: %v", what, err)
				}
				return
			case err != nil:
				t.Fatal(err)
			case doubt:
				return
			}
			db, err := pebble.Open(dir, options(vfs.Default))
			if err != nil {
				t.Fatalf("%s: Pebble refuses what the guard let pass: %v", what, err)
			}
			check(t, db.Close())
			if n := missing(s.rows, readRows(t, dir)); n > 0 && filepath.Base(file) != filepath.Base(last) {
				t.Errorf("%s: %d rows are gone", what, n)
			}
		})
	}
}
