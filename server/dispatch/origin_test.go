package dispatch_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/subscription"
)

type answer = func(sub *subscription.Subscription, job *delivery.Job) (time.Duration, *delivery.Result)

// shared has a subscription share its host with others.
func shared(s *subscription.Subscription) {
	most(16)(s)
	on("one.example")(s)
	s.Schedule = []time.Duration{5 * time.Second}
}

// attemptsTo counts the attempts by subscription whose ID has a prefix.
func (w *world) attemptsTo(prefix string) map[string]int {
	n := make(map[string]int)
	for _, s := range w.receiver.starts() {
		if strings.HasPrefix(s.sub, prefix) {
			n[s.sub]++
		}
	}
	return n
}

func total(counts map[string]int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

// A host that is down for 500 subscriptions is learnt once: few attempts, then one at a time looks whether it is back, and
// then they come back step by step.
func TestAHostIsLearntOnce(t *testing.T) {
	for name, tt := range map[string]struct {
		down answer
		// first is how many attempts may be made in the first minute.
		first  int
		spaces int
	}{
		"refuses":                  {always(time.Millisecond, unreachable), 30, 1},
		"hangs":                    {always(15*time.Second, timedOut), 60, 1},
		"refuses 500 namespaces":   {always(time.Millisecond, unreachable), 30, 500},
		"hangs for 500 namespaces": {always(15*time.Second, timedOut), 60, 500},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				registry := prometheus.NewRegistry()
				w := newWorld(t, func(o *dispatch.Options) { o.Registerer = registry })
				defer w.stop()
				synctest.Wait()
				w.receiver.set(tt.down)
				const lanes = 500
				var ids []delivery.ID
				var subs []*subscription.Subscription
				for i := range lanes {
					s := w.sub(fmt.Sprint("s", i), shared, inNamespace(fmt.Sprint("ns", i%tt.spaces)))
					subs = append(subs, s)
					ids = append(ids, w.publishN(s, uint16(i%16), 20)...)
				}
				time.Sleep(time.Minute)
				made := w.attemptsTo("s")
				t.Logf("%d attempts by %d of %d lanes in the first minute", total(made), len(made), lanes)
				if n := total(made); n > tt.first || n < 5 {
					t.Errorf("%d attempts in the first minute, by %d lanes", n, len(made))
				}
				time.Sleep(9 * time.Minute)
				if n := total(w.attemptsTo("s")) - total(made); n > 60 || n < 10 {
					t.Errorf("%d probes in nine minutes", n)
				}
				m := gather(t, registry)
				if m["grapnel_hosts,open"]+m["grapnel_hosts,half_open"] != 1 || m["grapnel_hosts_down_total"] != 1 {
					t.Errorf("metrics %v", m)
				}
				waiting := 0
				for _, s := range subs {
					if st := w.engine.Status(laneOf(s)); !st.HostDown.IsZero() {
						waiting++
						if st.Open || !strings.HasPrefix(st.Reason, "host down since "+st.HostDown.UTC().Format(time.RFC3339)+" (https://one.example:443: ") {
							t.Fatalf("status %+v", st)
						}
					}
				}
				if total, _ := w.engine.Stats(0, time.Minute, 0); waiting < lanes*9/10 || total.HostsDown != int64(waiting) {
					t.Errorf("%d wait for the host by their status, %d in the statistics", waiting, total.HostsDown)
				}
				if w.journal.EventBytes() > 1<<20 {
					t.Errorf("%d bytes are in memory for those that wait", w.journal.EventBytes())
				}
				back := time.Now()
				w.receiver.set(always(20*time.Millisecond, ok))
				time.Sleep(2 * time.Minute)
				wantStates(t, w, map[delivery.State]int{delivery.Succeeded: len(ids)})
				var starts []start
				for _, s := range w.receiver.starts() {
					if s.at.After(back) {
						starts = append(starts, s)
					}
				}
				counts := w.startsFrom(starts[0].at, 20*time.Millisecond, 6)
				if counts[0] > 2 || counts[1] > 6 || counts[2] > 20 {
					t.Errorf("starts by round trip when it was up again: %v", counts)
				}
				if last := starts[len(starts)-1].at.Sub(starts[0].at); last > 30*time.Second {
					t.Errorf("all were delivered %v after the first", last)
				}
				if m := gather(t, registry); m["grapnel_hosts,up"] > 1 || m["grapnel_hosts,open"]+m["grapnel_hosts,half_open"] > 0 {
					t.Errorf("metrics afterwards %v", m)
				}
			})
		})
	}
}

