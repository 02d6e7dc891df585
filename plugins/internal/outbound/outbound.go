// Package outbound is what the transports that keep long-lived connections have in common: connections
// dialled under the egress policy, shared by all instances with the same settings and closed when nobody
// needs them, TLS material out of secret slots, and words for what went wrong on the way.
//
// It guarantees that the egress policy is asked about the very address that is connected to, after names
// are resolved, that no proxy of the environment is used, that attempts which wait for one connection
// share one dial, and that no text of it names an address or repeats what a receiver sent. It knows no
// protocol: that is the transports'.
package outbound

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Error is a connection that did not come about; nothing was sent. Err may name addresses: it is for the
// program, NotConnected is for people.
type Error struct {
	// Code is one of plugin.CodeDNS, CodeConnect, CodeTLS, CodeProtocol, CodeConfig, CodeEgress and CodeShortage.
	Code string
	Err  error
	// Message is said instead of what Err gives away; empty leaves it to Err.
	Message string
	// Proxy says that it is the connection to the proxy that failed, and not the one to the receiver.
	Proxy bool
}

// Error is the text of Err.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// Secure does the TLS handshake and closes conn when it fails. What it computes, keys of the client's included, it does in
// its turn at the gate, which it leaves while it waits for the other side. Errors are of type *Error.
func Secure(ctx context.Context, conn net.Conn, config *tls.Config, turns *gate.Gate) (*tls.Conn, error) {
	shaking := &shaking{Conn: conn, turns: turns, given: ctx.Done()}
	secure := tls.Client(shaking, config)
	err := shaking.enter()
	if err == nil {
		err = secure.HandshakeContext(ctx)
	}
	shaking.rest()
	shaking.over = true
	if err != nil {
		_ = conn.Close()
		return nil, &Error{Code: plugin.CodeTLS, Err: err}
	}
	return secure, nil
}

// longestTurn is how long one handshake keeps the others out, where it may be waiting for something itself.
const longestTurn = 20 * time.Millisecond

// shaking is a connection during a handshake, and then the connection itself.
type shaking struct {
	net.Conn
	turns *gate.Gate
	given <-chan struct{}
	leave func() // nil while it has no turn
	over  bool
}

// NetConn returns the connection below.
func (s *shaking) NetConn() net.Conn { return s.Conn }

// Read leaves the gate, and enters it again with what has come.
func (s *shaking) Read(p []byte) (int, error) {
	if s.over {
		return s.Conn.Read(p)
	}
	s.rest()
	n, err := s.Conn.Read(p)
	if n > 0 {
		if failed := s.enter(); failed != nil {
			return 0, failed
		}
	}
	return n, err
}

func (s *shaking) enter() error {
	leave, entered := s.turns.Enter(s.given, longestTurn, "")
	if !entered {
		return os.ErrDeadlineExceeded
	}
	s.leave = leave
	return nil
}

func (s *shaking) rest() {
	if s.leave != nil {
		s.leave()
		s.leave = nil
	}
}

// Watched is a connection that remembers when the other side was last heard and how reading ended.
type Watched struct {
	net.Conn
	heard atomic.Int64 // nanoseconds since made
	made  time.Time
	broke atomic.Pointer[error]
}

// Watch wraps conn.
func Watch(conn net.Conn) *Watched { return &Watched{Conn: conn, made: time.Now()} }

// Read reads, and takes note.
func (w *Watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.heard.Store(int64(time.Since(w.made)))
	}
	if err != nil {
		w.broke.CompareAndSwap(nil, &err)
	}
	return n, err
}

// HeardSince reports whether a byte has arrived after t. A connection that an attempt has waited on in
// vain without one is likely dead, though nobody has said so.
func (w *Watched) HeardSince(t time.Time) bool {
	return w.made.Add(time.Duration(w.heard.Load())).After(t)
}

// Broke is the first error of reading, nil while there was none.
func (w *Watched) Broke() error {
	if err := w.broke.Load(); err != nil {
		return *err
	}
	return nil
}

// Peer is the host:port connected to.
func (w *Watched) Peer() string { return w.RemoteAddr().String() }
