//go:build linux

package pluginhost

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestAttemptCarriesTheRequest(t *testing.T) {
	for name, specs := range map[string][]Spec{
		"signed in the same hop": {self("plugin-all")},
		"signed elsewhere":       {self("plugin-transport"), self("plugin-signer")},
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t, nil, specs...).ready(t)
			job := newJob(7, "order.created")
			job.Event.Subject, job.Event.Attributes = "a b", map[string]string{
				"tenant": "x", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
			}
			job.Attempts = 2
			got := f.attempt(t, newSub(t, 1, map[string]any{"mode": "echo", "status": 500}), job)
			if got.Outcome != delivery.OutcomeRetryable || got.ResponseCode != 500 || got.Cause != delivery.CauseEndpoint || got.Number != 3 {
				t.Errorf("got %+v", got)
			}
			text := string(got.ResponseBody)
			text = regexp.MustCompile(`webhook-timestamp: \d+`).ReplaceAllString(text, "webhook-timestamp: T")
			text = regexp.MustCompile(`-[0-9a-f]{16}-01\n`).ReplaceAllString(text, "-SPAN-01\n")
			want := `POST mem://receiver/path {"n":7}
content-type: application/json
webhook-id: evt7
ce-specversion: 1.0
ce-id: ev-7
ce-source: /shop
ce-type: order.created
ce-time: 2023-11-14T22:13:20Z
ce-subject: a%20b
ce-tenant: x
x-static: yes
webhook-timestamp: T
webhook-signature: v1,71085e0432e28e05,7
traceparent: 00-0af7651916cd43dd8448eb211c80319c-SPAN-01
attempt: 3
`
			if diff := cmp.Diff(want, text); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
			if got.Peer != "mem:1" || len(got.RequestHeaders) != 2 {
				t.Errorf("peer %q, request headers %v", got.Peer, got.RequestHeaders)
			}
		})
	}
}

func TestOutcomes(t *testing.T) {
	f := start(t, nil, self("plugin-all")).ready(t)
	for i, tt := range []struct {
		config     map[string]any
		outcome    delivery.Outcome
		cause      delivery.Cause
		retryAfter time.Duration
	}{
		{map[string]any{"status": 204}, delivery.OutcomeSucceeded, 0, 0},
		{map[string]any{"status": 302}, delivery.OutcomeRetryable, 0, 0},
		{map[string]any{"status": 410}, delivery.OutcomePermanent, 0, 0},
		{map[string]any{"status": 503, "header": "Retry-After=120"}, delivery.OutcomeRetryable, 0, 2 * time.Minute},
		{map[string]any{"mode": "block"}, delivery.OutcomeTimedOut, 0, 0},
	} {
		sub := newSub(t, byte(i+1), tt.config)
		sub.AttemptTimeout = 200 * time.Millisecond
		got := f.attempt(t, sub, newJob(i, "x"))
		if got.Outcome != tt.outcome || got.Cause != tt.cause || got.RetryAfter != tt.retryAfter {
			t.Errorf("%v: outcome %d cause %d retry after %v (%s)", tt.config, got.Outcome, got.Cause, got.RetryAfter, got.Error)
		}
	}
}

// load keeps attempts coming until stopped, and returns the jobs.
func load(f *fixture, sub *subscription.Subscription, s *sink, n int) []*delivery.Job {
	jobs := make([]*delivery.Job, n)
	for i := range jobs {
		jobs[i] = newJob(i, "load")
		f.Attempt(sub, jobs[i], s)
	}
	return jobs
}

