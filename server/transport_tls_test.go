package server_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// authority is a CA of one test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, der := signed(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "an authority of our own"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, cert: cert, key: key, pem: pemText("CERTIFICATE", der), pool: x509.NewCertPool()}
	a.pool.AddCert(cert)
	return a
}

// issue makes a certificate for 127.0.0.1, and the key that goes with it, good for servers and clients.
func (a *authority) issue(name string) (certificate, key string) {
	a.t.Helper()
	private, der := signed(a.t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"hooks.example.com"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, a.key)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return pemText("CERTIFICATE", der), pemText("PRIVATE KEY", pkcs8)
}

// client is a certificate with its key, in one text; the key must not be seen again.
func (a *authority) client(s *stand, name string) string {
	a.t.Helper()
	certificate, key := a.issue(name)
	s.canary("the key of "+name, strings.Split(key, "\n")[2])
	return certificate + key
}

// serverConfig is a server's, which asks clients for a certificate of the authority as auth says.
func (a *authority) serverConfig(auth tls.ClientAuthType) *tls.Config {
	a.t.Helper()
	certificate, key := a.issue("server")
	pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
	if err != nil {
		a.t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: auth, ClientCAs: a.pool}
}

func pemText(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// secureServer is an https server that knows who has connected.
type secureServer struct {
	url string

	mu sync.Mutex
	// conns counts connections that got as far as a request, by the client certificate's name.
	conns map[string]map[string]bool
	// requests counts them by the same.
	requests map[string]int
}

// clientName is the common name of the request's client certificate.
func clientName(r *http.Request) string {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return ""
	}
	return r.TLS.PeerCertificates[0].Subject.CommonName
}

func serveSecurely(t *testing.T, config *tls.Config, http2 bool, h http.Handler) *secureServer {
	t.Helper()
	s := &secureServer{conns: map[string]map[string]bool{}, requests: map[string]int{}}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		name := clientName(r)
		if s.conns[name] == nil {
			s.conns[name] = map[string]bool{}
		}
		s.conns[name][r.RemoteAddr] = true
		s.requests[name]++
		s.mu.Unlock()
		h.ServeHTTP(w, r)
	}))
	srv.TLS, srv.EnableHTTP2 = config, http2
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that are refused are meant to be
	srv.StartTLS()
	t.Cleanup(srv.Close)
	s.url = srv.URL
	return s
}

// seen says how many requests came with a certificate, over how many connections.
func (s *secureServer) seen(name string) (requests, conns int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests[name], len(s.conns[name])
}

// clientCertificates delivers to a receiver that knows its senders by their certificates.
func clientCertificates(http2 bool) func(*testing.T, *stand) {
	return func(t *testing.T, s *stand) {
		ca := newAuthority(t)
		rcv := &servertest.Receiver{}
		srv := serveSecurely(t, ca.serverConfig(tls.RequireAndVerifyClientCert), http2, rcv)
		const inFlight, many = 3, 30
		trusting := map[string]string{"ca": ca.pem}
		alice := s.secret("http", "client_certificate", ca.client(s, "alice"))
		for id, certificate := range map[string]string{"alice": alice.GetSecret().GetName(), "bob": ca.client(s, "bob")} {
			s.over(id, srv.url+"/"+id, route{secrets: map[string]string{"ca": ca.pem, "client_certificate": certificate}},
				func(sub *grapnelv1.Subscription) { sub.MaxInFlight = inFlight })
		}
		for range many {
			s.publish("alice")
			s.publish("bob")
		}
		for _, id := range []string{"alice", "bob"} {
			s.succeed(id, many)
			s.once(id)
			// One that was opened before the receiver turned out to speak HTTP/2 is not used again.
			if requests, conns := srv.seen(id); requests != many || conns > inFlight+1 {
				t.Errorf("%s: %d requests over %d connections, want %d over %d at most", id, requests, conns, many, inFlight+1)
			}
		}
		for _, r := range rcv.Requests() {
			s.verified(r.Header, r.Body)
		}

		if a := alice.GetSecret().GetVersions()[0]; !strings.HasPrefix(a.GetAlgorithm(), "x509") || !strings.HasPrefix(a.GetPublicKey(), "-----BEGIN CERTIFICATE") || strings.Contains(a.GetPublicKey(), "PRIVATE") {
			t.Errorf("the certificate is shown as %v", a)
		}
		_, err := grapnelv1.NewSecretServiceClient(s.Conn).RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{
			Name: alice.GetSecret().GetName(), Value: ca.client(s, "alice the second"),
		})
		if err != nil {
			t.Fatal(err)
		}
		s.send("alice", many)
		s.once("alice")
		if requests, conns := srv.seen("alice the second"); requests != many || conns > inFlight+1 {
			t.Errorf("after the rotation: %d requests over %d connections with the new certificate, want %d over %d at most", requests, conns, many, inFlight+1)
		}

		certificate, key := ca.issue("carol")
		s.canary("the key of carol", strings.Split(key, "\n")[2])
		s.over("carol", srv.url, route{secrets: map[string]string{"ca": ca.pem, "client_certificate": certificate, "client_key": key}}, nil)
		s.send("carol", 1)
		s.once("carol")
		if requests, _ := srv.seen("carol"); requests != 1 {
			t.Errorf("%d requests with a key in a slot of its own", requests)
		}

		s.over("nobody", srv.url, route{secrets: trusting}, oneTry)
		stranger := newAuthority(t)
		s.over("stranger", srv.url, route{secrets: map[string]string{"ca": ca.pem, "client_certificate": stranger.client(s, "stranger")}}, oneTry)
		s.over("distrusted", srv.url, route{secrets: map[string]string{"ca": stranger.pem}}, oneTry)
		for id, want := range map[string]string{
			"nobody": "the slot client_certificate is empty", "stranger": "refused the client certificate",
			"distrusted": "the certificate is by an unknown authority",
		} {
			a := s.fail(id).GetLastAttempt()
			outcome := grapnelv1.Attempt_OUTCOME_UNREACHABLE
			if id != "distrusted" && strings.HasPrefix(a.GetError(), "reset: ") {
				outcome = grapnelv1.Attempt_OUTCOME_RETRYABLE // with TLS 1.3 the refusal may be lost on the way
			}
			if a.GetOutcome() != outcome || !strings.Contains(a.GetError(), want) || a.GetResponseCode() != 0 {
				t.Errorf("%s ended as %v: %q, want %v and %q", id, a.GetOutcome(), a.GetError(), outcome, want)
			}
		}
		if requests, _ := srv.seen(""); requests != 0 {
			t.Errorf("%d requests came without a certificate", requests)
		}
	}
}
