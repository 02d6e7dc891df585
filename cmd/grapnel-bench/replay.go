package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// replayReport is what a replay does to live traffic, and whether one that is killed makes each delivery once.
type replayReport struct {
	Events int     `json:"events"`
	Rate   float64 `json:"rate"`
	// Made is how many the job has made a second, Took how long it took.
	Made float64 `json:"made_per_second"`
	Took float64 `json:"seconds"`
	// Alone and Beside are the latencies of live traffic, without and beside the job.
	Alone  spread `json:"alone"`
	Beside spread `json:"beside"`
	memoryReport
	Killed *killedReplay `json:"killed,omitempty"`
}

// killedReplay is a job of a server that was killed.
type killedReplay struct {
	Events int `json:"events"`
	Kills  int `json:"kills"`
	// Created is what the job says, Deliveries what is listed of it, Events those that have one.
	Created    int64 `json:"created"`
	Deliveries int   `json:"deliveries"`
	Distinct   int   `json:"distinct_events"`
}

const (
	replayRun = "namespaces/" + namespace + "/replayJobs/run"
	liveEvery = 10 * time.Millisecond
	// liveMost is how long live events may take.
	liveMost = 30 * time.Second
)

// replay measures a replay of events that a new subscription has missed beside live traffic, then has a smaller one
// survive kills.
func (b *bench) replay(ctx context.Context) error {
	r := &replayReport{Events: b.replayed, Rate: b.replayRate}
	b.report.Replay = r
	if err := b.replayBeside(ctx, r); err != nil {
		return err
	}
	if b.replayKilled == 0 {
		return nil
	}
	r.Killed = &killedReplay{Events: b.replayKilled, Kills: 3}
	return b.replayOverKills(ctx, r.Killed)
}

// missed publishes events that nobody wants, and makes the subscription that has missed them.
func (b *bench) missed(ctx context.Context, p *serverProcess, n int) error {
	client, body := grapnelv1.NewPublishServiceClient(p.conn), payload(b.payload, 1, time.Time{})
	_, err := concurrently(ctx, 4, (n+batchSize-1)/batchSize, func(ctx context.Context, call int) error {
		req := &grapnelv1.BatchPublishRequest{Parent: "namespaces/" + namespace}
		for i := call * batchSize; i < min((call+1)*batchSize, n); i++ {
			e := event(int64(i), body)
			e.Type = "old.event"
			req.Events = append(req.Events, e)
		}
		return batchErr(client.BatchPublish(ctx, req))
	})
	if err != nil {
		return err
	}
	_, err = p.subscribeAs(ctx, namespace, "late", 1, func(int) *grapnelv1.Subscription {
		return signed(namespace, b.sink.url("/s/late"), "old.*")
	})
	return err
}

func (b *bench) startReplay(ctx context.Context, p *serverProcess, rate float64) error {
	_, err := grapnelv1.NewReplayServiceClient(p.conn).CreateReplayJob(ctx, &grapnelv1.CreateReplayJobRequest{
		Parent: "namespaces/" + namespace, ReplayJobId: "run", ReplayJob: &grapnelv1.ReplayJob{
			Subscription: "namespaces/" + namespace + "/subscriptions/late-0", MissingOnly: true, MaxRate: rate,
			StartTime: timestamppb.New(time.Now().Add(-24 * time.Hour)),
		},
	})
	return err
}

// awaitReplay waits until the job has ended and all that it made is recorded.
func (b *bench) awaitReplay(ctx context.Context, p *serverProcess) (*grapnelv1.ReplayJob, error) {
	client := grapnelv1.NewReplayServiceClient(p.conn)
	for {
		got, err := client.WaitReplayJob(ctx, &grapnelv1.WaitReplayJobRequest{Name: replayRun, Timeout: durationpb.New(10 * time.Second)})
		if err != nil {
			return nil, err
		}
		switch job := got.GetReplayJob(); job.GetState() {
		case grapnelv1.ReplayJob_STATE_SUCCEEDED:
			return job, p.recorded(ctx, namespace)
		case grapnelv1.ReplayJob_STATE_FAILED, grapnelv1.ReplayJob_STATE_CANCELLED:
			return nil, fmt.Errorf("the job ended: %v", job)
		default:
			b.progress("replay: %d made, %d open %s", job.GetCreatedCount(), job.GetOpenCount(), job.GetWaitReason())
		}
	}
}

func (b *bench) replayBeside(ctx context.Context, r *replayReport) error {
	ctx, cancel := context.WithTimeout(ctx, b.limit)
	defer cancel()
	dir := b.dataDir()
	defer func() { _ = os.RemoveAll(dir) }()
	p, err := b.serve(ctx, b.grapnel, dir)
	if err != nil {
		return err
	}
	defer p.kill()
	w, life := p.watch(ctx, b.mostMemory)
	defer func() { r.add(w.stop()) }()
	if err := p.prepare(life, namespace); err != nil {
		return why(life, err)
	}
	if _, err := p.subscribeAs(life, namespace, "live", 1, func(int) *grapnelv1.Subscription {
		return signed(namespace, b.sink.url("/s/live"), "live.*")
	}); err != nil {
		return why(life, err)
	}
	b.progress("replay: publishing %d events", b.replayed)
	if err := b.missed(life, p, b.replayed); err != nil {
		return why(life, err)
	}
	first := int64(b.replayed)
	alone, stop := context.WithTimeout(life, b.latencyFor)
	defer stop()
	if r.Alone, first, err = b.live(life, alone, p, first); err != nil {
		return why(life, err)
	}
	b.progress("replay: live traffic alone: %+v", r.Alone)
	begin := time.Now()
	if err := b.startReplay(life, p, b.replayRate); err != nil {
		return why(life, err)
	}
	running, ended := context.WithCancel(life)
	defer ended()
	g, gctx := errgroup.WithContext(life)
	g.Go(func() error {
		defer ended()
		job, err := b.awaitReplay(gctx, p)
		if err != nil {
			return err
		}
		r.Took = time.Since(begin).Seconds()
		r.Made = float64(job.GetCreatedCount()) / r.Took
		if job.GetCreatedCount() != int64(b.replayed) {
			return fmt.Errorf("the job has made %d of %d", job.GetCreatedCount(), b.replayed)
		}
		return nil
	})
	g.Go(func() (err error) {
		r.Beside, _, err = b.live(gctx, running, p, first)
		return err
	})
	if err := g.Wait(); err != nil {
		return why(life, err)
	}
	return p.stop()
}