func TestKilledPluginLosesNothing(t *testing.T) {
	f := start(t, func(tm *timing) { tm.backoffMin = time.Millisecond; tm.park = 20 * time.Second }, self("plugin-all")).ready(t)
	sub := newSub(t, 1, map[string]any{"delay": "20ms"})
	s := newSink()
	const n = 20_000
	go func() {
		for range 3 {
			s.progress(t)
			pid := f.Pids()["test/all"]
			if pid != 0 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			eventually(t, "another process", func() bool {
				now := f.Pids()["test/all"]
				return now != 0 && now != pid
			})
		}
	}()
	jobs := load(f, sub, s, n)
	s.wait(t, n)
	indeterminate, succeeded := 0, 0
	for _, job := range jobs {
		if len(s.results[job]) != 1 {
			t.Fatalf("%s completed %d times", job.Event.ID, len(s.results[job]))
		}
		switch r := s.of(job); {
		case r.Outcome == delivery.OutcomeSucceeded:
			succeeded++
		case r.Indeterminate && r.Outcome == delivery.OutcomeInterrupted && r.Cause == delivery.CausePlugin && strings.HasPrefix(r.Error, "plugin lost: test/all: "):
			indeterminate++
		default:
			t.Fatalf("%s: %+v", job.Event.ID, r)
		}
	}
	if indeterminate == 0 || indeterminate > 3*4096 || succeeded == 0 {
		t.Errorf("%d indeterminate, %d succeeded", indeterminate, succeeded)
	}
}

// progress waits until some more attempts have completed.
func (s *sink) progress(t testing.TB) {
	s.mu.Lock()
	from := s.total
	s.mu.Unlock()
	eventually(t, "progress", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.total >= from+200
	})
}

func TestPanicSparesTheRest(t *testing.T) {
	f := start(t, nil, self("plugin-all")).ready(t)
	sub := newSub(t, 1, map[string]any{"mode": "panic", "delay": "10ms"})
	s := newSink()
	poison := newJob(0, "poison")
	f.Attempt(sub, poison, s)
	jobs := load(f, sub, s, 200)
	s.wait(t, 201)
	if r := s.of(poison); r.Outcome != delivery.OutcomePluginError || r.Cause != delivery.CausePlugin || !strings.Contains(r.Error, "panic") {
		t.Errorf("poison: %+v", r)
	}
	for _, job := range jobs {
		if r := s.of(job); r.Outcome != delivery.OutcomeSucceeded {
			t.Fatalf("%+v", r)
		}
	}
	if p, _ := f.Plugin("mem"); p.GetInstances()[0].GetRestartCount() != 0 {
		t.Error("the process was restarted")
	}
}

// standStill stops a process, and returns once each of its threads has.
func standStill(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all threads stand still", func() bool {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		return err == nil && len(threads) > 0 && !slices.ContainsFunc(threads, func(path string) bool {
			stat, _ := os.ReadFile(path)
			_, rest, _ := strings.Cut(string(stat), ") ")
			return !strings.HasPrefix(rest, "T")
		})
	})
}

func TestHungPluginIsRestarted(t *testing.T) {
	f := start(t, func(tm *timing) { tm.grace = 200 * time.Millisecond }, self("plugin-all")).ready(t)
	sub := newSub(t, 1, nil)
	sub.AttemptTimeout = 200 * time.Millisecond
	f.attempt(t, sub, newJob(0, "x"))
	pid := f.Pids()["test/all"]
	standStill(t, pid)
	got := f.attempt(t, sub, newJob(1, "x"))
	if !got.Indeterminate {
		t.Errorf("got %+v", got)
	}
	eventually(t, "the hung process is gone", func() bool { return !alive(pid) })
	eventually(t, "attempts succeed again", func() bool {
		return f.attempt(t, sub, newJob(2, "x")).Outcome == delivery.OutcomeSucceeded
	})
}

func TestSilentPluginIsRestarted(t *testing.T) {
	f := start(t, func(tm *timing) { tm.heartbeat = 20 * time.Millisecond }, self("plugin-all")).ready(t)
	pid := f.Pids()["test/all"]
	standStill(t, pid)
	eventually(t, "the silent process is gone", func() bool { return !alive(pid) })
	f.ready(t)
}

