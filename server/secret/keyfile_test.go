package secret_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/grapnel/grapnel/server/secret"
)

func unsealed() (bool, error) { return false, nil }

// TestKeyFileIsNotReplaced: under a new key the secrets that are there could never be read.
func TestKeyFileIsNotReplaced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	for want, sealed := range map[string]func() (bool, error){
		"restore it":     func() (bool, error) { return true, nil },
		"etcd is asleep": func() (bool, error) { return false, errors.New("etcd is asleep") },
	} {
		_, err := secret.LoadOrCreateKey(path, sealed)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path+" is missing") {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	var wg sync.WaitGroup
	keys := make([][]byte, 8)
	for i := range keys {
		wg.Go(func() {
			var err error
			if keys[i], err = secret.LoadOrCreateKey(path, unsealed); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, k := range keys {
		if len(k) != 32 || !bytes.Equal(k, keys[0]) {
			t.Fatal("those who made it at once have different keys")
		}
	}
	info, err := os.Stat(path)
	if err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestKeyFileRefusals(t *testing.T) {
	good := strings.Repeat("ab", 32)
	tests := []struct {
		name, content, want string
		mode                os.FileMode
	}{
		{"short", "abcd", "64 hex digits", 0o600},
		{"not hex", strings.Repeat("zz", 32), "64 hex digits", 0o600},
		{"empty", "", "64 hex digits", 0o600},
		{"group", good, "chmod 600", 0o640},
		{"world", good, "chmod 600", 0o604},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.mode != 0o600 && runtime.GOOS == "windows" {
				t.Skip("no such bits")
			}
			path := filepath.Join(t.TempDir(), "key")
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, tt.mode); err != nil {
				t.Fatal(err)
			}
			_, err := secret.LoadOrCreateKey(path, unsealed)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v", err)
			}
			if tt.content != "" && err != nil && strings.Contains(err.Error(), tt.content) {
				t.Error("the error repeats the key")
			}
			if after, _ := os.ReadFile(path); string(after) != tt.content {
				t.Error("the file was changed")
			}
		})
	}
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	target := filepath.Join(dir, "target")
	if err := os.WriteFile(target, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err == nil {
		if _, err := secret.LoadOrCreateKey(link, unsealed); err == nil {
			t.Error("a symbolic link was followed")
		}
	}
	if _, err := secret.LoadOrCreateKey(filepath.Join(dir, "absent", "key"), unsealed); err == nil {
		t.Error("made a key in a directory that does not exist")
	}
}