// One namespace points many subscriptions at paths that hang of a host where others have theirs: who is answered there goes
// on, whoever comes is heard at once.
func TestATenantClosesNoHostForOthers(t *testing.T) {
	for _, quiet := range []bool{false, true} {
		t.Run(fmt.Sprintf("quiet=%v", quiet), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				synctest.Wait()
				w.receiver.set(hanging(time.Millisecond))
				well := w.sub("well", shared, inNamespace("other"))
				w.publish(well, 0)
				time.Sleep(time.Second)
				for i := range 300 {
					w.publishN(w.sub(fmt.Sprint("hangs", i), shared), uint16(i%16), 50)
				}
				wait := time.Second
				if quiet { // so much that nobody is answered for long
					wait = 10 * time.Minute
				}
				for i := range 10 {
					time.Sleep(wait)
					w.publish(well, 0)
					w.publish(w.sub(fmt.Sprint("well-new", i), shared, inNamespace(fmt.Sprint("new", i))), 0)
				}
				time.Sleep(time.Second)
				n := 0
				for _, s := range w.receiver.starts() {
					if strings.HasPrefix(s.sub, "well") {
						if n++; s.at.Sub(s.accept) > 10*time.Millisecond {
							t.Errorf("%s waited for %v", s.sub, s.at.Sub(s.accept))
						}
					}
				}
				if n != 21 {
					t.Errorf("%d of 21 were tried", n)
				}
				_ = w.kill()
			})
		})
	}
}

// Among the many of one namespace on a host, most of which hang, one that is well is found.
func TestOneThatIsWellIsFoundOnAHostWhereManyHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		w.receiver.set(hanging(time.Millisecond))
		for i := range 50 {
			w.publishN(w.sub(fmt.Sprint("hangs", i), shared), uint16(i%16), 50)
		}
		well := w.sub("well", shared)
		w.publish(well, 0)
		time.Sleep(30 * time.Minute)
		if len(w.attemptsTo("well")) != 1 {
			t.Error("it was not tried in half an hour")
		}
		begin := time.Now()
		for range 20 {
			time.Sleep(10 * time.Minute)
			w.publish(well, 0)
		}
		time.Sleep(time.Second)
		for _, s := range w.receiver.starts() {
			if s.sub == "well" && s.at.After(begin) && s.at.Sub(s.accept) > 10*time.Millisecond {
				t.Errorf("it waited for %v, and had been answered before", s.at.Sub(s.accept))
			}
		}
		_ = w.kill()
	})
}

