package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
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

// hangingRow is one run: healthy receivers, each with one event a second, alone, then beside some that hang, and then
// after kill -9 and a restart, when the server knows of nobody how it is.
type hangingRow struct {
	Hanging int     `json:"hanging"`
	Healthy int     `json:"healthy"`
	Seconds float64 `json:"seconds"`
	// Together says that all are in one namespace.
	Together  bool      `json:"together,omitempty"`
	Alone     punctual  `json:"alone"`
	Beside    punctual  `json:"beside"`
	Restarted *punctual `json:"after_restart,omitempty"`
	// P99Ratio is the greater of those beside and after the restart over that alone.
	P99Ratio float64 `json:"p99_ratio"`
	memoryReport
	Incomplete string `json:"incomplete,omitempty"`
}

// punctual is publish to arrival at healthy receivers. Those that never arrived count as long as the run waited for
// them.
type punctual struct {
	spread
	Published int64 `json:"published"`
	Missing   int64 `json:"missing"`
	// Soon is the share that arrived within a second, from the first second on.
	Soon float64 `json:"within_1s"`
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
	row = hangingRow{Hanging: hung, Healthy: b.healthy, Seconds: b.hangingFor.Seconds(), Together: b.together}
	ctx, cancel := context.WithTimeout(ctx, b.limit)
	defer cancel()
	dir := b.dataDir()
	p, err := b.serve(ctx, b.grapnel, dir)
	if err != nil {
		return row, err
	}
	defer func() { p.kill() }()
	w, life := p.watch(ctx, b.mostMemory)
	defer func() { row.add(w.stop()) }()
	if err := b.healthyAndHung(life, p, hung); err != nil {
		return row, why(life, err)
	}
	// Whatever the creation of so much left to do is not to slow the ones that are measured alone.
	steady := b.steadyProbe(p, 0)
	steady.run(life, b.healthy, warmUp, soon)
	if err := sleep(life, warmUp); err != nil {
		return row, why(life, err)
	}
	if row.Alone, err = b.punctuality(life, steady); err != nil {
		return row, why(life, err)
	}
	if row.Alone.Missing > 0 {
		return row, fmt.Errorf("%d deliveries did not arrive although nothing hung", row.Alone.Missing)
	}
	if row.Beside, err = b.beside(life, p, steady, 0); err != nil {
		return row, why(life, err)
	}
	row.P99Ratio = ratio(row.Beside.P99, row.Alone.P99)
	row.add(w.stop())
	p.kill()
	if p, err = b.serve(ctx, b.grapnel, dir); err != nil {
		return row, err
	}
	w, life = p.watch(ctx, b.mostMemory)
	restarted, err := b.beside(life, p, b.steadyProbe(p, afterRestart), afterRestart)
	if err != nil {
		return row, why(life, err)
	}
	row.Restarted = &restarted
	row.P99Ratio = max(row.P99Ratio, ratio(restarted.P99, row.Alone.P99))
	return row, nil
}

// afterRestart is the number of the first event that is published after the restart.
const afterRestart = 1_000_000_000

// hungSpace is the namespace of the hanging receivers.
func (b *bench) hungSpace() string {
	if b.together {
		return namespace
	}
	return "hanging"
}

func (b *bench) healthyAndHung(ctx context.Context, p *serverProcess, hung int) error {
	for _, ns := range slices.Compact([]string{namespace, b.hungSpace()}) {
		if err := p.prepare(ctx, ns); err != nil {
			return err
		}
	}
	_, err := p.subscribeTo(ctx, namespace, b.healthy, func(i int) *grapnelv1.Subscription {
		return signed(namespace, b.sink.url(fmt.Sprintf("/s/%d", i)), fmt.Sprintf("bench.%d", i))
	})
	if err != nil {
		return err
	}
	_, err = p.subscribeAs(ctx, b.hungSpace(), "hung", hung, func(i int) *grapnelv1.Subscription {
		s := signed(b.hungSpace(), b.sink.url(fmt.Sprintf("/slow/20s/%d", i)), "hang")
		s.MaxInFlight = 0 // the default, as receivers are whose owners did not think of it
		return s
	})
	return err
}