func TestCrashLoopFailsAndRecovers(t *testing.T) {
	flag := filepath.Join(t.TempDir(), "cured")
	f := start(t, func(tm *timing) {
		tm.backoffMin, tm.backoffMax, tm.failedRetry = time.Millisecond, 5*time.Millisecond, 100*time.Millisecond
		tm.park = 10 * time.Millisecond
	}, self("plugin-crash", flag))
	eventually(t, "the plugin has failed", func() bool { return f.processes()[0].failed() })
	eventually(t, "it is told until it is heard", func() bool { return len(f.failed()) == 2 })
	if got := f.failed()[0]; got.Crashes != failedAfter || got.Plugin == "" || !strings.Contains(got.Reason, "cannot find") || got.RetryTime.Sub(got.Time) != 100*time.Millisecond {
		t.Errorf("told of %+v", got)
	}
	restarts := func() int32 { return f.Plugins()[0].GetInstances()[0].GetRestartCount() }
	since := restarts()
	eventually(t, "it has failed again", func() bool { return restarts() > since+1 })
	if n := len(f.failed()); n != 2 {
		t.Errorf("told %d times, the second was heard", n)
	}
	p := f.Plugins()[0]
	if got := p.GetInstances()[0].GetLastError(); !strings.Contains(got, "cannot find") {
		t.Errorf("last error %q lacks what the plugin wrote", got)
	}
	if got := f.attempt(t, newSub(t, 1, nil), newJob(0, "x")); got.Cause != delivery.CauseUnspent {
		t.Errorf("while failed: %+v", got)
	}
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.ready(t)
	if got := f.attempt(t, newSub(t, 1, nil), newJob(0, "x")); got.Outcome != delivery.OutcomeSucceeded {
		t.Errorf("after recovery: %+v", got)
	}
}

// TestKillingIsNoFailure kills a process more often than a plugin may crash: it is not the plugin's doing, so the plugin
// is not left alone.
func TestKillingIsNoFailure(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	f := start(t, func(tm *timing) {
		tm.backoffMin, tm.backoffMax, tm.failedRetry = time.Millisecond, 5*time.Millisecond, time.Hour
	}, self("plugin-all")).ready(t)
	for range failedAfter + 2 {
		var pid int
		eventually(t, "it serves", func() bool {
			pid = f.Pids()["test/all"]
			return pid != 0
		})
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the end is noticed", func() bool { return f.Pids()["test/all"] != pid })
	}
	f.ready(t)
	if got := f.attempt(t, newSub(t, 1, nil), newJob(0, "x")); got.Outcome != delivery.OutcomeSucceeded {
		t.Errorf("after %d kills: %+v", failedAfter+2, got)
	}
	p := f.Plugins()[0]
	if got := p.GetInstances()[0]; got.GetRestartCount() != failedAfter+2 || got.GetLastError() != "signal: killed" || p.GetHealth().String() != "HEALTH_DEGRADED" {
		t.Errorf("after %d kills the status is %v: %v", failedAfter+2, p.GetHealth(), got)
	}
}

func (p *supervisor) failed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state == failed
}

func TestReconfigureUnderLoad(t *testing.T) {
	f := start(t, func(tm *timing) { tm.retire, tm.fade = 0, 0 }, self("plugin-all")).ready(t)
	sub := newSub(t, 1, map[string]any{"mode": "echo", "status": 500})
	s := newSink()
	var last []*delivery.Job
	for round := range 10 {
		load(f, sub, s, 200)
		key := fmt.Sprintf("key-%d-value", round)
		f.secrets.set(keyName, key)
		f.SecretChanged(keyName)
		last = load(f, sub, s, 100)
		s.wait(t, (round+1)*300)
		for _, job := range last {
			if r := s.of(job); !strings.Contains(string(r.ResponseBody), "v1,"+fingerprint([]byte(key))+",") {
				t.Fatalf("round %d: not signed with the new key: %+v %s", round, r, r.ResponseBody)
			}
		}
	}
	next := newSub(t, 1, map[string]any{"status": 204})
	next.Revision = 2
	f.Changed([]subscription.Change{{Old: sub, New: next}})
	if got := f.attempt(t, next, newJob(0, "x")); got.ResponseCode != 204 {
		t.Errorf("after the change: %+v", got)
	}
	said := f.processes()[0].conn.Load().said
	if got := said("key-9-value"); got != "[redacted]" {
		t.Errorf("the key in use is shown as %q", got)
	}
	// A secret that no instance holds any more is no secret here, and costs nothing.
	eventually(t, "the first key is forgotten", func() bool { return said("key-0-value") == "key-0-value" })
}