// Who is called to look whether the host is back, and is then paused, deleted, pointed elsewhere or has nothing to send,
// keeps nobody waiting.
func TestWhoeverIsCalledKeepsNobodyWaiting(t *testing.T) {
	for name, leave := range map[string]func(w *world, id string){
		"paused": func(w *world, id string) {
			w.sub(id, shared, inState(grapnelv1.Subscription_STATE_PAUSED))
		},
		"deleted":   func(w *world, id string) { w.remove(id, true) },
		"absent":    func(w *world, id string) { w.remove(id, false) },
		"elsewhere": func(w *world, id string) { w.sub(id, most(16), on("two.example")) },
		"cancelled": func(w *world, id string) {
			if _, err := w.engine.CancelLane(w.t.Context(), lane(id), "asked for", nil); err != nil {
				w.t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				synctest.Wait()
				down := true
				w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
					w.receiver.mu.Lock()
					defer w.receiver.mu.Unlock()
					if down {
						return time.Second, unreachable()
					}
					return time.Millisecond, ok()
				})
				const lanes = 40
				for i := range lanes {
					w.publishN(w.sub(fmt.Sprint("s", i), shared), uint16(i%16), 5)
				}
				time.Sleep(time.Minute)
				// All but one leave, those who have a probe in flight too, at any moment of the wait.
				for i := range lanes - 1 {
					leave(w, fmt.Sprint("s", i))
					time.Sleep(397 * time.Millisecond)
				}
				before := w.attemptsTo(fmt.Sprint("s", lanes-1))
				time.Sleep(3 * time.Minute)
				if n := total(w.attemptsTo(fmt.Sprint("s", lanes-1))) - total(before); n < 4 {
					t.Errorf("%d probes by the one that is left in three minutes", n)
				}
				w.receiver.mu.Lock()
				down = false
				w.receiver.mu.Unlock()
				time.Sleep(time.Minute)
				if n := w.journal.OpenOf(lane(fmt.Sprint("s", lanes-1))); n != 0 {
					t.Errorf("%d of the one that is left are open a minute after the host was back", n)
				}
				_ = w.kill()
			})
		})
	}
}

// What one transport does not reach, another may: through another proxy, with another certificate.
func TestAHostIsOneOfATransport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			if strings.HasPrefix(sub.ID, "proxy") {
				return time.Millisecond, unreachable()
			}
			return time.Millisecond, ok()
		})
		proxied := func(s *subscription.Subscription) {
			config, err := structpb.NewStruct(map[string]any{"proxy": map[string]any{"url": "http://broken.example"}})
			if err != nil {
				t.Fatal(err)
			}
			s.Proto().Transport = &grapnelv1.PluginBinding{Plugin: "http", Config: config}
		}
		for i := range 20 {
			w.publishN(w.sub(fmt.Sprint("proxy", i), shared, proxied), 0, 5)
		}
		time.Sleep(time.Minute)
		for i := range 20 {
			w.publish(w.sub(fmt.Sprint("direct", i), shared), 0)
		}
		time.Sleep(100 * time.Millisecond)
		if n := len(w.attemptsTo("direct")); n != 20 {
			t.Errorf("%d of 20 were tried", n)
		}
		if s := w.engine.Status(lane("proxy0")); s.HostDown.IsZero() {
			t.Errorf("behind the proxy that is broken: %+v", s)
		}
		_ = w.kill()
	})
}

func TestWhoRetriesOrResumesLooksAtTheHostAtOnce(t *testing.T) {
	for name, open := range map[string]func(w *world, id delivery.ID){
		"retry": func(w *world, id delivery.ID) {
			if _, err := w.engine.Retry(w.t.Context(), id, lane("s7"), -1); err != nil {
				w.t.Error(err)
			}
		},
		"resume": func(w *world, _ delivery.ID) {
			w.sub("s7", shared, inState(grapnelv1.Subscription_STATE_PAUSED))
			w.sub("s7", shared)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				synctest.Wait()
				w.receiver.set(always(time.Millisecond, unreachable))
				var ids []delivery.ID
				for i := range 20 {
					ids = append(ids, w.publishN(w.sub(fmt.Sprint("s", i), shared), uint16(i%16), 5)...)
				}
				time.Sleep(10 * time.Minute)
				for { // the next probe is some time away
					if s := w.engine.Status(lane("s7")); time.Until(s.HostProbe) > 5*time.Second {
						break
					}
					time.Sleep(time.Second)
				}
				if held := w.engine.HeldBy(lane("s7")); !strings.HasPrefix(held, "host down since ") || !strings.Contains(held, ", next probe ") {
					t.Errorf("held by %q", held)
				}
				w.receiver.set(always(time.Millisecond, ok))
				before := len(w.receiver.starts())
				open(w, ids[7*5+4])
				time.Sleep(100 * time.Millisecond)
				tried := w.receiver.starts()[before:]
				if len(tried) == 0 || tried[0].sub != "s7" {
					t.Fatalf("%d attempts within 100 ms, of which the first: %+v", len(tried), tried[:min(1, len(tried))])
				}
				time.Sleep(time.Minute)
				wantStates(t, w, map[delivery.State]int{delivery.Succeeded: len(ids)})
			})
		})
	}
}

