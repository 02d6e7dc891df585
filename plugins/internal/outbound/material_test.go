package outbound_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/plugins/internal/outbound/certtest"
)

// TestHandshakesTakeTurns: what a handshake computes waits for its turn, no longer than it is wanted, and nobody waits for
// one that waits for its receiver.
func TestHandshakesTakeTurns(t *testing.T) {
	ca := certtest.New(t)
	config := &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}
	turns := gate.New()
	places := max(1, runtime.GOMAXPROCS(0)/2)
	handshake := func(ctx context.Context, answers bool) error {
		ours, theirs := net.Pipe()
		t.Cleanup(func() { _ = ours.Close(); _ = theirs.Close() })
		if answers {
			server := tls.Server(theirs, &tls.Config{Certificates: []tls.Certificate{ca.Issue("localhost").Pair()}})
			go server.Handshake() //nolint:errcheck // the client says how it went
		} else {
			go io.Copy(io.Discard, theirs) //nolint:errcheck // nor does this
		}
		_, err := outbound.Secure(ctx, ours, config, turns)
		return err
	}
	var leave []func()
	for range places {
		l, _ := turns.Enter(nil, 0, "")
		leave = append(leave, l)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var failed *outbound.Error
	if err := handshake(ctx, true); !errors.As(err, &failed) || !outbound.IsTimeout(failed.Err) {
		t.Errorf("a handshake that had no turn: %v", err)
	}
	for _, l := range leave {
		l()
	}
	silent, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	for range places + 1 {
		go func() { ended <- handshake(silent, false) }()
	}
	for range 2 * places {
		if err := handshake(t.Context(), true); err != nil {
			t.Errorf("beside receivers that say nothing: %v", err)
		}
	}
	stop()
	for range places + 1 {
		if err := <-ended; err == nil {
			t.Error("a receiver that says nothing shook hands")
		}
	}
}
