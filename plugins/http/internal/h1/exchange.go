package h1

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"time"

	"github.com/grapnel/grapnel/plugins/http/internal/answer"
)

// exchange is one request and its response on one connection.
type exchange struct {
	conn    *conn
	request *Request
	reused  bool

	sent answer.Sent
	// heard says that a byte of an answer came, heardAt when.
	heard    bool
	heardAt  time.Time
	reusable bool
	deadline time.Time
	headerBy time.Time
}

// writing is a request on its way. n and err are set before done is closed.
type writing struct {
	done chan struct{}
	n    int
	err  error
}

func (x *exchange) do(ctx context.Context) (*answer.Answer, error) {
	c, r := x.conn, x.request
	x.deadline, _ = ctx.Deadline()
	x.headerBy = x.deadline
	if r.HeaderTimeout > 0 {
		if by := time.Now().Add(r.HeaderTimeout); by.Before(x.headerBy) {
			x.headerBy = by
		}
	}
	if err := c.SetDeadline(x.headerBy); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, c.interrupt)
	defer func() {
		// Once interrupt has begun, it may strike the connection's next user.
		x.reusable = stop() && x.reusable
	}()
	if len(r.Head)+len(r.Body) > maxInline {
		return x.doAside(ctx)
	}
	n, err := c.write(r)
	x.account(n, err)
	if err != nil {
		return x.behind(ctx, err)
	}
	return x.read(ctx)
}

// write writes the request.
func (c *conn) write(r *Request) (int, error) {
	n, err := c.Write(r.Head)
	if err == nil && len(r.Body) > 0 {
		var m int
		m, err = c.Write(r.Body)
		n += m
	}
	return n, err
}

// account notes how far the request has come.
func (x *exchange) account(n int, err error) {
	switch {
	case err == nil:
		x.sent = answer.All
	case n > 0 || x.conn.secure: // a record may be on its way although no byte counts as written
		x.sent = answer.Maybe
	}
}

// behind looks for an answer, or for the alert of TLS that says why, behind a write that failed: a server may answer
// and close before it has read the request.
func (x *exchange) behind(ctx context.Context, wrote error) (*answer.Answer, error) {
	if isTimeout(wrote) || ctx.Err() != nil || x.reused && x.sent == answer.Nothing {
		return nil, wrote // an answer that stands there is not this request's
	}
	by := time.Now().Add(linger)
	if x.deadline.Before(by) {
		by = x.deadline
	}
	x.headerBy = by
	if x.conn.SetReadDeadline(by) != nil {
		return nil, wrote
	}
	got, err := x.read(ctx)
	x.reusable = false
	switch {
	case err == nil:
		return got, nil
	case ended(err) || isTimeout(err):
		return nil, wrote
	}
	return nil, err
}

// doAside reads while another goroutine writes.
func (x *exchange) doAside(ctx context.Context) (*answer.Answer, error) {
	w := &writing{done: make(chan struct{})}
	go func() {
		defer close(w.done)
		w.n, w.err = x.conn.write(x.request)
	}()
	got, err := x.read(ctx)
	if err == nil && got.Status/100 == 2 {
		x.await(ctx, w)
	}
	select {
	case <-w.done:
	default:
		x.reusable = false
		_ = x.conn.SetWriteDeadline(longPast())
		<-w.done
	}
	x.account(w.n, w.err)
	x.reusable = x.reusable && w.err == nil
	if err != nil && w.err != nil && ended(err) && !ended(w.err) && !isTimeout(w.err) {
		err = w.err // a shortage of memory, say
	}
	return got, err
}

