package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/plugindir"
)

var upgradeTimes = flag.Int("upgrade.times", 1, "how often TestUpgrade replaces the plugin")

// TestUpgrade installs versions of a third party's signer and transport over one another, as an operator does, into
// the plugin directory of a running server while events pour in. Nothing may be lost and nothing may come twice, for
// an upgrade is no crash; no attempt may fail; and what is published after a change goes by the new version. Versions
// that do not come up change nothing. While the plugin is removed deliveries wait, and go on once it is back.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	u := newUpgrade(t)
	versions := []string{"1.0.0", "2.0.0"}
	for i := range *upgradeTimes {
		u.to(t, versions[(i+1)%2])
	}
	u.broken(t)
	u.removed(t)

	u.stop()
	u.publishers.Wait()
	u.published.settle(t, u.server.conn)
	lost := balance(t, u.published, u.ledger)
	if err := u.server.recorded(t.Context(), namespace); err != nil {
		t.Error(err)
	}
	if doubled := u.ledger.arrivals() - u.ledger.distinct(); doubled != 0 {
		t.Errorf("%d arrivals twice", doubled)
	}
	if cut := u.server.blameless(t, u.published.sent()*len(u.ledger.paths)); cut != 0 {
		t.Errorf("%d attempts were cut off", cut)
	}
	u.versions(t)
	u.server.living(t)
	t.Logf("%d upgrades, %d broken versions, 1 removal: %d events acknowledged, %d arrivals of %d deliveries, %d lost",
		*upgradeTimes, u.refused, u.published.sent(), u.ledger.arrivals(), u.ledger.distinct(), lost)
	if err := u.server.stop(); err != nil {
		t.Error(err)
	}
}

// upgrade is a server under load whose plugin changes.
type upgrade struct {
	bin, dir   string
	server     *serverProcess
	ledger     *receiverLedger
	published  *publisherLedger
	publishers sync.WaitGroup
	stop       context.CancelFunc
	refused    int

	mu     sync.Mutex // guards what follows
	phases []phase
	wrong  []string
	counts map[string]int // arrivals of the latest phase's version, by path
}

// phase is a stretch in which one version serves alone.
type phase struct {
	version string
	// after is the number of the last event that was made before it.
	after int
	over  bool
}

func newUpgrade(t *testing.T) *upgrade {
	t.Helper()
	u := &upgrade{bin: buildGrapnel(t), dir: filepath.Join(t.TempDir(), "plugins"), counts: map[string]int{}}
	managePlugins(t, u.bin, u.dir, "install", "--skip-tests", buildStamp(t, "1.0.0"))
	// Signed and sent in different processes, in one, and by the plugin only sent; the last has nothing to do with it.
	u.ledger = newReceiverLedger(t, "/signed", "/both", "/sent", "/none")
	u.ledger.linger = lingering
	bundled := u.ledger.verify
	u.ledger.verify = func(r *http.Request, body []byte) error { return u.verify(r, body, bundled) }
	rcv := httptest.NewServer(u.ledger)
	t.Cleanup(rcv.Close)
	ctx, stop := context.WithCancel(t.Context())
	t.Cleanup(stop)
	u.stop = stop
	var err error
	if u.server, err = startServer(ctx, u.bin, filepath.Join(t.TempDir(), "data"), "--plugin-dir", u.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.server.kill)
	if err := u.server.prepare(ctx, namespace); err != nil {
		t.Fatal(err)
	}
	u.server.awaitPlugin(t, stampSigner, "the plugin serves", serves("1.0.0"))
	own := "stamp" + strings.TrimPrefix(rcv.URL, "http")
	if err := errors.Join(
		u.server.subscribe(ctx, "signed", rcv.URL+"/signed", "", stampSigner),
		u.server.subscribe(ctx, "both", own+"/both", stampTransport, stampSigner),
		u.server.subscribe(ctx, "sent", own+"/sent", stampTransport, standard),
		u.server.subscribe(ctx, "none", rcv.URL+"/none", "", standard),
	); err != nil {
		t.Fatal(err)
	}
	u.published = newPublisherLedger(2000)
	u.published.pace = 100 * time.Millisecond
	u.phases = []phase{{version: "1.0.0"}}
	for range 2 {
		u.publishers.Go(func() { u.published.publish(ctx, u.server.conn, u.ledger) })
	}
	u.begin(t, "1.0.0")
	return u
}

