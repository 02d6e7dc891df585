package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// serverProcess is the real binary, started as a user would start it.
type serverProcess struct {
	cmd   *exec.Cmd
	addr  string
	admin string
	// ready is how long it took from the start of the process to its ready line.
	ready time.Duration
	conn  *grpc.ClientConn
	log   *tail
	ended chan struct{}
}

var hostPort = regexp.MustCompile(`127\.0\.0\.1:\d+`)

// startServer runs `grapnel server` on dir and waits for its ready line: as long as ctx has a deadline until then, else
// for a minute.
func startServer(ctx context.Context, bin, dir string, extra ...string) (*serverProcess, error) {
	return startServerIn(ctx, bin, dir, func(int) error { return nil }, extra...)
}

// startServerIn hands the new process to place before it waits.
func startServerIn(ctx context.Context, bin, dir string, place func(pid int) error, extra ...string) (*serverProcess, error) {
	args := append([]string{
		"server", "--data-dir", dir, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0",
		"--egress-allow", "127.0.0.0/8", "--log-level", "warn",
	}, extra...)
	cmd := exec.Command(bin, args...)
	p := &serverProcess{cmd: cmd, log: &tail{}, ended: make(chan struct{})}
	cmd.Stderr = p.log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", bin, err)
	}
	placed := place(cmd.Process.Pid)
	longest := time.Minute
	if end, ok := ctx.Deadline(); ok {
		longest = time.Until(end)
	}
	lines := make(chan string, 1)
	go func() {
		r := bufio.NewReader(stdout)
		if line, err := r.ReadString('\n'); err == nil {
			lines <- line
		}
		close(lines)
		_, _ = io.Copy(io.Discard, r)
		_ = cmd.Wait()
		close(p.ended)
	}()
	if placed != nil {
		p.kill()
		return nil, fmt.Errorf("place the server: %w", placed)
	}
	select {
	case line, ok := <-lines:
		addrs := hostPort.FindAllString(line, 2)
		if !ok || len(addrs) == 0 {
			p.kill()
			return nil, fmt.Errorf("%s server gave no ready line: %q\n%s", bin, line, p.log)
		}
		p.addr, p.ready = addrs[0], time.Since(begin)
		if len(addrs) == 2 {
			p.admin = addrs[1]
		}
	case <-time.After(longest):
		p.kill()
		return nil, fmt.Errorf("%s server was not ready within %v\n%s", bin, longest.Round(time.Second), p.log)
	case <-ctx.Done():
		p.kill()
		return nil, ctx.Err()
	}
	p.conn, err = grpc.NewClient(p.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		p.kill()
		return nil, err
	}
	return p, nil
}

// stop ends the server as an operator would.
func (p *serverProcess) stop() error {
	_ = p.conn.Close()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.ended:
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			return fmt.Errorf("server ended with %d:\n%s", code, p.log)
		}
		return nil
	case <-time.After(60 * time.Second):
		p.kill()
		return fmt.Errorf("server did not stop within 60s:\n%s", p.log)
	}
}

// kill is kill -9. Of no server, one that did not start, it kills nothing.
func (p *serverProcess) kill() {
	if p == nil {
		return
	}
	if p.conn != nil {
		_ = p.conn.Close()
	}
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// pids names the processes whose CPU is measured.
func (p *serverProcess) pids() map[string][]int {
	return map[string][]int{"server": {p.cmd.Process.Pid}, "plugin": children(p.cmd.Process.Pid)}
}

// tail keeps the end of what a process wrote.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.buf.Len() > 64<<10 {
		t.buf.Next(t.buf.Len() / 2)
	}
	return t.buf.Write(p)
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(t.buf.String())
}

// prepare makes a namespace with room for the run, the signing key, and one subscription per path.
func (p *serverProcess) prepare(ctx context.Context, ns string, uris ...string) error {
	_, err := grapnelv1.NewNamespaceServiceClient(p.conn).CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{
		NamespaceId: ns,
		Namespace: &grapnelv1.Namespace{Quota: &grapnelv1.Quota{
			MaxPublishRate: 1_000_000, MaxOpenDeliveries: 100_000_000, MaxSubscriptions: 1_000_000,
		}},
	}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	parent := "namespaces/" + ns
	_, err = grapnelv1.NewSecretServiceClient(p.conn).CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
		Parent: parent, SecretId: "key", Kind: grapnelv1.Secret_KIND_HMAC, Value: benchKey,
	})
	if err != nil {
		return err
	}
	_, err = p.subscribeTo(ctx, ns, len(uris), func(i int) *grapnelv1.Subscription { return signed(ns, uris[i], "bench.*") })
	return err
}

// recorded waits until no delivery of the namespace is open any more.
func (p *serverProcess) recorded(ctx context.Context, ns string) error {
	nss := grapnelv1.NewNamespaceServiceClient(p.conn)
	deadline := time.Now().Add(30 * time.Second)
	for {
		got, err := nss.GetNamespace(ctx, &grapnelv1.GetNamespaceRequest{Name: "namespaces/" + ns})
		if err != nil {
			return err
		}
		open := got.GetNamespace().GetUsage().GetOpenDeliveries()
		if open == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d deliveries arrived but were not recorded", open)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
