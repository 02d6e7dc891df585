package httpplugin

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// relay is a forward proxy on loopback, in HTTP or SOCKS 5, with or without credentials.
type relay struct {
	url      string
	user     string            // with password, user:password; empty asks for none
	names    map[string]string // what the relay's own resolver knows
	accepted func() int

	mu    sync.Mutex
	asked []string // host:port of each CONNECT
}

func (r *relay) wants() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.asked)
}

// dial connects to what was asked for, and notes it.
func (r *relay) dial(want string) (net.Conn, error) {
	r.mu.Lock()
	r.asked = append(r.asked, want)
	r.mu.Unlock()
	if real, ok := r.names[want]; ok {
		want = real
	}
	return net.DialTimeout("tcp", want, 5*time.Second)
}

// pump carries bytes until both sides are done.
func pump(a net.Conn, buffered io.Reader, b net.Conn) {
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(b, buffered); _ = b.(*net.TCPConn).CloseWrite() }) // an answer may still come
	wg.Go(func() { _, _ = io.Copy(a, b); _, _ = a.Close(), b.Close() })
	wg.Wait()
}

// newRelay serves scheme http, https (with config) or socks5.
func newRelay(t *testing.T, scheme string, config *tls.Config) *relay {
	t.Helper()
	r := &relay{names: map[string]string{}}
	srv := serveRaw(t, func(_ int, c net.Conn) {
		defer c.Close()
		if config != nil {
			secure := tls.Server(c, config)
			defer secure.Close()
			if secure.Handshake() != nil {
				return
			}
			c = secure
		}
		if scheme == "socks5" {
			r.socks(c)
		} else {
			r.connect(c)
		}
	})
	r.url = scheme + strings.TrimSuffix(strings.TrimPrefix(srv.url, "http"), "/hook")
	r.accepted = srv.accepted
	return r
}

func (r *relay) connect(c net.Conn) {
	reader := bufio.NewReader(c)
	req, err := http.ReadRequest(reader)
	if err != nil {
		return
	}
	login := "Basic " + base64.StdEncoding.EncodeToString([]byte(r.user))
	switch {
	case req.Method != http.MethodConnect:
		_, _ = io.WriteString(c, "HTTP/1.1 405 Method Not Allowed\r\n\r\n")
		return
	case r.user != "" && req.Header.Get("Proxy-Authorization") != login:
		_, _ = io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n")
		return
	case r.user == "" && req.Header.Get("Proxy-Authorization") != "":
		_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
		return
	}
	to, err := r.dial(req.Host)
	if err != nil {
		_, _ = io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\nc4n4ry")
		return
	}
	_, _ = io.WriteString(c, "HTTP/1.1 200 Connection established\r\nVia: relay\r\n\r\n")
	pump(c, reader, to)
}

func (r *relay) socks(c net.Conn) {
	head := make([]byte, 2)
	_, _ = io.ReadFull(c, head)
	methods := make([]byte, head[1])
	_, _ = io.ReadFull(c, methods)
	method := byte(0)
	if r.user != "" {
		method = 2
	}
	if head[0] != 5 || !slices.Contains(methods, method) {
		_, _ = c.Write([]byte{5, 0xff})
		return
	}
	_, _ = c.Write([]byte{5, method})
	if method == 2 {
		_, _ = io.ReadFull(c, head)
		user := make([]byte, int(head[1])+1)
		_, _ = io.ReadFull(c, user)
		password := make([]byte, user[len(user)-1])
		_, _ = io.ReadFull(c, password)
		if string(user[:len(user)-1])+":"+string(password) != r.user {
			_, _ = c.Write([]byte{1, 1})
			return
		}
		_, _ = c.Write([]byte{1, 0})
	}
	request := make([]byte, 4)
	_, _ = io.ReadFull(c, request)
	var host string
	switch request[3] {
	case 1, 4:
		ip := make([]byte, map[byte]int{1: 4, 4: 16}[request[3]])
		_, _ = io.ReadFull(c, ip)
		addr, _ := netip.AddrFromSlice(ip)
		host = addr.String()
	case 3:
		_, _ = io.ReadFull(c, head[:1])
		name := make([]byte, head[0])
		_, _ = io.ReadFull(c, name)
		host = string(name)
	}
	port := make([]byte, 2)
	_, _ = io.ReadFull(c, port)
	to, err := r.dial(net.JoinHostPort(host, fmt.Sprint(binary.BigEndian.Uint16(port))))
	if err != nil {
		_, _ = c.Write([]byte{5, 5, 0, 1, 0, 0, 0, 0, 0, 0})
		return
	}
	_, _ = c.Write(append([]byte{5, 0, 0, 3, 5}, "relay\x00\x00"...)) // a bound name
	pump(c, c, to)
}

