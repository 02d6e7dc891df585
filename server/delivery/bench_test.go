package delivery

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// benchEvents makes events of 1 KiB, as ingest does, with targets 1 to fan.
func benchEvents(n, from, fan int) []Publication {
	payload := make([]byte, 1024)
	for i := range payload {
		payload[i] = "abcdefghijklmnopqrstuvwxyz0123456789"[(i*7+i/13)%36]
	}
	targets := make([]Target, fan)
	for i := range targets {
		targets[i] = Target{Subscription: fmt.Sprintf("orders-%d", i), UID: uid(i + 1), MaxAttempts: 10, MaxAge: 96 * time.Hour}
	}
	pubs := make([]Publication, n)
	for i := range pubs {
		e := &Event{
			Namespace: acme, ID: fmt.Sprintf("0192f0c1-%012d", from+i), Source: "//grapnel/acme", Type: "order.created",
			ContentType: "application/json", Payload: payload,
		}
		e.ContentHash[0] = byte(i)
		pubs[i] = Publication{e, targets}
	}
	return pubs
}

// keeper is a follower that keeps the jobs that it is offered.
type keeper struct {
	deaf
	mu   sync.Mutex
	jobs []Job
}

func (k *keeper) Offer(_ Commit, jobs []Job) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.jobs = append(k.jobs, jobs...)
}

func benchJournal(b testing.TB, f Follower, change ...func(*Options)) *Journal {
	b.Helper()
	o := Options{Dir: b.TempDir(), MinFreeBytes: -1}
	for _, c := range change {
		c(&o)
	}
	j, err := Open(o)
	if err != nil {
		b.Fatal(err)
	}
	j.Start(f)
	b.Cleanup(func() {
		if err := j.Close(); err != nil {
			b.Error(err)
		}
	})
	return j
}

// perOp reports µs of processor time, compactions included.
func perOp(b *testing.B, since time.Duration, n int) {
	b.ReportMetric(float64((cpuTime()-since).Nanoseconds())/1000/float64(n), "cpu-µs/op")
}

// BenchmarkAppend reports µs of processor time per event, compactions included, for batches of callers.
func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{1, 100, 500} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			j := benchJournal(b, deaf{})
			b.ReportAllocs()
			writers := 2
			if size == 1 {
				writers = 64
			}
			events := benchEvents(b.N, 0, 1)
			b.ResetTimer()
			start := cpuTime()
			share(writers, events, size, func(part []Publication) {
				for _, r := range j.Append(context.Background(), part) {
					if r.Err != nil || r.Duplicate {
						b.Errorf("%+v", r)
					}
				}
			})
			perOp(b, start, b.N)
		})
	}
}

// BenchmarkFanOut reports µs of processor time per delivery of an event with many targets.
func BenchmarkFanOut(b *testing.B) {
	for _, fan := range []int{1, 10, 1000, 10_000} {
		b.Run(fmt.Sprintf("targets=%d", fan), func(b *testing.B) {
			j := benchJournal(b, deaf{})
			b.ReportAllocs()
			events := benchEvents((b.N+fan-1)/fan, 0, fan)
			b.ResetTimer()
			start := cpuTime()
			share(2, events, max(100/fan, 1), func(part []Publication) {
				for _, r := range j.Append(context.Background(), part) {
					if r.Err != nil || r.Duplicate {
						b.Errorf("%+v", r)
					}
				}
			})
			perOp(b, start, len(events)*fan)
		})
	}
}

// BenchmarkSettle reports µs of processor time per first-attempt success.
func BenchmarkSettle(b *testing.B) {
	for _, fan := range []int{1, 10, 1000} {
		b.Run(fmt.Sprintf("targets=%d", fan), func(b *testing.B) {
			var k keeper
			j := benchJournal(b, &k)
			share(2, benchEvents((b.N+fan-1)/fan, 0, fan), max(500/fan, 1), func(part []Publication) { j.Append(context.Background(), part) })
			b.ReportAllocs()
			b.ResetTimer()
			start := cpuTime()
			for i := range k.jobs {
				j.Settle(&k.jobs[i], Step{State: Succeeded}, &Attempt{
					Number: 1, Start: time.Now(), Duration: 3 * time.Millisecond, Outcome: OutcomeSucceeded, ResponseCode: 200, Peer: "127.0.0.1:8080",
				}, nil)
			}
			if err := j.Flush(context.Background()); err != nil {
				b.Fatal(err)
			}
			perOp(b, start, len(k.jobs))
		})
	}
}

// share hands slices of events of the given size to writers.
func share(writers int, events []Publication, size int, do func([]Publication)) {
	parts := make(chan []Publication, writers) // one in hand for each writer
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for part := range parts {
				do(part)
			}
		})
	}
	for len(events) > 0 {
		n := min(size, len(events))
		parts <- events[:n]
		events = events[n:]
	}
	close(parts)
	wg.Wait()
}

