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
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/subscription"
)

// together is a request with several deliveries.
type together struct {
	sub string
	ids []delivery.ID
	at  time.Time
}

func (r *receiver) AttemptBatch(sub *subscription.Subscription, jobs []*delivery.Job, sink delivery.Sink) {
	r.mu.Lock()
	b := together{sub: sub.ID, at: time.Now()}
	keys := make(map[delivery.OrderKey]bool)
	for _, job := range jobs {
		if r.flying[job.ID].job != nil {
			r.t.Errorf("two attempts of %v at once", job.ID)
		}
		for id, f := range r.flying {
			if job.Order != 0 && f.sub == sub.ID && f.job.Order == job.Order {
				r.t.Errorf("%v and %v of one ordering key at once", id, job.ID)
			}
		}
		if job.Order != 0 && keys[job.Order] {
			r.t.Errorf("%v is not the only one of its ordering key in a request", job.ID)
		}
		keys[job.Order] = true
		b.ids = append(b.ids, job.ID)
		r.started = append(r.started, start{
			job.ID, job.Kind, sub.ID, sub.Proto().GetUri(), job, job.Event, time.Now(), job.Event.AcceptTime,
		})
	}
	for _, job := range jobs {
		r.flying[job.ID] = flight{sub.ID, job, sink}
	}
	r.batches = append(r.batches, b)
	r.now[sub.ID]++
	r.most[sub.ID] = max(r.most[sub.ID], r.now[sub.ID])
	answer, answerAll := r.answer, r.answerAll
	r.mu.Unlock()
	if most := sub.Batching.MaxEvents; len(jobs) > most {
		r.t.Errorf("%d deliveries in a request that may carry %d", len(jobs), most)
	}
	var delay time.Duration
	var result *delivery.Result
	switch {
	case answerAll != nil:
		delay, result = answerAll(sub, jobs)
	case answer != nil:
		delay, result = answer(sub, jobs[0])
	}
	switch {
	case result == nil:
	case delay == 0:
		r.endAll(jobs, sink, *result)
	default:
		time.AfterFunc(delay, func() { r.endAll(jobs, sink, *result) })
	}
}

// endAll ends a request, unless it is forgotten.
func (r *receiver) endAll(jobs []*delivery.Job, sink delivery.Sink, result delivery.Result) {
	r.mu.Lock()
	ended := ""
	for i, job := range jobs {
		f := r.flying[job.ID]
		if f.job != job {
			continue
		}
		delete(r.flying, job.ID)
		ended = f.sub
		if job.Order != 0 && result.Of(i, len(jobs)).Outcome == delivery.OutcomeSucceeded {
			r.accepted = append(r.accepted, start{id: job.ID, sub: f.sub, job: job})
		}
	}
	if ended != "" {
		r.now[ended]--
	}
	r.mu.Unlock()
	if ended != "" {
		sink.Complete(jobs[0], result)
	}
}

func (r *receiver) setAll(answer func(*subscription.Subscription, []*delivery.Job) (time.Duration, *delivery.Result)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answerAll = answer
}

// left counts a request out when its last delivery has been taken off it. r.mu is held.
func (r *receiver) left(f flight) {
	for _, other := range r.flying {
		if other.sink == f.sink {
			return
		}
	}
	r.now[f.sub]--
}

func (r *receiver) requests() []together {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.batches)
}

// sizes is how many deliveries each request carried.
func (r *receiver) sizes() (sizes []int) {
	for _, b := range r.requests() {
		sizes = append(sizes, len(b.ids))
	}
	return sizes
}

func batching(events int, wait time.Duration) func(*subscription.Subscription) {
	return func(s *subscription.Subscription) {
		s.Batching = &subscription.Batching{MaxEvents: events, MaxBytes: 1 << 20, MaxWait: wait}
	}
}

func wantSizes(t *testing.T, w *world, want ...int) {
	t.Helper()
	if got := w.receiver.sizes(); !slices.Equal(got, want) {
		t.Errorf("requests with %v deliveries, want %v", got, want)
	}
}

