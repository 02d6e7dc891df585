package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"

	"github.com/grapnel/grapnel/internal/wire"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/pluginhost/check"
	"github.com/grapnel/grapnel/server/pluginhost/process"
)

// ownName is what builtin plugins are called.
const ownName = "grapnel"

// replyMax is the largest message that a plugin may send: some 64 results with all their headers fit many times.
const replyMax = 16 << 20

// start brings a process up to where it could take attempts.
func (p *supervisor) start(ctx context.Context) (*conn, error) {
	program, err := p.find()
	if err != nil {
		return nil, err
	}
	defer program.Close()
	dir := p.host.dirs.Own()
	if program.OfAnotherUser() {
		if dir, err = p.host.dirs.ForOthers(); err != nil {
			return nil, err
		}
	}
	c := &conn{
		host: p.host, proc: p, log: p.log, drained: make(chan struct{}), broken: make(chan struct{}),
		release: make(chan struct{}),
	}
	c.out = process.NewOutput(c.secrets.Clean, func(line string, dropped int) {
		p.log.Warn("plugin wrote", "line", line, "dropped", dropped)
	})
	c.child = process.NewChild(program, c.out, p.host.timing.dump)
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	c.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: goplugin.HandshakeConfig{
			ProtocolVersion: plugin.ProtocolVersion,
			MagicCookieKey:  plugin.MagicCookieKey, MagicCookieValue: plugin.MagicCookieValue,
		},
		Plugins: goplugin.PluginSet{plugin.PluginSet: dispensed{}},
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, dir string) (runner.Runner, error) {
			return c.child, c.child.Place(cmd.Env, dir)
		},
		// The directory is private to the plugin's user, so the socket needs no TLS of its own.
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: dir},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		GRPCDialOptions:  []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(replyMax))},
		// A plugin that is built on go-plugin, but not on the SDK, sends its output through the connection.
		SyncStdout: c.out.Writer(), SyncStderr: c.out.Writer(),
		SkipHostEnv:  true,
		StartTimeout: p.host.timing.start,
		Logger:       hclog.NewNullLogger(),
	})
	abort := context.AfterFunc(ctx, func() {
		c.cancel()
		c.child.Doom()
	})
	defer abort()
	if err := p.open(c); err != nil {
		return nil, p.abandon(c, err)
	}
	return c, nil
}

// ownImage is that of the server itself, shared by all processes that run it.
type ownImage struct {
	mu    sync.Mutex // guards image, and is held while it is made
	image process.Image
}

// find finds the plugin's program, and notes what it has found.
func (p *supervisor) find() (program *process.Program, err error) {
	p.mu.Lock()
	known := p.image
	p.mu.Unlock()
	if p.spec.Own {
		p.host.own.mu.Lock() // the first reads it, the others need not
		defer p.host.own.mu.Unlock()
		known = p.host.own.image
		defer func() {
			if err == nil {
				p.host.own.image = program.Image
			}
		}()
	}
	program, err = process.Open(p.spec.program(), known)
	if program.Image.SHA256 != "" {
		p.mu.Lock()
		p.image = program.Image
		p.mu.Unlock()
	}
	return program, err
}

// open shakes hands, reads what the plugin offers, and opens the streams.
func (p *supervisor) open(c *conn) error {
	rpc, err := c.client.Client()
	if err != nil {
		return c.child.HandshakeError(err, p.host.timing.start, plugin.ProtocolVersion)
	}
	raw, err := rpc.Dispense(plugin.PluginSet)
	if err != nil {
		return err
	}
	c.grpc = raw.(*grpc.ClientConn)
	c.plugin = pluginv1.NewPluginServiceClient(c.grpc)
	ctx, cancel := context.WithTimeoutCause(c.ctx, p.host.timing.call, fmt.Errorf("no answer within %v", p.host.timing.call))
	defer cancel()
	desc, err := c.plugin.Describe(ctx, &pluginv1.DescribeRequest{HostVersion: p.host.opts.UserAgent, HostProtocolMinor: wire.ProtocolMinor})
	if err != nil {
		return fmt.Errorf("describe: %w", c.callError(ctx, err))
	}
	if err := p.learn(c, desc); err != nil {
		return err
	}
	settings := &pluginv1.HostSettings{UserAgent: p.host.opts.UserAgent, EgressDeny: p.host.opts.EgressDeny}
	for _, prefix := range p.host.opts.EgressAllow {
		settings.EgressAllow = append(settings.EgressAllow, prefix.String())
	}
	if _, err := c.plugin.Configure(ctx, &pluginv1.ConfigureRequest{Settings: settings}); err != nil {
		return fmt.Errorf("configure: %w", c.callError(ctx, err))
	}
	return c.openStreams(desc)
}

// callError prefers why a call's context ended to what gRPC makes of it, and cleans what the plugin says.
func (c *conn) callError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.New(c.said(err.Error()))
}

// learn takes over what the plugin says about itself.
func (p *supervisor) learn(c *conn, desc *pluginv1.DescribeResponse) error {
	if len(desc.GetKinds()) == 0 {
		return errors.New("it offers no kind")
	}
	for _, pk := range desc.GetKinds() {
		k, err := check.NewKind(pk)
		if err != nil {
			return err
		}
		c.kinds = append(c.kinds, &kind{k, p})
	}
	c.name, c.version = c.said(desc.GetName()), c.said(desc.GetVersion())
	if c.name == "" {
		c.name = p.spec.label()
	}
	if !p.spec.Builtin && (c.name == ownName || strings.HasPrefix(c.name, ownName+"/")) {
		return fmt.Errorf("it calls itself %s, which is the name of the plugins that ship with grapnel", c.name)
	}
	c.protocol = fmt.Sprintf("%d.%d", plugin.ProtocolVersion, desc.GetProtocolMinor())
	if p.spec.Manifest != nil {
		return check.Manifest(p.spec.Manifest, desc)
	}
	return nil
}

// abandon ends a process that did not come to serve, and adds to err how it ended and what it last wrote.
func (p *supervisor) abandon(c *conn, err error) error {
	c.cancel()
	if c.child.Started() {
		if wait(500*time.Millisecond, c.child.Exited()) && !c.child.WasKilled() {
			err = fmt.Errorf("%w; it ended: %s", err, c.child.Why())
			if c.child.KilledByOthers() {
				err = killedError{err, false}
			}
		}
		c.child.Signal(true)
		<-c.child.Exited()
	}
	for _, l := range []*link{c.attempts, c.signs, c.transforms} {
		if l != nil {
			l.kill() // nothing has been planned for it
		}
	}
	c.workers.Wait()
	go c.client.Kill()
	if dir := c.child.Dir(); dir != "" {
		_ = os.RemoveAll(dir)
	}
	p.noteOutput(c)
	if last := c.out.Brief(); last != "" {
		err = fmt.Errorf("%w; it last wrote: %s", err, last)
	}
	return err
}

// dispensed makes go-plugin hand out the connection itself.
type dispensed struct {
	goplugin.NetRPCUnsupportedPlugin
}

func (dispensed) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error { return nil }

func (dispensed) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return conn, nil
}
