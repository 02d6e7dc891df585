//go:build linux || darwin || freebsd || netbsd || openbsd

package h1

import (
	"errors"
	"syscall"
	"time"
)

// probe tells whether an idle connection still stands, without a goroutine that reads from it.
type probe struct {
	raw  syscall.RawConn
	peek func(fd uintptr) // made once
	buf  [1]byte
	ok   bool
}

func newProbe(c syscall.Conn) *probe {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	p := &probe{raw: raw}
	p.peek = func(fd uintptr) {
		// The socket does not block. Nothing to read is the only good answer: an end, an error or bytes
		// that no request asked for all mean that it cannot be used.
		_, _, err := syscall.Recvfrom(int(fd), p.buf[:], syscall.MSG_PEEK)
		p.ok = errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EINTR)
	}
	return p
}

// quiet reports whether the peer has neither closed nor sent anything. One caller at a time.
func (p *probe) quiet(time.Duration) bool {
	return p != nil && p.raw.Control(p.peek) == nil && p.ok
}