func through(r *relay, resolve string) map[string]any {
	return map[string]any{"proxy": map[string]any{"url": r.url, "resolve": resolve}}
}

// relays runs a test over each kind of proxy and each client.
func relays(t *testing.T, test func(t *testing.T, c client, r *relay, ca *authority)) {
	t.Helper()
	ca := newAuthority(t)
	for _, scheme := range []string{"http", "https", "socks5"} {
		t.Run(scheme, func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				c.roots = ca.roots
				var config *tls.Config
				if scheme == "https" {
					config = &tls.Config{Certificates: []tls.Certificate{ca.issue(t, time.Now().Add(time.Hour), "127.0.0.1")}}
				}
				test(t, c, newRelay(t, scheme, config), ca)
			})
		})
	}
}

func TestThroughAProxy(t *testing.T) {
	relays(t, func(t *testing.T, c client, r *relay, ca *authority) {
		var hosts []string
		handler := func(w http.ResponseWriter, req *http.Request) {
			body, _ := io.ReadAll(req.Body)
			if string(body) != `{"n":1}` || req.Header.Get("Proxy-Authorization") != "" || strings.HasPrefix(req.RequestURI, "http") {
				t.Errorf("received %s %v %q", req.RequestURI, req.Header, body)
			}
			hosts = append(hosts, req.Host)
			w.WriteHeader(http.StatusCreated)
		}
		plain := httptest.NewServer(http.HandlerFunc(handler))
		t.Cleanup(plain.Close)
		secure := serveTLS(t, &tls.Config{Certificates: []tls.Certificate{ca.issue(t, time.Now().Add(time.Hour), "127.0.0.1")}}, true, handler)
		for _, login := range []string{"", "me:c4n4ry:%"} {
			r.user = login
			h := c.harness(t)
			secrets := map[string][]string{}
			if login != "" {
				secrets["proxy_credentials"] = []string{login}
			}
			for _, uri := range []string{plain.URL, secure.URL} {
				before := len(r.wants())
				inst := h.Configure(secret(uri, through(r, "local"), secrets))
				for range 3 {
					resp, err := attempt(t, inst)
					if err != nil || resp.Status != http.StatusCreated {
						t.Fatalf("%s: %v, %v", uri, resp, err)
					}
					if want := uri[strings.Index(uri, "//")+2:]; resp.Peer != want || hosts[len(hosts)-1] != want {
						t.Errorf("peer %q, host %q, want %s", resp.Peer, hosts[len(hosts)-1], want)
					}
				}
				// A receiver that turns out to speak HTTP/2 costs one connection more.
				if n := len(r.wants()) - before; n > 2 || n > 1 && uri == plain.URL {
					t.Errorf("%d connections for three attempts", n)
				}
			}
		}
	})
}

func TestNamesBehindAProxy(t *testing.T) {
	relays(t, func(t *testing.T, c client, r *relay, ca *authority) {
		certificate, key := ca.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), "hooks.test", "localhost")
		pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
		if err != nil {
			t.Fatal(err)
		}
		srv := serveTLS(t, &tls.Config{Certificates: []tls.Certificate{pair}}, false, func(http.ResponseWriter, *http.Request) {})
		addr := srv.Listener.Addr().String()
		port := addr[strings.LastIndex(addr, ":"):]
		h := c.harness(t)

		// Here: what the proxy is asked for is the address that was checked.
		resp, err := attempt(t, h.Configure(secret("https://localhost"+port, through(r, "local"), nil)))
		if err != nil || resp.Status != 200 || resp.Peer != addr {
			t.Fatalf("%+v, %v", resp, err)
		}
		if wants := r.wants(); wants[len(wants)-1] != addr {
			t.Errorf("the proxy was asked for %v", wants)
		}

		// There: the name is handed on, and the receiver still has to prove that it is its.
		r.names["hooks.test"+port], r.names["other.test"+port] = addr, addr
		resp, err = attempt(t, h.Configure(secret("https://hooks.test"+port, through(r, "proxy"), nil)))
		if err != nil || resp.Status != 200 || resp.Peer != "hooks.test"+port {
			t.Fatalf("%+v, %v", resp, err)
		}
		_, err = attempt(t, h.Configure(secret("https://other.test"+port, through(r, "proxy"), nil)))
		if f := wantFailure(t, err, plugin.CodeTLS, plugin.NotSent); f.Message != "the certificate is not valid for the host" {
			t.Errorf("%+v", *f)
		}
		asked := len(r.wants())
		_, err = attempt(t, h.Configure(secret("https://no-such-name.invalid/", through(r, "local"), nil)))
		wantFailure(t, err, plugin.CodeDNS, plugin.NotSent)
		if len(r.wants()) != asked {
			t.Error("the proxy was asked for a name that does not exist")
		}
	})
}

