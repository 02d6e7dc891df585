//go:build linux

package pluginhost

import (
	"bytes"
	"context"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

type mortalConfig struct {
	Delay plugin.Duration `json:"delay" default:"0s" maximum:"1m"`
	// Broken dies of everything.
	Broken bool `json:"broken"`
}

// mortalTransport dies of some events.
func mortalTransport() plugin.Kind {
	return plugin.Transport("mem", func(c mortalConfig, _ plugin.Target) (plugin.AttemptFunc, error) {
		return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
			kind := r.Get("ce-type")
			for _, of := range []string{"exit", "fault"} {
				if r.Batch && bytes.Contains(r.Body, []byte(`"type":"`+of+`"`)) {
					kind = of
				}
			}
			if c.Broken {
				kind = "exit"
			}
			switch kind {
			case "exit":
				os.Exit(7)
			case "fault":
				_ = syscall.Kill(os.Getpid(), syscall.SIGSEGV)
				select {}
			case "killed":
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			case "stuck":
				select {} // ignores its context
			}
			select {
			case <-time.After(c.Delay.Std()):
				return &plugin.Response{Status: 200}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}, nil
	}, plugin.Schemes("mem"), plugin.Batches())
}

// course takes deliveries to their ends as dispatch would, by delivery.Next, with pauses that suit a test.
type course struct {
	f      *fixture
	sub    *subscription.Subscription
	slots  chan struct{}
	policy delivery.Policy

	mu   sync.Mutex
	ends map[string]delivery.Step
	jobs map[string]*delivery.Job
	wg   sync.WaitGroup
}

func newCourse(f *fixture, sub *subscription.Subscription, slots int) *course {
	return &course{
		f: f, sub: sub, slots: make(chan struct{}, slots),
		policy: delivery.Policy{Schedule: []time.Duration{50 * time.Millisecond, 200 * time.Millisecond}, Jitter: 0.2},
		ends:   map[string]delivery.Step{}, jobs: map[string]*delivery.Job{},
	}
}

func (c *course) deliver(n int, eventType string) {
	job := newJob(n, eventType)
	job.Expire = time.Now().Add(time.Hour)
	c.mu.Lock()
	c.jobs[job.Event.ID] = job
	c.mu.Unlock()
	c.wg.Add(1)
	c.slots <- struct{}{}
	c.f.Attempt(c.sub, job, c)
}

func (c *course) Complete(job *delivery.Job, r delivery.Result) {
	<-c.slots
	now := time.Now()
	step := delivery.Next(c.policy, job, r, now, 0.5)
	wait := 10 * time.Millisecond
	if r.Cause != delivery.CauseUnspent {
		job.Suspicion = delivery.Watch(job, r)
		job.Attempts++
		if r.Indeterminate {
			job.Indeterminate++
		}
		wait = step.Due.Sub(now)
	}
	if step.State.Final() {
		c.mu.Lock()
		c.ends[job.Event.ID] = step
		c.mu.Unlock()
		c.wg.Done()
		return
	}
	time.AfterFunc(wait, func() {
		c.slots <- struct{}{}
		c.f.Attempt(c.sub, job, c)
	})
}

// wait returns when all deliveries have ended.
func (c *course) wait(t *testing.T, longest time.Duration) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		c.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(longest):
		c.mu.Lock()
		defer c.mu.Unlock()
		t.Fatalf("%d of %d deliveries have ended", len(c.ends), len(c.jobs))
	}
}

func mortal(t *testing.T) *fixture {
	return start(t, func(tm *timing) {
		tm.backoffMin, tm.backoffMax, tm.failedRetry = time.Millisecond, 20*time.Millisecond, 20*time.Millisecond
	}, self("plugin-mortal")).ready(t)
}

func TestPoisonIsQuarantinedAndSparesItsNeighbours(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	for _, kind := range []string{"exit", "fault"} {
		t.Run(kind, func(t *testing.T) {
			f := mortal(t)
			c := newCourse(f, newSub(t, 1, map[string]any{"delay": "5ms"}), 256)
			for n := range 600 {
				eventType := "harmless"
				if n == 100 || n == 101 || n == 400 {
					eventType = kind
				}
				c.deliver(n, eventType)
			}
			c.wait(t, 30*time.Second)
			for id, step := range c.ends {
				job := c.jobs[id]
				if job.Event.Type == "harmless" {
					if step.State != delivery.Succeeded {
						t.Errorf("neighbour %s: %+v", id, step)
					}
					continue
				}
				if step.State != delivery.Rejected || !strings.Contains(step.Reason, "quarantined") || job.Attempts > 6 {
					t.Errorf("poison %s: %+v after %d attempts", id, step, job.Attempts)
				}
			}
			p, _ := f.Plugin("mem")
			if n := p.GetInstances()[0].GetRestartCount(); n > 3 {
				t.Errorf("three poisoned events ended the process that serves everybody %d times", n)
			}
		})
	}
}

