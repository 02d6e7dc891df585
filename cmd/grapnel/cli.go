package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

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

	// Flags of all client commands.
	addr, namespace, output string
	tls                     bool
	tlsCA, tokenFile        string
	timeout                 time.Duration
}

func newCLI() *cli {
	return &cli{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, lookupEnv: os.LookupEnv}
}

// connectFlags gives cmd and the commands below it the flags that say where the server is and how to print.
func (c *cli) connectFlags(cmd *cobra.Command, namespaced bool) *cobra.Command {
	f := cmd.PersistentFlags()
	f.StringVar(&c.addr, "addr", "127.0.0.1:7070", "address of the server's public API")
	f.StringVarP(&c.output, "output", "o", "table", "table or json")
	f.BoolVar(&c.tls, "tls", false, "connect with TLS and the system's roots")
	f.StringVar(&c.tlsCA, "tls-ca", "", "connect with TLS and the roots in this PEM `file`")
	f.StringVar(&c.tokenFile, "token-file", "", "send the bearer token in this `file`; needs TLS")
	f.DurationVar(&c.timeout, "timeout", 30*time.Second, "give up after this long")
	if namespaced {
		f.StringVarP(&c.namespace, "namespace", "n", "", "namespace, unless the name is a full one")
		must(cmd.RegisterFlagCompletionFunc("namespace", completeNamespaces(c)))
	}
	must(cmd.RegisterFlagCompletionFunc("output", fixed("table", "json")))
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
	if c.output != "table" && c.output != "json" {
		return nil, usagef("--output %s: must be table or json", c.output)
	}
	options := []client.Option{client.WithUserAgent("grapnel/" + version().number), client.WithFailFast()}
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
		options = append(options, client.WithTokenSource(func(context.Context) (string, error) {
			token, err := os.ReadFile(c.tokenFile)
			return strings.TrimSpace(string(token)), err
		}))
	}
	return client.Dial(ctx, c.addr, options...)
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

// with runs call with a client, bounded by --timeout.
func (c *cli) with(cmd *cobra.Command, call func(context.Context, *client.Client) error) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), c.timeout)
	defer cancel()
	connection, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = connection.Close() }()
	return call(ctx, connection)
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
