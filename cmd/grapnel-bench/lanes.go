package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"sync"
	"text/tabwriter"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// lanesRow is a server with very many subscriptions, each of which has had a delivery.
type lanesRow struct {
	Name string `json:"name"`
	// Wanted is how many subscriptions were asked for; Made are fewer when the time for it was over.
	Wanted int `json:"wanted"`
	Made   int `json:"made"`
	// PerSecond are the rates of creation in each tenth of those wanted; LastToFirst is that of the last whole tenth
	// over that of the first.
	PerSecond   []float64 `json:"created_per_second"`
	LastToFirst float64   `json:"last_to_first"`
	// Alone is publishing before there is anything else, Beside beside the creation, Idle once all is made.
	Alone  traffic `json:"alone"`
	Beside traffic `json:"beside_creation"`
	Idle   traffic `json:"with_all_idle"`
	// TouchPerSecond is the rate of one delivery to each.
	TouchPerSecond float64 `json:"one_delivery_each_per_second"`
	RSSIdle        float64 `json:"rss_idle_mib"`
	memoryReport
	// Restart is after kill -9, from the start of the process to its ready line and to the next delivery's arrival.
	Restart       float64 `json:"restart_seconds"`
	FirstDelivery float64 `json:"restart_to_first_delivery_seconds"`
	RSSRestarted  float64 `json:"rss_restarted_mib"`
	// Sweeps are nil when the server has no way to ask for one.
	Sweeps     []sweepReport `json:"sweeps,omitempty"`
	Incomplete string        `json:"incomplete,omitempty"`
}

// traffic is publishing at a steady rate: how long the calls took, and from publish to arrival.
type traffic struct {
	Publish  spread `json:"publish"`
	Delivery spread `json:"delivery"`
}

// sweepReport is one sweep of retention.
type sweepReport struct {
	// Rows is how many deliveries there were for it to erase.
	Rows    int     `json:"rows"`
	Seconds float64 `json:"seconds"`
	During  traffic `json:"during"`
	After   traffic `json:"after"`
	// Restart is the slower of two after the sweep, each after kill -9: what the sweep wrote is in the log at the first
	// one, and in tables at the second.
	Restart float64 `json:"restart_seconds"`
}

type lanesReport struct {
	Rows []lanesRow `json:"rows"`
}

// shape is where the many subscriptions live.
type shape struct {
	name string
	n    int
	// make makes the i-th.
	make func(ctx context.Context, p *serverProcess, i int) error
	// touches is how many events it takes to reach each of the first n once, and touch publishes the k-th of them; every
	// round has events of its own.
	touches func(n int) int
	touch   func(ctx context.Context, p *serverProcess, round, k int) error
}

// group is how many subscriptions of one namespace one event reaches.
const group = 1000

// lanes measures what very many subscriptions cost, in one namespace and in one each.
func (b *bench) lanes(ctx context.Context) error {
	r := &lanesReport{}
	b.report.Lanes = r
	for _, s := range []shape{b.oneNamespace(), b.namespaceEach()} {
		if s.n == 0 {
			continue
		}
		row, err := b.lanesRun(ctx, s)
		if err != nil {
			row.Incomplete = err.Error()
		}
		r.Rows = append(r.Rows, row)
		if err != nil && (!stopped(err) || ctx.Err() != nil) {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// unsignedTo is a subscription that needs no key.
func unsignedTo(uri string, types ...string) *grapnelv1.Subscription {
	return &grapnelv1.Subscription{Uri: uri, EventTypes: types, Signers: []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}}
}

func (b *bench) oneNamespace() shape {
	body := payload(b.payload, 1, time.Time{})
	return shape{
		name: "in one namespace", n: b.subscriptions,
		make: func(ctx context.Context, p *serverProcess, i int) error {
			_, err := grapnelv1.NewSubscriptionServiceClient(p.conn).CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
				Parent: "namespaces/" + namespace, SubscriptionId: fmt.Sprintf("lane-%d", i),
				Subscription: unsignedTo(b.sink.url(fmt.Sprintf("/plain/%d", i)), fmt.Sprintf("tenant%d.*", i), fmt.Sprintf("group%d.*", i/group)),
			})
			return err
		},
		touches: func(n int) int { return (n + group - 1) / group },
		touch: func(ctx context.Context, p *serverProcess, round, k int) error {
			return publishOne(ctx, p, namespace, fmt.Sprintf("touch-%d-%d", round, k), fmt.Sprintf("group%d.touched", k), body)
		},
	}
}

