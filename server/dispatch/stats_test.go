package dispatch_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestEngineStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		registry := prometheus.NewRegistry()
		w := newWorld(t, func(o *dispatch.Options) { o.Registerer = registry })
		defer w.stop()
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			if sub.ID == "bad" {
				return time.Millisecond, refused(500)
			}
			return 100 * time.Millisecond, ok()
		})
		good := w.sub("good", func(s *subscription.Subscription) { s.MaxInFlight = 50 })
		bad := w.sub("bad", func(s *subscription.Subscription) { s.MaxAttempts = 2 })
		for range 40 { // one by one: at first few are in flight at a time
			w.publish(good, 0)
			time.Sleep(150 * time.Millisecond)
		}
		w.publishN(bad, 0, 4)
		time.Sleep(10 * time.Second)
		total, per := w.engine.Stats(acme(), 5*time.Minute, 1)
		latency := total.P50
		if latency < 80*time.Millisecond || latency > 140*time.Millisecond || total.P99 < latency {
			t.Errorf("p50 %v, p99 %v", latency, total.P99)
		}
		total.P50, total.P99 = 0, 0
		if diff := cmp.Diff(dispatch.Stats{Attempts: 48, FailedAttempts: 8, Succeeded: 40, Failed: 4}, total); diff != "" {
			t.Errorf("total (-want +got):\n%s", diff)
		}
		want := []dispatch.Stats{{
			Lane:     lane("bad"),
			Attempts: 8, FailedAttempts: 8, Failed: 4,
		}}
		if diff := cmp.Diff(want, per); diff != "" {
			t.Errorf("top (-want +got):\n%s", diff)
		}
		if other, _ := w.engine.Stats(acme()+1, time.Minute, 0); other != (dispatch.Stats{}) {
			t.Errorf("another namespace: %+v", other)
		}
		time.Sleep(2 * time.Hour)
		if late, _ := w.engine.Stats(0, 5*time.Minute, 0); late.Attempts != 0 {
			t.Errorf("out of the window, but counted: %+v", late)
		}
		if day, _ := w.engine.Stats(0, 24*time.Hour, 0); day.Attempts != 48 {
			t.Errorf("a day: %+v", day)
		}
		checkMetrics(t, registry)
	})
}

// gather returns metrics by name and label values.
func gather(t *testing.T, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "," + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return got
}

func checkMetrics(t *testing.T, registry *prometheus.Registry) {
	t.Helper()
	got := gather(t, registry)
	for name, want := range map[string]float64{
		"grapnel_attempts_total,succeeded":   40,
		"grapnel_attempts_total,retryable":   8,
		"grapnel_deliveries_total,succeeded": 40,
		"grapnel_deliveries_total,scheduled": 4,
		"grapnel_deliveries_total,exhausted": 4,
		"grapnel_delivery_latency_seconds":   40,
		"grapnel_in_flight":                  0,
		"grapnel_in_flight_slow":             0,
		"grapnel_lanes,idle":                 0, // what has nothing to do costs nothing
		"grapnel_window_bytes":               0,
	} {
		if got[name] != want {
			t.Errorf("%s = %v, want %v", name, got[name], want)
		}
	}
}

func TestEngineOldestDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.set(always(24*time.Hour, ok))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 1 })
		if age := w.engine.OldestDue(0); age != 0 {
			t.Errorf("%v with nothing to do", age)
		}
		w.publish(sub, 0)
		time.Sleep(time.Minute)
		w.publish(sub, 1)
		time.Sleep(time.Minute)
		if age := w.engine.OldestDue(acme()); age != 2*time.Minute {
			t.Errorf("%v, want 2m", age)
		}
		if age := w.engine.OldestDue(acme() + 1); age != 0 {
			t.Errorf("%v in a namespace without work", age)
		}
		w.sub("orders", inState(grapnelv1.Subscription_STATE_PAUSED))
		if age := w.engine.OldestDue(acme()); age != 0 {
			t.Errorf("%v while paused", age)
		}
		_ = w.kill()
	})
}
