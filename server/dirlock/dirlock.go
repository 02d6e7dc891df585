// Package dirlock lets one process at a time work in a directory, and tells the others who it is.
//
// The lock is the operating system's on a file in the directory, so it ends with the process however that ends. What
// the file says is for people only: nothing is concluded from it.
package dirlock

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// Lock is held until Release, or the end of the process.
type Lock struct{ file *os.File }

// HeldError says that somebody else has the lock.
type HeldError struct {
	// Path of the lock's file.
	Path string
	// Holder is the process, such as "pid 4711" or "pid 1 on other-host"; "another process" when it does not say.
	Holder string
}

func (e *HeldError) Error() string { return fmt.Sprintf("%s is held by %s", e.Path, e.Holder) }

// Take locks the file at path, which it makes when it is missing, without waiting. It returns a *HeldError when somebody
// has it, this process included. Its directory must exist. The file stays when the lock goes.
func Take(path string) (*Lock, error) {
	file, openErr := os.OpenFile(path, os.O_RDWR|os.O_CREATE|noFollow, 0o644)
	if openErr != nil { // somebody may hold it all the same, which says more
		var err error
		if file, err = os.OpenFile(path, os.O_RDONLY|noFollow, 0); err != nil {
			return nil, openErr
		}
	}
	held, err := lock(file)
	switch {
	case held:
		err = &HeldError{Path: path, Holder: holder(file)}
	case err != nil:
		err = fmt.Errorf("lock %s: %w", path, err)
	default:
		err = openErr
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	note(file)
	return &Lock{file}, nil
}

// Release gives the lock back.
func (l *Lock) Release() error { return errors.Join(unlock(l.file), l.file.Close()) }

// note writes who holds the lock, if that can be: the disk may be full.
func note(file *os.File) {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	text := fmt.Sprintf("%d %s\n", os.Getpid(), host)
	if _, err := file.WriteAt([]byte(text), 0); err == nil {
		_ = file.Truncate(int64(len(text)))
	}
}

// holder is what the file says of who holds it.
func holder(file *os.File) string {
	var text [512]byte
	n, _ := file.ReadAt(text[:], 0)
	var pid int
	var host string
	if _, err := fmt.Sscanf(strings.ToValidUTF8(string(text[:n]), ""), "%d %s\n", &pid, &host); err != nil || pid <= 0 {
		return "another process"
	}
	if own, err := os.Hostname(); err != nil || own != host { // in a container or on a shared disk the number says little
		return fmt.Sprintf("pid %d on %q", pid, host)
	}
	return fmt.Sprintf("pid %d", pid)
}