// TestInstancesThatNobodyUses are given back, with their secrets, and are there again when they are wanted.
func TestInstancesThatNobodyUses(t *testing.T) {
	f := start(t, func(tm *timing) { tm.idle, tm.retire, tm.fade = 50*time.Millisecond, 0, 0 }, self("plugin-all")).ready(t)
	sub := newSub(t, 1, nil)
	said := f.processes()[0].conn.Load().said
	for round := range 2 {
		if got := f.attempt(t, sub, newJob(0, "x")); got.Outcome != delivery.OutcomeSucceeded {
			t.Fatalf("round %d: %+v", round, got)
		}
		eventually(t, "the key is forgotten", func() bool { return said("key-one-value") == "key-one-value" && f.plans.get(sub.UID) == nil })
	}
}

// TestOfManyInstancesThoseStayThatAreUsed: where there are more than so many, the others go, the longest unused first.
func TestOfManyInstancesThoseStayThatAreUsed(t *testing.T) {
	const many = 3
	f := start(t, func(tm *timing) { tm.many, tm.lately, tm.retire, tm.fade = many, 0, 0, 0 }, self("plugin-all")).ready(t)
	var subs []*subscription.Subscription
	for i := range 2 * many {
		sub := newSub(t, byte(i+1), nil)
		subs = append(subs, sub)
		if got := f.attempt(t, sub, newJob(0, "x")); got.Outcome != delivery.OutcomeSucceeded {
			t.Fatalf("subscription %d: %+v", i, got)
		}
	}
	eventually(t, "the first ones are gone", func() bool {
		return !slices.ContainsFunc(subs[:many], func(s *subscription.Subscription) bool { return f.plans.get(s.UID) != nil })
	})
	for i, sub := range subs[many:] {
		if f.plans.get(sub.UID) == nil {
			t.Errorf("subscription %d is gone, which was used later than others", many+i)
		}
	}
	if got := f.attempt(t, subs[0], newJob(0, "x")); got.Outcome != delivery.OutcomeSucceeded {
		t.Errorf("one that is used again: %+v", got)
	}
}

func TestDrainFinishesWhatIsAtHand(t *testing.T) {
	f := start(t, nil, self("plugin-all")).ready(t)
	sub := newSub(t, 1, map[string]any{"delay": "300ms"})
	s := newSink()
	began := time.Now()
	jobs := load(f, sub, s, 100)
	pid := f.Pids()["test/all"]
	eventually(t, "attempts are under way", func() bool {
		return time.Since(began) > 100*time.Millisecond && f.processes()[0].conn.Load().attempts.outstanding() == 100
	})
	f.stop()
	for _, job := range jobs {
		if r := s.of(job); r.Outcome != delivery.OutcomeSucceeded {
			t.Fatalf("%+v", r)
		}
	}
	if alive(pid) {
		t.Error("the process is still there")
	}
	if got := f.attempt(t, sub, newJob(0, "x")); got.Cause != delivery.CauseUnspent {
		t.Errorf("after the stop: %+v", got)
	}
	left, err := filepath.Glob(filepath.Join(f.dirs.Own(), "*"))
	if err != nil || len(left) > 1 { // go-plugin removes its directory on a goroutine of its own
		t.Errorf("left in the socket directory: %v %v", left, err)
	}
}

