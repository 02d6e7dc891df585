//go:build !unix

package pluginhost

import (
	"os"
	"os/exec"
)

// ownGroup does nothing: there are no process groups here, so descendants of a plugin are its own to end.
func ownGroup(*exec.Cmd) {}

func reap(cmd *exec.Cmd) error { return cmd.Wait() }

// signalGroup kills, since there is nothing gentler.
func signalGroup(p *os.Process, _ bool) { _ = p.Kill() }
