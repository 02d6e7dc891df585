package conformance

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// The handshake, as hosts of go-plugin do it and sdk/plugin has it.
const (
	cookieKey   = "GRAPNEL_PLUGIN"
	cookieValue = "b6f1c1a2-6b1e-4a57-9c0f-5d8f0e6a7c31"
	// startLimit is how long the server waits for the handshake line.
	startLimit = 10 * time.Second
	// exitLimit is how long a plugin may take to end when its host is gone.
	exitLimit = 5 * time.Second
	// keepOutput bounds what is kept of a plugin's output.
	keepOutput = 4 << 20
)

// launch says how a process is started; the zero value is as the server does it.
type launch struct {
	// cookie of the handshake; nil means the right one, empty means none.
	cookie *string
	// cwd is the working directory; empty means the directory above the socket's.
	cwd string
	// deafAfterLine leaves standard output unread once the handshake line was there.
	deafAfterLine bool
	// extraEnv is appended to the environment.
	extraEnv []string
}

// process is one plugin process and what it has written.
type process struct {
	cmd     *exec.Cmd
	dir     string // for its socket, and nothing else's
	began   time.Time
	line    chan string   // gets the handshake line
	ended   chan struct{} // closed when it has exited; it is not collected yet
	readers sync.WaitGroup
	pipes   []*os.File
	killed  sync.Once

	mu     sync.Mutex // guards what follows
	before []byte     // standard output ahead of the line
	output []byte     // what came after, and standard error
	lineAt time.Time
}

// newProcess starts the plugin in a process group of its own, with nothing in its environment but the
// handshake, and no standard input.
func (s *suite) newProcess(l launch) (*process, error) {
	dir, err := os.MkdirTemp(s.dir, "s")
	if err != nil {
		return nil, fmt.Errorf("make the socket's directory: %w", err)
	}
	p := &process{dir: dir, line: make(chan string, 1), ended: make(chan struct{})}
	p.cmd = exec.Command(s.command[0], s.command[1:]...)
	p.cmd.Dir = l.cwd
	if p.cmd.Dir == "" {
		p.cmd.Dir = s.dir
	}
	p.cmd.Env = handshakeEnv(l, dir)
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer outW.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		_ = outR.Close()
		return nil, err
	}
	defer errW.Close()
	p.pipes = []*os.File{outR, errR}
	p.cmd.Stdout, p.cmd.Stderr = outW, errW
	ownGroup(p.cmd)
	p.began = time.Now()
	if err := p.cmd.Start(); err != nil {
		_ = outR.Close()
		_ = errR.Close()
		return nil, fmt.Errorf("start the plugin: %w", err)
	}
	p.readers.Go(func() { p.readStdout(outR, l.deafAfterLine) })
	p.readers.Go(func() { _, _ = io.Copy(p, errR) })
	go func() {
		awaitExit(p.cmd)
		close(p.ended)
	}()
	return p, nil
}

// handshakeEnv is what the server puts into the environment, and all of it.
func handshakeEnv(l launch, dir string) []string {
	cookie := cookieValue
	if l.cookie != nil {
		cookie = *l.cookie
	}
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PLUGIN_MIN_PORT=10000", "PLUGIN_MAX_PORT=25000", "PLUGIN_PROTOCOL_VERSIONS=1", "PLUGIN_UNIX_SOCKET_DIR=" + dir,
	}
	if cookie != "" {
		env = append(env, cookieKey+"="+cookie)
	}
	return append(env, l.extraEnv...)
}

// readStdout looks for the handshake line as the server does, which passes over others, and then keeps
// reading unless it is to be deaf.
func (p *process) readStdout(r io.Reader, deaf bool) {
	br := bufio.NewReaderSize(r, 16<<10)
	for {
		line, err := br.ReadSlice('\n')
		if looksLikeHandshake(line) {
			p.mu.Lock()
			p.lineAt = time.Now()
			p.mu.Unlock()
			p.line <- string(line)
			break
		}
		p.mu.Lock()
		if room := keepOutput - len(p.before); room > 0 {
			p.before = append(p.before, line[:min(room, len(line))]...)
		}
		p.mu.Unlock()
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
	if !deaf {
		_, _ = io.Copy(p, br)
	}
}

func looksLikeHandshake(line []byte) bool {
	return bytes.Count(line, []byte("|")) >= 3 && line[0] >= '0' && line[0] <= '9'
}

// Write keeps output. It never fails.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if room := keepOutput - len(p.output); room > 0 {
		p.output = append(p.output, b[:min(room, len(b))]...)
	}
	return len(b), nil
}

// written is all that the process has written so far but for the handshake line.
func (p *process) written() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return string(p.before) + string(p.output)
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// hasEnded waits for the exit, for d at most.
func (p *process) hasEnded(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-p.ended:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// handshake waits for the line and returns its fields.
func (p *process) handshake(ctx context.Context) ([]string, error) {
	timer := time.NewTimer(startLimit)
	defer timer.Stop()
	select {
	case line := <-p.line:
		return strings.Split(strings.TrimSpace(line), "|"), nil
	case <-p.ended:
		select {
		case line := <-p.line: // it was quick
			return strings.Split(strings.TrimSpace(line), "|"), nil
		case <-time.After(100 * time.Millisecond): // lets the readers finish
		}
		return nil, fmt.Errorf("the process ended before the handshake line%s", p.lastWords())
	case <-timer.C:
		return nil, latef("no handshake line on standard output within %v%s", startLimit, p.lastWords())
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// lastWords is the end of what the process wrote, for a report.
func (p *process) lastWords() string {
	text := strings.TrimSpace(strings.ToValidUTF8(p.written(), "\uFFFD"))
	if text == "" {
		return "; it wrote nothing"
	}
	if len(text) > 500 {
		text = "…" + strings.ToValidUTF8(text[len(text)-500:], "")
	}
	return "; it wrote: " + text
}

// status is the exit code of a process that has ended.
func (p *process) status() int {
	p.kill()
	return p.cmd.ProcessState.ExitCode()
}

// kill ends the process and all of its group, and collects it.
func (p *process) kill() {
	p.killed.Do(func() {
		killGroup(p.cmd.Process)
		<-p.ended
		killGroup(p.cmd.Process) // what it left, while its number is not given to another
		_ = p.cmd.Wait()
		p.drain()
		_ = os.RemoveAll(p.dir)
	})
}

// drain lets the readers finish; a descendant that nobody found may hold the pipes open.
func (p *process) drain() {
	done := make(chan struct{})
	go func() {
		p.readers.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Second):
	}
	for _, f := range p.pipes {
		_ = f.Close()
	}
	<-done
}

// privateDir is short enough for the paths of sockets below it.
func privateDir() (string, error) {
	const longest = 60
	base := os.TempDir()
	if len(base) > longest {
		base = "/tmp"
	}
	dir, err := os.MkdirTemp(base, "gc")
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}
