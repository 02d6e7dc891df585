package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// overNATS is a way for a message to travel, which attacks alone use.
const overNATS = "NATS"

// attack is one way for a receiver to do harm. Nil functions leave it out over the ways that they are for.
type attack struct {
	name string
	// accepted has a connection on which nothing was read, behind the handshake of TLS.
	accepted func(c net.Conn)
	// first and second have a connection of HTTP/1.1 or HTTP/2 when a request was read, each time; n is the receiver's
	// number. The connection ends when they say so.
	first  func(c net.Conn, n int) (over bool)
	second func(c net.Conn, n int, stream uint32) (over bool)
	// secure changes the receiver's TLS.
	secure func(v *villain, config *tls.Config)
	// nats is what follows the acknowledgement of a message.
	nats func(c net.Conn)
	// like are the outcomes, with their codes, that are right; likeSecond those over HTTP/2, where they are others.
	like, likeSecond []string

	// receivers is how many play it, 200 unless set; inFlight is the max_in_flight of their subscriptions, the default
	// unless set; events go to each at once, 2 unless set, and then one a second. key has their subscriptions show a client
	// certificate with the largest key that is taken, signs has them sign with one.
	receivers, inFlight, events int
	key, signs                  bool
}

// right are the outcomes that are right over a way.
func (f *attack) right(over string) []string {
	if over == overHTTP2 && f.likeSecond != nil {
		return f.likeSecond
	}
	return f.like
}

// over are the ways that a fault can be played on.
func (f *attack) over() []string {
	switch {
	case f.nats != nil:
		return []string{overNATS}
	case f.secure != nil && f.accepted == nil:
		return []string{overHTTPS, overHTTP2}
	case f.accepted != nil && f.first == nil:
		return []string{overHTTP1, overHTTPS, overHTTP2}
	}
	var ways []string
	if f.first != nil {
		ways = append(ways, overHTTP1, overHTTPS)
	}
	if f.second != nil {
		ways = append(ways, overHTTP2)
	}
	return ways
}

// Outcomes.
const (
	timedOut    = "TIMED_OUT"
	unreachable = "UNREACHABLE"
	pluginError = "PLUGIN_ERROR"
	retryable   = "RETRYABLE"
	succeeded   = "SUCCEEDED 200"
	failed500   = "RETRYABLE 500"
)

const (
	ok200 = "HTTP/1.1 200 OK\r\n"
	oops  = "HTTP/1.1 500 Oops\r\n"
	hello = "content-length: 5\r\n\r\nhello"
	yes   = "\x88" // :status 200, as HPACK has it
	no    = "\x8e" // :status 500
)

