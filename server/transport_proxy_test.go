package server_test

import (
	"bufio"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

// relay is a forward proxy that wants user and password.
type relay struct {
	url, login string

	mu    sync.Mutex
	asked []string // host:port of each tunnel
	conns []net.Conn
}

// startRelay serves http (CONNECT) or socks5 on host, a loopback address.
func startRelay(t *testing.T, scheme, host, login string) *relay {
	t.Helper()
	lis, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{url: scheme + "://" + lis.Addr().String(), login: login}
	speak := map[string]func(io.ReadWriter) string{"http": r.httpConnect, "socks5": r.socks5}[scheme]
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			r.keep(c)
			wg.Go(func() { r.serve(c, speak) })
		}
	})
	t.Cleanup(func() {
		_ = lis.Close()
		r.mu.Lock()
		for _, c := range r.conns {
			_ = c.Close()
		}
		r.mu.Unlock()
		wg.Wait()
	})
	return r
}

func (r *relay) keep(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conns = append(r.conns, c)
}

func (r *relay) wants() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.asked)
}

// serve has speak agree where the connection goes, and carries it there.
func (r *relay) serve(c net.Conn, speak func(io.ReadWriter) string) {
	defer func() { _ = c.Close() }()
	to := speak(c)
	if to == "" {
		return
	}
	r.mu.Lock()
	r.asked = append(r.asked, to)
	r.mu.Unlock()
	out, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	r.keep(out)
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(out, c); _ = out.Close() })
	_, _ = io.Copy(c, out)
	_ = c.Close()
	wg.Wait()
}

// httpConnect is RFC 9110, section 9.3.6. It returns where to, empty when it has refused.
func (r *relay) httpConnect(c io.ReadWriter) string {
	// A client that waits for the answer has sent nothing behind its header.
	req, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return ""
	}
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(r.login))
	if req.Method != http.MethodConnect || req.Header.Get("Proxy-Authorization") != want {
		_, _ = io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n")
		return ""
	}
	_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
	return req.Host
}

// socks5 is RFC 1928 with the user and password of RFC 1929.
func (r *relay) socks5(c io.ReadWriter) string {
	read := func(n int) []byte {
		b := make([]byte, n)
		_, _ = io.ReadFull(c, b) // what is missing is zero, and refused
		return b
	}
	head := read(2)
	if methods := read(int(head[1])); head[0] != 5 || !slices.Contains(methods, 2) {
		_, _ = c.Write([]byte{5, 0xff})
		return ""
	}
	_, _ = c.Write([]byte{5, 2})
	user := string(read(int(read(2)[1])))
	password := string(read(int(read(1)[0])))
	if user+":"+password != r.login {
		_, _ = c.Write([]byte{1, 1})
		return ""
	}
	_, _ = c.Write([]byte{1, 0})
	host := ""
	switch request := read(4); request[3] {
	case 1:
		host = netip.AddrFrom4([4]byte(read(4))).String()
	case 3:
		host = string(read(int(read(1)[0])))
	default:
		return ""
	}
	port := binary.BigEndian.Uint16(read(2))
	_, _ = c.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

func forwardProxies(t *testing.T, s *stand) {
	ca := newAuthority(t)
	for _, scheme := range []string{"http", "socks5"} {
		login := "me:" + s.canary("a proxy's password", "c4n4ry-proxy-"+rand.Text())
		r := startRelay(t, scheme, "127.0.0.1", login)
		plain, secure := servertest.NewReceiver(t, nil), &servertest.Receiver{}
		srv := serveSecurely(t, ca.serverConfig(0), false, secure)
		through := route{config: map[string]any{"proxy": map[string]any{"url": r.url}}, secrets: map[string]string{"proxy_credentials": login}}
		s.over(scheme+"-plain", plain.URL, through, func(sub *grapnelv1.Subscription) { sub.MaxInFlight = 2 })
		through.secrets["ca"] = ca.pem
		s.over(scheme+"-tls", srv.url, through, func(sub *grapnelv1.Subscription) { sub.MaxInFlight = 2 })
		for id, rcv := range map[string]*servertest.Receiver{scheme + "-plain": plain, scheme + "-tls": secure} {
			s.send(id, 10)
			s.once(id)
			for _, q := range rcv.Requests() {
				s.verified(q.Header, q.Body)
			}
		}
		asked := map[string]int{}
		for _, host := range r.wants() {
			asked[host]++
		}
		for _, uri := range []string{plain.URL, srv.url} {
			host := uri[strings.Index(uri, "//")+2:]
			if n := asked[host]; n < 1 || n > 2 {
				t.Errorf("%s: ten deliveries to %s over %d tunnels, want 1 or 2; asked for %v", scheme, host, n, asked)
			}
		}
		wrong := route{config: through.config, secrets: map[string]string{"proxy_credentials": "me:wrong"}}
		s.over(scheme+"-wrong", plain.URL, wrong, oneTry)
		if a := s.fail(scheme + "-wrong").GetLastAttempt(); !strings.HasSuffix(a.GetError(), "proxy: it refused the credentials") {
			t.Errorf("%s, wrong password: %v: %q", scheme, a.GetOutcome(), a.GetError())
		}
		for _, name := range []string{"local", "proxy"} {
			id := scheme + "-forbidden-" + name
			config := map[string]any{"proxy": map[string]any{"url": r.url, "resolve": name}}
			if text := s.refuses(id, "http://10.0.0.1/", route{config: config, secrets: through.secrets}, nil); !strings.Contains(text, "subscription.uri") || !strings.Contains(text, "egress policy") {
				t.Errorf("%s: %s", id, text)
			}
		}
	}
}

// TestEgressBehindProxy allows the proxy's address and not the receiver's: a proxy is no way around.
func TestEgressBehindProxy(t *testing.T) {
	t.Parallel()
	whole := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) {
		o.EgressAllow = []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}
	}})
	s := (&lab{server: whole, canaries: map[string]string{}}).stand(t, "acme")
	rcv := servertest.NewReceiver(t, nil)
	uri := strings.Replace(rcv.URL, "127.0.0.1", "localhost", 1)
	for _, scheme := range []string{"http", "socks5"} {
		r := startRelay(t, scheme, "127.0.0.2", "me:secret")
		for _, resolve := range []string{"local", "proxy"} {
			id := scheme + "-" + resolve
			s.over(id, uri, route{
				config:  map[string]any{"proxy": map[string]any{"url": r.url, "resolve": resolve}},
				secrets: map[string]string{"proxy_credentials": "me:secret"},
			}, oneTry)
			d := s.fail(id)
			// Only a proxy that resolves has been refused for good: there the name itself means this machine.
			want := grapnelv1.Delivery_STATE_EXHAUSTED
			if resolve == "proxy" {
				want = grapnelv1.Delivery_STATE_REJECTED
			}
			if a := d.GetLastAttempt(); d.GetState() != want || !strings.Contains(a.GetError(), "egress policy") {
				t.Errorf("%s ended as %v: %v: %q", id, d.GetState(), a.GetOutcome(), a.GetError())
			}
		}
		if wants := r.wants(); len(wants) > 0 {
			t.Errorf("%s: the proxy was asked for %v", scheme, wants)
		}
	}
	if n := len(rcv.Requests()); n != 0 {
		t.Errorf("%d requests reached a forbidden address", n)
	}
}
