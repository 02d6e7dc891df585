package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// ailment is what the neighbours of healthy receivers suffer from.
type ailment struct {
	letter, what string
	// how is the sink's word for it, and on where it has it.
	how string
	on  func(*sinkProcess) string
	// receivers are as many, who are sent rate events a second, all together.
	receivers, rate int
	// healthy is how many well ones there are, with spaces namespaces; 0: as -healthy says, in one.
	healthy, spaces int
}

func ailments() []ailment {
	sinks := func(s *sinkProcess) string { return s.addr }
	return []ailment{
		{"a", "1 hangs, 10,000/s to it", "20s", sinks, 1, 10_000, 0, 1},
		{"b", "200 hang", "20s", sinks, 200, 2000, 0, 1},
		{"c", "2,000 hang", "20s", sinks, 2000, 2000, 0, 1},
		{"d", "200 answer 503", "503", sinks, 200, 2000, 0, 1},
		{"e", "200 take 5 s", "late", sinks, 200, 2000, 0, 1},
		{"f", "200 refuse", "refused", func(s *sinkProcess) string { return s.shut }, 200, 2000, 0, 1},
		{"g", "200 drip", "drip", sinks, 200, 2000, 0, 1},
		{"h", "500 on one host that hangs", "20s", func(s *sinkProcess) string { return s.other }, 500, 2000, 0, 1},
		{"i", "10,000 of one namespace hang", "20s", sinks, 10_000, 2000, 100, 100},
		// Nobody is sick: what the same events cost healthy ones that are for others who are well.
		{"w", "2,000 are well", "well", sinks, 2000, 2000, 0, 1},
	}
}

func ailmentNames() string {
	names := ""
	for _, a := range ailments() {
		names += a.letter
	}
	return names
}

func ailmentList() string {
	var list []string
	for _, a := range ailments() {
		list = append(list, a.letter+" "+a.what)
	}
	return strings.Join(list, ", ")
}

// neighboursRow is one run: healthy receivers with an event a second each, alone and then beside sick ones, who recover
// at the end.
type neighboursRow struct {
	Ailment string   `json:"ailment"`
	Healthy int      `json:"healthy"`
	Alone   punctual `json:"alone"`
	Beside  punctual `json:"beside"`
	// P99Ratio is that beside over that alone.
	P99Ratio float64 `json:"p99_ratio"`
	// Newcomer is when a healthy subscription that was created among sick ones got its first event, in milliseconds.
	Newcomer float64 `json:"newcomer_ms"`
	// Sick is how many deliveries were for the sick ones, Visits how many requests they got before the recovery, Missing how many of them never arrived, Drained how long all
	// took after the recovery, and Most the requests that one of them had at once from then on.
	Sick    int64   `json:"sick_deliveries"`
	Visits  int64   `json:"sick_requests"`
	Missing int64   `json:"sick_missing"`
	Drained float64 `json:"drained_seconds"`
	Most    int     `json:"most_in_flight"`
	memoryReport
	Incomplete string `json:"incomplete,omitempty"`
}

type neighboursReport struct {
	Rows []neighboursRow `json:"rows"`
}

// sickInFlight is what a sick receiver takes at once.
const sickInFlight = 16

// neighbours measures what healthy receivers notice of sick ones, one ailment after the other.
func (b *bench) neighbours(ctx context.Context) error {
	r := &neighboursReport{}
	b.report.Neighbours = r
	var errs error
	for _, a := range ailments() {
		if !strings.Contains(b.ailments, a.letter) {
			continue
		}
		b.progress("neighbours: %s", a.what)
		row, err := b.neighboursRun(ctx, a)
		if err != nil {
			row.Incomplete = err.Error()
			errs = errors.Join(errs, fmt.Errorf("%s: %w", a.what, err))
		}
		r.Rows = append(r.Rows, row)
		if ctx.Err() != nil {
			break
		}
	}
	return errs
}

