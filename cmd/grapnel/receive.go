package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// listening is a receiver for trying things out: it shows what arrives and verifies it.
type listening struct {
	c                              *cli
	listen, secret, header, scheme string
	config, url                    string
	count                          int
	verify                         verifier // nil verifies nothing
	done                           chan struct{}
	left                           int
	unverified                     bool
}

func newReceiveCommand(c *cli) *cobra.Command {
	l := &listening{c: c}
	cmd := &cobra.Command{
		Use:   "receive",
		Short: "Receive webhooks, show them and verify their signatures",
		Long: `A receiver for trying things out. With --secret it verifies signatures by --scheme, any of the signers that ship; the
default is standard-webhooks, with whsec_… or whpk_…. Schemes with pairs of keys take the public one, as grapnel secret get
shows it. Schemes with settings take those of the subscription's signer in --scheme-config, and schemes that sign the URL
the subscription's in --url, where it is another than the one that is asked for here.

With --signature-header it verifies instead a header of the form t=UNIX,v1=HEX[,v1=HEX] over "ID.UNIX.BODY" by HMAC-SHA256
with the secret as it is, as the plugins of grapnel plugin new sign.

What does not verify is answered 401, all else 204. What arrives is shown so that it cannot steer the terminal; with
--output json a body that is not UTF-8 stands in bodyBase64.`,
		Example: "  grapnel receive --secret @key.txt --count 1\n  grapnel receive --scheme github --secret @key.txt",
		Args:    cobra.NoArgs,
	}
	f := cmd.Flags()
	f.StringVar(&l.listen, "listen", "127.0.0.1:9000", "`host:port` to listen on")
	f.StringVar(&l.secret, "secret", "", "key to verify with, or `@file`, or - for standard input")
	f.StringVar(&l.scheme, "scheme", "", "`signer` whose signatures are verified, such as github; default standard-webhooks")
	f.StringVar(&l.config, "scheme-config", "", "settings of --scheme as the subscription has them: JSON or `@file`")
	f.StringVar(&l.url, "url", "", "the subscription's `URI`, for schemes that sign it")
	f.StringVar(&l.header, "signature-header", "", "`header` with a signature of the form t=UNIX,v1=HEX")
	countVar(f, &l.count, "count", 0, 0, 0, "end after this many requests, with success when all verified; 0 goes on")
	f.StringVarP(&c.output, "output", "o", formatTable, "table or json, a line for each request")
	must(cmd.RegisterFlagCompletionFunc("output", completeFormats))
	must(cmd.RegisterFlagCompletionFunc("scheme", fixed(schemes()...)))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := l.prepare(cmd); err != nil {
			return err
		}
		return l.run(cmd.Context())
	}
	return plain(cmd)
}

func (l *listening) run(ctx context.Context) error {
	listener, err := net.Listen("tcp", l.listen)
	if err != nil {
		return fmt.Errorf("--listen %s: %w", l.listen, err)
	}
	l.done, l.left = make(chan struct{}), l.count
	arrivals := make(chan func())
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 4<<20))
		if err != nil {
			return
		}
		answered := make(chan struct{})
		select {
		case arrivals <- func() { l.arrived(w, r, body); close(answered) }:
			<-answered
		case <-l.done: // it has what it wanted
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(listener) }()
	l.c.said("listening on http://%s", listener.Addr())
	for {
		select {
		case arrive := <-arrivals:
			arrive()
			continue
		case <-l.done:
			stop, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			_ = srv.Shutdown(stop) // the last answer goes out first
			if l.unverified {
				return errors.New("not every request verified")
			}
			return nil
		case <-ctx.Done():
			return errors.Join(ctx.Err(), srv.Close())
		case err := <-served:
			return fmt.Errorf("listen: %w", err)
		}
	}
}

func (l *listening) prepare(cmd *cobra.Command) error {
	if err := excludes(cmd, "signature-header", "it is a form of its own", "scheme", "scheme-config", "url"); err != nil {
		return err
	}
	for _, flag := range []string{"scheme", "signature-header"} {
		if err := needs(cmd, flag, "secret"); err != nil {
			return err
		}
	}
	for _, flag := range []string{"scheme-config", "url"} {
		if err := needs(cmd, flag, "scheme"); err != nil {
			return err
		}
	}
	if _, _, err := net.SplitHostPort(l.listen); err != nil {
		return usagef("--listen %q: want host:port, such as 127.0.0.1:9000", l.listen)
	}
	if !cmd.Flags().Changed("secret") {
		return nil
	}
	secret, err := l.c.readValue(l.secret)
	if err != nil {
		return fmt.Errorf("read --secret: %w", err)
	}
	config, err := l.c.readValue(l.config)
	if err != nil {
		return fmt.Errorf("read --scheme-config: %w", err)
	}
	key := strings.TrimSpace(string(secret))
	switch {
	case key == "":
		return usagef("--secret: there is no key in it")
	case l.header != "":
		l.verify = timed(l.header, key)
	default:
		l.verify, err = newVerifier(cmp.Or(l.scheme, "standard-webhooks"), config, key, l.url)
	}
	if err != nil {
		if _, statErr := os.Stat(l.secret); statErr == nil && !strings.HasPrefix(l.secret, "@") {
			return usagef("--secret: there is a file %s: did you mean --secret @%s? As a key, %w", l.secret, l.secret, err)
		}
		if l.scheme == "" && l.header == "" {
			return usagef("--secret: %w; --scheme says which scheme a key is for", err)
		}
		return usagef("--secret: %w", err)
	}
	return nil
}

// receivedRequest is a request as --output json shows it.
type receivedRequest struct {
	Method     string      `json:"method"`
	URL        string      `json:"url"`
	Headers    http.Header `json:"headers"`
	Body       string      `json:"body"`
	BodyBase64 []byte      `json:"bodyBase64,omitempty"`
	Verified   string      `json:"verified"`
}

// arrived shows one request and answers it.
func (l *listening) arrived(w http.ResponseWriter, r *http.Request, body []byte) {
	line := receivedRequest{Method: r.Method, URL: r.RequestURI, Headers: r.Header, Body: string(body), Verified: "unchecked"}
	if !utf8.Valid(body) {
		line.Body, line.BodyBase64 = "", body
	}
	status := http.StatusNoContent
	if l.verify != nil {
		line.Verified = "verified"
		if err := l.verify(incoming{method: r.Method, url: "http://" + r.Host + r.RequestURI, header: r.Header, body: body, at: time.Now()}); err != nil {
			line.Verified, status, l.unverified = "not verified: "+err.Error(), http.StatusUnauthorized, true
		}
	}
	if l.c.output == formatJSON {
		if text, err := json.Marshal(line); err == nil {
			fmt.Fprintf(l.c.stdout, "%s\n", text)
		}
	} else {
		fmt.Fprintf(l.c.stdout, "%s %s  %s  %s  %d bytes: %s\n", clean(line.Method), clean(line.URL), clean(r.Header.Get("Ce-Type")),
			clean(line.Verified), len(body), clean(string(body[:min(len(body), 200)])))
	}
	w.WriteHeader(status)
	if l.left--; l.left == 0 {
		close(l.done)
	}
}
