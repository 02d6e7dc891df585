package httpplugin

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

func TestEgressDeniesBeforeConnecting(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		canary := serveRaw(t, func(int, net.Conn) {})
		port := canary.url[strings.LastIndex(canary.url, ":")+1 : strings.LastIndex(canary.url, "/")]
		hosts := []string{
			"localhost", "LOCALHOST", "localhost.", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.0.0.1",
			"0177.0.0.1", "017700000001", "127.0.0.1.", "localhost.localdomain",
		}
		if name, err := os.Hostname(); err == nil {
			hosts = append(hosts, name)
		}
		for _, host := range hosts {
			for _, scheme := range []string{"http", "https"} {
				p := newPools()
				i, err := newInstance(p, defaults(), plugin.Target{URL: scheme + "://" + host + ":" + port + "/", Egress: plugin.NewEgress(nil)})
				if err != nil {
					continue // refused even earlier
				}
				req := event()
				_, err = i.attempt(within(t, 10*time.Second), &req)
				f, ok := err.(*plugin.Failure) //nolint:errorlint // bare by contract
				if !ok || f.WireState != plugin.NotSent || f.Code != plugin.CodeEgress && f.Code != plugin.CodeDNS {
					t.Errorf("%s://%s: %v", scheme, host, err)
					continue
				}
				if f.Code == plugin.CodeEgress && (f.Source != plugin.SourcePolicy || f.Message != "blocked by egress policy" || f.Peer != "") {
					t.Errorf("%s://%s: %+v says too much or blames the receiver", scheme, host, *f)
				}
			}
		}
		if n := canary.accepted(); n != 0 {
			t.Errorf("%d connections reached the canary", n)
		}
	})
}

func defaults() Config {
	return Config{Method: "POST", ConnectTimeout: 5e9, TLSTimeout: 5e9, HTTP2: true}
}

func TestProxyEnvironmentIsIgnored(t *testing.T) {
	proxy := serveRaw(t, func(int, net.Conn) {})
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"} {
		t.Setenv(name, proxy.url)
	}
	direct(t, func(t *testing.T, c client) {
		srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		t.Cleanup(srv.Close)
		if resp, err := attempt(t, c.instance(t, srv.URL, nil)); err != nil || resp.Status != 200 {
			t.Errorf("%v, %v", resp, err)
		}
	})
	if n := proxy.accepted(); n != 0 {
		t.Errorf("%d connections to the proxy", n)
	}
}

func TestConnectFailures(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		closed := lis.Addr().String()
		_ = lis.Close()
		_, err = attempt(t, c.instance(t, "http://"+closed, nil))
		if f := wantFailure(t, err, plugin.CodeConnect, plugin.NotSent); f.Message != "connection refused" || f.Source != plugin.SourceEndpoint {
			t.Errorf("%+v", *f)
		}
		_, err = attempt(t, c.instance(t, "https://no-such-name.invalid/", nil))
		if f := wantFailure(t, err, plugin.CodeDNS, plugin.NotSent); strings.Contains(f.Message, "invalid") {
			t.Errorf("%+v repeats what the resolver says", *f)
		}
	})
}

// authority signs certificates of test receivers.
type authority struct {
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	roots *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{key: newKey(t), roots: x509.NewCertPool()}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a.cert = parsed
	a.roots.AddCert(parsed)
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) issue(t *testing.T, until time.Time, ip string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: until.Add(-2 * time.Hour), NotAfter: until, IPAddresses: []net.IP{net.ParseIP(ip)},
	}, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// config is a receiver's on loopback.
func (a *authority) config(t *testing.T) *tls.Config {
	t.Helper()
	return &tls.Config{Certificates: []tls.Certificate{a.issue(t, time.Now().Add(time.Hour), "127.0.0.1")}}
}

