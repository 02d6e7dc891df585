package dispatch_test

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// crowd is many lanes of one namespace that always have something to send, more than there are slots for.
type crowd struct {
	name   string
	weight int
	lanes  int
	took   time.Duration
	size   int
	// uneven: one of ten attempts takes nine times as long, the others a ninth.
	uneven bool
}

// share is what a namespace got.
type share struct {
	attempts int
	slotTime time.Duration
}

// contend has crowds contend for slots, and returns what each got in a span after a while.
func contend(w *world, from, span time.Duration, crowds ...crowd) map[string]share {
	took := make(map[string]crowd)
	rnd := rand.New(rand.NewPCG(1, 1))
	var subs []*subscription.Subscription
	sizes := make(map[string]int)
	w.registry.mu.Lock()
	w.registry.weights = make(map[delivery.NamespaceKey]int)
	for _, c := range crowds {
		w.registry.weights[delivery.UID(uid(c.name)).NamespaceKey()] = c.weight
		took[c.name] = c
	}
	w.registry.mu.Unlock()
	got := make(map[string]share)
	tried, published := make(map[string]int), make(map[string]int)
	begin := time.Now()
	w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
		d := took[sub.Namespace].took
		w.receiver.mu.Lock()
		defer w.receiver.mu.Unlock()
		tried[sub.ID]++
		switch is := took[sub.Namespace].uneven; {
		case is && rnd.IntN(10) == 0:
			d *= 9
		case is:
			d /= 9
		}
		if at := time.Since(begin); at >= from && at < from+span {
			s := got[sub.Namespace]
			got[sub.Namespace] = share{s.attempts + 1, s.slotTime + d}
		}
		return d, ok()
	})
	for _, c := range crowds {
		for i := range c.lanes {
			s := w.sub(fmt.Sprint(c.name, i), most(16), inNamespace(c.name))
			subs = append(subs, s)
			sizes[s.ID] = max(c.size, 100)
		}
	}
	for time.Since(begin) < from+span {
		for i, s := range subs { // each has always some
			w.receiver.mu.Lock()
			want := tried[s.ID] + 20
			w.receiver.mu.Unlock()
			for ; published[s.ID] < want; published[s.ID]++ {
				w.journal.add(uint16(i%16), sizes[s.ID], time.Time{}, s)
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	w.receiver.mu.Lock()
	defer w.receiver.mu.Unlock()
	return maps.Clone(got)
}

func wantRatio(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Abs(got/want-1) > 0.15 {
		t.Errorf("%s: 1 to %.2f, want 1 to %.2f", what, got, want)
	}
}

func TestSharesUnderContention(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	for name, tt := range map[string]struct {
		a, b crowd
		// time and attempts that b gets for each of a.
		time, attempts float64
	}{
		"weights 1 and 3": {
			crowd{name: "a", weight: 1, lanes: 40, took: 20 * time.Millisecond}, crowd{name: "b", weight: 3, lanes: 40, took: 20 * time.Millisecond}, 3, 3,
		},
		"weights 1 and 3, four times as many lanes": {
			crowd{name: "a", weight: 1, lanes: 120, took: 20 * time.Millisecond}, crowd{name: "b", weight: 3, lanes: 30, took: 20 * time.Millisecond}, 3, 3,
		},
		"ten times as slow": {
			crowd{name: "a", lanes: 40, took: 20 * time.Millisecond}, crowd{name: "b", lanes: 40, took: 200 * time.Millisecond}, 1, 0.1,
		},
		"ten times as slow and three times as heavy": {
			crowd{name: "a", lanes: 40, took: 20 * time.Millisecond}, crowd{name: "b", weight: 3, lanes: 40, took: 200 * time.Millisecond}, 3, 0.3,
		},
		"uneven": {
			crowd{name: "a", lanes: 40, took: 20 * time.Millisecond}, crowd{name: "b", lanes: 40, took: 20 * time.Millisecond, uneven: true}, 1, 1,
		},
		// 256 KiB count for 2.6 ms, beside the 5 ms that each takes.
		"big bodies": {
			crowd{name: "a", lanes: 40, took: 5 * time.Millisecond}, crowd{name: "b", lanes: 40, took: 5 * time.Millisecond, size: 256 << 10}, 1 / 1.52, 1 / 1.52,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(o *dispatch.Options) { o.Slots = 16; o.WindowBytes = 1 << 30 })
				synctest.Wait()
				got := contend(w, 3*time.Second, 10*time.Second, tt.a, tt.b)
				t.Logf("%+v", got)
				wantRatio(t, "slot time", float64(got["b"].slotTime)/float64(got["a"].slotTime), tt.time)
				wantRatio(t, "attempts", float64(got["b"].attempts)/float64(got["a"].attempts), tt.attempts)
				// Nothing is left unused: 16 slots for 10 s.
				if used := got["a"].slotTime + got["b"].slotTime; used < 10*16*time.Second*9/10 {
					t.Errorf("slots were in use for %v of 160 s", used)
				}
				_ = w.kill()
			})
		})
	}
}

