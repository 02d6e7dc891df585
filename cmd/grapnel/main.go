// Command grapnel is the whole product in one binary: the server, the first-party plugins that the server
// runs as a process of their own, and the client commands.
//
// Exit codes: 0 success; 1 the command did not do all it was asked for, such as some events of many
// refused; 2 wrong usage: flags, arguments, environment or configuration file; 64 plus the gRPC code when
// the server answered with an error (67 invalid argument, 69 not found, 70 exists, 74 conflicting change,
// 78 unavailable), as grpcurl does; 128 plus the signal after an interrupt, 130 after Ctrl-C. grapnel server ends with 0 after an orderly stop, with 1 when it cannot start or go
// on, and with 70 when a store can no longer write.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	os.Exit(run(os.Args[1:], newCLI()))
}

// run executes one command line and returns the exit code.
func run(args []string, c *cli) int {
	ctx, stop := c.catchSignals()
	defer stop()
	root := newRoot(c)
	root.SetArgs(args)
	defer c.flush()
	cmd, err := root.ExecuteContextC(ctx)
	if cmd.Name() == "server" || cmd.Name() == "demo" {
		c.interrupted.Store(nil) // an interrupt is how they are meant to end
	}
	return c.report(err)
}

// flush writes what the printers hold back.
func (c *cli) flush() {
	for _, stream := range []any{c.stdout, c.stderr} {
		if p, ok := stream.(*printer); ok {
			p.flush()
		}
	}
}

// catchSignals returns a context that the first interrupt ends. The second closes c.abandon, and after
// that signals have their default effect again, so that a third always ends the process.
func (c *cli) catchSignals() (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2) // two, so that none is missed while one is handled
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	abandon := make(chan struct{})
	c.abandon = abandon
	done := make(chan struct{})
	go func() {
		defer close(done)
		first, ok := <-signals
		if !ok {
			return
		}
		c.interrupted.Store(&first)
		cancel()
		if _, ok := <-signals; !ok {
			return
		}
		signal.Stop(signals)
		close(abandon)
	}()
	c.releaseSignals = func() { signal.Reset(os.Interrupt, syscall.SIGTERM) }
	return ctx, func() {
		signal.Stop(signals)
		close(signals)
		<-done
		cancel()
	}
}
