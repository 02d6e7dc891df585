package process

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Child is one process, as go-plugin's runner sees it and as its supervisor ends it. It has a
// process group of its own, an empty environment but for the handshake, no standard input, and dies with
// its parent where the system can do that. All methods are safe for concurrent use once Place was called.
type Child struct {
	program  *Program
	env      []string
	dir      string // its sockets; part of its environment, by which its descendants are found
	out      *Output
	patience time.Duration  // for what a process that hangs has to say
	stdout   *io.PipeReader // the handshake line, then nothing until the end
	stderr   *io.PipeReader // nothing until the end
	lineW    *io.PipeWriter
	errW     *io.PipeWriter
	// line is the handshake; set once it was read.
	line atomic.Pointer[string]
	// killed is set when the parent has ended the process.
	killed atomic.Bool
	// exited is closed when the process is reaped and its group killed; status is set before.
	exited chan struct{}
	status error

	mu        sync.Mutex // guards what follows
	cmd       *exec.Cmd  // once started
	doomed    bool       // to be killed as soon as it is
	collected bool       // its number may be another's
}

// NewChild is a process to be. What it writes goes to out; patience is for what one that hangs before its handshake
// has to say.
func NewChild(g *Program, out *Output, patience time.Duration) *Child {
	c := &Child{program: g, out: out, patience: patience, exited: make(chan struct{})}
	c.stdout, c.lineW = io.Pipe()
	c.stderr, c.errW = io.Pipe()
	return c
}

// Place says what the process is to find: its environment, and its directory. It comes before Start.
func (c *Child) Place(env []string, dir string) error {
	c.env, c.dir = env, dir
	if runtime.GOOS != "windows" {
		// Scripts find their interpreter by it; the server's own would say where the server looks.
		c.env = append(c.env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	if soft := cmp.Or(c.program.spec.SoftMemoryBytes, c.program.spec.Limits.MemoryBytes/10*9); soft > 0 {
		c.env = append(c.env, "GOMEMLIMIT="+strconv.FormatUint(soft, 10))
	}
	// A Go program that panics says for whom it was at work: see Output.Culprit.
	c.env = append(c.env, "GODEBUG=tracebacklabels=1")
	return c.program.giveDir(dir)
}

// process is nil until it has been started.
func (c *Child) process() *os.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd == nil {
		return nil
	}
	return c.cmd.Process
}

// Started reports whether there is a process, or was.
func (c *Child) Started() bool { return c.process() != nil }

// Pid is the number of a process that was started.
func (c *Child) Pid() int { return c.process().Pid }

// Dir is the process's directory, "" before Place.
func (c *Child) Dir() string { return c.dir }

// Exited is closed when the process has been collected, its descendants have been killed and what it wrote was read.
func (c *Child) Exited() <-chan struct{} { return c.exited }

// Doom kills the process, also one that is about to be started.
func (c *Child) Doom() {
	c.mu.Lock()
	c.doomed = true
	c.mu.Unlock()
	c.Signal(true)
}

// Start is part of go-plugin's runner.
func (c *Child) Start(context.Context) error {
	started := make(chan error, 1)
	go c.live(started)
	return <-started
}

// live starts the process and stays until it has ended, on one thread: the parent-death signal belongs
// to the thread that started the child, and comes when that thread ends. The thread ends with it, since it has given
// up the right to new privileges for its children's sake.
func (c *Child) live(started chan<- error) {
	runtime.LockOSThread()
	pipes, err := c.start()
	started <- err
	if err != nil {
		_ = c.lineW.Close()
		_ = c.errW.Close()
		return
	}
	var readers sync.WaitGroup
	readers.Go(func() { c.readStdout(pipes[0]) })
	readers.Go(func() { c.out.read(pipes[1]) })
	c.status = reap(c.cmd, c.dir, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.collected = true
	})
	// Its descendants are dead too, so both pipes end, unless one has escaped.
	ended := make(chan struct{})
	go func() {
		readers.Wait()
		close(ended)
	}()
	if !within(ended, time.Second) {
		_ = pipes[0].Close()
		_ = pipes[1].Close()
		<-ended
	}
	close(c.exited)
	_ = c.lineW.Close()
	_ = c.errW.Close()
}

// start returns the reading ends of standard output and error.
func (c *Child) start() ([2]*os.File, error) {
	var pipes [2]*os.File
	outR, outW, err := os.Pipe()
	if err != nil {
		return pipes, err
	}
	defer outW.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		_ = outR.Close()
		return pipes, err
	}
	defer errW.Close()
	g := c.program
	cmd := &exec.Cmd{
		Path: g.path, Args: append([]string{g.path}, g.spec.Args...), Env: c.env, Dir: filepath.Dir(c.dir),
		Stdout: outW, Stderr: errW,
	}
	if g.file != nil {
		cmd.Path, cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{g.file}
	}
	if err := startConfined(cmd, g); err != nil {
		_ = outR.Close()
		_ = errR.Close()
		var failed *fs.PathError
		if errors.As(err, &failed) {
			err = failed.Err // its path may be the file descriptor's
		}
		return pipes, fmt.Errorf("start %s: %w", g.path, err)
	}
	c.mu.Lock()
	c.cmd = cmd
	doomed := c.doomed
	c.mu.Unlock()
	if doomed {
		c.Signal(true)
	}
	return [2]*os.File{outR, errR}, nil
}