// serveTLS serves https on loopback.
func serveTLS(t *testing.T, config *tls.Config, http2 bool, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	srv := httptest.NewUnstartedServer(handler)
	srv.TLS = config
	srv.EnableHTTP2 = http2
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

func TestTLSFailures(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	soon := time.Now().Add(time.Hour)
	tests := []struct {
		name    string
		config  *tls.Config
		message string
	}{
		{"expired", &tls.Config{Certificates: []tls.Certificate{ca.issue(t, time.Now().Add(-time.Minute), "127.0.0.1")}}, "the certificate has expired or is not valid yet"},
		{"wrong host", &tls.Config{Certificates: []tls.Certificate{ca.issue(t, soon, "127.0.0.2")}}, "the certificate is not valid for the host"},
		{"unknown authority", &tls.Config{Certificates: []tls.Certificate{stranger.issue(t, soon, "127.0.0.1")}}, "the certificate is by an unknown authority"},
		{"old version", &tls.Config{Certificates: []tls.Certificate{ca.issue(t, soon, "127.0.0.1")}, MaxVersion: tls.VersionTLS11}, "the receiver refused the TLS handshake: tls: protocol version not supported"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				c.roots = ca.roots
				srv := serveTLS(t, tt.config, false, func(http.ResponseWriter, *http.Request) { t.Error("a request arrived") })
				_, err := attempt(t, c.instance(t, srv.URL, nil))
				if f := wantFailure(t, err, plugin.CodeTLS, plugin.NotSent); f.Message != tt.message {
					t.Errorf("message %q, want %q", f.Message, tt.message)
				}
			})
		})
	}
	direct(t, func(t *testing.T, c client) {
		plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		t.Cleanup(plain.Close)
		_, err := attempt(t, c.instance(t, "https"+strings.TrimPrefix(plain.URL, "http"), nil))
		wantFailure(t, err, plugin.CodeTLS, plugin.NotSent)

		mute := serveRaw(t, func(int, net.Conn) {})
		_, err = attempt(t, c.instance(t, "https"+strings.TrimPrefix(mute.url, "http"), map[string]any{"tls_timeout": "100ms"}))
		wantFailure(t, err, plugin.CodeTLS, plugin.NotSent)
	})
}

func TestHTTPSVersions(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.issue(t, time.Now().Add(time.Hour), "127.0.0.1")
	for _, tt := range []struct {
		server, client bool
		want           string
	}{{true, true, "HTTP/2.0"}, {true, false, "HTTP/1.1"}, {false, true, "HTTP/1.1"}} {
		t.Run(fmt.Sprintf("server %v, client %v", tt.server, tt.client), func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				c.roots = ca.roots
				var conns atomic.Int32
				srv := serveTLS(t, &tls.Config{Certificates: []tls.Certificate{cert}}, tt.server, func(w http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body)
					if r.Proto != tt.want || string(body) != `{"n":1}` || r.Header.Get("User-Agent") != "grapnel/test" {
						t.Errorf("received %s with %v and %q, want %s", r.Proto, r.Header, body, tt.want)
					}
					conns.Add(1)
					w.WriteHeader(http.StatusCreated)
				})
				inst := c.instance(t, srv.URL, map[string]any{"http2": tt.client})
				for range 10 {
					if resp, err := attempt(t, inst); err != nil || resp.Status != http.StatusCreated {
						t.Fatalf("%v, %v", resp, err)
					}
				}
				if n := conns.Load(); n != 10 {
					t.Errorf("%d requests for 10 attempts", n)
				}
			})
		})
	}
}

