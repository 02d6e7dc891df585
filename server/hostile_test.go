package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// hostileNATS acknowledges what is published to it, and once the connection is idle sends what a client that believes it
// dies of: a message of a size that no memory has, or a line without an end.
type hostileNATS struct {
	addr     string
	poison   string // %s is a subject and the client's number for it
	poisoned atomic.Int64
}

func startHostileNATS(t *testing.T, poison string) *hostileNATS {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	h := &hostileNATS{addr: l.Addr().String(), poison: poison}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go h.serve(c)
		}
	}()
	return h
}

func (h *hostileNATS) serve(c net.Conn) {
	defer c.Close()
	var mu sync.Mutex
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		_, _ = fmt.Fprintf(c, format, args...)
	}
	say("INFO {\"server_id\":\"X\",\"version\":\"2.10.0\",\"headers\":true,\"max_payload\":1048576,\"proto\":1}\r\n")
	in := bufio.NewReader(c)
	sid := "1"
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		switch strings.ToUpper(f[0]) {
		case "PING":
			say("PONG\r\n")
		case "SUB":
			sid = f[len(f)-1]
		case "PUB", "HPUB":
			size, err := strconv.Atoi(f[len(f)-1])
			if err != nil {
				return
			}
			if _, err := io.CopyN(io.Discard, in, int64(size)+2); err != nil {
				return
			}
			reply := f[2]
			const ack = `{"stream":"S","seq":1}`
			say("MSG %s %s %d\r\n%s\r\n", reply, sid, len(ack), ack)
			time.AfterFunc(30*time.Millisecond, func() {
				h.poisoned.Add(1)
				say(h.poison, reply+" "+sid)
			})
		}
	}
}

// TestHostileReceiverOfOneTransport: whatever a NATS server makes of the client that reads it, deliveries of other tenants
// over HTTP go on as if nothing were: each arrives at its first attempt, from the process that has made them all along.
func TestHostileReceiverOfOneTransport(t *testing.T) {
	for name, poison := range map[string]string{
		"a size beyond all numbers": "MSG %s 9000000000000000000\r\nx",
		"a size beyond the memory":  "MSG %s 8000000000\r\nx",
		"a line without an end":     "-ERR 'MSG %s" + strings.Repeat("x", 8<<20),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := servertest.Start(t, servertest.Options{})
			hostile := startHostileNATS(t, poison)
			rcv := servertest.NewReceiver(t, nil)
			s.Namespace("victim")
			s.Namespace("evil")
			s.Subscribe("victim", "orders", rcv.URL, nil)
			s.Subscribe("evil", "bait", "nats://"+hostile.addr+"/subject", func(sub *grapnelv1.Subscription) {
				sub.Transport = &grapnelv1.PluginBinding{Plugin: "plugins/nats"}
			})
			pid := s.PluginPids()["grapnel"]
			events := 0
			for round := range 3 {
				s.Publish("evil", fmt.Sprintf("e%d", round), "bait", []byte(`{}`))
				was := hostile.poisoned.Load()
				servertest.Await(t, "the poison is sent", func() bool {
					s.Publish("victim", fmt.Sprintf("v%d", events), "order.created", []byte(`{}`))
					events++
					return hostile.poisoned.Load() > was
				})
			}
			servertest.Await(t, "all of the victim's have arrived", func() bool { return rcv.Accepted() == events })
			for _, d := range s.Deliveries("victim", "") {
				if d.GetAttemptCount() > 1 {
					t.Fatalf("one was tried %d times", d.GetAttemptCount())
				}
			}
			if now := s.PluginPids()["grapnel"]; now != pid {
				t.Errorf("the process that delivers over HTTP is %d, and was %d", now, pid)
			}
			if code, text := ready(t, s); code != 200 {
				t.Errorf("%d %s", code, text)
			}
		})
	}
}
