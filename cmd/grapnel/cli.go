package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/grapnel/grapnel/sdk/client"
)

// cli is what every command shares: where it reads and writes, and the flags of the client commands.
type cli struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	lookupEnv      func(string) (string, bool)

	abandon        <-chan struct{} // closed by the second interrupt
	releaseSignals func()          // gives interrupts their default effect back
	running        bool            // usage was fine; what fails now is no wrong usage

	interrupted atomic.Pointer[os.Signal] // the one that ended the command, if one did

	mu    sync.Mutex    // guards the fields below: batches are sent concurrently
	began time.Time     // when the last call to the server began
	asked proto.Message // its request

	// Flags of all client commands.
	addr, context, namespace, output string
	tls                              bool
	tlsCA, tokenFile                 string
	timeout                          time.Duration // 0 is no limit

	template      pathTemplate // of --output jsonpath
	namespaceSaid bool         // --namespace was given, not only the environment's or a context's
}

func newCLI() *cli {
	return &cli{stdin: os.Stdin, stdout: newPrinter(os.Stdout), stderr: newPrinter(os.Stderr), lookupEnv: os.LookupEnv, output: formatTable}
}

// defaultPort is that of the server's public API.
const defaultPort = "7070"

// connectFlags gives cmd and the commands below it the flags that say where the server is and how to print.
func (c *cli) connectFlags(cmd *cobra.Command, namespaced bool) *cobra.Command {
	f := cmd.PersistentFlags()
	f.StringVar(&c.addr, "addr", "127.0.0.1:"+defaultPort, "`host:port` of the server's public API")
	f.StringVar(&c.context, "context", "", "server by its `name`; see grapnel context")
	f.StringVarP(&c.output, "output", "o", formatTable, "`format`: table, wide, json, yaml, name or jsonpath='{.path}'")
	f.BoolVar(&c.tls, "tls", false, "connect with TLS and the system's roots")
	f.StringVar(&c.tlsCA, "tls-ca", "", "connect with TLS and the roots in this PEM `file`")
	f.StringVar(&c.tokenFile, "token-file", "", "send the bearer token in this `file`; needs TLS")
	spanVar(f, &c.timeout, "timeout", 30*time.Second, 0, 0, "give up when the server has not answered for this long; 0s never")
	if namespaced {
		f.StringVarP(&c.namespace, "namespace", "n", "", "namespace, unless the name is a full one")
		must(cmd.RegisterFlagCompletionFunc("namespace", completeNamespaces(c)))
	}
	must(cmd.RegisterFlagCompletionFunc("output", completeFormats))
	must(cmd.RegisterFlagCompletionFunc("context", completeContexts(c)))
	return cmd
}

// must panics when the command tree itself is wrong, which every test would show.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func fixed(values ...string) cobra.CompletionFunc {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return values, cobra.ShellCompDirectiveNoFileComp
	}
}

// dial connects as the flags say. The caller closes the client.
func (c *cli) dial(ctx context.Context) (*client.Client, error) {
	address, err := target(c.addr)
	if err != nil {
		return nil, err
	}
	options := []client.Option{
		client.WithUserAgent("grapnel/" + version().number), client.WithFailFast(),
		client.WithDialOptions(
			// --timeout is the limit, and not one that a person cannot see.
			grpc.WithDefaultServiceConfig(withoutTimeouts(client.ServiceConfig())),
			// A server that stops says so in its answer; health checks would only keep the call from it.
			grpc.WithDisableHealthCheck(),
			grpc.WithChainUnaryInterceptor(c.limit),
		),
	}
	config, err := c.tlsConfig()
	if err != nil {
		return nil, err
	}
	if config == nil {
		options = append(options, client.WithInsecure())
	} else {
		options = append(options, client.WithTLS(config))
	}
	if c.tokenFile != "" {
		if config == nil {
			return nil, usagef("--token-file needs --tls or --tls-ca: a token is never sent in the clear")
		}
		if _, err := os.Stat(c.tokenFile); err != nil {
			return nil, fmt.Errorf("read --token-file: %w", err)
		}
		options = append(options, client.WithTokenSource(func(context.Context) (string, error) {
			token, err := os.ReadFile(c.tokenFile)
			return strings.TrimSpace(string(token)), err
		}))
	}
	return client.Dial(ctx, address, options...)
}

// target is what --addr stands for: a host with its port, the usual one when there is none, or a target of gRPC's own such
// as dns:///host:port and unix:/path.
func target(addr string) (string, error) {
	const want = "want host:port, such as 127.0.0.1:" + defaultPort
	if scheme, _, ok := strings.Cut(addr, "://"); ok {
		switch strings.ToLower(scheme) {
		case "dns", "unix", "passthrough":
			return addr, nil
		case "https", "grpcs":
			return "", usagef("--addr %q: %s, without %s://; --tls connects with TLS", addr, want, scheme)
		}
		return "", usagef("--addr %q: %s, without %s://", addr, want, clean(scheme))
	}
	if strings.HasPrefix(addr, "unix:") || strings.HasPrefix(addr, "dns:") {
		return addr, nil
	}
	host, port := addr, defaultPort
	if ip, err := netip.ParseAddr(strings.Trim(addr, "[]")); err == nil {
		host = ip.String()
	} else if strings.Contains(addr, ":") {
		if host, port, err = net.SplitHostPort(addr); err != nil {
			return "", usagef("--addr %q: %s", addr, want)
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", usagef("--addr %q: %q is no port; %s", addr, port, want)
	}
	if host == "" || strings.ContainsFunc(host, func(r rune) bool { return r == '/' || r == '@' || r <= ' ' || r == 0x7f }) {
		return "", usagef("--addr %q: %q is no host; %s", addr, host, want)
	}
	return net.JoinHostPort(host, port), nil
}

// withoutTimeouts is a service config whose calls have no limits of their own.
func withoutTimeouts(text string) string {
	var config map[string]any
	if json.Unmarshal([]byte(text), &config) != nil {
		return text
	}
	methods, _ := config["methodConfig"].([]any)
	for _, method := range methods {
		if m, ok := method.(map[string]any); ok {
			delete(m, "timeout")
		}
	}
	out, err := json.Marshal(config)
	if err != nil {
		return text
	}
	return string(out)
}

func (c *cli) tlsConfig() (*tls.Config, error) {
	if c.tlsCA == "" {
		if !c.tls {
			return nil, nil
		}
		return &tls.Config{MinVersion: tls.VersionTLS12}, nil
	}
	pem, err := os.ReadFile(c.tlsCA)
	if err != nil {
		return nil, fmt.Errorf("read --tls-ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, usagef("--tls-ca %s: no PEM certificate in it", c.tlsCA)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}, nil
}

// with runs call with a client. Each of its calls to the server is bounded by --timeout, and not the whole: a long list is
// no server that does not answer, and neither is a person who thinks before saying yes.
func (c *cli) with(cmd *cobra.Command, call func(context.Context, *client.Client) error) error {
	ctx := cmd.Context()
	connection, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = connection.Close() }()
	return c.suggest(ctx, connection, call(ctx, connection))
}

// readValue returns what a flag such as --data means: @FILE a file's content, - standard input, anything
// else itself.
func (c *cli) readValue(value string) ([]byte, error) {
	switch {
	case value == "-":
		return io.ReadAll(c.stdin)
	case strings.HasPrefix(value, "@"):
		return os.ReadFile(value[1:])
	}
	return []byte(value), nil
}