// live publishes to the live subscription until the time is over, and says how long events took to arrive.
func (b *bench) live(ctx, until context.Context, p *serverProcess, first int64) (spread, int64, error) {
	if err := b.sink.reset(); err != nil {
		return spread{}, first, err
	}
	client := grapnelv1.NewPublishServiceClient(p.conn)
	tick := time.NewTicker(liveEvery)
	defer tick.Stop()
	var g errgroup.Group
	n := int64(0)
	for until.Err() == nil && ctx.Err() == nil {
		<-tick.C
		e := event(first+n, payload(b.payload, n, time.Now()))
		e.Type = "live.event"
		g.Go(func() error {
			_, err := client.Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/" + namespace, Event: e})
			return err
		})
		n++
	}
	if err := errors.Join(g.Wait(), ctx.Err()); err != nil {
		return spread{}, first, err
	}
	for end := time.Now().Add(liveMost); ; {
		st, err := b.sink.stats(true)
		if err != nil {
			return spread{}, first, err
		}
		if int64(len(st.Latencies)) >= n {
			return spreadOf(st.Latencies), first + n, nil
		}
		if time.Now().After(end) {
			return spread{}, first, fmt.Errorf("%d of %d live events arrived", len(st.Latencies), n)
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return spread{}, first, err
		}
	}
}

// replayOverKills kills the server three times while a job goes on, and counts what it has made at its end.
func (b *bench) replayOverKills(ctx context.Context, r *killedReplay) error {
	ctx, cancel := context.WithTimeout(ctx, b.limit)
	defer cancel()
	dir := b.dataDir()
	defer func() { _ = os.RemoveAll(dir) }()
	p, err := b.serve(ctx, b.grapnel, dir)
	if err != nil {
		return err
	}
	defer func() { p.kill() }()
	if err := p.prepare(ctx, namespace); err != nil {
		return err
	}
	if err := b.missed(ctx, p, r.Events); err != nil {
		return err
	}
	if err := b.startReplay(ctx, p, b.replayRate); err != nil {
		return err
	}
	for kill := range r.Kills {
		if err := b.untilMade(ctx, p, int64(r.Events*(kill+1)/(r.Kills+1))); err != nil {
			return err
		}
		p.kill()
		b.progress("replay: killed %d times", kill+1)
		if p, err = b.serve(ctx, b.grapnel, dir); err != nil {
			return err
		}
	}
	job, err := b.awaitReplay(ctx, p)
	if err != nil {
		return err
	}
	r.Created = job.GetCreatedCount()
	seen := map[string]int{}
	client, token := grapnelv1.NewDeliveryServiceClient(p.conn), ""
	for {
		page, err := client.ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{
			Parent: "namespaces/" + namespace, PageSize: 1000, PageToken: token, Filter: "replay_job = run AND state = SUCCEEDED",
		})
		if err != nil {
			return err
		}
		for _, d := range page.GetDeliveries() {
			seen[d.GetEventUid()]++
			r.Deliveries++
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	r.Distinct = len(seen)
	if r.Created != int64(r.Events) || r.Deliveries != r.Events || r.Distinct != r.Events {
		return fmt.Errorf("of %d events the job has made %d, %d are listed, of %d events", r.Events, r.Created, r.Deliveries, r.Distinct)
	}
	return p.stop()
}

func (b *bench) untilMade(ctx context.Context, p *serverProcess, n int64) error {
	client := grapnelv1.NewReplayServiceClient(p.conn)
	for {
		got, err := client.GetReplayJob(ctx, &grapnelv1.GetReplayJobRequest{Name: replayRun})
		if err != nil {
			return err
		}
		if got.GetReplayJob().GetCreatedCount() >= n {
			return nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

func (r *replayReport) print(out io.Writer) {
	fmt.Fprintf(out, "replay           of %d events at %.0f/s to a new subscription, beside 100 live events/s; ms from publish to arrival\n", r.Events, r.Rate)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\tp50\tp99\tmax\tsamples\t")
	for _, row := range []struct {
		name string
		spread
	}{{"alone", r.Alone}, {"beside", r.Beside}} {
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.1f\t%d\t\n", row.name, row.P50, row.P99, row.Max, row.Samples)
	}
	_ = w.Flush()
	fmt.Fprintf(out, "                 %.0f/s made and delivered in %.0f s; RSS %.0f MiB at most\n", r.Made, r.Took, r.Peak)
	if k := r.Killed; k != nil {
		fmt.Fprintf(out, "                 killed %d times: of %d events %d made, %d listed, of %d events\n", k.Kills, k.Events, k.Created, k.Deliveries, k.Distinct)
	}
}
