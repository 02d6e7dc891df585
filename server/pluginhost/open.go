package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// replyMax is the largest message that a plugin may send: some 64 results with all their headers fit many times.
const replyMax = 16 << 20

// start brings a process up to where it could take attempts.
func (p *process) start(ctx context.Context) (*conn, error) {
	program, err := p.prepare()
	if err != nil {
		return nil, err
	}
	defer program.close()
	dir := p.host.dirs.own
	if program.user != nil {
		if dir, err = p.host.dirs.forOthers(); err != nil {
			return nil, err
		}
	}
	c := &conn{
		host: p.host, proc: p, log: p.log, drained: make(chan struct{}), broken: make(chan struct{}),
		release: make(chan struct{}),
	}
	c.out = newTail(func(line string, dropped int) {
		p.log.Warn("plugin wrote", "line", c.redactor.clean(line), "dropped", dropped)
	})
	c.child = newChild(program, c.out, p.host.timing.dump)
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	c.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: goplugin.HandshakeConfig{
			ProtocolVersion: plugin.ProtocolVersion,
			MagicCookieKey:  plugin.MagicCookieKey, MagicCookieValue: plugin.MagicCookieValue,
		},
		Plugins: goplugin.PluginSet{plugin.PluginSet: dispensed{}},
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, dir string) (runner.Runner, error) {
			return c.child, c.child.place(cmd.Env, dir)
		},
		// The directory is private to the plugin's user, so the socket needs no TLS of its own.
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: dir},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		GRPCDialOptions:  []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(replyMax))},
		// A plugin that is built on go-plugin, but not on the SDK, sends its output through the connection.
		SyncStdout: &lineWriter{to: c.out}, SyncStderr: &lineWriter{to: c.out},
		SkipHostEnv:  true,
		StartTimeout: p.host.timing.start,
		Logger:       hclog.NewNullLogger(),
	})
	abort := context.AfterFunc(ctx, func() {
		c.cancel()
		c.child.doom()
	})
	defer abort()
	if err := p.open(c); err != nil {
		return nil, p.abandon(c, err)
	}
	return c, nil
}

// open shakes hands, reads what the plugin offers, and opens the streams.
func (p *process) open(c *conn) error {
	rpc, err := c.client.Client()
	if err != nil {
		return c.child.handshakeError(err, p.host.timing.start)
	}
	raw, err := rpc.Dispense(plugin.PluginSet)
	if err != nil {
		return err
	}
	c.grpc = raw.(*grpc.ClientConn)
	c.plugin = pluginv1.NewPluginServiceClient(c.grpc)
	ctx, cancel := context.WithTimeoutCause(c.ctx, p.host.timing.call, fmt.Errorf("no answer within %v", p.host.timing.call))
	defer cancel()
	desc, err := c.plugin.Describe(ctx, &pluginv1.DescribeRequest{HostVersion: p.host.opts.UserAgent, HostProtocolMinor: 1})
	if err != nil {
		return fmt.Errorf("describe: %w", callError(ctx, err))
	}
	if err := p.learn(c, desc); err != nil {
		return err
	}
	settings := &pluginv1.HostSettings{UserAgent: p.host.opts.UserAgent, EgressDeny: p.host.opts.EgressDeny}
	for _, prefix := range p.host.opts.EgressAllow {
		settings.EgressAllow = append(settings.EgressAllow, prefix.String())
	}
	if _, err := c.plugin.Configure(ctx, &pluginv1.ConfigureRequest{Settings: settings}); err != nil {
		return fmt.Errorf("configure: %w", callError(ctx, err))
	}
	return c.openStreams(desc)
}

// callError prefers why a call's context ended to what gRPC makes of it.
func callError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// learn takes over what the plugin says about itself.
func (p *process) learn(c *conn, desc *pluginv1.DescribeResponse) error {
	if len(desc.GetKinds()) == 0 {
		return errors.New("it offers no kind")
	}
	for _, pk := range desc.GetKinds() {
		k, err := newKind(p, pk)
		if err != nil {
			return err
		}
		c.kinds = append(c.kinds, k)
	}
	c.name, c.version = desc.GetName(), desc.GetVersion()
	if c.name == "" {
		c.name = p.spec.label()
	}
	c.protocol = fmt.Sprintf("%d.%d", plugin.ProtocolVersion, desc.GetProtocolMinor())
	if p.spec.Manifest != nil {
		return manifestDiffers(p.spec.Manifest, desc)
	}
	return nil
}

// abandon ends a process that did not come to serve, and adds to err how it ended and what it last wrote.
func (p *process) abandon(c *conn, err error) error {
	c.cancel()
	if c.child.process() != nil {
		if wait(c.child.exited, nil, 100*time.Millisecond) && !c.child.killed.Load() {
			err = fmt.Errorf("%w; it ended: %s", err, c.child.why())
			if c.child.killedByOthers() {
				err = killedError{err, false}
			}
		}
		c.child.signal(true)
		<-c.child.exited
	}
	for _, l := range []*link{c.attempts, c.signs} {
		if l != nil {
			l.kill() // nothing has been planned for it
		}
	}
	c.workers.Wait()
	go c.client.Kill()
	if c.child.dir != "" {
		_ = os.RemoveAll(c.child.dir)
	}
	p.noteOutput(c)
	if last := c.redactor.clean(c.out.brief()); last != "" {
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
