package process

import (
	"errors"
	"os/exec"
	"syscall"
)

// KilledByOthers reports whether the process has ended by a signal that neither it nor its parent has sent: SIGKILL
// above all, which is also how the kernel ends it for want of memory.
func (c *Child) KilledByOthers() bool {
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

// EndedItself reports whether a process that has exited was the cause of its own end, and not somebody's signal. In
// doubt, as with status 0 or one by which shells tell of a signal, it was not.
func (c *Child) EndedItself() bool {
	var ended *exec.ExitError
	if !errors.As(c.status, &ended) {
		return false
	}
	status, ok := ended.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return ownSignal(status.Signal())
	}
	switch ended.ExitCode() - 128 {
	case int(syscall.SIGHUP), int(syscall.SIGINT), int(syscall.SIGTERM), int(syscall.SIGKILL):
		return false
	}
	return true
}

// WasKilled reports whether the parent has killed the process.
func (c *Child) WasKilled() bool { return c.killed.Load() }
