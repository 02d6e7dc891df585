package httpplugin

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

const day = 24 * time.Hour

// leaf makes a certificate for clients and servers, valid for names and for 127.0.0.1.
func (a *authority) leaf(t *testing.T, from, until time.Time, names ...string) (certificate, key string) {
	t.Helper()
	private := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: names[0]},
		NotBefore: from, NotAfter: until, DNSNames: names, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.cert, &private.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return block("CERTIFICATE", der), block("PRIVATE KEY", keyDER)
}

func block(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func (a *authority) pem() string { return block("CERTIFICATE", a.cert.Raw) }

// client makes a certificate with its key that is valid now.
func (a *authority) client(t *testing.T, name string) string {
	t.Helper()
	certificate, key := a.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(30*day), name)
	return certificate + key
}

// mutual serves https to clients that ca vouches for. It tells each request's client and counts
// connections.
func mutual(t *testing.T, ca *authority, version uint16, http2 bool) (uri string, clients func() []string, accepted *atomic.Int32) {
	t.Helper()
	certificate, key := ca.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), "hooks.test")
	pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var seen []string
	accepted = &atomic.Int32{}
	srv := serveTLS(t, &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: ca.roots, ClientAuth: tls.RequireAndVerifyClientCert, MaxVersion: version,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { accepted.Add(1); return nil, nil },
	}, http2, func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.TLS.PeerCertificates[0].Subject.CommonName)
	})
	return srv.URL, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return seen
	}, accepted
}

func TestClientCertificateIsPresented(t *testing.T) {
	ca := newAuthority(t)
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				uri, clients, accepted := mutual(t, ca, 0, http2)
				h := c.harness(t)
				alone, key := ca.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(day*30), "two slots")
				for want, secrets := range map[string]map[string][]string{
					"one slot":  {"ca": {ca.pem()}, "client_certificate": {ca.client(t, "one slot")}},
					"two slots": {"ca": {ca.pem()}, "client_certificate": {alone}, "client_key": {key}},
					// While a certificate is exchanged the newest is shown.
					"newest": {"ca": {ca.pem()}, "client_certificate": {ca.client(t, "newest"), ca.client(t, "older")}},
					// The certificate is new already, its key is not: still the old pair.
					"old pair": {
						"ca": {ca.pem()}, "client_certificate": {halfNew(t, ca), alone}, "client_key": {key},
					},
				} {
					before := accepted.Load()
					inst := h.Configure(secret(uri, nil, secrets))
					for range 3 {
						if resp, err := attempt(t, inst); err != nil || resp.Status != 200 {
							t.Fatalf("%s: %v, %v", want, resp, err)
						}
					}
					if want == "old pair" {
						want = "two slots"
					}
					if seen := clients(); seen[len(seen)-1] != want || seen[len(seen)-3] != want {
						t.Errorf("the receiver saw %v, want %s", seen, want)
					}
					// The first attempt of a receiver with HTTP/2 dials once more.
					if n := accepted.Load() - before; n > 2 || n > 1 && !http2 {
						t.Errorf("%s: %d connections for three attempts", want, n)
					}
				}
			})
		})
	}
}

func halfNew(t *testing.T, ca *authority) string {
	certificate, _ := ca.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(day), "half new")
	return certificate
}

func TestConnectionsBelongToOneCredential(t *testing.T) {
	ca := newAuthority(t)
	direct(t, func(t *testing.T, c client) {
		uri, clients, accepted := mutual(t, ca, 0, false)
		h := c.harness(t)
		configure := func(secrets map[string][]string, config any) *plugintest.Configured {
			secrets["ca"] = []string{ca.pem()}
			return h.Configure(secret(uri, config, secrets))
		}
		red, blue := ca.client(t, "red"), ca.client(t, "blue")
		bearer := map[string]any{"auth": map[string]any{"type": "bearer"}}
		instances := []*plugintest.Configured{
			configure(map[string][]string{"client_certificate": {red}}, nil),
			configure(map[string][]string{"client_certificate": {blue}}, nil),
			configure(map[string][]string{"client_certificate": {red}, "token": {"token-1"}}, bearer),
			configure(map[string][]string{"client_certificate": {red}, "token": {"token-2"}}, bearer),
			configure(map[string][]string{"client_certificate": {red}}, nil), // as the first: another subscription
		}
		for range 10 {
			for n, inst := range instances {
				if resp, err := attempt(t, inst); err != nil || resp.Status != 200 {
					t.Fatalf("%v, %v", resp, err)
				}
				want := "red"
				if n == 1 {
					want = "blue"
				}
				if seen := clients(); seen[len(seen)-1] != want {
					t.Fatalf("instance %d came as %s, want %s", n, seen[len(seen)-1], want)
				}
			}
		}
		if n := accepted.Load(); n != 4 {
			t.Errorf("%d connections for 50 attempts with 4 credentials, want 4", n)
		}
	})
}

