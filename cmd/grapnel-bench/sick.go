package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// sick is the part of the sink that fails until it is healed: below /sick/{how}/{who} each who is a receiver, and how is
// what ails it. Healed, they answer as the others do.
type sick struct {
	receive http.HandlerFunc
	server  *http.Server
	// shut is where nobody listens until all are healed, and other a host of its own, with the same handler.
	shut, other string

	healed atomic.Bool
	opened sync.Once // shut

	mu       sync.Mutex
	visits   int64
	patients map[string]*patient
}

// patient is one receiver.
type patient struct{ now, most int }

// sickStats is what the sick receivers have seen.
type sickStats struct {
	// Most is the greatest number of requests that one receiver had at once since it was healed, or ever before.
	Most int `json:"most_in_flight"`
	// Visits is how many requests there were.
	Visits int64 `json:"visits"`
}

func newSick(receive http.HandlerFunc, server *http.Server) (*sick, error) {
	s := &sick{receive: receive, server: server, patients: make(map[string]*patient)}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.shut = closed.Addr().String()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.other = other.Addr().String()
	go func() { _ = server.Serve(other) }()
	return s, closed.Close()
}

func (s *sick) register(mux *http.ServeMux) {
	mux.HandleFunc("POST /sick/{how}/{who}", s.visit)
	mux.HandleFunc("GET /sick", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(s.stats()) })
	mux.HandleFunc("POST /sicken", func(http.ResponseWriter, *http.Request) { s.healed.Store(false) })
	mux.HandleFunc("POST /heal", func(w http.ResponseWriter, _ *http.Request) {
		if err := s.heal(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
}

func (s *sick) visit(w http.ResponseWriter, r *http.Request) {
	who := r.PathValue("who")
	s.enter(who, 1)
	defer s.enter(who, -1)
	if s.healed.Load() {
		s.receive(w, r)
		return
	}
	switch how := r.PathValue("how"); how {
	case "well":
		s.receive(w, r)
	case "503":
		w.WriteHeader(http.StatusServiceUnavailable)
	case "drip":
		drip(w, r)
	case "late":
		if pause(r.Context(), 5*time.Second) {
			s.receive(w, r)
		}
	default:
		wait, err := time.ParseDuration(how)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		_, _ = io.Copy(io.Discard, r.Body)
		pause(r.Context(), wait)
		w.WriteHeader(http.StatusGatewayTimeout)
	}
}

// pause reports whether the request was still wanted at its end.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// drip answers with a byte of the header a second, and not with a success: one whose status was read has its status.
func drip(w http.ResponseWriter, r *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	for _, b := range []byte("HTTP/1.1 500 Internal Server Error\r\nX-Pad: " + strings.Repeat("x", 100)) {
		if !pause(r.Context(), time.Second) {
			return
		}
		if _, err := conn.Write([]byte{b}); err != nil {
			return
		}
	}
}

func (s *sick) enter(who string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.patients[who]
	if p == nil {
		p = &patient{}
		s.patients[who] = p
	}
	p.now += n
	s.visits += int64(max(n, 0))
	p.most = max(p.most, p.now)
}

func (s *sick) stats() sickStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := sickStats{Visits: s.visits}
	for _, p := range s.patients {
		st.Most = max(st.Most, p.most)
	}
	return st
}

func (s *sick) heal() (err error) {
	s.healed.Store(true)
	s.opened.Do(func() {
		var lis net.Listener
		if lis, err = net.Listen("tcp", s.shut); err == nil {
			go func() { _ = s.server.Serve(lis) }()
		}
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.patients {
		p.most = p.now
	}
	return err
}

// heal has all of them answer, and sicken none.
func (p *sinkProcess) heal(ctx context.Context) error { return p.post(ctx, "/heal") }

func (p *sinkProcess) sicken(ctx context.Context) error { return p.post(ctx, "/sicken") }

func (p *sinkProcess) post(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url(path), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
		return fmt.Errorf("sink's %s: %s: %s", path, resp.Status, text)
	}
	return nil
}

func (p *sinkProcess) sickStats() (sickStats, error) {
	var st sickStats
	resp, err := http.Get(p.url("/sick"))
	if err != nil {
		return st, err
	}
	defer resp.Body.Close()
	return st, json.NewDecoder(resp.Body).Decode(&st)
}
