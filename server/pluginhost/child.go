package pluginhost

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
)

// child is one plugin process, as go-plugin's runner sees it and as the supervisor ends it. It has a
// process group of its own, an empty environment but for the handshake, no standard input, and dies with
// the host where the system can do that.
type child struct {
	spec   Spec
	env    []string
	dir    string // its sockets
	out    *tail
	cmd    *exec.Cmd
	stdout *io.PipeReader // the handshake line, then nothing until the end
	stderr *io.PipeReader // nothing until the end
	lineW  *io.PipeWriter
	errW   *io.PipeWriter
	// exited is closed when the process is reaped and its group killed; status is set before.
	exited chan struct{}
	status error
}

func newChild(spec Spec, env []string, dir string, out *tail) *child {
	c := &child{spec: spec, env: env, dir: dir, out: out, exited: make(chan struct{})}
	c.stdout, c.lineW = io.Pipe()
	c.stderr, c.errW = io.Pipe()
	return c
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// Start is part of go-plugin's runner.
func (c *child) Start(context.Context) error {
	started := make(chan error, 1)
	go c.live(started)
	return <-started
}

// live starts the process and stays until it has ended, on one thread: the parent-death signal belongs
// to the thread that started the child, and comes when that thread ends.
func (c *child) live(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
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
	c.status = reap(c.cmd)
	// Its descendants are dead too, so both pipes end.
	readers.Wait()
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
	c.cmd = exec.Command(c.spec.Path, c.spec.Args...)
	c.cmd.Env = c.env
	c.cmd.Dir = filepath.Dir(c.dir)
	c.cmd.Stdout, c.cmd.Stderr = outW, errW
	ownGroup(c.cmd)
	if err := c.cmd.Start(); err != nil {
		_ = outR.Close()
		_ = errR.Close()
		return pipes, err
	}
	return [2]*os.File{outR, errR}, nil
}

// readStdout hands the handshake line to go-plugin and treats all else like standard error, for as long
// as the process lives, so that it never blocks on it.
func (c *child) readStdout(r *os.File) {
	defer r.Close()
	br := bufio.NewReaderSize(r, 16<<10)
	for {
		line, err := br.ReadSlice('\n')
		if strings.Count(string(line), "|") >= 4 && line[0] >= '0' && line[0] <= '9' {
			go func(text string) { _, _ = io.WriteString(c.lineW, text) }(string(line))
			break
		}
		c.out.write(line)
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
	c.out.readFrom(br)
}

// signal asks the group to end, or kills it.
func (c *child) signal(kill bool) {
	select {
	case <-c.exited:
	default:
		if c.cmd != nil && c.cmd.Process != nil {
			signalGroup(c.cmd.Process, kill)
		}
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
	c.signal(true)
	return nil
}

// Stdout is part of go-plugin's runner.
func (c *child) Stdout() io.ReadCloser { return c.stdout }

// Stderr is part of go-plugin's runner.
func (c *child) Stderr() io.ReadCloser { return c.stderr }

// Name is part of go-plugin's runner.
func (c *child) Name() string { return c.spec.Path }

// ID is part of go-plugin's runner.
func (c *child) ID() string {
	if c.cmd == nil || c.cmd.Process == nil {
		return ""
	}
	return strconv.Itoa(c.cmd.Process.Pid)
}

// Diagnose is part of go-plugin's runner.
func (c *child) Diagnose(context.Context) string { return c.out.String() }

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
