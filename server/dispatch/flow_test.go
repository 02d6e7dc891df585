package dispatch_test

import (
	"bytes"
	"cmp"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/subscription"
)

func unreachable() *delivery.Result {
	return &delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeUnreachable}}
}

func most(n int) func(*subscription.Subscription) {
	return func(s *subscription.Subscription) {
		s.MaxInFlight, s.MaxAttempts, s.MaxAge, s.DisableAfter = n, 50, 300*time.Hour, 0
	}
}

// startsFrom counts the starts in each of n spans from a time on.
func (w *world) startsFrom(begin time.Time, span time.Duration, n int) []int {
	counts := make([]int, n)
	for _, s := range w.receiver.starts() {
		if i := int(s.at.Sub(begin) / span); !s.at.Before(begin) && i < n {
			counts[i]++
		}
	}
	return counts
}

func TestANewReceiverIsMetInSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		synctest.Wait()
		w.receiver.set(always(100*time.Millisecond, ok))
		begin := time.Now()
		w.publishN(w.sub("orders", most(40)), 0, 1000)
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 1000})
		if got, want := w.startsFrom(begin, 100*time.Millisecond, 9), []int{1, 2, 4, 8, 16, 32, 40, 40, 40}; !slices.Equal(got, want) {
			t.Errorf("starts by round trip: %v, want %v", got, want)
		}
		if s := w.engine.Status(lane("orders")); s.Limit != 40 || s.LimitReason != "max_in_flight" {
			t.Errorf("status %+v", s)
		}
	})
}

// A receiver that takes eight at a time and answers all others with 429 or 503 is found out.
func TestAnOverloadedReceiverIsFoundOut(t *testing.T) {
	for _, code := range []int{429, 503} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				busy := 0
				w.receiver.set(func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
					w.receiver.mu.Lock()
					defer w.receiver.mu.Unlock()
					if w.receiver.now["orders"] > 8 {
						busy++
						return time.Millisecond, refused(code)
					}
					return 100 * time.Millisecond, ok()
				})
				sub := w.sub("orders", most(64))
				for range 600 {
					w.publishN(sub, 0, 10)
					time.Sleep(100 * time.Millisecond)
				}
				if n := len(w.receiver.starts()); n < 3000 || busy > n/5 {
					t.Errorf("%d attempts in a minute, %d of them in vain; the receiver takes 80 a second", n, busy)
				}
				if s := w.engine.Status(lane("orders")); s.Limit > 20 || !strings.Contains(s.LimitReason, "429 or 503") || s.Breaker != health.BreakerClosed {
					t.Errorf("status %+v", s)
				}
				time.Sleep(10 * time.Minute)
				wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 6000})
			})
		})
	}
}

