package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// memoryRow is one run of a server, with its plugins, in bounded memory.
type memoryRow struct {
	Name  string `json:"name"`
	Limit int    `json:"limit_mib"`
	// Bounded says that a control group held the limit. Otherwise the server was killed when its own resident set
	// passed it, which is less strict: plugins are left out.
	Bounded bool `json:"cgroup"`
	// Lives are the starts of the server, OOM how many of them ended for want of memory.
	Lives int `json:"lives"`
	OOM   int `json:"oom_kills"`
	memoryReport
	// GroupPeak counts what the kernel counts, files in memory included.
	GroupPeak float64   `json:"cgroup_peak_mib,omitempty"`
	Restarts  []float64 `json:"restart_seconds"`
	Published int64     `json:"published"`
	// Refused are publishes without an acknowledgement while the server lived.
	Refused int64 `json:"refused"`
	// Publishing is how long the first life took events.
	Publishing float64 `json:"publishing_seconds"`
	Seconds    float64 `json:"seconds"`
	Incomplete string  `json:"incomplete,omitempty"`
}

type boundedReport struct {
	Rows []memoryRow `json:"rows"`
}

// confined are the lives of one server in bounded memory.
type confined struct {
	*bench
	row   *memoryRow
	dir   string
	group *memoryGroup
	p     *serverProcess
	w     *memoryWatch
	// life ends with the server.
	life context.Context
}