func (b *bench) namespaceEach() shape {
	body := payload(b.payload, 1, time.Time{})
	return shape{
		name: "in a namespace each", n: b.namespaces,
		make: func(ctx context.Context, p *serverProcess, i int) error {
			ns := fmt.Sprintf("tenant-%d", i)
			_, err := grapnelv1.NewNamespaceServiceClient(p.conn).CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{NamespaceId: ns})
			if err != nil {
				return err
			}
			_, err = grapnelv1.NewSubscriptionServiceClient(p.conn).CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
				Parent: "namespaces/" + ns, SubscriptionId: "lane", Subscription: unsignedTo(b.sink.url(fmt.Sprintf("/plain/%d", i))),
			})
			return err
		},
		touches: func(n int) int { return n },
		touch: func(ctx context.Context, p *serverProcess, round, k int) error {
			return publishOne(ctx, p, fmt.Sprintf("tenant-%d", k), fmt.Sprintf("touch-%d", round), "lane.touched", body)
		},
	}
}

func publishOne(ctx context.Context, p *serverProcess, ns, id, eventType string, body []byte) error {
	_, err := grapnelv1.NewPublishServiceClient(p.conn).Publish(ctx, &grapnelv1.PublishRequest{
		Parent: "namespaces/" + ns,
		Event: &grapnelv1.Event{
			Id: id, Type: eventType, DataContentType: "application/json", Payload: &grapnelv1.Event_Data{Data: body},
		},
	})
	return err
}

// laneRun is one shape in the making.
type laneRun struct {
	*bench
	shape
	row *lanesRow
	dir string
	p   *serverProcess
	w   *memoryWatch
	// life ends with the server.
	life context.Context
	// firsts numbers the events that are published after restarts.
	firsts int
}

func (b *bench) lanesRun(ctx context.Context, s shape) (row lanesRow, err error) {
	row = lanesRow{Name: s.name, Wanted: s.n}
	// Creation alone may take as long as the limit; what follows gets as much again.
	ctx, cancel := context.WithTimeout(ctx, 2*b.limit)
	defer cancel()
	l := &laneRun{bench: b, shape: s, row: &row, dir: b.dataDir()}
	defer func() { _ = os.RemoveAll(l.dir) }()
	if err := l.start(ctx); err != nil {
		return row, err
	}
	defer func() { l.end() }()
	defer func() { err = why(l.life, err) }()
	b.progress("%d subscriptions %s", s.n, s.name)
	if err := l.p.prepare(l.life, namespace, b.sink.url("/s/probe")); err != nil {
		return row, err
	}
	if row.Alone, err = l.observe(l.life); err != nil {
		return row, err
	}
	if err := l.create(); err != nil {
		return row, err
	}
	b.progress("%d made; one delivery to each", row.Made)
	begin := time.Now()
	if err := l.touchAll(1); err != nil {
		return row, err
	}
	row.TouchPerSecond = float64(row.Made) / time.Since(begin).Seconds()
	if row.Idle, err = l.observe(l.life); err != nil {
		return row, err
	}
	if err := sleep(l.life, 10*time.Second); err != nil {
		return row, err
	}
	row.RSSIdle = rss(l.p.cmd.Process.Pid)
	b.progress("restart")
	if row.Restart, row.FirstDelivery, err = l.restart(ctx); err != nil {
		return row, err
	}
	if err := sleep(l.life, 10*time.Second); err != nil {
		return row, err
	}
	row.RSSRestarted = rss(l.p.cmd.Process.Pid)
	return row, l.sweeps(ctx)
}

func (l *laneRun) start(ctx context.Context) error {
	p, err := l.serve(ctx, l.grapnel, l.dir)
	if err != nil {
		return err
	}
	l.p = p
	l.w, l.life = p.watch(ctx, l.mostMemory)
	return nil
}

func (l *laneRun) end() {
	if l.p == nil {
		return
	}
	l.row.add(l.w.stop())
	l.p.kill()
	l.p = nil
}

