package secret

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// LoadOrCreateKey reads the key-encryption key in a file, or makes both when there is none and sealed, which is then
// asked, says that nothing was ever sealed: under a new key what is there could not be read. The file holds
// 64 hex digits. It refuses a file that others than its owner can read, and anything but a regular file.
// Two processes that start at once end up with the same key.
func LoadOrCreateKey(path string, sealed func() (bool, error)) ([]byte, error) {
	key, err := loadKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if found, err := sealed(); err != nil {
		return nil, fmt.Errorf("key file %s is missing, and whether secrets were sealed with it is unknown: %w", path, err)
	} else if found {
		return nil, fmt.Errorf("key file %s is missing, and there are secrets that only it opens: restore it", path)
	}
	if err := createKey(path); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make key file %s: %w", path, err)
	}
	return loadKey(path)
}

// Sealed reports whether etcd holds secrets under a prefix of keys such as /grapnel/v1/.
func Sealed(ctx context.Context, client *clientv3.Client, prefix string) (bool, error) {
	found, err := client.Get(ctx, prefix+keyPrefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(1))
	if err != nil {
		return false, err
	}
	return len(found.Kvs) > 0, nil
}

func loadKey(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("key file %s is not a regular file", path)
	}
	// Windows has no such bits.
	if mode := info.Mode().Perm(); mode&0o077 != 0 && runtime.GOOS != "windows" {
		return nil, fmt.Errorf("key file %s can be used by others (mode %#o); want chmod 600", path, mode)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	key, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(key) != keySize {
		// The decoder's text would hold a part of the key.
		return nil, fmt.Errorf("key file %s does not hold %d hex digits: restore it from a backup", path, 2*keySize)
	}
	return key, nil
}

// createKey makes the file whole or not at all, and never replaces one: a link, unlike a rename, fails
// when the name is taken.
func createKey(path string) error {
	key := make([]byte, keySize)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	text := hex.EncodeToString(key) + "\n"
	dir := filepath.Dir(path)
	tmp := filepath.Join(dir, ".key-"+rand.Text())
	if err := writeNew(tmp, text); err != nil {
		return err
	}
	defer os.Remove(tmp)
	if err := os.Link(tmp, path); errors.Is(err, fs.ErrExist) {
		return err
	} else if err != nil {
		// A file system without links; the worst case is a torn file, which is refused and named.
		if err := writeNew(path, text); err != nil {
			return err
		}
	}
	return syncDir(dir)
}

// writeNew makes a synced file that only its owner can use, and fails when there is one.
func writeNew(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}

// syncDir makes a new name durable where the system can; a lost key would make every secret unreadable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && runtime.GOOS != "windows" {
		return err
	}
	return nil
}