func TestARequestGoesWhenItIsFullOrHasWaited(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*subscription.Subscription)
		n      int
		after  time.Duration
		want   []int
	}{
		"as many as it carries":   {batching(4, time.Second), 4, 0, []int{4}},
		"fewer, until the time":   {batching(4, time.Second), 3, time.Second, []int{3}},
		"one alone":               {batching(4, time.Second), 1, time.Second, []int{1}},
		"what is over waits anew": {batching(4, time.Second), 6, time.Second, []int{4, 2}},
		"without waiting":         {batching(4, 0), 1, 0, []int{1}},
		"as many bytes": {func(s *subscription.Subscription) {
			s.Batching = &subscription.Batching{MaxEvents: 100, MaxBytes: 3300, MaxWait: time.Second}
		}, 4, 0, []int{3}},
		"one that is larger": {func(s *subscription.Subscription) {
			s.Batching = &subscription.Batching{MaxEvents: 100, MaxBytes: 1000, MaxWait: time.Second}
		}, 1, 0, []int{1}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				synctest.Wait()
				sub := w.sub("orders", most(16), tt.change)
				begin := time.Now()
				w.publishN(sub, 0, tt.n)
				time.Sleep(time.Millisecond)
				if first := w.receiver.requests(); (len(first) > 0) != (tt.after == 0 || len(tt.want) > 1) {
					t.Errorf("at once: %d requests", len(first))
				}
				time.Sleep(tt.after)
				wantSizes(t, w, tt.want...)
				requests := w.receiver.requests()
				if got := requests[len(requests)-1].at.Sub(begin); got != tt.after {
					t.Errorf("the last went after %v, want %v", got, tt.after)
				}
				time.Sleep(time.Minute)
				wantStates(t, w, map[delivery.State]int{delivery.Succeeded: tt.n})
			})
		})
	}
}

func TestNobodyWaitsForCompanyWithABacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.WindowBytes = 64 << 10 }) // holds a few dozen
		defer w.stop()
		sub := w.sub("orders", most(4), batching(1000, 10*time.Second), inState(grapnelv1.Subscription_STATE_PAUSED))
		w.publishN(sub, 0, 2000)
		synctest.Wait()
		begin := time.Now()
		w.sub("orders", most(4), batching(1000, 10*time.Second))
		time.Sleep(time.Hour)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 2000})
		requests := w.receiver.requests()
		if took := requests[len(requests)-1].at.Sub(begin); took > 15*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestAPartialAnswerRepeatsOnlyWhatItNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.setAll(func(_ *subscription.Subscription, jobs []*delivery.Job) (time.Duration, *delivery.Result) {
			r := ok()
			r.Refused = map[int]string{}
			for i, j := range jobs {
				if j.Attempts == 0 && (j.Event.ID == "4" || j.Event.ID == "8") { // the fourth and the eighth
					r.Refused[i] = "no such customer"
				}
			}
			return time.Millisecond, r
		})
		ids := w.publishN(w.sub("orders", most(16), batching(10, time.Second)), 0, 10)
		time.Sleep(2 * time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 8, delivery.Scheduled: 2})
		if a := w.journal.get(ids[3]).attempts; len(a) != 1 || a[0].Outcome != delivery.OutcomeRetryable || a[0].Error != "no such customer" {
			t.Errorf("attempts of one that was named: %+v", a)
		}
		if s := w.engine.Status(lane("orders")); !s.FailingSince.IsZero() || s.Breaker != health.BreakerClosed {
			t.Errorf("status %+v", s)
		}
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 10})
		if n := len(w.receiver.starts()); n != 12 {
			t.Errorf("%d attempts in all, want 12", n)
		}
	})
}

