package dispatch_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// A delivery whose last attempt is due shortly before it expires has that attempt: company comes after.
func TestNoDeliveryExpiresForWantOfCompany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(503) }))
		age := func(s *subscription.Subscription) {
			s.MaxAge, s.Schedule = time.Minute, []time.Duration{55 * time.Second}
			s.Batching = &subscription.Batching{MaxEvents: 10, MaxBytes: 1 << 20, MaxWait: 10 * time.Second}
		}
		sub := w.sub("orders", most(16), age, func(s *subscription.Subscription) { s.Batching.MaxWait = 0 })
		w.publishN(sub, 0, 3)
		time.Sleep(54 * time.Second)
		w.receiver.set(always(time.Millisecond, ok))
		// Others that have all the time come first in the queue of repeats and in that of first attempts.
		w.sub("orders", most(16), age)
		w.journal.add(0, 100, time.Now().Add(500*time.Millisecond), sub)
		w.publish(sub, 0)
		time.Sleep(time.Hour)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 5})
	})
}

// What has waited for something else, on disk or before a restart, does not wait for company as if it had just come.
func TestTheWaitForCompanyBeginsWhenADeliveryIsDue(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*subscription.Subscription)
		do     func(w *world)
		within time.Duration
	}{
		"a rate that is lower than the wait": {func(s *subscription.Subscription) { s.MaxRate = 0.1 }, func(w *world) {
			sub := w.registry.Subscription(lane("orders"))
			w.publishN(sub, 0, 4) // full: it goes at once
			time.Sleep(time.Second)
			w.publishN(sub, 0, 2)
		}, 10 * time.Second},
		"a restart": {func(*subscription.Subscription) {}, func(w *world) {
			w.publishN(w.registry.Subscription(lane("orders")), 0, 2)
			time.Sleep(9 * time.Second)
			_ = w.kill()
			w.start()
		}, time.Second},
		"a pause": {func(*subscription.Subscription) {}, func(w *world) {
			sub := w.registry.Subscription(lane("orders"))
			w.sub("orders", most(16), batching(4, 10*time.Second), inState(grapnelv1.Subscription_STATE_PAUSED))
			w.publishN(sub, 0, 2)
			time.Sleep(time.Minute)
			w.put(sub)
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				synctest.Wait()
				w.sub("orders", most(16), batching(4, 10*time.Second), tt.change)
				tt.do(w)
				begin, before := time.Now(), len(w.receiver.requests())
				time.Sleep(time.Minute)
				requests := w.receiver.requests()
				if len(requests) != before+1 || len(requests[before].ids) != 2 {
					t.Fatalf("requests with %v deliveries, want %d and one with 2", w.receiver.sizes(), before)
				}
				if took := requests[before].at.Sub(begin); took > tt.within+20*time.Millisecond {
					t.Errorf("it took %v, want %v", took, tt.within)
				}
			})
		})
	}
}

// What fills a request is what it may carry: attributes by their bytes, not by their number.
func TestAttributesFillARequest(t *testing.T) {
	for name, tt := range map[string]struct {
		names, size int
		want        []int // at once
	}{
		"few large ones":  {1, 1000, []int{3}},
		"many small ones": {20, 1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				synctest.Wait()
				sub := w.sub("orders", most(16), func(s *subscription.Subscription) {
					s.Batching = &subscription.Batching{MaxEvents: 100, MaxBytes: 3300, MaxWait: time.Second}
				})
				w.journal.attributes = make(map[string]string)
				for i := range tt.names {
					w.journal.attributes[fmt.Sprint("a", i)] = strings.Repeat("x", tt.size)
				}
				for range 4 {
					w.journal.add(0, 20, time.Time{}, sub)
				}
				time.Sleep(time.Millisecond)
				wantSizes(t, w, tt.want...)
			})
		})
	}
}

// TestGatheringNeverKeepsADeliveryLonger: whatever is done to an engine whose receiver answers at once, no first attempt without
// an ordering key is later than by the wait for company after its delivery has come, or after what else kept it has ended.
func TestGatheringNeverKeepsADeliveryLonger(t *testing.T) {
	seeds := uint64(12)
	if testing.Short() {
		seeds = 3
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { gatherRun(t, rand.New(rand.NewPCG(seed, 8))) })
		})
	}
}

