package process

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// canRunFiles: an open file can be run, as /proc/self/fd/N.
const canRunFiles = true

// openSelf opens the running program, which the kernel keeps although its path may hold another or none.
func openSelf(path string) (*os.File, error) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return os.Open(path) // no /proc
	}
	return f, nil
}

// openSocket opens a plugin's socket without following a link, and returns the path that stands for what was opened, for as
// long as it is open.
func openSocket(path string) (string, *os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("its socket cannot be opened: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	info, err := f.Stat()
	if err == nil && info.Mode().Type() != os.ModeSocket {
		err = errors.New("what it names as its socket is none")
	}
	if err != nil {
		_ = f.Close()
		return "", nil, err
	}
	return "/proc/self/fd/" + strconv.Itoa(fd), f, nil
}

// possible says why this system cannot run the spec as it asks to be.
func (s Spec) possible() error {
	if s.Limits.Processes > 0 && s.User == "" {
		return errors.New("a limit of processes needs a user for the plugin: the system counts all processes of a user together, and exempts root")
	}
	return nil
}

// startConfined starts the process in a group of its own. The kernel kills it when the thread that starts it ends,
// which is when the host does; it gets no privileges by running other programs; it leaves no core, which would have
// secrets in it, where the system lets us see to that; and its limits hold before its first instruction, since it starts traced and therefore stopped.
func startConfined(cmd *exec.Cmd, g *Program) error {
	limits := g.spec.Limits != Limits{} && !g.spec.Own
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Ptrace: limits}
	if g.user != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: g.user.uid, Gid: g.user.gid}
	}
	// It holds for the calling thread, which is the child's own here.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("give up new privileges: %w", err)
	}
	if g.spec.Yields > 0 {
		if err := yield(g.spec.Yields); err != nil {
			return err
		}
	}
	if err := cmd.Start(); err != nil {
		if limits && errors.Is(err, unix.EPERM) {
			return fmt.Errorf("%w (its limits are set through ptrace, which this system may forbid)", err)
		}
		return err
	}
	pid := cmd.Process.Pid
	err := g.user.alike(func() error {
		_ = limit(pid, unix.RLIMIT_CORE, 0)
		if g.spec.Own {
			_ = g.spec.Limits.set(pid)
		}
		if !limits {
			return nil
		}
		return confine(pid, g.spec.Limits)
	})
	if err != nil {
		_ = syscall.Kill(-pid, syscall.SIGKILL)
		_ = cmd.Wait()
	}
	return err
}

// yield has the calling thread, and what it starts, be nicer by so much. It is the child's own, as above, for there is no
// way back.
func yield(by int) error {
	const most = 19
	now, err := unix.Getpriority(unix.PRIO_PROCESS, 0) // which the kernel counts from 40 down
	if err == nil {
		err = unix.Setpriority(unix.PRIO_PROCESS, 0, min(20-now+by, most))
	}
	if err != nil {
		return fmt.Errorf("lower the process's priority: %w", err)
	}
	return nil
}

// alike calls f while the calling thread's real user and group are the account's. The kernel lets a process be limited
// by its own user, and else only by those with CAP_SYS_RESOURCE, which root in a container does not have. The system
// calls are made directly since those of package syscall change all threads.
func (a *account) alike(f func() error) error {
	if a == nil {
		return f()
	}
	const same = ^uintptr(0)
	gid, uid := uintptr(os.Getgid()), uintptr(os.Getuid())
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(a.gid), same, same); errno != 0 {
		return fmt.Errorf("take the plugin's group: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(a.uid), same, same); errno != 0 {
		return fmt.Errorf("take the plugin's user: %w", errno)
	}
	err := f()
	_, _, uidErrno := unix.RawSyscall(unix.SYS_SETRESUID, uid, same, same)
	_, _, gidErrno := unix.RawSyscall(unix.SYS_SETRESGID, gid, same, same)
	if errno := cmp.Or(uidErrno, gidErrno); err == nil && errno != 0 {
		return fmt.Errorf("become the server's user again: %w", errno)
	}
	return err
}

// confine sets the limits of a process that stands still before its first instruction, and lets it go.
func confine(pid int, l Limits) error {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || !status.Stopped() {
			return fmt.Errorf("wait for the process to stand still: %w", cmp.Or(err, error(unix.ESRCH)))
		}
		break
	}
	if err := l.set(pid); err != nil {
		return err
	}
	if err := unix.PtraceDetach(pid); err != nil {
		return fmt.Errorf("let the process go: %w", err)
	}
	return nil
}

func (l Limits) set(pid int) error {
	for _, set := range []struct {
		resource int
		value    uint64
	}{{unix.RLIMIT_DATA, l.MemoryBytes}, {unix.RLIMIT_NOFILE, l.OpenFiles}, {unix.RLIMIT_NPROC, l.Processes}} {
		if set.value == 0 {
			continue
		}
		if err := limit(pid, set.resource, set.value); err != nil {
			return err
		}
	}
	return nil
}

func limit(pid, resource int, value uint64) error {
	var now unix.Rlimit
	if err := unix.Prlimit(pid, resource, nil, &now); err != nil {
		return fmt.Errorf("read a limit of the process: %w", err)
	}
	value = min(value, now.Max) // more than what the server itself may is nothing to give
	if err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: value, Max: value}, nil); err != nil {
		return fmt.Errorf("limit the process: %w", err)
	}
	return nil
}

// reap waits for the child, kills what is left of its group while its number cannot be used again, and what has left
// the group, and collects it; before that it calls collecting.
func reap(cmd *exec.Cmd, dir string, collecting func()) error {
	for {
		err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	for range 5 { // what is found may have had children meanwhile
		if killMarked([]byte("="+dir+"\x00")) == 0 {
			break
		}
	}
	collecting()
	return cmd.Wait()
}

// killMarked kills the processes that were started with mark in their environment: a plugin's descendants, wherever
// they have gone, unless they have cleared it. It returns how many it killed.
func killMarked(mark []byte) int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	killed := 0
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !marked(pid, mark) {
			continue
		}
		// The number may have passed to another process by now; what the descriptor stands for has not.
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if marked(pid, mark) && unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil {
			killed++
		}
		_ = unix.Close(fd)
	}
	return killed
}

func marked(pid int, mark []byte) bool {
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ") // empty for what has ended
	return err == nil && bytes.Contains(env, mark)
}