func TestClientCertificateFailures(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	past, key := ca.leaf(t, time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour), "past")
	future, futureKey := ca.leaf(t, time.Now().Add(24*time.Hour), time.Now().Add(48*time.Hour), "future")
	for version, number := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(version, func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				uri, clients, _ := mutual(t, ca, number, false)
				h := c.harness(t)
				for _, tt := range []struct{ name, certificate, message, lost string }{
					{"expired", past + key, "the client certificate expired on ", ""},
					{"not yet valid", future + futureKey, "the client certificate is not valid before ", ""},
					{
						"none", "", "the receiver wants a client certificate, and the slot client_certificate is empty",
						"the receiver closed the connection without an answer; it had asked for a client certificate, and the slot client_certificate is empty",
					},
					{
						"unknown", stranger.client(t, "stranger"), "the receiver refused the client certificate: ",
						"the receiver closed the connection without an answer; it may have refused the client certificate",
					},
				} {
					secrets := map[string][]string{"ca": {ca.pem()}}
					if tt.certificate != "" {
						secrets["client_certificate"] = []string{tt.certificate}
					}
					_, err := attempt(t, h.Configure(secret(uri, nil, secrets)))
					code := plugin.CodeTLS
					if f, ok := err.(*plugin.Failure); ok && version == "1.3" && f.Code == plugin.CodeReset { //nolint:errorlint // bare by contract
						// The refusal comes after the handshake, and the end of the connection may overtake it.
						code, tt.message = plugin.CodeReset, tt.lost
					}
					f := wantFailureCode(t, err, code)
					if !strings.HasPrefix(f.Message, tt.message) || f.Source != plugin.SourceEndpoint {
						t.Errorf("%s: %+v, want %q", tt.name, *f, tt.message)
					}
				}
				if seen := clients(); len(seen) > 0 {
					t.Errorf("requests arrived from %v", seen)
				}
			})
		})
	}
}

func TestTrustAndNames(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	direct(t, func(t *testing.T, c client) {
		certificate, key := ca.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), "hooks.test")
		pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
		if err != nil {
			t.Fatal(err)
		}
		var asked atomic.Value
		srv := serveTLS(t, &tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: tls.VersionTLS12, GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			asked.Store(hello.ServerName)
			return nil, nil
		}}, false, func(http.ResponseWriter, *http.Request) {})
		h := c.harness(t)
		for _, tt := range []struct {
			name    string
			config  map[string]any
			ca      []string
			message string // empty when all is well
		}{
			{"own authority", map[string]any{}, []string{ca.pem()}, ""},
			{"one of several", map[string]any{}, []string{other.pem() + ca.pem()}, ""},
			{"authority being exchanged", map[string]any{}, []string{other.pem(), ca.pem()}, ""},
			{"another authority", map[string]any{}, []string{other.pem()}, "the certificate is by an unknown authority"},
			{"server name", map[string]any{"server_name": "hooks.test"}, []string{ca.pem()}, ""},
			{"wrong server name", map[string]any{"server_name": "other.test"}, []string{ca.pem()}, "the certificate is not valid for the host"},
			{"newer TLS", map[string]any{"min_version": "1.3"}, []string{ca.pem()}, "the receiver refused the TLS handshake: tls: protocol version not supported"},
		} {
			resp, err := attempt(t, h.Configure(secret(srv.URL, map[string]any{"tls": tt.config}, map[string][]string{"ca": tt.ca})))
			if tt.message == "" {
				if err != nil || resp.Status != 200 {
					t.Errorf("%s: %v, %v", tt.name, resp, err)
				}
				if name, _ := tt.config["server_name"].(string); asked.Load() != name {
					t.Errorf("%s: asked for %q, want %q", tt.name, asked.Load(), name)
				}
				continue
			}
			if f := wantFailure(t, err, plugin.CodeTLS, plugin.NotSent); f.Message != tt.message {
				t.Errorf("%s: %q, want %q", tt.name, f.Message, tt.message)
			}
		}
	})
}

