package natsplugin

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// hostile is a server that acknowledges what is published, and then says evil on the idle connection.
func hostile(t *testing.T, evil func(w io.Writer)) (addr string, ended <-chan struct{}) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	done := make(chan struct{})
	var first atomic.Bool
	go func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if !first.Swap(true) {
					defer close(done)
				}
				_, _ = io.WriteString(c, `INFO {"server_id":"x","version":"2.10.0","proto":1,"headers":true,"max_payload":1048576}`+"\r\n")
				r := bufio.NewReader(c)
				sid := "1"
				for {
					line, err := r.ReadString('\n')
					if err != nil {
						return
					}
					words := strings.Fields(line)
					switch words[0] {
					case "PING":
						_, _ = io.WriteString(c, "PONG\r\n")
					case "SUB":
						sid = words[len(words)-1]
					case "HPUB":
						size, _ := strconv.Atoi(words[len(words)-1])
						_, _ = r.Discard(size + 2)
						const ack = `{"stream":"S","seq":1}`
						_, _ = fmt.Fprintf(c, "MSG %s %s %d\r\n%s\r\n", words[2], sid, len(ack), ack)
						evil(c)
						_, _ = io.Copy(io.Discard, r) // until the client has had enough
						return
					}
				}
			}()
		}
	}()
	return lis.Addr().String(), done
}

// TestHostileServersEndTheirOwnConnection: what a server asks for is not reserved, and what it sends without end is not
// kept. Without the guard each of the first three takes the process down, or all of its memory.
func TestHostileServersEndTheirOwnConnection(t *testing.T) {
	endless := func(begin string) func(io.Writer) {
		return func(w io.Writer) {
			_, err := io.WriteString(w, begin)
			chunk := bytes.Repeat([]byte("x"), 64<<10)
			for n := 0; err == nil && n < 300<<20; n += len(chunk) {
				_, err = w.Write(chunk)
			}
		}
	}
	say := func(text string) func(io.Writer) {
		return func(w io.Writer) { _, _ = io.WriteString(w, text) }
	}
	for name, evil := range map[string]func(io.Writer){
		"a message of 9 EB":           say("MSG a.b 1 9000000000000000000\r\nx"),
		"a message of 8 GB":           say("MSG a.b 1 8000000000\r\nx"),
		"an error without end":        endless("-ERR '"),
		"an INFO without end":         endless("INFO {"),
		"a subject without end":       endless("MSG "),
		"a negative size":             say("MSG a.b 1 -5\r\n"),
		"a header beyond its message": say("HMSG a.b 1 100 10\r\n"),
		"a message without its end":   say("MSG a.b 1 2\r\nxxMSG a.b 1 9000000000000000000\r\n"),
		"a hidden line end":           say("PING\rMSG a.b 1 9\r\n"),
		"no NATS":                     say("HTTP/1.1 200 OK\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			addr, ended := hostile(t, evil)
			inst := newBench(t).instance("nats://"+addr+"/orders.x", nil, nil)
			runtime.ReadMemStats(&before)
			if resp, err := deliver(t, inst); err != nil || resp.Status != 200 {
				t.Fatalf("%v, %v", resp, err)
			}
			select {
			case <-ended:
			case <-time.After(20 * time.Second):
				t.Fatal("the connection was kept")
			}
			runtime.ReadMemStats(&after)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 32<<20 {
				t.Errorf("%d MB were allocated", grown>>20)
			}
			if resp, err := deliver(t, inst); err != nil || resp.Status != 200 {
				t.Errorf("after that: %v, %v", resp, err)
			}
		})
	}
}

// TestGuardChangesNothing reads what servers send in pieces of every size.
func TestGuardChangesNothing(t *testing.T) {
	sent := "INFO {\"a\":1}\r\nINFO {\"connect_urls\":\"" + strings.Repeat("x", 50<<10) + "\"}\r\nPING\r\n+OK\r\nMSG a.b 1 5\r\nh\r\nMS\r\nMSG a.b 1 r.x 0\r\n\r\nHMSG a 2 r 3 5\r\nabcde\r\n-ERR 'no'\r\nPONG\r\n"
	for _, reader := range []func(io.Reader) io.Reader{iotest.OneByteReader, iotest.HalfReader, iotest.DataErrReader} {
		got, err := io.ReadAll(newGuard(pieces{reader: reader(strings.NewReader(sent))}))
		if string(got) != sent || err != nil {
			t.Errorf("%d bytes of %d, %v", len(got), len(sent), err)
		}
	}
}

type pieces struct {
	net.Conn
	reader io.Reader
}

func (p pieces) Read(b []byte) (int, error) { return p.reader.Read(b) }

// TestServersThatDoNotGreet are told apart.
func TestServersThatDoNotGreet(t *testing.T) {
	for greeting, want := range map[string]string{
		"":                                   "the server closed the connection at once",
		"HTTP/1.1 400 Bad Request\r\n":       "the server does not speak NATS",
		"INFO {\r\n":                         "the server does not speak NATS",
		"INFO " + strings.Repeat("x", 1<<20): "the server does not speak NATS",
	} {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = lis.Close() })
		go func() {
			for {
				c, err := lis.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, greeting)
				_ = c.(*net.TCPConn).CloseWrite()
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			}
		}()
		_, err = deliver(t, newBench(t).instance("nats://"+lis.Addr().String()+"/orders.x", nil, nil))
		if f, ok := err.(*plugin.Failure); !ok || f.Message != want || f.WireState != plugin.NotSent { //nolint:errorlint // bare by contract
			t.Errorf("%.20q: %v, want %q", greeting, err, want)
		}
	}
}