// attacks are the faults 17 to 20 of hostile receivers, and those that once stopped everybody.
func attacks() []*attack {
	silent := func(net.Conn, int) bool { return false }
	long, many := []byte(oops+"x: "+strings.Repeat("x", 10<<20)+"\r\n\r\n"), []byte(oops+strings.Repeat("x:\r\n", 100_000)+"\r\n")
	return []*attack{
		// Slow ones.
		{name: "reads nothing", accepted: func(c net.Conn) { wait(c) }, like: []string{timedOut}},
		{name: "says nothing", first: silent, second: func(net.Conn, int, uint32) bool { return false }, like: []string{timedOut}},
		{name: "drips its header", like: []string{failed500}, likeSecond: []string{timedOut, retryable}, // by who is first to send between the frames of a header
			first: func(c net.Conn, _ int) bool { return trickle(c, oops+"x: "+strings.Repeat("x", 1000)) },
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, 0, stream, []byte(no))
				return repeat(c, framed(frameContinuation, 0, stream, field("x", "y")), 100*time.Millisecond)
			}},
		{name: "drips the body of a yes", like: []string{succeeded},
			first: func(c net.Conn, _ int) bool {
				return trickle(c, ok200+"content-length: 1000\r\n\r\n"+strings.Repeat("x", 1000))
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, endHeaders, stream, []byte(yes))
				return repeat(c, framed(frameData, 0, stream, []byte("x")), 100*time.Millisecond)
			}},
		{name: "drips the body of a no", like: []string{failed500},
			first: func(c net.Conn, _ int) bool {
				write(c, oops+"content-length: 1000\r\n\r\n")
				return trickle(c, strings.Repeat("x", 1000))
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, endHeaders, stream, []byte(no))
				return repeat(c, framed(frameData, 0, stream, []byte("x")), 100*time.Millisecond)
			}},
		{name: "1xx without end", like: []string{retryable},
			first: func(c net.Conn, _ int) bool {
				return flood(c, []byte("HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"))
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				return flood(c, framed(frameHeaders, endHeaders, stream, append([]byte("\x08\x03103"), field("link", "</x>")...)))
			}},
		{name: "1xx now and then", like: []string{timedOut},
			first: func(c net.Conn, _ int) bool {
				return repeat(c, []byte("HTTP/1.1 102 Processing\r\n\r\n"), 100*time.Millisecond)
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				return repeat(c, framed(frameHeaders, endHeaders, stream, []byte("\x08\x03102")), 100*time.Millisecond)
			}},

		// Large ones.
		// Over HTTP/2 the answer of a second request comes behind the flood of the first.
		{name: "body without end", like: []string{failed500}, likeSecond: []string{failed500, timedOut},
			first: func(c net.Conn, _ int) bool {
				write(c, oops+"content-length: 9000000000000\r\n\r\n")
				return flood(c, []byte{0})
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, endHeaders, stream, []byte(no))
				return flood(c, framed(frameData, 0, stream, make([]byte, 16<<10)))
			}},
		{name: "compressed bomb", like: []string{failed500}, likeSecond: []string{failed500, timedOut},
			first: func(c net.Conn, _ int) bool {
				write(c, oops+"content-encoding: gzip\r\ncontent-length: 9000000000000\r\n\r\n")
				return flood(c, []byte{0x1f, 0x8b, 8, 0})
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, endHeaders, stream, append([]byte(no), field("content-encoding", "gzip")...))
				return flood(c, framed(frameData, 0, stream, bytes.Repeat([]byte{0x1f, 0x8b, 8, 0}, 4<<10)))
			}},
		{name: "header of 10 MB", like: []string{failed500}, likeSecond: []string{retryable},
			first: func(c net.Conn, _ int) bool {
				_, _ = c.Write(long)
				return true
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, 0, stream, []byte(no))
				return flood(c, framed(frameContinuation, 0, stream, field("x", strings.Repeat("x", 16000))))
			}},
		{name: "100 000 header fields", like: []string{failed500}, likeSecond: []string{retryable},
			first: func(c net.Conn, _ int) bool {
				_, _ = c.Write(many)
				return true
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, 0, stream, []byte(no))
				return flood(c, framed(frameContinuation, 0, stream, bytes.Repeat(field("x", ""), 3000)))
			}},
		{name: "chunk extensions", like: []string{failed500},
			first: func(c net.Conn, _ int) bool {
				write(c, oops+"transfer-encoding: chunked\r\n\r\n")
				return flood(c, []byte("1;"+strings.Repeat("x", 2000)+"\r\nx\r\n"))
			}},
		{name: "bad chunks", like: []string{failed500},
			first: func(c net.Conn, _ int) bool {
				write(c, oops+"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nzz\r\n")
				return false
			}},
		{name: "a second answer behind the first", like: []string{succeeded},
			first: func(c net.Conn, _ int) bool {
				write(c, ok200+hello+"HTTP/1.1 299 Smuggled\r\n"+hello)
				return false
			}},
		{name: "frames without end", like: []string{retryable, timedOut},
			second: func(c net.Conn, _ int, _ uint32) bool {
				return flood(c, framed(framePing, 1, 0, make([]byte, 8)))
			}},
		{name: "empty frames of a body", like: []string{failed500, timedOut},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, endHeaders, stream, []byte(no))
				return flood(c, framed(frameData, 0, stream, nil))
			}},

		// Broken ones.
		{name: "resets in the middle of a request", accepted: func(c net.Conn) {
			_, _ = io.ReadFull(c, make([]byte, 10))
			reset(c)
		}, like: []string{retryable}},
		{name: "resets behind a yes", like: []string{succeeded},
			first: func(c net.Conn, _ int) bool {
				write(c, ok200+"content-length: 1000\r\n\r\nhello")
				_ = sleep(context.Background(), 200*time.Millisecond) // or the reset may overtake the answer
				reset(c)
				return true
			},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameHeaders, endHeaders, stream, []byte(yes))
				frame(c, frameReset, 0, stream, number(2))
				return false
			}},
		{name: "closes without an answer", like: []string{retryable},
			first:  func(net.Conn, int) bool { return true },
			second: func(net.Conn, int, uint32) bool { return true }},
		{name: "closes half and stays", like: []string{retryable},
			first: func(c net.Conn, _ int) bool {
				_ = c.(interface{ CloseWrite() error }).CloseWrite()
				return false
			}},
		{name: "GOAWAY at every request", like: []string{retryable},
			second: func(c net.Conn, _ int, _ uint32) bool {
				frame(c, frameGoAway, 0, 0, append(number(0), number(0)...))
				return false
			}},
		{name: "refuses every stream", like: []string{retryable},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameReset, 0, stream, number(7))
				return false
			}},
		{name: "resets every stream", like: []string{retryable},
			second: func(c net.Conn, _ int, stream uint32) bool {
				frame(c, frameReset, 0, stream, number(2))
				return false
			}},
		{name: "expired certificate", like: []string{unreachable}, secure: func(v *villain, c *tls.Config) { c.Certificates = v.expired }},
		{name: "certificate for another", like: []string{unreachable}, secure: func(v *villain, c *tls.Config) { c.Certificates = v.stranger }},
		{name: "TLS 1.1", like: []string{unreachable}, secure: func(_ *villain, c *tls.Config) {
			c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
		}},
		{name: "wants a client certificate", like: []string{unreachable, retryable}, secure: func(_ *villain, c *tls.Config) {
			c.ClientAuth = tls.RequireAnyClientCert
		}},
		{name: "redirects", like: []string{"RETRYABLE 301", "RETRYABLE 302", "RETRYABLE 303", "RETRYABLE 307", "RETRYABLE 308"},
			first: func(c net.Conn, n int) bool {
				write(c, fmt.Sprintf("HTTP/1.1 %d Elsewhere\r\nlocation: %s\r\ncontent-length: 0\r\n\r\n", redirect(n), elsewhere(c, n)))
				return false
			},
			second: func(c net.Conn, n int, stream uint32) bool {
				block := append([]byte("\x08\x03"), strconv.Itoa(redirect(n))...)
				frame(c, frameHeaders, endHeaders|endStream, stream, append(block, field("location", elsewhere(c, n))...))
				return false
			}},

		// One tenant against all.
		// Of two that go out at once the second is not acknowledged before the attack comes.
		{name: "a message of 9 EB", like: []string{succeeded, retryable}, nats: func(c net.Conn) {
			write(c, "MSG x 1 9000000000000000000\r\nx")
		}},
		{name: "a message of 8 GB", like: []string{succeeded, retryable}, nats: func(c net.Conn) {
			write(c, "MSG x 1 8000000000\r\n")
			flood(c, []byte{0})
		}},
		{name: "an error without end", like: []string{succeeded, retryable}, nats: func(c net.Conn) {
			write(c, "-ERR '")
			flood(c, []byte("a"))
		}},
		{name: "signatures with 4096 bits", signs: true, like: []string{succeeded, timedOut, pluginError}, first: func(c net.Conn, _ int) bool {
			write(c, ok200+hello)
			return false
		}},
		{name: "client keys of 4096 bits", key: true, like: []string{retryable, timedOut}, secure: func(_ *villain, c *tls.Config) {
			c.ClientAuth = tls.RequestClientCert
			c.SessionTicketsDisabled = true
		}, first: func(net.Conn, int) bool { return true }, second: func(net.Conn, int, uint32) bool { return true }},
		{name: "12 that hang, 1000 at a time", receivers: 12, inFlight: 1000, events: 200, first: silent, like: []string{timedOut}},
		{name: "70 that hang", receivers: 70, events: 20, first: silent, like: []string{timedOut}},
	}
}

