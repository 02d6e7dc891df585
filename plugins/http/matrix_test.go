package httpplugin

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/grapnel/grapnel/internal/required"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// matrixRequests is how many deliveries each cell of the matrix has; docs/transports.md has the figures of 10 000.
var matrixRequests = flag.Int("matrix", 2000, "deliveries through each server of the matrix")

// TestMatrix delivers through real servers over HTTP/1.1 and HTTP/2, with the limits of keep-alive that they have unless
// told otherwise and with short ones: no delivery may fail, and none that was processed may arrive twice.
func TestMatrix(t *testing.T) {
	if testing.Short() {
		t.Skip("thousands of requests through each of several servers")
	}
	ca := newAuthority(t)
	b := &backend{seen: map[string]int{}}
	origin := client{}.serve(t, nil, b.serve)
	for _, s := range []struct {
		name  string
		start func(m *matrix, t *testing.T)
	}{
		{"Go net/http", (*matrix).goServer}, {"node", (*matrix).node},
		{"nginx", (*matrix).nginx}, {"nginx, keepalive_requests 100", (*matrix).nginxShort},
		{"HAProxy", (*matrix).haproxy}, {"HAProxy, timeout http-keep-alive 20ms", (*matrix).haproxyShort},
	} {
		t.Run(s.name, func(t *testing.T) {
			m := &matrix{ca: ca, behind: strings.TrimPrefix(origin.URL, "http://"), dir: t.TempDir(), backend: b}
			s.start(m, t)
			for _, cell := range []struct{ name, url string }{{"HTTP/1.1", m.plain}, {"HTTPS, HTTP/1.1", m.tls1}, {"HTTPS, HTTP/2", m.tls2}} {
				if cell.url != "" {
					t.Run(cell.name, func(t *testing.T) { m.deliver(t, cell.url, cell.url == m.tls2) })
				}
			}
		})
	}
}

// matrix is one server, the addresses it listens on, and what is behind it.
type matrix struct {
	ca                *authority
	behind            string // host:port of the backend
	dir               string
	backend           *backend
	plain, tls1, tls2 string // URLs
}

// backend counts what was processed, by id.
type backend struct {
	mu   sync.Mutex
	seen map[string]int
}

func (b *backend) serve(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	b.count(r.Header.Get("Webhook-Id"))
	w.WriteHeader(http.StatusNoContent)
}

func (b *backend) count(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen[id]++
}