func TestABreakerSparesReceiverAndDeliveries(t *testing.T) {
	for name, down := range map[string]func() (time.Duration, *delivery.Result){
		"refuses connections": func() (time.Duration, *delivery.Result) { return time.Millisecond, unreachable() },
		"hangs":               func() (time.Duration, *delivery.Result) { return 15 * time.Second, timedOut() },
		"answers 500":         func() (time.Duration, *delivery.Result) { return time.Millisecond, refused(500) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				registry := prometheus.NewRegistry()
				w := newWorld(t, func(o *dispatch.Options) { o.Registerer = registry })
				defer w.stop()
				w.receiver.set(func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) { return down() })
				later := func(s *subscription.Subscription) { s.Schedule = []time.Duration{time.Hour} }
				sub := w.sub("orders", most(16), later)
				ids := w.publishN(sub, 0, 3000)
				time.Sleep(2 * time.Minute)
				if n := len(w.receiver.starts()); n > 45 {
					t.Errorf("%d attempts in two minutes", n)
				}
				spent := len(w.receiver.starts())
				reads, jobs := w.journal.readCount()
				time.Sleep(50 * time.Minute)
				tried := w.receiver.starts()[spent:]
				for i := range tried[1:] {
					if gap := tried[i+1].at.Sub(tried[i].at); gap < time.Second || gap > 16*time.Minute {
						t.Errorf("two probes with %v between them", gap)
					}
				}
				if n := len(tried); n < 3 || n > 20 {
					t.Errorf("%d probes in 50 minutes", n)
				}
				if r, j := w.journal.readCount(); r-reads > 2*len(tried)+60 || j-jobs > 2*len(tried)+60 {
					t.Errorf("%d reads of %d jobs for %d probes", r-reads, j-jobs, len(tried))
				}
				s := w.engine.Status(lane("orders"))
				for s.Breaker == health.BreakerHalfOpen { // the probe is in flight
					time.Sleep(time.Second)
					s = w.engine.Status(lane("orders"))
				}
				if s.Open || s.Breaker != health.BreakerOpen || s.Limit != 1 || s.InFlight > 0 || s.Waiting > 0 || w.journal.EventBytes() > 0 ||
					!s.NextProbe.After(time.Now()) || !s.Until.Equal(s.NextProbe) || s.OldestDue < 50*time.Minute {
					t.Errorf("status %+v", s)
				}
				if why := w.engine.WaitReason(ids[2999], lane("orders")); !strings.HasPrefix(why, "breaker open since "+s.BreakerSince.UTC().Format(time.RFC3339)) ||
					!strings.HasSuffix(why, ", next probe "+s.NextProbe.UTC().Format(time.RFC3339)) {
					t.Errorf("the last one waits because: %s", why)
				}
				if total, per := w.engine.Stats(acme(), time.Minute, 5); total.Breakers != 1 || len(per) != 1 || per[0].Breakers != 1 {
					t.Errorf("stats %+v, %+v", total, per)
				}
				m := gather(t, registry)
				if m["grapnel_breakers,open"] != 1 || m["grapnel_breaker_opened_total"] != 1 || m["grapnel_breaker_probes_total,failed"] < 3 {
					t.Errorf("metrics %v", m)
				}
				// It is well again: the next probe finds out, and slow start follows.
				w.receiver.set(always(50*time.Millisecond, ok))
				time.Sleep(time.Until(s.NextProbe) - time.Nanosecond)
				if starts := w.receiver.starts(); time.Since(starts[len(starts)-1].at) < time.Second {
					t.Errorf("an attempt %v before the time of the probe", time.Since(starts[len(starts)-1].at))
				}
				begin := time.Now()
				time.Sleep(time.Minute)
				if got := w.startsFrom(begin, 50*time.Millisecond, 5); !slices.Equal(got, []int{1, 2, 4, 8, 16}) {
					t.Errorf("starts by round trip from the probe on: %v", got)
				}
				if s := w.engine.Status(lane("orders")); !s.Open || s.Breaker != health.BreakerClosed || !s.FailingSince.IsZero() {
					t.Errorf("afterwards %+v", s)
				}
				time.Sleep(2 * time.Hour)
				wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 3000})
				for _, id := range ids[100:] {
					if n := len(w.journal.get(id).attempts); n != 1 {
						t.Fatalf("%d attempts of one that waited meanwhile", n)
					}
				}
				wantOrder(t, w.receiver.starts())
			})
		})
	}
}

func TestProbesOfManyAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		w.receiver.set(always(time.Millisecond, unreachable))
		const lanes = 400
		for i := range lanes {
			w.publishN(w.sub(fmt.Sprint("s", i), most(16)), uint16(i%16), 20)
		}
		time.Sleep(100 * time.Millisecond)
		begin := time.Now()
		time.Sleep(time.Minute)
		counts := w.startsFrom(begin.Add(20*time.Second), time.Second, 30)
		if slices.Max(counts) > 60 || slices.Min(counts) == 0 {
			t.Errorf("probes of %d lanes by second: %v", lanes, counts)
		}
		_ = w.kill()
	})
}

func TestDeliveriesExpireBehindAnOpenBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(time.Millisecond, unreachable))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxAge, s.MaxAttempts = 10*time.Minute, 100 })
		ids := w.publishN(sub, 0, 2000)
		time.Sleep(9 * time.Minute)
		if n := w.journal.count(func(r *record) bool { return r.state.Final() && len(r.attempts) == 0 }); n > 0 {
			t.Errorf("%d have ended early", n)
		}
		time.Sleep(5 * time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Exhausted: 2000})
		if r := w.journal.get(ids[1999]); r.reason != "max_age" || len(r.attempts) != 0 {
			t.Errorf("expired with %q and %d attempts", r.reason, len(r.attempts))
		}
		if reads, _ := w.journal.readCount(); reads > 200 {
			t.Errorf("%d reads", reads)
		}
	})
}

