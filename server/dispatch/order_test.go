package dispatch_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

func ordered(s *subscription.Subscription) { s.Ordered = true }

func blocking(s *subscription.Subscription) { s.Ordered, s.BlocksKeys, s.MaxAttempts = true, true, 1 }

func (w *world) publishKeyed(sub *subscription.Subscription, key delivery.OrderKey, n int) (ids []delivery.ID) {
	for range n {
		ids = append(ids, w.journal.addKeyed(0, 1024, time.Time{}, key, sub)[0])
	}
	return ids
}

// begun are the deliveries that were attempted, in order, each once.
func (w *world) begun() (ids []delivery.ID) {
	seen := make(map[delivery.ID]bool)
	for _, s := range w.receiver.starts() {
		if !seen[s.id] {
			seen[s.id] = true
			ids = append(ids, s.id)
		}
	}
	return ids
}

// A delivery that fails holds back its key, and no other.
func TestOrderedDeliveriesHoldBackTheirKeyOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", ordered, func(s *subscription.Subscription) { s.DisableAfter = 0 })
		var fails atomic.Pointer[delivery.ID] // the first of a key that is tried
		w.receiver.set(func(_ *subscription.Subscription, job *delivery.Job) (time.Duration, *delivery.Result) {
			id := job.ID
			if job.Order != 0 && (fails.CompareAndSwap(nil, &id) || *fails.Load() == id) && job.Attempts < 2 {
				return time.Millisecond, refused(500)
			}
			return time.Millisecond, ok()
		})
		// Both keys of one lane, and events without one.
		w.publishKeyed(sub, 1, 1)
		held := w.publishKeyed(sub, 1, 3)
		w.publishKeyed(sub, 2, 20)
		w.publishN(sub, 0, 20)
		time.Sleep(2 * time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 40, delivery.Scheduled: 1, delivery.Pending: 3})
		time.Sleep(time.Hour)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 44})
		w.wantKeysInOrder()
		begun := w.begun()
		for i, id := range held {
			if got := begun[len(begun)-3+i]; got != id {
				t.Errorf("%v was attempted where %v should be", got, id)
			}
		}
	})
}

// An attempt that goes on after its delivery was cancelled is waited for by the next one of the key.
func TestNextOfAKeyWaitsForACancelledAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", ordered)
		w.publish(sub, 0) // a target that has answered gets more than one at a time
		time.Sleep(time.Second)
		w.receiver.set(always(10*time.Second, ok))
		ids := w.publishKeyed(sub, 1, 2)
		other := w.publishKeyed(sub, 2, 1)[0]
		time.Sleep(time.Second)
		if _, err := w.engine.Cancel(t.Context(), ids[0], lane("orders")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if begun := w.begun()[1:]; len(begun) != 2 || begun[0] != ids[0] || begun[1] != other {
			t.Errorf("%v begun while the attempt of %v goes on", begun, ids[0])
		}
		time.Sleep(time.Minute)
		if begun := w.begun()[1:]; len(begun) != 3 || begun[2] != ids[1] {
			t.Errorf("%v begun in the end", begun)
		}
	})
}

// A key that is blocked for a day, or held back by retries, costs a read for each attempt and one for the next in turn.
func TestBlockedKeyCostsOneRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		registry := prometheus.NewRegistry()
		w := newWorld(t, func(o *dispatch.Options) { o.Registerer = registry })
		defer w.stop()
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
		sub := w.sub("orders", blocking)
		head := w.publishKeyed(sub, 1, 1)[0]
		time.Sleep(time.Minute) // exhausted
		w.publishKeyed(sub, 1, 1000)
		reads, jobs := w.journal.readCount()
		time.Sleep(24 * time.Hour)
		if r, j := w.journal.readCount(); r != reads || j != jobs {
			t.Errorf("%d reads of %d rows while the key is blocked", r-reads, j-jobs)
		}
		if n := gather(t, registry)["grapnel_ordering_keys_blocked_total"]; n != 1 {
			t.Errorf("%v keys were blocked by the metric", n)
		}
		w.receiver.set(always(time.Hour, ok))
		if _, err := w.engine.Cancel(t.Context(), head, lane("orders")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if r, j := w.journal.readCount(); r != reads+1 || j != jobs+1 {
			t.Errorf("%d reads of %d rows for the next in turn, want one", r-reads, j-jobs)
		}
	})
}

// A key is let go of when its subscription does not ask for it to be blocked any more, also if that was while the engine
// was away.
func TestChangeOfPolicyLetsGoOfKeys(t *testing.T) {
	for _, away := range []bool{false, true} {
		for name, change := range map[string]func(*subscription.Subscription){
			"skip": ordered, "unordered": func(*subscription.Subscription) {},
		} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
					w.publishKeyed(w.sub("orders", blocking), 1, 5)
					time.Sleep(time.Hour)
					wantStates(t, w, map[delivery.State]int{delivery.Exhausted: 1, delivery.Pending: 4})
					w.receiver.set(always(time.Millisecond, ok))
					if away {
						w.stop()
						bare := subscription.Of(&grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/orders", State: grapnelv1.Subscription_STATE_ACTIVE})
						bare.UID, bare.NamespaceUID = uid("orders"), uid("acme")
						bare.MaxInFlight, bare.MaxAttempts, bare.MaxAge = 4, 4, time.Hour
						w.registry.swap(lane("orders"), bare, false)
						w.start()
					} else {
						w.sub("orders", change)
					}
					time.Sleep(time.Minute)
					wantStates(t, w, map[delivery.State]int{delivery.Exhausted: 1, delivery.Succeeded: 4})
					w.stop()
				})
			})
		}
	}
}

// What waits for a delivery that has failed is cancelled with its subscription, also if the engine knows of no lane.
func TestDeletionFindsBlockedKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
		w.publishKeyed(w.sub("orders", blocking), 1, 5)
		time.Sleep(time.Hour)
		w.stop()
		w.registry.swap(lane("orders"), nil, true)
		w.start()
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Exhausted: 1, delivery.Cancelled: 4})
		w.stop()
	})
}

// Pausing and pointing elsewhere keep the order.
func TestOrderOutlivesEdits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", ordered)
		w.receiver.set(always(300*time.Millisecond, ok))
		w.publishKeyed(sub, 1, 50)
		for i := range 40 {
			time.Sleep(250 * time.Millisecond)
			switch i % 4 {
			case 0:
				w.sub("orders", ordered, inState(grapnelv1.Subscription_STATE_PAUSED))
			case 2:
				w.sub("orders", func(s *subscription.Subscription) {
					s.Ordered = i%8 == 2
					s.Proto().Uri = []string{"https://one.example", "https://two.example"}[i/4%2]
				})
			case 3:
				_, _ = w.engine.Retry(context.Background(), w.begun()[0], lane("orders"), -1)
			}
		}
		w.sub("orders", ordered)
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 50})
		w.wantKeysInOrder()
	})
}
