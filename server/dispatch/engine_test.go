package dispatch_test

import (
	"context"
	"errors"
	"slices"
	"strings"
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

func wantStates(t *testing.T, w *world, want map[delivery.State]int) {
	t.Helper()
	if diff := cmp.Diff(want, w.journal.states()); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
}

func TestEngineAttemptsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		synctest.Wait()
		begin := time.Now()
		id := w.publish(w.sub("orders"), 3)
		synctest.Wait()
		if got := w.receiver.starts(); len(got) != 1 || got[0].id != id || !got[0].at.Equal(begin) {
			t.Fatalf("attempts %v, want one of %v at once", got, id)
		}
		if !w.engine.InFlight(id, lane("orders")) {
			t.Error("not in flight")
		}
		time.Sleep(time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 1})
		got := w.journal.get(id).attempts[0]
		if got.Number != 1 || got.Duration != 10*time.Millisecond || !got.Start.Equal(begin) {
			t.Errorf("attempt %+v", got)
		}
	})
}

func TestEngineRetriesOnSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(0, func() *delivery.Result { return refused(500) }))
		begin := time.Now()
		w.publish(w.sub("orders"), 0)
		time.Sleep(20 * time.Minute)
		var at []time.Duration
		for _, s := range w.receiver.starts() {
			at = append(at, s.at.Sub(begin).Truncate(time.Second))
		}
		want := []time.Duration{0, 5 * time.Second, 5*time.Minute + 5*time.Second, 10*time.Minute + 5*time.Second}
		if diff := cmp.Diff(want, at); diff != "" {
			t.Errorf("attempts (-want +got):\n%s", diff)
		}
		wantStates(t, w, map[delivery.State]int{delivery.Exhausted: 1})
	})
}

func TestEngineRetryAfterClosesLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 1 })
		w.receiver.set(func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
			if len(w.receiver.starts()) > 1 {
				return time.Millisecond, ok()
			}
			r := refused(429)
			r.RetryAfter = 90 * time.Second
			return time.Millisecond, r
		})
		begin := time.Now()
		w.publishN(sub, 0, 5)
		time.Sleep(89 * time.Second)
		if n := len(w.receiver.starts()); n != 1 {
			t.Fatalf("%d attempts while the target asked for a pause", n)
		}
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 5})
		if got := w.receiver.starts()[1].at.Sub(begin); got < 90*time.Second || got > 91*time.Second {
			t.Errorf("second attempt after %v", got)
		}
	})
}

func TestEnginePauseHoldsAndResumeContinues(t *testing.T) {
	for _, state := range []grapnelv1.Subscription_State{
		grapnelv1.Subscription_STATE_PAUSED, grapnelv1.Subscription_STATE_DISABLED,
	} {
		t.Run(state.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 2 })
				w.publishN(sub, 0, 20)
				time.Sleep(15 * time.Millisecond) // the first two have ended
				paused := w.sub("orders", inState(state))
				before := len(w.receiver.starts())
				w.publishN(paused, 0, 5)
				time.Sleep(5 * time.Minute)
				if after := len(w.receiver.starts()); after != before {
					t.Errorf("%d attempts while closed", after-before)
				}
				w.sub("orders")
				time.Sleep(time.Second)
				wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 25})
				if !slices.IsSortedFunc(w.receiver.starts(), func(a, b start) int { return int(a.id.Seq) - int(b.id.Seq) }) {
					t.Error("order was lost")
				}
			})
		})
	}
}

func TestEngineGoneDisables(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 1 })
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(410) }))
		w.publishN(sub, 0, 3)
		time.Sleep(time.Minute)
		if n := len(w.receiver.starts()); n != 1 || len(w.wasDisabled()) != 1 || !strings.Contains(w.wasDisabled()[0], "410") {
			t.Errorf("%d attempts, disabled %q", n, w.wasDisabled())
		}
		wantStates(t, w, map[delivery.State]int{delivery.Rejected: 1, delivery.Pending: 2})
	})
}

