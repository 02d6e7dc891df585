package dispatch_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// neighbourhood is a number of receivers that hang beside others that are well.
type neighbourhood struct {
	hanging, healthy int
	// backlog is how many events each of those that hang gets at once; then they get one a second.
	backlog int
	// wellUntil is how long those that hang answer at first.
	wellUntil time.Duration
	// apart: the healthy ones have a namespace each.
	apart   bool
	options func(*dispatch.Options)
	// mostSlow is how many attempts may hang at once; 0 means half of the slots and an eighth.
	mostSlow int
}

func TestHangingReceiversAreNotFelt(t *testing.T) {
	small := func(o *dispatch.Options) { o.WindowBytes = 4 << 20 }
	for name, n := range map[string]neighbourhood{
		"none":                          {healthy: 1000},
		"200":                           {hanging: 200, healthy: 1000, backlog: 40},
		"1000":                          {hanging: 1000, healthy: 1000, backlog: 40},
		"2400":                          {hanging: 2400, healthy: 500, backlog: 4},
		"200 that were well":            {hanging: 200, healthy: 1000, backlog: 5, wellUntil: 3 * time.Second},
		"1000 that were well":           {hanging: 1000, healthy: 1000, backlog: 5, wellUntil: 3 * time.Second, mostSlow: 4000},
		"1000 with little memory":       {hanging: 1000, healthy: 200, backlog: 40, options: small},
		"5000 in another namespace":     {hanging: 5000, healthy: 100, backlog: 2, apart: true},
		"1000, and few slots for all":   {hanging: 1000, healthy: 100, backlog: 4, options: func(o *dispatch.Options) { o.Slots = 256 }, apart: true},
		"with little memory, well once": {hanging: 500, healthy: 200, backlog: 40, wellUntil: 3 * time.Second, options: small},
	} {
		t.Run(name, func(t *testing.T) {
			if testing.Short() && n.hanging+n.healthy > 700 {
				t.Skip("takes long")
			}
			synctest.Test(t, func(t *testing.T) { n.run(t) })
		})
	}
}

func (n neighbourhood) run(t *testing.T) {
	w := newWorld(t, func(o *dispatch.Options) {
		if n.options != nil {
			n.options(o)
		}
	})
	synctest.Wait()
	begin := time.Now()
	w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
		if sub.ID[0] == 'h' && time.Since(begin) >= n.wellUntil {
			return 15 * time.Second, timedOut()
		}
		return 2 * time.Millisecond, ok()
	})
	usual := func(s *subscription.Subscription) { s.MaxInFlight, s.MaxAttempts, s.MaxAge = 16, 10, 100*time.Hour }
	var hanging, healthy []*subscription.Subscription
	for i := range n.hanging {
		hanging = append(hanging, w.sub(fmt.Sprint("hangs", i), usual))
	}
	for i := range n.healthy {
		name := fmt.Sprint("well", i)
		s := &subscription.Subscription{}
		if n.apart {
			s = w.sub(name, usual, inNamespace(name))
		} else {
			s = w.sub(name, usual)
		}
		healthy = append(healthy, s)
	}
	for i, s := range hanging {
		w.publishN(s, uint16(i%16), n.backlog)
	}
	const seconds, perSecond = 20, 100
	for tick := range seconds * perSecond {
		for i := tick % perSecond; i < len(healthy); i += perSecond {
			w.publish(healthy[i], uint16(i%16))
		}
		if tick%perSecond == 0 && tick/perSecond == int(n.wellUntil/time.Second) && n.wellUntil > 0 {
			for i, s := range hanging { // a burst to all of them in the moment that they begin to hang
				w.publishN(s, uint16(i%16), 16)
			}
		}
		for i := tick % perSecond; i < len(hanging); i += perSecond {
			w.publish(hanging[i], uint16(i%16))
		}
		time.Sleep(time.Second / perSecond)
	}
	time.Sleep(time.Second)
	var waits []time.Duration
	hung := 0
	for _, s := range w.receiver.starts() {
		if strings.HasPrefix(s.sub, "well") {
			waits = append(waits, s.at.Sub(s.accept))
		}
	}
	w.receiver.mu.Lock()
	for sub, now := range w.receiver.now {
		if strings.HasPrefix(sub, "hangs") {
			hung += now
		}
	}
	w.receiver.mu.Unlock()
	slices.Sort(waits)
	if want := seconds * n.healthy; len(waits) != want {
		t.Errorf("%d of %d were tried", len(waits), want)
	}
	if late, _ := slices.BinarySearch(waits, time.Second); len(waits)-late > len(waits)/1000 {
		t.Errorf("%d of %d waited for a second and more, p50 %v, p99 %v, max %v", len(waits)-late, len(waits),
			waits[len(waits)/2], waits[len(waits)*99/100], waits[len(waits)-1])
	}
	most := n.mostSlow
	if most == 0 {
		most = 3072
	}
	if hung > most {
		t.Errorf("%d attempts hang", hung)
	}
	if len(waits) == 0 {
		t.FailNow()
	}
	t.Logf("%s: p50 %v, p99 %v, max %v; %d hang", t.Name(), waits[len(waits)/2], waits[len(waits)*99/100], waits[len(waits)-1], hung)
	_ = w.kill()
}

