package server_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// natsServer is a nats-server process; what it stores outlives it within the test.
type natsServer struct {
	t      *testing.T
	binary string
	config string
	addr   string
	token  string
	cmd    *exec.Cmd
}

// startNATS builds the nats-server that tools/go.mod pins and runs it with JetStream and a token.
func startNATS(t *testing.T, token string) *natsServer {
	t.Helper()
	if testing.Short() {
		t.Skip("builds nats-server")
	}
	dir := t.TempDir()
	n := &natsServer{t: t, addr: freeAddr(t), token: token, binary: filepath.Join(dir, "nats-server"), config: filepath.Join(dir, "nats.conf")}
	build := exec.CommandContext(t.Context(), "go", "build", "-modfile=tools/go.mod", "-o", n.binary, "github.com/nats-io/nats-server/v2")
	build.Dir = ".."
	if printed, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build nats-server: %v\n%s", err, printed)
	}
	text := fmt.Sprintf("listen: %q\njetstream { store_dir: %q }\nauthorization { token: %q }\n", n.addr, filepath.Join(dir, "store"), token)
	if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.run()
	t.Cleanup(n.kill)
	return n
}

// run starts the process, at the same address each time, and returns when it takes connections.
func (n *natsServer) run() {
	n.t.Helper()
	n.cmd = exec.Command(n.binary, "-c", n.config)
	out, err := n.cmd.StderrPipe()
	if err == nil {
		err = n.cmd.Start()
	}
	if err != nil {
		n.t.Fatal(err)
	}
	var said strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		_, _ = said.WriteString(lines.Text() + "\n")
		if strings.HasSuffix(lines.Text(), "Server is ready") {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return
		}
	}
	n.t.Fatalf("nats-server did not start:\n%s", said.String())
}

func (n *natsServer) kill() {
	if n.cmd != nil {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
		n.cmd = nil
	}
}

// messages makes the stream when it is not there, and reads all that is in it.
func (n *natsServer) messages() []*jetstream.RawStreamMsg {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 10*time.Second)
	defer cancel()
	client, err := nats.Connect("nats://"+n.addr, nats.Token(n.token), nats.NoReconnect())
	if err != nil {
		n.t.Fatal(err)
	}
	defer client.Close()
	js, err := jetstream.New(client)
	if err != nil {
		n.t.Fatal(err)
	}
	stream, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.>"}, Duplicates: time.Minute})
	if err != nil {
		n.t.Fatal(err)
	}
	var all []*jetstream.RawStreamMsg
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(ctx, seq)
		if err != nil {
			n.t.Fatal(err)
		}
		all = append(all, m)
	}
	return all
}

// verifiedMessages asserts that messages are signed, and are on their subject once for each message id.
func (s *stand) verifiedMessages(all []*jetstream.RawStreamMsg, subject string) {
	s.t.Helper()
	ids := map[string]bool{}
	for _, m := range all {
		header := http.Header{}
		for name, values := range m.Header {
			header[http.CanonicalHeaderKey(name)] = values
		}
		s.verified(header, m.Data)
		id := header.Get("Webhook-Id")
		if m.Subject != subject || id == "" || !strings.HasPrefix(m.Header.Get(nats.MsgIdHdr), id) || ids[id] {
			s.t.Errorf("message %d of %s, id %q, headers %v", m.Sequence, m.Subject, id, m.Header)
		}
		ids[id] = true
	}
}

// cutter carries connections to a server, and cuts one when the server has answered a publication, before
// the answer is passed on.
type cutter struct {
	addr string

	mu   sync.Mutex
	left int // answers to keep back
	cuts int
}

