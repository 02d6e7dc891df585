//go:build !linux

package conformance

import (
	"os"
	"os/exec"
	"syscall"
	"time"
)

func ownGroup(cmd *exec.Cmd) { groupOf(cmd) }

// awaitExit returns when the process has exited.
func awaitExit(cmd *exec.Cmd) { _ = cmd.Wait() }

// descendants cannot be told here.
func descendants(*process) ([]int, bool) { return nil, false }

// killStrays does not know them here.
func killStrays(string) {}

type usage struct {
	rss     int64
	fds     int
	threads int
	cpu     time.Duration
}

// usageOf cannot be told here.
func usageOf(int) (usage, bool) { return usage{}, false }

func cmdline(int) string { return "" }

func ownCPU() time.Duration { return 0 }

func killGroup(p *os.Process) { signalGroup(p, syscall.SIGKILL) }