func TestCertificateFormats(t *testing.T) {
	ca := newAuthority(t)
	certificate, key := ca.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), "a")
	other, otherKey := ca.leaf(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), "b")
	for _, tt := range []struct {
		name  string
		read  func([]byte) (plugin.SecretInfo, error)
		value string
		want  string // in the error; empty when it is taken
	}{
		{"certificate and key", outbound.ReadClientCertificate, certificate + key, ""},
		{"key first", outbound.ReadClientCertificate, key + certificate, ""},
		{"chain", outbound.ReadClientCertificate, certificate + ca.pem() + key, ""},
		{"certificate alone", outbound.ReadClientCertificate, "subject: a\n" + certificate, ""},
		{"wrong order", outbound.ReadClientCertificate, ca.pem() + certificate, "before its chain"},
		{"another's key", outbound.ReadClientCertificate, certificate + otherKey, "does not belong"},
		{"two keys", outbound.ReadClientCertificate, certificate + key + otherKey, "two private keys"},
		{"key alone", outbound.ReadClientCertificate, key, "no certificate"},
		{"no PEM", outbound.ReadClientCertificate, "hunter2", "no certificate"},
		{"broken certificate", outbound.ReadClientCertificate, block("CERTIFICATE", []byte("hunter2")), "certificate 1 cannot be read"},
		{"broken key", outbound.ReadClientCertificate, certificate + block("PRIVATE KEY", []byte("hunter2")), "private key is not taken"},
		{"encrypted key", outbound.ReadClientCertificate, certificate + block("ENCRYPTED PRIVATE KEY", []byte("hunter2")), "passphrase"},
		{"cut off", outbound.ReadClientCertificate, certificate + key[:len(key)-20], "broken off"},
		{"something else", outbound.ReadClientCertificate, block("CERTIFICATE REQUEST", []byte("hunter2")), "neither"},
		{"key", outbound.ReadClientKey, key, ""},
		{"key with certificate", outbound.ReadClientKey, certificate + key, "slot client_certificate"},
		{"no key", outbound.ReadClientKey, "hunter2", "no private key"},
		{"huge key", outbound.ReadClientCertificate, certificate + hugeKey(t), "at most 4096"},
		{"huge key alone", outbound.ReadClientKey, hugeKey(t), "at most 4096"},
		{"long chain", outbound.ReadClientCertificate, strings.Repeat(certificate, 11) + key, "more than 10 certificates"},
		{"many authorities", outbound.ReadCA, strings.Repeat(ca.pem(), 101), "more than 100 certificates"},
		{"authorities", outbound.ReadCA, ca.pem() + other, ""},
		{"authority with key", outbound.ReadCA, ca.pem() + key, "private key in it"},
		{"no authority", outbound.ReadCA, "", "no certificate"},
	} {
		_, err := tt.read([]byte(tt.value))
		switch {
		case tt.want == "" && err != nil, tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		case err != nil && (strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "BEGIN")):
			t.Errorf("%s: %v shows the value", tt.name, err)
		}
	}
	info, err := outbound.ReadClientCertificate([]byte(certificate + key))
	if err != nil || !strings.HasPrefix(info.Algorithm, "x509, not after 20") || info.PublicKey != certificate || info.KeyID == "" {
		t.Errorf("%+v, %v", info, err)
	}
	// What a secret holds is shown to nobody, and here that is the certificate.
	info, err = outbound.ReadClientCertificate([]byte(certificate))
	if err != nil || info.PublicKey != "" || info.KeyID == "" {
		t.Errorf("without a key: %+v, %v", info, err)
	}
}