// verify checks the signature and notes by which version the request was made.
func (u *upgrade) verify(r *http.Request, body []byte, bundled func(*http.Request, []byte) error) error {
	var versions []string
	switch r.URL.Path {
	case "/none":
		return bundled(r, body)
	case "/sent":
		if err := bundled(r, body); err != nil {
			return err
		}
	default:
		signed, err := verifyStamp(r, body)
		if err != nil {
			return err
		}
		versions = append(versions, signed)
	}
	if r.URL.Path != "/signed" {
		versions = append(versions, r.Header.Get("Stamp-Carrier"))
	}
	event, err := strconv.Atoi(strings.TrimPrefix(r.Header.Get("Ce-Id"), "bench-"))
	if err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.phases[len(u.phases)-1]
	if event <= now.after || now.over {
		return nil // it may have been at hand in the change
	}
	for _, v := range versions {
		if v != now.version {
			u.wrong = append(u.wrong, fmt.Sprintf("%s: event %d, published under version %s, was handled by %s", r.URL.Path, event, now.version, v))
		}
	}
	u.counts[r.URL.Path]++
	return nil
}

// begin opens the phase of a version, and returns when some deliveries have gone by it everywhere.
func (u *upgrade) begin(t *testing.T, version string) {
	t.Helper()
	u.mu.Lock()
	u.phases = append(u.phases, phase{version: version, after: u.published.sent()})
	clear(u.counts)
	u.mu.Unlock()
	await(t, time.Minute, "deliveries go by version "+version, func() bool { return u.flows(u.ledger.paths[:3]...) })
}

// flows reports whether deliveries of the present phase have arrived at all of the paths.
func (u *upgrade) flows(paths ...string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, p := range paths {
		if u.counts[p] < 50 {
			return false
		}
	}
	return true
}

// end closes the phase: another version may serve from now on.
func (u *upgrade) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.phases[len(u.phases)-1].over = true
}

// to installs a version and sees it take over.
func (u *upgrade) to(t *testing.T, version string) {
	t.Helper()
	before := u.pid(t)
	u.end()
	managePlugins(t, u.bin, u.dir, "install", "--skip-tests", buildStamp(t, version))
	u.server.awaitPlugin(t, stampSigner, "version "+version+" serves alone", serves(version))
	if got := u.server.plugin(t, stampTransport).GetVersion(); got != version {
		t.Errorf("the transport is of version %s, want %s", got, version)
	}
	await(t, time.Minute, "the old process is gone", func() bool { return len(procStat(before)) == 0 })
	u.begin(t, version)
	out, err := exec.Command(u.bin, "plugin", "list", "--addr", u.server.addr).CombinedOutput()
	if err != nil || !listed(string(out), "stamp", version) || !listed(string(out), "stamp-post", version) {
		t.Errorf("grapnel plugin list, after %s was installed: %v\n%s", version, err, out)
	}
}

// listed reports whether a table of plugins has one in a version.
func listed(table, id, version string) bool {
	for line := range strings.Lines(table) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] == id && slices.Contains(fields, version) {
			return true
		}
	}
	return false
}

func (u *upgrade) pid(t *testing.T) int {
	t.Helper()
	is := u.server.plugin(t, stampSigner).GetInstances()
	if len(is) != 1 || is[0].GetPid() == 0 {
		t.Fatalf("not one process serves: %v", is)
	}
	return int(is[0].GetPid())
}

