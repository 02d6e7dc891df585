//go:build linux

package pluginhost

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

var storm = flag.Duration("storm", 2*time.Second, "how long the tests of kills and upgrades under load go on")

// version is a plugin of that version, which offers the signers ids besides mem and standard-webhooks.
func version(v string, ids ...string) Spec {
	spec := self(append([]string{"plugin-version", v}, ids...)...)
	spec.Name, spec.Builtin = "test/all", false
	return spec
}

// versions are the versions of a plugin's processes, in the order of the status.
func (f *fixture) versions(id string) (out []string) {
	p, _ := f.Plugin(id)
	for _, in := range p.GetInstances() {
		out = append(out, in.GetVersion())
	}
	return out
}

func (f *fixture) serves(t testing.TB, id, version string) {
	t.Helper()
	eventually(t, id+" is served by version "+version+" alone", func() bool {
		return cmp.Equal(f.versions(id), []string{version}) && len(f.Pids()) > 0
	})
}

// generator keeps a number of attempts open at a time, and counts what was sent in the plugin's own record.
type generator struct {
	f      *fixture
	sub    *subscription.Subscription
	sink   *sink
	jobs   []*delivery.Job
	record string
	stop   chan struct{}
	done   sync.WaitGroup
}

func generate(t testing.TB, f *fixture, open int) *generator {
	g := &generator{f: f, sink: newSink(), record: filepath.Join(t.TempDir(), "record"), stop: make(chan struct{})}
	g.sub = newSub(t, 1, map[string]any{"record": g.record, "delay": "5ms"})
	g.sub.MaxInFlight = open
	g.done.Go(func() {
		for {
			select {
			case <-g.stop:
				return
			default:
			}
			job := newJob(len(g.jobs), "load")
			g.jobs = append(g.jobs, job)
			f.Attempt(g.sub, job, g.sink)
			g.sink.room(len(g.jobs)-open, g.stop)
		}
	})
	return g
}

// room waits until at least n attempts have completed.
func (s *sink) room(n int, stop <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.total < n {
		select {
		case <-stop:
			return
		default:
			s.changed.Wait()
		}
	}
}

// finish stops the load, waits for what is open, and returns how often each message was sent.
func (g *generator) finish(t testing.TB) map[string]int {
	t.Helper()
	close(g.stop)
	g.sink.mu.Lock()
	g.sink.changed.Broadcast()
	g.sink.mu.Unlock()
	g.done.Wait()
	g.sink.wait(t, len(g.jobs))
	text, err := os.ReadFile(g.record)
	if err != nil {
		t.Fatal(err)
	}
	sent := map[string]int{}
	for line := range strings.Lines(string(text)) {
		sent[strings.TrimSpace(line)]++
	}
	return sent
}

func TestUpdateReconciles(t *testing.T) {
	f := start(t, nil, self("plugin-transport")).ready(t)
	builtin := f.Pids()["test/transport"]
	signer := self("plugin-signer2")
	signer.Builtin, signer.Name = false, "b"
	recorder := self("plugin-only-signer", "1.0.0")
	recorder.Builtin, recorder.Name = false, "a"
	f.Update([]Spec{signer, recorder})
	sub := newSub(t, 1, nil)
	eventually(t, "attempts are signed by what was added", func() bool {
		return f.attempt(t, sub, newJob(0, "x")).Outcome == delivery.OutcomeSucceeded
	})
	eventually(t, "both serve", func() bool { return len(f.Pids()) == 3 })
	before := f.Pids()
	f.Update([]Spec{recorder, signer})
	f.Update([]Spec{recorder})
	eventually(t, "what is missing has ended", func() bool { return !alive(before["test/signer2"]) && len(f.processes()) == 2 })
	if _, ok := f.Plugin("other-signer"); ok {
		t.Error("its kind is still listed")
	}
	delete(before, "test/signer2")
	if diff := cmp.Diff(before, f.Pids()); diff != "" {
		t.Errorf("the others were touched (-before +after):\n%s", diff)
	}
	f.Update(nil)
	eventually(t, "only the builtin one runs", func() bool { return cmp.Equal(f.Pids(), map[string]int{"test/transport": builtin}) })
	if got := f.attempt(t, sub, newJob(1, "x")); got.Cause != delivery.CauseUnspent {
		t.Errorf("without a signer: %+v", got)
	}
}

