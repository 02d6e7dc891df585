//go:build unix

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// refused wants a start to end with 1 and all of the words, before it has opened anything.
func refused(t *testing.T, r *running, words ...string) {
	t.Helper()
	if code := r.code(); code != 1 {
		t.Errorf("exit code %d, want 1\n%s", code, r.log.text())
	}
	for _, word := range words {
		if !strings.Contains(r.log.text(), word) {
			t.Errorf("no %q in %s", word, r.log.text())
		}
	}
	if strings.Contains(r.log.text(), "component=etcd") || strings.Contains(r.log.text(), "component=journal") {
		t.Errorf("a store was opened:\n%s", r.log.text())
	}
}

// TestDirectoryInUse: a second server in a data directory is told by whom it is used, and the first one goes on; a
// killed one is in nobody's way.
func TestDirectoryInUse(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	first := runServerIn(t, dir)
	a := dialAPI(t, first.ready())
	inUse := fmt.Sprintf("data directory %s is in use by pid %d", dir, first.cmd.Process.Pid)
	refused(t, runServerIn(t, dir), inUse)
	refused(t, runServerIn(t, filepath.Join(dir, "..", "data")), inUse)
	if err := a.create("acme"); err != nil {
		t.Errorf("the first one: %v", err)
	}
	first.signal(syscall.SIGKILL)
	second := runServerIn(t, dir)
	second.ready()
	if code := second.signal(syscall.SIGTERM); code != 0 {
		t.Errorf("after a kill: exit code %d\n%s", code, second.log.text())
	}
}

// TestDirectoryOfOthers is one on which another user's process works, or that cannot be written.
func TestDirectoryOfOthers(t *testing.T) {
	t.Parallel()
	disk := smallDisk(t, "400m")
	if err := errors.Join(os.Chmod(disk, 0o755), os.Chmod(filepath.Dir(disk), 0o755)); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(disk, "data")
	first := runServerIn(t, dir)
	first.ready()
	// Its owner may let others look. The binary must be somewhere where they may, too.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bin, err := exec.LookPath("grapnel")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(disk, "grapnel")
	if err := os.WriteFile(own, program, 0o755); err != nil {
		t.Fatal(err)
	}
	const nobody = 65534
	as := exec.Command(own, "server", "--data-dir", dir, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
	as.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	as.Dir = disk
	out, err := as.CombinedOutput()
	if want := fmt.Sprintf("is in use by pid %d", first.cmd.Process.Pid); as.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), want) {
		t.Errorf("as another user: %v, want %q in\n%s", err, want, out)
	}
	first.signal(syscall.SIGTERM)
	as = exec.Command(own, as.Args[1:]...)
	as.SysProcAttr, as.Dir = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}, disk
	out, err = as.CombinedOutput()
	if as.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), dir+" cannot be used") || !strings.Contains(string(out), "permission denied") {
		t.Errorf("in a directory of another user: %v\n%s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "remount,ro", disk).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	refused(t, runServerIn(t, dir), dir+" cannot be used", "read-only file system")
}
