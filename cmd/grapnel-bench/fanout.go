package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// fanoutRow is one run: events that each go to many subscriptions, every arrival verified and counted.
type fanoutRow struct {
	Fanout int `json:"fanout"`
	Events int `json:"events"`
	// Killed says that the server was killed when half had arrived, or a third of the limit was over, and started again.
	Killed    bool    `json:"killed,omitempty"`
	Seconds   float64 `json:"seconds"`
	PerSecond float64 `json:"per_second"`
	// Ratio is PerSecond over that of fan-out 10; 0 when that was not run.
	Ratio     float64 `json:"ratio_to_10,omitempty"`
	ServerCPU float64 `json:"server_cpu_us"`
	PluginCPU float64 `json:"plugin_cpu_us"`
	SinkCPU   float64 `json:"sink_cpu_us"`
	memoryReport
	Restart float64 `json:"restart_seconds,omitempty"`
	Arrived int64   `json:"arrived"`
	Missing int64   `json:"missing"`
	Doubled int64   `json:"doubled"`
	// Incomplete says why the run ended before its time.
	Incomplete string `json:"incomplete,omitempty"`
}

// fanoutReport compares rates and costs over fan-outs.
type fanoutReport struct {
	Rows []fanoutRow `json:"rows"`
	// Spread is the dearest delivery's CPU in server and plugin over the cheapest one's, over the runs without a kill.
	Spread float64 `json:"cost_spread"`
}

// fanout runs each fan-out, the last one again with kill -9 in the middle.
func (b *bench) fanout(ctx context.Context) error {
	r := &fanoutReport{}
	b.report.Fanout = r
	var failed error
	run := func(size product, kill bool) error {
		b.progress("fan-out %d, %d events, kill %v", size.by, size.of, kill)
		row, err := b.fanoutRun(ctx, size, kill)
		if err != nil {
			row.Incomplete = err.Error()
		}
		if failed == nil && (err != nil && !stopped(err) || row.Missing > 0 && err == nil || row.Doubled > 0 && !kill) {
			failed = fmt.Errorf("fan-out %d: %d missing, %d doubled: %w", size.by, row.Missing, row.Doubled, err)
		}
		r.Rows = append(r.Rows, row)
		return ctx.Err()
	}
	for _, size := range b.fanouts {
		if err := run(size, false); err != nil {
			return err
		}
	}
	if n := len(b.fanouts); n > 0 {
		if err := run(b.fanouts[n-1], true); err != nil {
			return err
		}
	}
	r.compare()
	return failed
}

// compare fills in what one run says about another.
func (r *fanoutReport) compare() {
	ten, low, high := 0.0, 0.0, 0.0
	for _, row := range r.Rows {
		if row.Fanout == 10 && !row.Killed {
			ten = row.PerSecond
		}
		if cost := row.ServerCPU + row.PluginCPU; !row.Killed && cost > 0 {
			high = max(high, cost)
			if low == 0 || cost < low {
				low = cost
			}
		}
	}
	for i := range r.Rows {
		if ten > 0 {
			r.Rows[i].Ratio = r.Rows[i].PerSecond / ten
		}
	}
	if low > 0 {
		r.Spread = high / low
	}
}

// fanoutRun measures from the first publish until the last delivery is recorded, and counts what arrived. With an error
// the row holds what there was until then.
func (b *bench) fanoutRun(ctx context.Context, size product, kill bool) (row fanoutRow, err error) {
	row = fanoutRow{Fanout: size.by, Events: size.of, Killed: kill}
	ctx, cancel := context.WithTimeout(ctx, b.limit)
	defer cancel()
	if err := b.sink.reset(); err != nil {
		return row, err
	}
	dir := b.dataDir()
	p, err := b.serve(ctx, b.grapnel, dir)
	if err != nil {
		return row, err
	}
	defer func() { p.kill() }()
	w, life := p.watch(ctx, b.mostMemory)
	defer func() { row.add(w.stop()) }()
	if err := p.prepare(life, namespace); err != nil {
		return row, why(life, err)
	}
	_, err = p.subscribeTo(life, namespace, size.by, func(i int) *grapnelv1.Subscription {
		return signed(namespace, b.sink.url(fmt.Sprintf("/s/%d", i)), "bench.*")
	})
	if err != nil {
		return row, why(life, err)
	}

	body := payload(b.payload, 1, time.Time{})
	events, want := newUnsent(size.of), int64(size.by)*int64(size.of)
	begin := time.Now()
	m := b.measured(p)
	if kill {
		if err := b.untilHalf(life, p, events, perCall(size.by), body, want); err != nil {
			row.count(b, m, want, begin)
			return row, why(life, err)
		}
		_, cpu := m.end()
		row.addCPU(cpu, want)
		row.add(w.stop())
		p.kill()
		if p, err = b.serve(ctx, b.grapnel, dir); err != nil {
			return row, err
		}
		row.Restart = p.ready.Seconds()
		w, life = p.watch(ctx, b.mostMemory)
		m = b.measured(p)
	}
	err = b.deliverAll(life, p, events, perCall(size.by), body, want)
	row.count(b, m, want, begin)
	row.add(w.stop())
	return row, why(life, err)
}

