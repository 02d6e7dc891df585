//go:build linux

package pluginhost

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
)

// bombTransport succeeds, and with some events its process dies a little later, in a goroutine that the attempt has left
// behind: as when a receiver sends poison on a connection that is idle.
func bombTransport() plugin.Kind {
	return plugin.Transport("mem", func(struct{}, plugin.Target) (plugin.AttemptFunc, error) {
		return func(_ context.Context, r *plugin.Request) (*plugin.Response, error) {
			if r.Get("ce-type") == "bomb" {
				go func() {
					time.Sleep(30 * time.Millisecond)
					var nobody *plugin.Response
					nobody.Status++ // panics
				}()
			}
			return &plugin.Response{Status: 200}, nil
		}, nil
	}, plugin.Schemes("mem"))
}

// TestCrashOnAnIdleConnectionIsLaidAtItsOwner: deliveries that have ended well bring the process down. It happens to
// others once; from then on who brings it down is apart, and nothing of the others is lost or called a suspect.
func TestCrashOnAnIdleConnectionIsLaidAtItsOwner(t *testing.T) {
	f := start(t, func(tm *timing) { tm.backoffMin = time.Millisecond; tm.park = 20 * time.Second }, self("plugin-bomb")).ready(t)
	evil, victim := newSub(t, 1, nil), newSub(t, 2, nil)
	victim.Proto().Name, victim.Namespace = "namespaces/other/subscriptions/s2", "other"
	pid := func() int { return f.Pids()["test/bomb"] }
	first := pid()
	if got := f.attempt(t, evil, newJob(0, "bomb")); got.Outcome != delivery.OutcomeSucceeded {
		t.Fatalf("%+v", got)
	}
	eventually(t, "the process has died and is back", func() bool { return pid() != 0 && pid() != first })
	second := pid()
	for n := range 20 {
		if got := f.attempt(t, evil, newJob(n, "bomb")); got.Cause == delivery.CauseUnspent {
			t.Fatalf("bomb %d: %+v", n, got)
		}
		for range 20 {
			if got := f.attempt(t, victim, newJob(n, "x")); got.Outcome != delivery.OutcomeSucceeded {
				t.Fatalf("victim: %+v", got)
			}
		}
	}
	if pid() != second {
		t.Error("the others' process has died again")
	}
	if p, _ := f.Plugin("mem"); p.GetInstances()[0].GetRestartCount() != 1 {
		t.Errorf("status: %v", p)
	}
	if logs := f.logs.String(); !strings.Contains(logs, "subscription=namespaces/acme/subscriptions/s1") || strings.Contains(logs, "subscription=namespaces/other") {
		t.Error("the log does not name the one that it was")
	}
}

func TestTenantOfManyAccusedIsAccused(t *testing.T) {
	var a accused
	now := time.Now()
	for i := range byte(accusedMost) {
		if got := a.of(newSub(t, 99, nil)); got != 0 {
			t.Errorf("after %d crashes another subscription counts %d", i, got)
		}
		a.add(culprit{uid: [16]byte{15: i}, name: "namespaces/acme/subscriptions/s"}, now)
	}
	other := newSub(t, 98, nil)
	other.Namespace = "other"
	if own, others := a.of(newSub(t, 99, nil)), a.of(other); own != 1 || others != 0 {
		t.Errorf("its own count %d, others' %d", own, others)
	}
	var old accused
	old.add(culprit{uid: newSub(t, 1, nil).UID}, now.Add(-2*accusedFor))
	if got := old.of(newSub(t, 1, nil)); got != 0 {
		t.Errorf("long after its crash it counts %d", got)
	}
}
