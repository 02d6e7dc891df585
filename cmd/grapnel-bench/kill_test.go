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

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

var (
	killCycles   = flag.Int("kill.cycles", 6, "how often TestKill kills the server")
	meddleCycles = flag.Int("kill.meddle", 2, "how often TestKillMeddling ends the server, with each kind of etcd; 0 skips it")
	killSeed     = flag.Uint64("kill.seed", 0, "seed of TestKill and TestKillMeddling; 0 draws one")
)

// seeded is what a test draws from, and says so.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := *killSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// TestKill kills the real server with SIGKILL again and again while events pour in, and holds two ledgers
// against each other: what was acknowledged to the publisher, and what the receivers accepted. Nothing
// acknowledged may be missing; whatever came twice must have come with the same webhook-id and bytes;
// nothing may arrive that was never published; every signature must verify. One receiver takes batches, and some of what is
// in them at its second coming only.
func TestKill(t *testing.T) {
	bin := buildGrapnel(t)
	dir := filepath.Join(t.TempDir(), "data")
	ledger := newReceiverLedger(t, "/a", "/b", batchPath)
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
	_, err = p.subscribeAs(ctx, namespace, "batched", 1, func(int) *grapnelv1.Subscription {
		sub := signed(namespace, rcv.URL+batchPath, "bench.*")
		sub.Batching = &grapnelv1.Batching{MaxEvents: 50, MaxWait: durationpb.New(20 * time.Millisecond)}
		sub.RetryPolicy = &grapnelv1.RetryPolicy{InitialBackoff: durationpb.New(time.Second), Multiplier: 1, MaxAttempts: 100}
		return sub
	})
	if err != nil {
		t.Fatal(err)
	}
	published := newPublisherLedger(5000)
	rng := seeded(t)
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
	t.Logf("%d cycles, %d events acknowledged, %d lost, %d requests, %d of them with several, for %d deliveries, slowest restart %v",
		*killCycles, published.sent(), lost, ledger.arrivals(), ledger.together, ledger.distinct(), restart)
	if ledger.together == 0 {
		t.Error("no request has carried several deliveries")
	}
}

// TestKillMeddling ends the server again and again, by kill -9 and as an operator does, while events pour in and
// subscriptions are paused, resumed, pointed elsewhere, deleted and made again, and deliveries cancelled and retried;
// an etcd of its own process is killed, too. Whatever was acknowledged must have arrived at every subscription that
// was there before it and is there now, unless somebody cancelled it; nothing may end twice, stay open, be cancelled by
// nobody, or arrive where it may not.
func TestKillMeddling(t *testing.T) {
	if *meddleCycles == 0 {
		t.Skip("-kill.meddle says how many cycles")
	}
	t.Run("embedded etcd", func(t *testing.T) { killMeddling(t, false) })
	t.Run("external etcd", func(t *testing.T) { killMeddling(t, true) })
}

func killMeddling(t *testing.T, external bool) {
	m := newMeddling(t, external)
	rng := seeded(t)
	if err := m.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p, _ := m.server()
		p.kill()
	})
	if err := m.p.prepare(t.Context(), namespace); err != nil {
		t.Fatal(err)
	}
	for i := range meddled {
		if err := m.create(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	run, stop := context.WithCancel(t.Context())
	defer stop()
	var others sync.WaitGroup
	for first := range meddlers {
		edits := rand.New(rand.NewPCG(rng.Uint64(), uint64(first)))
		others.Go(func() {
			if err := m.meddle(run, edits, first); err != nil {
				m.complain("%v", err)
			}
		})
	}
	others.Go(func() { m.watch(run) })
	for range *meddleCycles {
		m.cycle(t, rng)
	}
	stop()
	others.Wait()
	all := m.settle(t)
	v, wrong := m.judge(all)
	for _, w := range wrong[:min(len(wrong), 20)] {
		t.Error(w)
	}
	if more := len(wrong) - 20; more > 0 {
		t.Errorf("and %d more", more)
	}
	t.Logf("%d cycles, %d of them kills, edits %v, %d sweeps; %d events acknowledged, %d deliveries, %d arrivals: %d lost, %d stuck, %d ended twice",
		*meddleCycles, m.crashes, m.done, m.swept, m.published.sent(), len(all), m.ledger.arrivals(), v.lost, v.stuck, v.twice)
}
