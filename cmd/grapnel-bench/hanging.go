package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

const (
	// soon is the time in which a healthy receiver gets its events, whatever others do.
	soon = time.Second
	// warmUp is how long events go to the healthy ones before they count, and then none.
	warmUp = 3 * time.Second
	// burst is how many events each hanging receiver gets at the beginning; afterwards it gets one a second.
	burst = 40
)

// hangingRow is one run: healthy receivers, each with one event a second, alone and then beside some that hang.
type hangingRow struct {
	Hanging int     `json:"hanging"`
	Healthy int     `json:"healthy"`
	Seconds float64 `json:"seconds"`
	// Alone and Beside are publish to arrival; those that never arrived count as long as the run waited for them.
	Alone  spread `json:"alone"`
	Beside spread `json:"beside"`
	// AloneSoon and BesideSoon are the shares that arrived within a second, from the first second on.
	AloneSoon  float64 `json:"alone_within_1s"`
	BesideSoon float64 `json:"beside_within_1s"`
	P99Ratio   float64 `json:"p99_ratio"`
	Published  int64   `json:"published"`
	Missing    int64   `json:"missing"`
	memoryReport
	Incomplete string `json:"incomplete,omitempty"`
}

type hangingReport struct {
	Rows []hangingRow `json:"rows"`
}

// hanging measures what healthy receivers notice of others that do not answer, for several numbers of the latter.
func (b *bench) hanging(ctx context.Context) error {
	r := &hangingReport{}
	b.report.Hanging = r
	for _, n := range b.hung {
		b.progress("%d hanging beside %d healthy", n, b.healthy)
		row, err := b.hangingRun(ctx, n)
		if err != nil {
			row.Incomplete = err.Error()
		}
		r.Rows = append(r.Rows, row)
		if err != nil && (!stopped(err) || ctx.Err() != nil) {
			return fmt.Errorf("%d hanging: %w", n, err)
		}
	}
	return nil
}

func (b *bench) hangingRun(ctx context.Context, hung int) (row hangingRow, err error) {
	row = hangingRow{Hanging: hung, Healthy: b.healthy, Seconds: b.hangingFor.Seconds()}
	ctx, cancel := context.WithTimeout(ctx, b.limit)
	defer cancel()
	p, err := startServer(ctx, b.grapnel, b.dataDir())
	if err != nil {
		return row, err
	}
	defer p.kill()
	w, life := p.watch(ctx, b.mostMemory)
	defer func() { row.add(w.stop()) }()
	defer func() { err = why(life, err) }()
	for _, ns := range []string{namespace, "hanging"} {
		if err := p.prepare(life, ns); err != nil {
			return row, err
		}
	}
	_, err = p.subscribeTo(life, namespace, b.healthy, func(i int) *grapnelv1.Subscription {
		return signed(namespace, b.sink.url(fmt.Sprintf("/s/%d", i)), fmt.Sprintf("bench.%d", i))
	})
	if err != nil {
		return row, err
	}
	_, err = p.subscribeTo(life, "hanging", hung, func(i int) *grapnelv1.Subscription {
		s := signed("hanging", b.sink.url(fmt.Sprintf("/slow/20s/%d", i)), "bench.hang")
		s.MaxInFlight = 0 // the default, as receivers are whose owners did not think of it
		return s
	})
	if err != nil {
		return row, err
	}
	steady := newProbe(p, b.payload, func(n int64) (string, string) { return namespace, fmt.Sprintf("bench.%d", n%int64(b.healthy)) })
	// Whatever the creation of so much left to do is not to slow the ones that are measured alone.
	steady.run(life, b.healthy, warmUp, soon)
	if err := sleep(life, warmUp); err != nil {
		return row, err
	}
	var missing int64
	if row.Alone, row.AloneSoon, _, missing, err = b.watched(life, steady); err != nil {
		return row, err
	}
	if missing > 0 {
		return row, fmt.Errorf("%d deliveries did not arrive although nothing hung", missing)
	}

	hang, stop := context.WithCancel(life)
	defer stop()
	fed := make(chan error, 1)
	go func() { fed <- b.feed(hang, p) }()
	row.Beside, row.BesideSoon, row.Published, row.Missing, err = b.watched(life, steady)
	stop()
	if e := <-fed; err == nil && life.Err() == nil {
		err = e
	}
	if row.Alone.P99 > 0 {
		row.P99Ratio = row.Beside.P99 / row.Alone.P99
	}
	return row, err
}

// watched publishes to the healthy ones for the time of a run, and says how that went; what has not arrived a few
// seconds later is missing.
func (b *bench) watched(ctx context.Context, steady *probe) (took spread, within float64, sent, missing int64, err error) {
	const patience = 3 * time.Second
	if err := b.sink.reset(); err != nil {
		return spread{}, 0, 0, 0, err
	}
	steady.forget()
	sent = steady.run(ctx, b.healthy, b.hangingFor, patience)
	if err := ctx.Err(); err != nil {
		return spread{}, 0, sent, sent, err
	}
	if _, err := steady.result(); err != nil {
		return spread{}, 0, sent, sent, fmt.Errorf("publish to healthy receivers: %w", err)
	}
	if _, err = b.sink.awaitPatiently(ctx, sent, patience); ctx.Err() != nil {
		return spread{}, 0, sent, sent, ctx.Err()
	}
	st, err := b.sink.stats(true)
	if err != nil {
		return spread{}, 0, sent, sent, err
	}
	if st.Bad > 0 {
		return spread{}, 0, sent, sent, fmt.Errorf("%d requests with a bad signature: %s", st.Bad, st.FirstBad)
	}
	missing = sent - int64(len(st.Latencies))
	punctual := 0
	for _, l := range st.Latencies {
		if l <= soon.Nanoseconds() {
			punctual++
		}
	}
	for range missing {
		st.Latencies = append(st.Latencies, (b.hangingFor + patience).Nanoseconds())
	}
	return spreadOf(st.Latencies), float64(punctual) / float64(max(sent, 1)), sent, missing, nil
}

// feed publishes to those that hang until ctx ends.
func (b *bench) feed(ctx context.Context, p *serverProcess) error {
	client := grapnelv1.NewPublishServiceClient(p.conn)
	body := payload(b.payload, 1, time.Time{})
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := int64(0); ; n++ {
		e := event(n, body)
		e.Type = "bench.hang"
		_, err := client.Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/hanging", Event: e})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("publish to hanging receivers: %w", err)
		}
		if n < burst {
			continue
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (r *hangingReport) print(out io.Writer) {
	fmt.Fprintf(out, "hanging          receivers that take 20 s, %d events each at once, then 1/s each, beside healthy ones at 1/s each; publish to arrival\n", burst)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "hanging\thealthy\tevents\tmissing\twithin 1 s alone\tbeside\tp50 ms alone\tbeside\tp99 ms alone\tbeside\tratio\tpeak RSS MiB\t")
	for _, row := range r.Rows {
		fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%.2f%%\t%.2f%%\t%.1f\t%.1f\t%.1f\t%.1f\t%.2f\t%.0f\t\n", row.Hanging, row.Healthy, row.Published, row.Missing,
			100*row.AloneSoon, 100*row.BesideSoon, row.Alone.P50, row.Beside.P50, row.Alone.P99, row.Beside.P99, row.P99Ratio, row.Peak)
	}
	_ = w.Flush()
	for _, row := range r.Rows {
		if row.Incomplete != "" {
			fmt.Fprintf(out, "                 %d hanging is incomplete: %s\n", row.Hanging, row.Incomplete)
		}
	}
}
