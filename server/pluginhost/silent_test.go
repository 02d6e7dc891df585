//go:build linux

package pluginhost

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestSilence: a process that does not answer is known before it is given up, and forgotten when it answers again.
func TestSilence(t *testing.T) {
	spec := self("plugin-all")
	spec.SoftMemoryBytes = 100 << 20
	f := start(t, func(t *timing) { t.heartbeat = 500 * time.Millisecond }, spec).ready(t)
	if silent := f.Silent(); len(silent) > 0 {
		t.Fatalf("silent from the start: %v", silent)
	}
	pid := f.Pids()["test/all"]
	process, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is silent", func() bool {
		silent := f.Silent()
		return len(silent) == 1 && silent[0] == Silence{Name: "test/all", Builtin: true}
	})
	if err := process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it answers again", func() bool { return len(f.Silent()) == 0 })
	if now := f.Pids()["test/all"]; now != pid {
		t.Errorf("the process is %d instead of %d", now, pid)
	}
	if !strings.Contains(f.logs.String(), "plugin does not answer") {
		t.Error("the log does not say so")
	}
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err == nil && !strings.Contains(string(env), "GOMEMLIMIT=104857600") {
		t.Errorf("environment %q", env)
	}
}
