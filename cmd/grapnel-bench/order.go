package main

import (
	"context"
	"fmt"
	"io"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// orderReport compares deliveries in the order of their keys with deliveries in any.
type orderReport struct {
	Keys  int         `json:"keys"`
	Pairs []orderPair `json:"pairs"`
	// Ratio is the median of the pairs', of ordered to unordered deliveries a second.
	Ratio float64 `json:"ratio"`
}

type orderPair struct {
	Unordered throughput `json:"unordered"`
	Ordered   throughput `json:"ordered"`
}

// order publishes the same number of events to one subscription twice: in any order, and with ordering keys to an ordered
// one. Of each key there are some events that wait for their turn.
func (b *bench) order(ctx context.Context) error {
	r := &orderReport{Keys: b.orderKeys}
	keyed := func(i int64, body []byte) *grapnelv1.Event {
		e := event(i, body)
		e.OrderingKey = fmt.Sprintf("key-%d", i%int64(b.orderKeys))
		return e
	}
	var ratios []float64
	for range b.repeat {
		plain := signed(namespace, b.sink.url("/s/0"), "bench.*")
		unordered, err := b.oneTo(ctx, b.grapnel, "unordered", []*grapnelv1.Subscription{plain}, b.events, batch)
		if err != nil {
			return fmt.Errorf("unordered: %w", err)
		}
		sub := signed(namespace, b.sink.url("/s/0"), "bench.*")
		sub.Ordered = true
		ordered, err := b.oneTo(ctx, b.grapnel, "ordered", []*grapnelv1.Subscription{sub}, b.events, batchOf(keyed))
		if err != nil {
			return fmt.Errorf("ordered: %w", err)
		}
		r.Pairs = append(r.Pairs, orderPair{unordered, ordered})
		ratios = append(ratios, ratio(ordered.PerSecond, unordered.PerSecond))
	}
	r.Ratio = median(ratios)
	b.report.Order = r
	return nil
}

func (r *orderReport) print(out io.Writer) {
	for _, p := range r.Pairs {
		fmt.Fprintf(out, "order            %d deliveries: %.0f/s in any order (server %.1f µs CPU, RSS %.0f MiB), %.0f/s by %d keys (server %.1f µs CPU, RSS %.0f MiB)\n",
			p.Ordered.Deliveries, p.Unordered.PerSecond, p.Unordered.ServerCPU, p.Unordered.ServerRSS,
			p.Ordered.PerSecond, r.Keys, p.Ordered.ServerCPU, p.Ordered.ServerRSS)
	}
	fmt.Fprintf(out, "                 ordered to unordered: %.2f (median of %d pairs)\n", r.Ratio, len(r.Pairs))
}
