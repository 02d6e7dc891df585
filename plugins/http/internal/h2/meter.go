package h2

import (
	"errors"
	"net"
	"sync/atomic"
)

// grant is how much may come for a request: what net/http lets a stream send before it is read, and as much as a header
// and the frames around it may take.
const grant = 5 << 20

// errFlood ends a connection on which more came than answers need. HTTP/2 has frames that nothing bounds, PING and
// SETTINGS among them, and reading them costs as much as the server likes.
var errFlood = errors.New("the receiver sends without end")

// Meter is the connection below TLS, of which it bounds what is read once the server has chosen HTTP/2. Of HTTP/1.1 it
// bounds nothing: there nothing is read that no request waits for.
type Meter struct {
	net.Conn
	on   atomic.Bool
	left atomic.Int64
}

// NetConn returns the connection below.
func (m *Meter) NetConn() net.Conn { return m.Conn }

// Read ends with an error when more has come than was granted.
func (m *Meter) Read(p []byte) (int, error) {
	if m.on.Load() && m.left.Load() <= 0 {
		return 0, errFlood
	}
	n, err := m.Conn.Read(p)
	m.left.Add(-int64(n))
	return n, err
}

// begin has the meter run, with one grant for the server's beginning.
func (m *Meter) begin() {
	m.left.Store(grant)
	m.on.Store(true)
}

// grant adds what one request may bring.
func (m *Meter) grant() { m.left.Add(grant) }

// settle is for a connection without requests: what the sockets' buffers hold of answers that were given up may still come.
func (m *Meter) settle() { m.left.Store(min(m.left.Load(), 2*grant)) }
