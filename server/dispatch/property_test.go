package dispatch_test

import (
	"context"
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

// TestEngineLosesAndDoublesNothing does random things to an engine with little room, with a journal whose effects are
// late. The fake journal fails the test when a delivery is settled twice, the receiver when one is attempted twice at once.
// In the end everything must have ended, each lane and partition in order.
func TestEngineLosesAndDoublesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	seeds := uint64(60)
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
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
	w.journal.mu.Lock()
	w.journal.late, w.journal.rnd = time.Duration(1+rnd.IntN(30))*time.Millisecond, rand.New(rand.NewPCG(rnd.Uint64(), 1))
	w.journal.mu.Unlock()
	names := []string{"a", "b", "c"}
	limit := func(s *subscription.Subscription) {
		s.MaxInFlight, s.MaxAttempts, s.MaxAge = 1+rnd.IntN(6), 50, 300*time.Hour
		s.DisableAfter = 0
		s.Ordered = s.ID != "c" || rnd.IntN(2) == 0
		s.BlocksKeys = s.Ordered && rnd.IntN(2) == 0
		if s.ID != "a" || rnd.IntN(4) > 0 {
			on("one.example")(s)
		}
		if s.MaxRate = 0; rnd.IntN(3) == 0 {
			s.MaxRate = float64(1+rnd.IntN(40)) / 2
		}
		if s.Batching = nil; rnd.IntN(2) == 0 {
			s.Batching = &subscription.Batching{MaxEvents: 2 + rnd.IntN(8), MaxBytes: 1 << (10 + rnd.IntN(6)), MaxWait: time.Duration(rnd.IntN(3000)) * time.Millisecond}
		}
	}
	for _, n := range names {
		w.sub(n, limit)
	}
	w.receiver.set(randomAnswer(rnd.Uint64()))
	w.receiver.setAll(randomAnswers(rnd.Uint64()))
	var ids []delivery.ID
	owner := make(map[delivery.ID]string)
	lives := []int{0} // where each life of the engine begins in the receiver's list
	for range 400 {
		name := names[rnd.IntN(len(names))]
		switch op := rnd.IntN(100); {
		case op < 50:
			sub := w.registry.Subscription(lane(name))
			if sub == nil {
				sub = w.sub(name, limit)
			}
			for range 1 + rnd.IntN(20) {
				// A key lies in one partition.
				key := delivery.OrderKey(rnd.IntN(6))
				number := uint16(key % 3)
				if key == 0 {
					number = uint16(rnd.IntN(3))
				}
				id := w.journal.addKeyed(number, 1024, time.Time{}, key, sub)[0]
				ids = append(ids, id)
				owner[id] = name
			}
		case op < 58:
			w.sub(name, limit, inState(grapnelv1.Subscription_STATE_PAUSED))
		case op < 60:
			w.remove(name, false) // it is away, and comes back
		case op < 61:
			w.remove(name, true)
		case op < 75:
			w.sub(name, limit)
		case op < 85 && len(ids) > 0:
			id := ids[rnd.IntN(len(ids))]
			ctx, cancel := context.WithCancel(t.Context())
			if rnd.IntN(3) == 0 {
				cancel() // a caller who has left changes nothing
			}
			if op < 80 {
				_, _ = w.engine.Cancel(ctx, id, lane(owner[id]))
			} else {
				_, _ = w.engine.Retry(ctx, id, lane(owner[id]), -1)
			}
			cancel()
		case op < 86:
			_ = w.kill()
			lives = append(lives, len(w.receiver.starts()))
			w.start()
		case op < 87:
			number := uint16(rnd.IntN(3))
			w.stopPartition(number)
			time.Sleep(time.Duration(rnd.IntN(3000)) * time.Millisecond)
			if err := w.engine.StartPartition(number); err != nil {
				t.Error(err)
			}
		case op < 88:
			if _, err := w.engine.CancelLane(t.Context(), lane(name), "asked for", nil); err != nil {
				t.Error(err)
			}
		case op < 95:
			time.Sleep(time.Duration(rnd.IntN(3000)) * time.Millisecond)
		default:
			time.Sleep(time.Duration(rnd.IntN(10)) * time.Minute)
		}
	}
	w.receiver.set(always(time.Millisecond, ok))
	w.receiver.setAll(nil)
	for _, n := range names {
		w.sub(n, limit)
	}
	time.Sleep(4 * time.Hour)
	w.wantKeysInOrder()
	for _, n := range names {
		if s := w.engine.Status(lane(n)); !s.Open || s.InFlight+s.Waiting > 0 {
			t.Errorf("%s in the end: %+v", n, s)
		}
	}
	if bytes := w.journal.EventBytes(); bytes != 0 {
		t.Errorf("%d bytes of events are still held", bytes)
	}
	w.stop()
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

// wantKeysInOrder checks that of each ordering key the deliveries first succeeded in their order, but for those that a
// caller has brought back.
func (w *world) wantKeysInOrder() {
	w.t.Helper()
	w.receiver.mu.Lock()
	accepted := w.receiver.accepted
	w.receiver.mu.Unlock()
	type key struct {
		sub   string
		order delivery.OrderKey
	}
	last := make(map[key]uint64)
	seen := make(map[delivery.ID]bool)
	for _, s := range accepted {
		if seen[s.id] || w.journal.get(s.id).returned {
			continue
		}
		seen[s.id] = true
		k := key{s.sub, s.job.Order}
		if s.id.Seq < last[k] {
			w.t.Errorf("%v of %v was delivered after %x", s.id, k, last[k])
		}
		last[k] = s.id.Seq
	}
}

// stopPartition is what happens when a partition goes to another node: what it has in flight or settling is lost.
func (w *world) stopPartition(number uint16) {
	f := w.journal
	f.mu.Lock()
	p := f.partition(number)
	p.settles, p.effects = nil, nil
	f.mu.Unlock()
	w.engine.StopPartition(number)
	w.receiver.mu.Lock()
	defer w.receiver.mu.Unlock()
	for id, flight := range w.receiver.flying {
		if id.Partition == number {
			delete(w.receiver.flying, id)
			w.receiver.left(flight)
		}
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
		case 5:
			return time.Duration(1+rnd.IntN(15)) * time.Second, timedOut()
		case 4:
			r := refused(503)
			r.RetryAfter = time.Duration(rnd.IntN(20)) * time.Second
			return delay, r
		}
		return delay, ok()
	}
}

// wantOrder checks that the first attempts of one life came in the order of the FIFO, of what has no ordering key.
func wantOrder(t *testing.T, starts []start) {
	t.Helper()
	type queue struct {
		sub       string
		partition uint16
	}
	first := make(map[queue][]uint64)
	seen := make(map[delivery.ID]bool)
	for _, s := range starts {
		if k := (queue{s.sub, s.id.Partition}); s.kind == delivery.FIFO && s.job.Order == 0 && !seen[s.id] {
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