// memory measures two workloads that once took all memory there is.
func (b *bench) memory(ctx context.Context) error {
	r := &boundedReport{}
	b.report.Memory = r
	for _, w := range []struct {
		limit int
		run   func(*confined, context.Context) error
	}{{512, (*confined).hangingReceivers}, {256, (*confined).largeEvents}} {
		b.progress("memory of %d MiB", w.limit)
		row, err := b.confine(ctx, w.limit, w.run)
		if err != nil {
			row.Incomplete = err.Error()
		}
		r.Rows = append(r.Rows, row)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// confine runs a workload. That its server is ended for want of memory is a result and no error.
func (b *bench) confine(ctx context.Context, limit int, run func(*confined, context.Context) error) (memoryRow, error) {
	row := memoryRow{Limit: limit}
	c := &confined{bench: b, row: &row, dir: b.dataDir()}
	group, err := newMemoryGroup(limit)
	if err != nil {
		b.progress("no control group can be made, so the server is killed when it has taken %d MiB: %v", limit, err)
	} else {
		c.group, row.Bounded = group, true
	}
	ctx, cancel := context.WithTimeout(ctx, b.limit)
	defer cancel()
	begin := time.Now()
	err = c.start(ctx)
	if err == nil {
		err = run(c, ctx)
	}
	row.Seconds = time.Since(begin).Seconds()
	if c.group == nil {
		c.end()
		return row, err
	}
	row.OOM, row.GroupPeak = c.group.kills(), c.group.most()
	c.end()
	return row, errors.Join(err, c.group.emptied(ctx))
}

// start begins a life.
func (c *confined) start(ctx context.Context) error {
	begin := func(pid int) error { return nil }
	most := float64(c.row.Limit)
	if c.group != nil {
		begin, most = c.group.take, 0
	}
	c.row.Lives++
	p, err := startServerIn(ctx, c.grapnel, c.dir, begin, strings.Fields(c.serverFlags)...)
	if err != nil {
		return fmt.Errorf("life %d: %w", c.row.Lives, err)
	}
	if c.row.Lives > 1 {
		c.row.Restarts = append(c.row.Restarts, p.ready.Seconds())
	}
	c.p = p
	c.w, c.life = p.watch(ctx, most)
	return nil
}

// end ends a life with kill -9.
func (c *confined) end() {
	if c.p == nil {
		return
	}
	c.row.add(c.w.stop())
	if c.group == nil && errors.Is(context.Cause(c.life), errTooMuch) {
		c.row.OOM++
	}
	c.p.kill()
	c.p = nil
}

// endure waits, and reports whether the server lived all the time.
func (c *confined) endure(d time.Duration) bool { return sleep(c.life, d) == nil }

// hangingReceivers has forty events go to a thousand receivers that do not answer, and restarts the server while all of
// them wait.
func (c *confined) hangingReceivers(ctx context.Context) error {
	const receivers, events = 1000, 40
	c.row.Name = fmt.Sprintf("%d events to %d hanging receivers", events, receivers)
	if err := c.p.prepare(c.life, namespace); err != nil {
		return why(c.life, err)
	}
	_, err := c.p.subscribeTo(c.life, namespace, receivers, func(i int) *grapnelv1.Subscription {
		s := signed(namespace, c.sink.url(fmt.Sprintf("/slow/20s/%d", i)), "bench.*")
		s.MaxInFlight = 0
		return s
	})
	if err != nil {
		return why(c.life, err)
	}
	client, begin := grapnelv1.NewPublishServiceClient(c.p.conn), time.Now()
	for i := range int64(events) {
		_, err := client.Publish(c.life, &grapnelv1.PublishRequest{
			Parent: "namespaces/" + namespace, Event: event(i, payload(c.payload, i, time.Time{})),
		})
		if err != nil {
			return why(c.life, err)
		}
		c.row.Published++
	}
	c.row.Publishing = time.Since(begin).Seconds()
	c.endure(10 * time.Second)
	for range 3 {
		c.end()
		if err := c.start(ctx); err != nil {
			return err
		}
		c.endure(20 * time.Second)
	}
	return ctx.Err()
}

// largeEvents publishes a hundred events of 200 KB a second to a receiver that takes a second for each of its sixteen at
// a time.
func (c *confined) largeEvents(ctx context.Context) error {
	const rate, size = 100, 200_000
	c.row.Name = fmt.Sprintf("%d events/s of %d KB to a slow receiver for %v", rate, size/1000, c.memoryFor)
	if err := c.p.prepare(c.life, namespace, c.sink.url("/slow/1s/large")); err != nil {
		return why(c.life, err)
	}
	client := grapnelv1.NewPublishServiceClient(c.p.conn)
	run, cancel := context.WithTimeout(c.life, c.memoryFor)
	defer cancel()
	var published, refused atomic.Int64
	begin := time.Now()
	// As many callers as keep the rate when each call takes more than half a second.
	_, _ = concurrently(run, c.concurrency, int(rate*c.memoryFor.Seconds()), func(ctx context.Context, i int) error {
		if err := sleep(ctx, time.Until(begin.Add(time.Duration(i)*time.Second/rate))); err != nil {
			return err
		}
		_, err := client.Publish(ctx, &grapnelv1.PublishRequest{
			Parent: "namespaces/" + namespace, Event: event(int64(i), payload(size, int64(i), time.Time{})),
		})
		switch {
		case err == nil:
			published.Add(1)
		case ctx.Err() == nil:
			refused.Add(1)
		}
		return nil
	})
	c.row.Published, c.row.Refused = published.Load(), refused.Load()
	c.row.Publishing = time.Since(begin).Seconds()
	c.end()
	if err := c.start(ctx); err != nil {
		return err
	}
	c.endure(20 * time.Second)
	return ctx.Err()
}

func (r *boundedReport) print(out io.Writer) {
	for _, row := range r.Rows {
		held := "in a control group"
		if !row.Bounded {
			held = "killed when its RSS passed that, for want of a control group"
		}
		fmt.Fprintf(out, "memory           %s; %d MiB %s: %d lives, %d ended for want of memory; peak RSS %.0f MiB (VmHWM %.0f, group with files %.0f); slowest restart %.2fs; %d published, %d refused in %.0fs\n",
			row.Name, row.Limit, held, row.Lives, row.OOM, row.Peak, row.HighWater, row.GroupPeak, slices.Max(append(row.Restarts, 0)), row.Published, row.Refused, row.Publishing)
		if row.Incomplete != "" {
			fmt.Fprintf(out, "                 incomplete: %s\n", row.Incomplete)
		}
	}
}