// await gives a server that has said yes early a moment to take the rest of what it has agreed to.
func (x *exchange) await(ctx context.Context, w *writing) {
	timer := time.NewTimer(linger)
	defer timer.Stop()
	select {
	case <-w.done:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// read reads the response.
func (x *exchange) read(ctx context.Context) (*answer.Answer, error) {
	c, wants := x.conn, x.request.Wants
	resp, status, err := x.readHead()
	if err != nil {
		if status == 0 {
			return nil, err
		}
		return &answer.Answer{Status: status, Truncated: true, Peer: c.peer, Note: note(err)}, nil
	}
	a := &answer.Answer{Status: resp.StatusCode, Header: resp.Header, Peer: c.peer}
	whole := true
	if resp.Body != http.NoBody {
		c.left = math.MaxInt64 // answer.Read has its own bound
		by := x.deadline
		if !wants.Patient(resp.StatusCode) {
			if soon := time.Now().Add(answer.Drip); soon.Before(by) {
				by = soon
			}
		}
		if !by.Equal(x.headerBy) {
			if err := c.SetReadDeadline(by); err != nil || ctx.Err() != nil {
				c.interrupt()
			}
		}
		a.Body, a.Truncated, whole = answer.Read(resp, wants)
	}
	x.reusable = whole && !resp.Close && resp.StatusCode != http.StatusSwitchingProtocols && !declaresNothing(resp) && c.clean()
	return a, nil
}

// declaresNothing reports whether a response that has no content by its status (RFC 9110, sections 15.3.5 and 15.4.5)
// has announced some: whatever wrote that may send it, too.
func declaresNothing(resp *http.Response) bool {
	if resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusNotModified {
		return false
	}
	length := resp.Header.Get("Content-Length")
	return length != "" && length != "0" || len(resp.TransferEncoding) > 0
}

// readHead reads up to the final response's header; interim responses share its bound. status is that of a final
// status line that was read although its header was not.
func (x *exchange) readHead() (resp *http.Response, status int, err error) {
	c := x.conn
	c.left = answer.MaxHeader
	for range answer.MaxInterim + 1 {
		status, err = x.peekStatus()
		if err != nil {
			return nil, 0, err
		}
		x.hasten(status)
		if status/100 == 1 && status != http.StatusSwitchingProtocols {
			if err := x.skip(); err != nil {
				return nil, 0, err
			}
			continue
		}
		resp, err = http.ReadResponse(c.reader, nil)
		if err != nil && c.left <= 0 {
			err = ErrHeaderTooLarge // which ends a line, and half a line has errors of its own
		}
		switch {
		case err != nil:
			return nil, status, err
		case resp.StatusCode < 100: // net/http reads a sign, too
			return nil, 0, answer.ErrStatus
		case resp.StatusCode/100 != 1 || resp.StatusCode == http.StatusSwitchingProtocols:
			return resp, 0, nil
		}
	}
	return nil, 0, answer.ErrInterim
}

// skip reads an interim response, of which nothing is kept: it costs a small part of what an answer does.
func (x *exchange) skip() error {
	reader := x.conn.reader
	for first, begin := true, true; ; {
		line, err := reader.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			begin = false
			continue
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case begin && (string(line) == "\r\n" || string(line) == "\n"):
			return nil
		case begin && !first && bytes.IndexByte(line, ':') <= 0:
			return errField
		}
		first, begin = false, true
	}
}

// errField is a line of a header without a name.
var errField = errors.New("a line of the header has no name")

// note says what was wrong with a header behind its status line.
func note(err error) string {
	switch {
	case errors.Is(err, ErrHeaderTooLarge):
		return "the header behind the status is larger than 64 KiB"
	case isTimeout(err):
		return "the header behind the status did not come in time"
	case ended(err):
		return "the connection ended in the header behind the status"
	}
	return "the header behind the status cannot be read"
}

// hasten leaves a moment for the rest of a header whose status says yes, where it is not here yet.
func (x *exchange) hasten(status int) {
	here, _ := x.conn.reader.Peek(x.conn.reader.Buffered())
	if status == 0 || x.request.Wants.Patient(status) || bytes.Contains(here, []byte("\r\n\r\n")) {
		return
	}
	if soon := time.Now().Add(answer.Drip); soon.Before(x.headerBy) {
		x.headerBy = soon
		_ = x.conn.SetReadDeadline(soon)
	}
}

// peekStatus reads the beginning of a status line and leaves it where it is. It is 0 for what http.ReadResponse may
// read otherwise, or refuse.
func (x *exchange) peekStatus() (int, error) {
	const line = "HTTP/1.1 200\n"
	reader := x.conn.reader
	start, err := reader.Peek(len(line))
	if len(start) > 0 && !x.heard {
		x.heard, x.heardAt = true, time.Now()
		if start[0] == '\r' || start[0] == '\n' { // what an earlier response had too much
			_, _ = reader.Discard(1)
			if len(start) > 1 && start[0] == '\r' && start[1] == '\n' {
				_, _ = reader.Discard(1)
			}
			start, err = reader.Peek(len(line))
		}
	}
	if len(start) < len(line) {
		if err == io.EOF && len(start) > 0 {
			err = nil // a short line is no status line, which http.ReadResponse says
		}
		return 0, err
	}
	const number = len("HTTP/1.1 ")
	if string(start[:7]) != "HTTP/1." || start[number-1] != ' ' || start[number+3] != ' ' && start[number+3] != '\r' && start[number+3] != '\n' {
		return 0, nil
	}
	status := 0
	for _, digit := range start[number : number+3] {
		if digit < '0' || digit > '9' {
			return 0, nil
		}
		status = 10*status + int(digit-'0')
	}
	if status < 100 {
		return 0, answer.ErrStatus
	}
	return status, nil
}