// One event that the receiver cannot take must not have its company fail with it for ever.
func TestAPoisonEventIsFoundOut(t *testing.T) {
	for name, tt := range map[string]struct {
		code     int
		within   time.Duration // until all others are through
		attempts int           // of another in the first request, at most
	}{
		"that is the request's fault": {400, 10 * time.Second, 2},
		"too large a body":            {413, 10 * time.Second, 2},
		"that may be the receiver's":  {500, 10 * time.Minute, 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				w.receiver.setAll(func(_ *subscription.Subscription, jobs []*delivery.Job) (time.Duration, *delivery.Result) {
					if slices.ContainsFunc(jobs, func(j *delivery.Job) bool { return j.Event.ID == "31" }) {
						return time.Millisecond, refused(tt.code)
					}
					return time.Millisecond, ok()
				})
				ids := w.publishN(w.sub("orders", most(16), batching(64, time.Second)), 0, 64)
				poison := ids[30]
				time.Sleep(tt.within)
				if got := w.journal.states()[delivery.Succeeded]; got != 63 {
					t.Errorf("%d are through within %v, want 63", got, tt.within)
				}
				for _, id := range ids {
					if r := w.journal.get(id); id != poison && len(r.attempts) > tt.attempts {
						t.Errorf("%v had %d attempts, want %d at most", id, len(r.attempts), tt.attempts)
					}
				}
				time.Sleep(time.Hour)
				last := w.receiver.requests()
				if n := len(last[len(last)-1].ids); n != 1 {
					t.Errorf("it still goes in a company of %d", n)
				}
			})
		})
	}
}

// What says nothing about the events leaves them together, and counts once for the receiver.
func TestABatchIsOneObservation(t *testing.T) {
	for name, result := range map[string]func() *delivery.Result{
		"503": func() *delivery.Result { return refused(503) }, "unreachable": unreachable,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				w.receiver.set(always(time.Millisecond, result))
				w.publishN(w.sub("orders", most(16), batching(50, time.Second)), 0, 50)
				time.Sleep(3 * time.Second)
				if s := w.engine.Status(lane("orders")); s.Breaker != health.BreakerClosed {
					t.Errorf("one request that failed with 50 deliveries: %+v", s)
				}
				w.receiver.set(always(time.Millisecond, ok))
				time.Sleep(time.Minute)
				wantSizes(t, w, 50, 50)
			})
		})
	}
}

func TestWhatIsTooLargeTogetherGoesApartUnspent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.setAll(func(_ *subscription.Subscription, jobs []*delivery.Job) (time.Duration, *delivery.Result) {
			if len(jobs) > 1 {
				return time.Millisecond, &delivery.Result{Cause: delivery.CauseCrowded}
			}
			return time.Millisecond, ok()
		})
		ids := w.publishN(w.sub("orders", most(16), batching(20, time.Second)), 0, 20)
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 20})
		for _, id := range ids {
			if n := len(w.journal.get(id).attempts); n != 1 {
				t.Errorf("%d attempts on record, want 1", n)
			}
		}
	})
}

func TestOneThatAPluginMayHaveDiedOfGoesByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		lost := delivery.Result{Cause: delivery.CausePlugin, Indeterminate: true, Guilt: delivery.GuiltShared, Attempt: delivery.Attempt{Outcome: delivery.OutcomeInterrupted}}
		w.receiver.setAll(func(_ *subscription.Subscription, jobs []*delivery.Job) (time.Duration, *delivery.Result) {
			if len(jobs) > 1 {
				return time.Millisecond, &lost
			}
			if jobs[0].Suspicion != 1 {
				t.Errorf("suspicion %d, want 1", jobs[0].Suspicion)
			}
			return time.Millisecond, ok()
		})
		w.publishN(w.sub("orders", most(16), batching(8, time.Second)), 0, 8)
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 8})
		wantSizes(t, w, 8, 1, 1, 1, 1, 1, 1, 1, 1)
	})
}