func TestEngineDisablesAfterFailingForLong(t *testing.T) {
	for _, tt := range []struct {
		name   string
		result delivery.Result
		want   int
	}{
		{"the target", *refused(500), 1},
		{"the plugin", delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomePluginError}, Cause: delivery.CausePlugin}, 0},
		{"a crash", delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeInterrupted}, Cause: delivery.CausePlugin}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				w.receiver.set(always(time.Millisecond, func() *delivery.Result { r := tt.result; return &r }))
				sub := w.sub("orders")
				for range 60 { // by then the breaker is open, and probes come up to 15 minutes apart
					if len(w.wasDisabled()) == 0 {
						w.publish(sub, 0)
					}
					time.Sleep(time.Minute)
				}
				if len(w.wasDisabled()) != tt.want {
					t.Errorf("disabled %q", w.wasDisabled())
				}
			})
		})
	}
}

func TestEngineRespectsLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.Slots = 10 })
		defer w.stop()
		w.receiver.set(always(50*time.Millisecond, ok))
		few := w.sub("few", func(s *subscription.Subscription) { s.MaxInFlight = 3 })
		slow := w.sub("slow", func(s *subscription.Subscription) { s.MaxRate = 2 })
		many := w.sub("many", func(s *subscription.Subscription) { s.MaxInFlight = 100 })
		w.publishN(few, 0, 30) // alone: beside others its share of the ten slots may be smaller than its limit
		time.Sleep(10 * time.Second)
		begin := time.Now()
		w.publishN(slow, 1, 10)
		w.publishN(many, 2, 100)
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 140})
		if w.receiver.atOnce("few") != 3 {
			t.Errorf("few: %d at once", w.receiver.atOnce("few"))
		}
		if w.receiver.atOnce("many") > 10 {
			t.Errorf("many: %d at once", w.receiver.atOnce("many"))
		}
		var last time.Duration
		for _, s := range w.receiver.starts() {
			if s.sub == "slow" {
				last = s.at.Sub(begin)
			}
		}
		if last < 4400*time.Millisecond || last > 5500*time.Millisecond {
			t.Errorf("slow: 10 attempts at 2 a second ended at %v", last)
		}
	})
}

func TestEngineSlowLaneDoesNotStopAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.Slots = 20 })
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			if sub.ID == "hangs" {
				return time.Hour, ok()
			}
			return 10 * time.Millisecond, ok()
		})
		hangs := w.sub("hangs", func(s *subscription.Subscription) { s.MaxInFlight = 1000 })
		w.publishN(hangs, 0, 500)
		time.Sleep(time.Second)
		if n := w.receiver.atOnce("hangs"); n > 10 {
			t.Errorf("the hanging lane holds %d of 20 slots", n)
		}
		quick := w.sub("quick")
		for range 100 {
			w.publish(quick, 1)
			time.Sleep(15 * time.Millisecond)
		}
		time.Sleep(20 * time.Millisecond)
		done := w.journal.count(func(r *record) bool { return r.state == delivery.Succeeded && r.lane == lane("quick") })
		if done != 100 {
			t.Errorf("%d of 100 quick ones done", done)
		}
		if err := w.kill(); err == nil {
			t.Error("Stop did not say that attempts were abandoned")
		}
		time.Sleep(2 * time.Hour) // late results are ignored
	})
}

func TestEngineBacklogKeepsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		registry := prometheus.NewRegistry()
		w := newWorld(t, func(o *dispatch.Options) { o.WindowBytes, o.Registerer = 64<<10, registry })
		defer w.stop()
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 1 })
		w.receiver.set(always(time.Millisecond, ok))
		synctest.Wait()
		ids := w.publishN(sub, 0, 2000)
		if bytes := gather(t, registry)["grapnel_window_bytes"]; bytes < 16<<10 || bytes > 128<<10 {
			t.Errorf("%v bytes in memory", bytes)
		}
		time.Sleep(10 * time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 2000})
		if reads, _ := w.journal.readCount(); reads == 0 {
			t.Error("nothing was left on disk")
		}
		var got []delivery.ID
		for _, s := range w.receiver.starts() {
			got = append(got, s.id)
		}
		if !slices.Equal(ids, got) {
			t.Error("not in order")
		}
	})
}

func TestEngineExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		short := func(s *subscription.Subscription) { s.MaxAge = 10 * time.Minute }
		open := w.sub("open", short, func(s *subscription.Subscription) { s.MaxInFlight = 1 })
		w.receiver.set(always(20*time.Minute, ok))
		w.publishN(open, 0, 2) // the second one waits for longer than it may
		paused := w.sub("paused", short, inState(grapnelv1.Subscription_STATE_PAUSED))
		ids := w.publishN(paused, 0, 700)
		time.Sleep(30 * time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 1, delivery.Exhausted: 701})
		if r := w.journal.get(ids[0]); r.reason != "max_age" || len(r.attempts) != 0 {
			t.Errorf("expired with %q and %d attempts", r.reason, len(r.attempts))
		}
	})
}