// perCall is how many events of a fan-out are published in one call: about a thousand deliveries, as far as the batches
// of the other parts go.
func perCall(fanout int) int { return min(max(1, 1000/fanout), batchSize) }

// deliverAll publishes what is unsent and returns when want deliveries have arrived and are recorded.
func (b *bench) deliverAll(ctx context.Context, p *serverProcess, events *unsent, size int, body []byte, want int64) error {
	if err := events.publish(ctx, p, namespace, size, body); err != nil {
		return fmt.Errorf("publish, %d events left: %w", events.left.Load(), err)
	}
	if _, err := b.sink.awaitPatiently(ctx, want, b.limit); err != nil {
		return err
	}
	return p.recorded(ctx, namespace)
}

// untilHalf publishes until half of want has arrived, for a third of the limit at the longest; there may be events left
// then.
func (b *bench) untilHalf(life context.Context, p *serverProcess, events *unsent, size int, body []byte, want int64) error {
	ctx, cancel := context.WithTimeout(life, b.limit/3)
	published := make(chan struct{})
	go func() {
		defer close(published)
		_ = events.publish(ctx, p, namespace, size, body) // what fails is sent again after the kill
	}()
	_, err := b.sink.awaitPatiently(ctx, want/2, b.limit)
	if errors.Is(err, context.DeadlineExceeded) && life.Err() == nil {
		err = nil
	}
	cancel()
	<-published
	return err
}

// measured begins to measure the processes that a delivery goes through.
func (b *bench) measured(p *serverProcess) *measure {
	pids := p.pids()
	pids["sink"] = []int{b.sink.cmd.Process.Pid}
	return beginMeasure(pids)
}

func (row *fanoutRow) addCPU(cpu map[string]time.Duration, deliveries int64) {
	row.ServerCPU += perDelivery(cpu["server"], int(deliveries))
	row.PluginCPU += perDelivery(cpu["plugin"], int(deliveries))
	row.SinkCPU += perDelivery(cpu["sink"], int(deliveries))
}

// count fills in what has arrived and what it cost.
func (row *fanoutRow) count(b *bench, m *measure, want int64, begin time.Time) {
	row.Seconds = time.Since(begin).Seconds()
	st, err := b.sink.stats(false)
	if err != nil {
		row.Missing = want
		return
	}
	_, cpu := m.end()
	row.addCPU(cpu, max(st.Unique, 1))
	row.Arrived, row.Missing, row.Doubled = st.Unique, want-st.Unique, st.Arrived-st.Unique
	row.PerSecond = float64(st.Unique) / row.Seconds
}

func (r *fanoutReport) print(out io.Writer) {
	fmt.Fprintln(out, "fan-out          first publish to last recorded; CPU in µs per delivery; RSS is the highest of samples every 50 ms")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "run\tdeliveries\t/s\tof x10\tserver\tplugin\tsink\tpeak RSS MiB\tVmHWM\trestart s\tmissing\tdoubled\t")
	for _, row := range r.Rows {
		name := fmt.Sprintf("%d events x%d", row.Events, row.Fanout)
		if row.Killed {
			name += ", killed"
		}
		fmt.Fprintf(w, "%s\t%d\t%.0f\t%.2f\t%.1f\t%.1f\t%.1f\t%.0f\t%.0f\t%.2f\t%d\t%d\t\n", name, row.Arrived, row.PerSecond, row.Ratio,
			row.ServerCPU, row.PluginCPU, row.SinkCPU, row.Peak, row.HighWater, row.Restart, row.Missing, row.Doubled)
	}
	_ = w.Flush()
	for _, row := range r.Rows {
		if row.Incomplete != "" {
			fmt.Fprintf(out, "                 x%d is incomplete: %s\n", row.Fanout, row.Incomplete)
		}
	}
	fmt.Fprintf(out, "                 cost of server and plugin within %.2f times over the fan-outs\n", r.Spread)
}