// What callers do while deliveries gather, and while they travel, is done to each as if it were alone.
func TestEditsWhileGatheringAndTravelling(t *testing.T) {
	gather := batching(4, 10*time.Second)
	for name, do := range map[string]struct {
		edit func(t *testing.T, w *world, ids []delivery.ID)
		want map[delivery.State]int
	}{
		"cancel one": {func(t *testing.T, w *world, ids []delivery.ID) {
			if _, err := w.engine.Cancel(t.Context(), ids[1], lane("orders")); err != nil {
				t.Error(err)
			}
		}, map[delivery.State]int{delivery.Succeeded: 2, delivery.Cancelled: 1}},
		"cancel all": {func(t *testing.T, w *world, _ []delivery.ID) {
			if _, err := w.engine.CancelLane(t.Context(), lane("orders"), "asked for", nil); err != nil {
				t.Error(err)
			}
		}, map[delivery.State]int{delivery.Cancelled: 3}},
		"pause and resume": {func(_ *testing.T, w *world, _ []delivery.ID) {
			w.sub("orders", most(16), gather, inState(grapnelv1.Subscription_STATE_PAUSED))
			time.Sleep(time.Minute)
			w.sub("orders", most(16), gather)
		}, map[delivery.State]int{delivery.Succeeded: 3}},
		"another target": {func(_ *testing.T, w *world, _ []delivery.ID) {
			w.sub("orders", most(16), gather, func(s *subscription.Subscription) {
				s.Proto().Uri = "https://two.example"
			})
		}, map[delivery.State]int{delivery.Succeeded: 3}},
		"no batching any more": {func(_ *testing.T, w *world, _ []delivery.ID) { w.sub("orders", most(16)) },
			map[delivery.State]int{delivery.Succeeded: 3}},
		"deletion": {func(_ *testing.T, w *world, _ []delivery.ID) { w.remove("orders", true) }, map[delivery.State]int{delivery.Cancelled: 3}},
		"a partition": {func(t *testing.T, w *world, _ []delivery.ID) {
			w.stopPartition(0)
			if err := w.engine.StartPartition(0); err != nil {
				t.Error(err)
			}
		}, map[delivery.State]int{delivery.Succeeded: 3}},
	} {
		for _, flying := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, travelling %v", name, flying), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					defer w.stop()
					synctest.Wait()
					w.receiver.set(always(30*time.Second, ok))
					sub := w.sub("orders", most(16), gather)
					ids := []delivery.ID{w.publish(sub, 0), w.publish(sub, 1), w.publish(sub, 0)}
					if flying {
						time.Sleep(11 * time.Second)
					}
					synctest.Wait()
					if got := len(w.receiver.requests()); (got == 1) != flying {
						t.Fatalf("%d requests before", got)
					}
					do.edit(t, w, ids)
					time.Sleep(10 * time.Minute)
					want := do.want
					if flying && name != "a partition" { // what was on its way arrives
						for _, id := range ids {
							if n := len(w.journal.get(id).attempts); n != 1 {
								t.Errorf("%v has %d attempts, want 1", id, n)
							}
						}
					}
					wantStates(t, w, want)
					if s := w.engine.Status(lane("orders")); s.InFlight+s.Waiting > 0 {
						t.Errorf("status in the end: %+v", s)
					}
				})
			})
		}
	}
}

// Ordered keys: a request carries one delivery of each, and the next request the next.
func TestBatchesKeepTheOrderOfKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		sub := w.sub("orders", most(16), batching(10, 100*time.Millisecond), func(s *subscription.Subscription) { s.Ordered = true })
		for range 20 {
			for key := range 5 {
				w.journal.addKeyed(uint16(key), 100, time.Time{}, delivery.OrderKey(key+1), sub)
			}
		}
		time.Sleep(time.Hour)
		w.wantKeysInOrder()
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 100})
		if n := len(w.receiver.requests()); n > 40 {
			t.Errorf("%d requests for 20 deliveries of each of 5 keys", n)
		}
	})
}

// switching is a registry whose subscription changes between two looks at it.
type switching struct {
	*registry
	mu    sync.Mutex
	after int
	to    *subscription.Subscription
}

func (r *switching) Subscription(lane delivery.LaneKey) *subscription.Subscription {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.to != nil {
		if r.after--; r.after < 0 {
			return r.to
		}
	}
	return r.registry.Subscription(lane)
}

// A request that was made up before the subscription allowed less is made up anew, whenever that is seen.
func TestARequestIsWithinTheBoundsOfItsSubscriptionAsItStarts(t *testing.T) {
	for after := range 24 {
		synctest.Test(t, func(t *testing.T) {
			r := &switching{registry: newRegistry()}
			w := newWorld(t, func(o *dispatch.Options) { o.Subscriptions = r })
			w.registry = r.registry
			defer w.stop()
			synctest.Wait()
			sub := w.sub("orders", most(16), batching(8, time.Second))
			w.publishN(sub, 0, 7)
			less, policy := *sub, *sub.Policy
			less.Policy = &policy
			less.Batching = &subscription.Batching{MaxEvents: 3, MaxBytes: 1 << 20, MaxWait: time.Second}
			r.mu.Lock()
			r.after, r.to = after, &less
			r.mu.Unlock()
			w.publish(sub, 0)
			synctest.Wait()
			w.put(&less)
			time.Sleep(time.Minute) // the receiver compares each request with its subscription
			wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 8})
		})
	}
}