func (b *bench) neighboursRun(ctx context.Context, a ailment) (row neighboursRow, err error) {
	if a.healthy == 0 {
		a.healthy = b.healthy
	}
	row = neighboursRow{Ailment: a.what, Healthy: a.healthy}
	ctx, cancel := context.WithTimeout(ctx, b.limit)
	defer cancel()
	own := *b // with a sink of its own, which begins sick
	if own.sink, err = startSink(ctx); err != nil {
		return row, err
	}
	defer own.sink.stop()
	own.healthy = a.healthy
	p, err := b.serve(ctx, b.grapnel, b.dataDir())
	if err != nil {
		return row, err
	}
	defer p.kill()
	w, ctx := p.watch(ctx, b.mostMemory)
	defer func() { row.add(w.stop()); err = why(ctx, err) }()
	steady, err := own.wellAndSick(ctx, p, a)
	if err != nil {
		return row, err
	}
	steady.run(ctx, a.healthy, warmUp, soon)
	if row.Alone, err = own.punctuality(ctx, steady); err != nil {
		return row, err
	}
	feeding, stop := context.WithCancel(ctx)
	defer stop()
	type outcome struct {
		n   int64
		err error
	}
	fed, arrived := make(chan outcome, 1), make(chan outcome, 1)
	go func() {
		n, err := own.feedSick(feeding, p, a)
		fed <- outcome{n, err}
	}()
	go func() {
		_ = sleep(ctx, b.hangingFor/2)
		took, err := newcomer(ctx, p)
		arrived <- outcome{int64(took), err}
	}()
	row.Beside, err = own.punctuality(ctx, steady)
	stop()
	sent, came := <-fed, <-arrived
	if err := errors.Join(err, sent.err, came.err); err != nil {
		return row, err
	}
	row.P99Ratio = ratio(row.Beside.P99, row.Alone.P99)
	row.Newcomer, row.Sick = float64(came.n)/1e6, sent.n
	ill, err := own.sink.sickStats()
	if err != nil {
		return row, err
	}
	row.Visits = ill.Visits
	return row, own.recover(ctx, &row)
}

// recover heals all, and waits for what is theirs. What the healthy ones got since the reset is all of theirs.
func (b *bench) recover(ctx context.Context, row *neighboursRow) error {
	if err := b.sink.heal(ctx); err != nil {
		return err
	}
	begin := time.Now()
	want := row.Beside.Published - row.Beside.Missing + row.Sick
	st, err := b.sink.awaitPatiently(ctx, want, 2*time.Minute)
	row.Drained, row.Missing = time.Since(begin).Seconds(), want-st.Unique
	if err != nil {
		return err
	}
	ill, err := b.sink.sickStats()
	row.Most = ill.Most
	if err == nil && row.Most > sickInFlight {
		err = fmt.Errorf("a receiver that takes %d requests at once had %d", sickInFlight, row.Most)
	}
	return err
}

// wellAndSick makes the subscriptions, and returns what publishes to the healthy ones.
func (b *bench) wellAndSick(ctx context.Context, p *serverProcess, a ailment) (*probe, error) {
	spaceOf := func(i int64) string {
		if a.spaces > 1 {
			return fmt.Sprintf("well-%d", i%int64(a.spaces))
		}
		return namespace
	}
	for i := range a.spaces {
		if err := p.prepare(ctx, spaceOf(int64(i))); err != nil {
			return nil, err
		}
	}
	for i := range a.healthy {
		ns := spaceOf(int64(i))
		_, err := grapnelv1.NewSubscriptionServiceClient(p.conn).CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/" + ns, SubscriptionId: fmt.Sprintf("well-%d", i),
			Subscription: signed(ns, b.sink.url(fmt.Sprintf("/s/%d", i)), fmt.Sprintf("bench.%d", i)),
		})
		if err != nil {
			return nil, err
		}
	}
	if err := p.prepare(ctx, "sick"); err != nil {
		return nil, err
	}
	_, err := p.subscribeAs(ctx, "sick", "sick", a.receivers, func(i int) *grapnelv1.Subscription {
		s := signed("sick", fmt.Sprintf("http://%s/sick/%s/%d", a.on(b.sink), a.how, i), fmt.Sprintf("sick.%d", i))
		s.MaxInFlight = sickInFlight
		s.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 100}
		for range 99 {
			s.RetryPolicy.Schedule = append(s.RetryPolicy.Schedule, durationpb.New(5*time.Second))
		}
		return s
	})
	return newProbe(p, b.payload, func(n int64) (string, string) {
		i := n % int64(a.healthy)
		return spaceOf(i), fmt.Sprintf("bench.%d", i)
	}), err
}

