//go:build linux

package pluginhost

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// shortTransport finds no descriptor for more than 20 attempts at a time.
func shortTransport() plugin.Kind {
	var open atomic.Int32
	return plugin.Transport("mem", func(struct{}, plugin.Target) (plugin.AttemptFunc, error) {
		return func(ctx context.Context, _ *plugin.Request) (*plugin.Response, error) {
			defer open.Add(-1)
			if open.Add(1) > 20 {
				return nil, &plugin.Failure{Source: plugin.SourcePlugin, Code: codeShortage, WireState: plugin.NotSent, Message: "too many open files"}
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
			return &plugin.Response{Status: 200}, nil
		}, nil
	}, plugin.Schemes("mem"))
}

// again offers a job once more when nothing was tried, as dispatch does after a pause.
type again struct {
	f       *fixture
	sub     *subscription.Subscription
	pause   time.Duration
	left    sync.WaitGroup
	unspent atomic.Int64
	bad     atomic.Pointer[delivery.Result]
}

func (a *again) Complete(job *delivery.Job, r delivery.Result) {
	switch {
	case r.Cause == delivery.CauseUnspent:
		a.unspent.Add(1)
		if r.Error != shortWords {
			a.bad.Store(&r)
		}
		time.AfterFunc(a.pause, func() { a.f.Attempt(a.sub, job, a) })
		return
	case r.Outcome != delivery.OutcomeSucceeded:
		a.bad.Store(&r)
	}
	a.left.Done()
}

// TestShortageIsNobodysFailure: attempts for which this machine has nothing left are not attempts. Fewer are made at a time,
// and it is told once.
func TestShortageIsNobodysFailure(t *testing.T) {
	f := start(t, nil, self("plugin-short")).ready(t)
	sub := newSub(t, 1, nil)
	a := &again{f: f, pause: 50 * time.Millisecond, sub: sub}
	const n = 500
	a.left.Add(n)
	for i := range n {
		f.Attempt(sub, newJob(i, "x"), a)
	}
	eventually(t, "it is told", func() bool { return f.Short()["test/short"] >= leastOpen })
	a.left.Wait()
	if bad := a.bad.Load(); bad != nil {
		t.Errorf("one ended with %+v", bad)
	}
	if tries := f.counted(t, "grapnel_plugin_shortages_total"); tries == 0 || tries > n {
		t.Errorf("%v attempts met the shortage", tries)
	}
	if told := strings.Count(f.logs.String(), shortWords); told != 1 {
		t.Errorf("the log tells it %d times", told)
	}
	if p, _ := f.Plugin("mem"); p.GetInstances()[0].GetRestartCount() != 0 {
		t.Error("the plugin was restarted")
	}
	link := f.processes()[0].conn.Load().attempts
	if now := time.Now(); link.narrowed(now.Add(easeOver)) != 0 {
		t.Error("it does not end")
	}
}

// TestDisabledPluginIsAnswered: what is switched off is listed, and those who wait for it are told.
func TestDisabledPluginIsAnswered(t *testing.T) {
	line := manifested(t, named("acme/line", "line"))
	line.Disabled = true
	f := start(t, func(tm *timing) { tm.park = 0 }, self("plugin-all"), line).ready(t)
	p, ok := f.Plugin("line")
	if !ok || p.GetHealth().String() != "HEALTH_DISABLED" || p.GetProvider() != "acme/line" || p.GetVersion() != "1.0.0" || len(p.GetRoles()) != 1 {
		t.Errorf("status %v", p)
	}
	for signer, want := range map[string]string{
		"plugins/line": "plugins/line is disabled", "plugins/nobody": "there is no plugin plugins/nobody",
	} {
		sub := newSub(t, 1, nil)
		sub.Proto().Signers[0].Plugin = signer
		if got := f.attempt(t, sub, newJob(0, "x")); got.Cause != delivery.CauseUnspent || got.Error != want {
			t.Errorf("%s: %+v", signer, got)
		}
	}
	if _, err := f.CheckConfig(t.Context(), "line", nil); err == nil || !strings.Contains(err.Error(), "plugins/line is disabled") {
		t.Errorf("check: %v", err)
	}
	line.Disabled = false
	f.Update([]Spec{line})
	eventually(t, "it serves", func() bool { return f.providerOf("line") == "acme/line" && len(f.Pids()) == 2 })
	line.Disabled = true
	f.Update([]Spec{line})
	eventually(t, "it is off again", func() bool {
		p, _ := f.Plugin("line")
		return p.GetHealth().String() == "HEALTH_DISABLED" && len(f.Pids()) == 1
	})
}
