//go:build !unix

package process

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
)

// startConfined starts the child: there are no process groups here, so descendants of a plugin are its own to end.
func startConfined(cmd *exec.Cmd, _ *Program) error { return cmd.Start() }

func reap(cmd *exec.Cmd, _ string, collecting func()) error {
	err := cmd.Wait()
	collecting()
	return err
}

// signalGroup kills, since there is nothing gentler.
func signalGroup(p *os.Process, _ bool) { _ = p.Kill() }

// quit does nothing: a process cannot be asked here.
func quit(*os.Process) {}

// owner is not known here.
func owner(os.FileInfo) (uid int, known bool) { return 0, false }

// openNoFollow opens a file for reading, and no link to one.
func openNoFollow(path string) (*os.File, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Type() == fs.ModeSymlink {
		return nil, fmt.Errorf("%s is a symbolic link; a pinned plugin is named by its real path", path)
	}
	return os.Open(path)
}
