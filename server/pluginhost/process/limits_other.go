//go:build !linux

package process

import (
	"errors"
	"fmt"
	"os"
	"runtime"
)

// canRunFiles: a program can be run by its path only.
const canRunFiles = false

// openSelf opens the program at path.
func openSelf(path string) (*os.File, error) { return os.Open(path) }

// openSocket looks at a plugin's socket without following a link.
func openSocket(path string) (string, *os.File, error) {
	info, err := os.Lstat(path)
	if err == nil && runtime.GOOS != "windows" && info.Mode().Type() != os.ModeSocket {
		err = errors.New("what it names as its socket is none")
	}
	return path, nil, err
}

// possible says why this system cannot run the spec as it asks to be.
func (s Spec) possible() error {
	switch {
	case s.Limits != Limits{}:
		return fmt.Errorf("limits of a plugin's process are not supported on this system (%s), only on linux", runtime.GOOS)
	case s.User != "":
		return fmt.Errorf("running a plugin as another user is not supported on this system (%s), only on linux", runtime.GOOS)
	}
	return nil
}
