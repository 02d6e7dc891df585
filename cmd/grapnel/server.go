package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"gopkg.in/yaml.v3"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server"
)

// serverFlags are the knobs of grapnel server. Every one is a flag, a key of the configuration file, and an
// environment variable.
type serverFlags struct {
	options       server.Options
	passwordFile  string // of the external etcd
	egressAllow   []string
	egressDeny    []string
	logLevel      string
	logFormat     string
	config        string
	printTheFlags bool
}

func newServerCommand(c *cli) *cobra.Command {
	f := &serverFlags{}
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run a Grapnel server",
		Long: `Runs a server until it is interrupted. The first SIGINT or SIGTERM stops it in order: it takes no new
work and waits for the attempts in flight, --grace at the longest, and ends within 5 s after that. The second
ends it at once, which takes a second at the longest; the deliveries are attempted again after the next start.

Each flag can also be set by the environment, GRAPNEL_DATA_DIR for --data-dir, and by a YAML file given by
--config, with the flag's name as key. Flags beat the environment, which beats the file.

When the server is ready it prints one line on standard output:

  grapnel ready addr=127.0.0.1:7070 admin=127.0.0.1:7071 data-dir=./grapnel-data pid=4711`,
		Example: `  grapnel server
  grapnel server --data-dir /var/lib/grapnel --config /etc/grapnel.yaml
  grapnel server --egress-allow 127.0.0.0/8      # allow deliveries to this machine, for development`,
		Args: cobra.NoArgs,
	}
	f.register(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.complete(cmd, c); err != nil {
			return err
		}
		if f.printTheFlags {
			return printConfig(c.stdout, cmd)
		}
		return runServer(cmd.Context(), c, f.options)
	}
	return cmd
}

