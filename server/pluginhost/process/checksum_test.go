//go:build linux

package process_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/server/pluginhost/process"
)

func TestChecksum(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"plugin": "program", "a b": "", "sub/z": "1", "sub/deep/é": "2", ".hidden": "3"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for path, command := range map[string]string{
		dir:                          `find . -type f -printf '%P\0' | xargs -0 sha256sum | LC_ALL=C sort | sha256sum`,
		filepath.Join(dir, "plugin"): "sha256sum <plugin",
	} {
		shell := exec.Command("/bin/sh", "-c", command)
		shell.Dir = dir
		want, err := shell.Output()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := process.Checksum(path); err != nil || got != string(want[:64]) {
			t.Errorf("%s: %s (%v), the shell says %s", path, got, err, want)
		}
	}
	if err := os.Symlink("plugin", filepath.Join(dir, "sub", "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := process.Checksum(dir); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "sub/link")+" is no regular file") {
		t.Errorf("a link: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "sub", "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "two\nlines"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := process.Checksum(dir); err == nil || !strings.Contains(err.Error(), "control character") {
		t.Errorf("a name of two lines: %v", err)
	}
	if _, err := process.Checksum(filepath.Join(dir, "missing")); err == nil {
		t.Error("no error for a file that is missing")
	}
}
