package dispatch_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// stage brings a delivery to a stage in which something then happens to it.
type stage struct {
	name string
	// reach publishes and waits. It returns the delivery, and what lets an attempt that is open end.
	reach func(w *world) (delivery.ID, func())
	// attempts that it has had when nothing else happens to it than what the test does.
	attempts int
}

func stages() []stage {
	one := func(s *subscription.Subscription) { s.MaxInFlight, s.MaxAttempts = 1, 10 }
	nothing := func() {}
	open := func(w *world, result *delivery.Result) (delivery.ID, func()) {
		w.receiver.set(nil)
		id := w.publish(w.sub("orders", one), 0)
		synctest.Wait()
		start := w.receiver.starts()[0]
		return id, func() {
			w.receiver.set(always(time.Millisecond, ok))
			w.receiver.end(start.job, *result)
		}
	}
	return []stage{
		{"on disk", func(w *world) (delivery.ID, func()) {
			id := w.publish(w.sub("orders", one, inState(grapnelv1.Subscription_STATE_PAUSED)), 0)
			synctest.Wait()
			return id, func() { w.sub("orders", one) }
		}, 0},
		{"in memory", func(w *world) (delivery.ID, func()) {
			_, end := open(w, ok())
			id := w.publish(w.registry.Subscription(lane("orders")), 0)
			synctest.Wait()
			return id, end
		}, 0},
		{"in flight, to succeed", func(w *world) (delivery.ID, func()) { return open(w, ok()) }, 1},
		{"in flight, to fail", func(w *world) (delivery.ID, func()) { return open(w, refused(500)) }, 1},
		{"in flight, of which nothing is tried", func(w *world) (delivery.ID, func()) { return open(w, unspent()) }, 0},
		{"settling", func(w *world) (delivery.ID, func()) {
			id, end := open(w, refused(500))
			end()
			synctest.Wait()
			return id, nothing
		}, 1},
		{"scheduled", func(w *world) (delivery.ID, func()) {
			id, end := open(w, refused(500))
			end()
			time.Sleep(time.Second)
			return id, nothing
		}, 1},
		{"ended without success", func(w *world) (delivery.ID, func()) {
			id, end := open(w, &delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomePermanent, ResponseCode: 400}})
			end()
			time.Sleep(time.Second)
			return id, nothing
		}, 1},
	}
}

func TestCancelInEveryStage(t *testing.T) {
	for _, s := range stages() {
		t.Run(s.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				synctest.Wait()
				id, end := s.reach(w)
				_, err := w.engine.Cancel(t.Context(), id, lane("orders"))
				if s.name == "ended without success" {
					if !errors.Is(err, delivery.ErrFinal) {
						t.Errorf("cancel: %v", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				end()
				time.Sleep(time.Hour)
				r := w.journal.get(id)
				if r.state != delivery.Cancelled || len(r.attempts) != s.attempts {
					t.Errorf("state %d after %d attempts on record, want %d", r.state, len(r.attempts), s.attempts)
				}
				if s := w.engine.Status(lane("orders")); s.InFlight+s.Waiting > 0 || s.OldestDue > 0 {
					t.Errorf("something is left: %+v", s)
				}
			})
		})
	}
}

func TestRetryInEveryStage(t *testing.T) {
	for _, s := range stages() {
		t.Run(s.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				synctest.Wait()
				id, end := s.reach(w)
				begin := time.Now()
				refused := w.engine.InFlight(id, lane("orders"))
				d, err := w.engine.Retry(t.Context(), id, lane("orders"), -1)
				if refused != errors.Is(err, delivery.ErrInvalidState) || !refused && err != nil {
					t.Fatalf("retry: %v, %v", d, err)
				}
				end()
				time.Sleep(100 * time.Millisecond)
				r := w.journal.get(id)
				if !refused && (r.state != delivery.Succeeded || len(r.attempts) != s.attempts+1) {
					t.Errorf("%v later in state %d after %d attempts", time.Since(begin), r.state, len(r.attempts))
				}
				time.Sleep(time.Hour)
				if r := w.journal.get(id); r.state != delivery.Succeeded {
					t.Errorf("in the end in state %d", r.state)
				}
			})
		})
	}
}

func TestRetryOfWhatStartsMeanwhile(t *testing.T) {
	for _, result := range []*delivery.Result{ok(), refused(500), unspent()} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.stop()
			w.receiver.set(always(0, func() *delivery.Result { return refused(500) }))
			sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxAttempts = 10 })
			id := w.publish(sub, 0)
			time.Sleep(time.Second)
			w.receiver.set(nil)
			time.Sleep(10 * time.Second) // the second attempt is open
			second := w.receiver.starts()[1]
			// Behind the engine's back, as if it had looked before.
			if _, err := w.journal.Retry(t.Context(), lane("orders"), id, -1); err != nil {
				t.Fatal(err)
			}
			reads, _ := w.journal.readCount()
			time.Sleep(10 * time.Second)
			if n, _ := w.journal.readCount(); n > reads+2 {
				t.Errorf("%d reads for a row that has to wait for its older self", n-reads)
			}
			w.receiver.set(always(time.Millisecond, ok))
			w.receiver.end(second.job, *result)
			time.Sleep(time.Second)
			if r := w.journal.get(id); r.state != delivery.Succeeded {
				t.Errorf("state %d", r.state)
			}
		})
	}
}

func TestRestartInEveryStage(t *testing.T) {
	for _, s := range stages() {
		for _, orderly := range []bool{true, false} {
			t.Run(s.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					synctest.Wait()
					id, end := s.reach(w)
					if orderly && w.engine.InFlight(id, lane("orders")) {
						end()
					}
					if orderly && w.engine.InFlightNow() == 0 {
						w.stop()
						w.receiver.forget()
					} else {
						_ = w.kill()
					}
					w.receiver.set(always(time.Millisecond, ok))
					w.start()
					w.sub("orders")
					if s.name == "ended without success" {
						if _, err := w.engine.Retry(t.Context(), id, lane("orders"), -1); err != nil {
							t.Error(err)
						}
					}
					time.Sleep(time.Hour)
					if r := w.journal.get(id); r.state != delivery.Succeeded {
						t.Errorf("orderly %v: state %d", orderly, r.state)
					}
					w.stop()
				})
			})
		}
	}
}

func TestIdleLanesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		registry := prometheus.NewRegistry()
		w := newWorld(t, func(o *dispatch.Options) { o.Registerer = registry })
		defer w.stop()
		w.receiver.set(always(time.Millisecond, ok))
		for i := range 50 {
			w.publishN(w.sub(string(rune('a'+i)), func(s *subscription.Subscription) { s.MaxRate = 100 }), uint16(i%16), 20)
		}
		time.Sleep(5 * time.Second)
		if got := gather(t, registry); got["grapnel_lanes,idle"] != 50 {
			t.Errorf("%v lanes are idle", got["grapnel_lanes,idle"])
		}
		time.Sleep(15 * time.Second)
		if got := gather(t, registry); got["grapnel_lanes,idle"]+got["grapnel_lanes,open"]+got["grapnel_lanes,closed"] != 0 {
			t.Errorf("lanes that have nothing to do: %v", got)
		}
		if s := w.engine.Status(lane("a")); s.LastSuccess.IsZero() || s.Latency != time.Millisecond {
			t.Errorf("what was learnt is gone: %+v", s)
		}
	})
}