// restart kills the server and starts it again; it returns the time until it was ready, and until a delivery arrived.
func (l *laneRun) restart(ctx context.Context) (ready, first float64, err error) {
	l.end()
	if err := l.sink.reset(); err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	if err := l.start(ctx); err != nil {
		return 0, 0, err
	}
	l.firsts++
	id := fmt.Sprintf("first-%d", l.firsts)
	if err := publishOne(l.life, l.p, namespace, id, "bench.event", payload(l.payload, 1, time.Time{})); err != nil {
		return 0, 0, err
	}
	if _, err := l.sink.await(l.life, 1); err != nil {
		return 0, 0, err
	}
	return l.p.ready.Seconds(), time.Since(begin).Seconds(), nil
}

// observe publishes to the probe's subscription for some seconds.
func (l *laneRun) observe(ctx context.Context) (traffic, error) {
	return l.observeUntil(ctx, l.latencyFor/2, nil)
}

// observeUntil publishes until d is over or, when work is given, until work has returned.
func (l *laneRun) observeUntil(ctx context.Context, d time.Duration, work func(context.Context) error) (traffic, error) {
	if err := l.sink.reset(); err != nil {
		return traffic{}, err
	}
	l.probes++
	series := l.probes
	pr := newProbe(l.p, l.payload, func(int64) (string, string) { return namespace, "bench.event" })
	pr.sent = int64(series) * 100_000_000 // no two series of a run have an event in common
	run, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	var failed error
	if work != nil {
		wg.Go(func() {
			failed = work(ctx)
			stop()
		})
	}
	sent := pr.run(run, l.latencyRate, d, time.Minute)
	wg.Wait()
	if failed != nil {
		return traffic{}, failed
	}
	calls, err := pr.result()
	if err != nil {
		return traffic{}, fmt.Errorf("publish to the probe: %w", err)
	}
	if _, err := l.sink.await(ctx, sent); err != nil {
		return traffic{}, fmt.Errorf("the probe's deliveries: %w", err)
	}
	st, err := l.sink.stats(true)
	if err != nil {
		return traffic{}, err
	}
	return traffic{Publish: calls, Delivery: spreadOf(st.Latencies)}, nil
}

// create makes the subscriptions in tenths, beside the probe, for as long as the limit allows.
func (l *laneRun) create() error {
	work := func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, l.limit)
		defer cancel()
		for tenth := range 10 {
			from, to := l.n*tenth/10, l.n*(tenth+1)/10
			begin := time.Now()
			made, err := concurrently(ctx, creators, to-from, func(ctx context.Context, i int) error { return l.make(ctx, l.p, from+i) })
			l.row.PerSecond = append(l.row.PerSecond, float64(made)/time.Since(begin).Seconds())
			l.progress("%d made, %.0f/s", from+made, l.row.PerSecond[tenth])
			if err == nil {
				l.row.Made, l.row.LastToFirst = to, l.row.PerSecond[tenth]/l.row.PerSecond[0]
				continue
			}
			if ctx.Err() != nil && l.life.Err() == nil {
				return nil // as many as the limit allowed; the last tenth counts for nothing
			}
			return err
		}
		return nil
	}
	var err error
	l.row.Beside, err = l.observeUntil(l.life, 2*l.limit, work)
	return err
}

// touchAll has one delivery go to each lane that was made, and waits until all have arrived.
func (l *laneRun) touchAll(round int) error {
	if l.row.Made == 0 {
		return errors.New("not a tenth of the subscriptions was made within the limit")
	}
	if err := l.sink.reset(); err != nil {
		return err
	}
	_, err := concurrently(l.life, creators, l.touches(l.row.Made), func(ctx context.Context, k int) error {
		return l.touch(ctx, l.p, round, k)
	})
	if err != nil {
		return err
	}
	_, err = l.sink.await(l.life, int64(l.row.Made))
	return err
}

// sweeps measures a sweep of retention with nothing to do, and one with many rows, when the server can be asked for one:
// POST /debug/sweep on the administrator's address, which answers when the sweep has ended; keep=1s stands in for the
// retention of every namespace.
func (l *laneRun) sweeps(ctx context.Context) error {
	err := l.sweepWith(ctx, 0, 0)
	if errors.Is(err, errNoSweep) {
		return nil
	}
	if err != nil {
		return err
	}
	rounds := max(1, l.sweepRows/l.row.Made)
	l.progress("%d rows to sweep", rounds*l.row.Made)
	for round := range rounds {
		if err := l.touchAll(2 + round); err != nil {
			return err
		}
	}
	if err := sleep(l.life, 2*time.Second); err != nil { // all is older than keep then
		return err
	}
	return l.sweepWith(ctx, (1+rounds)*l.row.Made, time.Second)
}

