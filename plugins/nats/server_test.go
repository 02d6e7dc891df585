//go:build unix

package natsplugin

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
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// workspace is the folder of the server's binary, made and removed by TestMain.
var workspace string

// buildServer builds the nats-server that tools/go.mod pins, once per run, and returns its path.
var buildServer = sync.OnceValues(func() (string, error) {
	path := filepath.Join(workspace, "nats-server")
	cmd := exec.Command("go", "build", "-modfile=tools/go.mod", "-o", path, "github.com/nats-io/nats-server/v2")
	cmd.Dir = "../.."
	if printed, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build nats-server: %w\n%s", err, printed)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "grapnel-nats")
	if err != nil {
		panic(err)
	}
	workspace = dir
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// node is one nats-server process; its streams outlive it within the test.
type node struct {
	t      testing.TB
	config string
	addr   string

	log strings.Builder

	mu  sync.Mutex // guards cmd, and addr against other goroutines than the test's
	cmd *exec.Cmd
}

// address is where the server listens, for other goroutines.
func (n *node) address() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.addr
}

// noJetStream begins the config of a server without it.
const noJetStream = "# plain"

// start runs a server with JetStream and what config adds.
func start(t testing.TB, config string) *node {
	t.Helper()
	if testing.Short() {
		t.Skip("builds nats-server")
	}
	n := &node{t: t, addr: "127.0.0.1:-1"}
	n.config = config
	if !strings.HasPrefix(config, noJetStream) {
		n.config = fmt.Sprintf("jetstream { store_dir: %q }\n%s\n", t.TempDir(), config)
	}
	n.run()
	t.Cleanup(n.kill)
	return n
}

// run starts the process and returns when it takes connections. A second time it gets the same port.
func (n *node) run() {
	n.t.Helper()
	binary, err := buildServer()
	if err != nil {
		n.t.Fatal(err)
	}
	path := filepath.Join(n.t.TempDir(), "nats.conf")
	if err := os.WriteFile(path, []byte("listen: \""+n.addr+"\"\n"+n.config), 0o600); err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command(binary, "-c", path)
	out, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.mu.Lock()
	n.cmd = cmd
	n.mu.Unlock()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		line := lines.Text()
		_, _ = n.log.WriteString(line + "\n")
		if _, addr, ok := strings.Cut(line, "Listening for client connections on "); ok {
			n.mu.Lock()
			n.addr = strings.TrimSpace(addr)
			n.mu.Unlock()
		}
		if strings.HasSuffix(line, "Server is ready") {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return
		}
	}
	n.t.Fatalf("nats-server did not start:\n%s", n.log.String())
}

// kill ends the process at once.
func (n *node) kill() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd != nil {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
		n.cmd = nil
	}
}

// pause stops the process without its connections noticing, and returns when it stands.
func (n *node) pause() {
	n.t.Helper()
	n.signal(syscall.SIGSTOP)
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(n.cmd.Process.Pid, &status, syscall.WUNTRACED, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil || !status.Stopped():
			n.t.Fatalf("nats-server did not stop: status %v, error %v", status, err)
		default:
			return
		}
	}
}

// resume has it go on.
func (n *node) resume() {
	n.t.Helper()
	n.signal(syscall.SIGCONT)
}

func (n *node) signal(s os.Signal) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.cmd.Process.Signal(s); err != nil {
		n.t.Fatal(err)
	}
}

// admin is a client of the test's own.
func (n *node) admin(options ...nats.Option) jetstream.JetStream {
	n.t.Helper()
	client, err := nats.Connect("nats://"+n.addr, append(options, nats.NoReconnect())...)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(client.Close)
	js, err := jetstream.New(client)
	if err != nil {
		n.t.Fatal(err)
	}
	return js
}

// stream makes a stream that takes the subjects.
func (n *node) stream(config jetstream.StreamConfig, options ...nats.Option) jetstream.Stream {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 10*time.Second)
	defer cancel()
	s, err := n.admin(options...).CreateStream(ctx, config)
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// stored counts a stream's messages, as seen by a new client.
func (n *node) stored(name string) uint64 {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 10*time.Second)
	defer cancel()
	s, err := n.admin().Stream(ctx, name)
	if err != nil {
		n.t.Fatal(err)
	}
	return s.CachedInfo().State.Msgs
}

// proxy stands between the transport and a server.
type proxy struct {
	addr string
	to   func() string

	mu     sync.Mutex
	conns  int
	onSend func(what []byte) // sees what clients send before the server does
}

func newProxy(t testing.TB, to func() string) *proxy {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: lis.Addr().String(), to: to}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.forward(c) })
		}
	})
	t.Cleanup(func() { _ = lis.Close(); wg.Wait() })
	return p
}

func (p *proxy) forward(c net.Conn) {
	defer func() { _ = c.Close() }()
	p.mu.Lock()
	p.conns++
	p.mu.Unlock()
	s, err := net.Dial("tcp", p.to())
	if err != nil {
		return
	}
	defer func() { _ = s.Close() }()
	go func() {
		_, _ = io.Copy(c, s)
		_ = c.Close()
	}()
	buffer := make([]byte, 64<<10)
	for {
		read, err := c.Read(buffer)
		if err != nil {
			return
		}
		p.mu.Lock()
		onSend := p.onSend
		p.mu.Unlock()
		if onSend != nil {
			onSend(buffer[:read])
		}
		if _, err := s.Write(buffer[:read]); err != nil {
			return
		}
	}
}

func (p *proxy) watch(onSend func([]byte)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.onSend = onSend
}

func (p *proxy) connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conns
}
