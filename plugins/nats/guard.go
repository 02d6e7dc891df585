package natsplugin

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxInfo is how long the line may be that a server describes itself with: it names all servers of a cluster.
	maxInfo = 64 << 10
	// maxLine is how long any other line may be.
	maxLine = 4 << 10
	// maxMessage is how large a message may be, header included. What comes here are acknowledgements.
	maxMessage = 64 << 10
)

var (
	errLine    = errors.New("the server sent a line that is no NATS, or too long")
	errMessage = errors.New("the server sent a message that is too large or not ended")
)

// guard stands between a server and the client library, whose parser reserves what the server asks for. It lets pass
// what servers send (docs.nats.io/reference/reference-protocols/nats-protocol), word by word and within bounds, and ends
// the connection at anything else.
type guard struct {
	net.Conn
	reader *bufio.Reader
	// line is what of the last line the client has not read yet.
	line []byte
	// payload is how much of a message is still to come, its line end not counted; message is set until that has come too.
	payload int
	message bool
	err     error
}

func newGuard(conn net.Conn) *guard {
	return &guard{Conn: conn, reader: bufio.NewReaderSize(conn, maxLine+2)}
}

// Read hands on a line, or a part of a message.
func (g *guard) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(g.line) == 0 && g.payload == 0 && g.err == nil {
		if g.message {
			g.err = g.endMessage()
		} else {
			g.err = g.nextLine()
		}
	}
	switch {
	case len(g.line) > 0:
		n := copy(p, g.line)
		g.line = g.line[n:]
		return n, nil
	case g.err != nil:
		return 0, g.err
	}
	n, err := g.reader.Read(p[:min(len(p), g.payload)])
	g.payload -= n
	g.err = err
	return n, err
}

func (g *guard) endMessage() error {
	var end [2]byte
	if _, err := io.ReadFull(g.reader, end[:]); err != nil {
		return err
	}
	if end != [2]byte{'\r', '\n'} {
		return errMessage // the client's parser would look for the end elsewhere
	}
	g.line, g.message = []byte("\r\n"), false
	return nil
}

// readLine reads one line, its end included. It is valid until the next read.
func (g *guard) readLine() ([]byte, error) {
	line, err := g.reader.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) { // no link needs a buffer for the longest line, which comes once
		whole := slices.Clone(line)
		for errors.Is(err, bufio.ErrBufferFull) && len(whole) < maxInfo {
			line, err = g.reader.ReadSlice('\n')
			whole = append(whole, line...)
		}
		line = whole
	}
	switch {
	case errors.Is(err, bufio.ErrBufferFull), len(line) > maxInfo+len("\r\n"):
		return nil, errLine
	case err != nil:
		return nil, err
	}
	text := bytes.TrimSuffix(line, []byte("\r\n"))
	if len(text) == len(line) || bytes.IndexByte(text, '\r') >= 0 || len(line) > maxLine && !bytes.HasPrefix(line, []byte("INFO ")) {
		return nil, errLine
	}
	return line, nil
}

func (g *guard) nextLine() error {
	// A line that is longer than its kind may be ends here.
	if err := g.bounded(); err != nil {
		return err
	}
	line, err := g.readLine()
	if err != nil {
		return err
	}
	words := bytes.Split(line[:len(line)-2], []byte(" "))
	switch op := string(words[0]); {
	case op == "MSG" && (len(words) == 4 || len(words) == 5):
		size, ok := sizeOf(words[len(words)-1])
		if !ok {
			return errMessage
		}
		g.payload, g.message = size, true
	case op == "HMSG" && (len(words) == 5 || len(words) == 6):
		header, ok := sizeOf(words[len(words)-2])
		size, okToo := sizeOf(words[len(words)-1])
		if !ok || !okToo || header > size {
			return errMessage
		}
		g.payload, g.message = size, true
	case (op == "PING" || op == "PONG" || op == "+OK") && len(words) == 1, op == "-ERR", op == "INFO" && len(words) > 1:
	default:
		return errLine
	}
	g.line = line
	return nil
}

// bounded looks at a line while it comes: only INFO may be longer than maxLine.
func (g *guard) bounded() error {
	start, err := g.reader.Peek(1)
	if err != nil {
		return err
	}
	if start[0] == 'I' {
		return nil
	}
	for want := 2; ; want = g.reader.Buffered() + 1 {
		have, _ := g.reader.Peek(g.reader.Buffered())
		if bytes.IndexByte(have, '\n') >= 0 {
			return nil
		}
		if len(have) > maxLine {
			return errLine
		}
		if _, err := g.reader.Peek(max(want, len(have)+1)); err != nil {
			return err
		}
	}
}

// sizeOf reads a message's size.
func sizeOf(word []byte) (int, bool) {
	for _, c := range word {
		if c < '0' || c > '9' {
			return 0, false
		}
	}
	n, err := strconv.Atoi(string(word))
	return n, err == nil && n <= maxMessage
}

// greet reads what the server says of itself, does TLS where it is wanted, and returns what the client library is to
// read from: it finds no TLS there, for it would read the network itself then. Errors are of type *outbound.Error.
func greet(ctx context.Context, conn net.Conn, s settings, config *tls.Config, shaking *gate.Gate) (*guard, error) {
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	if s.secure && s.first {
		secured, err := outbound.Secure(ctx, conn, config, shaking)
		if err != nil {
			return nil, err
		}
		conn = secured
	}
	g := newGuard(conn)
	line, err := g.readLine()
	switch {
	case err != nil && outbound.IsTimeout(err):
		return nil, &outbound.Error{Code: plugin.CodeConnect, Err: err, Message: "the server did not greet in time; it may want TLS first (config.tls.handshake_first)"}
	case err != nil && outbound.IsReset(err):
		return nil, &outbound.Error{Code: plugin.CodeConnect, Err: err, Message: "the server closed the connection at once"}
	}
	var info map[string]json.RawMessage
	text, isInfo := bytes.CutPrefix(line, []byte("INFO "))
	if err != nil || !isInfo || json.Unmarshal(text, &info) != nil {
		return nil, &outbound.Error{Code: plugin.CodeProtocol, Err: errors.Join(errLine, err), Message: "the server does not speak NATS"}
	}
	requires, offers := string(info["tls_required"]) == "true", string(info["tls_available"]) == "true"
	if _, over := conn.(*tls.Conn); !over && (s.secure || requires) {
		switch {
		case !requires && !offers:
			return nil, &outbound.Error{Code: plugin.CodeTLS, Err: nats.ErrSecureConnWanted, Message: "the server does not offer TLS"}
		case g.reader.Buffered() > 0:
			return nil, &outbound.Error{Code: plugin.CodeProtocol, Err: errLine, Message: "the server does not speak NATS"}
		}
		secured, err := outbound.Secure(ctx, conn, config, shaking)
		if err != nil {
			return nil, err
		}
		g = newGuard(secured)
	}
	info["tls_required"], info["tls_available"] = json.RawMessage("false"), json.RawMessage("false")
	plain, err := json.Marshal(info)
	if err != nil {
		return nil, &outbound.Error{Code: plugin.CodeProtocol, Err: err, Message: "the server does not speak NATS"}
	}
	g.line = append(append([]byte("INFO "), plain...), "\r\n"...)
	_ = g.SetDeadline(time.Time{})
	return g, nil
}
