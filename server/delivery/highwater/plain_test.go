package highwater

import (
	"path/filepath"
	"testing"
)

// Where a file cannot be mapped, marks are written to it and are there for others just the same.
func TestWithoutMapping(t *testing.T) {
	path := filepath.Join(t.TempDir(), "marks")
	f, err := Create(path, "journal", make([]Mark, 2))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.memory.close(); err != nil {
		t.Fatal(err)
	}
	f.memory = plain{f.file}
	for n := range uint64(10) {
		f.Note(1, Mark{Commit: n + 1, Seq: n})
		if s, err := Read(path); err != nil || s.Marks[1].Commit != n+1 {
			t.Fatalf("%+v, %v", s, err)
		}
	}
	if err := f.Close(true); err != nil {
		t.Fatal(err)
	}
	if s, err := Read(path); err != nil || !s.Clean || s.Torn != nil {
		t.Errorf("%+v, %v", s, err)
	}
}
