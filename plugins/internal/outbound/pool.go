package outbound

import (
	"context"
	"sync"
	"time"
)

const (
	// IdleTimeout is how long a connection is kept that no attempt uses.
	IdleTimeout = time.Minute
	// MaxAge makes long-lived connections follow changes of DNS; older ones take no new attempts.
	MaxAge = 10 * time.Minute
)

// Conn is a connection as the pool sees it.
type Conn interface {
	// Usable reports whether attempts may still be sent on it.
	Usable() bool
	// Close ends it, and what is under way on it. It may be called more than once.
	Close()
}

// Pool holds at most one connection per key that takes new attempts. The zero value is ready for use.
type Pool[K comparable, C Conn] struct {
	mu sync.Mutex
	by map[K]*entry[C]
}

// entry is one connection, or the dial that is to become one. The pool's mutex guards what is not set
// before dialled is closed.
type entry[C Conn] struct {
	dialled chan struct{}
	conn    C
	err     error
	made    time.Time

	users   int
	retired bool
	idle    *time.Timer
}

// Lease is the right to use a connection until Done.
type Lease[K comparable, C Conn] struct {
	Conn C
	pool *Pool[K, C]
	key  K
	e    *entry[C]
}

// Take returns the key's connection, dialling when there is none that can be used. Attempts that come
// while one is being dialled wait for that one and share its error. The dial goes on when ctx ends, for
// the others and for the next: dial bounds its own time, and a panic in it is the process's end.
func (p *Pool[K, C]) Take(ctx context.Context, key K, dial func() (C, error)) (*Lease[K, C], error) {
	e := p.join(key, dial)
	select {
	case <-e.dialled:
	case <-ctx.Done():
		p.leave(key, e)
		return nil, ctx.Err()
	}
	if e.err != nil {
		p.leave(key, e)
		return nil, e.err
	}
	return &Lease[K, C]{Conn: e.conn, pool: p, key: key, e: e}, nil
}

func (p *Pool[K, C]) join(key K, dial func() (C, error)) *entry[C] {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.by[key]
	if e != nil && e.isDialled() && (!e.conn.Usable() || time.Since(e.made) > MaxAge) {
		p.retire(key, e)
		e = nil
	}
	if e == nil {
		if p.by == nil {
			p.by = map[K]*entry[C]{}
		}
		e = &entry[C]{dialled: make(chan struct{}), made: time.Now()}
		p.by[key] = e
		go p.fill(key, e, dial)
	}
	e.users++
	if e.idle != nil {
		e.idle.Stop()
	}
	return e
}

func (p *Pool[K, C]) fill(key K, e *entry[C], dial func() (C, error)) {
	conn, err := dial()
	p.mu.Lock()
	defer p.mu.Unlock()
	e.conn, e.err = conn, err
	close(e.dialled)
	switch {
	case err != nil:
		if p.by[key] == e {
			delete(p.by, key) // the next attempt tries anew
		}
	case e.users == 0:
		p.rest(key, e)
	}
}

func (e *entry[C]) isDialled() bool {
	select {
	case <-e.dialled:
		return true
	default:
		return false
	}
}

// retire keeps new attempts away; the last user closes.
func (p *Pool[K, C]) retire(key K, e *entry[C]) {
	e.retired = true
	if p.by[key] == e {
		delete(p.by, key)
	}
	if e.users == 0 {
		p.rest(key, e)
	}
}

func (p *Pool[K, C]) leave(key K, e *entry[C]) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.users--; e.users == 0 && e.isDialled() && e.err == nil {
		p.rest(key, e)
	}
}

// rest is for a connection without users: closed when retired, else watched.
func (p *Pool[K, C]) rest(key K, e *entry[C]) {
	switch {
	case e.retired:
		go e.conn.Close() // may wait for the network
	case e.idle == nil:
		e.idle = time.AfterFunc(IdleTimeout, func() { p.expire(key, e) })
	default:
		e.idle.Reset(IdleTimeout)
	}
}

func (p *Pool[K, C]) expire(key K, e *entry[C]) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.users == 0 && !e.retired {
		p.retire(key, e)
	}
}

// Done gives the connection back. It must be called exactly once.
func (l *Lease[K, C]) Done() { l.pool.leave(l.key, l.e) }

// Retire has later attempts use another connection; those under way on this one go on.
func (l *Lease[K, C]) Retire() {
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	if !l.e.retired {
		l.pool.retire(l.key, l.e)
	}
}

// Close closes all connections at once, for tests.
func (p *Pool[K, C]) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, e := range p.by {
		if e.isDialled() && e.err == nil {
			e.retired = true
			delete(p.by, key)
			e.conn.Close()
		}
	}
}
