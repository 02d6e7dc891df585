package pluginhost

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// process keeps one plugin binary running: one supervisor goroutine starts it, waits for its end, and
// starts it again.
type process struct {
	host *Host
	spec Spec
	log  *slog.Logger
	// conn is nil while the process does not serve.
	conn atomic.Pointer[conn]

	mu       sync.Mutex // guards what follows
	name     string
	version  string
	protocol string
	state    state
	changed  chan struct{} // closed and replaced at each change of state
	started  time.Time
	restarts int
	checksum string
	lastErr  string
	crashes  []time.Time
}

type state int

const (
	starting state = iota
	serving
	backoff
	failed
	stopped
)

func newProcess(h *Host, spec Spec) *process {
	name := filepath.Base(spec.Path)
	return &process{
		host: h, spec: spec, name: name, changed: make(chan struct{}),
		log: h.log.With("plugin", name),
	}
}

func (p *process) displayName() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.name
}

func (p *process) setState(s state) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = s
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *process) awaitServing(ctx context.Context) error {
	for {
		p.mu.Lock()
		s, changed, lastErr := p.state, p.changed, p.lastErr
		p.mu.Unlock()
		if s == serving {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if lastErr != "" {
				return fmt.Errorf("%w (%s)", ctx.Err(), lastErr)
			}
			return ctx.Err()
		}
	}
}

// run supervises until ctx ends.
func (p *process) run(ctx context.Context) {
	defer p.setState(stopped)
	for short := 0; ; {
		p.setState(starting)
		began := time.Now()
		c, err := p.start(ctx)
		if err == nil {
			err = p.serve(ctx, c)
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) >= p.host.timing.stable {
			short = 0
		}
		short++
		delay := p.crashed(err, short)
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// serve lets attempts in until the process ends or ctx does, and returns why it ended.
func (p *process) serve(ctx context.Context, c *conn) error {
	p.mu.Lock()
	p.started = time.Now()
	p.mu.Unlock()
	p.conn.Store(c)
	p.setState(serving)
	p.log.Info("plugin serves", "version", c.version, "pid", c.child.pid())
	p.host.unpark()
	select {
	case <-ctx.Done():
		p.conn.Store(nil) // before the links close, lest attempts be planned for them again and again
		c.stop()
		return ctx.Err()
	case <-c.broken:
	}
	p.conn.Store(nil)
	// The stream mostly ends a little before the process does; its status is the better reason.
	cause := c.cause.Error()
	if wait(c.child.exited, nil, 100*time.Millisecond) {
		cause = c.child.why()
	}
	c.end(c.name + ": " + cause)
	return errors.New(cause)
}

// crashed notes the end of a life and says how long to wait before the next.
func (p *process) crashed(err error, short int) time.Duration {
	t := p.host.timing
	now := time.Now()
	p.mu.Lock()
	p.restarts++
	p.lastErr = err.Error()
	p.crashes = append(p.crashes, now)
	for len(p.crashes) > 0 && now.Sub(p.crashes[0]) > failedWithin {
		p.crashes = p.crashes[1:]
	}
	inARow := len(p.crashes)
	p.mu.Unlock()
	p.host.metrics.restarts.WithLabelValues(p.displayName()).Inc()
	if inARow >= failedAfter {
		p.setState(failed)
		p.log.Error("plugin failed", "crashes", inARow, "retry_in", t.failedRetry, "err", err)
		return t.failedRetry
	}
	p.setState(backoff)
	delay := min(t.backoffMax, t.backoffMin<<min(short-1, 20))
	delay = delay/2 + rand.N(delay/2+1)
	p.log.Warn("plugin ended", "retry_in", delay, "err", err)
	return delay
}

// start brings a process up to where it can take attempts.
func (p *process) start(ctx context.Context) (*conn, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	c := &conn{
		host: p.host, proc: p, log: p.log, drained: make(chan struct{}), broken: make(chan struct{}),
		release: make(chan struct{}),
	}
	out := newTail(func(line string, dropped int) {
		p.log.Warn("plugin wrote", "line", c.redactor.clean(line), "dropped", dropped)
	})
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	c.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: goplugin.HandshakeConfig{
			ProtocolVersion: plugin.ProtocolVersion,
			MagicCookieKey:  plugin.MagicCookieKey, MagicCookieValue: plugin.MagicCookieValue,
		},
		Plugins: goplugin.PluginSet{plugin.PluginSet: dispensed{}},
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, dir string) (runner.Runner, error) {
			c.child = newChild(p.spec, cmd.Env, dir, out)
			return c.child, nil
		},
		// The directory is private to this user, so the socket needs no TLS of its own.
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: p.host.dir},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		SkipHostEnv:      true,
		StartTimeout:     p.host.timing.start,
		Logger:           hclog.NewNullLogger(),
	})
	abort := context.AfterFunc(ctx, func() {
		c.cancel()
		if c.child != nil {
			c.child.signal(true)
		}
	})
	defer abort()
	if err := p.open(c); err != nil {
		return nil, p.abandon(c, out, err)
	}
	return c, nil
}