// hugeKey is an RSA key of 19630 bits, with which a handshake would take seconds: two Mersenne primes.
func hugeKey(t *testing.T) string {
	t.Helper()
	mersenne := func(n uint) *big.Int { return new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), n), big.NewInt(1)) }
	one, e, p, q := big.NewInt(1), big.NewInt(65537), mersenne(9689), mersenne(9941)
	p1, q1 := new(big.Int).Sub(p, one), new(big.Int).Sub(q, one)
	d := new(big.Int).ModInverse(e, new(big.Int).Mul(p1, q1))
	der, err := asn1.Marshal(struct {
		Version                    int
		N                          *big.Int
		E                          int
		D, P, Q, ExpP, ExpQ, Coeff *big.Int
	}{0, new(big.Int).Mul(p, q), 65537, d, p, q, new(big.Int).Mod(d, p1), new(big.Int).Mod(d, q1), new(big.Int).ModInverse(q, p)})
	if err != nil {
		t.Fatal(err)
	}
	return block("RSA PRIVATE KEY", der)
}

func TestCheckCertificates(t *testing.T) {
	ca := newAuthority(t)
	h := plugintest.New(t, Kind())
	past, pastKey := ca.leaf(t, time.Now().Add(-48*time.Hour), time.Now().Add(-time.Hour), "past")
	soon, soonKey := ca.leaf(t, time.Now().Add(-48*time.Hour), time.Now().Add(time.Hour), "soon")
	for _, tt := range []struct {
		name, uri string
		secrets   map[string][]string
		want      string
		warning   bool
	}{
		{"good", "https://hooks.example.com/", map[string][]string{"client_certificate": {ca.client(t, "a")}}, "", false},
		{"expired", "https://hooks.example.com/", map[string][]string{"client_certificate": {past + pastKey}}, "/secrets/client_certificate certificate.expired", true},
		{"newest has expired", "https://hooks.example.com/", map[string][]string{"client_certificate": {past + pastKey, ca.client(t, "a")}}, "/secrets/client_certificate certificate.expired", true},
		{"expires soon", "https://hooks.example.com/", map[string][]string{"client_certificate": {soon + soonKey}}, "/secrets/client_certificate certificate.expires", true},
		{"no key", "https://hooks.example.com/", map[string][]string{"client_certificate": {soon}}, "/secrets/client_certificate certificate.key", false},
		{"strange key", "https://hooks.example.com/", map[string][]string{"client_certificate": {soon}, "client_key": {pastKey}}, "/secrets/client_certificate certificate.key", false},
		{"key alone", "https://hooks.example.com/", map[string][]string{"client_key": {pastKey}}, "/secrets/client_key secret.unused", true},
		{"malformed", "https://hooks.example.com/", map[string][]string{"client_certificate": {"c4n4ry"}}, "/secrets/client_certificate secret.malformed", false},
	} {
		problems := h.Validate(plugintest.Instance{Kind: "http", Secrets: tt.secrets, Target: plugin.Target{URL: tt.uri}})
		got := ""
		for _, p := range problems {
			got += p.Pointer + " " + p.Code
			if p.Warning != tt.warning || strings.Contains(p.Summary, "c4n4ry") {
				t.Errorf("%s: %+v", tt.name, p)
			}
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestPoolsOfOldCredentialsGo(t *testing.T) {
	p := newPools()
	for n := range 2000 {
		config := defaults()
		config.Auth.Type, config.Token = authBearer, plugin.NewSecret(fmt.Sprint("token-", n))
		if _, err := newInstance(p, config, plugin.Target{URL: "https://hooks.example.com/"}); err != nil {
			t.Fatal(err)
		}
		if n%200 == 0 {
			runtime.GC()
		}
	}
	if n := len(p.by); n > 1000 {
		t.Errorf("%d pools are kept for one instance", n)
	}
	for s := range p.by {
		if text := fmt.Sprintf("%+v", s); strings.Contains(text, "token-") {
			t.Errorf("the pool's key %s shows a credential", text)
		}
	}
}