// A stranger who names very many hosts makes an origin for each lane, which goes with it.
func TestOriginsGoWithTheirLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		registry := prometheus.NewRegistry()
		w := newWorld(t, func(o *dispatch.Options) { o.Registerer = registry })
		defer w.stop()
		synctest.Wait()
		hosts := func() float64 { return gather(t, registry)["grapnel_hosts,up"] }
		for i := range 300 {
			s := w.sub(fmt.Sprint("s", i), most(16))
			w.publish(s, 0)
			time.Sleep(20 * time.Millisecond)
			w.sub(s.ID, most(16), on(fmt.Sprint("other", i))) // another target is on another host
			w.publish(s, 0)
		}
		if n := hosts(); n != 300 {
			t.Errorf("%v hosts of 300 lanes", n)
		}
		time.Sleep(time.Minute)
		if n := hosts(); n != 0 {
			t.Errorf("%v hosts, and nothing is open", n)
		}
	})
}

// One path of a host hangs, another answers: that is between each lane and its receiver.
func TestAPathThatHangsClosesNoHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			if strings.HasPrefix(sub.ID, "hangs") {
				return 15 * time.Second, timedOut()
			}
			return time.Millisecond, refused(500)
		})
		fails := w.sub("answers", shared, func(s *subscription.Subscription) { s.Schedule = []time.Duration{time.Second} })
		w.publishN(fails, 0, 1000)
		for i := range 10 {
			w.publishN(w.sub(fmt.Sprint("hangs", i), shared), 0, 50)
		}
		for range 60 {
			time.Sleep(10 * time.Second)
			for i := range 10 {
				if s := w.engine.Status(lane(fmt.Sprint("hangs", i))); !s.HostDown.IsZero() && w.recent("answers") {
					t.Fatalf("down although it answers: %+v", s)
				}
			}
		}
		if s := w.engine.Status(lane("hangs3")); s.Breaker == health.BreakerClosed {
			t.Errorf("the breaker of one that hangs: %+v", s)
		}
		_ = w.kill()
	})
}

// When the host is back, and the path of one is not, that one's breaker is its own matter again.
func TestOneWhosePathStaysDownGoesBackToItsBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		down := true
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			w.receiver.mu.Lock()
			defer w.receiver.mu.Unlock()
			if down || sub.ID == "stays" {
				return time.Second, timedOut()
			}
			return time.Millisecond, ok()
		})
		w.publishN(w.sub("stays", shared), 0, 50)
		time.Sleep(time.Minute) // its own breaker is open
		for i := range 20 {
			w.publishN(w.sub(fmt.Sprint("s", i), shared), uint16(i%16), 5)
		}
		time.Sleep(10 * time.Minute)
		w.receiver.mu.Lock()
		down = false
		w.receiver.mu.Unlock()
		time.Sleep(10 * time.Minute)
		if n := len(w.attemptsTo("s")); n != 21 {
			t.Errorf("%d of 21 were tried", n)
		}
		before := total(w.attemptsTo("stays"))
		for range 60 { // others are busy there
			time.Sleep(time.Minute)
			for i := range 20 {
				w.publish(w.sub(fmt.Sprint("s", i), shared), uint16(i%16))
			}
			w.publish(w.sub("stays", shared), 0)
		}
		if n := total(w.attemptsTo("stays")) - before; n > 30 {
			t.Errorf("%d attempts in an hour by one whose path hangs", n)
		}
		_ = w.kill()
	})
}

