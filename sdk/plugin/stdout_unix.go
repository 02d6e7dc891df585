//go:build unix

package plugin

import (
	"os"

	"golang.org/x/sys/unix"
)

// stdoutToStderr makes both of the process's streams end where stderr does, also for code that writes to
// the descriptor itself. It runs after the handshake line has been read.
func stdoutToStderr(stderr *os.File) {
	_ = unix.Dup2(int(stderr.Fd()), 1)
	os.Stdout, os.Stderr = stderr, stderr
}
