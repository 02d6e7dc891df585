package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// backlogRow is what waiting deliveries cost, on one lane or on many.
type backlogRow struct {
	Lanes   int `json:"lanes"`
	Waiting int `json:"waiting_each"`
	// CreatePerSecond and PublishPerSecond are how fast lanes, paused, and deliveries were made.
	CreatePerSecond  float64 `json:"create_per_second"`
	PublishPerSecond float64 `json:"publish_per_second"`
	RSSAfterPublish  float64 `json:"rss_after_publish_mib"`
	RSSAfterRestart  float64 `json:"rss_after_restart_mib"`
	RSSAfterDrain    float64 `json:"rss_after_drain_mib"`
	memoryReport
	// Restart is from the start of the process after kill -9 to its ready line.
	Restart float64 `json:"restart_seconds"`
	// Resume is how long it took to resume all lanes; DrainPerSecond counts from its beginning to the last delivery
	// recorded.
	Resume         float64 `json:"resume_seconds"`
	DrainPerSecond float64 `json:"drain_per_second"`
	Incomplete     string  `json:"incomplete,omitempty"`
}

type backlogReport struct {
	Rows []backlogRow `json:"rows"`
}

// backlog measures what backlogs cost: memory, and the time to restart after kill -9.
func (b *bench) backlog(ctx context.Context) error {
	if len(b.backlogs) == 0 {
		return nil
	}
	r := &backlogReport{}
	b.report.Backlog = r
	for _, size := range b.backlogs {
		row, err := b.backlogRun(ctx, size)
		if err != nil {
			row.Incomplete = err.Error()
		}
		r.Rows = append(r.Rows, row)
		if err != nil && (!stopped(err) || ctx.Err() != nil) {
			return fmt.Errorf("%v: %w", size, err)
		}
	}
	return nil
}

func (b *bench) backlogRun(ctx context.Context, size product) (row backlogRow, err error) {
	row = backlogRow{Lanes: size.by, Waiting: size.of}
	ctx, cancel := context.WithTimeout(ctx, b.limit)
	defer cancel()
	dir := b.dataDir()
	defer func() { _ = os.RemoveAll(dir) }() // it may be many gigabytes
	p, err := b.serve(ctx, b.grapnel, dir)
	if err != nil {
		return row, err
	}
	defer func() { p.kill() }()
	w, life := p.watch(ctx, b.mostMemory)
	defer func() { row.add(w.stop()) }()
	if err := b.pile(life, p, size, &row); err != nil {
		return row, why(life, err)
	}
	row.add(w.stop())
	p.kill()
	if p, err = b.serve(ctx, b.grapnel, dir); err != nil {
		return row, err
	}
	row.Restart = p.ready.Seconds()
	w, life = p.watch(ctx, b.mostMemory)
	return row, why(life, b.unpile(life, p, size, &row))
}

// pile makes the lanes, pauses them, and publishes what is to wait on each: events of its own.
func (b *bench) pile(ctx context.Context, p *serverProcess, size product, row *backlogRow) error {
	if err := p.prepare(ctx, namespace); err != nil {
		return err
	}
	begin := time.Now()
	_, err := p.subscribeTo(ctx, namespace, size.by, func(i int) *grapnelv1.Subscription {
		return signed(namespace, b.sink.url(fmt.Sprintf("/s/%d", i)), fmt.Sprintf("bench.%d", i))
	})
	if err != nil {
		return err
	}
	subs := grapnelv1.NewSubscriptionServiceClient(p.conn)
	_, err = concurrently(ctx, creators, size.by, func(ctx context.Context, i int) error {
		_, err := subs.PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: laneName(i), Reason: "benchmark"})
		return err
	})
	if err != nil {
		return err
	}
	row.CreatePerSecond = float64(size.by) / time.Since(begin).Seconds()
	begin = time.Now()
	client, body := grapnelv1.NewPublishServiceClient(p.conn), payload(b.payload, 1, time.Time{})
	total := size.by * size.of
	_, err = concurrently(ctx, 4, (total+batchSize-1)/batchSize, func(ctx context.Context, call int) error {
		req := &grapnelv1.BatchPublishRequest{Parent: "namespaces/" + namespace}
		for i := call * batchSize; i < min((call+1)*batchSize, total); i++ {
			e := event(int64(i), body)
			e.Type = fmt.Sprintf("bench.%d", i%size.by)
			req.Events = append(req.Events, e)
		}
		return batchErr(client.BatchPublish(ctx, req))
	})
	if err != nil {
		return err
	}
	row.PublishPerSecond = float64(total) / time.Since(begin).Seconds()
	row.RSSAfterPublish = rss(p.cmd.Process.Pid)
	return nil
}

func laneName(i int) string { return fmt.Sprintf("namespaces/%s/subscriptions/sub-%d", namespace, i) }

// unpile looks at the server after its restart, lets the backlog go, and waits until all of it has arrived and is
// recorded.
func (b *bench) unpile(ctx context.Context, p *serverProcess, size product, row *backlogRow) error {
	if err := sleep(ctx, 10*time.Second); err != nil {
		return err
	}
	row.RSSAfterRestart = rss(p.cmd.Process.Pid)
	got, err := grapnelv1.NewNamespaceServiceClient(p.conn).GetNamespace(ctx, &grapnelv1.GetNamespaceRequest{Name: "namespaces/" + namespace})
	if err != nil {
		return err
	}
	total := size.by * size.of
	if open := int(got.GetNamespace().GetUsage().GetOpenDeliveries()); open != total {
		return fmt.Errorf("after the restart %d deliveries wait, %d were published", open, total)
	}
	if err := b.sink.reset(); err != nil {
		return err
	}
	begin := time.Now()
	subs := grapnelv1.NewSubscriptionServiceClient(p.conn)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := concurrently(gctx, creators, size.by, func(ctx context.Context, i int) error {
			_, err := subs.ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: laneName(i)})
			return err
		})
		row.Resume = time.Since(begin).Seconds()
		return err
	})
	g.Go(func() error {
		_, err := b.sink.await(gctx, int64(total))
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if err := p.recorded(ctx, namespace); err != nil {
		return err
	}
	row.DrainPerSecond = float64(total) / time.Since(begin).Seconds()
	row.RSSAfterDrain = rss(p.cmd.Process.Pid)
	return p.stop()
}

func (r *backlogReport) print(out io.Writer) {
	fmt.Fprintln(out, "backlog          RSS in MiB; restart after kill -9; drained from the first resume to the last recorded")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "lanes x waiting\tlanes/s\tpublished/s\tRSS\tafter restart\tdrained\tpeak\tVmHWM\trestart s\tresume s\tdrained/s\t")
	for _, row := range r.Rows {
		fmt.Fprintf(w, "%dx%d\t%.0f\t%.0f\t%.0f\t%.0f\t%.0f\t%.0f\t%.0f\t%.2f\t%.1f\t%.0f\t\n", row.Lanes, row.Waiting, row.CreatePerSecond, row.PublishPerSecond,
			row.RSSAfterPublish, row.RSSAfterRestart, row.RSSAfterDrain, row.Peak, row.HighWater, row.Restart, row.Resume, row.DrainPerSecond)
	}
	_ = w.Flush()
	for _, row := range r.Rows {
		if row.Incomplete != "" {
			fmt.Fprintf(out, "                 %dx%d is incomplete: %s\n", row.Lanes, row.Waiting, row.Incomplete)
		}
	}
}