func redirect(n int) int { return []int{301, 302, 303, 307, 308}[n%5] }

// elsewhere is the receiver itself, which sees who follows, or what nobody may ask.
func elsewhere(c net.Conn, n int) string {
	if n%2 == 0 {
		return "http://169.254.169.254/latest/meta-data"
	}
	if _, secure := c.(*tls.Conn); secure {
		return "https://" + c.LocalAddr().String() + "/again"
	}
	return "http://" + c.LocalAddr().String() + "/again"
}

// villain is the process that plays the faults.
type villain struct {
	known             map[string]*attack
	own               []tls.Certificate
	expired, stranger []tls.Certificate

	requests atomic.Int64

	mu    sync.Mutex
	scene []net.Listener
	conns map[net.Conn]struct{}
}

// runVillain serves until its standard input ends. Attackers have machines of their own: this process takes what the
// others leave.
func runVillain() error {
	if err := syscall.Setpriority(syscall.PRIO_PROCESS, 0, 19); err != nil {
		return fmt.Errorf("take the lowest priority: %w", err)
	}
	v := &villain{known: map[string]*attack{}, conns: map[net.Conn]struct{}{}}
	for _, f := range attacks() {
		v.known[f.name] = f
	}
	var authorities []byte
	for _, c := range []struct {
		to    *[]tls.Certificate
		until time.Time
		ip    net.IP
	}{{&v.own, time.Now().Add(time.Hour), net.IPv4(127, 0, 0, 1)}, {&v.expired, time.Now().Add(-time.Minute), net.IPv4(127, 0, 0, 1)}, {&v.stranger, time.Now().Add(time.Hour), net.IPv4(127, 0, 0, 2)}} {
		pair, text, err := selfSigned(c.until, c.ip)
		if err != nil {
			return err
		}
		*c.to = []tls.Certificate{pair}
		authorities = append(authorities, text...)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /play", v.play)
	mux.HandleFunc("GET /seen", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v.requests.Load()) })
	srv := &http.Server{Handler: mux}
	fmt.Println(lis.Addr(), base64.StdEncoding.EncodeToString(authorities))
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = srv.Close()
	}()
	if err := srv.Serve(lis); err != http.ErrServerClosed {
		return err
	}
	return nil
}