func TestKillStormConvictsNobody(t *testing.T) {
	f := mortal(t)
	c := newCourse(f, newSub(t, 1, map[string]any{"delay": "40ms"}), 512)
	storm, over := context.WithTimeout(t.Context(), 4*time.Second)
	defer over()
	go func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-storm.Done():
				return
			case <-tick.C:
				for _, pid := range f.everyPid() {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
		}
	}()
	n := 0
	for ; storm.Err() == nil; n++ {
		c.deliver(n, "harmless")
	}
	ended := time.Now()
	c.wait(t, 30*time.Second)
	interrupted := 0
	for id, step := range c.ends {
		if step.State != delivery.Succeeded {
			t.Errorf("%s: %+v after %d attempts", id, step, c.jobs[id].Attempts)
		}
		if c.jobs[id].Indeterminate > 0 {
			interrupted++
		}
	}
	t.Logf("%d deliveries, %d of them interrupted, done %v after the storm", n, interrupted, time.Since(ended).Round(time.Millisecond))
	if interrupted == 0 {
		t.Error("the storm has hit nothing")
	}
}

// everyPid lists the processes of wards, too.
func (f *fixture) everyPid() []int {
	var pids []int
	for _, pid := range f.Pids() {
		pids = append(pids, pid)
	}
	f.wards.each(func(w *Host) {
		for _, pid := range w.Pids() {
			pids = append(pids, pid)
		}
	})
	return pids
}

func TestManySuspectsAreSoonThrough(t *testing.T) {
	f := mortal(t)
	c := newCourse(f, newSub(t, 1, map[string]any{"delay": "100ms"}), 1024)
	go func() {
		eventually(t, "a thousand attempts are under way", func() bool {
			conn := f.procs[0].conn.Load()
			return conn != nil && conn.attempts.outstanding() >= 1000
		})
		_ = syscall.Kill(f.Pids()["test/mortal"], syscall.SIGKILL)
	}()
	for n := range 1024 {
		c.deliver(n, "harmless")
	}
	began := time.Now()
	c.wait(t, 30*time.Second)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("they took %v", took)
	}
	for id, step := range c.ends {
		if step.State != delivery.Succeeded || c.jobs[id].Attempts > 2 {
			t.Fatalf("%s: %+v after %d attempts", id, step, c.jobs[id].Attempts)
		}
	}
}

func TestBrokenPluginConvictsLate(t *testing.T) {
	f := mortal(t)
	sub := newSub(t, 1, map[string]any{"broken": true})
	job := newJob(0, "harmless")
	var got delivery.Result
	for crash := range 3 {
		eventually(t, "an attempt", func() bool {
			got = f.attempt(t, sub, job)
			return got.Cause != delivery.CauseUnspent
		})
		if !got.Indeterminate || got.Guilt != delivery.GuiltAlone {
			t.Fatalf("crash %d: %+v", crash, got)
		}
		job.Suspicion = delivery.Watch(job, got)
	}
	if step := delivery.Next(delivery.Policy{}, job, got, time.Now(), 0); step.State == delivery.Rejected {
		t.Errorf("%+v although the plugin has never answered anything", step)
	}
}

func TestKilledForMemoryIsNoVerdict(t *testing.T) {
	f := mortal(t)
	got := f.attempt(t, newSub(t, 1, nil), newJob(0, "killed"))
	if !got.Indeterminate || got.Guilt != delivery.GuiltNone {
		t.Errorf("%+v", got)
	}
}

func TestStuckAttemptCostsOnlyItself(t *testing.T) {
	f := mortal(t)
	sub := newSub(t, 1, nil)
	sub.AttemptTimeout = 100 * time.Millisecond
	s := newSink()
	stuck := newJob(0, "stuck")
	f.Attempt(sub, stuck, s)
	load(f, sub, s, 100)
	s.wait(t, 101)
	got := s.of(stuck)
	if got.Outcome != delivery.OutcomePluginError || got.Indeterminate || !strings.Contains(got.Error, "time was up") {
		t.Errorf("%+v", got)
	}
	if p, _ := f.Plugin("mem"); p.GetInstances()[0].GetRestartCount() != 0 {
		t.Error("the process was restarted")
	}
}

func TestWardsEndWithTheirHost(t *testing.T) {
	f := mortal(t)
	sub := newSub(t, 1, map[string]any{"delay": "50ms"})
	job := newJob(0, "harmless")
	job.Suspicion = 1
	if got := f.attempt(t, sub, job); got.Outcome != delivery.OutcomeSucceeded {
		t.Fatalf("%+v", got)
	}
	pids := f.everyPid()
	if len(pids) != 2 {
		t.Errorf("%d processes, want the one that serves and the ward's", len(pids))
	}
	f.stop()
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("process %d is still there", pid)
		}
	}
}
