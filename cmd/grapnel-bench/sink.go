package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/sdk/webhook"
)

// benchKey signs and verifies in the raw loop and in Grapnel alike.
const benchKey = "whsec_Z3JhcG5lbC1iZW5jaC1rZXktb2YtMzItYnl0ZXMhISE="

// sinkStats is what the receiver has seen since the last reset.
type sinkStats struct {
	// Arrived counts requests with a good signature, Unique those of them with a new (path, webhook-id).
	Arrived   int64   `json:"arrived"`
	Unique    int64   `json:"unique"`
	Bad       int64   `json:"bad"`
	FirstBad  string  `json:"first_bad,omitempty"`
	Latencies []int64 `json:"latencies,omitempty"`
}

// sink is the receiver: it answers 204 to everything below /s/, checks the signature, and counts. Below /plain/ it does
// the same for requests that are not signed.
// Below /slow/ it answers after the time named by the path.
type sink struct {
	verifier *webhook.Verifier
	arrived  atomic.Int64
	unique   atomic.Int64
	bad      atomic.Int64
	firstBad atomic.Pointer[string]
	// since is the latest reset in nanoseconds: arrivals of what was published before it have no latency.
	since  atomic.Int64
	seed   maphash.Seed
	shards [64]sinkShard
	bodies sync.Pool
}

type sinkShard struct {
	mu        sync.Mutex
	seen      map[uint64]struct{}
	latencies []int64
}