func (m *matrix) deliver(t *testing.T, url string, http2 bool) {
	const width = 64
	inst := client{roots: m.ca.roots}.instance(t, url, map[string]any{"http2": http2})
	var next, failed atomic.Int64
	ids := fmt.Sprintf("%s-%d-", url, time.Now().UnixNano())
	var wg sync.WaitGroup
	start := time.Now()
	for range width {
		wg.Go(func() {
			for n := next.Add(1); n <= int64(*matrixRequests); n = next.Add(1) {
				req := event()
				req.Headers[1] = plugin.Header{Name: "webhook-id", Value: fmt.Sprint(ids, n)}
				req.Body = bytes.Repeat([]byte("x"), 1024)
				if resp, err := inst.Attempt(within(t, 20*time.Second), req); err != nil || resp.Status != http.StatusNoContent {
					if failed.Add(1) < 4 {
						t.Errorf("delivery %d: %v, %v", n, resp, err)
					}
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	twice, missing := 0, 0
	m.backend.mu.Lock()
	defer m.backend.mu.Unlock()
	for n := range *matrixRequests {
		switch m.backend.seen[fmt.Sprint(ids, n+1)] {
		case 0:
			missing++
		case 1:
		default:
			twice++
		}
	}
	if failed.Load() > 0 || twice > 0 || missing > 0 {
		t.Errorf("%d deliveries failed, %d were processed twice, %d not at all", failed.Load(), twice, missing)
	}
	t.Logf("%d deliveries, %d false failures, %d processed twice, %.0f/s", *matrixRequests, failed.Load(), twice, float64(*matrixRequests)/took.Seconds())
}

func (m *matrix) goServer(t *testing.T) {
	m.plain = client{}.serve(t, nil, m.backend.serve).URL + "/"
	m.tls1 = client{tls: m.ca}.serve(t, nil, m.backend.serve).URL + "/"
	m.tls2 = client{tls: m.ca, http2: true}.serve(t, nil, m.backend.serve).URL + "/"
}

// needsProgram finds a server; the test needs it.
func needsProgram(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/usr/local/sbin") {
		if path := filepath.Join(dir, name); exec.Command(path, "-v").Run() == nil {
			return path
		}
	}
	required.Tool(t, name, errors.New("is not installed"), "see CONTRIBUTING.md")
	return ""
}

// freePort is one that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	return lis.Addr().String()
}

// run starts a server and waits until it takes connections at all of its addresses.
func (m *matrix) run(t *testing.T, addrs []string, program string, args ...string) {
	t.Helper()
	cmd := exec.Command(program, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Dir = m.dir
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, addr := range addrs {
		for {
			conn, err := net.Dial("tcp", addr)
			if err == nil {
				_ = conn.Close()
				break
			}
			select {
			case <-ended:
				t.Fatalf("%s has ended: %s", program, out.String())
			case <-t.Context().Done():
				t.Fatalf("%s does not listen: %s", program, out.String())
			case <-tick.C:
			}
		}
	}
}

func (m *matrix) file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(m.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// pair writes a certificate and its key.
func (m *matrix) pair(t *testing.T) (certificate, key string) {
	t.Helper()
	c, k := m.ca.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), "localhost")
	return m.file(t, "cert.pem", c), m.file(t, "key.pem", k)
}

func (m *matrix) urls(addrs []string) {
	m.plain, m.tls1, m.tls2 = "http://"+addrs[0]+"/", "https://"+addrs[1]+"/", "https://"+addrs[2]+"/"
}

func (m *matrix) nginx(t *testing.T)      { m.nginxWith(t, "") }
func (m *matrix) nginxShort(t *testing.T) { m.nginxWith(t, "keepalive_requests 100;") }

func (m *matrix) nginxWith(t *testing.T, more string) {
	program := needsProgram(t, "nginx")
	certificate, key := m.pair(t)
	addrs := []string{freePort(t), freePort(t), freePort(t)}
	user := ""
	if os.Getuid() == 0 {
		user = "user root;"
	}
	conf := m.file(t, "nginx.conf", fmt.Sprintf(`%s daemon off; pid nginx.pid; error_log stderr crit; worker_processes 1;
events { worker_connections 1024; }
http {
  access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  %s
  upstream backend { server %s; keepalive 64; }
  ssl_certificate %s; ssl_certificate_key %s;
  server {
    listen %s; listen %s ssl; listen %s ssl http2;
    location / { proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}
`, user, more, m.behind, certificate, key, addrs[0], addrs[1], addrs[2]))
	m.run(t, addrs, program, "-p", m.dir, "-c", conf)
	m.urls(addrs)
}

func (m *matrix) haproxy(t *testing.T) { m.haproxyWith(t, "") }
func (m *matrix) haproxyShort(t *testing.T) {
	m.haproxyWith(t, "timeout http-keep-alive 20ms")
}

func (m *matrix) haproxyWith(t *testing.T, more string) {
	program := needsProgram(t, "haproxy")
	certificate, key := m.pair(t)
	pair := ""
	for _, path := range []string{certificate, key} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		pair += string(text)
	}
	path := m.file(t, "pair.pem", pair)
	addrs := []string{freePort(t), freePort(t), freePort(t)}
	conf := m.file(t, "haproxy.cfg", fmt.Sprintf(`global
  maxconn 1000
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  %s
frontend all
  bind %s
  bind %s ssl crt %s alpn http/1.1
  bind %s ssl crt %s alpn h2
  default_backend go
backend go
  server one %s
`, more, addrs[0], addrs[1], path, addrs[2], path, m.behind))
	m.run(t, addrs, program, "-db", "-f", conf)
	m.urls(addrs)
}

func (m *matrix) node(t *testing.T) {
	program := needsProgram(t, "node")
	certificate, key := m.pair(t)
	script := m.file(t, "server.js", `
const fs = require("fs"), http = require("http"), https = require("https"), http2 = require("http2");
const pair = { cert: fs.readFileSync(process.argv[2]), key: fs.readFileSync(process.argv[3]) };
const handle = (req, res) => {
  req.resume();
  req.on("end", () => { console.log(req.headers["webhook-id"]); res.writeHead(204); res.end(); });
};
const plain = http.createServer(handle);
const secure = https.createServer(pair, handle);
const second = http2.createSecureServer(pair, handle);
plain.listen(0, "127.0.0.1", () => secure.listen(0, "127.0.0.1", () => second.listen(0, "127.0.0.1", () =>
  console.log(["at", plain.address().port, secure.address().port, second.address().port].join(" ")))));
`)
	cmd := exec.Command(program, script, certificate, key)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("node says nothing")
	}
	ports := strings.Fields(lines.Text())
	m.urls([]string{"127.0.0.1:" + ports[1], "127.0.0.1:" + ports[2], "127.0.0.1:" + ports[3]})
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines.Scan() {
			m.backend.count(lines.Text())
		}
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-read; _ = cmd.Wait() })
}