func TestEgressBehindAProxy(t *testing.T) {
	relays(t, func(t *testing.T, c client, r *relay, _ *authority) {
		canary := serveRaw(t, func(int, net.Conn) {})
		port := canary.url[strings.LastIndex(canary.url, ":")+1 : strings.LastIndex(canary.url, "/")]
		proxyOnly := plugin.NewEgress([]netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")})
		deny := func(resolve, uri string, egress *plugin.Egress) {
			t.Helper()
			config := defaults()
			config.Proxy = Proxy{URL: r.url, Resolve: resolve}
			p := newPools()
			p.roots = c.roots
			t.Cleanup(p.closeIdle)
			i, err := newInstance(p, config, plugin.Target{URL: uri, Egress: egress})
			if err != nil {
				t.Fatal(err)
			}
			req := event()
			_, err = i.attempt(within(t, 10*time.Second), &req)
			f := wantFailure(t, err, plugin.CodeEgress, plugin.NotSent)
			if f.Source != plugin.SourcePolicy || f.Message != "blocked by egress policy" || f.Peer != "" {
				t.Errorf("%s, %s: %+v", resolve, uri, *f)
			}
		}
		// The receiver is denied, however it is written and whoever resolves it.
		for _, host := range []string{"127.0.0.2", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]"} {
			deny("local", "http://"+host+":"+port+"/", proxyOnly)
			deny("proxy", "http://"+host+":"+port+"/", proxyOnly)
		}
		for _, host := range []string{"localhost", "LocalHost.", "a.localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "10.0.0.0x1", "127.0.0.1."} {
			deny("proxy", "http://"+host+":"+port+"/", proxyOnly)
		}
		// A port that is closed for public addresses.
		deny("local", "http://1.1.1.1:22/", proxyOnly)
		if n := r.accepted(); n != 0 {
			t.Errorf("%d connections to the proxy for receivers that are denied", n)
		}
		// The proxy itself is denied.
		deny("local", "http://1.1.1.1/", plugin.NewEgress(nil))
		deny("proxy", "http://hooks.example.com/", plugin.NewEgress(nil))
		if n := r.accepted() + canary.accepted(); n != 0 {
			t.Errorf("%d connections in spite of the policy", n)
		}
	})
}

func TestProxyRefusals(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := lis.Addr().String()
	_ = lis.Close()
	relays(t, func(t *testing.T, c client, r *relay, _ *authority) {
		h := c.harness(t)
		_, err := attempt(t, h.Configure(secret("http://"+closed, through(r, "local"), nil)))
		f := wantFailure(t, err, plugin.CodeConnect, plugin.NotSent)
		if want := map[bool]string{true: "proxy: the receiver refused its connection", false: "proxy: it could not reach the receiver: 502 Bad Gateway"}[strings.HasPrefix(r.url, "socks5")]; f.Message != want {
			t.Errorf("%+v, want %q", *f, want)
		}
		r.user = "me:right"
		for name, secrets := range map[string]map[string][]string{
			"proxy: it wants credentials, and the slot proxy_credentials is empty": nil,
			"proxy: it refused the credentials":                                    {"proxy_credentials": {"me:c4n4ry"}},
		} {
			_, err := attempt(t, h.Configure(secret("http://"+closed, through(r, "local"), secrets)))
			if f := wantFailure(t, err, plugin.CodeConfig, plugin.NotSent); f.Message != name || f.Source != plugin.SourceEndpoint {
				t.Errorf("%+v, want %q", *f, name)
			}
		}
	})
}

