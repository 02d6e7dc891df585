package process

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
)

// Dirs are the directories in which processes get theirs, each with mode 0700, for their sockets. A process that is killed
// leaves them behind, so their names are always the same for the same Make, and what a predecessor has left goes.
type Dirs struct {
	own string
	// name tells them from others under the system's temporary directory.
	name string

	mu     sync.Mutex // guards shared
	shared string
}

// socketRoom is what go-plugin appends to the directory for a socket's path.
const socketRoom = len("/plugin-dir4294967295/plugin4294967295")

// longestSocket is the room in sun_path, less its NUL.
func longestSocket() int {
	if runtime.GOOS == "linux" {
		return 107
	}
	return 103
}

func fits(dir string) bool {
	return len(dir)+socketRoom <= longestSocket() || runtime.GOOS == "windows"
}

// Make sees to a private directory that is short enough for sockets: dir, made anew with mode 0700, or one under the
// system's temporary directory when dir cannot be that. Of an empty dir nothing follows, so that the name is a random one.
// dir must be the caller's alone.
func (d *Dirs) Make(dir string) error {
	var own error
	if dir != "" {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		host, _ := os.Hostname() // the temporary directory may be shared, the path be the same
		sum := sha256.Sum256([]byte(host + "\x00" + abs))
		d.name = "grapnel-" + hex.EncodeToString(sum[:6])
		if fits(abs) {
			if own = claim(abs, 0o700); own == nil {
				own = holdsSockets(abs)
			}
			if own == nil {
				d.own = abs
				return nil
			}
		}
	}
	made, err := temporary(d.name, 0o700)
	if err != nil {
		return errors.Join(fmt.Errorf("make the directory for plugin sockets: %w; set TMPDIR to a directory that can be written", err), own)
	}
	d.own = made
	return nil
}

// claim makes a directory anew. One that is there is removed with all that is in it, unless it is no directory of ours.
func claim(dir string, mode fs.FileMode) error {
	switch info, err := os.Lstat(dir); {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
			return err
		}
	case err != nil:
		return err
	case !info.IsDir() || !ownedByUs(info):
		return fmt.Errorf("%s is in the way: it is no directory of this user's", dir)
	default:
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}

// holdsSockets tries it: not every file system can.
func holdsSockets(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	l, err := net.Listen("unix", filepath.Join(dir, "try"))
	if err != nil {
		return err
	}
	return l.Close()
}

// temporary makes a directory under the system's temporary one, or under /tmp where that has too long a path; with a random
// name when it is given none, or that is taken by somebody else.
func temporary(name string, mode fs.FileMode) (string, error) {
	base := os.TempDir()
	if !fits(filepath.Join(base, "grapnel-000000000000-users")) {
		base = "/tmp"
	}
	if name != "" {
		if dir := filepath.Join(base, name); claim(dir, mode) == nil {
			return dir, nil
		}
	}
	made, err := os.MkdirTemp(base, "grapnel-")
	if err != nil {
		return "", err
	}
	return made, os.Chmod(made, mode)
}

// Own is where processes of the caller's own user get their directories.
func (d *Dirs) Own() string { return d.own }

// ForOthers is where processes of other users get their directories: all may pass through it, and see nothing.
func (d *Dirs) ForOthers() (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shared != "" {
		return d.shared, nil
	}
	name := ""
	if d.name != "" {
		name = d.name + "-users"
	}
	made, err := temporary(name, 0o711)
	if err != nil {
		return "", fmt.Errorf("make a socket directory for other users: %w", err)
	}
	d.shared = made
	return made, nil
}

// Remove takes away what Make and ForOthers have made.
func (d *Dirs) Remove() {
	_ = os.RemoveAll(d.own)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shared != "" {
		_ = os.RemoveAll(d.shared)
	}
}
