package plugin

import (
	"context"
	"crypto/x509"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	"github.com/grapnel/grapnel/internal/garbage"
)

const (
	// exitLimit is how long after its host the process ends at the latest; the host kills it soon after.
	exitLimit = 4500 * time.Millisecond
	// stopGrace is how much of that work at hand may take; the rest is for closing instances.
	stopGrace = 3500 * time.Millisecond
	// parentPoll is how often the parent is looked after where no death signal does it.
	parentPoll = time.Second
)

// pace lets the heap of an idle plugin, which keeps next to nothing, grow to some 16 MiB before it is collected: Go's
// default would collect after every few MiB. What receivers make live for a moment does not have it grow by several times
// that.
func pace() garbage.Pace { return garbage.Pace{Least: 64 << 20, Floor: 100, Most: 400} }

// Serve is Main without the exit: it returns nil once the host is gone and work at hand has ended. It
// makes slog's default logger write to the host, and what is written to standard output go to standard
// error, since the former belongs to the handshake. The system's certificate authorities are read before that.
func Serve(name, version string, kinds ...Kind) error {
	if os.Getenv(MagicCookieKey) != MagicCookieValue {
		return ErrNotStartedByHost
	}
	s, err := newServer(name, version, kinds)
	if err != nil {
		return err
	}
	defer pace().Keep()()
	serving, stop := context.WithCancel(context.Background())
	defer stop()
	go garbage.Return(serving) //nolint:errcheck // it has none
	stderr := os.Stderr
	s.described = func() { stdoutToStderr(stderr) }
	slog.SetDefault(s.log())
	// Go reads the system's certificate authorities once, when they are first wanted; in a shortage of descriptors that
	// finds none, and no receiver is trusted any more.
	_, _ = x509.SystemCertPool()

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	served := make(chan struct{})
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig: goplugin.HandshakeConfig{
			ProtocolVersion: ProtocolVersion, MagicCookieKey: MagicCookieKey, MagicCookieValue: MagicCookieValue,
		},
		Plugins: goplugin.PluginSet{PluginSet: servedPlugin{}},
		Logger:  hclog.NewNullLogger(),
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			g := s.grpc(opts)
			go s.stopWithHost(g, signals, served)
			return g
		},
	})
	close(served)
	ctx, cancel := context.WithDeadline(context.Background(), s.exitBy())
	defer cancel()
	s.closeAll(ctx)
	return nil
}

// exitBy is when the process has to be gone.
func (s *server) exitBy() time.Time {
	if by := s.stopBy.Load(); by != nil {
		return *by
	}
	return time.Now().Add(exitLimit)
}

// stopWithHost ends the server when the host is gone: its Control stream has ended, the parent has
// changed, or a signal comes while no host is there.
func (s *server) stopWithHost(g *grpc.Server, signals <-chan os.Signal, served <-chan struct{}) {
	parent := os.Getppid()
	poll := time.NewTicker(parentPoll)
	defer poll.Stop()
	for gone := false; !gone; {
		select {
		case <-served:
			return
		case <-s.hostGone:
			gone = true
		case <-poll.C:
			gone = os.Getppid() != parent
		case <-signals:
			// The host says when to stop; a signal to the whole group must not cut its drain short.
			select {
			case <-s.hostSeen:
			default:
				gone = true
			}
		}
	}
	s.drainOnce.Do(func() { close(s.draining) })
	by := time.Now().Add(exitLimit)
	s.stopBy.Store(&by)
	exit := time.AfterFunc(exitLimit, func() { os.Exit(1) })
	defer exit.Stop()
	s.awaitIdle(stopGrace)
	g.Stop()
}

// awaitIdle waits until nothing is in flight, for grace at most.
func (s *server) awaitIdle(grace time.Duration) {
	deadline := time.NewTimer(grace)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for s.inFlight.Load() > 0 {
		select {
		case <-deadline.C:
			return
		case <-tick.C:
		}
	}
}

// servedPlugin stands in go-plugin's set; the services are registered by server.grpc.
type servedPlugin struct {
	goplugin.NetRPCUnsupportedPlugin
}

func (servedPlugin) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error { return nil }

func (servedPlugin) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return conn, nil
}
