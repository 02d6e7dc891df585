package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

const namespace = "bench"

// start measures a cold start: process to ready line, and to the first delivery at the receiver.
func (b *bench) start(ctx context.Context) error {
	if err := b.sink.reset(); err != nil {
		return err
	}
	begin := time.Now()
	p, err := b.serve(ctx, b.grapnel, b.dataDir())
	if err != nil {
		return err
	}
	defer p.kill()
	if err := p.prepare(ctx, namespace, b.sink.url("/s/start")); err != nil {
		return err
	}
	if err := batch(ctx, p, namespace, 1, b.payload); err != nil {
		return err
	}
	if _, err := b.sink.await(ctx, 1); err != nil {
		return err
	}
	r := &startReport{Ready: p.ready.Seconds(), FirstDelivery: time.Since(begin).Seconds()}
	if err := sleep(ctx, 3*time.Second); err != nil {
		return err
	}
	kids := children(p.cmd.Process.Pid)
	r.Processes = 1 + len(kids)
	r.ServerRSS = rss(p.cmd.Process.Pid)
	for _, k := range kids {
		r.PluginRSS += rss(k)
	}
	b.report.Start = r
	return p.stop()
}

// throughput runs the raw bound and then each way of publishing, fan-out 1 and 10; with another binary to compare with,
// each run is made with both, one after the other, and in every second round the other way round.
func (b *bench) throughput(ctx context.Context) error {
	for round := range b.repeat {
		raw, err := b.rawBound(ctx, b.events)
		if err != nil {
			return err
		}
		b.report.add(raw)
		runs := []struct {
			name   string
			fanout int
			send   publisher
		}{
			{"unary x1", 1, unary(b.concurrency)}, {"batch x1", 1, batch}, {"stream x1", 1, stream},
			{"unary x10", 10, unary(b.concurrency)}, {"batch x10", 10, batch}, {"stream x10", 10, stream},
		}
		for _, r := range runs {
			n := b.events
			if r.fanout > 1 {
				n = b.events10
			}
			type side struct{ grapnel, name string }
			sides := []side{{b.grapnel, r.name}}
			if b.against != "" {
				sides = append(sides, side{b.against, r.name + ", other"})
			}
			if round%2 == 1 { // what comes second may meet another machine
				slices.Reverse(sides)
			}
			got := make(map[string]throughput)
			for _, s := range sides {
				t, err := b.one(ctx, s.grapnel, s.name, r.fanout, n, r.send)
				if err != nil {
					return fmt.Errorf("%s with %s: %w", s.name, s.grapnel, err)
				}
				t.Ratio = t.PerSecond / raw.PerSecond
				b.report.add(t)
				got[s.name] = t
			}
			if b.against != "" {
				b.report.pair(got[r.name], got[r.name+", other"])
			}
		}
	}
	return nil
}

// one measures from the first publish until the last delivery is recorded.
func (b *bench) one(ctx context.Context, grapnel, name string, fanout, n int, send publisher) (throughput, error) {
	subs := make([]*grapnelv1.Subscription, fanout)
	for i := range subs {
		subs[i] = signed(namespace, b.sink.url(fmt.Sprintf("/s/%d", i)), "bench.*")
	}
	return b.oneTo(ctx, grapnel, name, subs, n, send)
}

// oneTo is one with given subscriptions, each of which gets all events.
func (b *bench) oneTo(ctx context.Context, grapnel, name string, subs []*grapnelv1.Subscription, n int, send publisher) (throughput, error) {
	return b.oneBeside(ctx, grapnel, name, subs, len(subs), n, send, nil)
}

// oneBeside is oneTo where each event goes to so many of the subscriptions, and with something that begin has begun beside.
func (b *bench) oneBeside(ctx context.Context, grapnel, name string, subs []*grapnelv1.Subscription, fanout, n int, send publisher,
	begin func(context.Context, *serverProcess) error) (throughput, error) {
	var t throughput
	if err := b.sink.reset(); err != nil {
		return t, err
	}
	p, err := b.serve(ctx, grapnel, b.dataDir())
	if err != nil {
		return t, err
	}
	defer p.kill()
	if err := p.prepare(ctx, namespace); err != nil {
		return t, err
	}
	if _, err := p.subscribeTo(ctx, namespace, len(subs), func(i int) *grapnelv1.Subscription { return subs[i] }); err != nil {
		return t, err
	}
	if begin != nil {
		if err := begin(ctx, p); err != nil {
			return t, err
		}
	}
	pids := p.pids()
	pids["sink"], pids["self"] = []int{b.sink.cmd.Process.Pid}, []int{selfPid()}
	stopProfile := b.startProfile(p, name)
	m := beginMeasure(pids)
	if err := send(ctx, p, namespace, n, b.payload); err != nil {
		return t, err
	}
	published := time.Since(m.begin)
	want := int64(n) * int64(fanout)
	if _, err := b.sink.await(ctx, want); err != nil {
		return t, err
	}
	if err := p.recorded(ctx, namespace); err != nil {
		return t, err
	}
	wall, cpu := m.end()
	stopProfile()
	st, err := b.sink.stats(false)
	if err != nil {
		return t, err
	}
	total := n * fanout
	t = throughput{
		Name: name, Deliveries: total, Seconds: wall.Seconds(), PerSecond: float64(total) / wall.Seconds(),
		PublishSeconds: published.Seconds(), Duplicates: st.Arrived - st.Unique,
		ServerCPU: perDelivery(cpu["server"], total), PluginCPU: perDelivery(cpu["plugin"], total),
		SinkCPU: perDelivery(cpu["sink"], total), ClientCPU: perDelivery(cpu["self"], total),
		ServerRSS: rss(p.cmd.Process.Pid),
	}
	return t, p.stop()
}