// TestGatheringOverRandomArrivals: none waits for company for longer than it may, no request carries more than it may, and
// one that carries less has waited.
func TestGatheringOverRandomArrivals(t *testing.T) {
	seeds := uint64(40)
	if testing.Short() {
		seeds = 8
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(seed, 5))
				w := newWorld(t)
				defer w.stop()
				synctest.Wait()
				b := &subscription.Batching{MaxEvents: 2 + rnd.IntN(20), MaxBytes: 1024 << rnd.IntN(6), MaxWait: time.Duration(rnd.IntN(2000)) * time.Millisecond}
				sub := w.sub("orders", most(1000), func(s *subscription.Subscription) { s.Batching = b })
				w.receiver.set(always(time.Millisecond, ok))
				w.publishN(sub, 0, 100) // it has proven itself, and its limit has grown
				time.Sleep(5 * time.Minute)
				before := len(w.receiver.requests())
				size, came := make(map[delivery.ID]int), make(map[delivery.ID]time.Time)
				for range 100 {
					for range 1 + rnd.IntN(3*b.MaxEvents) {
						n := rnd.IntN(2000)
						id := w.journal.add(uint16(rnd.IntN(3)), n, time.Time{}, sub)[0]
						size[id], came[id] = n, time.Now()
					}
					time.Sleep(time.Duration(rnd.IntN(1500)) * time.Millisecond)
				}
				time.Sleep(5 * time.Minute)
				requests := w.receiver.requests()[before:]
				for i, r := range requests {
					sum := 0
					for _, id := range r.ids {
						sum += size[id]
						if waited := r.at.Sub(came[id]); waited > b.MaxWait+5*time.Millisecond { // and for a slot
							t.Errorf("request %d: %v waited %v, want %v at most", i, id, waited, b.MaxWait)
						}
					}
					full := len(r.ids) == b.MaxEvents || sum+2100 > b.MaxBytes
					if len(r.ids) > b.MaxEvents || sum > b.MaxBytes && len(r.ids) > 1 {
						t.Errorf("request %d carries %d with %d bytes, want %d with %d", i, len(r.ids), sum, b.MaxEvents, b.MaxBytes)
					}
					if waited := r.at.Sub(came[r.ids[0]]); !full && waited < b.MaxWait {
						t.Errorf("request %d carries %d with %d bytes after %v", i, len(r.ids), sum, waited)
					}
				}
				if n := w.journal.states()[delivery.Succeeded]; n != 100+len(came) {
					t.Errorf("%d of %d were delivered", n, 100+len(came))
				}
			})
		})
	}
}

// randomAnswers is randomAnswer with requests of which some are taken in part.
func randomAnswers(seed uint64) func(*subscription.Subscription, []*delivery.Job) (time.Duration, *delivery.Result) {
	one := randomAnswer(seed)
	var mu sync.Mutex
	rnd := rand.New(rand.NewPCG(seed, 3))
	return func(sub *subscription.Subscription, jobs []*delivery.Job) (time.Duration, *delivery.Result) {
		delay, r := one(sub, jobs[0])
		mu.Lock()
		defer mu.Unlock()
		switch {
		case r.Outcome == delivery.OutcomeSucceeded && rnd.IntN(2) == 0:
			r.Refused = make(map[int]string)
			for i := range jobs {
				if rnd.IntN(3) == 0 {
					r.Refused[i] = "not that one"
				}
			}
		case len(jobs) > 1 && rnd.IntN(8) == 0:
			return delay, &delivery.Result{Cause: delivery.CauseCrowded}
		case r.ResponseCode == 500 && rnd.IntN(2) == 0:
			r.ResponseCode = 422
		}
		return delay, r
	}
}
