package h1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/grapnel/grapnel/plugins/http/internal/answer"
)

// conn is one connection, owned by one request or by its origin's idle list.
type conn struct {
	net.Conn
	reader *bufio.Reader // over the conn itself, which counts
	left   int64         // bytes that may still be read
	probe  *probe
	peer   string
	secure bool
	// interrupt ends reads and writes; made once, so that a request need not.
	interrupt func()
	made      time.Time
	idleSince time.Time
	// fresh says that it has carried no request yet. Then bytes on the socket are what TLS has to say after its handshake.
	fresh bool
}

func newConn(raw net.Conn, secure bool, made time.Time) *conn {
	c := &conn{Conn: raw, secure: secure, made: made, fresh: true, peer: raw.RemoteAddr().String()}
	if socket := socketOf(raw); socket != nil {
		c.probe = newProbe(socket)
	}
	c.reader = bufio.NewReaderSize(c, 4096)
	c.interrupt = func() { _ = c.SetDeadline(longPast()) }
	return c
}

// longPast is a deadline that ends what waits for it.
func longPast() time.Time { return time.Unix(1, 0) }

// lineCost is what a line counts beyond its bytes, as in HTTP/2 (RFC 9113, section 6.5.2): a field takes memory however
// short it is.
const lineCost = 32

// Read counts down left, which bounds the header.
func (c *conn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, ErrHeaderTooLarge
	}
	if int64(len(p)) > c.left {
		p = p[:c.left]
	}
	n, err := c.Conn.Read(p)
	c.left -= int64(n)
	if c.left < answer.MaxHeader {
		c.left -= lineCost * int64(bytes.Count(p[:n], []byte("\n")))
	}
	return n, err
}

// clean reports whether nothing has been read behind the response, and not the end of TLS either. What TLS has read
// off the socket waits below the reader, where the probe of the socket does not see it; a read that may not wait
// brings it up.
func (c *conn) clean() bool {
	if c.reader.Buffered() > 0 {
		return false
	}
	if !c.secure {
		return true
	}
	c.left = 1
	if c.SetReadDeadline(longPast()) != nil {
		return false
	}
	_, err := c.reader.Peek(1)
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// ended reports whether err is the end of the connection, by whichever side or by the network between.
func ended(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.As(err, new(syscall.Errno)) && !isTimeout(err)
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}
