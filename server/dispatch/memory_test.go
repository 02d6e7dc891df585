package dispatch_test

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// watchMemory returns the most that was in memory by now, of what is looked at every so often.
func watchMemory(t *testing.T, registry **prometheus.Registry) func() float64 {
	most := 0.0
	return func() float64 {
		most = max(most, gather(t, *registry)["grapnel_window_bytes"])
		return most
	}
}

func TestFanoutToHangingLanesStaysInBounds(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart=", restart), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const limit, fanout, events = 2 << 20, 1000, 40
				registry := prometheus.NewRegistry()
				w := newWorld(t, func(o *dispatch.Options) { o.WindowBytes, o.Registerer = limit, registry })
				synctest.Wait()
				w.receiver.set(func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
					if sub.ID == "well" {
						return time.Millisecond, ok()
					}
					return 15 * time.Second, timedOut()
				})
				subs := []*subscription.Subscription{w.sub("well")}
				for i := range fanout {
					subs = append(subs, w.sub(fmt.Sprint("hangs", i), func(s *subscription.Subscription) { s.MaxInFlight = 16 }))
				}
				most := watchMemory(t, &registry)
				for i := range events {
					w.journal.add(uint16(i%16), 1024, time.Time{}, subs...)
					most()
					time.Sleep(10 * time.Millisecond)
				}
				if restart {
					most()
					_ = w.kill()
					registry = prometheus.NewRegistry()
					w.options.Registerer = registry
					w.start()
					w.journal.add(0, 1024, time.Time{}, subs[0])
				}
				for range 100 {
					time.Sleep(100 * time.Millisecond)
					most()
				}
				if bytes := most(); bytes > limit*5/4+2<<20 {
					t.Errorf("%.0f bytes in memory, the limit is %d", bytes, limit)
				}
				if n := w.journal.count(func(r *record) bool { return r.lane == lane("well") && r.state != delivery.Succeeded }); n != 0 {
					t.Errorf("%d deliveries of the one that is well are waiting", n)
				}
				_ = w.kill()
			})
		})
	}
}

func TestManyLanesTakeTurnsForRoom(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	synctest.Test(t, func(t *testing.T) {
		const limit, lanes, each = 1 << 20, 4000, 10
		registry := prometheus.NewRegistry()
		w := newWorld(t, func(o *dispatch.Options) { o.WindowBytes, o.Registerer, o.Slots = limit, registry, 64 })
		w.receiver.set(always(10*time.Millisecond, ok))
		var subs []*subscription.Subscription
		for i := range lanes {
			subs = append(subs, w.sub(fmt.Sprint("s", i)))
		}
		for range each {
			for i, s := range subs {
				w.publish(s, uint16(i%16))
			}
		}
		most := watchMemory(t, &registry)
		for range 120 {
			time.Sleep(time.Second)
			most()
		}
		wantStates(t, w, map[delivery.State]int{delivery.Succeeded: lanes * each})
		if bytes := most(); bytes > limit*5/4+1<<20 {
			t.Errorf("%.0f bytes in memory, the limit is %d", bytes, limit)
		}
		w.stop()
	})
}

// TestHeapBesideHangingLanes looks at what the process really takes, on the real journal.
func TestHeapBesideHangingLanes(t *testing.T) {
	const fanout, events, limit = 1000, 60, 8 << 20
	w := &world{t: t, registry: newRegistry(), journal: newJournal(t)}
	w.engine = dispatch.New(dispatch.Options{Journal: w.journal, Subscriptions: w.registry})
	var subs []*subscription.Subscription
	for i := range fanout {
		subs = append(subs, w.sub(fmt.Sprint("hangs", i), func(s *subscription.Subscription) { s.MaxInFlight = 16 }))
	}
	dir := t.TempDir()
	for life := range 2 {
		j, err := delivery.Open(delivery.Options{Dir: dir, Partitions: 16, MinFreeBytes: -1})
		if err != nil {
			t.Fatal(err)
		}
		before := heapInUse()
		e := dispatch.New(dispatch.Options{Journal: j, Subscriptions: w.registry, Attempter: hang{}, WindowBytes: limit})
		j.Start(e)
		ran := make(chan error, 1)
		go func() { ran <- e.Run(context.Background()) }()
		if life == 0 {
			publishTo(t, j, subs, "hang", events)
		}
		for range 50 { // until it reads no more
			if err := j.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			runtime.Gosched()
		}
		if grown := heapInUse() - before; grown > 6*limit {
			t.Errorf("life %d: the heap has grown by %d MiB, the limit is %d", life, grown>>20, limit>>20)
		}
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		_ = e.Stop(ended)
		<-ran
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	}
}

// hang is an Attempter that never answers.
type hang struct{}

func (hang) AttemptBatch(*subscription.Subscription, []*delivery.Job, delivery.Sink) {}

func (hang) Attempt(*subscription.Subscription, *delivery.Job, delivery.Sink) {}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestStatisticsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(o *dispatch.Options) { o.StatsBytes = 64 << 10 })
		defer w.stop()
		w.receiver.set(always(time.Millisecond, ok))
		const lanes = 1000
		for i := range lanes {
			w.publish(w.sub(fmt.Sprint("s", i)), uint16(i%16))
			time.Sleep(time.Second)
		}
		total, per := w.engine.Stats(0, time.Hour, lanes)
		if total.Attempts != lanes || total.Succeeded != lanes || total.P50 == 0 {
			t.Errorf("total %+v", total)
		}
		if n := len(per); n < 50 || n > 200 {
			t.Errorf("%d lanes are told apart", n)
		}
		time.Sleep(26 * time.Hour)
		if total, per := w.engine.Stats(0, 24*time.Hour, lanes); total != (dispatch.Stats{}) || len(per) != 0 {
			t.Errorf("a day later: %+v, %d lanes", total, len(per))
		}
	})
}