// runSink serves until its standard input ends, so that it never outlives the benchmark.
func runSink([]string) error {
	v, err := webhook.NewVerifier(benchKey)
	if err != nil {
		return err
	}
	s := &sink{verifier: v, seed: maphash.MakeSeed()}
	s.bodies.New = func() any { b := make([]byte, 0, 64<<10); return &b }
	s.reset()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /s/", s.receive)
	mux.HandleFunc("POST /plain/", s.receive)
	mux.HandleFunc("POST /slow/{wait}/{who...}", func(w http.ResponseWriter, r *http.Request) {
		wait, err := time.ParseDuration(r.PathValue("wait"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		select {
		case <-time.After(wait):
		case <-r.Context().Done():
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /stats", s.stats)
	mux.HandleFunc("POST /reset", func(http.ResponseWriter, *http.Request) { s.reset() })
	srv := &http.Server{Handler: mux}
	ill, err := newSick(s.receive, srv)
	if err != nil {
		return err
	}
	ill.register(mux)
	secure, second, certificate, err := serveTLS(mux)
	if err != nil {
		return err
	}
	fmt.Println(lis.Addr(), secure.Addr(), second.Addr(), base64.StdEncoding.EncodeToString(certificate), ill.shut, ill.other)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = srv.Close()
	}()
	if err := srv.Serve(lis); err != http.ErrServerClosed {
		return err
	}
	return nil
}

func (s *sink) receive(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	buf := s.bodies.Get().(*[]byte)
	defer s.bodies.Put(buf)
	body, err := readInto((*buf)[:0], r.Body)
	*buf = body
	if err == nil && !strings.HasPrefix(r.URL.Path, "/plain/") {
		err = s.verifier.Verify(r.Header, body)
	}
	if err != nil {
		s.bad.Add(1)
		text := err.Error()
		s.firstBad.CompareAndSwap(nil, &text)
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	var h maphash.Hash
	h.SetSeed(s.seed)
	_, _ = h.WriteString(r.URL.Path)
	_, _ = h.WriteString(r.Header.Get("Webhook-Id"))
	key := h.Sum64()
	sh := &s.shards[key%uint64(len(s.shards))]
	sent := sentAt(body)
	sh.mu.Lock()
	_, dup := sh.seen[key]
	if !dup {
		sh.seen[key] = struct{}{}
		if sent != 0 && sent >= s.since.Load() {
			sh.latencies = append(sh.latencies, now.UnixNano()-sent)
		}
	}
	sh.mu.Unlock()
	s.arrived.Add(1)
	if !dup {
		s.unique.Add(1)
	}
	w.WriteHeader(http.StatusNoContent)
}

// readInto appends r to buf, which keeps its capacity for the next request.
func readInto(buf []byte, r io.Reader) ([]byte, error) {
	for {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, len(buf)+512)
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			return buf, nil
		}
		if err != nil {
			return buf, err
		}
	}
}

// payload makes a JSON body of the given size that says when it was published; 0 leaves that out.
func payload(size int, n int64, sent time.Time) []byte {
	var nanos int64
	if !sent.IsZero() {
		nanos = sent.UnixNano()
	}
	b := fmt.Appendf(make([]byte, 0, size+64), `{"sent":%019d,"n":%d,"pad":"`, nanos, n)
	for len(b) < size-2 {
		b = append(b, "0123456789abcdefghijklmnopqrstuvwxyz"[len(b)%36])
	}
	return append(b, `"}`...)
}

func sentAt(body []byte) int64 {
	const prefix = `{"sent":`
	if len(body) < len(prefix)+19 {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimLeft(string(body[len(prefix):len(prefix)+19]), "0"), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func (s *sink) reset() {
	s.since.Store(time.Now().UnixNano())
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		sh.seen, sh.latencies = map[uint64]struct{}{}, nil
		sh.mu.Unlock()
	}
	s.arrived.Store(0)
	s.unique.Store(0)
	s.bad.Store(0)
	s.firstBad.Store(nil)
}

func (s *sink) stats(w http.ResponseWriter, r *http.Request) {
	st := sinkStats{Arrived: s.arrived.Load(), Unique: s.unique.Load(), Bad: s.bad.Load()}
	if p := s.firstBad.Load(); p != nil {
		st.FirstBad = *p
	}
	if r.URL.Query().Has("latencies") {
		for i := range s.shards {
			sh := &s.shards[i]
			sh.mu.Lock()
			st.Latencies = append(st.Latencies, sh.latencies...)
			sh.mu.Unlock()
		}
	}
	_ = json.NewEncoder(w).Encode(st)
}

// sinkProcess is the receiver as the benchmark sees it.
type sinkProcess struct {
	cmd   *exec.Cmd
	stdin io.Closer
	addr  string
	// secure and second are the listeners of HTTP/1.1 and of HTTP/2 over TLS; certificate is theirs, in PEM.
	secure, second, certificate string
	// shut and other are those of the sick.
	shut, other string
}

func startSink(ctx context.Context) (*sinkProcess, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "sink")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the sink: %w", err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("start the sink: %w", err)
	}
	words := strings.Fields(line)
	if len(words) != 6 {
		return nil, fmt.Errorf("start the sink: it says %q", line)
	}
	certificate, err := base64.StdEncoding.DecodeString(words[3])
	if err != nil {
		return nil, fmt.Errorf("start the sink: %w", err)
	}
	return &sinkProcess{cmd: cmd, stdin: stdin, addr: words[0], secure: words[1], second: words[2], certificate: string(certificate),
		shut: words[4], other: words[5]}, nil
}

func (p *sinkProcess) stop() {
	_ = p.stdin.Close()
	_ = p.cmd.Wait()
}

func (p *sinkProcess) url(path string) string { return "http://" + p.addr + path }

func (p *sinkProcess) reset() error {
	resp, err := http.Post(p.url("/reset"), "", nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (p *sinkProcess) stats(latencies bool) (sinkStats, error) {
	url := p.url("/stats")
	if latencies {
		url += "?latencies"
	}
	var st sinkStats
	resp, err := http.Get(url)
	if err != nil {
		return st, err
	}
	defer resp.Body.Close()
	return st, json.NewDecoder(resp.Body).Decode(&st)
}

// await waits until want deliveries have arrived, and fails when they stop coming or one is bad.
func (p *sinkProcess) await(ctx context.Context, want int64) (sinkStats, error) {
	return p.awaitPatiently(ctx, want, 30*time.Second)
}

// awaitPatiently is await that takes them for missing when none has come for as long as patience.
func (p *sinkProcess) awaitPatiently(ctx context.Context, want int64, patience time.Duration) (sinkStats, error) {
	last, since := int64(-1), time.Now()
	for {
		st, err := p.stats(false)
		switch {
		case err != nil:
			return st, err
		case st.Bad > 0:
			return st, fmt.Errorf("%d requests with a bad signature: %s", st.Bad, st.FirstBad)
		case st.Unique >= want:
			return st, nil
		case st.Unique != last:
			last, since = st.Unique, time.Now()
		case time.Since(since) > patience:
			return st, fmt.Errorf("%d of %d deliveries are missing", want-st.Unique, want)
		}
		select {
		case <-ctx.Done():
			return st, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}
