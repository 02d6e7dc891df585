package main

import (
	"context"
	"errors"
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

var stormDuration = flag.Duration("storm.duration", 3*time.Second, "how long TestStorm kills plugins")

const (
	stormEvery = 200 * time.Millisecond
	// spared is the crash before the one after which the server leaves a plugin alone for half a minute. Short
	// storms stop short of it, long ones do not.
	spared = 4
	long   = 20 * time.Second
)

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
		s.strike(t, d < long)
		s.server.living(t)
	}
}

// strike kills all children of the server, or all but those to spare.
func (s *storm) strike(t *testing.T, gentle bool) {
	t.Helper()
	keep := map[string]func(pid int) bool{}
	if gentle {
		for program, name := range map[string]string{"grapnel": standard, "stamp": stampSigner} {
			keep[program] = s.spares(s.server.plugin(t, name))
		}
	}
	for _, pid := range children(s.server.cmd.Process.Pid) {
		stat := procStat(pid)
		if len(stat) == 0 || stat[0] == "Z" {
			continue
		}
		if spare := keep[programOf(pid)]; spare != nil && spare(pid) {
			continue
		}
		if syscall.Kill(pid, syscall.SIGKILL) == nil {
			s.killed[pid] = true
		}
	}
}

// spares says which processes of a plugin to leave alone: none before it has crashed often enough, then the one that
// serves, and as long as that is not known, all.
func (s *storm) spares(p *grapnelv1.Plugin) func(pid int) bool {
	return func(pid int) bool {
		is := p.GetInstances()
		return len(is) > 0 && is[0].GetRestartCount() >= spared && (is[0].GetPid() == 0 || int(is[0].GetPid()) == pid)
	}
}

// programOf tells the server's children apart by their command line.
func programOf(pid int) string {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return ""
	}
	path, _, _ := strings.Cut(string(raw), "\x00")
	program, _, _ := strings.Cut(filepath.Base(path), "-")
	return program
}
