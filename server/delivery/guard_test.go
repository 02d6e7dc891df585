package delivery

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"github.com/grapnel/grapnel/server/delivery/salvage"
)

// A journal whose first record was lost gets it anew from the high-water marks, and is the same journal.
func TestCompleteMakesTheFirstRecordAnew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	o := Options{Dir: dir, HighWater: dir + ".highwater", Partitions: 3, MinFreeBytes: -1, BallastBytes: -1}
	j, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	id := j.ID()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if made, err := Complete(dir, o.HighWater); made || err != nil {
		t.Fatalf("it has one, but: made %v, %v", made, err)
	}
	db, err := pebble.Open(dir, EngineOptions())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Delete(metaKey(), pebble.Sync), db.Close()); err != nil {
		t.Fatal(err)
	}
	if made, err := Complete(dir, filepath.Join(dir, "none")); made || err == nil || !strings.Contains(err.Error(), "cannot be made anew") {
		t.Errorf("without marks: made %v, %v", made, err)
	}
	if made, err := Complete(dir, o.HighWater); !made || err != nil {
		t.Fatalf("made %v, %v", made, err)
	}
	o.Partitions = 0
	j, err = Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if j.ID() != id || j.Partitions() != 3 {
		t.Errorf("it is now %s with %d partitions", j.ID(), j.Partitions())
	}
}

// A damaged manifest is told before Pebble deletes the tables that it no longer names.
func TestDamagedManifestIsRefusedBeforeAnythingIsDeleted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	o := Options{Dir: dir, MinFreeBytes: -1, BallastBytes: -1}
	for range 3 { // what was in the log is in tables
		j, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	}
	manifests, _ := filepath.Glob(filepath.Join(dir, "MANIFEST-*"))
	manifest := manifests[len(manifests)-1]
	b, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	b[10] ^= 1
	if err := os.WriteFile(manifest, b, 0o600); err != nil {
		t.Fatal(err)
	}
	before, _ := filepath.Glob(filepath.Join(dir, "*.sst"))
	if len(before) == 0 {
		t.Fatal("there is no table")
	}
	_, err = Open(o)
	var damage *salvage.DamageError
	if !errors.As(err, &damage) || !strings.Contains(err.Error(), manifest) {
		t.Fatalf("opened: %v", err)
	}
	for _, table := range before {
		if _, err := os.Stat(table); err != nil {
			t.Error(err)
		}
	}
}
