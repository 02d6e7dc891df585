package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/grapnel/grapnel/sdk/conformance"
)

// pluginTest is one `grapnel plugin test`.
type pluginTest struct {
	c       *cli
	list    bool
	verbose bool
	junit   string
	fixture string
	options conformance.Options
}

func newPluginTest(c *cli) *cobra.Command {
	t := &pluginTest{c: c}
	cmd := &cobra.Command{
		Use:   "test [flags] [--] COMMAND [ARG...]",
		Short: "Test a plugin, in whatever language, against the protocol",
		Long: `Starts COMMAND as the server would, plays the server and receivers on loopback, and says case by case
what holds. Every case has an id, says what it protects, and can be run alone. Exits with 1 when a case failed.

What the suite cannot find out from the plugin itself is told by --fixture, a JSON file:

  {"kinds": {"acme-sqs": {
    "config":  {"region": "local"},
    "secrets": {"key": "AKIA..."},
    "uri":     "sqs://127.0.0.1:9324/queue",
    "receiver": {"uri": "acme-sock:{dir}/sock?path={path}",
                 "command": ["socat", "UNIX-LISTEN:{dir}/sock,fork", "TCP:{host}:{port}"]},
    "vectors": [{"name": "first", "message_id": "evt_1", "created": "2026-01-02T03:04:05Z",
                 "body": "{}", "want": {"x-acme-signature": "..."}}]}}}

All of it is optional, and what the plugin does not have is an error. Without it the suite uses the example
config, secrets that the plugin makes, and receivers of its own for transports whose scheme is http or https,
or ends in +http or +https. For others, receiver says how to get to them; see docs/plugins.md.`,
		Example: `  grapnel plugin test ./acme
  grapnel plugin test --only HS-03 -- python3 plugin.py
  grapnel plugin test --only signer --output json -- node plugin.js`,
		RunE: func(cmd *cobra.Command, args []string) error { return t.run(cmd.Context(), args) },
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows COMMAND is its own
	f.BoolVar(&t.list, "list", false, "list the cases and what they protect, and run none")
	f.StringSliceVar(&t.options.Only, "only", nil, "run these `cases` or groups only: handshake, config, signer, transport, transformer, flow, soak")
	f.BoolVar(&t.options.Soak, "soak", false, "also run the cases that take minutes")
	f.StringVar(&t.fixture, "fixture", "", "what the suite needs to know of the plugin: a JSON `file`")
	f.StringVar(&t.junit, "junit", "", "also write the report as JUnit XML to this `file`")
	f.IntVar(&t.options.Workers, "workers", 8, "cases to run at once")
	f.BoolVarP(&t.verbose, "verbose", "v", false, "show cases that passed or were skipped, too")
	must(cmd.RegisterFlagCompletionFunc("only", fixed(conformance.GroupHandshake, conformance.GroupConfig, conformance.GroupSigner,
		conformance.GroupTransport, conformance.GroupFlow, conformance.GroupSoak)))
	return cmd
}

func (t *pluginTest) run(ctx context.Context, command []string) error {
	if t.c.output != "table" && t.c.output != "json" {
		return usagef("--output %s: must be table or json", t.c.output)
	}
	if t.list {
		return t.showCases()
	}
	if len(command) == 0 {
		return usagef("grapnel plugin test takes the COMMAND that starts the plugin; see grapnel plugin test --help")
	}
	if err := knownCases(t.options.Only); err != nil {
		return err
	}
	t.options.Command = command
	if t.fixture != "" {
		var err error
		if t.options.Fixture, err = readFixture(t.fixture); err != nil {
			return err
		}
	}
	each := t.show
	if t.c.output == "json" {
		each = nil
	}
	report, err := t.c.runSuite(ctx, t.options, each)
	if err != nil {
		return err
	}
	if err := t.write(report); err != nil {
		return err
	}
	if !report.Passed() {
		return quietError{}
	}
	return nil
}

// knownCases refuses what names neither a case nor a group, before anything is started.
func knownCases(only []string) error {
	for _, word := range only {
		known := false
		for _, c := range conformance.Cases() {
			known = known || strings.EqualFold(word, c.ID) || strings.EqualFold(word, c.Group)
		}
		if !known {
			return usagef("--only %s: there is no such case or group; see grapnel plugin test --list", word)
		}
	}
	return nil
}

func (t *pluginTest) showCases() error {
	if t.c.output == "json" {
		enc := json.NewEncoder(t.c.stdout)
		enc.SetEscapeHTML(false)
		for _, c := range conformance.Cases() {
			if err := enc.Encode(c); err != nil {
				return err
			}
		}
		return nil
	}
	w := tabwriter.NewWriter(t.c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tGROUP\tPROMISE\tPROTECTS")
	for _, c := range conformance.Cases() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", c.ID, c.Group, c.Title, c.Protects)
	}
	return w.Flush()
}

// show tells of one case as it ends.
func (t *pluginTest) show(r conformance.Result) {
	switch {
	case r.Outcome == conformance.Failed:
		fmt.Fprintf(t.c.stdout, "FAIL  %s  %s\n", r.ID, r.Title)
		for line := range strings.Lines(strings.TrimRight(r.Detail, "\n") + "\n") {
			fmt.Fprintf(t.c.stdout, "      %s\n", clean(strings.TrimRight(line, "\n")))
		}
		fmt.Fprintf(t.c.stdout, "      protects: %s\n      run it:   %s\n", r.Protects, r.Reproduce)
	case t.verbose && r.Outcome == conformance.Skipped:
		fmt.Fprintf(t.c.stdout, "skip  %s  %s: %s\n", r.ID, r.Title, clean(r.Detail))
	case t.verbose:
		fmt.Fprintf(t.c.stdout, "pass  %s  %s (%s)\n", r.ID, r.Title, r.Duration.Round(time.Millisecond))
	}
}

// write ends the report on standard output, and writes the JUnit file.
func (t *pluginTest) write(report *conformance.Report) error {
	if t.junit != "" {
		f, err := os.Create(t.junit)
		if err != nil {
			return fmt.Errorf("write --junit: %w", err)
		}
		if err := report.WriteJUnit(f); err != nil {
			_ = f.Close()
			return fmt.Errorf("write --junit: %w", err)
		}
		if err := f.Close(); err != nil {
			return fmt.Errorf("write --junit: %w", err)
		}
	}
	if t.c.output == "json" {
		return report.WriteJSON(t.c.stdout)
	}
	name := "the plugin"
	if p := report.Plugin; p != nil {
		name = clean(p.GetName() + " " + p.GetVersion())
	}
	fmt.Fprintf(t.c.stdout, "%s: %d passed, %d failed, %d skipped in %s\n", name, report.Count(conformance.Passed),
		report.Count(conformance.Failed), report.Count(conformance.Skipped), report.Duration.Round(100*time.Millisecond))
	for _, note := range report.Notes {
		fmt.Fprintf(t.c.stdout, "note: %s\n", clean(note))
	}
	if n := report.Count(conformance.Skipped); n > 0 && !t.verbose {
		fmt.Fprintln(t.c.stdout, "--verbose says why cases were skipped")
	}
	return nil
}
