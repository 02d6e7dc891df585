package dirlock_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/grapnel/grapnel/server/dirlock"
)

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := dirlock.Take(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = dirlock.Take(path)
	held := new(dirlock.HeldError)
	if !errors.As(err, &held) || held.Path != path || held.Holder != fmt.Sprint("pid ", os.Getpid()) {
		t.Fatalf("a second time: %v", err)
	}
	if err := first.Release(); err != nil {
		t.Fatal(err)
	}
	// What an earlier holder left there, whoever that was, says nothing.
	if err := os.WriteFile(path, []byte("999999999 elsewhere and a longer text than the next one's\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	second, err := dirlock.Take(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Release()
	if _, err = dirlock.Take(path); !errors.As(err, &held) || held.Holder != fmt.Sprint("pid ", os.Getpid()) {
		t.Fatalf("after another: %v", err)
	}
}

// TestHolderOfText: what the file says may be anything.
func TestHolderOfText(t *testing.T) {
	for text, want := range map[string]string{
		"": "another process", "x\n": "another process", "-4 h\n": "another process", "\xff\xfe": "another process",
		"12 elsewhere\n": `pid 12 on "elsewhere"`, "12 \x1b[31m\n": `pid 12 on "\x1b[31m"`,
	} {
		path := filepath.Join(t.TempDir(), "lock")
		lock, err := dirlock.Take(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		held := new(dirlock.HeldError)
		if _, err := dirlock.Take(path); !errors.As(err, &held) || held.Holder != want {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
		if err := lock.Release(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNoFileToLock(t *testing.T) {
	dir := t.TempDir()
	if _, err := dirlock.Take(filepath.Join(dir, "absent", "lock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, filepath.Join(dir, "lock")); err != nil {
		t.Skip(err)
	}
	if _, err := dirlock.Take(filepath.Join(dir, "lock")); err == nil {
		t.Error("a link was followed")
	}
	if text, err := os.ReadFile(other); err != nil || string(text) != "keep" {
		t.Errorf("the file behind a link is now %q, %v", text, err)
	}
}