func TestWhoRetriesOrResumesHasTheBreakerHalfOpen(t *testing.T) {
	for name, open := range map[string]func(w *world, id delivery.ID){
		"retry": func(w *world, id delivery.ID) {
			if _, err := w.engine.Retry(w.t.Context(), id, lane("orders"), -1); err != nil {
				w.t.Error(err)
			}
		},
		"resume": func(w *world, _ delivery.ID) { w.engine.Open(lane("orders")) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				w.receiver.set(always(time.Millisecond, unreachable))
				sub := w.sub("orders", most(16))
				ids := w.publishN(sub, 0, 100)
				time.Sleep(time.Hour)
				if held := w.engine.HeldBy(lane("orders")); !strings.Contains(held, "breaker open since") || !strings.Contains(held, "next probe") {
					t.Errorf("held by %q", held)
				}
				n := len(w.receiver.starts())
				open(w, ids[0])
				time.Sleep(500 * time.Millisecond)
				if got := len(w.receiver.starts()) - n; got != 1 {
					t.Errorf("%d attempts at once, want the probe", got)
				}
				if s := w.engine.Status(lane("orders")); s.Breaker != health.BreakerOpen || time.Until(s.NextProbe) > 5*time.Second {
					t.Errorf("after a probe that somebody asked for the next one is in %v", time.Until(s.NextProbe))
				}
				w.receiver.set(always(time.Millisecond, ok))
				open(w, ids[1])
				time.Sleep(time.Second)
				if held := w.engine.HeldBy(lane("orders")); held != "" {
					t.Errorf("still held by %q", held)
				}
				time.Sleep(24 * time.Hour)
				wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 100})
			})
		})
	}
}

func TestANewTargetHasNoBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(15*time.Second, timedOut))
		sub := w.sub("orders", most(16))
		w.publishN(sub, 0, 50)
		time.Sleep(time.Hour)
		if s := w.engine.Status(lane("orders")); s.Breaker == health.BreakerClosed {
			t.Errorf("status %+v", s)
		}
		w.receiver.set(always(time.Millisecond, ok))
		w.sub("orders", most(16), func(s *subscription.Subscription) { s.Proto().Uri = "https://two.example" })
		time.Sleep(time.Second)
		if s := w.engine.Status(lane("orders")); !s.Open || s.Breaker != health.BreakerClosed || !s.FailingSince.IsZero() {
			t.Errorf("status %+v", s)
		}
		time.Sleep(12 * time.Hour)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 50})
	})
}

func TestPluginsOpenNoBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.receiver.set(always(time.Millisecond, func() *delivery.Result {
			return &delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomePluginError}, Cause: delivery.CausePlugin}
		}))
		w.publishN(w.sub("orders", most(16)), 0, 500)
		time.Sleep(time.Minute)
		s := w.engine.Status(lane("orders"))
		if n := len(w.receiver.starts()); n < 500 || s.Breaker != health.BreakerClosed || !s.FailingSince.IsZero() {
			t.Errorf("%d attempts, status %+v", n, s)
		}
	})
}

// While first attempts wait, a fifth of what starts are repeats. Once none does, all repeats have their turn.
func TestRepeatsAreAFifth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		n := 0
		w.receiver.set(func(_ *subscription.Subscription, job *delivery.Job) (time.Duration, *delivery.Result) {
			w.receiver.mu.Lock()
			defer w.receiver.mu.Unlock()
			if n++; job.Attempts == 0 && n%3 == 0 {
				return 20 * time.Millisecond, refused(500)
			}
			return 20 * time.Millisecond, ok()
		})
		sub := w.sub("orders", most(16), func(s *subscription.Subscription) { s.Schedule = []time.Duration{time.Second} })
		w.publishN(sub, 0, 30_000)
		begin := time.Now()
		firsts, repeats := 0, 0
		first := make(map[delivery.ID]bool)
		time.Sleep(10 * time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 30_000})
		for _, s := range w.receiver.starts() {
			if first[s.id] {
				repeats++
			} else {
				first[s.id], firsts = true, firsts+1
			}
			if firsts < 30_000 && repeats > firsts/4+10 {
				t.Fatalf("%d repeats beside %d first attempts", repeats, firsts)
			}
			if firsts == 29_999 && s.at.Sub(begin) > 20*time.Second && repeats < firsts/5 {
				t.Errorf("%d repeats beside %d first attempts", repeats, firsts)
			}
		}
		if repeats < 9_000 {
			t.Errorf("%d repeats", repeats)
		}
	})
}

func TestOneThatFailedBeforeARestartIsMetWithOneAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
		sub := w.sub("orders", most(16))
		w.publishN(sub, 0, 10)
		time.Sleep(time.Second)
		w.stop()
		w.receiver.set(always(time.Second, ok))
		w.start()
		synctest.Wait()
		begin := time.Now()
		w.publishN(sub, 0, 100)
		time.Sleep(10 * time.Second)
		if got := w.startsFrom(begin, time.Second, 4); !slices.Equal(got, []int{1, 2, 4, 8}) {
			t.Errorf("starts by round trip: %v", got)
		}
		time.Sleep(time.Hour)
		w.stop()
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 110})
	})
}

func TestDisablingIsAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		w := newWorld(t, func(o *dispatch.Options) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		defer w.stop()
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.DisableAfter, s.MaxAge = 10*time.Hour, 100*time.Hour })
		begin := time.Now()
		for range 8 * 6 {
			w.publish(sub, 0)
			time.Sleep(10 * time.Minute)
		}
		if s := w.engine.Status(lane("orders")); s.Disable.Sub(begin).Round(time.Second) != 10*time.Hour {
			t.Errorf("to be disabled at %v, it began to fail at %v", s.Disable, begin)
		}
		if n := strings.Count(log.String(), "is disabled"); n != 1 || !strings.Contains(log.String(), "subscription_id=orders") {
			t.Errorf("warned %d times: %s", n, &log)
		}
		for range 3 * 6 {
			w.publish(sub, 0)
			time.Sleep(10 * time.Minute)
		}
		if len(w.wasDisabled()) != 1 {
			t.Errorf("disabled %v", w.wasDisabled())
		}
	})
}

// No second holds more than max_rate starts, whatever comes and goes, and a backlog goes out at that rate.
func TestMaxRateHoldsInEverySecond(t *testing.T) {
	for _, limit := range []float64{0.5, 1, 2.5, 3, 7, 10, 11, 33.3, 100, 999, 5000} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			if testing.Short() && limit > 100 {
				t.Skip("takes long")
			}
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(uint64(limit*10), 1))
				w := newWorld(t)
				defer w.stop()
				w.receiver.set(always(3*time.Millisecond, ok))
				rated := func(s *subscription.Subscription) { s.MaxRate = limit }
				sub := w.sub("orders", most(1000), rated)
				for range 12 { // bursts with rests between them
					w.publishN(sub, uint16(rnd.IntN(4)), 1+rnd.IntN(int(limit)+2))
					time.Sleep(time.Duration(rnd.IntN(1500)) * time.Millisecond)
				}
				time.Sleep(20 * time.Second)
				begin := time.Now()
				const seconds = 10
				w.publishN(sub, 0, int(limit*seconds)+1)
				time.Sleep(seconds * time.Second)
				sustained := 0
				starts := w.receiver.starts()
				slices.SortFunc(starts, func(a, b start) int { return a.at.Compare(b.at) })
				first := 0
				for i, s := range starts {
					for starts[first].at.Add(time.Second).Compare(s.at) <= 0 {
						first++
					}
					if n := i + 1 - first; n > int(math.Ceil(limit)) {
						t.Fatalf("%d starts within the second before %v", n, s.at)
					}
					if !s.at.Before(begin) {
						sustained++
					}
				}
				if want := int(limit * seconds); sustained < want*97/100 {
					t.Errorf("%d starts of a backlog in %d s, want %d", sustained, seconds, want)
				}
				together := 0
				for i := range starts {
					n := 0
					for _, s := range starts[i:] {
						if s.at.Sub(starts[i].at) > 0 {
							break
						}
						n++
					}
					together = max(together, n)
				}
				if want := max(1, int(math.Ceil(limit/10))); together > want {
					t.Errorf("%d starts together, want at most %d", together, want)
				}
				time.Sleep(cmp.Or(time.Duration(float64(2*time.Minute)/limit), time.Minute))
			})
		})
	}
}

// What the budget holds back holds back no first attempt behind it, and says what it waits for.
func TestARepeatThatIsHeldBackIsInNobodysWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		synctest.Wait()
		w.receiver.set(func(_ *subscription.Subscription, job *delivery.Job) (time.Duration, *delivery.Result) {
			if len(job.Event.Payload) == 1024 && job.Attempts == 0 {
				return 10 * time.Millisecond, refused(422)
			}
			return 2 * time.Second, ok()
		})
		sub := w.sub("orders", most(20), func(s *subscription.Subscription) { s.Schedule = []time.Duration{10 * time.Second} })
		w.publishN(sub, 0, 120)
		begin := time.Now()
		var later []delivery.ID
		for i := range 10 {
			later = append(later, w.journal.add(0, 100, begin.Add(time.Duration(20+i)*time.Second), sub)...)
		}
		time.Sleep(19 * time.Second)
		held := 0
		for id := range w.journal.records {
			if why := w.engine.WaitReason(id, lane("orders")); strings.Contains(why, "budget for repeats") {
				held++
			}
		}
		if held < 60 {
			t.Errorf("%d say that they wait for the budget", held)
		}
		time.Sleep(30 * time.Second)
		for i, id := range later {
			for _, s := range w.receiver.starts() {
				if late := s.at.Sub(begin.Add(time.Duration(20+i) * time.Second)); s.id == id && late > time.Second {
					t.Errorf("a first attempt waited for %v", late)
				}
			}
			if len(w.journal.get(id).attempts) == 0 {
				t.Errorf("%v was not tried", id)
			}
		}
		time.Sleep(10 * time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 130})
	})
}
