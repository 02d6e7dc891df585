package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

// certificates are the files of a CA and of one pair that it signed, good for servers and clients alike.
type certificates struct {
	ca, cert, key string
	pool          *x509.CertPool
}

func makeCertificates(t *testing.T) certificates {
	t.Helper()
	dir := t.TempDir()
	c := certificates{ca: filepath.Join(dir, "ca.pem"), cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem")}
	caKey, caDER := signed(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	key, der := signed(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, ca, caKey)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for path, block := range map[string]*pem.Block{
		c.ca:   {Type: "CERTIFICATE", Bytes: caDER},
		c.cert: {Type: "CERTIFICATE", Bytes: der},
		c.key:  {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.pool = x509.NewCertPool()
	c.pool.AddCert(ca)
	return c
}

// signed makes a key and its certificate; without a parent the certificate signs itself.
func signed(t *testing.T, template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

// TestTLS serves the public API with a certificate: a client that knows its CA gets through, one that
// speaks plain text does not.
func TestTLS(t *testing.T) {
	certs := makeCertificates(t)
	s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) { o.TLSCert, o.TLSKey = certs.cert, certs.key }})
	for name, c := range map[string]struct {
		creds credentials.TransportCredentials
		ok    bool
	}{
		"TLS":   {credentials.NewTLS(&tls.Config{RootCAs: certs.pool}), true},
		"plain": {insecure.NewCredentials(), false},
	} {
		conn, err := grpc.NewClient(s.Addr, grpc.WithTransportCredentials(c.creds))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err = grapnelv1.NewAdminServiceClient(conn).GetCluster(ctx, &grapnelv1.GetClusterRequest{})
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		_ = conn.Close()
	}
}

// TestExternalEtcdTLS keeps the configuration in an etcd that wants a client certificate.
func TestExternalEtcdTLS(t *testing.T) {
	certs := makeCertificates(t)
	etcd := &externalEtcd{t: t, dir: t.TempDir(), addr: freeAddr(t), certs: &certs}
	etcd.start()
	t.Cleanup(etcd.kill)
	s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) {
		o.EtcdEndpoints = []string{"https://" + etcd.addr}
		o.EtcdTLS = server.EtcdTLS{CAFile: certs.ca, CertFile: certs.cert, KeyFile: certs.key}
	}})
	deliverSigned(t, s)
}

// TestPublicAddressNeedsInsecure refuses to serve everybody by accident.
func TestPublicAddressNeedsInsecure(t *testing.T) {
	o := server.Options{DataDir: t.TempDir(), Listen: "0.0.0.0:0", AdminListen: "127.0.0.1:0"}
	if _, err := server.New(o); err == nil || !strings.Contains(err.Error(), "--insecure") {
		t.Errorf("a public address gave %v", err)
	}
	o.Insecure = true
	if _, err := server.New(o); err != nil {
		t.Errorf("with --insecure: %v", err)
	}
}
