package conformance

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// awaitExit returns when the process has exited, and leaves it to be collected.
func awaitExit(cmd *exec.Cmd) {
	for {
		err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func killGroup(p *os.Process) { _ = syscall.Kill(-p.Pid, syscall.SIGKILL) }

// killStrays ends what plugins have started and put out of reach of killGroup: it is known by the socket
// directory in its environment, which is below dir.
func killStrays(dir string) {
	environs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range environs {
		env, _ := os.ReadFile(path)
		if bytes.Contains(env, []byte("PLUGIN_UNIX_SOCKET_DIR="+dir+"/")) {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

// signalGroup sends what a terminal or an init system sends to all of a group.
func signalGroup(p *os.Process, sig syscall.Signal) { _ = syscall.Kill(-p.Pid, sig) }

// descendants are the live processes of p's group, and those elsewhere that have its socket directory in
// their environment.
func descendants(p *process) ([]int, bool) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, false
	}
	var found []int
	for _, path := range stats {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		fields := statFields(pid)
		if pid == p.pid() || len(fields) < 3 || fields[0] == "Z" || fields[0] == "X" {
			continue
		}
		env, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
		if fields[2] == strconv.Itoa(p.pid()) || bytes.Contains(env, []byte("PLUGIN_UNIX_SOCKET_DIR="+p.dir+"\x00")) {
			found = append(found, pid)
		}
	}
	return found, true
}

// statFields are those of /proc/PID/stat from the state on.
func statFields(pid int) []string {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return nil
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.Fields(rest)
}

// usage is what a process holds at a moment.
type usage struct {
	rss     int64 // bytes
	fds     int
	threads int
	cpu     time.Duration
}

// usageOf reads what a process uses; the kernel counts CPU in hundredths of a second.
func usageOf(pid int) (usage, bool) {
	fields := statFields(pid)
	if len(fields) < 22 {
		return usage{}, false
	}
	number := func(i int) int64 {
		n, _ := strconv.ParseInt(fields[i], 10, 64)
		return n
	}
	fds, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/fd")
	if err != nil {
		return usage{}, false
	}
	return usage{
		rss: number(21) * int64(os.Getpagesize()), fds: len(fds), threads: int(number(17)),
		cpu: time.Duration(number(11)+number(12)) * 10 * time.Millisecond,
	}, true
}

// cmdline is the process's argument list and environment as the system shows them.
func cmdline(pid int) string {
	args, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	env, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	return string(args) + string(env)
}

// ownCPU is what this process has used.
func ownCPU() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