// However many lanes hang, in however many namespaces, one that is new and well has its first delivery at once. Where few
// namespaces have lanes that hang, that holds in these, too.
func TestANewcomerDoesNotWaitAmongThoseThatHang(t *testing.T) {
	sick := func(i, spaces int) string { return fmt.Sprint("sick", i%spaces) }
	for name, n := range map[string]struct {
		hanging, spaces int
		// feeds: those that hang get an event a second.
		feeds bool
		slots int
	}{
		"one namespace":              {hanging: 10_000, spaces: 1},
		"one namespace, fed":         {hanging: 4000, spaces: 1, feeds: true},
		"two namespaces":             {hanging: 8000, spaces: 2},
		"a hundred namespaces":       {hanging: 8000, spaces: 100},
		"a thousand, few slots each": {hanging: 3000, spaces: 1000, slots: 1024},
	} {
		t.Run(name, func(t *testing.T) {
			if testing.Short() && n.spaces != 100 {
				t.Skip("takes long")
			}
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(o *dispatch.Options) { o.Slots = n.slots })
				synctest.Wait()
				w.receiver.set(hanging(2 * time.Millisecond))
				lasting := func(s *subscription.Subscription) { s.MaxAge, s.MaxAttempts, s.MaxInFlight = 100*time.Hour, 100, 16 }
				var hanging []*subscription.Subscription
				wells := 0
				for i := range n.hanging {
					hanging = append(hanging, w.sub(fmt.Sprint("hangs", i), lasting, inNamespace(sick(i, n.spaces))))
				}
				for second := range 45 {
					for i, s := range hanging { // half of them have their first event only as newcomers come
						if n.feeds || second == i%2*(1+i/2%40) {
							w.publish(s, uint16(i%16))
						}
					}
					spaces := []string{"well", "fine"}
					if n.spaces < 3 {
						spaces = append(spaces, sick(second, n.spaces))
					}
					wells += len(spaces)
					for i, space := range spaces {
						w.publish(w.sub(fmt.Sprint("new", second, "-", i), lasting, inNamespace(space)), uint16(second%16))
					}
					time.Sleep(time.Second)
				}
				tried := make(map[string]bool)
				well, hung := 0, 0
				for _, s := range w.receiver.starts() {
					switch {
					case tried[s.sub]:
					case strings.HasPrefix(s.sub, "hangs"):
						hung++
					default:
						well++
						if wait := s.at.Sub(s.accept); wait > 500*time.Millisecond {
							t.Errorf("%s had its first attempt after %v", s.sub, wait)
						}
					}
					tried[s.sub] = true
				}
				if well != wells {
					t.Errorf("%d of %d newcomers were tried", well, wells)
				}
				// Those that hang have their trials, too.
				slots := n.slots
				if slots == 0 {
					slots = 4096
				}
				if want := min(n.hanging, slots*3/4); hung < want {
					t.Errorf("%d of %d that hang were tried, want %d", hung, n.hanging, want)
				}
				t.Logf("%d of %d that hang were tried", hung, n.hanging)
				_ = w.kill()
			})
		})
	}
}