func (f *serverFlags) register(cmd *cobra.Command) {
	o, flags := &f.options, cmd.Flags()
	flags.StringVar(&o.DataDir, "data-dir", "./grapnel-data", "directory of the journal and the embedded etcd")
	flags.StringVar(&o.Listen, "listen", "127.0.0.1:7070", "address of the public API; port 0 picks a free one")
	flags.StringVar(&o.AdminListen, "admin-listen", "127.0.0.1:7071", "address of metrics, health and profiles")
	flags.StringSliceVar(&o.EtcdEndpoints, "etcd-endpoints", nil, "an external etcd cluster; none runs the embedded one")
	flags.StringVar(&o.EtcdTLS.CAFile, "etcd-ca", "", "PEM `file` of the external etcd's roots")
	flags.StringVar(&o.EtcdTLS.CertFile, "etcd-cert", "", "PEM `file` of the client certificate for etcd")
	flags.StringVar(&o.EtcdTLS.KeyFile, "etcd-key", "", "PEM `file` of the client key for etcd")
	flags.StringVar(&o.EtcdUser, "etcd-user", "", "user for an external etcd with authentication")
	flags.StringVar(&f.passwordFile, "etcd-password-file", "", "`file` with the password of --etcd-user; without it GRAPNEL_ETCD_PASSWORD is the password")
	flags.Var((*bytesValue)(&o.EtcdQuota), "etcd-quota", "`size` of the embedded etcd's file from which on new configuration is refused; 0 means 1GiB")
	flags.BoolVar(&o.AdoptStores, "adopt-stores", false, "for one start: take journal and etcd for each other's although one of them is new or another's")
	flags.IntVar(&o.Partitions, "partitions", 0, "partitions of a new journal, for good; 0 means 16, or what the journal has")
	flags.BoolVar(&o.DebugSweep, "debug-sweep", false, "take POST /debug/sweep on the admin listener, which erases history: for trials")
	must(flags.MarkHidden("debug-sweep"))
	flags.BoolVar(&o.AcceptLoss, "accept-loss", false, "for one start: go on with a journal that holds less than was acknowledged")
	flags.Var((*bytesValue)(&o.MemoryBytes), "memory", "`size` of the memory that server and plugins share; 0 means the control group's or the machine's")
	flags.Var((*bytesValue)(&o.WindowBytes), "window-bytes", "`size` of the deliveries that wait in memory; 0 follows --memory, 32MiB at the most")
	flags.IntVar(&o.Slots, "slots", 0, "attempts in flight over all subscriptions; 0 follows --memory, 4096 at the most")
	flags.IntVar(&o.MaxCalls, "max-calls", 0, "unary calls in progress, and apart from them publish streams; 0 means 4096")
	flags.IntVar(&o.MaxCallsPerNamespace, "max-calls-per-namespace", 0, "the same of one namespace; 0 means half of --max-calls")
	flags.IntVar(&o.MaxCallsPerConnection, "max-calls-per-connection", 0, "calls and streams open on one connection, beyond which a client waits; 0 means 250")
	flags.IntVar(&o.MaxStreamsPerConnection, "max-streams-per-connection", 0, "publish streams among these; 0 means 100")
	flags.IntVar(&o.MaxWatches, "max-watches", 0, "calls and streams of health and reflection, of which each connected client has one; 0 means 65536")
	flags.StringVar(&o.PluginDir, "plugin-dir", "", "`directory` of third-party plugins")
	flags.StringSliceVar(&f.egressAllow, "egress-allow", nil, "private or reserved `ranges` that deliveries may go to, such as 127.0.0.0/8")
	flags.StringSliceVar(&f.egressDeny, "egress-deny", nil, "`ranges` that deliveries may not go to whatever is allowed, with a port or without, such as 64:ff9b:1::/48 or 10.0.0.5:443")
	flags.StringVar(&o.TLSCert, "tls-cert", "", "PEM `file` of the public API's certificate")
	flags.StringVar(&o.TLSKey, "tls-key", "", "PEM `file` of the public API's key")
	flags.BoolVar(&o.Insecure, "insecure", false, "allow an address that others can reach without TLS and authentication")
	flags.StringVar(&o.NodeName, "node-name", "", "name of this node; default the host's")
	flags.DurationVar(&o.Grace, "grace", 30*time.Second, "longest wait for attempts in flight when stopping; the process ends within 5s after it")
	flags.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&f.logFormat, "log-format", "text", "text or json")
	flags.StringVar(&f.config, "config", "", "YAML `file` with flag names as keys")
	flags.BoolVar(&f.printTheFlags, "print-config", false, "print the configuration in force as a file and exit")
	must(cmd.RegisterFlagCompletionFunc("log-level", fixed("debug", "info", "warn", "error")))
	must(cmd.RegisterFlagCompletionFunc("log-format", fixed("text", "json")))
	must(cmd.MarkFlagDirname("data-dir"))
	must(cmd.MarkFlagDirname("plugin-dir"))
	must(cmd.MarkFlagFilename("config", "yaml", "yml"))
}

// complete applies the configuration file and turns what is left into options.
func (f *serverFlags) complete(cmd *cobra.Command, c *cli) error {
	if f.config != "" {
		if err := applyFile(cmd, newServerCommand(c), f.config); err != nil {
			return err
		}
	}
	var faults []error
	switch grace := &f.options.Grace; {
	case *grace < 0:
		faults = append(faults, fmt.Errorf("grace: %v given, want a time such as 30s, or 0s for none", *grace))
	case *grace == 0:
		*grace = -1 // none, where the options' zero is the default
	}
	for _, text := range f.egressAllow {
		prefix, err := parsePrefix(text)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		f.options.EgressAllow = append(f.options.EgressAllow, prefix)
	}
	for _, text := range f.egressDeny {
		rule, err := parseRule(text)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		f.options.EgressDeny = append(f.options.EgressDeny, rule)
	}
	password, err := f.password(c)
	if err != nil {
		faults = append(faults, err)
	}
	f.options.EtcdPassword = password
	logger, err := newLogger(c.stderr, f.logLevel, f.logFormat)
	if err := errors.Join(append(faults, err)...); err != nil {
		return usageError{err}
	}
	build := version()
	f.options.Version, f.options.Commit = build.number, build.commit
	f.options.Logger = logger
	f.options.Abandon = c.abandon
	return nil
}