func TestEngineExpiresScheduledWhilePaused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(0, func() *delivery.Result { return refused(500) }))
		ids := w.publishN(w.sub("orders", func(s *subscription.Subscription) { s.MaxAge = 10 * time.Minute }), 0, 300)
		time.Sleep(time.Second)
		w.sub("orders", inState(grapnelv1.Subscription_STATE_PAUSED))
		time.Sleep(15 * time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Exhausted: 300})
		if r := w.journal.get(ids[0]); r.reason != "max_age" || len(r.attempts) != 1 {
			t.Errorf("expired with %q and %d attempts", r.reason, len(r.attempts))
		}
	})
}

func TestEngineUnspentParksLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(0, unspent))
		sub := w.sub("orders")
		ids := w.publishN(sub, 0, 10)
		time.Sleep(time.Minute)
		n := len(w.receiver.starts())
		if n < 10 || n > 100 {
			t.Errorf("%d tries in a minute", n)
		}
		if r := w.journal.get(ids[0]); len(r.attempts) != 0 || r.state != delivery.Pending {
			t.Errorf("attempts were spent: %+v", r)
		}
		w.receiver.set(always(time.Millisecond, ok))
		time.Sleep(6 * time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 10})
		var got []delivery.ID
		for _, s := range w.receiver.starts()[n:] {
			got = append(got, s.id)
		}
		if !slices.Equal(ids, got) {
			t.Errorf("order was lost: %v, want %v", got, ids)
		}
	})
}

func TestEngineDeliverTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders")
		for i := range 3 {
			w.journal.add(5, 10, time.Now().Add(time.Duration(i)*time.Hour), sub)
		}
		time.Sleep(time.Second)
		if n := len(w.receiver.starts()); n != 1 {
			t.Errorf("%d attempts at once, want 1", n)
		}
		time.Sleep(3 * time.Hour)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 3})
	})
}

func TestEngineManyTimersAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 100 })
		for p := range uint16(4) {
			w.publishN(sub, p, 500)
		}
		time.Sleep(4 * time.Second)
		w.receiver.set(always(time.Millisecond, ok))
		time.Sleep(time.Minute) // the breaker may wait for some seconds before its next probe
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 2000})
	})
}

func TestEngineStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 2 })
		w.publish(sub, 0)
		time.Sleep(time.Second)
		w.receiver.set(always(time.Minute, ok))
		w.publishN(sub, 0, 10)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := w.engine.Stop(ctx); err != nil {
			t.Errorf("stop: %v", err)
		}
		<-w.ran
		w.journal.close(true)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 3, delivery.Pending: 8})

		w.start() // and again, with less patience
		w.receiver.set(always(time.Hour, ok))
		time.Sleep(time.Second)
		ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		err := w.engine.Stop(ctx)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("stop: %v", err)
		}
		<-w.ran
		time.Sleep(2 * time.Hour) // their results come to nothing
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 3, delivery.Pending: 8})
	})
}

func TestEngineRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.set(func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
			if len(w.receiver.starts())%2 == 0 {
				return time.Millisecond, refused(500)
			}
			return time.Minute, ok()
		})
		sub := w.sub("orders")
		for p := range uint16(16) {
			w.publishN(sub, p, 30)
		}
		time.Sleep(time.Second)
		if err := w.kill(); err == nil {
			t.Error("nothing was in flight")
		}
		w.receiver.set(always(time.Millisecond, ok))
		w.start()
		w.publishN(sub, 3, 5) // recovery and fresh ones meet
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 485})
		time.Sleep(time.Minute)
		w.stop()
	})
}

func TestEngineUsesNewTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders")
		w.publishN(sub, 0, 100)
		time.Sleep(55 * time.Millisecond)
		w.sub("orders", func(s *subscription.Subscription) { s.Proto().Uri = "https://two.example" })
		changed := len(w.receiver.starts())
		time.Sleep(time.Minute)
		for i, s := range w.receiver.starts() {
			want := "https://orders.example"
			if i >= changed {
				want = "https://two.example"
			}
			if s.uri != want {
				t.Fatalf("attempt %d of which %d were before the change went to %s", i, changed, s.uri)
			}
		}
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 100})
	})
}
