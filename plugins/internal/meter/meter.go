// Package meter bounds what is read of an HTTP/2 connection, of which each library reads all that comes, at once.
package meter

import (
	"errors"
	"net"
	"sync/atomic"
)

// errFlood ends a connection on which more came than answers need. HTTP/2 has frames that nothing bounds, PING and
// SETTINGS among them, and reading them costs as much as the server likes.
var errFlood = errors.New("the receiver sends without end")

// Conn is a connection of which, from Begin on, no more is read than was granted. Its methods may be called
// concurrently.
type Conn struct {
	net.Conn
	grant int64
	on    atomic.Bool
	left  atomic.Int64
}

// New wraps conn. The grant, in bytes, is what may come for one request: what the library lets a stream send before it
// is read, a header, and the frames around them.
func New(conn net.Conn, grant int64) *Conn { return &Conn{Conn: conn, grant: grant} }

// NetConn returns the connection below.
func (m *Conn) NetConn() net.Conn { return m.Conn }

// Read ends with an error when more has come than was granted.
func (m *Conn) Read(p []byte) (int, error) {
	if m.on.Load() && m.left.Load() <= 0 {
		return 0, errFlood
	}
	n, err := m.Conn.Read(p)
	m.left.Add(-int64(n))
	return n, err
}

// Begin has the meter run, with one grant for the server's beginning. Before, nothing is read that no request waits for.
func (m *Conn) Begin() {
	m.left.Store(m.grant)
	m.on.Store(true)
}

// Grant adds what one request may bring.
func (m *Conn) Grant() { m.left.Add(m.grant) }

// Settle is for a connection without requests: what the sockets' buffers hold of answers that were given up may still come.
func (m *Conn) Settle() { m.left.Store(min(m.left.Load(), 2*m.grant)) }