// recent reports whether a subscription had an attempt in the last ten seconds.
func (w *world) recent(sub string) bool {
	starts := w.receiver.starts()
	slices.Reverse(starts)
	for _, s := range starts {
		if s.sub == sub {
			return time.Since(s.at) < 10*time.Second
		}
	}
	return false
}

// A host is looked at again although nobody waited for it when that was due, because nothing was due to anybody.
func TestAHostIsLookedAtByWhoeverComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		synctest.Wait()
		w.receiver.set(always(time.Millisecond, unreachable))
		seldom := func(s *subscription.Subscription) { s.Schedule = []time.Duration{5 * time.Minute} }
		for i := range 5 {
			w.publish(w.sub(fmt.Sprint("s", i), shared, seldom), 0)
		}
		time.Sleep(time.Minute)
		w.receiver.set(always(time.Millisecond, ok))
		w.publish(w.sub("s0", shared, seldom), 0)
		w.publish(w.sub("new", shared, seldom), 0)
		time.Sleep(time.Second)
		if n := w.journal.OpenOf(lane("new")); n != 0 {
			t.Error("one that came later was not tried")
		}
		time.Sleep(10 * time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 7})
	})
}

// Who would gather company looks at the host all the same: what it has gathered is not kept while the host is down.
func TestThoseThatGatherLookAtTheirHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		synctest.Wait()
		w.receiver.set(always(time.Millisecond, unreachable))
		for i := range 10 {
			w.publishN(w.sub(fmt.Sprint("s", i), shared, batching(100, 10*time.Second)), 0, 3)
		}
		time.Sleep(2 * time.Minute)
		if s := w.engine.Status(lane("s0")); s.HostDown.IsZero() {
			t.Errorf("status %+v", s)
		}
		w.receiver.set(always(time.Millisecond, ok))
		time.Sleep(time.Minute)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: 30})
	})
}

// Whose plugin is busy with others has no turn at its host that it could not use, and does not ask for one again and again.
func TestWhoWaitsForItsPluginAsksNotForItsHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.Window = func(*subscription.Subscription) int { return 8 } })
		synctest.Wait()
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			if strings.HasPrefix(sub.ID, "s") {
				return 15 * time.Second, timedOut()
			}
			return 10 * time.Minute, timedOut()
		})
		for i := range 5 {
			for p := range 3 {
				w.publishN(w.sub(fmt.Sprint("s", i), shared), uint16(p), 5)
			}
		}
		time.Sleep(time.Minute)
		for i := range 10 {
			w.publish(w.sub(fmt.Sprint("hangs", i), most(16)), 0)
		}
		time.Sleep(time.Minute)
		before, _ := w.journal.readCount()
		time.Sleep(5 * time.Minute)
		if after, _ := w.journal.readCount(); after-before > 5*5*60 {
			t.Errorf("%d reads in five minutes in which nothing could start", after-before)
		}
		w.receiver.set(always(time.Millisecond, ok))
		time.Sleep(10 * time.Minute)
		for i := range 5 {
			if n := w.journal.OpenOf(lane(fmt.Sprint("s", i))); n != 0 {
				t.Errorf("%d of s%d are open", n, i)
			}
		}
		_ = w.kill()
	})
}

// Those whose deliveries have all been cancelled are passed over at once.
func TestWhoHasNothingLeftKeepsNobodyWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		w.receiver.set(always(time.Millisecond, unreachable))
		const lanes = 40
		for i := range lanes {
			w.publishN(w.sub(fmt.Sprint("s", i), shared), uint16(i%16), 5)
		}
		time.Sleep(time.Minute)
		probe := w.engine.Status(lane("s39")).HostProbe
		time.Sleep(time.Until(probe) - time.Second)
		w.receiver.set(always(time.Millisecond, ok))
		for i := range lanes - 1 {
			if _, err := w.engine.CancelLane(t.Context(), lane(fmt.Sprint("s", i)), "asked for", nil); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(1500 * time.Millisecond)
		if n := len(w.attemptsTo("s39")); n == 0 {
			t.Error("the one that is left has not looked half a second after the probe was due")
		}
		_ = w.kill()
	})
}