func startCutter(t *testing.T, to string) *cutter {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{addr: lis.Addr().String()}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			in, err := lis.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, in, out)
			mu.Unlock()
			wg.Go(func() { _, _ = io.Copy(out, in); _ = out.Close() })
			wg.Go(func() { c.answers(in, out); _ = in.Close() })
		}
	})
	t.Cleanup(func() {
		_ = lis.Close()
		mu.Lock()
		for _, conn := range conns {
			_ = conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return c
}

func (c *cutter) answers(in io.Writer, out net.Conn) {
	buffer := make([]byte, 64<<10)
	for {
		n, err := out.Read(buffer)
		if err != nil {
			return
		}
		if bytes.Contains(buffer[:n], []byte(`"stream":`)) && c.cut() {
			_ = out.Close()
			return
		}
		if _, err := in.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (c *cutter) cut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left == 0 {
		return false
	}
	c.left--
	c.cuts++
	return true
}

// natsStream publishes to a stream that stores each event once, whatever happens on the way.
func natsStream(t *testing.T, s *stand) {
	token := s.canary("a token of NATS", "c4n4ry-nats-"+rand.Text())
	n := startNATS(t, token)
	n.messages()
	secrets := map[string]string{"token": token}
	s.over("orders", "nats://"+n.addr, route{plugin: "nats", config: map[string]any{"subject": "events.{type}", "stream": "EVENTS"}, secrets: secrets}, nil)
	s.send("orders", 20)
	s.once("orders")
	all := n.messages()
	if len(all) != 20 {
		t.Errorf("%d messages are stored, want 20", len(all))
	}
	s.verifiedMessages(all, "events.orders")

	// The stream has stored it, and nobody hears of it: the second attempt stores nothing.
	c := startCutter(t, n.addr)
	c.left = 1
	s.over("twice", "nats://"+c.addr+"/events/twice", route{plugin: "nats", secrets: secrets}, func(sub *grapnelv1.Subscription) {
		sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 3, Schedule: seconds(0)}
	})
	s.send("twice", 1)
	if d := s.of("twice", "attempt_count > 0")[0]; d.GetAttemptCount() != 2 || c.cuts != 1 {
		t.Errorf("%d attempts and %d answers kept back, want 2 and 1", d.GetAttemptCount(), c.cuts)
	}
	all = n.messages()
	if len(all) != 21 {
		t.Fatalf("%d messages are stored, want one more than 20", len(all))
	}
	s.verifiedMessages(all[20:], "events.twice")

	s.over("wrong", "nats://"+n.addr+"/events/x", route{plugin: "nats", secrets: map[string]string{"token": "c4n4ry-nats-wrong"}}, oneTry)
	s.over("nowhere", "nats://"+n.addr+"/elsewhere", route{plugin: "nats", secrets: secrets}, oneTry)
	for id, want := range map[string]string{"wrong": "the server does not know the credential", "nowhere": `no JetStream stream takes the subject "elsewhere"`} {
		d := s.fail(id)
		if body := s.attempts(d.GetName())[0].GetResponseBody(); !strings.Contains(string(body), want) {
			t.Errorf("%s ended as %v, %q; want %q", id, d.GetLastAttempt(), body, want)
		}
	}
	s.outage(n)
}

// outage takes the server away while there is something to deliver, and brings it back.
func (s *stand) outage(n *natsServer) {
	s.t.Helper()
	before := len(n.messages())
	n.kill()
	for range 5 {
		s.publish("orders")
	}
	var down []*grapnelv1.Delivery
	servertest.Await(s.t, "attempts without a server", func() bool {
		down = s.of("orders", "state = SCHEDULED")
		return len(down) == 5
	})
	for _, d := range down {
		a := d.GetLastAttempt()
		cut := a.GetOutcome() == grapnelv1.Attempt_OUTCOME_RETRYABLE && strings.HasPrefix(a.GetError(), "reset: ") // it was on its way already
		if !cut && a.GetOutcome() != grapnelv1.Attempt_OUTCOME_UNREACHABLE || a.GetError() == "" {
			s.t.Errorf("without a server: %v: %q", a.GetOutcome(), a.GetError())
		}
	}
	s.t.Logf("without a server: %s", down[0].GetLastAttempt().GetError())
	n.run()
	s.succeed("orders", 25)
	all := n.messages()
	if len(all) != before+5 {
		s.t.Fatalf("%d messages are stored, want 5 more than %d", len(all), before)
	}
	s.verifiedMessages(all[before:], "events.orders")
}