// feedSick publishes to the sick ones in turn until ctx ends, and returns how many were accepted.
func (b *bench) feedSick(ctx context.Context, p *serverProcess, a ailment) (int64, error) {
	client := grapnelv1.NewPublishServiceClient(p.conn)
	body := payload(b.payload, 1, time.Time{})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var sent int64
	for begin := time.Now(); ; {
		for due := int64(time.Since(begin).Seconds() * float64(a.rate)); sent < due && ctx.Err() == nil; {
			req := &grapnelv1.BatchPublishRequest{Parent: "namespaces/sick"}
			for range min(batchSize, due-sent) {
				e := event(sent, body)
				e.Type = fmt.Sprintf("sick.%d", sent%int64(a.receivers))
				req.Events = append(req.Events, e)
				sent++
			}
			// What is under way at the end is waited for: it is counted.
			if err := batchErr(client.BatchPublish(context.WithoutCancel(ctx), req)); err != nil {
				return sent, fmt.Errorf("publish to sick receivers: %w", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return sent, nil
		}
	}
}

// newcomer subscribes another healthy receiver, and returns how long its first event takes.
func newcomer(ctx context.Context, p *serverProcess) (time.Duration, error) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	arrived := make(chan time.Time, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		select {
		case arrived <- time.Now():
		default:
		}
		w.WriteHeader(http.StatusNoContent)
	})}
	go func() { _ = srv.Serve(lis) }()
	defer srv.Close()
	_, err = grapnelv1.NewSubscriptionServiceClient(p.conn).CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/sick", SubscriptionId: "newcomer", Subscription: signed("sick", "http://"+lis.Addr().String()+"/", "newcomer"),
	})
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	e := event(0, payload(100, 0, begin))
	e.Id, e.Type = "newcomer", "newcomer"
	_, err = grapnelv1.NewPublishServiceClient(p.conn).Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/sick", Event: e})
	if err != nil {
		return 0, err
	}
	select {
	case at := <-arrived:
		return at.Sub(begin), nil
	case <-time.After(30 * time.Second):
		return 0, errors.New("a new healthy subscription got nothing within 30 s")
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (r *neighboursReport) print(out io.Writer) {
	fmt.Fprintln(out, "neighbours       healthy receivers at 1/s each, beside sick ones, who get 2,000/s all together and recover at the end; publish to arrival")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "beside\thealthy\tp99 alone\tp99\tratio\twithin 1 s\tmissing\tnewcomer ms\tsick deliveries\trequests to sick\tmissing\tdrained s\tmost in flight\tpeak RSS MiB\t")
	for _, r := range r.Rows {
		fmt.Fprintf(w, "%s\t%d\t%.1f\t%.1f\t%.2f\t%.2f%%\t%d\t%.0f\t%d\t%d\t%d\t%.1f\t%d\t%.0f\t\n", r.Ailment, r.Healthy, r.Alone.P99, r.Beside.P99,
			r.P99Ratio, 100*r.Beside.Soon, r.Beside.Missing, r.Newcomer, r.Sick, r.Visits, r.Missing, r.Drained, r.Most, r.Peak)
	}
	_ = w.Flush()
	for _, r := range r.Rows {
		if r.Incomplete != "" {
			fmt.Fprintf(out, "%s: NOT TO ITS END: %s\n", r.Ailment, r.Incomplete)
		}
	}
}
