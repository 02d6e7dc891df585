package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// watchReport compares publishing alone with publishing while others watch the namespace.
type watchReport struct {
	Watchers int         `json:"watchers"`
	Rows     []*watchRow `json:"rows"`
}

type watchRow struct {
	Name  string      `json:"name"`
	Pairs []watchPair `json:"pairs"`
	// Ratio is the median of the pairs', of watched to alone deliveries a second.
	Ratio float64 `json:"ratio"`
}

type watchPair struct {
	Alone   throughput `json:"alone"`
	Watched throughput `json:"watched"`
	// Told are the changes that all who watch were told.
	Told int64 `json:"told"`
}

// quiet subscriptions get no events.
const quiet = 500

// watch publishes the same number of events twice: alone, and while others watch: many who wait for what does not happen,
// half of them for a subscription of their own and half for failures; and one who sees everything.
func (b *bench) watch(ctx context.Context) error {
	r := &watchReport{Watchers: b.watchers}
	for name, filters := range map[string]func(i int, uids []string) string{
		fmt.Sprintf("%d who wait", b.watchers): func(i int, uids []string) string {
			if i%2 == 0 {
				return "state = EXHAUSTED"
			}
			return fmt.Sprintf("subscription_uid = %q", uids[i/2%len(uids)])
		},
		"one who sees all": nil,
	} {
		row := &watchRow{Name: name}
		var ratios []float64
		for range b.repeat {
			subs := []*grapnelv1.Subscription{signed(namespace, b.sink.url("/s/0"), "bench.*")}
			for i := range quiet {
				subs = append(subs, signed(namespace, b.sink.url(fmt.Sprintf("/s/%d", 1+i)), "quiet.*"))
			}
			alone, err := b.whileWatched(ctx, name+", alone", subs, nil)
			if err != nil {
				return err
			}
			var told atomic.Int64
			watched, err := b.whileWatched(ctx, name, subs, func(ctx context.Context, p *serverProcess) error {
				if filters == nil {
					return watchAll(ctx, p, 1, func(int) string { return "" }, &told)
				}
				uids, err := quietUIDs(ctx, p)
				if err != nil {
					return err
				}
				return watchAll(ctx, p, b.watchers, func(i int) string { return filters(i, uids) }, &told)
			})
			if err != nil {
				return err
			}
			row.Pairs = append(row.Pairs, watchPair{alone, watched, told.Load()})
			ratios = append(ratios, ratio(watched.PerSecond, alone.PerSecond))
		}
		row.Ratio = median(ratios)
		r.Rows = append(r.Rows, row)
	}
	b.report.Watch = r
	return nil
}

// whileWatched publishes to the first of the subscriptions while what begin has begun goes on.
func (b *bench) whileWatched(ctx context.Context, name string, subs []*grapnelv1.Subscription, begin func(context.Context, *serverProcess) error) (throughput, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	return b.oneBeside(ctx, b.grapnel, name, subs, 1, b.events, batch, begin)
}

// quietUIDs are the subscriptions that get no events.
func quietUIDs(ctx context.Context, p *serverProcess) ([]string, error) {
	page, err := grapnelv1.NewSubscriptionServiceClient(p.conn).ListSubscriptions(ctx, &grapnelv1.ListSubscriptionsRequest{
		Parent: "namespaces/" + namespace, PageSize: 1000,
	})
	if err != nil {
		return nil, err
	}
	var uids []string
	for _, s := range page.GetSubscriptions() {
		if slices.Contains(s.GetEventTypes(), "quiet.*") {
			uids = append(uids, s.GetUid())
		}
	}
	return uids, nil
}

// watchAll opens watches, and returns when all of them stand. They go on until ctx ends.
func watchAll(ctx context.Context, p *serverProcess, n int, filter func(i int) string, told *atomic.Int64) error {
	const perConnection = 90
	var conn *grpc.ClientConn
	var standing sync.WaitGroup
	failed := make(chan error, n)
	for i := range n {
		if i%perConnection == 0 {
			var err error
			if conn, err = grpc.NewClient(p.addr, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
				return err
			}
			context.AfterFunc(ctx, func() { _ = conn.Close() })
		}
		stream, err := grapnelv1.NewDeliveryServiceClient(conn).WatchDeliveries(ctx, &grapnelv1.WatchDeliveriesRequest{
			Parent: "namespaces/" + namespace, Filter: filter(i),
		})
		if err != nil {
			return err
		}
		standing.Add(1)
		go func() {
			if _, err := stream.Recv(); err != nil {
				failed <- err
			}
			standing.Done()
			for {
				m, err := stream.Recv()
				if err != nil {
					return
				}
				if m.GetDelivery() != nil {
					told.Add(1)
				}
			}
		}()
	}
	standing.Wait()
	close(failed)
	var errs error
	for err := range failed {
		errs = errors.Join(errs, err)
	}
	return errs
}

func (r *watchReport) print(out io.Writer) {
	for _, row := range r.Rows {
		for _, p := range row.Pairs {
			fmt.Fprintf(out, "watch            %s: %.0f/s alone (server %.1f µs CPU), %.0f/s watched (server %.1f µs CPU, RSS %.0f MiB), %d changes told\n",
				row.Name, p.Alone.PerSecond, p.Alone.ServerCPU, p.Watched.PerSecond, p.Watched.ServerCPU, p.Watched.ServerRSS, p.Told)
		}
		fmt.Fprintf(out, "                 watched to alone: %.2f (median of %d pairs)\n", row.Ratio, len(row.Pairs))
	}
}