// The same holds where a plugin takes few attempts at once.
func TestANewcomerOfASmallPlugin(t *testing.T) {
	for _, spaces := range []int{1, 5} {
		t.Run(fmt.Sprint(spaces), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(o *dispatch.Options) {
					o.Window = func(*subscription.Subscription) int { return 256 }
				})
				synctest.Wait()
				w.receiver.set(hanging(2 * time.Millisecond))
				lasting := func(s *subscription.Subscription) { s.MaxAge, s.MaxAttempts = 100*time.Hour, 100 }
				for i := range 600 {
					w.publish(w.sub(fmt.Sprint("hangs", i), lasting, inNamespace(fmt.Sprint("sick", i%spaces))), uint16(i%16))
				}
				for second := range 45 {
					time.Sleep(time.Second)
					for _, space := range []string{"sick0", "well"} {
						w.publish(w.sub(fmt.Sprint("new", second, space), lasting, inNamespace(space)), uint16(second%16))
					}
				}
				time.Sleep(time.Second)
				well := 0
				for _, s := range w.receiver.starts() {
					if strings.HasPrefix(s.sub, "new") {
						well++
						if wait := s.at.Sub(s.accept); wait > time.Second {
							t.Errorf("%s had its first attempt after %v", s.sub, wait)
						}
					}
				}
				if well != 2*45 {
					t.Errorf("%d of %d newcomers were tried", well, 2*45)
				}
				_ = w.kill()
			})
		})
	}
}

// New receivers that are well and far away are not kept waiting by the pace that is for those that hang.
func TestManyNewReceiversThatAreFarAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		w.receiver.set(always(200*time.Millisecond, ok))
		const receivers = 8000
		for i := range receivers {
			w.publish(w.sub(fmt.Sprint("far", i)), uint16(i%16))
		}
		time.Sleep(5 * time.Second)
		if n := len(w.receiver.starts()); n < receivers {
			t.Errorf("%d of %d were tried within 5 s", n, receivers)
		}
		_ = w.kill()
	})
}

func TestANewTargetDoesNotWaitAmongThoseThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.Slots = 16 })
		synctest.Wait()
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			if sub.Proto().GetUri() == "https://two.example" {
				return time.Millisecond, ok()
			}
			return 15 * time.Second, timedOut()
		})
		lasting := func(s *subscription.Subscription) { s.MaxAge, s.MaxAttempts = 100*time.Hour, 100 }
		for i := range 40 {
			w.publishN(w.sub(fmt.Sprint("hangs", i), lasting), uint16(i%16), 50)
		}
		repaired := w.sub("repaired", lasting)
		w.publishN(repaired, 0, 5)
		time.Sleep(5 * time.Minute)
		begin := time.Now()
		w.sub("repaired", lasting, func(s *subscription.Subscription) { s.Proto().Uri = "https://two.example" })
		w.publishN(repaired, 0, 5)
		time.Sleep(time.Second)
		n := 0
		for _, s := range w.receiver.starts() {
			if s.sub == "repaired" && !s.at.Before(begin) {
				n++
			}
		}
		if n < 5 {
			t.Errorf("%d attempts within a second of the repair", n)
		}
		_ = w.kill()
	})
}

func TestALaneWithLongWaysKeepsItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.Slots = 256 })
		synctest.Wait()
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			if sub.ID == "far" {
				return 300 * time.Millisecond, ok()
			}
			return 15 * time.Second, timedOut()
		})
		lasting := func(s *subscription.Subscription) { s.MaxAge, s.MaxAttempts, s.MaxInFlight = 100*time.Hour, 100, 32 }
		for i := range 400 {
			w.publishN(w.sub(fmt.Sprint("hangs", i), lasting), uint16(i%16), 20)
		}
		time.Sleep(5 * time.Minute) // they hold all that those who hang may hold
		far := w.sub("far", lasting)
		var begin time.Time
		for i := range 50 * 24 { // it needs 15 at once, which it may have after some round trips
			if i == 50*4 {
				begin = time.Now()
			}
			w.publish(far, 0)
			time.Sleep(20 * time.Millisecond)
		}
		late := 0
		for _, s := range w.receiver.starts() {
			if s.sub == "far" && s.accept.After(begin) && s.at.Sub(s.accept) > 100*time.Millisecond {
				late++
			}
		}
		if late > 1 {
			t.Errorf("%d of 1000 waited", late)
		}
		_ = w.kill()
	})
}

