package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/conformance"
	"github.com/grapnel/grapnel/server/plugindir"
	"github.com/grapnel/grapnel/server/pluginhost"
)

// pluginDirFlag is the directory that the commands about installed plugins work on; the server has a flag of
// the same name, and both read GRAPNEL_PLUGIN_DIR.
func pluginDirFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "plugin-dir", "", "`directory` of plugins, as given to the server")
	must(cmd.MarkFlagDirname("plugin-dir"))
}

// pluginDir opens the directory that a command is to change.
func pluginDir(dir string) (plugindir.Dir, error) {
	if dir == "" {
		return plugindir.Dir{}, usagef("--plugin-dir is missing: the directory of plugins, as given to the server")
	}
	return plugindir.Open(dir), nil
}

// openPluginDir opens the directory that something is installed in. Only an install makes one.
func openPluginDir(dir string) (plugindir.Dir, error) {
	d, err := pluginDir(dir)
	if err != nil {
		return d, err
	}
	info, err := os.Stat(dir)
	switch {
	case err != nil:
		return d, fmt.Errorf("--plugin-dir: %w", err)
	case !info.IsDir():
		return d, fmt.Errorf("--plugin-dir %s is not a directory", dir)
	}
	return d, nil
}

// installing is one `grapnel plugin install`.
type installing struct {
	c         *cli
	dir       string
	entry     plugindir.Entry
	args      []string
	memory    string
	fixture   string
	skipTests bool
	disabled  bool
}

func newPluginInstall(c *cli) *cobra.Command {
	in := &installing{c: c}
	cmd := &cobra.Command{
		Use:   "install PATH",
		Short: "Test a plugin and install it; a running server takes it over",
		Long: `Copies a plugin into the plugin directory, runs the conformance suite on the copy, and writes it into
plugins.lock with its SHA-256 and what it says about itself. PATH is an executable file, or a directory with
an executable file named plugin. Its name, kinds and schemes must be nobody's yet, and it is started once as the
server will start it, with --memory, --open-files, --processes and --user. A server that runs with the same --plugin-dir starts the new version beside
the old one and moves over without losing or repeating a delivery.`,
		Args: exactly("PATH of a plugin"),
		RunE: func(cmd *cobra.Command, args []string) error { return in.run(cmd.Context(), args[0]) },
	}
	f := cmd.Flags()
	pluginDirFlag(cmd, &in.dir)
	f.BoolVar(&in.skipTests, "skip-tests", false, "install without running the suite")
	f.BoolVar(&in.disabled, "disabled", false, "install, and leave running it to grapnel plugin enable")
	f.StringArrayVar(&in.args, "arg", nil, "`argument` to start the plugin with; repeat for more")
	f.StringVar(&in.fixture, "fixture", "", "what the suite needs to know of the plugin: a JSON `file`, see grapnel plugin test")
	f.StringVar(&in.memory, "memory", "", "most memory of the process, such as 256MiB")
	f.Uint64Var(&in.entry.Limits.OpenFiles, "open-files", 0, "most open files of the process")
	f.Uint64Var(&in.entry.Limits.Processes, "processes", 0, "most processes and threads of --user")
	f.StringVar(&in.entry.User, "user", "", "`user` to run it as; the server must be root")
	return cmd
}

func (in *installing) run(ctx context.Context, path string) (err error) {
	dir, err := pluginDir(in.dir)
	if err != nil {
		return err
	}
	if in.memory != "" {
		if in.entry.Limits.MemoryBytes, err = parseBytes(in.memory); err != nil {
			return usagef("--memory %s: %w", in.memory, err)
		}
	}
	staged, err := dir.Stage(path)
	if err != nil {
		return err
	}
	defer staged.Discard()
	in.entry.Args, in.entry.Enabled = in.args, !in.disabled
	command := append([]string{staged.Path()}, in.args...)
	manifest, err := conformance.Describe(ctx, command)
	if err != nil {
		return err
	}
	shipped, err := describeShipped(ctx)
	if err != nil {
		return err
	}
	if err := dir.Admit(manifest, shipped); err != nil {
		return fmt.Errorf("%w; nothing was installed", err)
	}
	if err := startOnce(ctx, staged.Spec(in.entry)); err != nil {
		return fmt.Errorf("the server could not start it%s: %w; nothing was installed", conditions(in.entry), err)
	}
	if manifest, err = in.test(ctx, command, manifest); err != nil {
		return err
	}
	before, _, err := dir.Read()
	if err != nil {
		return err
	}
	entry, err := staged.Commit(manifest, shipped, in.entry)
	if err != nil {
		return err
	}
	in.c.said("%s", installedText(before, entry))
	return nil
}