// Short reports whether a process could not be started because this machine has no descriptor, process or memory left
// for it.
func Short(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.ENOMEM)
}

// readStdout hands the handshake line to go-plugin and treats all else like standard error, for as long
// as the process lives, so that it never blocks on it.
func (c *Child) readStdout(r *os.File) {
	defer r.Close()
	br := c.out.buffered(r)
	handshake := regexp.MustCompile(`1\|[0-9]+\|(unix|tcp)\|[^|]*\|.*\n$`)
	var line []byte // what there is of it, but no more than its last part
	for {
		part, err := br.ReadSlice('\n')
		line = append(line, part...)
		// What a library printed without an end of line may stand before it.
		if at := handshake.FindIndex(line); at != nil {
			c.out.write(line[:at[0]])
			c.shake(string(line[at[0]:]))
			break
		}
		switch {
		case err == nil:
			c.out.write(line)
			line = line[:0]
		case errors.Is(err, bufio.ErrBufferFull):
			line = append(line[:0], line[max(0, len(line)-longestHandshake):]...)
		default:
			c.out.write(line)
			return
		}
	}
	c.out.readFrom(br)
}

// longestHandshake has room for a certificate, too.
const longestHandshake = 4096

func (c *Child) shake(line string) {
	c.line.Store(&line)
	go func() { _, _ = io.WriteString(c.lineW, line) }() // returns at the latest when the process has ended
}

func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// HandshakeError says why there was no handshake within limit, in words that tell what to do. version is that of the
// protocol that was asked for.
func (c *Child) HandshakeError(err error, limit time.Duration, version int) error {
	if !c.Started() {
		return err
	}
	line := c.line.Load()
	select {
	case <-c.exited:
		if line == nil && !c.killed.Load() {
			return fmt.Errorf("it ended before its handshake: %s", c.Why())
		}
	default:
	}
	switch {
	case line == nil:
		return fmt.Errorf("no handshake line on its standard output within %v", limit)
	case strings.Split(*line, "|")[1] != strconv.Itoa(version):
		return fmt.Errorf("it speaks version %s of the plugin protocol, this server speaks version %d; install a version of the plugin that does, too",
			strings.Split(*line, "|")[1], version)
	}
	return err
}

// Signal asks the process and its group to end, or kills it.
func (c *Child) Signal(kill bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd != nil && !c.collected {
		c.killed.Store(c.killed.Load() || kill)
		signalGroup(c.cmd.Process, kill)
	}
}

// Dump has a process that hangs write where it does, which Go programs do at SIGQUIT, and gives it a moment for that.
func (c *Child) Dump(patience time.Duration) {
	c.mu.Lock()
	asked := c.cmd != nil && !c.collected
	if asked {
		c.killed.Store(true)
		quit(c.cmd.Process)
	}
	c.mu.Unlock()
	if asked {
		within(c.exited, patience)
	}
}

// within reports whether done is closed in time.
func within(done <-chan struct{}, longest time.Duration) bool {
	timer := time.NewTimer(longest)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}

// Why describes the end of a process that has exited.
func (c *Child) Why() string {
	if c.status != nil {
		return c.status.Error()
	}
	return "exit status 0"
}

// Wait is part of go-plugin's runner.
func (c *Child) Wait(context.Context) error {
	<-c.exited
	return nil
}

// Kill is part of go-plugin's runner.
func (c *Child) Kill(context.Context) error {
	if c.line.Load() == nil {
		c.Dump(c.patience)
	}
	c.Signal(true)
	return nil
}

// Stdout is part of go-plugin's runner.
func (c *Child) Stdout() io.ReadCloser { return c.stdout }

// Stderr is part of go-plugin's runner.
func (c *Child) Stderr() io.ReadCloser { return c.stderr }

// Name is part of go-plugin's runner.
func (c *Child) Name() string { return c.program.path }

// ID is part of go-plugin's runner.
func (c *Child) ID() string {
	p := c.process()
	if p == nil {
		return ""
	}
	return strconv.Itoa(p.Pid)
}

// Diagnose is part of go-plugin's runner.
func (c *Child) Diagnose(context.Context) string { return c.out.Brief() }

// PluginToHost is part of go-plugin's runner. The plugin names its address; only one in the private
// directory is believed, and on Linux the very file that was looked at is the one that is dialled; or one on loopback
// where there are no unix sockets.
func (c *Child) PluginToHost(network, addr string) (string, string, error) {
	if network == "unix" {
		if filepath.Dir(filepath.Clean(addr)) != filepath.Clean(c.dir) {
			return "", "", fmt.Errorf("its socket is outside the directory it was given")
		}
		path, socket, err := openSocket(addr)
		if err != nil {
			return "", "", err
		}
		if socket != nil {
			go func() {
				<-c.exited
				_ = socket.Close()
			}()
		}
		return network, path, nil
	}
	if host, _, err := net.SplitHostPort(addr); runtime.GOOS == "windows" && network == "tcp" && err == nil {
		if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() {
			return network, addr, nil
		}
	}
	return "", "", fmt.Errorf("it listens on %s, want a unix socket", network)
}

// HostToPlugin is part of go-plugin's runner.
func (c *Child) HostToPlugin(network, addr string) (string, string, error) { return network, addr, nil }
