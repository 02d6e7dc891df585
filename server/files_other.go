//go:build !unix

package server

// mostFiles is how many files and sockets a process of ours may have open; 0 where the system does not say.
func mostFiles() uint64 { return 0 }