// startProfile fetches a CPU profile of the server while a run goes on, when asked to.
func (b *bench) startProfile(p *serverProcess, name string) func() {
	if b.profile == "" || p.admin == "" {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		resp, err := http.Get("http://" + p.admin + "/debug/pprof/profile?seconds=4")
		if err != nil {
			return
		}
		defer resp.Body.Close()
		f, err := os.Create(filepath.Join(b.profile, filepath.Base(name)+".pprof"))
		if err != nil {
			return
		}
		defer f.Close()
		_, _ = io.Copy(f, resp.Body)
	}()
	return func() { <-done }
}

// latency publishes at a steady rate and measures publish to arrival.
func (b *bench) latency(ctx context.Context) error {
	if err := b.sink.reset(); err != nil {
		return err
	}
	p, err := b.serve(ctx, b.grapnel, b.dataDir())
	if err != nil {
		return err
	}
	defer p.kill()
	if err := p.prepare(ctx, namespace, b.sink.url("/s/latency")); err != nil {
		return err
	}
	lat, err := b.steady(ctx, p, b.latencyFor, 0)
	if err != nil {
		return err
	}
	b.report.Latency = lat
	return p.stop()
}

// steady publishes at the rate of the latency run for d, with event IDs from first on, and waits for the
// arrivals.
func (b *bench) steady(ctx context.Context, p *serverProcess, d time.Duration, first int64) (*latencyReport, error) {
	client := grapnelv1.NewPublishServiceClient(p.conn)
	tick := time.NewTicker(time.Second / time.Duration(b.latencyRate))
	defer tick.Stop()
	n := int64(d.Seconds() * float64(b.latencyRate))
	errs := make(chan error, n)
	for i := range n {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		go func() {
			_, err := client.Publish(ctx, &grapnelv1.PublishRequest{
				Parent: "namespaces/" + namespace, Event: event(first+i, payload(b.payload, i, time.Now())),
			})
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			return nil, err
		}
	}
	if _, err := b.sink.await(ctx, n); err != nil {
		return nil, err
	}
	st, err := b.sink.stats(true)
	if err != nil {
		return nil, err
	}
	slices.Sort(st.Latencies)
	return &latencyReport{
		Rate: b.latencyRate, Samples: len(st.Latencies),
		P50: float64(quantile(st.Latencies, .50)) / 1e6, P99: float64(quantile(st.Latencies, .99)) / 1e6,
		Max: float64(st.Latencies[len(st.Latencies)-1]) / 1e6,
	}, nil
}

// neighbour measures the latency of a healthy subscription alone, and again beside one whose receiver
// hangs while events pour in for it.
func (b *bench) neighbour(ctx context.Context) error {
	p, err := b.serve(ctx, b.grapnel, b.dataDir())
	if err != nil {
		return err
	}
	defer p.kill()
	if err := p.prepare(ctx, namespace, b.sink.url("/s/quiet")); err != nil {
		return err
	}
	if err := p.prepare(ctx, "noisy", b.sink.url("/slow/20s/noisy")); err != nil {
		return err
	}
	if err := b.sink.reset(); err != nil {
		return err
	}
	alone, err := b.steady(ctx, p, b.latencyFor/2, 0)
	if err != nil {
		return err
	}
	if err := batch(ctx, p, "noisy", 20_000, b.payload); err != nil {
		return err
	}
	if err := b.sink.reset(); err != nil {
		return err
	}
	// The IDs of the second half must be new: events of the first are still within their dedup window.
	beside, err := b.steady(ctx, p, b.latencyFor/2, 1_000_000)
	if err != nil {
		return err
	}
	b.report.Neighbour = &neighbourReport{Alone: *alone, Beside: *beside, P99Ratio: beside.P99 / alone.P99}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