// Within a namespace subscriptions share alike.
func TestLanesShareByCost(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.Slots = 16 })
		synctest.Wait()
		begin := time.Now()
		got := make(map[byte]share)
		w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
			d := 10 * time.Millisecond
			if sub.ID[0] == 's' {
				d *= 10
			}
			if at := time.Since(begin); at > 5*time.Second && at < 25*time.Second {
				w.receiver.mu.Lock()
				s := got[sub.ID[0]]
				got[sub.ID[0]] = share{s.attempts + 1, s.slotTime + d}
				w.receiver.mu.Unlock()
			}
			return d, ok()
		})
		for i := range 60 {
			w.publishN(w.sub(fmt.Sprint("fast", i), most(16)), uint16(i%16), 3000)
			w.publishN(w.sub(fmt.Sprint("slow", i), most(16)), uint16(i%16), 300)
		}
		time.Sleep(30 * time.Second)
		_ = w.kill()
		w.receiver.mu.Lock()
		defer w.receiver.mu.Unlock()
		t.Logf("%+v", got)
		wantRatio(t, "slot time", float64(got['s'].slotTime)/float64(got['f'].slotTime), 1)
	})
}

// Who has had nothing for long has no claim to more than its share afterwards, and who had much while nobody else wanted any
// owes nothing for it.
func TestNobodySavesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.Slots = 16 })
		synctest.Wait()
		w.receiver.set(always(20*time.Millisecond, ok))
		var subs []*subscription.Subscription
		for i := range 40 {
			subs = append(subs, w.sub(fmt.Sprint("busy", i), most(16), inNamespace("busy")))
			w.sub(fmt.Sprint("idle", i), most(16), inNamespace("idle"))
		}
		for i, s := range subs {
			w.publishN(s, uint16(i%16), 600)
		}
		time.Sleep(20 * time.Second)
		begin := time.Now()
		for i := range 40 {
			w.publishN(w.sub(fmt.Sprint("idle", i), most(16), inNamespace("idle")), uint16(i%16), 80)
		}
		time.Sleep(3 * time.Second)
		for second := range 3 {
			var busy, idle float64
			for _, s := range w.receiver.starts() {
				if at := s.at.Sub(begin); at < time.Duration(second)*time.Second || at >= time.Duration(second+1)*time.Second {
					continue
				}
				if strings.HasPrefix(s.sub, "busy") {
					busy++
				} else {
					idle++
				}
			}
			wantRatio(t, fmt.Sprint("attempts in second ", second), idle/busy, 1)
		}
		_ = w.kill()
	})
}

// Namespaces of random weights, numbers of lanes, sizes and times to answer, which change: each that wants more than its
// share gets it, none goes without, and no slot is left unused. All answer within a second: those that do not are apart.
func TestSharesOnRandomTraces(t *testing.T) {
	seeds := uint64(12)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(seed, 7))
				w := newWorld(t, func(o *dispatch.Options) { o.Slots = 16; o.WindowBytes = 1 << 30 })
				synctest.Wait()
				var crowds []crowd
				weights := 0
				for i := range 2 + rnd.IntN(4) {
					c := crowd{
						name: fmt.Sprint("ns", i, "-"), weight: 1 + rnd.IntN(5), lanes: 20 + rnd.IntN(40),
						took: time.Duration(20+rnd.IntN(80)) * time.Millisecond, uneven: rnd.IntN(3) == 0,
					}
					crowds = append(crowds, c)
					weights += c.weight
				}
				const span = 40 * time.Second
				got := contend(w, 10*time.Second, span, crowds...)
				var used time.Duration
				for _, c := range crowds {
					used += got[c.name].slotTime
				}
				if used < span*16*9/10 {
					t.Errorf("slots were in use for %v of %v", used, span*16)
				}
				for _, c := range crowds {
					want := float64(used) * float64(c.weight) / float64(weights)
					if is := float64(got[c.name].slotTime); math.Abs(is/want-1) > 0.2 {
						t.Errorf("%+v got %v of %v, want %v", c, got[c.name].slotTime, used, time.Duration(want))
					}
				}
				_ = w.kill()
			})
		})
	}
}
