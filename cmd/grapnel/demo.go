package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/server"
)

// demoLimit bounds the story; it takes a few seconds.
const demoLimit = 90 * time.Second

func newDemoCommand(c *cli) *cobra.Command {
	var once bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See in a few seconds what Grapnel does",
		Long: `Starts a server and a receiver in a temporary directory and shows three things: a signed delivery that
verifies, a failure that is retried and then succeeds, and a crash of the plugin process that loses nothing.
Then it stays up, for you to try things, until Ctrl-C; with --once it ends, and its last line is one JSON object.
Nothing is left behind.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDemo(cmd.Context(), c, once) },
	}
	cmd.Flags().BoolVar(&once, "once", false, "end after the story, with one JSON line last")
	return cmd
}

// demo is the world that the story plays in.
type demo struct {
	c        *cli
	begin    time.Time
	server   *server.Server
	client   *client.Client
	receiver *receiver
	result   demoResult
}

// demoResult is the JSON line of --once.
type demoResult struct {
	Delivered                 int     `json:"delivered"`
	Verified                  int     `json:"verified"`
	Retried                   int     `json:"retried"`
	RecoveredAfterPluginCrash int     `json:"recovered_after_plugin_crash"`
	Lost                      int     `json:"lost"`
	FirstDeliveryMillis       float64 `json:"first_delivery_ms"`
	PluginBackMillis          float64 `json:"plugin_back_ms"`
	Seconds                   float64 `json:"seconds"`
}

func runDemo(ctx context.Context, c *cli, once bool) (err error) {
	dir, err := os.MkdirTemp("", "grapnel-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	log := &lockedBuffer{}
	d := &demo{c: c, begin: time.Now()}
	stop, err := d.start(ctx, dir, log)
	if err == nil {
		err = d.tell(ctx)
	}
	if err == nil && !once {
		d.hints()
		<-ctx.Done()
		d.say("")
		d.say("Stopping, and removing %s.", dir)
	}
	if stopErr := stop(); err == nil {
		err = stopErr
	}
	if err != nil {
		if ctx.Err() == nil {
			_, _ = io.Copy(c.stderr, log.reader()) // what the server had to say about it
		}
		return fmt.Errorf("demo: %w", err)
	}
	if !once {
		return nil
	}
	d.result.Seconds = time.Since(d.begin).Seconds()
	return json.NewEncoder(c.stdout).Encode(d.result)
}

// start brings everything up. The returned function takes everything down again, whatever start got to.
func (d *demo) start(ctx context.Context, dir string, log io.Writer) (stop func() error, err error) {
	var undo []func() error
	stop = func() error {
		var errs []error
		for i := len(undo) - 1; i >= 0; i-- {
			errs = append(errs, undo[i]())
		}
		return errors.Join(errs...)
	}
	if d.receiver, err = startReceiver(); err != nil {
		return stop, err
	}
	undo = append(undo, d.receiver.close)
	build := version()
	d.server, err = server.New(server.Options{
		DataDir: filepath.Join(dir, "data"), Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0",
		EgressAllow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")},
		Grace:       2 * time.Second, Abandon: d.c.abandon, NodeName: "demo",
		Version: build.number, Commit: build.commit, BuiltinParts: builtinParts(),
		Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return stop, err
	}
	running, end := context.WithCancel(context.WithoutCancel(ctx)) // the story's end stops it, in order
	ended := make(chan error, 1)
	go func() { ended <- d.server.Run(running) }()
	undo = append(undo, func() error {
		end()
		return <-ended
	})
	select {
	case err := <-ended:
		ended <- nil
		return stop, errors.Join(errors.New("the server ended"), err)
	case <-ctx.Done():
		return stop, ctx.Err()
	case <-time.After(demoLimit):
		return stop, errors.New("the server is not ready")
	case <-d.server.Ready():
	}
	d.client, err = client.Dial(ctx, d.server.Addr(), client.WithInsecure())
	if err == nil {
		undo = append(undo, d.client.Close)
	}
	d.say("Grapnel %s: a server at %s and a receiver at %s, in %s.", build.number, d.server.Addr(), d.receiver.addr(), dir)
	d.say("Ready after %s: API, embedded etcd, journal, and the plugin process that signs and sends.", since(d.begin))
	return stop, err
}

// say prints a line of the story.
func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.c.stdout, format+"\n", args...) }

// step prints a line below a heading.
func (d *demo) step(format string, args ...any) { d.say("   "+format, args...) }

func since(t time.Time) string { return roundDuration(time.Since(t)) }

// roundDuration keeps three digits at most.
func roundDuration(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}

func (d *demo) hints() {
	addr := d.server.Addr()
	d.say("")
	d.say("The server stays up until Ctrl-C. Try, in another terminal:")
	d.say("")
	d.say("  export GRAPNEL_ADDR=%s GRAPNEL_NAMESPACE=demo", addr)
	d.say("  grapnel publish --type order.created --data '{\"order\":1}'")
	d.say("  grapnel subscription list")
	d.say("  grapnel delivery list --limit 5")
	d.say("  grpcurl -plaintext %s list", addr)
	d.say("  grpcurl -plaintext -d '{\"parent\":\"namespaces/demo\",\"page_size\":3}' %s grapnel.v1.DeliveryService/ListDeliveries", addr)
	d.say("  grpcurl -plaintext -d '{\"parent\":\"namespaces/demo\",\"event\":{\"type\":\"order.created\",\"json\":{\"order\":2}}}' %s grapnel.v1.PublishService/Publish", addr)
	d.say("  curl http://%s/metrics", d.server.AdminAddr())
}

// lockedBuffer keeps the server's warnings, for the case that the demo fails.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.buf.Len() > 64<<10 {
		b.buf.Next(b.buf.Len() / 2)
	}
	return b.buf.Write(p)
}

func (b *lockedBuffer) reader() io.Reader {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.NewReader(bytes.Clone(b.buf.Bytes()))
}