// steadyProbe publishes to the healthy ones in turn, events with the numbers from first on.
func (b *bench) steadyProbe(p *serverProcess, first int64) *probe {
	pr := newProbe(p, b.payload, func(n int64) (string, string) { return namespace, fmt.Sprintf("bench.%d", n%int64(b.healthy)) })
	pr.sent = first
	return pr
}

// beside is punctuality while others hang, who get events with the numbers from first on.
func (b *bench) beside(ctx context.Context, p *serverProcess, steady *probe, first int64) (punctual, error) {
	hang, stop := context.WithCancel(ctx)
	defer stop()
	fed := make(chan error, 1)
	go func() { fed <- b.feed(hang, p, first) }()
	got, err := b.punctuality(ctx, steady)
	stop()
	if e := <-fed; err == nil {
		err = e
	}
	return got, err
}

// punctuality publishes to the healthy ones for the time of a run, and says how that went; what has not arrived a few
// seconds later is missing.
func (b *bench) punctuality(ctx context.Context, steady *probe) (punctual, error) {
	const patience = 3 * time.Second
	var got punctual
	if err := b.sink.reset(); err != nil {
		return got, err
	}
	steady.forget()
	got.Published = steady.run(ctx, b.healthy, b.hangingFor, patience)
	got.Missing = got.Published
	if err := ctx.Err(); err != nil {
		return got, err
	}
	if _, err := steady.result(); err != nil {
		return got, fmt.Errorf("publish to healthy receivers: %w", err)
	}
	var st sinkStats
	var err error
	for end := time.Now().Add(patience); ; {
		st, err = b.sink.stats(true)
		if err != nil || int64(len(st.Latencies)) >= got.Published || time.Now().After(end) {
			break
		}
		_ = sleep(ctx, 100*time.Millisecond)
	}
	if err == nil && st.Bad > 0 {
		err = fmt.Errorf("%d requests with a bad signature: %s", st.Bad, st.FirstBad)
	}
	if err = errors.Join(err, ctx.Err()); err != nil {
		return got, err
	}
	got.Missing = got.Published - int64(len(st.Latencies))
	inTime := 0
	for _, l := range st.Latencies {
		if l <= soon.Nanoseconds() {
			inTime++
		}
	}
	got.Soon = float64(inTime) / float64(max(got.Published, 1))
	for range got.Missing {
		st.Latencies = append(st.Latencies, (b.hangingFor + patience).Nanoseconds())
	}
	got.spread = spreadOf(st.Latencies)
	return got, nil
}

// feed publishes to those that hang until ctx ends, events with the numbers from first on.
func (b *bench) feed(ctx context.Context, p *serverProcess, first int64) error {
	client := grapnelv1.NewPublishServiceClient(p.conn)
	body := payload(b.payload, 1, time.Time{})
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := int64(0); ; n++ {
		e := event(first+n, body)
		e.Id, e.Type = "hang-"+e.GetId(), "hang"
		_, err := client.Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/" + b.hungSpace(), Event: e})
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
	fmt.Fprintln(w, "run\tevents\tmissing\twithin 1 s\tp50 ms\tp99\tmax\tp99 to alone\tpeak RSS MiB\t")
	for _, row := range r.Rows {
		line := func(name string, p punctual) {
			fmt.Fprintf(w, "%s\t%d\t%d\t%.2f%%\t%.1f\t%.1f\t%.1f\t%.2f\t%.0f\t\n",
				name, p.Published, p.Missing, 100*p.Soon, p.P50, p.P99, p.Max, ratio(p.P99, row.Alone.P99), row.Peak)
		}
		line(fmt.Sprintf("%d alone", row.Healthy), row.Alone)
		line(fmt.Sprintf("beside %d hanging", row.Hanging), row.Beside)
		if row.Restarted != nil {
			line("after kill -9", *row.Restarted)
		}
	}
	_ = w.Flush()
	for _, row := range r.Rows {
		if row.Incomplete != "" {
			fmt.Fprintf(out, "                 %d hanging is incomplete: %s\n", row.Hanging, row.Incomplete)
		}
	}
}
