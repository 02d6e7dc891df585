package conformance

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"
)

// request is one that arrived at a sink.
type request struct {
	conn    int // number of the connection
	method  string
	target  string // as in the request line
	host    string
	header  http.Header
	body    []byte
	unsound error // the body did not arrive as framed
}

// exchange is a request and the connection to answer it on.
type exchange struct {
	*request
	net.Conn
	sink *sink
	n    int // counts the requests of the sink from 1
	stop <-chan struct{}
}

// reply writes an answer with a body and keeps the connection.
func (x *exchange) reply(status int, extra, body string) {
	_, _ = fmt.Fprintf(x, "HTTP/1.1 %d %s\r\nContent-Length: %d\r\n%s\r\n%s", status, http.StatusText(status), len(body), extra, body)
}

// sink is a receiver on loopback that answers as a case wants, over plain HTTP/1.1 or TLS.
type sink struct {
	listener net.Listener
	url      string
	port     int
	bridge   *bridge // of a fixture; nil for none
	stop     chan struct{}
	work     sync.WaitGroup

	mu       sync.Mutex // guards what follows
	open     map[net.Conn]bool
	accepted int
	requests []*request
	arrived  chan struct{} // closed and replaced with each request
}

// answer200 is a receiver that is content.
func answer200(x *exchange) { x.reply(http.StatusOK, "", "ok") }

// newSink listens until the case ends. handle is called with every request, concurrently for those on
// different connections; when it returns, the next on the same connection is read. A nil handle resets
// every connection before anything is read.
func (t *trial) newSink(handle func(*exchange)) (*sink, error) { return t.listen(nil, handle) }

// newTLSSink is the same behind a certificate that nobody knows.
func (t *trial) newTLSSink(handle func(*exchange)) (*sink, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "unknown"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return t.listen(&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12}, handle)
}

func (t *trial) listen(secure *tls.Config, handle func(*exchange)) (*sink, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the plugin's requests: %w", err)
	}
	k := &sink{listener: l, port: l.Addr().(*net.TCPAddr).Port, stop: make(chan struct{}), open: map[net.Conn]bool{}, arrived: make(chan struct{})}
	k.url = "http://" + l.Addr().String()
	if secure != nil {
		k.url = "https://" + l.Addr().String()
	}
	k.work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			k.mu.Lock()
			k.accepted++
			n := k.accepted
			k.open[c] = true
			k.mu.Unlock()
			k.work.Go(func() {
				defer k.forget(c)
				if handle == nil {
					reset(c)
					return
				}
				if secure != nil {
					k.serve(tls.Server(c, secure), n, handle)
					return
				}
				k.serve(c, n, handle)
			})
		}
	})
	t.atEnd(k.close)
	return k, nil
}

func (k *sink) serve(c net.Conn, n int, handle func(*exchange)) {
	br := bufio.NewReader(c)
	for {
		hr, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		r := &request{conn: n, method: hr.Method, target: hr.RequestURI, host: hr.Host, header: hr.Header}
		r.body, r.unsound = io.ReadAll(hr.Body)
		k.mu.Lock()
		k.requests = append(k.requests, r)
		count := len(k.requests)
		close(k.arrived)
		k.arrived = make(chan struct{})
		k.mu.Unlock()
		handle(&exchange{request: r, Conn: c, sink: k, n: count, stop: k.stop})
	}
}

func (k *sink) forget(c net.Conn) {
	k.mu.Lock()
	delete(k.open, c)
	k.mu.Unlock()
	_ = c.Close()
}

func (k *sink) close() {
	close(k.stop)
	_ = k.listener.Close()
	k.mu.Lock()
	for c := range k.open {
		_ = c.Close()
	}
	k.mu.Unlock()
	k.work.Wait()
}

// seen are the requests so far and the number of connections.
func (k *sink) seen() ([]*request, int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]*request(nil), k.requests...), k.accepted
}

// connected is how many connections are open.
func (k *sink) connected() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.open)
}

// await waits until n requests have arrived.
func (k *sink) await(t *trial, n int, limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		k.mu.Lock()
		got, arrived := len(k.requests), k.arrived
		k.mu.Unlock()
		if got >= n {
			return nil
		}
		select {
		case <-arrived:
		case <-timer.C:
			return fmt.Errorf("%d of %d requests arrived within %v", got, n, limit)
		case <-t.ctx.Done():
			return t.ctx.Err()
		}
	}
}

// hang never answers.
func hang(x *exchange) { <-x.stop }

// reset ends the connection with a RST instead of a FIN.
func reset(c net.Conn) {
	if tc, ok := c.(*net.TCPConn); ok {
		_ = tc.SetLinger(0)
	}
	_ = c.Close()
}

// drip answers with a body that never ends, a chunk every few milliseconds.
func drip(x *exchange) {
	if _, err := io.WriteString(x, "HTTP/1.1 500 Internal Server Error\r\nTransfer-Encoding: chunked\r\n\r\n"); err != nil {
		return
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-x.stop:
			return
		case <-tick.C:
			if _, err := io.WriteString(x, "3\r\nabc\r\n"); err != nil {
				return
			}
		}
	}
}

// closedPort is one on loopback that nobody listens on.
func closedPort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	port := l.Addr().(*net.TCPAddr).Port
	return port, l.Close()
}

// oddBodies are what events may hold.
func oddBodies() map[string][]byte {
	return map[string][]byte{
		"empty":         {},
		"a NUL":         {0},
		"CRLF":          []byte("a\r\nb\nc\r"),
		"invalid UTF-8": {0xff, 0xfe, 0xc3, 0x28, 0x80},
		"JSON":          []byte(`{"n":1,"s":"é","deep":{"x":[1,2,3]}}`),
		"64 KiB":        bytes.Repeat([]byte{0, '\r', '\n', 0xff}, 16<<10),
		"1 MiB":         bytes.Repeat([]byte("0123456789abcdef"), 1<<16),
	}
}
