package process

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
)

// Dirs are the directories in which processes get theirs, each with mode 0700, for their sockets.
type Dirs struct {
	own       string
	removeOwn bool

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

// Make sees to a private directory that is short enough for sockets: dir, with mode 0700, or when its path is too long
// or it is empty, one under the system's temporary one.
func (d *Dirs) Make(dir string) error {
	if dir != "" {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		if len(abs)+socketRoom <= longestSocket() || runtime.GOOS == "windows" {
			if err := os.MkdirAll(abs, 0o700); err != nil {
				return err
			}
			d.own = abs
			return os.Chmod(abs, 0o700)
		}
	}
	var err error
	d.own, err = temporary()
	d.removeOwn = err == nil
	return err
}

func temporary() (string, error) {
	made, err := os.MkdirTemp("", "grapnel-")
	if err == nil && len(made)+socketRoom > longestSocket() && runtime.GOOS != "windows" {
		_ = os.Remove(made)
		made, err = os.MkdirTemp("/tmp", "grapnel-")
	}
	return made, err
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
	made, err := temporary()
	if err != nil {
		return "", err
	}
	if err := os.Chmod(made, 0o711); err != nil {
		_ = os.Remove(made)
		return "", fmt.Errorf("open the socket directory to other users: %w", err)
	}
	d.shared = made
	return made, nil
}

// Remove takes away what Make and ForOthers have made.
func (d *Dirs) Remove() {
	if d.removeOwn {
		_ = os.RemoveAll(d.own)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shared != "" {
		_ = os.RemoveAll(d.shared)
	}
}