// BenchmarkRead reports µs and bytes for each of 512 jobs that are read from disk, none of whose events is in memory.
func BenchmarkRead(b *testing.B) {
	for _, fan := range []int{1, 1000} {
		b.Run(fmt.Sprintf("targets=%d", fan), func(b *testing.B) {
			j := benchJournal(b, deaf{}, onePartition)
			share(2, benchEvents(1024, 0, fan), max(500/fan, 1), func(part []Publication) { j.Append(context.Background(), part) })
			b.ReportAllocs()
			b.ResetTimer()
			start, read := cpuTime(), 0
			for range b.N {
				r, err := j.Read(lane(1), 0, FIFO, Pos{Some: true}, 0, 512, 1<<30)
				if err != nil || len(r.Jobs) != 512 {
					b.Fatal(len(r.Jobs), err)
				}
				read += len(r.Jobs)
				release(j, r.Jobs)
			}
			perOp(b, start, read)
		})
	}
}

// BenchmarkLanes finds 100 open lanes among many that have history, and counts open rows, before and after retention
// has erased all of the history.
func BenchmarkLanes(b *testing.B) {
	const lanes = 20_000
	c := newClock()
	j := benchJournal(b, &keeper{}, func(o *Options) { o.now = c.now })
	k := j.follower.(*keeper)
	ctx := context.Background()
	publish := func(subs []int) {
		for part := range slices.Chunk(subs, 1000) {
			for range 2 {
				c.add(time.Millisecond)
				if r := j.Append(ctx, []Publication{publication(c.now().String(), part...)})[0]; r.Err != nil {
					b.Fatal(r.Err)
				}
			}
		}
	}
	subs := make([]int, lanes)
	for i := range subs {
		subs[i] = i + 1
	}
	publish(subs)
	for i := range k.jobs {
		j.Settle(&k.jobs[i], Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, c.now()), nil)
	}
	if err := j.Flush(ctx); err != nil {
		b.Fatal(err)
	}
	c.add(100 * time.Hour)
	publish(subs[:100])
	look := func(b *testing.B) {
		start := cpuTime()
		for range b.N {
			n := 0
			for _, err := range j.Lanes() {
				if err != nil {
					b.Fatal(err)
				}
				n++
			}
			if n < 100 {
				b.Fatal(n)
			}
		}
		perOp(b, start, b.N)
	}
	b.Run("history", look)
	sweep := func(b *testing.B) {
		start := cpuTime()
		if err := j.Retain(ctx, keepFor(72*time.Hour)); err != nil {
			b.Fatal(err)
		}
		perOp(b, start, 1)
	}
	b.Run("sweep", sweep)
	b.Run("swept", look)
	if err := j.db.Flush(); err != nil {
		b.Fatal(err)
	}
	b.Run("swept and flushed", look)
	b.Run("idle sweep", sweep)
	b.Run("read", func(b *testing.B) {
		start := cpuTime()
		for i := range b.N {
			r, err := j.Read(lane(i%100+1), uint16(i%16), FIFO, Pos{Some: true}, 0, 100, 1<<20)
			if err != nil {
				b.Fatal(err)
			}
			release(j, r.Jobs)
		}
		perOp(b, start, b.N)
	})
}

// BenchmarkCount counts what is open after a start.
func BenchmarkCount(b *testing.B) {
	j := benchJournal(b, deaf{})
	share(2, benchEvents(500, 0, 1000), 1, func(part []Publication) { j.Append(context.Background(), part) })
	if err := j.db.Flush(); err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	start := cpuTime()
	for range b.N {
		for _, p := range j.partitions {
			snapshot, _ := p.snapshot()
			if err := p.countOpen(snapshot); err != nil {
				b.Fatal(err)
			}
			_ = snapshot.Close()
		}
	}
	perOp(b, start, b.N*500_000)
}

// BenchmarkDelivery reads a delivery by its id where there are many namespaces.
func BenchmarkDelivery(b *testing.B) {
	j := benchJournal(b, deaf{})
	pubs := make([]Publication, 10_000)
	for i := range pubs {
		pubs[i] = publication("e", 1)
		pubs[i].Event.Namespace = NamespaceKey(i + 1)
	}
	share(4, slices.Clone(pubs), 500, func(part []Publication) { j.Append(context.Background(), part) })
	b.ResetTimer()
	start := cpuTime()
	for i := range b.N {
		e := pubs[i%len(pubs)].Event
		if _, err := j.Delivery(e.Namespace, idOf(e, 1)); err != nil {
			b.Fatal(err)
		}
	}
	perOp(b, start, b.N)
}
