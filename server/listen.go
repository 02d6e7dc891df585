package server

import (
	"context"
	"crypto/tls"
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
)

func newMetrics() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// serveAPI starts both listeners: gRPC for everybody, HTTP for the administrator. The function it
// returns ends the latter.
func (s *Server) serveAPI(parts *errgroup.Group) (*grpc.Server, func(), error) {
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
		if err := public.Serve(s.public); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
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
	return public, func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if admin.Shutdown(ctx) != nil {
			_ = admin.Close()
		}
	}, nil
}

// adminHandler serves what only the administrator of this machine may see.
func (s *Server) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		select {
		case <-s.ready:
			_, _ = fmt.Fprintln(w, "ok")
		default:
			http.Error(w, "starting", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}
