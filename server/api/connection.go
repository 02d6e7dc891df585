package api

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/peer"
)

// Listen returns l with connections that know since when they are there and what is open on them. Without it the
// bounds per connection do not hold, and streams are not told when their connection grows old.
func (s *Server) Listen(l net.Listener) net.Listener { return listener{l} }

type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{c, &caller{Addr: c.RemoteAddr(), began: time.Now()}}, nil
}

type conn struct {
	net.Conn
	caller *caller
}

// RemoteAddr is how grpc hands the connection's state to its calls.
func (c *conn) RemoteAddr() net.Addr { return c.caller }

// caller is the other end of a connection, and what is open on it.
type caller struct {
	net.Addr
	began            time.Time
	streams, watches limiter
}

// callerOf is the caller of a call; nil when its listener is not from Listen.
func callerOf(ctx context.Context) *caller {
	if p, ok := peer.FromContext(ctx); ok {
		c, _ := p.Addr.(*caller)
		return c
	}
	return nil
}

// Connections end in an orderly way when they are old, so that clients spread over servers anew. grpc varies the age by
// a tenth; from then on nothing new begins on the connection, and what is open has ageGrace to end. A publish stream
// is asked to at tellAge, when all of that has begun and there is still time.
func ageGrace(age time.Duration) time.Duration { return age / 2 }

func tellAge(age time.Duration) time.Duration { return age + age/5 }

// old returns a timer for when a stream has to be told that its connection is old.
func (s *Server) old(ctx context.Context) *time.Timer {
	began := time.Now()
	if c := callerOf(ctx); c != nil {
		began = c.began
	}
	return time.NewTimer(time.Until(began.Add(tellAge(s.ConnectionAge))))
}

// shares bounds what is in progress by key. The zero value of most is no bound.
type shares struct {
	most int
	mu   sync.Mutex
	now  map[string]int // never 0
}

func (s *shares) enter(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now[key] >= s.most {
		return false
	}
	if s.now == nil {
		s.now = make(map[string]int)
	}
	s.now[key]++
	return true
}

func (s *shares) leave(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now[key]--; s.now[key] == 0 {
		delete(s.now, key)
	}
}
