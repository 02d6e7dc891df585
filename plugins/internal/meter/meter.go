// Package meter bounds what is read of an HTTP/2 connection, of which each library reads all that comes, at once.
package meter

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
)

// errFlood ends a connection on which more came than answers need. HTTP/2 has frames that nothing bounds, PING and
// SETTINGS among them, and reading them costs as much as the server likes.
var errFlood = errors.New("the receiver sends without end")

const (
	// ordinary is what an answer has, in bytes: what comes beyond it is read in turn with what else does.
	ordinary = 8 << 10
	// longest is how long one reader keeps the others out, where it may be waiting for something itself.
	longest = 10 * time.Millisecond
)

// Conn is a connection of which, from Begin on, no more is read than was granted, and what is more than ordinary in its
// turn at a gate. Its methods may be called concurrently, Read by one caller at a time.
type Conn struct {
	net.Conn
	grant int64
	gate  *gate.Gate
	on    atomic.Bool
	left  atomic.Int64
	// swift is what may be read without the gate.
	swift atomic.Int64
	// leave is how to leave the gate, when the reader has a turn.
	leave  atomic.Pointer[func()]
	closed chan struct{}
	once   sync.Once
}

// New wraps conn. The grant, in bytes, is what may come for one request: what the library lets a stream send before it
// is read, a header, and the frames around them.
func New(conn net.Conn, grant int64, gate *gate.Gate) *Conn {
	return &Conn{Conn: conn, grant: grant, gate: gate, closed: make(chan struct{})}
}

// NetConn returns the connection below.
func (m *Conn) NetConn() net.Conn { return m.Conn }

// Read ends with an error when more has come than was granted.
func (m *Conn) Read(p []byte) (int, error) {
	if !m.on.Load() {
		return m.Conn.Read(p)
	}
	m.rest() // whoever reads has done with what it got
	if m.left.Load() <= 0 {
		return 0, errFlood
	}
	n, err := m.Conn.Read(p)
	m.left.Add(-int64(n))
	// The read that comes to the end of what is ordinary may have the answer in it, and does not wait.
	if m.swift.Add(-int64(n)) < -int64(n) {
		leave, entered := m.gate.Enter(m.closed, longest, "")
		if !entered {
			return 0, net.ErrClosed
		}
		m.leave.Store(&leave)
		select {
		case <-m.closed: // nobody reads on
			m.rest()
		default:
		}
	}
	return n, err
}

// rest leaves the gate.
func (m *Conn) rest() {
	if leave := m.leave.Swap(nil); leave != nil {
		(*leave)()
	}
}

// Close also ends a wait for the gate, and a turn.
func (m *Conn) Close() error {
	m.once.Do(func() { close(m.closed) })
	m.rest()
	return m.Conn.Close()
}

// Begin has the meter run, with one grant for the server's beginning. Before, nothing is read that no request waits for.
func (m *Conn) Begin() {
	m.left.Store(m.grant)
	m.swift.Store(ordinary)
	m.on.Store(true)
}

// Grant adds what one request may bring.
func (m *Conn) Grant() {
	m.left.Add(m.grant)
	m.swift.Add(ordinary)
}

// Settle is for the end of a request, and tells how many others there are: what it did not need is not theirs, but what
// the sockets' buffers hold of answers that were given up may still come.
func (m *Conn) Settle(others int) {
	settle(&m.left, int64(others+2)*m.grant)
	settle(&m.swift, int64(others+2)*ordinary)
}

// settle lowers v to most.
func settle(v *atomic.Int64, most int64) {
	for had := v.Load(); had > most; had = v.Load() {
		if v.CompareAndSwap(had, most) {
			return
		}
	}
}