// play ends what was played and opens the receivers of a fault, whose addresses it answers with.
func (v *villain) play(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	f := v.known[q.Get("fault")]
	n, err := strconv.Atoi(q.Get("receivers"))
	if f == nil || err != nil {
		http.Error(w, "no such fault", http.StatusBadRequest)
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, lis := range v.scene {
		_ = lis.Close()
	}
	for c := range v.conns {
		_ = c.Close()
	}
	v.scene = nil
	v.requests.Store(0)
	var addresses []string
	for i := range n {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		v.scene = append(v.scene, lis)
		addresses = append(addresses, lis.Addr().String())
		go v.serve(f, q.Get("over"), i, lis)
	}
	_ = json.NewEncoder(w).Encode(addresses)
}

func (v *villain) serve(f *attack, over string, n int, lis net.Listener) {
	var config *tls.Config
	if over == overHTTPS || over == overHTTP2 {
		config = &tls.Config{Certificates: v.own, NextProtos: []string{"http/1.1"}}
		if over == overHTTP2 {
			config.NextProtos = []string{"h2"}
		}
		if f.secure != nil {
			f.secure(v, config)
		}
	}
	for {
		c, err := lis.Accept()
		if err != nil {
			return
		}
		v.mu.Lock()
		v.conns[c] = struct{}{}
		v.mu.Unlock()
		go func() {
			defer func() {
				_ = c.Close()
				v.mu.Lock()
				defer v.mu.Unlock()
				delete(v.conns, c)
			}()
			v.receive(f, over, n, c, config)
		}()
	}
}

func (v *villain) receive(f *attack, over string, n int, c net.Conn, config *tls.Config) {
	if config != nil {
		secure := tls.Server(c, config)
		if secure.Handshake() != nil {
			return
		}
		defer secure.Close() //nolint:errcheck // it may have been reset
		c = secure
	}
	switch {
	case f.accepted != nil:
		f.accepted(c)
	case over == overNATS:
		v.speakNATS(f, c)
	case over == overHTTP2:
		requests(c, func(stream uint32) {
			v.requests.Add(1)
			if f.second == nil {
				frame(c, frameHeaders, endHeaders|endStream, stream, []byte(yes))
			} else if f.second(c, n, stream) {
				_ = c.Close()
			}
		})
	default:
		for in := bufio.NewReader(c); ; {
			req, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				return
			}
			v.requests.Add(1)
			if f.first == nil {
				write(c, ok200+hello)
			} else if f.first(c, n) {
				return
			}
		}
	}
}

// speakNATS is a server that acknowledges what is published, and then does what the fault says.
func (v *villain) speakNATS(f *attack, c net.Conn) {
	write(c, `INFO {"server_id":"X","version":"2.10.0","host":"127.0.0.1","port":4222,"headers":true,"max_payload":1048576,"proto":1}`+"\r\n")
	sid := "1"
	for in := bufio.NewReader(c); ; {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		switch strings.ToUpper(words[0]) {
		case "PING":
			write(c, "PONG\r\n")
		case "SUB":
			sid = words[len(words)-1]
		case "PUB", "HPUB":
			if len(words) < 4 {
				return
			}
			size, _ := strconv.Atoi(words[len(words)-1])
			if _, err := io.CopyN(io.Discard, in, int64(size+2)); err != nil {
				return
			}
			v.requests.Add(1)
			const ack = `{"stream":"X","seq":1}`
			write(c, fmt.Sprintf("MSG %s %s %d\r\n%s\r\n", words[2], sid, len(ack), ack))
			_ = sleep(context.Background(), 200*time.Millisecond) // the attempt has ended
			f.nats(c)
		}
	}
}

func write(c net.Conn, text string) { _, _ = io.WriteString(c, text) }

// wait returns when the other side has closed, and reads nothing before.
func wait(c net.Conn) {
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	_ = sleep(context.Background(), 10*time.Second)
	_, _ = io.Copy(io.Discard, c)
}

