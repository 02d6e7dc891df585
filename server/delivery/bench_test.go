package delivery

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"
)

// benchEvents makes events of 1 KiB with one target, as ingest does.
func benchEvents(n, from int) []*Event {
	payload := make([]byte, 1024)
	for i := range payload {
		payload[i] = "abcdefghijklmnopqrstuvwxyz0123456789"[(i*7+i/13)%36]
	}
	events := make([]*Event, n)
	for i := range events {
		e := &Event{
			Namespace: "acme", ID: fmt.Sprintf("0192f0c1-%012d", from+i), Source: "//grapnel/acme", Type: "order.created",
			ContentType: "application/json", Payload: payload,
			Targets: []Target{{Subscription: "orders", MaxAttempts: 10, MaxAge: 96 * time.Hour}},
		}
		e.ContentHash[0] = byte(i)
		events[i] = e
	}
	return events
}

func benchJournal(b *testing.B, onCommit func([]*Job)) *Journal {
	b.Helper()
	j, err := Open(Options{Dir: b.TempDir(), MinFreeBytes: -1})
	if err != nil {
		b.Fatal(err)
	}
	j.Start(onCommit)
	b.Cleanup(func() {
		if err := j.Close(); err != nil {
			b.Error(err)
		}
	})
	return j
}

// BenchmarkAppend reports µs of processor time per event, compactions included, for batches of callers.
func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{1, 100, 500} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			j := benchJournal(b, func([]*Job) {})
			b.ReportAllocs()
			writers := 2
			if size == 1 {
				writers = 64
			}
			events := benchEvents(b.N, 0)
			b.ResetTimer()
			start := cpuTime()
			share(writers, events, size, func(part []*Event) {
				for _, r := range j.Append(context.Background(), part) {
					if r.Err != nil || r.Duplicate {
						b.Errorf("%+v", r)
					}
				}
			})
			b.ReportMetric(float64((cpuTime()-start).Microseconds())/float64(b.N), "cpu-µs/op")
		})
	}
}

// BenchmarkSettle reports µs of processor time per first-attempt success.
func BenchmarkSettle(b *testing.B) {
	var mu sync.Mutex
	var jobs []*Job
	j := benchJournal(b, func(more []*Job) {
		mu.Lock()
		defer mu.Unlock()
		jobs = append(jobs, more...)
	})
	share(2, benchEvents(b.N, 0), 500, func(part []*Event) { j.Append(context.Background(), part) })
	b.ReportAllocs()
	b.ResetTimer()
	start := cpuTime()
	for _, job := range jobs {
		j.Settle(job, Step{State: Succeeded}, &Attempt{
			Number: 1, Start: time.Now(), Duration: 3 * time.Millisecond, Outcome: OutcomeSucceeded, ResponseCode: 200, Peer: "127.0.0.1:8080",
		})
	}
	if err := j.Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64((cpuTime()-start).Microseconds())/float64(b.N), "cpu-µs/op")
}

// share hands slices of events of the given size to writers.
func share(writers int, events []*Event, size int, do func([]*Event)) {
	parts := make(chan []*Event, writers) // one in hand for each writer
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