// Newcomers that are well have their first delivery soon on a host that has answered nobody, although many that hang wait
// before them for the few attempts that go there.
func TestANewcomerIsNotQueuedBehindThoseThatHangOnItsHost(t *testing.T) {
	for name, tt := range map[string]struct {
		hanging, spaces int
		// news are how many newcomers come at once, to a namespace of their own or not.
		news  int
		apart bool
	}{
		"a new host":                    {hanging: 50, spaces: 1, news: 1},
		"a new host, many apart":        {hanging: 50, spaces: 1, news: 20, apart: true},
		"a new host of many namespaces": {hanging: 100, spaces: 100, news: 1, apart: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				synctest.Wait()
				w.receiver.set(hanging(50 * time.Millisecond))
				for i := range tt.hanging {
					w.publishN(w.sub(fmt.Sprint("hangs", i), shared, inNamespace(fmt.Sprint("ns", i%tt.spaces))), uint16(i%16), 5)
				}
				time.Sleep(5 * time.Second)
				space := "ns0"
				if tt.apart {
					space = "apart"
				}
				for i := range tt.news {
					w.publish(w.sub(fmt.Sprint("new", i), shared, inNamespace(space)), 0)
				}
				time.Sleep(9 * time.Second)
				n := 0
				var longest time.Duration
				for _, s := range w.receiver.starts() {
					if strings.HasPrefix(s.sub, "new") {
						n++
						longest = max(longest, s.at.Sub(s.accept))
					}
				}
				if n != tt.news || longest > 1500*time.Millisecond {
					t.Errorf("%d of %d were tried, after up to %v", n, tt.news, longest)
				}
				_ = w.kill()
			})
		})
	}
}

// While a host is down for one namespace, whose lanes wait for its probe, the lanes of another do not wait behind them, also
// where one of that hangs, too.
func TestThoseOfOneNamespaceDoNotWaitBehindAnothersProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		w.receiver.set(hanging(50 * time.Millisecond))
		for i := range 50 {
			w.publishN(w.sub(fmt.Sprint("hangs", i), shared), uint16(i%16), 50)
		}
		time.Sleep(5 * time.Minute)
		for i := range 10 {
			time.Sleep(9 * time.Second)
			apart := inNamespace(fmt.Sprint("apart", i))
			w.publish(w.sub(fmt.Sprint("hangs-too", i), shared, apart), 0)
			time.Sleep(time.Second)
			w.publish(w.sub(fmt.Sprint("new", i), shared, apart), 0)
		}
		time.Sleep(30 * time.Second)
		n := 0
		for _, s := range w.receiver.starts() {
			if strings.HasPrefix(s.sub, "new") {
				n++
				if wait := s.at.Sub(s.accept); wait > 3*time.Second {
					t.Errorf("%s waited for %v", s.sub, wait)
				}
			}
		}
		if n != 10 {
			t.Errorf("%d of 10 were tried", n)
		}
		_ = w.kill()
	})
}

// A receiver that has been failing for so long that its own breaker looks again in minutes only does not wait for that once
// others share what is found out about its host.
func TestALaneThatFailedAloneComesBackWithItsHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		synctest.Wait()
		w.receiver.set(always(time.Millisecond, unreachable))
		alone := w.sub("alone", shared)
		ids := w.publishN(alone, 1, 5)
		time.Sleep(6 * time.Hour)
		for until := time.Now().Add(time.Hour); time.Until(w.engine.Status(laneOf(alone)).NextProbe) < 5*time.Minute; {
			if time.Now().After(until) {
				t.Fatal("its own breaker looks again within 5 minutes every time")
			}
			time.Sleep(10 * time.Second)
		}
		others := w.sub("others", shared)
		ids = append(ids, w.publishN(others, 2, 20)...)
		time.Sleep(30 * time.Second)
		w.receiver.set(always(20*time.Millisecond, ok))
		time.Sleep(45 * time.Second)
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: len(ids)})
	})
}
