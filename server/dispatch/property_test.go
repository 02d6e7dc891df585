package dispatch_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// TestEngineLosesAndDoublesNothing does random things to an engine with a small window. The fake journal
// fails the test when a delivery is settled twice or passed by the low-water mark, the receiver when one is
// attempted twice at once. In the end everything must have ended, each lane and partition in order.
func TestEngineLosesAndDoublesNothing(t *testing.T) {
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomRun(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func randomRun(t *testing.T, rnd *rand.Rand) {
	w := newWorld(t, func(o *dispatch.Options) {
		o.WindowBytes = 8 << (10 + rnd.IntN(6))
		o.Slots = 1 + rnd.IntN(20)
	})
	names := []string{"a", "b", "c"}
	limit := func(s *subscription.Subscription) {
		s.MaxInFlight, s.MaxAttempts, s.MaxAge = 1+rnd.IntN(6), 50, 300*time.Hour
	}
	for _, n := range names {
		w.sub(n, limit)
	}
	w.receiver.set(randomAnswer(rnd.Uint64()))
	var ids []delivery.ID
	lives := []int{0} // where each life of the engine begins in the receiver's list
	for range 400 {
		name := names[rnd.IntN(len(names))]
		lane := delivery.LaneKey{Namespace: "acme", Subscription: name}
		switch op := rnd.IntN(100); {
		case op < 50:
			ids = append(ids, w.publishN(w.registry.Subscription("acme", name), uint16(rnd.IntN(3)), 1+rnd.IntN(40))...)
		case op < 60:
			w.sub(name, limit, inState(grapnelv1.Subscription_STATE_PAUSED))
		case op < 75:
			w.sub(name, limit)
		case op < 85 && len(ids) > 0:
			id := ids[rnd.IntN(len(ids))]
			lane.Subscription = w.journal.get(id).job.Subscription
			if op < 80 {
				_, _ = w.engine.Cancel(t.Context(), id, lane)
			} else {
				_, _ = w.engine.Retry(t.Context(), id, lane, -1)
			}
		case op < 86:
			_ = w.kill()
			lives = append(lives, len(w.receiver.starts()))
			w.start()
		case op < 95:
			time.Sleep(time.Duration(rnd.IntN(3000)) * time.Millisecond)
		default:
			time.Sleep(time.Duration(rnd.IntN(10)) * time.Minute)
		}
	}
	w.receiver.set(always(time.Millisecond, ok))
	for _, n := range names {
		w.sub(n, limit)
	}
	time.Sleep(4 * time.Hour)
	w.stop()
	synctest.Wait()
	for id, r := range w.journal.records {
		if r.state != delivery.Succeeded && r.state != delivery.Cancelled {
			t.Errorf("%v ended in state %d with %d attempts", id, r.state, len(r.attempts))
		}
	}
	lives = append(lives, len(w.receiver.starts()))
	for i := range lives[1:] {
		wantOrder(t, w.receiver.starts()[lives[i]:lives[i+1]])
	}
}

func randomAnswer(seed uint64) func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
	var mu sync.Mutex
	rnd := rand.New(rand.NewPCG(seed, 2))
	return func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
		mu.Lock()
		defer mu.Unlock()
		delay := time.Duration(0) // ends within Attempt
		if rnd.IntN(3) > 0 {
			delay = time.Duration(rnd.IntN(2000)) * time.Millisecond
		}
		switch rnd.IntN(12) {
		case 0:
			return delay, unspent()
		case 1, 2, 3:
			return delay, refused(500)
		case 4:
			r := refused(503)
			r.RetryAfter = time.Duration(rnd.IntN(20)) * time.Second
			return delay, r
		}
		return delay, ok()
	}
}

// wantOrder checks that the first attempts of one life came in the order of the FIFO.
func wantOrder(t *testing.T, starts []start) {
	t.Helper()
	type queue struct {
		sub       string
		partition uint16
	}
	first := make(map[queue][]uint64)
	seen := make(map[delivery.ID]bool)
	for _, s := range starts {
		if k := (queue{s.sub, s.id.Partition}); s.job.Due.IsZero() && !seen[s.id] {
			seen[s.id] = true
			first[k] = append(first[k], s.id.Seq)
		}
	}
	for k, seqs := range first {
		if !slices.IsSorted(seqs) {
			t.Errorf("%v: first attempts out of order", k)
		}
	}
}

func TestEngineLowWaterAfterRandomCompletion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.set(func(_ *subscription.Subscription, j *delivery.Job) (time.Duration, *delivery.Result) {
			if j.ID.Seq%50 == 7 {
				return time.Hour, ok() // stragglers
			}
			return time.Duration(rand.IntN(1000)) * time.Millisecond, ok()
		})
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxInFlight = 100 })
		ids := w.publishN(sub, 2, 200)
		lane := delivery.LaneKey{Namespace: "acme", Subscription: "orders"}
		time.Sleep(10 * time.Second)
		first := uint64(0)
		for _, id := range ids {
			if first == 0 && w.journal.get(id).state == delivery.Pending {
				first = id.Seq
			}
		}
		if got := w.journal.low(lane, 2); got != first || first == 0 {
			t.Errorf("low water %d, first pending %d", got, first)
		}
		time.Sleep(2 * time.Hour)
		w.stop()
		if got, want := w.journal.low(lane, 2), ids[199].Seq+1; got != want {
			t.Errorf("low water %d at the end, want %d", got, want)
		}
	})
}
