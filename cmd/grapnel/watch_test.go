package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// relay passes connections on to where it is told, and cuts them.
type relay struct {
	net.Listener
	mu    sync.Mutex
	to    string
	conns map[net.Conn]struct{}
}

func startRelay(t *testing.T) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: l, conns: map[net.Conn]struct{}{}}
	t.Cleanup(func() { _ = l.Close(); r.cut() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go r.pass(c)
		}
	}()
	return r
}

func (r *relay) pass(c net.Conn) {
	defer c.Close()
	r.mu.Lock()
	to := r.to
	r.mu.Unlock()
	s, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer s.Close()
	r.mu.Lock()
	r.conns[c], r.conns[s] = struct{}{}, struct{}{}
	r.mu.Unlock()
	go func() { _, _ = io.Copy(s, c); _ = s.Close(); _ = c.Close() }()
	_, _ = io.Copy(c, s)
}

// cut ends all connections.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		_ = c.Close()
	}
	clear(r.conns)
}

func (r *relay) lead(to string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.to = to
}

// TestWatchersMissNothing: a tail and a listen see every delivery once, although their connections are cut ten times and the
// server is killed.
func TestWatchersMissNothing(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	taken := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer taken.Close()
	var mu sync.Mutex
	posted := map[string]int{}
	program := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		posted[r.Header.Get("ce-id")]++
	}))
	defer program.Close()
	r := runServerIn(t, dir, "--egress-allow", "127.0.0.0/8")
	way := startRelay(t)
	way.lead(r.ready())
	a := dialAPI(t, way.Addr().String())
	a.subscribe(taken.URL)

	start := func(ready string, args ...string) (lines func() []string, end func()) {
		cmd := exec.Command("grapnel", append(args, "-n", "acme", "--addr", way.Addr().String())...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		var mu sync.Mutex
		var all []string
		go func() {
			for s := bufio.NewScanner(out); s.Scan(); {
				mu.Lock()
				all = append(all, s.Text())
				mu.Unlock()
			}
		}()
		lines = func() []string {
			mu.Lock()
			defer mu.Unlock()
			return append([]string(nil), all...)
		}
		if ready != "" {
			waitUntil(t, args[0]+" begins", func() bool { return strings.Contains(strings.Join(lines(), "\n"), ready) })
		}
		return lines, func() { _ = cmd.Process.Signal(os.Interrupt); _ = cmd.Wait() }
	}
	_, endListen := start("forwarding", "listen", "--forward", program.URL)
	tailed, endTail := start("", "delivery", "tail", "-o", "json", "--filter", "subscription = one")
	publish := func(id string) {
		t.Helper()
		for { // until it is acknowledged
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			_, err := grapnelv1.NewPublishServiceClient(a.conn).Publish(ctx, &grapnelv1.PublishRequest{
				Parent: "namespaces/acme", Event: &grapnelv1.Event{Id: id, Type: "t", Payload: &grapnelv1.Event_Data{Data: []byte("{}")}},
			})
			cancel()
			if err == nil {
				return
			}
			if t.Context().Err() != nil {
				t.Fatal(err)
			}
		}
	}
	waitUntil(t, "the tail begins", func() bool { publish(fmt.Sprint("first", time.Now().UnixNano())); return len(tailed()) > 0 })
	const events, cuts = 220, 11
	for i := range events {
		publish(fmt.Sprint("e", i))
		if i%(events/cuts) != events/cuts-1 {
			continue
		}
		if i == events/2-1 {
			r.signal(syscall.SIGKILL)
			r = runServerIn(t, dir, "--egress-allow", "127.0.0.0/8")
			way.lead(r.ready())
		}
		way.cut()
	}
	ended := func() (n int, seen map[string]int) {
		seen = map[string]int{}
		for _, line := range tailed() {
			var d struct {
				Event, State string
				AttemptCount int
			}
			if err := json.Unmarshal([]byte(line), &d); err != nil {
				t.Fatalf("%v in %s", err, line)
			}
			if id := d.Event[strings.LastIndexByte(d.Event, '/')+1:]; strings.HasPrefix(id, "e") {
				if seen[fmt.Sprint(id, " ", d.State, " ", d.AttemptCount)]++; d.State == "STATE_SUCCEEDED" {
					n++
				}
			}
		}
		return n, seen
	}
	waitUntil(t, "the tail has seen all end", func() bool { n, _ := ended(); return n >= events })
	waitUntil(t, "all are posted", func() bool {
		mu.Lock()
		defer mu.Unlock()
		for i := range events {
			if posted[fmt.Sprint("e", i)] == 0 {
				return false
			}
		}
		return true
	})
	endTail()
	endListen()
	n, seen := ended()
	if n != events {
		t.Errorf("the tail has seen %d end, of %d", n, events)
	}
	for i := range events {
		if seen[fmt.Sprintf("e%d STATE_PENDING 0", i)] != 1 {
			t.Errorf("the beginning of e%d was seen %d times", i, seen[fmt.Sprintf("e%d STATE_PENDING 0", i)])
		}
		mu.Lock()
		if posted[fmt.Sprint("e", i)] != 1 {
			t.Errorf("e%d was posted %d times", i, posted[fmt.Sprint("e", i)])
		}
		mu.Unlock()
	}
	for what, n := range seen {
		if n != 1 {
			t.Errorf("%s was seen %d times", what, n)
		}
	}
}
