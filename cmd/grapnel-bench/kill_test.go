package main

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/webhook"
)

var killCycles = flag.Int("kill.cycles", 20, "how often TestKill kills the server")

// TestKill kills the real server with SIGKILL again and again while events pour in, and holds two ledgers
// against each other: what was acknowledged to the publisher, and what the receivers accepted. Nothing
// acknowledged may be missing; whatever came twice must have come with the same webhook-id and bytes;
// nothing may arrive that was never published; every signature must verify.
func TestKill(t *testing.T) {
	bin := buildGrapnel(t)
	dir := filepath.Join(t.TempDir(), "data")
	ledger := newReceiverLedger(t)
	rcv := httptest.NewServer(ledger)
	t.Cleanup(rcv.Close)
	ctx := t.Context()

	p, err := startServer(ctx, bin, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill() })
	if err := p.prepare(ctx, namespace, rcv.URL+"/a", rcv.URL+"/b"); err != nil {
		t.Fatal(err)
	}
	published := &publisherLedger{bodies: map[string][32]byte{}}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	restart := time.Duration(0)
	for cycle := range *killCycles {
		run, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() { published.publish(run, p.conn, ledger) })
		}
		life := time.NewTimer(50*time.Millisecond + time.Duration(rng.Int64N(int64(time.Second))))
		<-life.C
		p.kill()
		cancel()
		wg.Wait()
		if p, err = startServer(ctx, bin, dir); err != nil {
			t.Fatalf("cycle %d: %v", cycle, err)
		}
		restart = max(restart, p.ready)
	}
	// What was sent without an answer is sent again with the same ID, as the SDK does; then everything
	// that was ever published must arrive.
	published.settle(t, p.conn)
	want := published.all()
	ledger.await(2 * len(want))
	missing := ledger.missing(want)
	for i, m := range missing {
		if i == 10 {
			break
		}
		t.Errorf("lost: %s", m)
	}
	for _, f := range ledger.faults(want) {
		t.Error(f)
	}
	if err := p.recorded(ctx, namespace); err != nil {
		t.Error(err)
	}
	t.Logf("%d cycles, %d events acknowledged, %d lost, %d arrivals of %d deliveries, slowest restart %v",
		*killCycles, len(want), len(missing), ledger.arrivals(), 2*len(want), restart)
}

func buildGrapnel(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "grapnel")
	out, err := exec.Command("go", "build", "-o", bin, "github.com/grapnel/grapnel/cmd/grapnel").CombinedOutput()
	if err != nil {
		t.Fatalf("build grapnel: %v\n%s", err, out)
	}
	return bin
}

// publisherLedger is what the publisher knows: every event it sent, and those it has no answer for.
type publisherLedger struct {
	mu      sync.Mutex
	next    int
	bodies  map[string][32]byte
	unknown []*grapnelv1.Event
}

// publish sends batches until the server dies under it; it begins with what has no answer yet. It keeps
// some thousand deliveries ahead of the receivers, so that each kill hits all parts at work and the
// backlog of hundreds of kills need not be waited for at the end.
func (l *publisherLedger) publish(ctx context.Context, conn *grpc.ClientConn, rcv *receiverLedger) {
	client := grapnelv1.NewPublishServiceClient(conn)
	for ctx.Err() == nil {
		if l.sent()*2-rcv.distinct() > 5000 {
			pause := time.NewTimer(time.Millisecond)
			<-pause.C
			continue
		}
		events := l.take(20)
		resp, err := client.BatchPublish(ctx, &grapnelv1.BatchPublishRequest{Parent: "namespaces/" + namespace, Events: events})
		l.mu.Lock()
		for i, e := range events {
			if err != nil || resp.GetResults()[i].GetError() != nil {
				l.unknown = append(l.unknown, e)
			}
		}
		l.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (l *publisherLedger) sent() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next
}

// take returns n events: first those without an answer, then new ones.
func (l *publisherLedger) take(n int) []*grapnelv1.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := min(n, len(l.unknown))
	events := append([]*grapnelv1.Event(nil), l.unknown[:k]...)
	l.unknown = l.unknown[k:]
	for len(events) < n {
		l.next++
		body := payload(200, int64(l.next), time.Now())
		e := event(int64(l.next), body)
		l.bodies[e.GetId()] = sha256.Sum256(body)
		events = append(events, e)
	}
	return events
}

// settle resends what has no answer until all of it has one.
func (l *publisherLedger) settle(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	client := grapnelv1.NewPublishServiceClient(conn)
	for len(l.unknown) > 0 {
		k := min(100, len(l.unknown))
		resp, err := client.BatchPublish(t.Context(), &grapnelv1.BatchPublishRequest{
			Parent: "namespaces/" + namespace, Events: l.unknown[:k],
		})
		if err != nil {
			t.Fatalf("resend: %v", err)
		}
		for _, r := range resp.GetResults() {
			if r.GetError() != nil {
				t.Fatalf("resend: %v", r.GetError())
			}
		}
		l.unknown = l.unknown[k:]
	}
}

func (l *publisherLedger) all() map[string][32]byte { return l.bodies }

// receiverLedger is what two receivers saw.
type receiverLedger struct {
	t        *testing.T
	verifier *webhook.Verifier

	mu    sync.Mutex
	seen  map[string]arrival // by path and event ID
	count int
	wrong []string
}

type arrival struct {
	webhookID string
	body      [32]byte
}

func newReceiverLedger(t *testing.T) *receiverLedger {
	v, err := webhook.NewVerifier(benchKey)
	if err != nil {
		t.Fatal(err)
	}
	return &receiverLedger{t: t, verifier: v, seen: map[string]arrival{}}
}

func (l *receiverLedger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // cut off by the kill; not an arrival
	}
	bad := l.verifier.Verify(r.Header, body)
	key := r.URL.Path + " " + r.Header.Get("Ce-Id")
	got := arrival{r.Header.Get("Webhook-Id"), sha256.Sum256(body)}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	if bad != nil {
		l.wrong = append(l.wrong, fmt.Sprintf("%s: bad signature: %v", key, bad))
	}
	if before, ok := l.seen[key]; ok && before != got {
		l.wrong = append(l.wrong, fmt.Sprintf("%s: came again as %s, before as %s", key, got.webhookID, before.webhookID))
	}
	l.seen[key] = got
	w.WriteHeader(http.StatusNoContent)
}

// distinct counts the deliveries that have arrived, each once.
func (l *receiverLedger) distinct() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.seen)
}

// await waits until n deliveries have arrived, or none has for a minute.
func (l *receiverLedger) await(n int) {
	last, since := 0, time.Now()
	for have := l.distinct(); have < n && time.Since(since) < time.Minute; have = l.distinct() {
		if have != last {
			last, since = have, time.Now()
		}
		pause := time.NewTimer(20 * time.Millisecond)
		<-pause.C
	}
}

func (l *receiverLedger) missing(want map[string][32]byte) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for id := range want {
		for _, path := range []string{"/a", "/b"} {
			if _, ok := l.seen[path+" "+id]; !ok {
				out = append(out, path+" "+id)
			}
		}
	}
	return out
}

// faults are arrivals that should not have been, or not like that.
func (l *receiverLedger) faults(want map[string][32]byte) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.wrong
	for key, got := range l.seen {
		id := key[len("/a "):]
		body, ok := want[id]
		switch {
		case !ok:
			out = append(out, key+": was never published")
		case body != got.body:
			out = append(out, key+": arrived with other bytes")
		}
	}
	return out
}

func (l *receiverLedger) arrivals() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}
