package delivery

import (
	"context"
	"fmt"
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
