//go:build unix

package process

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// signalGroup is called only while the child has not been collected.
func signalGroup(p *os.Process, kill bool) {
	sig := syscall.SIGTERM
	if kill {
		sig = syscall.SIGKILL
	}
	_ = syscall.Kill(-p.Pid, sig)
}

// quit asks a process for its stacks, which ends it.
func quit(p *os.Process) { _ = syscall.Kill(p.Pid, syscall.SIGQUIT) }

// owner is whose a file is, where that says who may change it.
func owner(info os.FileInfo) (uid int, known bool) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return int(stat.Uid), true
}

// openNoFollow opens a file for reading, and no link to one.
func openNoFollow(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link; a pinned plugin is named by its real path", path)
	}
	return f, err
}
