package dispatch_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// close has what is above all subscriptions close or open them, of one namespace or of all with "".
func (w *world) close(ns, reason string) {
	w.registry.mu.Lock()
	w.registry.closed = reason
	w.registry.mu.Unlock()
	g := &subscription.Gate{Opened: reason == ""}
	if ns != "" {
		g.NamespaceUID = uid(ns)
	}
	w.engine.Changed([]subscription.Change{{Gate: g}})
}

// Nothing starts once a namespace or all dispatch is closed, what waits says why, and goes on when it is over.
func TestGateOfManyLanes(t *testing.T) {
	for _, ns := range []string{"", "acme"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.stop()
			orders, bills := w.sub("orders"), w.sub("bills")
			w.close(ns, "all is closed")
			w.publishN(orders, 0, 20)
			w.publishN(bills, 1, 20)
			time.Sleep(10 * time.Minute)
			wantStates(t, w, map[delivery.State]int{delivery.Pending: 40})
			if s := w.engine.Status(lane("orders")); s.Open || s.Reason != "all is closed" {
				t.Errorf("%q: status %+v", ns, s)
			}
			w.close(ns, "")
			time.Sleep(time.Minute)
			wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 40})
		})
	}
}

// Deliveries expire behind a gate as they do behind any pause.
func TestExpiryBehindAGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.close("", "closed")
		w.publishN(w.sub("orders"), 0, 5)
		time.Sleep(3 * time.Hour) // MaxAge is one
		wantStates(t, w, map[delivery.State]int{delivery.Exhausted: 5})
	})
}

// Time behind a gate is none of failing: it disables nobody, whether its lane is there or has gone.
func TestGateIsNotFailing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		long := func(s *subscription.Subscription) { s.MaxAge, s.MaxAttempts = 100*time.Hour, 2 }
		waits, gone := w.sub("waits", long), w.sub("gone", long)
		failing := &delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable, ResponseCode: 500}}
		w.receiver.set(func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
			return time.Millisecond, failing
		})
		w.publish(gone, 0)
		time.Sleep(20 * time.Second) // both attempts fail, and its lane rests
		w.publish(waits, 1)
		time.Sleep(time.Second)
		for _, s := range []string{"waits", "gone"} {
			if w.engine.Status(lane(s)).FailingSince.IsZero() {
				t.Fatalf("%s is not failing", s)
			}
		}
		w.close("acme", "closed")
		time.Sleep(2 * time.Hour)
		w.close("acme", "")
		time.Sleep(time.Second)
		w.publish(gone, 0)
		time.Sleep(time.Minute)
		if d := w.wasDisabled(); len(d) > 0 {
			t.Errorf("disabled %q", d)
		}
	})
}
