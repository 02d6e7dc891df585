package dispatch_test

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestEngineCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.WindowBytes = 32 << 10 })
		defer w.stop()
		w.receiver.set(always(time.Second, ok))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 1 })
		lane := lane("orders")
		ids := w.publishN(sub, 0, 40)
		synctest.Wait()
		flying, waiting, onDisk := ids[0], ids[1], ids[39]
		for _, id := range []delivery.ID{flying, waiting, onDisk} {
			for range 2 { // idempotent
				if d, err := w.engine.Cancel(t.Context(), id, lane); err != nil || d.State != delivery.Cancelled {
					t.Fatalf("cancel %v: %v, %v", id, d, err)
				}
			}
		}
		time.Sleep(2500 * time.Millisecond) // the third attempt is running
		done := ids[2]
		if _, err := w.engine.Cancel(t.Context(), done, lane); !errors.Is(err, delivery.ErrFinal) {
			t.Errorf("cancel of a delivered one: %v", err)
		}
		w.journal.fail(delivery.ErrClosed)
		for _, id := range []delivery.ID{ids[3], ids[4]} { // one in flight, one waiting: neither is lost
			if _, err := w.engine.Cancel(t.Context(), id, lane); !errors.Is(err, delivery.ErrClosed) {
				t.Errorf("cancel without a journal: %v", err)
			}
		}
		w.journal.fail(nil)
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 3, delivery.Succeeded: 37})
		for id, attempts := range map[delivery.ID]int{flying: 1, waiting: 0, onDisk: 0} {
			if r := w.journal.get(id); len(r.attempts) != attempts {
				t.Errorf("%v: %d attempts on record, want %d", id, len(r.attempts), attempts)
			}
		}
	})
}

func TestEngineCancelsScheduled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(0, func() *delivery.Result { return refused(500) }))
		id := w.publish(w.sub("orders"), 0)
		time.Sleep(time.Second)
		if _, err := w.engine.Cancel(t.Context(), id, lane("orders")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 1})
		if n := len(w.receiver.starts()); n != 1 {
			t.Errorf("%d attempts", n)
		}
	})
}

func TestEngineRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		lane := lane("orders")
		w.receiver.set(always(time.Second, func() *delivery.Result { return refused(500) }))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 1 })
		ids := w.publishN(sub, 0, 3)
		synctest.Wait()
		if _, err := w.engine.Retry(t.Context(), ids[0], lane, -1); !errors.Is(err, delivery.ErrInvalidState) {
			t.Errorf("retry in flight: %v", err)
		}
		if d, err := w.engine.Retry(t.Context(), ids[2], lane, 0); err != nil || d.State != delivery.Pending {
			t.Errorf("retry of one that waits: %v, %v", d, err)
		}
		time.Sleep(3500 * time.Millisecond) // each has had its first attempt
		if _, err := w.engine.Retry(t.Context(), ids[0], lane, 0); !errors.Is(err, delivery.ErrInvalidState) {
			t.Errorf("retry that expects no attempt: %v", err)
		}
		w.receiver.set(always(time.Millisecond, ok))
		begin := time.Now()
		if d, err := w.engine.Retry(t.Context(), ids[0], lane, 1); err != nil || d.State != delivery.Scheduled {
			t.Errorf("retry: %v, %v", d, err)
		}
		synctest.Wait()
		last := w.receiver.starts()[len(w.receiver.starts())-1]
		if last.id != ids[0] || last.at.Sub(begin) > 100*time.Millisecond {
			t.Errorf("last attempt %v after %v", last.id, last.at.Sub(begin))
		}
		time.Sleep(time.Hour)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 3})
		if !w.journal.get(ids[2]).attempts[0].Manual {
			t.Error("the attempt that was asked for is not marked")
		}
		if _, err := w.engine.Retry(t.Context(), ids[0], lane, -1); !errors.Is(err, delivery.ErrInvalidState) {
			t.Errorf("retry of a delivered one: %v", err)
		}
	})
}

func TestEngineRetriesExhausted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(0, func() *delivery.Result { return refused(500) }))
		id := w.publish(w.sub("orders", func(s *subscription.Subscription) { s.MaxAttempts = 1 }), 7)
		time.Sleep(time.Minute)
		w.receiver.set(always(0, ok))
		if _, err := w.engine.Retry(t.Context(), id, lane("orders"), 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 1})
	})
}

func TestEngineCancelLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(time.Second, ok))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 2 })
		w.publishN(sub, 0, 50)
		synctest.Wait()
		lane := lane("orders")
		n, err := w.engine.CancelLane(t.Context(), lane, "asked for", nil)
		if n != 50 || err != nil {
			t.Errorf("cancelled %d, %v", n, err)
		}
		w.publish(sub, 0)
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 50, delivery.Succeeded: 1})
	})
}

func TestEngineTest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", inState(grapnelv1.Subscription_STATE_PAUSED)) // a test is made all the same
		event := &delivery.Event{ID: "sample"}
		r, err := w.engine.Test(t.Context(), sub, event)
		want := delivery.Attempt{
			Number: 1, Manual: true, Outcome: delivery.OutcomeSucceeded, ResponseCode: 200,
			Duration: 10 * time.Millisecond, Start: time.Now().Add(-10 * time.Millisecond),
		}
		if diff := cmp.Diff(want, r.Attempt); diff != "" || err != nil {
			t.Errorf("%v, (-want +got):\n%s", err, diff)
		}
		if got := w.receiver.starts()[0].job.Event; !strings.HasPrefix(got.UID, "test_") || event.UID != "" || got.Namespace != acme() {
			t.Errorf("sent %+v", got)
		}
		if _, err := w.engine.Test(t.Context(), sub, event); !errors.Is(err, dispatch.ErrTestLimit) {
			t.Errorf("second test: %v", err)
		}
		time.Sleep(time.Second)
		w.receiver.set(always(0, unspent))
		if _, err := w.engine.Test(t.Context(), sub, event); !errors.Is(err, dispatch.ErrUnspent) {
			t.Errorf("test without a plugin: %v", err)
		}
	})
}