// TestHotUpgrade replaces a plugin again and again while hundreds of attempts are open. Each is made once.
func TestHotUpgrade(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	for name, specs := range map[string]func(v string) []Spec{
		"signer and transport": func(v string) []Spec { return []Spec{version(v)} },
		"transport alone": func(v string) []Spec {
			transport := self("plugin-recorder", v)
			transport.Builtin = false
			return []Spec{transport, self("plugin-signer")}
		},
		"signer alone": func(v string) []Spec {
			signer := self("plugin-only-signer", v)
			signer.Builtin = false
			return []Spec{self("plugin-recorder", "0"), signer}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t, nil, specs("1")...)
			f.unary(t)
			g := generate(t, f, 600)
			upgrades := 1
			for began := time.Now(); time.Since(began) < *storm/2 || upgrades < 3; {
				g.sink.progress(t)
				upgrades++
				f.Update(specs(fmt.Sprint(upgrades)))
				eventually(t, "the upgrade has ended", func() bool {
					return f.counted(t, "grapnel_plugin_upgrades_total") == float64(upgrades-1)
				})
			}
			sent := g.finish(t)
			for _, job := range g.jobs {
				if r := g.sink.of(job); len(g.sink.results[job]) != 1 || r.Outcome != delivery.OutcomeSucceeded {
					t.Fatalf("%s: completed %d times, %+v", job.Event.ID, len(g.sink.results[job]), r)
				}
				if sent[job.Event.UID] != 1 {
					t.Fatalf("%s was sent %d times", job.Event.ID, sent[job.Event.UID])
				}
			}
			t.Logf("%d attempts over %d versions", len(g.jobs), upgrades)
			eventually(t, "the old ones have gone", func() bool { return len(f.processes()) == len(specs("")) })
		})
	}
}

// unary waits for the first attempt that succeeds.
func (f *fixture) unary(t testing.TB) {
	t.Helper()
	eventually(t, "an attempt succeeds", func() bool {
		return f.attempt(t, newSub(t, 200, nil), newJob(0, "first")).Outcome == delivery.OutcomeSucceeded
	})
}

// TestQueueMovesOnAtAnUpgrade has more open than the old process takes at once, all of it slow: what was not written
// does not wait for it.
func TestQueueMovesOnAtAnUpgrade(t *testing.T) {
	f := start(t, nil, version("1"))
	f.unary(t)
	sub := newSub(t, 1, map[string]any{"delay": "4s"})
	sub.MaxInFlight = 5000
	s := newSink()
	load(f, sub, s, 4096+500)
	old := f.at("test/all", holding).conn.Load()
	eventually(t, "the old process has all it takes", func() bool { return old.attempts.outstanding() == 4096 })
	f.Update([]Spec{version("2")})
	eventually(t, "the new one has what was queued", func() bool {
		c := f.at("test/all", holding).conn.Load()
		return c != nil && c != old && c.attempts.outstanding() == 500
	})
	if diff := cmp.Diff([]string{"2", "1"}, f.versions("mem")); diff != "" {
		t.Errorf("both are listed (-want +got):\n%s", diff)
	}
	s.wait(t, 4596)
	f.serves(t, "mem", "2")
	for job, r := range s.results {
		if len(r) != 1 || r[0].Outcome != delivery.OutcomeSucceeded {
			t.Fatalf("%s: %+v", job.Event.ID, r)
		}
	}
}

func TestFailedUpgradeLeavesTheOldOne(t *testing.T) {
	pinned := version("2")
	pinned.SHA256 = strings.Repeat("0", 64)
	taken := version("2", "other-signer") // whose kind another plugin has
	ends, dies := self("plugin-ends"), self("plugin-raw", "dies-in-configure")
	ends.Name, dies.Name, ends.Builtin, dies.Builtin = "test/all", "test/all", false, false
	for name, tt := range map[string]struct {
		next Spec
		want string
	}{
		"another file":            {pinned, "SHA-256"},
		"it ends at once":         {ends, "exit status 4"},
		"it dies when configured": {dies, "exit status 7"},
		"its kind is taken":       {taken, `kind "other-signer" belongs to plugin pluginhost.test, which was installed before it`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			other := self("plugin-signer2")
			other.Builtin = false
			f := start(t, nil, version("1"), other)
			f.unary(t)
			eventually(t, "the other plugin serves", func() bool { return len(f.Pids()) == 2 })
			pid := f.Pids()["test/all"]
			f.Update([]Spec{tt.next, other})
			var in *grapnelv1.PluginInstance
			eventually(t, "the status says why", func() bool {
				p, _ := f.Plugin("mem")
				in = p.GetInstances()[0]
				return strings.Contains(in.GetLastError(), tt.want) && strings.Contains(in.GetLastError(), "not replaced") && len(p.GetInstances()) == 1
			})
			if in.GetHealth() != grapnelv1.Plugin_HEALTH_DEGRADED || int(in.GetPid()) != pid || in.GetVersion() != "1" || in.GetRestartCount() != 0 {
				t.Errorf("status: %v", in)
			}
			f.unary(t)
			if f.Pids()["test/all"] != pid {
				t.Error("the old process is not the one that serves")
			}
			f.Update([]Spec{version("1"), other})
			p, _ := f.Plugin("mem")
			if p.GetHealth() != grapnelv1.Plugin_HEALTH_SERVING || p.GetInstances()[0].GetLastError() != "" {
				t.Errorf("taken back: %v", p.GetInstances()[0])
			}
		})
	}
}

