//go:build unix

package server

import "syscall"

// mostFiles is how many files and sockets a process of ours may have open; 0 where the system does not say. Go has
// raised its own limit to the hard one already, and does so in plugins.
func mostFiles() uint64 {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return 0
	}
	return uint64(limit.Max)
}
