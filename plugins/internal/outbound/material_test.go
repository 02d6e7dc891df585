package outbound_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/grapnel/grapnel/plugins/internal/meter"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/plugins/internal/outbound/certtest"
)

// TestLargeKeysSignInTurn: a handshake with a large client key waits for those before it, no longer than it is wanted.
func TestLargeKeysSignInTurn(t *testing.T) {
	ca := certtest.New(t)
	key, err := rsa.GenerateKey(rand.Reader, 3200)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	gate := meter.NewGate()
	handshake := func(ctx context.Context) error {
		ours, theirs := net.Pipe()
		defer ours.Close()
		defer theirs.Close()
		server := tls.Server(theirs, &tls.Config{Certificates: []tls.Certificate{ca.Issue("localhost").Pair()}, ClientAuth: tls.RequireAnyClientCert})
		go server.Handshake() //nolint:errcheck // the client says how it went
		config, _ := outbound.Offering(&tls.Config{
			RootCAs: ca.Pool(), ServerName: "localhost", Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		}, gate)
		return tls.Client(ours, config).HandshakeContext(ctx)
	}
	leave, _ := gate.Enter(nil, 0)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := handshake(ctx); err == nil {
		t.Error("a handshake did not wait for the gate")
	}
	leave()
	if err := handshake(t.Context()); err != nil {
		t.Errorf("with an open gate: %v", err)
	}
}
