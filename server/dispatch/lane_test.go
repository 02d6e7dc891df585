package dispatch_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestRetryOpensALaneThatRetryAfterClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders")
		w.receiver.set(always(time.Millisecond, func() *delivery.Result {
			r := refused(503)
			r.RetryAfter = time.Hour
			return r
		}))
		begin := time.Now()
		id := w.publish(sub, 0)
		time.Sleep(time.Second)
		later := w.publish(sub, 0)
		time.Sleep(time.Second)
		s := w.engine.Status(lane("orders"))
		if s.Open || !strings.Contains(s.Reason, "Retry-After") || s.Until.Sub(begin).Round(time.Second) != time.Hour {
			t.Errorf("status %+v", s)
		}
		if reason := w.engine.WaitReason(later, lane("orders")); !strings.Contains(reason, "until "+s.Until.UTC().Format(time.RFC3339)) {
			t.Errorf("the later one waits because: %q", reason)
		}
		w.receiver.set(always(time.Millisecond, ok))
		if d, err := w.engine.Retry(t.Context(), id, lane("orders"), -1); err != nil || d.State != delivery.Scheduled {
			t.Fatalf("retry: %v, %v", d, err)
		}
		time.Sleep(100 * time.Millisecond)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 2})
		if s := w.engine.Status(lane("orders")); !s.Open || s.Reason != "" || !s.FailingSince.IsZero() || s.LastSuccess.IsZero() {
			t.Errorf("afterwards: %+v", s)
		}
	})
}

func TestStatusSaysWhyNothingIsSent(t *testing.T) {
	for _, tt := range []struct {
		name  string
		close func(w *world)
		want  string
	}{
		{"paused", func(w *world) { w.sub("orders", inState(grapnelv1.Subscription_STATE_PAUSED)) }, "paused"},
		{"disabled", func(w *world) { w.sub("orders", inState(grapnelv1.Subscription_STATE_DISABLED)) }, "disabled"},
		{"absent", func(w *world) { w.remove("orders", false) }, "parked: its subscription is not in the configuration"},
		{"deleted", func(w *world) { w.journal.fail(delivery.ErrClosed); w.remove("orders", true) }, "deleted"},
		{"plugin", func(w *world) { w.receiver.set(always(0, unspent)) }, "plugin is not ready"},
		{"plugin disabled", func(w *world) {
			w.receiver.set(always(0, func() *delivery.Result {
				r := unspent()
				r.Error = "plugins/line is disabled"
				return r
			}))
		}, "parked: plugins/line is disabled"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				sub := w.sub("orders")
				synctest.Wait()
				tt.close(w)
				id := w.publish(sub, 0)
				synctest.Wait()
				s := w.engine.Status(lane("orders"))
				if s.Open || !strings.Contains(s.Reason, tt.want) || s.InFlight != 0 {
					t.Errorf("status %+v, want %q", s, tt.want)
				}
				if reason := w.engine.WaitReason(id, lane("orders")); !strings.Contains(reason, tt.want) {
					t.Errorf("the delivery waits because: %q", reason)
				}
				_ = w.kill()
			})
		})
	}
}

// A plugin that is not there is what a delivery waits for also while an attempt looks whether it is back.
func TestParkedWhileAnAttemptLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		absent := func() *delivery.Result {
			r := unspent()
			r.Error = "plugins/line is disabled"
			return r
		}
		w.receiver.set(always(0, absent))
		sub := w.sub("orders")
		looking, behind := w.publish(sub, 0), w.publish(sub, 0)
		synctest.Wait()
		w.receiver.set(always(30*time.Second, absent))
		time.Sleep(10 * time.Second)
		if s := w.engine.Status(lane("orders")); s.Open || !s.Parked || s.InFlight == 0 {
			t.Errorf("%+v", s)
		}
		if !w.engine.InFlight(looking, lane("orders")) {
			t.Error("nobody looks")
		}
		for _, id := range []delivery.ID{looking, behind} {
			if reason := w.engine.WaitReason(id, lane("orders")); reason != "parked: plugins/line is disabled" {
				t.Errorf("%v waits because: %q", id, reason)
			}
		}
		w.receiver.set(always(0, ok))
		time.Sleep(2 * time.Minute)
		if s := w.engine.Status(lane("orders")); !s.Open || s.Parked || s.Reason != "" {
			t.Errorf("afterwards: %+v", s)
		}
	})
}

func TestANewTargetBeginsANewHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(503) }))
		sub := w.sub("orders")
		for range 29 { // failing for just not long enough to be disabled
			w.publish(sub, 0)
			time.Sleep(time.Minute)
		}
		slow := refused(410) // this one is still under way to the old target
		slow.Outcome = delivery.OutcomePermanent
		w.receiver.set(always(10*time.Second, func() *delivery.Result { return slow }))
		w.publish(sub, 0)
		time.Sleep(time.Second)
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(503) })) // the new target, which is tried at once
		sub = w.sub("orders", func(s *subscription.Subscription) { s.Proto().Uri = "https://two.example" })
		if s := w.engine.Status(lane("orders")); !s.FailingSince.IsZero() {
			t.Errorf("a new target is failing since %v", s.FailingSince)
		}
		if notes, _ := w.journal.Failing(); len(notes) != 0 {
			t.Errorf("noted as failing: %v", notes)
		}
		for range 10 {
			w.publish(sub, 0)
			time.Sleep(time.Minute)
		}
		if len(w.wasDisabled()) != 0 {
			t.Errorf("disabled for what the old target did: %q", w.wasDisabled())
		}
	})
}

func TestDisableAfterOutlivesRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(503) }))
		sub := w.sub("orders")
		begin := time.Now()
		for range 4 {
			w.publish(sub, 0)
			time.Sleep(9 * time.Minute)
			w.stop()
			w.start()
			time.Sleep(time.Second)
			if s := w.engine.Status(lane("orders")); len(w.wasDisabled()) == 0 && s.FailingSince.Sub(begin) > time.Second {
				t.Errorf("after a restart failing since %v after the first failure", s.FailingSince.Sub(begin))
			}
		}
		w.publish(sub, 0)
		time.Sleep(time.Minute)
		if len(w.wasDisabled()) != 1 {
			t.Errorf("disabled %q", w.wasDisabled())
		}
		w.sub("orders") // enabled again: it begins anew
		if notes, _ := w.journal.Failing(); len(notes) != 0 {
			t.Errorf("still noted as failing: %v", notes)
		}
		w.stop()
	})
}

func TestAbsentIsParkedAndDeletedIsCancelled(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart=", restart), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				long := func(s *subscription.Subscription) { s.MaxAge, s.MaxInFlight = 1000*time.Hour, 2 }
				sub := w.sub("orders", long)
				w.receiver.set(func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
					if len(w.receiver.starts()) == 1 {
						return 0, refused(500) // one is a timer then
					}
					return 10 * time.Second, ok()
				})
				w.publishN(sub, 0, 600)
				time.Sleep(time.Second)
				again := func(deleted bool) {
					if restart {
						_ = w.kill()
						w.registry.swap(lane("orders"), nil, deleted)
						w.start()
						return
					}
					w.remove("orders", deleted)
				}
				again(false)
				starts := len(w.receiver.starts())
				time.Sleep(100 * time.Hour)
				if n := w.journal.count(func(r *record) bool { return r.state == delivery.Cancelled }); n != 0 {
					t.Errorf("%d deliveries cancelled because their subscription is absent", n)
				}
				if n := len(w.receiver.starts()); n != starts {
					t.Errorf("%d attempts without a subscription", n-starts)
				}
				w.receiver.set(always(10*time.Second, ok))
				w.sub("orders", long) // it is back
				time.Sleep(time.Second)
				if n := len(w.receiver.starts()); n == starts {
					t.Error("nothing is sent although the subscription is back")
				}
				again(true)
				starts = len(w.receiver.starts())
				synctest.Wait()
				w.publishN(sub, 1, 3) // matched on an older snapshot
				time.Sleep(time.Minute)
				if n := w.journal.count(func(r *record) bool { return !r.state.Final() }); n != 0 {
					t.Errorf("%d deliveries of a deleted subscription are open", n)
				}
				if n := len(w.receiver.starts()); n != starts {
					t.Errorf("%d attempts after the deletion", n-starts)
				}
				if n := w.journal.count(func(r *record) bool { return r.reason == "subscription deleted" }); n < 590 {
					t.Errorf("%d cancelled with the reason", n)
				}
				if done := w.wasWorkedOff(); len(done) == 0 || done[0] != lane("orders") {
					t.Errorf("worked off: %v", done)
				}
				for id := range w.journal.records {
					if _, err := w.engine.Retry(t.Context(), id, lane("orders"), -1); !errors.Is(err, delivery.ErrInvalidState) {
						t.Errorf("retry for a deleted subscription: %v", err)
					}
					break
				}
				w.stop()
			})
		})
	}
}

func TestDeletionIsTriedUntilItIsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", inState(grapnelv1.Subscription_STATE_PAUSED))
		w.publishN(sub, 0, 10)
		w.journal.fail(errors.New("no"))
		w.remove("orders", true)
		time.Sleep(10 * time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Pending: 10})
		w.journal.fail(nil)
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 10})
		if n := len(w.wasWorkedOff()); n != 1 {
			t.Errorf("worked off %d times", n)
		}
	})
}

func TestWhatIsAcceptedAfterADeletionWasTakenBackIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		paused := inState(grapnelv1.Subscription_STATE_PAUSED)
		w.publishN(w.sub("orders", paused), 0, 10)
		w.remove("orders", true)
		time.Sleep(time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 10})
		w.publishN(w.sub("orders", paused), 1, 3) // its namespace is back
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 10, delivery.Pending: 3})
		w.sub("orders")
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 10, delivery.Succeeded: 3})
	})
}

func TestWhoDeletesCountsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.publishN(w.sub("orders", inState(grapnelv1.Subscription_STATE_PAUSED)), 0, 10)
		done := w.engine.Deleting(lane("orders"))
		w.remove("orders", true)
		time.Sleep(time.Hour)
		if n, err := w.engine.CancelLane(t.Context(), lane("orders"), "subscription deleted", nil); n != 10 || err != nil {
			t.Errorf("cancelled %d, %v, want all 10", n, err)
		}
		done()

		// One who leaves without cancelling leaves it to the engine.
		w.publishN(w.sub("bills", inState(grapnelv1.Subscription_STATE_PAUSED)), 0, 10)
		first, second := w.engine.Deleting(lane("bills")), w.engine.Deleting(lane("bills"))
		w.remove("bills", true)
		first()
		first()
		time.Sleep(time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 10, delivery.Pending: 10})
		second()
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: 20})
		if told := w.wasWorkedOff(); !slices.Contains(told, lane("orders")) || !slices.Contains(told, lane("bills")) {
			t.Errorf("told as worked off: %v", told)
		}
	})
}

// countingJournal knows how many CancelLane are at work.
type countingJournal struct {
	*memoryJournal
	now, most int
}

func (c *countingJournal) CancelLane(ctx context.Context, key delivery.LaneKey, reason string, while func() bool) (int, error) {
	c.mu.Lock()
	c.now++
	c.most = max(c.most, c.now)
	c.mu.Unlock()
	time.Sleep(10 * time.Millisecond)
	c.mu.Lock()
	c.now--
	c.mu.Unlock()
	return c.memoryJournal.CancelLane(ctx, key, reason, while)
}

func TestManyDeletionsAreWorkedOffByFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c *countingJournal
		w := newWorld(t, func(o *dispatch.Options) {
			c = &countingJournal{memoryJournal: o.Journal.(*memoryJournal)}
			o.Journal = c
		})
		defer w.stop()
		const n = 500
		for i := range n {
			sub := w.sub(fmt.Sprint("s", i), inState(grapnelv1.Subscription_STATE_PAUSED))
			w.publish(sub, uint16(i%16))
		}
		for i := range n {
			w.remove(fmt.Sprint("s", i), true)
		}
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Cancelled: n})
		if c.most > 2 {
			t.Errorf("%d lanes were worked off at once", c.most)
		}
		if done := w.wasWorkedOff(); len(done) != n {
			t.Errorf("%d were told as worked off", len(done))
		}
	})
}

func TestNamespacesTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.Slots = 8 })
		w.receiver.set(always(10*time.Millisecond, ok))
		var many []*subscription.Subscription
		for i := range 200 {
			many = append(many, w.sub(fmt.Sprint("many", i), func(s *subscription.Subscription) { s.MaxInFlight = 16 }))
		}
		alone := w.sub("alone", inNamespace("other"), func(s *subscription.Subscription) { s.MaxInFlight = 16 })
		for i, s := range many {
			w.publishN(s, uint16(i%16), 20)
		}
		time.Sleep(100 * time.Millisecond)
		begin := time.Now()
		w.publishN(alone, 0, 20)
		time.Sleep(time.Second)
		var last time.Duration
		n := 0
		for _, s := range w.receiver.starts() {
			if s.sub == "alone" {
				last, n = s.at.Sub(begin), n+1
			}
		}
		// It has one or two of the 8 slots, like each of the 200 others, but every second turn.
		if n != 20 || last > 300*time.Millisecond {
			t.Errorf("%d of 20 started, the last one after %v, beside 200 lanes of another namespace", n, last)
		}
		_ = w.kill()
	})
}

func TestBrokenRowsAreSetAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", inState(grapnelv1.Subscription_STATE_PAUSED))
		ids := w.publishN(sub, 0, 20)
		w.journal.corrupt(ids[0])
		w.journal.corrupt(ids[7])
		begin := time.Now()
		w.sub("orders")
		w.publishN(sub, 1, 3)
		time.Sleep(500 * time.Millisecond)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 21, delivery.Pending: 2})
		if last := w.receiver.starts()[20].at.Sub(begin); last > 200*time.Millisecond {
			t.Errorf("the last one was tried after %v", last)
		}
		if s := w.engine.Status(lane("orders")); !s.Open {
			t.Errorf("closed by a broken row: %+v", s)
		}
	})
}

func TestAReadThatFailsClosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", inState(grapnelv1.Subscription_STATE_PAUSED))
		w.publishN(sub, 0, 5)
		synctest.Wait()
		w.journal.fail(errors.New("no"))
		w.sub("orders")
		w.publish(sub, 1) // nothing waits on disk in this partition
		time.Sleep(100 * time.Millisecond)
		if n := len(w.receiver.starts()); n != 1 {
			t.Errorf("%d attempts while the disk cannot be read", n)
		}
		time.Sleep(10 * time.Second)
		if reads, _ := w.journal.readCount(); reads > 15 {
			t.Errorf("%d reads in vain in ten seconds", reads)
		}
		w.journal.fail(nil)
		time.Sleep(2 * time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 6})
	})
}

func TestPausedLanesCostNoReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		paused := func(s *subscription.Subscription) {
			s.State, s.MaxAge = grapnelv1.Subscription_STATE_PAUSED, 100*time.Hour
		}
		const lanes = 50
		for i := range lanes {
			sub := w.sub(fmt.Sprint("s", i), paused)
			for p := range uint16(16) {
				w.publishN(sub, p, 10)
			}
		}
		before, jobs := w.journal.readCount()
		time.Sleep(time.Hour)
		if n, j := w.journal.readCount(); n-before > 3*16*lanes || j-jobs > 3*16*lanes {
			t.Errorf("%d reads of %d jobs in an hour of which nothing came", n-before, j-jobs)
		}
		_ = w.kill()
	})
}

func TestWhoLeavesChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		left, leave := context.WithCancel(t.Context())
		leave()
		w.receiver.set(always(0, func() *delivery.Result { return refused(500) }))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxAttempts = 1 })
		id := w.publish(sub, 0)
		time.Sleep(time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Exhausted: 1})
		w.receiver.set(always(0, ok))
		if _, err := w.engine.Retry(left, id, lane("orders"), -1); !errors.Is(err, context.Canceled) {
			t.Errorf("retry by one who has left: %v", err)
		}
		time.Sleep(time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 1})

		w.receiver.set(always(time.Minute, ok))
		w.publishN(sub, 0, 4) // all slots of the lane
		waits := w.publish(sub, 0)
		time.Sleep(time.Second)
		if _, err := w.engine.Cancel(left, waits, lane("orders")); !errors.Is(err, context.Canceled) {
			t.Errorf("cancel by one who has left: %v", err)
		}
		time.Sleep(5 * time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 5, delivery.Cancelled: 1})
		if slices.ContainsFunc(w.receiver.starts(), func(s start) bool { return s.id == waits }) {
			t.Error("sent although it was cancelled")
		}
	})
}

func TestPartitionsStopAndStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 4 })
		w.receiver.set(always(time.Second, ok))
		w.publish(sub, 2)
		time.Sleep(2 * time.Second)
		w.publishN(sub, 0, 10)
		w.publishN(sub, 1, 10)
		time.Sleep(100 * time.Millisecond)
		w.stopPartition(1)
		w.publishN(sub, 1, 5) // another node's, now
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 11, delivery.Pending: 15})
		if err := w.engine.StartPartition(1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 26})
	})
}
