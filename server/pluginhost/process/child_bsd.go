//go:build unix && !linux

package process

import (
	"os/exec"
	"syscall"
)

// startConfined gives the child its own process group. There is no parent-death signal here: the SDK watches
// its parent instead.
func startConfined(cmd *exec.Cmd, _ *Program) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd.Start()
}

// reap waits for the child and kills what is left of its group. A descendant in a group of its own lives on.
func reap(cmd *exec.Cmd, _ string, collecting func()) error {
	err := cmd.Wait()
	collecting()
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	return err
}