// TestProxiesThatLie holds proxies that do not keep to their protocol against what must be said of them.
func TestProxiesThatLie(t *testing.T) {
	for _, tt := range []struct{ name, scheme, answer, code, message string }{
		{"another protocol", "http", "SSH-2.0-c4n4ry\r\n", plugin.CodeProtocol, "proxy: it did not answer in HTTP"},
		{"early words", "http", "HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", plugin.CodeProtocol, "proxy: it sent more than its answer to CONNECT"},
		{"endless header", "http", "HTTP/1.1 200 OK\r\n" + strings.Repeat("x-a: c4n4ry\r\n", 10_000), plugin.CodeConnect, "proxy: the connection was closed"},
		{"forbidden", "http", "HTTP/1.1 403 c4n4ry\r\n\r\n", plugin.CodeConnect, "proxy: it refused to connect to the receiver: 403 Forbidden"},
		{"hangs up", "http", "", plugin.CodeConnect, "proxy: the connection was closed"},
		{"no TLS", "https", "HTTP/1.1 200 OK\r\n\r\n", plugin.CodeTLS, "proxy: it does not speak TLS on this port"},
		{"no SOCKS", "socks5", "HTTP/1.1 200 OK\r\n\r\n", plugin.CodeProtocol, "proxy: it did not answer in SOCKS 5"},
		{"method not offered", "socks5", "\x05\x01", plugin.CodeProtocol, "proxy: it did not answer in SOCKS 5"},
		{"rules", "socks5", "\x05\x00\x05\x02\x00\x01", plugin.CodeConnect, "proxy: its rules do not allow a connection to the receiver"},
		{"odd address", "socks5", "\x05\x00\x05\x00\x00\x09", plugin.CodeProtocol, "proxy: it did not answer in SOCKS 5"},
		{"half an answer", "socks5", "\x05\x00\x05\x00", plugin.CodeConnect, "proxy: the connection was closed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				srv := serveRaw(t, func(_ int, conn net.Conn) {
					_, _ = conn.Read(make([]byte, 1)) // speaks when spoken to
					_, _ = io.WriteString(conn, tt.answer)
					_ = conn.(*net.TCPConn).CloseWrite()
					_, _ = io.Copy(io.Discard, conn)
				})
				r := &relay{url: tt.scheme + strings.TrimSuffix(strings.TrimPrefix(srv.url, "http"), "/hook")}
				_, err := attempt(t, c.harness(t).Configure(secret("http://127.0.0.1:1/", through(r, "local"), nil)))
				if f := wantFailure(t, err, tt.code, plugin.NotSent); f.Message != tt.message {
					t.Errorf("%+v, want %q", *f, tt.message)
				}
			})
		})
	}
	direct(t, func(t *testing.T, c client) {
		for _, scheme := range []string{"http", "https", "socks5"} {
			mute := serveRaw(t, func(int, net.Conn) {})
			r := &relay{url: scheme + strings.TrimSuffix(strings.TrimPrefix(mute.url, "http"), "/hook")}
			config := through(r, "local")
			config["connect_timeout"] = "100ms"
			start := time.Now()
			_, err := attempt(t, c.harness(t).Configure(secret("http://127.0.0.1:1/", config, nil)))
			f := wantFailureCode(t, err, map[bool]string{true: plugin.CodeTLS, false: plugin.CodeConnect}[scheme == "https"])
			if f.WireState != plugin.NotSent || time.Since(start) > 5*time.Second {
				t.Errorf("%s: %+v after %v", scheme, *f, time.Since(start))
			}
		}
	})
}

func TestTokensComeThroughTheProxy(t *testing.T) {
	relays(t, func(t *testing.T, c client, r *relay, _ *authority) {
		g := newGrants(t)
		in := g.instance(g.receiver.URL)
		config := in.Config.(map[string]any)
		config["proxy"] = map[string]any{"url": r.url}
		if resp, err := attempt(t, c.harness(t).Configure(in)); err != nil || resp.Status != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
		want := []string{g.endpoint.Listener.Addr().String(), g.receiver.Listener.Addr().String()}
		if !slices.Equal(r.wants(), want) {
			t.Errorf("the proxy was asked for %v, want %v", r.wants(), want)
		}
	})
}

func TestCheckProxy(t *testing.T) {
	h := plugintest.New(t, Kind())
	for url, want := range map[string]string{
		"http://proxy.example.com:8080":     "",
		"https://proxy.example.com":         "",
		"socks5://proxy.example.com:8080":   "",
		"http://proxy.example.com:3128":     "/config/proxy/url proxy.port",
		"http://10.0.0.1:3128":              "/config/proxy/url proxy.egress",
		"http://me:c4n4ry@proxy.example":    "/config/proxy/url proxy.url",
		"socks5h://proxy.example.com":       "/config/proxy/url proxy.url",
		"proxy.example.com:3128":            "/config/proxy/url proxy.url",
		"http://proxy.example.com/path":     "/config/proxy/url proxy.url",
		"http://proxy.example.com:0":        "/config/proxy/url proxy.url",
		"http://proxy example.com/c4n4ry\n": "/config/proxy/url proxy.url",
	} {
		problems := h.Validate(plugintest.Instance{Kind: "http", Config: map[string]any{"proxy": map[string]any{"url": url}}, Target: plugin.Target{
			URL: "https://hooks.example.com/",
		}})
		got := ""
		for _, p := range problems {
			got += p.Pointer + " " + p.Code
			if strings.Contains(p.Summary, "c4n4ry") {
				t.Errorf("%s: %q shows a secret", url, p.Summary)
			}
		}
		if got != want {
			t.Errorf("%s: %q, want %q", url, got, want)
		}
	}
	for value, want := range map[string]bool{"me:secret": true, "me:a:b": true, "me": false, ":x": false, "me:a\n": false, "me:" + strings.Repeat("a", 256): false} {
		if _, err := readProxyCredentials([]byte(value)); (err == nil) != want {
			t.Errorf("%q: %v", value, err)
		}
	}
}
