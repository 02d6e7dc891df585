package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/grapnel/grapnel/sdk/webhook"
)

// listening is a receiver for trying things out: it shows what arrives and verifies it.
type listening struct {
	c                      *cli
	listen, secret, header string
	count                  int
	verify                 func(http.Header, []byte) error
	done                   chan struct{}
	left                   int
	unverified             bool
}

func newReceiveCommand(c *cli) *cobra.Command {
	l := &listening{c: c}
	cmd := &cobra.Command{
		Use:   "receive",
		Short: "Receive webhooks, show them and verify their signatures",
		Long: `A receiver for trying things out. With --secret it verifies Standard Webhooks signatures (whsec_… or whpk_…);
with --signature-header also it verifies a header of the form t=UNIX,v1=HEX[,v1=HEX] over "ID.UNIX.BODY" by
HMAC-SHA256 with the secret as it is, as the plugins of "grapnel plugin new" sign. What does not verify is
answered 401, all else 204.`,
		Example: `  grapnel receive --secret @key.txt --count 1`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return l.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&l.listen, "listen", "127.0.0.1:9000", "host:port to listen on")
	f.StringVar(&l.secret, "secret", "", "key to verify with, or `@file`")
	f.StringVar(&l.header, "signature-header", "", "`header` with the signature; default that of Standard Webhooks")
	f.IntVar(&l.count, "count", 0, "end after this many requests, with success when all verified; 0 goes on")
	f.StringVarP(&c.output, "output", "o", "table", "table or json, a line for each request")
	return cmd
}

func (l *listening) run(ctx context.Context) error {
	if err := l.prepare(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", l.listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
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
			return srv.Close()
		case err := <-served:
			return fmt.Errorf("listen: %w", err)
		}
	}
}

func (l *listening) prepare() error {
	secret, err := l.c.readValue(l.secret)
	if err != nil {
		return fmt.Errorf("read --secret: %w", err)
	}
	key := strings.TrimSpace(string(secret))
	switch {
	case key == "" && l.header != "":
		return usagef("--signature-header needs --secret")
	case key == "":
		return nil
	case l.header != "":
		l.verify = func(h http.Header, body []byte) error {
			return verifyTimed(h.Get("Webhook-Id"), h.Get(l.header), body, key)
		}
		return nil
	}
	verifier, err := webhook.NewVerifier(key)
	if err != nil {
		return usagef("--secret: %w", err)
	}
	l.verify = verifier.Verify
	return nil
}

// verifyTimed checks t=UNIX,v1=HEX[,v1=HEX] over "ID.UNIX.BODY".
func verifyTimed(id, header string, body []byte, key string) error {
	var at string
	for part := range strings.SplitSeq(header, ",") {
		name, value, _ := strings.Cut(part, "=")
		switch name {
		case "t":
			at = value
		case "v1":
			mac := hmac.New(sha256.New, []byte(key))
			fmt.Fprintf(mac, "%s.%s.%s", id, at, body)
			if given, err := hex.DecodeString(value); err == nil && hmac.Equal(given, mac.Sum(nil)) {
				return nil
			}
		}
	}
	return errors.New("no signature fits the key")
}

// arrived shows one request and answers it.
func (l *listening) arrived(w http.ResponseWriter, r *http.Request, body []byte) {
	line := struct {
		Method   string      `json:"method"`
		URL      string      `json:"url"`
		Headers  http.Header `json:"headers"`
		Body     string      `json:"body"`
		Verified string      `json:"verified"`
	}{r.Method, r.RequestURI, r.Header, string(body), "unchecked"}
	status := http.StatusNoContent
	if l.verify != nil {
		line.Verified = "verified"
		if err := l.verify(r.Header, body); err != nil {
			line.Verified, status, l.unverified = "not verified: "+err.Error(), http.StatusUnauthorized, true
		}
	}
	if l.c.output == "json" {
		if text, err := json.Marshal(line); err == nil {
			fmt.Fprintf(l.c.stdout, "%s\n", text)
		}
	} else {
		fmt.Fprintf(l.c.stdout, "%s %s  %s  %s  %d bytes: %.200s\n", line.Method, line.URL, r.Header.Get("Ce-Type"), line.Verified, len(body), body)
	}
	w.WriteHeader(status)
	if l.left--; l.left == 0 {
		close(l.done)
	}
}