// broken installs what cannot take over: the version that runs goes on, and its status says why.
func (u *upgrade) broken(t *testing.T) {
	t.Helper()
	script := filepath.Join(t.TempDir(), "stamp")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho out of luck >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := u.pid(t)
	if out, err := plugins(u.bin, u.dir, "install", "--skip-tests", script); err == nil || !strings.Contains(out, "out of luck") {
		t.Errorf("a plugin that does not come up was installed, or not refused with its last words: %v\n%s", err, out)
	}
	running := u.manifest(t)
	lying := &pluginv1.DescribeResponse{}
	if err := protojson.Unmarshal(running, lying); err != nil {
		t.Fatal(err)
	}
	lying.Version = "3.0.0"
	for file, why := range map[string]string{script: "exit status 1", buildStamp(t, "1.0.0"): "3.0.0"} {
		u.put(t, file, lying)
		u.server.awaitPlugin(t, stampSigner, "the status says "+why, func(p *grapnelv1.Plugin) bool {
			is := p.GetInstances()
			return len(is) == 1 && strings.Contains(is[0].GetLastError(), why)
		})
		u.refused++
		p := u.server.plugin(t, stampSigner)
		if p.GetHealth() != grapnelv1.Plugin_HEALTH_DEGRADED {
			t.Errorf("health is %v although an upgrade failed: %v", p.GetHealth(), p)
		}
		u.begin(t, u.phases[len(u.phases)-1].version) // no other version may have served, nor serve now
	}
	if now := u.pid(t); now != before {
		t.Errorf("process %d serves, before the broken versions it was %d", now, before)
	}
}

// manifest is what plugins.lock says that the plugin describes itself as.
func (u *upgrade) manifest(t *testing.T) []byte {
	t.Helper()
	lock, _, err := plugindir.Open(u.dir).Read()
	if err != nil || len(lock.Plugins) != 1 {
		t.Fatalf("plugins.lock: %v, %v", lock, err)
	}
	return lock.Plugins[0].Manifest
}

// put installs a file with a manifest that the file does not live up to.
func (u *upgrade) put(t *testing.T, file string, manifest *pluginv1.DescribeResponse) {
	t.Helper()
	staged, err := plugindir.Open(u.dir).Stage(file)
	if err == nil {
		defer staged.Discard()
		_, err = staged.Commit(manifest, nil, plugindir.Entry{Enabled: true})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// removed takes the plugin away for a while: deliveries for it wait, with all their attempts, and others do not.
func (u *upgrade) removed(t *testing.T) {
	t.Helper()
	before := u.pid(t)
	u.end()
	managePlugins(t, u.bin, u.dir, "remove", "example/stamp")
	await(t, time.Minute, "the plugin is gone", func() bool {
		return u.server.plugin(t, stampSigner) == nil && len(procStat(before)) == 0
	})
	var waiting []*grapnelv1.Delivery
	await(t, time.Minute, "deliveries wait for their plugin", func() bool {
		waiting = u.server.deliveries(t, `state = "PENDING" AND subscription = "both"`)
		return len(waiting) > 100
	})
	for _, d := range waiting {
		if d.GetAttemptCount() != 0 {
			t.Errorf("%s waits with %d attempts used up: %v", d.GetName(), d.GetAttemptCount(), d.GetLastAttempt())
		}
	}
	await(t, time.Minute, "deliveries that need no third party go on", func() bool {
		return u.ledger.has("/none", path.Base(waiting[0].GetEvent()))
	})
	managePlugins(t, u.bin, u.dir, "install", buildStamp(t, "2.0.0"))
	u.server.awaitPlugin(t, stampSigner, "the plugin is back", serves("2.0.0"))
	u.begin(t, "2.0.0")
}

// versions fails the test for each delivery that went by a version which did not serve any more.
func (u *upgrade) versions(t *testing.T) {
	t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, w := range u.wrong[:min(len(u.wrong), 10)] {
		t.Error(w)
	}
}