// sweepWith has the server sweep beside the probe, and sees how it is afterwards. A sweep with nothing to do is over before
// a probe notices, so there is one a second for some seconds, and the slowest counts.
func (l *laneRun) sweepWith(ctx context.Context, rows int, keep time.Duration) error {
	s := sweepReport{Rows: rows}
	var err error
	s.During, err = l.observeUntil(l.life, l.limit, func(ctx context.Context) error {
		for first := time.Now(); ; {
			begin := time.Now()
			err := l.p.sweep(ctx, keep)
			s.Seconds = max(s.Seconds, time.Since(begin).Seconds())
			if err != nil || rows > 0 || time.Since(first) > l.latencyFor/2 {
				return err
			}
			if err := sleep(ctx, time.Second); err != nil { // nobody sweeps all the time
				return err
			}
		}
	})
	if err != nil {
		return err
	}
	if s.After, err = l.observe(l.life); err != nil {
		return err
	}
	for range 2 {
		ready, _, err := l.restart(ctx)
		if err != nil {
			return err
		}
		s.Restart = max(s.Restart, ready)
	}
	l.row.Sweeps = append(l.row.Sweeps, s)
	return nil
}

// errNoSweep says that the server cannot be asked for a sweep.
var errNoSweep = errors.New("the server does not sweep when asked")

// sweep asks for a sweep and returns when it has ended. With keep, it stands in for the retention of each namespace.
func (p *serverProcess) sweep(ctx context.Context, keep time.Duration) error {
	u := url.URL{Scheme: "http", Host: p.admin, Path: "/debug/sweep"}
	if keep > 0 {
		u.RawQuery = url.Values{"keep": {keep.String()}}.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	said, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
	switch {
	case resp.StatusCode == http.StatusNotFound, resp.StatusCode == http.StatusMethodNotAllowed:
		return errNoSweep
	case resp.StatusCode/100 != 2:
		return fmt.Errorf("sweep: %s: %s", resp.Status, said)
	}
	return nil
}

func (r *lanesReport) print(out io.Writer) {
	for _, row := range r.Rows {
		fmt.Fprintf(out, "lanes            %d of %d subscriptions %s: created %.0f/s in the first tenth, %.0f/s in the last (%.2f)\n",
			row.Made, row.Wanted, row.Name, first(row.PerSecond), row.LastToFirst*first(row.PerSecond), row.LastToFirst)
		fmt.Fprintf(out, "                 RSS idle %.0f MiB, %.0f MiB after the restart, peak %.0f MiB; restart %.2fs, first delivery after %.2fs; one delivery to each at %.0f/s\n",
			row.RSSIdle, row.RSSRestarted, row.Peak, row.Restart, row.FirstDelivery, row.TouchPerSecond)
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(w, "\tsamples\tpublish p50 ms\tp99\tmax\tp99 to alone\tdelivery p50 ms\tp99\tmax\tp99 to alone\t")
		line := func(name string, t traffic) {
			fmt.Fprintf(w, "%s\t%d\t%.1f\t%.1f\t%.1f\t%.2f\t%.1f\t%.1f\t%.1f\t%.2f\t\n", name, t.Publish.Samples,
				t.Publish.P50, t.Publish.P99, t.Publish.Max, ratio(t.Publish.P99, row.Alone.Publish.P99),
				t.Delivery.P50, t.Delivery.P99, t.Delivery.Max, ratio(t.Delivery.P99, row.Alone.Delivery.P99))
		}
		line("alone", row.Alone)
		line("beside creation", row.Beside)
		line("with all idle", row.Idle)
		for _, s := range row.Sweeps {
			line(fmt.Sprintf("sweep of %d rows", s.Rows), s.During)
			line("after it", s.After)
		}
		_ = w.Flush()
		for _, s := range row.Sweeps {
			fmt.Fprintf(out, "                 sweep of %d rows: %.2fs; restart after it %.2fs\n", s.Rows, s.Seconds, s.Restart)
		}
		switch {
		case row.Incomplete != "":
			fmt.Fprintf(out, "                 incomplete: %s\n", row.Incomplete)
		case len(row.Sweeps) == 0:
			fmt.Fprintln(out, "                 no sweeps: this server does not sweep when asked (POST /debug/sweep on its administrator's address)")
		}
	}
}

func first(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	return all[0]
}

func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}
