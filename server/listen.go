package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/grapnel/grapnel/server/secret"
)

func newMetrics() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// adminPatience is how long a stop waits for what an administrator is being told.
const adminPatience = time.Second

// serveAPI starts both listeners: gRPC for everybody, HTTP for the administrator. The function it
// returns ends the latter, with calls in progress until its context ends.
func (s *Server) serveAPI(parts *errgroup.Group) (*grpc.Server, func(context.Context), error) {
	opts := s.api.ServerOptions()
	if s.options.TLSCert != "" {
		pair, err := tls.LoadX509KeyPair(s.options.TLSCert, s.options.TLSKey)
		if err != nil {
			return nil, nil, fmt.Errorf("read the TLS certificate: %w", err)
		}
		opts = append(opts, grpc.Creds(credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair},
		})))
	}
	public := grpc.NewServer(opts...)
	s.api.Register(public)
	s.api.RegisterReflection(public)
	parts.Go(func() error {
		if err := public.Serve(s.api.Listen(s.public)); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			return fmt.Errorf("serve the API: %w", err)
		}
		return nil
	})
	admin := &http.Server{Handler: s.adminHandler(), ReadHeaderTimeout: 5 * time.Second}
	parts.Go(func() error {
		if err := admin.Serve(s.admin); err != nil && !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve the administrator: %w", err)
		}
		return nil
	})
	return public, func(ctx context.Context) {
		bounded, cancel := context.WithTimeout(ctx, adminPatience)
		defer cancel()
		if admin.Shutdown(bounded) != nil {
			_ = admin.Close()
		}
	}, nil
}

// serveSweep sweeps now, and answers when it has. With keep=DURATION, which stands in for every namespace's retention
// this once, it erases history: it is for trials, and needs Options.DebugSweep.
func (s *Server) serveSweep(w http.ResponseWriter, r *http.Request) {
	if !s.options.DebugSweep {
		http.Error(w, "needs --debug-sweep", http.StatusMethodNotAllowed)
		return
	}
	var keep time.Duration
	if text := r.FormValue("keep"); text != "" {
		var err error
		if keep, err = time.ParseDuration(text); err != nil || keep <= 0 {
			http.Error(w, fmt.Sprintf("keep: %q is no duration above zero, such as 90s", text), http.StatusBadRequest)
			return
		}
	}
	if err := s.sweepOnce(r.Context(), keep); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// adminHandler serves what only the administrator of this machine may see.
func (s *Server) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", s.serveReady)
	mux.HandleFunc("GET /namespaces/{namespace}/jwks.json", s.serveJWKS)
	mux.HandleFunc("GET /backup", s.serveBackup)
	mux.HandleFunc("POST /debug/sweep", s.serveSweep)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// jwksAge is how long receivers and proxies may keep a key set. A new key signs as soon as it is there, so it
// is short; who meets an unknown kid asks again.
const jwksAge = time.Minute

// serveJWKS publishes the public keys of a namespace for receivers that verify signatures. There is nothing
// secret in it, so an operator may pass the path on to everybody.
func (s *Server) serveJWKS(w http.ResponseWriter, r *http.Request) {
	ns := r.PathValue("namespace")
	if s.registry.Snapshot().Namespace(ns) == nil {
		http.Error(w, fmt.Sprintf("namespace %q does not exist", ns), http.StatusNotFound)
		return
	}
	set := s.secrets.JWKS(ns)
	sum := sha256.Sum256(set)
	h := w.Header()
	h.Set("Content-Type", secret.MediaTypeJWKS)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", fmt.Sprintf("public, max-age=%d", int(jwksAge.Seconds())))
	h.Set("ETag", `"`+base64.RawURLEncoding.EncodeToString(sum[:16])+`"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(set))
}
