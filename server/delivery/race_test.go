package delivery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Publishers, attempts, callers and sweeps all at once, over weeks of the journal's clock: in the end each delivery
// stands where its rows say, nothing open is lost, and the counts are right.
func TestEverythingAtOnce(t *testing.T) {
	b := newBench(t, func(o *Options) { o.Partitions = 2 })
	const events, subs = 400, 3
	var wg sync.WaitGroup
	var mu sync.Mutex
	var done atomic.Bool
	known := map[ID]bool{}
	some := func(rng *rand.Rand) (ID, bool) {
		mu.Lock()
		defer mu.Unlock()
		n := rng.IntN(max(len(known), 1))
		for id := range known {
			if n--; n < 0 {
				return id, true
			}
		}
		return ID{}, false
	}
	wg.Go(func() { // publishes, and lets the clock run
		defer done.Store(true)
		rng := rand.New(rand.NewPCG(1, 1))
		for i := range events {
			pub := publication(fmt.Sprint(i), 1, 2, 3)
			if i%7 == 0 {
				pub.Event.DeliverTime = b.clock.now().Add(50 * time.Hour)
			}
			b.append(pub)
			mu.Lock()
			for sub := range subs {
				known[idOf(pub.Event, sub+1)] = true
			}
			mu.Unlock()
			b.clock.add(time.Duration(rng.IntN(180)) * time.Minute)
		}
	})
	wg.Go(func() { // attempts of what was offered, and of what is due
		rng := rand.New(rand.NewPCG(2, 1))
		for !done.Load() {
			jobs := b.jobs()
			for sub := range subs {
				if sub > 0 || rng.IntN(4) > 0 { // one lane falls behind
					jobs = append(jobs, b.timers(sub+1, b.clock.now())...)
				}
			}
			seen := map[ID]bool{}
			for _, job := range jobs {
				if seen[job.ID] {
					continue
				}
				seen[job.ID] = true
				switch rng.IntN(5) {
				case 0:
					b.failed(job, time.Duration(rng.IntN(300))*time.Hour)
				case 1:
					b.exhaust(job)
				default:
					b.succeed(job)
				}
			}
			b.flush() // a row is held once
		}
	})
	for w := range 2 {
		wg.Go(func() { // callers
			rng := rand.New(rand.NewPCG(uint64(w), 3))
			for !done.Load() {
				id, ok := some(rng)
				if !ok {
					continue
				}
				lane := LaneKey{acme, id.Subscription}
				var err error
				switch rng.IntN(40) {
				case 0:
					_, err = b.CancelLane(context.Background(), lane, "x", nil)
				case 1, 2, 3, 4, 5, 6, 7, 8:
					_, err = b.Cancel(context.Background(), lane, id, "x")
				default:
					_, err = b.Retry(context.Background(), lane, id, -1)
				}
				if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrFinal) && !errors.Is(err, ErrInvalidState) {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for i := 0; !done.Load(); i++ {
			b.retain([]time.Duration{72 * time.Hour, 30 * time.Hour}[i%2])
		}
	})
	wg.Wait()
	b.flush()
	for range 2 {
		rows := map[ID]int{}
		for sub := range subs {
			for _, job := range append(b.backlog(sub+1), b.timers(sub+1, b.clock.now().Add(1000*time.Hour))...) {
				rows[job.ID]++
			}
		}
		open := 0
		for id := range known {
			d, err := b.Delivery(acme, id)
			switch {
			case errors.Is(err, ErrNotFound):
				if rows[id] != 0 {
					t.Errorf("%v is gone, and waits", id)
				}
			case err != nil:
				t.Error(err)
			case d.State.Final() == (rows[id] == 1) || rows[id] > 1:
				t.Errorf("%+v has %d rows", d, rows[id])
			case !d.State.Final():
				open++
			}
			if attempts, err := b.Attempts(acme, id); err == nil && len(attempts) != d.Attempts {
				t.Errorf("%+v has %d attempts", d, len(attempts))
			}
		}
		waitFor(t, b.Counted)
		if n := b.OpenIn(acme); n != int64(open) || len(rows) != open {
			t.Errorf("%d open, %d counted, %d rows", open, n, len(rows))
		}
		b.reopen()
	}
}