// flood writes until the other side has had enough.
func flood(c net.Conn, piece []byte) bool {
	piece = bytes.Repeat(piece, 1+(16<<10)/len(piece))
	for {
		if _, err := c.Write(piece); err != nil {
			return true
		}
	}
}

// repeat writes a piece now and then.
func repeat(c net.Conn, piece []byte, every time.Duration) bool {
	for {
		if _, err := c.Write(piece); err != nil {
			return true
		}
		_ = sleep(context.Background(), every)
	}
}

// trickle writes ten bytes a second, behind the first line.
func trickle(c net.Conn, text string) bool {
	line := strings.Index(text, "\n") + 1
	write(c, text[:line])
	for i := range text[line:] {
		if _, err := c.Write([]byte{text[line+i]}); err != nil {
			return true
		}
		_ = sleep(context.Background(), 100*time.Millisecond)
	}
	return true
}

// reset closes with RST.
func reset(c net.Conn) {
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// Frames of HTTP/2 (RFC 9113, section 6) and their flags.
const (
	frameData         = 0
	frameHeaders      = 1
	frameReset        = 3
	frameSettings     = 4
	framePing         = 6
	frameGoAway       = 7
	frameContinuation = 9
	endStream         = 1
	endHeaders        = 4
)

func framed(kind, flags byte, stream uint32, payload []byte) []byte {
	head := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags}
	return append(binary.BigEndian.AppendUint32(head, stream), payload...)
}

func frame(c net.Conn, kind, flags byte, stream uint32, payload []byte) {
	_, _ = c.Write(framed(kind, flags, stream, payload))
}

func number(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

// field is a field of a header as HPACK has it, literally (RFC 7541, section 6.2.2).
func field(name, value string) []byte {
	out := []byte{0}
	for _, s := range []string{name, value} {
		if len(s) < 127 {
			out = append(out, byte(len(s)))
		} else {
			out = binary.AppendUvarint(append(out, 127), uint64(len(s)-127))
		}
		out = append(out, s...)
	}
	return out
}

// requests calls do, on a goroutine of its own, with the stream of each request that is there as a whole.
func requests(c net.Conn, do func(stream uint32)) {
	if _, err := io.CopyN(io.Discard, c, int64(len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))); err != nil {
		return
	}
	frame(c, frameSettings, 0, 0, nil)
	for head := make([]byte, 9); ; {
		if _, err := io.ReadFull(c, head); err != nil {
			return
		}
		payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		if _, err := io.ReadFull(c, payload); err != nil {
			return
		}
		switch kind, flags, stream := head[3], head[4], binary.BigEndian.Uint32(head[5:]); {
		case kind == frameSettings && flags == 0:
			frame(c, frameSettings, 1, 0, nil)
		case kind == framePing && flags == 0:
			frame(c, framePing, 1, 0, payload)
		case (kind == frameData || kind == frameHeaders) && flags&endStream != 0:
			go do(stream)
		}
	}
}

// villainProcess plays the faults for the benchmark.
type villainProcess struct {
	cmd   *exec.Cmd
	stdin io.Closer
	addr  string
	// authorities are whom its certificates are by, in PEM.
	authorities string
}

func startVillain(ctx context.Context) (*villainProcess, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "villain")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the villain: %w", err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	words := strings.Fields(line)
	if err != nil || len(words) != 2 {
		return nil, fmt.Errorf("start the villain: it says %q, %v", line, err)
	}
	authorities, err := base64.StdEncoding.DecodeString(words[1])
	return &villainProcess{cmd: cmd, stdin: stdin, addr: words[0], authorities: string(authorities)}, err
}

func (p *villainProcess) stop() {
	_ = p.stdin.Close()
	_ = p.cmd.Wait()
}

// play opens the receivers of a fault and returns their addresses.
func (p *villainProcess) play(f *attack, over string, receivers int) (addresses []string, err error) {
	q := url.Values{"fault": {f.name}, "over": {over}, "receivers": {strconv.Itoa(receivers)}}
	resp, err := http.Post("http://"+p.addr+"/play?"+q.Encode(), "", nil)
	if err != nil {
		return nil, err
	}
	err = answered(resp, &addresses)
	return addresses, err
}

// seen is how many whole requests have come since.
func (p *villainProcess) seen() (n int64, err error) {
	resp, err := http.Get("http://" + p.addr + "/seen")
	if err != nil {
		return 0, err
	}
	err = answered(resp, &n)
	return n, err
}

func answered(resp *http.Response, into any) error {
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the villain answered %s", resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}
