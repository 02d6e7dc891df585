package pluginhost

import (
	"bufio"
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
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// child is one plugin process, as go-plugin's runner sees it and as the supervisor ends it. It has a
// process group of its own, an empty environment but for the handshake, no standard input, and dies with
// the host where the system can do that.
type child struct {
	program  *program
	env      []string
	dir      string // its sockets; part of its environment, by which its descendants are found
	out      *tail
	patience time.Duration  // for what a process that hangs has to say
	stdout   *io.PipeReader // the handshake line, then nothing until the end
	stderr   *io.PipeReader // nothing until the end
	lineW    *io.PipeWriter
	errW     *io.PipeWriter
	// line is the handshake; set once it was read.
	line atomic.Pointer[string]
	// killed is set when the host has ended the process.
	killed atomic.Bool
	// exited is closed when the process is reaped and its group killed; status is set before.
	exited chan struct{}
	status error

	mu        sync.Mutex // guards what follows
	cmd       *exec.Cmd  // once started
	doomed    bool       // to be killed as soon as it is
	collected bool       // its number may be another's
}

func newChild(g *program, out *tail, patience time.Duration) *child {
	c := &child{program: g, out: out, patience: patience, exited: make(chan struct{})}
	c.stdout, c.lineW = io.Pipe()
	c.stderr, c.errW = io.Pipe()
	return c
}

// place says what the process is to find: its environment, and its directory.
func (c *child) place(env []string, dir string) error {
	c.env, c.dir = env, dir
	if runtime.GOOS != "windows" {
		// Scripts find their interpreter by it; the server's own would say where the server looks.
		c.env = append(c.env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	if limit := c.program.spec.Limits.MemoryBytes; limit > 0 {
		c.env = append(c.env, "GOMEMLIMIT="+strconv.FormatUint(limit/10*9, 10))
	} else if soft := c.program.spec.SoftMemoryBytes; soft > 0 {
		c.env = append(c.env, "GOMEMLIMIT="+strconv.FormatUint(soft, 10))
	}
	return c.program.giveDir(dir)
}

// process is nil until it has been started.
func (c *child) process() *os.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd == nil {
		return nil
	}
	return c.cmd.Process
}

func (c *child) pid() int { return c.process().Pid }

// doom kills the process, also one that is about to be started.
func (c *child) doom() {
	c.mu.Lock()
	c.doomed = true
	c.mu.Unlock()
	c.signal(true)
}

// Start is part of go-plugin's runner.
func (c *child) Start(context.Context) error {
	started := make(chan error, 1)
	go c.live(started)
	return <-started
}

// live starts the process and stays until it has ended, on one thread: the parent-death signal belongs
// to the thread that started the child, and comes when that thread ends. The thread ends with it, since it has given
// up the right to new privileges for its children's sake.
func (c *child) live(started chan<- error) {
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
	if !wait(ended, nil, time.Second) {
		_ = pipes[0].Close()
		_ = pipes[1].Close()
		<-ended
	}
	close(c.exited)
	_ = c.lineW.Close()
	_ = c.errW.Close()
}

// start returns the reading ends of standard output and error.
func (c *child) start() ([2]*os.File, error) {
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
		c.signal(true)
	}
	return [2]*os.File{outR, errR}, nil
}

// readStdout hands the handshake line to go-plugin and treats all else like standard error, for as long
// as the process lives, so that it never blocks on it.
func (c *child) readStdout(r *os.File) {
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

func (c *child) shake(line string) {
	c.line.Store(&line)
	go func() { _, _ = io.WriteString(c.lineW, line) }() // returns at the latest when the process has ended
}

func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// handshakeError says why there was no handshake, in words that tell what to do.
func (c *child) handshakeError(err error, limit time.Duration) error {
	if c.process() == nil {
		return err
	}
	line := c.line.Load()
	select {
	case <-c.exited:
		if line == nil && !c.killed.Load() {
			return fmt.Errorf("it ended before its handshake: %s", c.why())
		}
	default:
	}
	switch {
	case line == nil:
		return fmt.Errorf("no handshake line on its standard output within %v", limit)
	case strings.Split(*line, "|")[1] != strconv.Itoa(plugin.ProtocolVersion):
		return fmt.Errorf("it speaks version %s of the plugin protocol, this server speaks version %d; install a version of the plugin that does, too",
			strings.Split(*line, "|")[1], plugin.ProtocolVersion)
	}
	return err
}

// signal asks the group to end, or kills it.
func (c *child) signal(kill bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd != nil && !c.collected {
		c.killed.Store(c.killed.Load() || kill)
		signalGroup(c.cmd.Process, kill)
	}
}

// dump has a process that hangs write where it does, which Go programs do at SIGQUIT, and gives it a moment for that.
func (c *child) dump(patience time.Duration) {
	c.mu.Lock()
	asked := c.cmd != nil && !c.collected
	if asked {
		c.killed.Store(true)
		quit(c.cmd.Process)
	}
	c.mu.Unlock()
	if asked {
		wait(c.exited, nil, patience)
	}
}

// why describes the end of a process that has exited.
func (c *child) why() string {
	if c.status != nil {
		return c.status.Error()
	}
	return "exit status 0"
}

// Wait is part of go-plugin's runner.
func (c *child) Wait(context.Context) error {
	<-c.exited
	return nil
}

// Kill is part of go-plugin's runner.
func (c *child) Kill(context.Context) error {
	if c.line.Load() == nil {
		c.dump(c.patience)
	}
	c.signal(true)
	return nil
}

// Stdout is part of go-plugin's runner.
func (c *child) Stdout() io.ReadCloser { return c.stdout }

// Stderr is part of go-plugin's runner.
func (c *child) Stderr() io.ReadCloser { return c.stderr }

// Name is part of go-plugin's runner.
func (c *child) Name() string { return c.program.path }

// ID is part of go-plugin's runner.
func (c *child) ID() string {
	p := c.process()
	if p == nil {
		return ""
	}
	return strconv.Itoa(p.Pid)
}

// Diagnose is part of go-plugin's runner.
func (c *child) Diagnose(context.Context) string { return c.out.brief() }

// PluginToHost is part of go-plugin's runner. The plugin names its address; only one in the private
// directory is believed, or one on loopback where there are no unix sockets.
func (c *child) PluginToHost(network, addr string) (string, string, error) {
	if network == "unix" {
		if filepath.Dir(filepath.Clean(addr)) != filepath.Clean(c.dir) {
			return "", "", fmt.Errorf("its socket is outside the directory it was given")
		}
		return network, addr, nil
	}
	if host, _, err := net.SplitHostPort(addr); runtime.GOOS == "windows" && network == "tcp" && err == nil {
		if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() {
			return network, addr, nil
		}
	}
	return "", "", fmt.Errorf("it listens on %s, want a unix socket", network)
}

// HostToPlugin is part of go-plugin's runner.
func (c *child) HostToPlugin(network, addr string) (string, string, error) { return network, addr, nil }
