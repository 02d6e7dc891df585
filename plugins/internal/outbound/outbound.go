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
	"sync/atomic"
	"time"

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

// Secure does the TLS handshake and closes conn when it fails. Errors are of type *Error.
func Secure(ctx context.Context, conn net.Conn, config *tls.Config) (*tls.Conn, error) {
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, &Error{Code: plugin.CodeTLS, Err: err}
	}
	return secure, nil
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
