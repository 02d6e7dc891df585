package main

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func TestDescriptors(t *testing.T) {
	descriptors := func(stdout *bytes.Buffer, args ...string) (code int, stderr string) {
		var told bytes.Buffer
		c := newCLI()
		c.stdout, c.stderr = stdout, &told
		return run(append([]string{"descriptors"}, args...), c), told.String()
	}
	file := filepath.Join(t.TempDir(), "grapnel.binpb")
	var none, stdout, dash bytes.Buffer
	for _, code := range []int{first(descriptors(&none, file)), first(descriptors(&stdout)), first(descriptors(&dash, "-"))} {
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
	}
	written, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for where, got := range map[string][]byte{"file": written, "standard output": stdout.Bytes(), "-": dash.Bytes()} {
		if !bytes.Equal(got, grapnelv1.Descriptors()) {
			t.Errorf("%s: %d bytes, want the set's %d", where, len(got), len(grapnelv1.Descriptors()))
		}
	}
	if none.Len() > 0 {
		t.Error("something is printed beside the file")
	}
	if code, told := descriptors(&none, filepath.Join(file, "below-a-file")); code == 0 || !strings.Contains(told, "below-a-file") {
		t.Errorf("a file that cannot be made: exit code %d, %q", code, told)
	}
}

func first(code int, _ string) int { return code }

func TestDescriptorsAreNotWrittenToATerminal(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no pseudo terminals on %s: %v", runtime.GOOS, err)
	}
	defer func() { _ = terminal.Close() }()
	var told bytes.Buffer
	c := newCLI()
	c.stdout, c.stderr = terminal, &told
	if code := run([]string{"descriptors"}, c); code != exitUsage || !strings.Contains(told.String(), "terminal") {
		t.Errorf("exit code %d, %q; want %d and words about the terminal", code, told.String(), exitUsage)
	}
}