// test runs the suite, shows what failed, and returns what the plugin says about itself.
func (in *installing) test(ctx context.Context, command []string, manifest *pluginv1.DescribeResponse) (*pluginv1.DescribeResponse, error) {
	if in.skipTests {
		in.entry.Tests = "skipped by --skip-tests"
		fmt.Fprintf(in.c.stderr, "warning: the conformance suite was skipped: nothing shows that %s %s keeps its promises about "+
			"signatures, secrets, egress, timeouts and stopping\n", manifest.GetName(), manifest.GetVersion())
		return manifest, nil
	}
	o := conformance.Options{Command: command}
	if in.fixture != "" {
		var err error
		if o.Fixture, err = readFixture(in.fixture); err != nil {
			return nil, err
		}
	}
	report, err := in.c.runSuite(ctx, o, func(r conformance.Result) {
		if r.Outcome == conformance.Failed {
			fmt.Fprintf(in.c.stderr, "FAIL %s %s: %s\n", r.ID, r.Title, clean(r.Detail))
		}
	})
	if err != nil {
		return nil, err
	}
	if !report.Passed() || report.Plugin == nil {
		return nil, fmt.Errorf("%d of %d cases of the conformance suite failed; nothing was installed (--skip-tests installs it all the same)",
			report.Count(conformance.Failed), len(report.Results))
	}
	for _, note := range report.Notes {
		fmt.Fprintf(in.c.stderr, "note: %s\n", clean(note))
	}
	in.entry.Tests = fmt.Sprintf("%d passed, %d skipped", report.Count(conformance.Passed), report.Count(conformance.Skipped))
	return report.Plugin, nil
}

// describeShipped asks this binary's own plugins what they are.
func describeShipped(ctx context.Context) (*pluginv1.DescribeResponse, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	shipped, err := conformance.Describe(ctx, []string{self, "plugin", "serve"})
	if err != nil {
		return nil, fmt.Errorf("ask what ships with grapnel: %w", err)
	}
	return shipped, nil
}

// startPatience bounds the one start of a plugin that is installed.
const startPatience = 15 * time.Second

// startOnce starts a plugin as the server does, with its limits and as its user, until it serves. A start that fails
// is the answer, where the server would try again.
func startOnce(ctx context.Context, spec pluginhost.Spec) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	spec.Builtin = true // the one to wait for
	host, err := pluginhost.New(pluginhost.Options{Plugins: []pluginhost.Spec{spec}, Secrets: func(string) ([]pluginhost.SecretVersion, bool) { return nil, false }})
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = host.Run(running) // returns nil
	}()
	defer func() {
		stop()
		<-ended
	}()
	serves := make(chan error, 1)
	go func() { serves <- host.Ready(running) }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-serves:
			return err
		case <-tick.C:
		}
		for _, p := range host.Plugins() {
			for _, i := range p.GetInstances() {
				if i.GetLastError() != "" {
					return errors.New(i.GetLastError())
				}
			}
		}
	}
}

// conditions are how an installed plugin is started, in the words of the flags; "" for none in particular.
func conditions(e plugindir.Entry) string {
	var words []string
	for _, limit := range []struct {
		flag string
		n    uint64
	}{{"--memory", e.Limits.MemoryBytes}, {"--open-files", e.Limits.OpenFiles}, {"--processes", e.Limits.Processes}} {
		if limit.n == 0 {
			continue
		}
		text := strconv.FormatUint(limit.n, 10)
		if limit.flag == "--memory" {
			size := bytesValue(limit.n)
			text = size.String()
		}
		words = append(words, limit.flag+" "+text)
	}
	if e.User != "" {
		words = append(words, "--user "+e.User)
	}
	if len(words) == 0 {
		return ""
	}
	return " with " + strings.Join(words, " ")
}

func readFixture(path string) (*conformance.Fixture, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read --fixture: %w", err)
	}
	defer file.Close()
	f, err := conformance.ReadFixture(file)
	if err != nil {
		return nil, fmt.Errorf("read --fixture %s: %w", path, err)
	}
	return f, nil
}