func TestPoolsAreSharedByEqualSettings(t *testing.T) {
	p := newPools()
	make1 := func(c Config, uri string, allow ...netip.Prefix) *instance {
		t.Helper()
		i, err := newInstance(p, c, plugin.Target{URL: uri, Egress: plugin.NewEgress(allow)})
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	a, b := make1(defaults(), "https://a.example/x"), make1(defaults(), "https://a.example:443/y")
	if a.pool != b.pool || a.origin != b.origin {
		t.Error("two instances with equal settings and receiver do not share connections")
	}
	if other := make1(defaults(), "http://a.example/x"); a.pool != other.pool || a.origin == other.origin {
		t.Error("another scheme must share the pool and not the connections")
	}
	slow := defaults()
	slow.ConnectTimeout = 1e9
	if other := make1(slow, "https://a.example/x"); a.pool == other.pool {
		t.Error("other settings share a pool")
	}
	if other := make1(defaults(), "https://a.example/x", netip.MustParsePrefix("10.0.0.0/8")); a.pool == other.pool {
		t.Error("another egress policy shares a pool")
	}
}

func TestCheck(t *testing.T) {
	h := plugintest.New(t, Kind())
	tests := []struct {
		uri, code string
		warning   bool
	}{
		{"https://hooks.example.com/a?b=c", "", false},
		{"https://hooks.example.com:8443/", "", false},
		{"https://[2606:4700:4700::1111]/", "", false},
		{"http://hooks.example.com/", "uri.plaintext", true},
		{"https://hooks.example.com:9000/", "uri.port", true},
		{"https://127.0.0.1/", "uri.egress", false},
		{"https://[::ffff:10.0.0.1]/", "uri.egress", false},
		{"https://169.254.169.254/latest", "uri.egress", false},
		{"https://1.1.1.1:22/", "uri.egress", false},
		{"ftp://example.com/", "uri.invalid", false},
		{"/relative", "uri.invalid", false},
		{"https:///path", "uri.invalid", false},
		{"https:opaque", "uri.invalid", false},
		{"https://:443/", "uri.invalid", false},
		{"https://user:hunter2@example.com/", "uri.invalid", false},
		{"https://example.com/#part", "uri.invalid", false},
		{"https://example.com/#", "uri.invalid", false},
		{"https://example.com:0/", "uri.invalid", false},
		{"https://example.com:65536/", "uri.invalid", false},
		{"https://example.com:http/", "uri.invalid", false},
		{"https://ex ample.com/", "uri.invalid", false},
		{"https://b\u00fccher.example/", "uri.invalid", false},
		{"https://[fe80::1%25eth0]/", "uri.invalid", false},
		{"https://exa%6dple.com/", "uri.invalid", false},
		{"https://example.com/?a b", "uri.invalid", false},
		{"https://example.com/\r\nHost: x", "uri.invalid", false},
		{"", "uri.invalid", false},
	}
	for _, tt := range tests {
		t.Run(tt.uri, func(t *testing.T) {
			problems := h.Validate(plugintest.Instance{Kind: "http", Target: plugin.Target{URL: tt.uri}})
			if tt.code == "" {
				if len(problems) > 0 {
					t.Errorf("problems %+v, want none", problems)
				}
				return
			}
			if len(problems) != 1 || problems[0].Code != tt.code || problems[0].Warning != tt.warning || problems[0].Pointer != "/target/uri" {
				t.Fatalf("problems %+v, want one with code %s, warning %v", problems, tt.code, tt.warning)
			}
			if strings.Contains(problems[0].Summary, "hunter2") {
				t.Errorf("summary %q shows a password", problems[0].Summary)
			}
		})
	}
	for name, want := range map[string]bool{"x-fine": true, "authorization": true, "content-length": false, "Host": false, "a b": false} {
		problems := h.Validate(plugintest.Instance{Kind: "http", Target: plugin.Target{
			URL: "https://example.com/", Headers: []plugin.Header{{Name: name, Value: "v"}},
		}})
		if (len(problems) == 0) != want {
			t.Errorf("static header %q: %+v, want it taken: %v", name, problems, want)
		}
	}
	for _, config := range []map[string]any{{"method": "GET"}, {"connect_timeout": "1ms"}, {"verify": false}} {
		if problems := h.Validate(plugintest.Instance{Kind: "http", Config: config, Target: plugin.Target{URL: "https://example.com/"}}); len(problems) == 0 {
			t.Errorf("config %v is taken", config)
		}
	}
}