// After a restart nothing is known of receivers but which of them have been failing: the others do not wait among those
// for their first attempt, and those that hang do not all start at once.
func TestRestartBesideReceiversThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		synctest.Wait()
		w.receiver.set(hanging(time.Millisecond))
		lasting := func(s *subscription.Subscription) { s.MaxAge, s.MaxAttempts, s.MaxInFlight = 100*time.Hour, 100, 16 }
		const hanging = 2000
		for i := range hanging {
			w.publishN(w.sub(fmt.Sprint("hangs", i), lasting), uint16(i%16), 20)
		}
		time.Sleep(time.Minute)
		_ = w.kill()
		begin := time.Now()
		w.start()
		synctest.Wait()
		for i := range 500 {
			w.publish(w.sub(fmt.Sprint("well", i), lasting), uint16(i%16))
		}
		time.Sleep(time.Second)
		var late, well, hang int
		for _, s := range w.receiver.starts() {
			switch {
			case s.at.Before(begin):
			case strings.HasPrefix(s.sub, "hangs"):
				hang++
			default:
				well++
				if s.at.Sub(begin) > 50*time.Millisecond {
					late++
				}
			}
		}
		if well != 500 || late > 0 {
			t.Errorf("%d of 500 were tried, %d of them late", well, late)
		}
		if hang < 500 || hang > 1100 { // half of 4096 in two seconds
			t.Errorf("%d attempts to those that hang within a second", hang)
		}
		_ = w.kill()
	})
}

// What a plugin takes at once is shared as the slots are: receivers of it that hang leave a part to its others, and
// nobody else notices anything.
func TestHangingReceiversOfASmallPlugin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const takes = 64
		w := newWorld(t, func(o *dispatch.Options) {
			o.Window = func(sub *subscription.Subscription) int {
				if strings.HasPrefix(sub.ID, "other") {
					return 0
				}
				return takes
			}
		})
		synctest.Wait()
		w.receiver.set(hanging(2 * time.Millisecond))
		lasting := func(s *subscription.Subscription) { s.MaxAge, s.MaxAttempts, s.MaxInFlight = 100*time.Hour, 100, 16 }
		var others []*subscription.Subscription
		for i := range 20 {
			others = append(others, w.sub(fmt.Sprint("well", i), lasting), w.sub(fmt.Sprint("other", i), lasting))
		}
		for i, s := range others {
			w.publish(s, uint16(i%16))
		}
		time.Sleep(time.Second)
		for i := range 300 {
			w.publishN(w.sub(fmt.Sprint("hangs", i), lasting), uint16(i%16), 20)
		}
		moved := w.sub("hangs0", lasting, func(s *subscription.Subscription) { s.Proto().Uri = "https://two.example" })
		w.publish(moved, 0)
		for range 100 {
			time.Sleep(time.Second)
			for i, s := range others {
				w.publish(s, uint16(i%16))
			}
			w.receiver.mu.Lock()
			hang := 0
			for sub, n := range w.receiver.now {
				if strings.HasPrefix(sub, "hangs") {
					hang += n
				}
			}
			w.receiver.mu.Unlock()
			if hang > takes*6/8+4 {
				t.Fatalf("%d attempts of %d hang", hang, takes)
			}
		}
		time.Sleep(time.Second)
		var late, well, hang int
		for _, s := range w.receiver.starts() {
			switch {
			case strings.HasPrefix(s.sub, "hangs"):
				hang++
			default:
				well++
				if s.at.Sub(s.accept) > 100*time.Millisecond {
					late++
				}
			}
		}
		if well != 101*len(others) || late > 0 {
			t.Errorf("%d of %d were tried, %d of them late", well, 101*len(others), late)
		}
		if hang < 100 {
			t.Errorf("%d attempts to those that hang in 100 s", hang)
		}
		_ = w.kill()
	})
}
