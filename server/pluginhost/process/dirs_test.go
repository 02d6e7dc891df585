//go:build linux

package process_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/server/pluginhost/process"
)

// TestDirsOfTheDead: what a process left that was killed is gone once another makes its directories, wherever they are.
func TestDirsOfTheDead(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	for name, dir := range map[string]string{
		"of its own":                 filepath.Join(tmp, "data", "sockets"),
		"in the temporary directory": filepath.Join(tmp, strings.Repeat("deep/", 20), "sockets"),
	} {
		t.Run(name, func(t *testing.T) {
			var dead, living process.Dirs
			if err := dead.Make(dir); err != nil {
				t.Fatal(err)
			}
			others, err := dead.ForOthers()
			if err != nil {
				t.Fatal(err)
			}
			left := []string{filepath.Join(dead.Own(), "plugin-dir1"), filepath.Join(others, "plugin-dir2")}
			for _, l := range left {
				if err := os.Mkdir(l, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if err := living.Make(dir); err != nil {
				t.Fatal(err)
			}
			if again, err := living.ForOthers(); err != nil || again != others || living.Own() != dead.Own() {
				t.Errorf("%s and %s after %s and %s: %v", living.Own(), again, dead.Own(), others, err)
			}
			for _, l := range left {
				if _, err := os.Lstat(l); !os.IsNotExist(err) {
					t.Errorf("%s is left: %v", l, err)
				}
			}
			if info, err := os.Stat(living.Own()); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("%v, %v", info, err)
			}
			living.Remove()
			if _, err := os.Lstat(living.Own()); !os.IsNotExist(err) {
				t.Errorf("it is left: %v", err)
			}
		})
	}
}

// TestDirsOfOthers: a name that is foreseeable may be taken by somebody else, and then another one is found.
func TestDirsOfOthers(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	deep := filepath.Join(tmp, strings.Repeat("deep/", 20), "sockets")
	var first, second process.Dirs
	if err := first.Make(deep); err != nil {
		t.Fatal(err)
	}
	first.Remove()
	target := t.TempDir()
	kept := filepath.Join(target, "kept")
	if err := os.WriteFile(kept, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, first.Own()); err != nil {
		t.Fatal(err)
	}
	if err := second.Make(deep); err != nil || second.Own() == first.Own() {
		t.Errorf("%s: %v", second.Own(), err)
	}
	defer second.Remove()
	if _, err := os.Stat(kept); err != nil {
		t.Error(err)
	}
}