func installedText(before plugindir.Lock, e plugindir.Entry) string {
	what := "installed " + e.Name + " " + e.PluginVersion
	for _, b := range before.Plugins {
		if b.Name == e.Name && b.SHA256 != e.SHA256 {
			what += " in place of " + b.PluginVersion
		}
	}
	return fmt.Sprintf("%s (suite: %s), SHA-256 %s", what, e.Tests, e.SHA256)
}

// parseBytes reads 512, 64KiB, 256MiB or 2GiB.
func parseBytes(text string) (uint64, error) {
	number, shift := text, 0
	for i, unit := range []string{"KiB", "MiB", "GiB"} {
		if n, ok := strings.CutSuffix(text, unit); ok {
			number, shift = n, 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil || n == 0 {
		return 0, errors.New("want a number and KiB, MiB or GiB, such as 256MiB")
	}
	return n << shift, nil
}

func newPluginEnable(c *cli, enabled bool) *cobra.Command {
	var dir string
	use, short, said := "enable NAME", "Run an installed plugin", "enabled"
	if !enabled {
		use, short, said = "disable NAME", "Stop an installed plugin and keep its files; deliveries that need it wait", "disabled"
	}
	cmd := &cobra.Command{
		Use: use, Short: short, Args: exactly("NAME of a plugin, such as acme/sign"),
		RunE: func(_ *cobra.Command, args []string) error {
			d, err := openPluginDir(dir)
			if err == nil {
				err = d.Enable(args[0], enabled)
			}
			if err == nil {
				c.said("%s %s", said, args[0])
			}
			return err
		},
	}
	pluginDirFlag(cmd, &dir)
	return cmd
}

func newPluginRemove(c *cli) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "remove NAME", Aliases: []string{"uninstall"}, Short: "Stop an installed plugin and remove its files; deliveries that need it wait",
		Args: exactly("NAME of a plugin, such as acme/sign"),
		RunE: func(_ *cobra.Command, args []string) error {
			d, err := openPluginDir(dir)
			if err == nil {
				err = d.Remove(args[0])
			}
			if err == nil {
				c.said("removed %s", args[0])
			}
			return err
		},
	}
	pluginDirFlag(cmd, &dir)
	return cmd
}

func newPluginVerify(c *cli) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "verify", Short: "Compare the files of installed plugins with plugins.lock", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			d, err := openPluginDir(dir)
			if err != nil {
				return err
			}
			faults, err := d.Verify()
			if err != nil {
				return err
			}
			for _, name := range slices.Sorted(maps.Keys(faults)) {
				fmt.Fprintf(c.stderr, "%s: %v\n", name, faults[name])
			}
			if len(faults) > 0 {
				return fmt.Errorf("%d plugins are not as they were installed; install them again", len(faults))
			}
			c.said("all plugins are as they were installed")
			return nil
		},
	}
	pluginDirFlag(cmd, &dir)
	return cmd
}

// listInstalled prints the lock file; no server is asked.
func listInstalled(c *cli, dir string) error {
	d, err := openPluginDir(dir)
	if err != nil {
		return err
	}
	lock, _, err := d.Read()
	if err != nil {
		return err
	}
	strays, err := d.Strays()
	if err != nil {
		return err
	}
	if len(strays) > 0 {
		fmt.Fprintf(c.stderr, "not in plugins.lock, and so not run: %s\n", strings.Join(strays, ", "))
	}
	if c.output == "json" {
		for _, e := range lock.Plugins {
			line, err := json.Marshal(e)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%s\n", line)
		}
		return nil
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tVERSION\tENABLED\tKINDS\tSUITE\tSHA-256\tSTARTED WITH")
	for _, e := range lock.Plugins {
		manifest, err := e.DescribeResponse()
		if err != nil {
			return err
		}
		var kinds []string
		for _, k := range manifest.GetKinds() {
			kinds = append(kinds, k.GetId())
		}
		how := strings.TrimPrefix(conditions(e), " with ")
		for _, arg := range e.Args {
			how += fmt.Sprintf(" --arg %q", arg)
		}
		fmt.Fprintf(w, "%s\t%s\t%t\t%s\t%s\t%s\t%s\n", e.Name, e.PluginVersion, e.Enabled, strings.Join(kinds, ","), e.Tests, e.SHA256,
			cmp.Or(strings.TrimSpace(how), "-"))
	}
	return w.Flush()
}