func TestUpgradeThatIsTakenBack(t *testing.T) {
	f := start(t, nil, version("1"))
	f.unary(t)
	silent := self("plugin-silent")
	silent.Name, silent.Builtin = "test/all", false
	f.Update([]Spec{silent})
	eventually(t, "it is on its way", func() bool { return len(f.versions("mem")) == 2 })
	f.Update([]Spec{silent}) // changes nothing
	if n := len(f.processes()); n != 2 {
		t.Errorf("%d processes", n)
	}
	f.Update([]Spec{version("1")})
	f.serves(t, "mem", "1")
	if p, _ := f.Plugin("mem"); p.GetHealth() != grapnelv1.Plugin_HEALTH_SERVING {
		t.Errorf("status %v", p.GetInstances())
	}
}

func TestUpgradeMayChangeKinds(t *testing.T) {
	f := start(t, nil, version("1", "extra"))
	f.unary(t)
	sub := newSub(t, 1, nil)
	sub.Proto().Signers[0].Plugin = "plugins/extra"
	if got := f.attempt(t, sub, newJob(0, "x")); got.Outcome != delivery.OutcomeSucceeded {
		t.Fatalf("%+v", got)
	}
	f.Update([]Spec{version("2", "surplus")})
	f.serves(t, "mem", "2")
	if _, ok := f.Plugin("extra"); ok {
		t.Error("the kind that is gone is listed")
	}
	if got := f.attempt(t, sub, newJob(1, "x")); got.Cause != delivery.CauseUnspent {
		t.Errorf("an attempt for the kind that is gone: %+v", got)
	}
	if _, ok := f.Plugin("surplus"); !ok {
		t.Error("the new kind is not listed")
	}
}

// TestFileReplacedOnDisk has the same spec mean another program, as a package manager does it.
func TestFileReplacedOnDisk(t *testing.T) {
	for name, dir := range map[string]bool{"a file": false, "a directory": true} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "acme")
			file := path
			if dir {
				file = filepath.Join(path, "plugin")
				if err := os.Mkdir(path, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			install := func(version string) {
				t.Helper()
				script := fmt.Sprintf("#!/bin/sh\nexec %s plugin-version %s\n", self().Path, version)
				if err := os.WriteFile(file+".new", []byte(script), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(file+".new", file); err != nil {
					t.Fatal(err)
				}
			}
			install("1")
			f := start(t, nil, Spec{Path: path})
			f.unary(t)
			pid := f.Pids()["test/all"]
			f.Update([]Spec{{Path: path}})
			install("2")
			f.serves(t, "mem", "1")
			if f.Pids()["test/all"] != pid {
				t.Error("restarted without a change")
			}
			f.Update([]Spec{{Path: path}})
			f.serves(t, "mem", "2")
			p, _ := f.Plugin("mem")
			if sum, err := Checksum(path); err != nil || p.GetInstances()[0].GetChecksum() != sum {
				t.Errorf("checksum %q, want %q (%v)", p.GetInstances()[0].GetChecksum(), sum, err)
			}
			f.unary(t)
		})
	}
}

// TestFailedPluginIsClearedByANewVersion replaces what does not run without waiting for it.
func TestFailedPluginIsClearedByANewVersion(t *testing.T) {
	ends := self("plugin-ends")
	ends.Name, ends.Builtin = "test/all", false
	f := start(t, func(tm *timing) {
		tm.backoffMin, tm.backoffMax, tm.failedRetry = time.Millisecond, time.Millisecond, time.Hour
	}, ends)
	eventually(t, "it has failed", func() bool { return f.processes()[0].failed() })
	f.Update([]Spec{version("2")})
	f.serves(t, "mem", "2")
	f.unary(t)
}

// TestKillStorm kills the plugin five times a second, and replaces it now and then, under load.
func TestKillStorm(t *testing.T) {
	f := start(t, func(tm *timing) {
		tm.backoffMin, tm.backoffMax, tm.failedRetry, tm.park = time.Millisecond, 10*time.Millisecond, 10*time.Millisecond, 20*time.Second
	}, version("1"))
	f.unary(t)
	g := generate(t, f, 300)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	kills := 0
	for began := time.Now(); time.Since(began) < *storm; {
		<-tick.C
		if pid := f.Pids()["test/all"]; pid != 0 && syscall.Kill(pid, syscall.SIGKILL) == nil {
			kills++
		}
		if kills%5 == 4 {
			f.Update([]Spec{version(fmt.Sprint(kills))})
		}
	}
	sent := g.finish(t)
	indeterminate := 0
	for _, job := range g.jobs {
		n, r := sent[job.Event.UID], g.sink.of(job)
		switch {
		case len(g.sink.results[job]) != 1:
			t.Fatalf("%s completed %d times", job.Event.ID, len(g.sink.results[job]))
		case r.Outcome == delivery.OutcomeSucceeded && n == 1:
		case r.Indeterminate && r.Cause == delivery.CausePlugin && n <= 1:
			indeterminate++
		default:
			t.Fatalf("%s was sent %d times: %+v", job.Event.ID, n, r)
		}
	}
	if kills == 0 || indeterminate > kills*4096 || indeterminate == len(g.jobs) {
		t.Errorf("%d kills, %d of %d attempts indeterminate", kills, indeterminate, len(g.jobs))
	}
	t.Logf("%d attempts, %d kills, %d indeterminate", len(g.jobs), kills, indeterminate)
}