func gatherRun(t *testing.T, rnd *rand.Rand) {
	w := newWorld(t, func(o *dispatch.Options) { o.WindowBytes = 16 << (10 + rnd.IntN(8)) })
	synctest.Wait()
	wait := time.Duration(rnd.IntN(10_000)) * time.Millisecond
	inFlight := 1 + rnd.IntN(8)
	ordered := rnd.IntN(2) == 0
	change := func(s *subscription.Subscription) {
		s.MaxInFlight, s.MaxAttempts, s.MaxAge, s.DisableAfter, s.Ordered = inFlight, 60, 300*time.Hour, 0, ordered
		s.Batching = &subscription.Batching{MaxEvents: 2 + rnd.IntN(30), MaxBytes: 1 << (10 + rnd.IntN(8)), MaxWait: wait}
	}
	sub := w.sub("orders", change)
	answers := rand.New(rand.NewPCG(rnd.Uint64(), 9))
	var mu sync.Mutex
	w.receiver.setAll(func(_ *subscription.Subscription, jobs []*delivery.Job) (time.Duration, *delivery.Result) {
		mu.Lock()
		defer mu.Unlock()
		r := ok()
		switch answers.IntN(8) {
		case 0:
			r = refused(422)
		case 1, 2:
			r.Refused = make(map[int]string)
			for i := range jobs {
				if answers.IntN(3) == 0 {
					r.Refused[i] = "not that one"
				}
			}
		case 3:
			if len(jobs) > 1 {
				return time.Millisecond, &delivery.Result{Cause: delivery.CauseCrowded}
			}
		}
		return time.Millisecond, r
	})
	var opened []time.Time // when what had kept all has ended
	ends := func() { opened = append(opened, time.Now()) }
	var ids []delivery.ID
	for range 120 {
		switch op := rnd.IntN(40); {
		case op < 22:
			for range 1 + rnd.IntN(12) {
				key := delivery.OrderKey(rnd.IntN(4))
				number := uint16(key % 3)
				if key == 0 {
					number = uint16(rnd.IntN(3))
				}
				ids = append(ids, w.journal.addKeyed(number, rnd.IntN(800), time.Time{}, key, sub)[0])
			}
		case op < 24:
			w.sub("orders", change, inState(grapnelv1.Subscription_STATE_PAUSED))
			time.Sleep(time.Duration(rnd.IntN(8)) * time.Second)
			w.sub("orders", change)
			ends()
		case op < 26:
			w.sub("orders", change)
		case op < 27:
			w.sub("orders", change, func(s *subscription.Subscription) { s.Batching = nil })
		case op < 29 && len(ids) > 0:
			id := ids[rnd.IntN(len(ids))]
			if op < 28 {
				_, _ = w.engine.Cancel(context.Background(), id, lane("orders"))
			} else {
				_, _ = w.engine.Retry(context.Background(), id, lane("orders"), -1)
			}
		case op < 30:
			_ = w.kill()
			time.Sleep(time.Duration(rnd.IntN(8)) * time.Second)
			w.start()
			ends()
		case op < 31:
			w.stopPartition(uint16(rnd.IntN(3)))
			for number := range uint16(3) {
				if err := w.engine.StartPartition(number); err != nil {
					t.Error(err)
				}
			}
		default:
			time.Sleep(time.Duration(rnd.IntN(4000)) * time.Millisecond)
		}
	}
	w.sub("orders", change)
	time.Sleep(24 * time.Hour)
	const slack = 1500 * time.Millisecond // for slots, and for the disk
	tried := make(map[delivery.ID]bool)
	for _, s := range w.receiver.starts() {
		if tried[s.id] || s.job.Order != 0 {
			continue
		}
		tried[s.id] = true
		since := s.accept
		for _, at := range opened {
			if at.After(since) && !at.After(s.at) {
				since = at
			}
		}
		if s.at.Sub(since) > wait+slack {
			t.Errorf("%v began %v after it could, want %v at most", s.id, s.at.Sub(since), wait)
		}
	}
	for id, r := range w.journal.records {
		if r.state != delivery.Succeeded && r.state != delivery.Cancelled {
			t.Errorf("%v ended in state %d with %d attempts: %s", id, r.state, len(r.attempts), r.reason)
		}
	}
	w.wantKeysInOrder()
	if s := w.engine.Status(lane("orders")); s.InFlight+s.Waiting > 0 {
		t.Errorf("in the end: %+v", s)
	}
	if bytes := w.journal.EventBytes(); bytes != 0 {
		t.Errorf("%d bytes of events are still held", bytes)
	}
	w.stop()
}
