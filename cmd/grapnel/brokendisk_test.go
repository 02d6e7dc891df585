package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/grapnel/grapnel/internal/required"
)

var allDiskFaults = flag.Bool("disk.all", false, "every fault of every store's disk, and not one of each")

// TestBrokenDisk has the disk fail under each store of a running server, with errors that strace puts in the place of what
// writes and syncs would say. The server says so in one line, with its own exit code, and acknowledges nothing that was not
// written; the next start has everything that was acknowledged.
func TestBrokenDisk(t *testing.T) {
	if testing.Short() {
		t.Skip("starts many servers")
	}
	t.Parallel()
	_, err := exec.LookPath("strace")
	required.Tool(t, "strace", err, "apt-get install strace")
	for store, files := range map[string]string{
		"etcd's log":      "etcd/member/wal/*.wal",
		"etcd's database": "etcd/member/snap/db",
		"journal":         "journal/*.log",
	} {
		faults := []struct{ calls, err string }{
			{"fdatasync,fsync", "EIO"}, {"fdatasync,fsync", "ENOSPC"}, {"write,pwrite64", "EIO"}, {"write,pwrite64", "ENOSPC"},
		}
		if !*allDiskFaults {
			faults = faults[:1]
		}
		for _, fault := range faults {
			t.Run(fmt.Sprint(store, " ", fault.calls, " ", fault.err), func(t *testing.T) {
				t.Parallel()
				dir := filepath.Join(t.TempDir(), "data")
				r := runServerIn(t, dir)
				a := dialAPI(t, r.ready())
				if err := errors.Join(a.create("acme"), a.publish()); err != nil {
					t.Fatal(err)
				}
				paths, err := filepath.Glob(filepath.Join(dir, filepath.FromSlash(files)))
				if err != nil || len(paths) == 0 {
					t.Fatal("no file ", files, err)
				}
				inject(t, r, paths, fault.calls, fault.err)
				acknowledged, published := 0, 1
				for i := range 10_000 {
					if a.create(fmt.Sprintf("n%d", i)) != nil {
						break
					}
					acknowledged++
					if a.publish() != nil {
						break
					}
					published++
				}
				if code := r.code(); code != 70 {
					t.Errorf("exit code %d", code)
				}
				told := regexp.MustCompile(`level=ERROR .* cannot go on`).FindAllString(r.log.text(), -1)
				if len(told) != 1 || strings.Contains(r.log.text(), "goroutine ") {
					t.Errorf("it is told %d times:\n%s", len(told), r.log.text())
				}

				r = runServerIn(t, dir)
				a = dialAPI(t, r.ready())
				for i := range acknowledged {
					if err := a.create(fmt.Sprintf("n%d", i)); err == nil {
						t.Errorf("namespace n%d, of %d, was acknowledged and is not there", i, acknowledged)
					}
				}
				if n := len(a.events()); n < published {
					t.Errorf("%d events, %d were acknowledged", n, published)
				}
				if code := r.signal(syscall.SIGTERM); code != 0 {
					t.Errorf("exit code %d\n%s", code, r.log.text())
				}
			})
		}
	}
}

// inject has system calls on some files fail from now on.
func inject(t *testing.T, r *running, paths []string, calls, failure string) {
	t.Helper()
	args := []string{"-f", "-o", filepath.Join(t.TempDir(), "trace"), "-e", "trace=" + calls, "-e", "inject=" + calls + ":error=" + failure, "-p", fmt.Sprint(r.cmd.Process.Pid)}
	for _, path := range paths {
		args = append(args, "-P", path)
	}
	tracer := exec.Command("strace", args...)
	said, err := tracer.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = tracer.Process.Kill()
		_ = tracer.Wait()
	})
	for lines := bufio.NewScanner(said); lines.Scan(); {
		switch line := lines.Text(); {
		case strings.Contains(line, "attached"):
			return
		case strings.Contains(line, "not permitted"):
			t.Skip("strace may not trace here: ", line)
		}
	}
	t.Fatal("strace has ended")
}