func TestNothingOutlivesThePlugin(t *testing.T) {
	f := start(t, nil, self("plugin-all")).ready(t)
	got := f.attempt(t, newSub(t, 1, map[string]any{"mode": "spawn", "status": 500}), newJob(0, "x"))
	child, err := strconv.Atoi(string(got.ResponseBody))
	if err != nil {
		t.Fatal(err)
	}
	_ = syscall.Kill(f.Pids()["test/all"], syscall.SIGKILL)
	eventually(t, "the descendant is gone", func() bool { return !running(child) })
}

// running is alive without zombies, which a container's init may never collect.
func running(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func TestPluginHasNoEnvironment(t *testing.T) {
	t.Setenv("GRAPNEL_TEST_CANARY", "seen")
	f := start(t, nil, self("plugin-all")).ready(t)
	got := f.attempt(t, newSub(t, 1, map[string]any{"mode": "env", "status": 500}), newJob(0, "x"))
	for line := range strings.Lines(string(got.ResponseBody)) {
		if !strings.HasPrefix(line, "PLUGIN_") && !strings.HasPrefix(line, "GRAPNEL_PLUGIN=") && !strings.HasPrefix(line, "PATH=/usr/local/sbin:") &&
			strings.TrimSpace(line) != "GODEBUG=tracebacklabels=1" {
			t.Errorf("it sees %q", line)
		}
	}
}

func TestNoiseDoesNotBlock(t *testing.T) {
	f := start(t, nil, self("plugin-noisy")).ready(t)
	s := newSink()
	load(f, newSub(t, 1, nil), s, 500)
	s.wait(t, 500)
}

func TestSecretsAreNotRepeated(t *testing.T) {
	const token = "tok-canary-12345"
	f := start(t, nil, self("plugin-all")).ready(t)
	f.secrets.set("namespaces/acme/secrets/token", token)
	for i, mode := range []string{"loud", "leak"} {
		sub := newSub(t, byte(i+1), map[string]any{"mode": mode})
		sub.Proto().Transport.Secrets = map[string]string{"token": "namespaces/acme/secrets/token"}
		if got := f.attempt(t, sub, newJob(0, "x")); strings.Contains(got.Error, token) {
			t.Errorf("result has the secret: %s", got.Error)
		}
	}
	f.secrets.set(keyName, "bad-canary-12345")
	got := f.attempt(t, newSub(t, 3, nil), newJob(0, "x"))
	if got.Outcome != delivery.OutcomePluginError || strings.Contains(got.Error, "canary") || !strings.Contains(got.Error, "refused") {
		t.Errorf("refused config: %+v", got)
	}
	eventually(t, "the plugin's logs have come", func() bool {
		return strings.Contains(f.logs.String(), "the token is") && strings.Contains(f.logs.String(), "raw ")
	})
	if strings.Contains(f.logs.String(), "canary") {
		t.Error("the log has a secret")
	}
}

func TestPinnedBinary(t *testing.T) {
	spec := self("plugin-all")
	spec.SHA256 = strings.Repeat("0", 64)
	f := start(t, nil, spec)
	eventually(t, "the mismatch is a status", func() bool {
		return strings.Contains(f.Plugins()[0].GetInstances()[0].GetLastError(), "SHA-256")
	})
	if len(f.Pids()) != 0 {
		t.Error("it runs")
	}
}

// runHostProcess is a host in a process of its own: it prints its plugin's pid and lives on.
func runHostProcess() {
	spec := self("plugin-all")
	spec.Own = len(os.Args) > 2 && os.Args[2] == "own"
	h, err := New(Options{
		Plugins: []Spec{spec},
		Secrets: func(string) ([]SecretVersion, bool) { return nil, false },
	})
	if err == nil {
		go func() { _ = h.Run(context.Background()) }()
		err = h.Ready(context.Background())
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for last := 0; ; time.Sleep(time.Millisecond) {
		if pid := h.Pids()["test/all"]; pid != 0 && pid != last {
			fmt.Println(pid)
			last = pid
		}
	}
}

func TestPluginDiesWithItsHost(t *testing.T) {
	cmd := exec.Command(self().Path, "host")
	cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	eventually(t, "the plugin is gone", func() bool { return !running(pid) })
}
