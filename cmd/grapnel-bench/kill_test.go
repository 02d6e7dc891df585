package main

import (
	"context"
	"flag"
	"math/rand/v2"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

var killCycles = flag.Int("kill.cycles", 20, "how often TestKill kills the server")

// TestKill kills the real server with SIGKILL again and again while events pour in, and holds two ledgers
// against each other: what was acknowledged to the publisher, and what the receivers accepted. Nothing
// acknowledged may be missing; whatever came twice must have come with the same webhook-id and bytes;
// nothing may arrive that was never published; every signature must verify.
func TestKill(t *testing.T) {
	bin := buildGrapnel(t)
	dir := filepath.Join(t.TempDir(), "data")
	ledger := newReceiverLedger(t, "/a", "/b")
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
	published := newPublisherLedger(5000)
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
	lost := balance(t, published, ledger)
	if err := p.recorded(ctx, namespace); err != nil {
		t.Error(err)
	}
	t.Logf("%d cycles, %d events acknowledged, %d lost, %d arrivals of %d deliveries, slowest restart %v",
		*killCycles, published.sent(), lost, ledger.arrivals(), ledger.distinct(), restart)
}
