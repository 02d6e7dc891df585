//go:build !unix

package plugin

import "os"

// stdoutToStderr redirects what Go code writes; what writes to the descriptor itself is left to the host,
// which reads standard output for as long as the process lives.
func stdoutToStderr(stderr *os.File) { os.Stdout, os.Stderr = stderr, stderr }
