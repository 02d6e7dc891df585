package main

import (
	"context"
	"errors"
	"flag"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

var stormDuration = flag.Duration("storm.duration", 3*time.Second, "how long TestStorm kills plugins")

const stormEvery = 200 * time.Millisecond

// TestStorm kills all plugin processes of a real server with SIGKILL every 200 ms while events pour in: the bundled
// one, a third party's that signs, and those that take what was in flight. Everything that was acknowledged must
// arrive; what comes twice must come with the same webhook-id and bytes; every signature must verify; and nothing
// may count against the receivers.
func TestStorm(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("finds the plugin processes in /proc")
	}
	t.Parallel()
	ctx := t.Context()
	bin, dir := buildGrapnel(t), filepath.Join(t.TempDir(), "plugins")
	managePlugins(t, bin, dir, "install", "--skip-tests", buildStamp(t, "1.0.0"))
	ledger := newReceiverLedger(t, "/bundled", "/both")
	ledger.linger = lingering
	bundled := ledger.verify
	ledger.verify = func(r *http.Request, body []byte) error {
		err := bundled(r, body)
		if r.URL.Path == "/both" {
			_, stamp := verifyStamp(r, body)
			err = errors.Join(err, stamp)
		}
		return err
	}
	rcv := httptest.NewServer(ledger)
	t.Cleanup(rcv.Close)
	p, err := startServer(ctx, bin, filepath.Join(t.TempDir(), "data"), "--plugin-dir", dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	if err := p.prepare(ctx, namespace); err != nil {
		t.Fatal(err)
	}
	p.awaitPlugin(t, stampSigner, "the signer serves", serves("1.0.0"))
	if err := errors.Join(
		p.subscribe(ctx, "bundled", rcv.URL+"/bundled", "", standard),
		p.subscribe(ctx, "both", rcv.URL+"/both", "", standard, stampSigner),
	); err != nil {
		t.Fatal(err)
	}

	published := newPublisherLedger(3000)
	published.pace = 80 * time.Millisecond
	run, stop := context.WithCancel(ctx)
	defer stop()
	var publishers sync.WaitGroup
	for range 2 {
		publishers.Go(func() { published.publish(run, p.conn, ledger) })
	}
	await(t, time.Minute, "deliveries arrive", func() bool { return ledger.distinct() > 200 })
	s := &storm{server: p, killed: map[int]bool{}}
	s.rage(t, *stormDuration)
	calm, sent := time.Now(), published.sent()
	// What was published after the storm arrives too: by then all that was before it has had its turn.
	await(t, 2*time.Minute, "deliveries arrive again", func() bool {
		return published.sent() > sent+500 && ledger.distinct() > 2*sent
	})
	recovery := time.Since(calm)
	stop()
	publishers.Wait()
	published.settle(t, p.conn)
	lost := balance(t, published, ledger)
	if err := p.recorded(ctx, namespace); err != nil {
		t.Error(err)
	}
	p.living(t)
	interrupted := p.blameless(t, 2*published.sent())
	t.Logf("%v of storm: %d processes killed, %d events acknowledged, %d arrivals, %d deliveries, %d duplicates, %d attempts cut off, %d lost; back after %v",
		*stormDuration, len(s.killed), published.sent(), ledger.arrivals(), ledger.distinct(),
		ledger.arrivals()-ledger.distinct(), interrupted, lost, recovery.Round(time.Millisecond))
	if len(s.killed) < 4 {
		t.Errorf("%d processes killed; that is no storm", len(s.killed))
	}
	if err := p.stop(); err != nil {
		t.Error(err)
	}
}

// storm kills plugin processes of a server.
type storm struct {
	server *serverProcess
	killed map[int]bool
}

func (s *storm) rage(t *testing.T, d time.Duration) {
	t.Helper()
	tick := time.NewTicker(stormEvery)
	defer tick.Stop()
	for end := time.Now().Add(d); time.Now().Before(end); <-tick.C {
		s.strike()
		s.server.living(t)
	}
}

// strike kills all children of the server.
func (s *storm) strike() {
	for _, pid := range children(s.server.cmd.Process.Pid) {
		if stat := procStat(pid); len(stat) == 0 || stat[0] == "Z" {
			continue
		}
		if syscall.Kill(pid, syscall.SIGKILL) == nil {
			s.killed[pid] = true
		}
	}
}
