package main

import (
	"context"
	"slices"
	"sync"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// probe publishes at a steady rate whatever the server does, and keeps how long each call took: a call that waits does
// not put off the next one.
type probe struct {
	client grapnelv1.PublishServiceClient
	size   int
	// next gives the namespace and the event type of the n-th event of the run.
	next func(n int64) (ns, eventType string)

	calls sync.WaitGroup

	mu     sync.Mutex // guards what follows
	sent   int64
	took   []int64 // nanoseconds
	failed error
}

func newProbe(p *serverProcess, size int, next func(n int64) (ns, eventType string)) *probe {
	return &probe{client: grapnelv1.NewPublishServiceClient(p.conn), size: size, next: next}
}

// forget drops what the probe has seen so far. The numbers of its events go on: they are still in their dedup window.
func (p *probe) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.took, p.failed = nil, nil
}

// run publishes rate events a second for d, or until ctx ends, and returns how many it sent. It waits for the answers of
// all calls, at the longest as long as within.
func (p *probe) run(ctx context.Context, rate int, d, within time.Duration) int64 {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	calls, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	begin, sent := time.Now(), int64(0)
	for time.Since(begin) < d && ctx.Err() == nil {
		// By the clock, not by the ticks, some of which are dropped on a busy machine.
		for due := int64(time.Since(begin).Seconds() * float64(rate)); sent < due; sent++ {
			p.publish(calls)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	late := time.AfterFunc(within, cancel)
	defer late.Stop()
	p.calls.Wait()
	return sent
}

func (p *probe) publish(ctx context.Context) {
	p.mu.Lock()
	n := p.sent
	p.sent++
	p.mu.Unlock()
	p.calls.Go(func() {
		ns, eventType := p.next(n)
		begin := time.Now()
		e := event(n, payload(p.size, n, begin))
		e.Type = eventType
		_, err := p.client.Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/" + ns, Event: e})
		took := time.Since(begin).Nanoseconds()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.took = append(p.took, took)
		if err != nil && p.failed == nil {
			p.failed = err
		}
	})
}

// result is how long the calls took since the last forget, and the first error of one.
func (p *probe) result() (spread, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return spreadOf(slices.Clone(p.took)), p.failed
}

// spread sums durations up, in milliseconds.
type spread struct {
	Samples int     `json:"samples"`
	P50     float64 `json:"p50_ms"`
	P99     float64 `json:"p99_ms"`
	Max     float64 `json:"max_ms"`
}

// spreadOf takes nanoseconds, which it sorts.
func spreadOf(all []int64) spread {
	if len(all) == 0 {
		return spread{}
	}
	slices.Sort(all)
	return spread{
		Samples: len(all), P50: float64(quantile(all, .50)) / 1e6, P99: float64(quantile(all, .99)) / 1e6,
		Max: float64(all[len(all)-1]) / 1e6,
	}
}