// open shakes hands, reads what the plugin offers, and opens the streams.
func (p *process) open(c *conn) error {
	rpc, err := c.client.Client()
	if err != nil {
		return err
	}
	raw, err := rpc.Dispense(plugin.PluginSet)
	if err != nil {
		return err
	}
	c.grpc = raw.(*grpc.ClientConn)
	c.plugin = pluginv1.NewPluginServiceClient(c.grpc)
	ctx, cancel := context.WithTimeout(c.ctx, p.host.timing.call)
	defer cancel()
	desc, err := c.plugin.Describe(ctx, &pluginv1.DescribeRequest{HostVersion: p.host.opts.UserAgent, HostProtocolMinor: 1})
	if err != nil {
		return fmt.Errorf("describe: %w", err)
	}
	if err := p.learn(c, desc); err != nil {
		return err
	}
	settings := &pluginv1.HostSettings{UserAgent: p.host.opts.UserAgent}
	for _, prefix := range p.host.opts.EgressAllow {
		settings.EgressAllow = append(settings.EgressAllow, prefix.String())
	}
	if _, err := c.plugin.Configure(ctx, &pluginv1.ConfigureRequest{Settings: settings}); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	return c.openStreams(desc)
}

// learn takes over what the plugin says about itself.
func (p *process) learn(c *conn, desc *pluginv1.DescribeResponse) error {
	if len(desc.GetKinds()) == 0 {
		return errors.New("it offers no kind")
	}
	var kinds []*kind
	for _, pk := range desc.GetKinds() {
		k, err := newKind(p, pk)
		if err != nil {
			return err
		}
		kinds = append(kinds, k)
	}
	c.name, c.version = desc.GetName(), desc.GetVersion()
	if c.name == "" {
		c.name = filepath.Base(p.spec.Path)
	}
	c.protocol = fmt.Sprintf("%d.%d", plugin.ProtocolVersion, desc.GetProtocolMinor())
	p.mu.Lock()
	p.name, p.version, p.protocol = c.name, c.version, c.protocol
	p.mu.Unlock()
	return p.host.kinds.set(p, kinds)
}

// abandon ends a process that did not come up, and adds to err what it last wrote.
func (p *process) abandon(c *conn, out *tail, err error) error {
	c.cancel()
	if c.child != nil && c.child.cmd != nil && c.child.cmd.Process != nil {
		c.child.signal(true)
		<-c.child.exited
	}
	c.workers.Wait()
	go c.client.Kill()
	if c.child != nil {
		_ = os.RemoveAll(c.child.dir)
	}
	if last := out.String(); last != "" && !strings.Contains(err.Error(), last) {
		err = fmt.Errorf("%w; it last wrote: %s", err, last)
	}
	return err
}

// check hashes the binary, and compares when it is pinned. A pinned plugin that does not match does not
// start; it is a status like any other.
func (p *process) check() error {
	f, err := os.Open(p.spec.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	if p.spec.SHA256 == "" && p.known() != "" {
		return nil
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return fmt.Errorf("read %s: %w", p.spec.Path, err)
	}
	sum := hex.EncodeToString(hash.Sum(nil))
	p.mu.Lock()
	p.checksum = sum
	p.mu.Unlock()
	if p.spec.SHA256 != "" && !strings.EqualFold(sum, p.spec.SHA256) {
		return fmt.Errorf("%s has SHA-256 %s, want %s", p.spec.Path, sum, p.spec.SHA256)
	}
	return nil
}

func (p *process) known() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.checksum
}

// logRecords passes a plugin's own log on.
func (p *process) logRecords(c *conn, batch *pluginv1.LogBatch) {
	for _, r := range batch.GetRecords() {
		var level slog.Level
		_ = level.UnmarshalText([]byte(r.GetLevel())) // an unknown one is info
		attrs := make([]slog.Attr, 0, len(r.GetAttributes()))
		for _, k := range sortedKeys(r.GetAttributes()) {
			attrs = append(attrs, slog.String(k, c.redactor.clean(r.GetAttributes()[k])))
		}
		p.log.LogAttrs(c.ctx, level, "plugin log",
			slog.String("text", c.redactor.clean(r.GetMessage())),
			slog.Attr{Key: "attributes", Value: slog.GroupValue(attrs...)})
	}
	if n := batch.GetDropped(); n > 0 {
		p.log.Warn("plugin logs too much", "dropped", n)
	}
}

// dispensed makes go-plugin hand out the connection itself.
type dispensed struct {
	goplugin.NetRPCUnsupportedPlugin
}

func (dispensed) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error { return nil }

func (dispensed) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return conn, nil
}
