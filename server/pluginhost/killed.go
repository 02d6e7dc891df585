package pluginhost

import (
	"errors"
	"os/exec"
	"syscall"
	"time"
)

// crash is an end that nobody asked for.
type crash struct {
	at     time.Time
	killed bool
}

// killedError is the end of a life that somebody else's signal made, which says nothing against the plugin.
type killedError struct {
	error
	served bool // until then
}

// killedByOthers reports whether the process has ended by a signal that neither it nor the server has sent: SIGKILL
// above all, which is also how the kernel ends it for want of memory.
func (c *child) killedByOthers() bool {
	select {
	case <-c.exited:
	default:
		return false
	}
	var ended *exec.ExitError
	if c.killed.Load() || !errors.As(c.status, &ended) {
		return false
	}
	status, ok := ended.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && !ownSignal(status.Signal())
}

// ownSignal reports whether a signal is one that programs bring upon themselves.
func ownSignal(s syscall.Signal) bool {
	switch s {
	case syscall.SIGSEGV, syscall.SIGABRT, syscall.SIGBUS, syscall.SIGILL, syscall.SIGFPE, syscall.SIGTRAP:
		return true
	}
	return false
}