// password is that of the external etcd's user. It is no flag of its own: everybody may read a command line.
func (f *serverFlags) password(c *cli) (string, error) {
	if f.passwordFile == "" {
		if f.options.EtcdUser == "" {
			return "", nil
		}
		password, _ := c.lookupEnv("GRAPNEL_ETCD_PASSWORD")
		return password, nil
	}
	text, err := os.ReadFile(f.passwordFile)
	if err != nil {
		return "", fmt.Errorf("etcd-password-file: %w", err)
	}
	return strings.TrimRight(string(text), "\r\n"), nil
}

// bytesValue is a flag for a number of bytes.
type bytesValue int64

func (v *bytesValue) Set(text string) error {
	if text == "0" {
		*v = 0
		return nil
	}
	n, err := parseBytes(text)
	if err == nil && n > math.MaxInt64 {
		err = errors.New("too large")
	}
	if err == nil {
		*v = bytesValue(n)
	}
	return err
}

func (v *bytesValue) String() string {
	n, units := int64(*v), []string{"", "KiB", "MiB", "GiB"}
	unit := 0
	for n != 0 && n%1024 == 0 && unit < len(units)-1 {
		n, unit = n/1024, unit+1
	}
	return strconv.FormatInt(n, 10) + units[unit]
}

func (v *bytesValue) Type() string { return "size" }

// parsePrefix reads a range, or a single address.
func parsePrefix(text string) (netip.Prefix, error) {
	text = strings.TrimSpace(text)
	if addr, err := netip.ParseAddr(text); err == nil {
		return addr.Prefix(addr.BitLen())
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("egress-allow: %q is not a range such as 127.0.0.0/8", text)
	}
	return prefix.Masked(), nil
}

// parseRule reads a range or a single address, either with a port behind it or without.
func parseRule(text string) (string, error) {
	text = strings.TrimSpace(text)
	rule := plugin.EgressRule{}
	if at, err := netip.ParseAddrPort(text); err == nil {
		rule.Range, rule.Port = netip.PrefixFrom(at.Addr(), at.Addr().BitLen()), at.Port()
	} else if addr, err := netip.ParseAddr(text); err == nil {
		rule.Range = netip.PrefixFrom(addr, addr.BitLen())
	} else if rule, err = plugin.ParseEgressRule(text); err != nil {
		return "", fmt.Errorf("egress-deny: %w", err)
	}
	return rule.String(), nil
}

func newLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log-level: %q is not debug, info, warn or error", level)
	}
	options := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return nil, fmt.Errorf("log-format: %q is not text or json", format)
}

// runServer runs a server until ctx ends, and prints the ready line in between.
func runServer(ctx context.Context, c *cli, o server.Options) error {
	o.BuiltinParts, o.Tracing = builtinParts(), true
	s, err := server.New(o)
	if err != nil {
		return usageError{err}
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	select {
	case err := <-ended:
		return err
	case <-s.Ready():
		fmt.Fprintf(c.stdout, "grapnel ready addr=%s admin=%s data-dir=%s pid=%d\n", s.Addr(), s.AdminAddr(), o.DataDir, os.Getpid())
	}
	return <-ended
}

// printConfig prints the flags in force as a configuration file.
func printConfig(w io.Writer, cmd *cobra.Command) error {
	root := &yaml.Node{Kind: yaml.MappingNode}
	for _, name := range flagNames(cmd) {
		if !configurable(cmd, name) || name == "config" {
			continue
		}
		flag := cmd.Flags().Lookup(name)
		value := &yaml.Node{Kind: yaml.ScalarNode, Value: flag.Value.String()}
		switch flag.Value.Type() {
		case "string":
			value.Tag = "!!str"
		case "stringSlice":
			items, err := cmd.Flags().GetStringSlice(name)
			if err != nil {
				return err
			}
			value = &yaml.Node{Kind: yaml.SequenceNode, Style: yaml.FlowStyle}
			for _, item := range items {
				value.Content = append(value.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: item})
			}
		}
		key := &yaml.Node{Kind: yaml.ScalarNode, Value: name, HeadComment: strings.ReplaceAll(flag.Usage, "`", "")}
		root.Content = append(root.Content, key, value)
	}
	text, err := yaml.Marshal(root)
	if err != nil {
		return err
	}
	_, err = w.Write(text)
	return err
}
