package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"text/tabwriter"
	"time"

	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/grapnel/grapnel/sdk/conformance"
)

// pluginBench is one `grapnel plugin bench`.
type pluginBench struct {
	c       *cli
	fixture string
	options conformance.BenchOptions
}

func newPluginBench(c *cli) *cobra.Command {
	b := &pluginBench{c: c}
	cmd := &cobra.Command{
		Use:   "bench [flags] [--] [COMMAND [ARG...]]",
		Short: "Measure what a plugin costs: CPU per attempt, overhead, memory",
		Long: `Measures CPU per attempt, in this process (host) and in the plugin's, with 1 KiB bodies in batches: for the
bare hop, which is an attempt that the plugin has nothing to do for, and for signing an event and delivering it
to a receiver on loopback, whose cost does not count.

The host's side of the rows "bare hop" and "suite's client" is a client written with generated code. "server's
host" is the code that the server runs. Without a COMMAND the plugin is the one in this binary; then its kinds are
measured in process too, and ABOVE is what the hop costs above doing the same there.

The overhead is the time from handing an attempt over to having its answer, less what the plugin says it took;
with many under way it is mostly waiting in line.`,
		Example: `  grapnel plugin bench
  grapnel plugin bench -- python3 plugin.py`,
		RunE: func(cmd *cobra.Command, args []string) error { return b.run(cmd.Context(), args) },
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.StringVar(&b.options.Kind, "kind", "", "transport to measure; the first for http unless given")
	f.StringVar(&b.fixture, "fixture", "", "what the suite needs to know of the plugin: a JSON `file`, see grapnel plugin test")
	f.DurationVar(&b.options.Duration, "duration", 3*time.Second, "length of each measurement")
	f.IntVar(&b.options.Window, "window", 1024, "attempts under way at once")
	f.IntVar(&b.options.BodyBytes, "body", 1024, "size of each event's body in `bytes`")
	return cmd
}

func (b *pluginBench) run(ctx context.Context, command []string) error {
	if b.c.output != "table" && b.c.output != "json" {
		return usagef("--output %s: must be table or json", b.c.output)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if b.fixture != "" {
		if b.options.Fixture, err = readFixture(b.fixture); err != nil {
			return err
		}
	}
	b.options.Command = command
	if len(command) == 0 {
		b.options.Command = []string{self, "plugin", "serve"}
		b.options.Others = append(b.options.Others, inProcess())
	}
	b.options.Others = append(b.options.Others, serversHost(b.options.Command))
	uri, stop, err := startBenchReceiver(self)
	if err != nil {
		return err
	}
	defer stop()
	b.options.ReceiverURI = uri
	report, err := conformance.Bench(ctx, b.options)
	if err != nil {
		return err
	}
	return b.show(report)
}

func (b *pluginBench) show(r *conformance.BenchReport) error {
	if b.c.output == "json" {
		enc := json.NewEncoder(b.c.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	fmt.Fprintf(b.c.stdout, "%s, bodies of %d bytes; CPU in µs per attempt\n\n", clean(r.Plugin), b.options.BodyBytes)
	w := tabwriter.NewWriter(b.c.stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\tWINDOW\tHOST\tPLUGIN\tBOTH\tABOVE\tPER SECOND\tP50\tP99\tRSS\t")
	for _, row := range r.Rows {
		above, rss := "-", "-"
		if row.AboveInProcess != nil {
			above = fmt.Sprintf("%.1f", *row.AboveInProcess)
		}
		if row.RSSBytes > 0 {
			rss = fmt.Sprintf("%d MiB", row.RSSBytes>>20)
		}
		fmt.Fprintf(w, "%s\t%d\t%.1f\t%.1f\t%.1f\t%s\t%.0f\t%s\t%s\t%s\t\n", row.Name, row.Window, row.HostMicros, row.PluginMicros,
			row.TotalMicros(), above, row.Rate, overheadText(row.P50Micros), overheadText(row.P99Micros), rss)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, row := range r.Rows {
		if row.Failed > 0 {
			return fmt.Errorf("%s: %d of %d attempts failed, so its figures mean nothing", row.Name, row.Failed, row.Attempts)
		}
	}
	return nil
}

func overheadText(us float64) string {
	if us == 0 {
		return "-"
	}
	return (time.Duration(us*1000) * time.Nanosecond).Round(time.Microsecond).String()
}

// newPluginReceiver is what bench starts this binary as, so that the receiver's cost is not the host's.
func newPluginReceiver(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "bench-receiver", Short: "Answer the requests of grapnel plugin bench", Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			srv := &http.Server{
				ReadHeaderTimeout: time.Minute,
				Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(io.Discard, r.Body)
					w.WriteHeader(http.StatusOK)
				}),
			}
			fmt.Fprintf(c.stdout, "http://%s/bench\n", l.Addr())
			go func() {
				_, _ = io.Copy(io.Discard, c.stdin) // ends with the bench
				_ = srv.Close()
			}()
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		},
	}
}

// startBenchReceiver returns the receiver's URI and what ends it.
func startBenchReceiver(self string) (string, func(), error) {
	cmd := exec.Command(self, "plugin", "bench-receiver")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, fmt.Errorf("start the receiver: %w", err)
	}
	stop := func() {
		_ = in.Close()
		_ = cmd.Wait()
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		stop()
		return "", nil, fmt.Errorf("start the receiver: %w", err)
	}
	return strings.TrimSpace(line), stop, nil
}
