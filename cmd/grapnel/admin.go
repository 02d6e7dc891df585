package main

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func statsColumns() []column[*grapnelv1.Stats] {
	type stats = *grapnelv1.Stats
	count := func(get func(stats) int64) func(stats) string {
		return func(s stats) string { return fmt.Sprint(get(s)) }
	}
	return []column[stats]{
		{head: "SUBSCRIPTION", value: func(s stats) string { return cmp.Or(s.GetSubscription(), "total") }},
		{head: "EVENTS", value: count(stats.GetEvents)},
		{head: "ATTEMPTS", value: count(stats.GetAttempts)},
		{head: "FAILED ATTEMPTS", value: count(stats.GetFailedAttempts)},
		{head: "SUCCEEDED", value: count(stats.GetSucceeded)},
		{head: "FAILED", value: count(stats.GetFailed)},
		{head: "OPEN", value: count(stats.GetOpen)},
		{head: "P50", value: func(s stats) string { return latencyText(s.GetP50Latency()) }},
		{head: "P99", value: func(s stats) string { return latencyText(s.GetP99Latency()) }},
		{head: "BREAKERS OPEN", value: func(s stats) string { return number(s.GetOpenBreakers()) }},
		{head: "HOST DOWN", value: func(s stats) string { return number(s.GetHostsDown()) }},
		{head: "OLDEST DUE", value: func(s stats) string { return latencyText(s.GetOldestDueAge()) }},
	}
}

func latencyText(d *durationpb.Duration) string {
	if d.AsDuration() == 0 {
		return ""
	}
	return d.AsDuration().Round(100 * time.Microsecond).String()
}

func newStatsCommand(c *cli) *cobra.Command {
	var window time.Duration
	var top int32
	cmd := &cobra.Command{
		Use: "stats", Short: "Counters over the last minutes, of a namespace or of everything", Args: cobra.NoArgs,
		Example: "  grapnel stats\n  grapnel stats -n acme --window 1h --top 10",
		RunE: func(cmd *cobra.Command, _ []string) error {
			parent, err := c.statsParent()
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return c.showStats(ctx, cl, parent, window, top)
			})
		},
	}
	spanVar(cmd.Flags(), &window, "window", 5*time.Minute, time.Minute, 24*time.Hour, "looking back, 1m to 24h")
	countVar(cmd.Flags(), &top, "top", 0, 0, 100, "also this many subscriptions, most failures first")
	return c.connectFlags(cmd, true)
}

// statsParent is the namespace, or all of them where none is given.
func (c *cli) statsParent() (string, error) {
	if c.namespace == "" {
		return "namespaces/-", nil
	}
	return c.parent()
}

func (c *cli) showStats(ctx context.Context, cl *client.Client, parent string, window time.Duration, top int32) error {
	r, err := cl.AdminService().GetStats(ctx, &grapnelv1.GetStatsRequest{
		Parent: parent, Window: durationpb.New(window), TopSubscriptions: top,
	})
	if err != nil {
		return err
	}
	if c.forPrograms() {
		return show(c, r, nil)
	}
	t := newTable(c, statsColumns())
	for _, s := range append([]*grapnelv1.Stats{r.GetTotal()}, r.GetSubscriptions()...) {
		if err := t.row(s); err != nil {
			return err
		}
	}
	return t.flush()
}

func newTopCommand(c *cli) *cobra.Command {
	var interval time.Duration
	var top int32
	cmd := &cobra.Command{
		Use: "top", Short: "The counters of the last minute, kept up to date on a terminal", Args: cobra.NoArgs,
		Long: `Shows the counters of the last minute, of a namespace or of everything, and the subscriptions with most failures. On a terminal it
goes on until it is interrupted; elsewhere it ends when it has shown them once.`,
		Example: "  grapnel top\n  grapnel top -n acme --interval 5s",
		RunE: func(cmd *cobra.Command, _ []string) error {
			parent, err := c.statsParent()
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				for live := isTerminal(c.stdout) && !c.forPrograms(); ; {
					if live {
						if err := c.styled("\x1b[H\x1b[2J"); err != nil { // home, and nothing on the screen
							return err
						}
					}
					err := c.showStats(ctx, cl, parent, time.Minute, top)
					if err != nil || !live {
						return err
					}
					c.said("%s, every %s", time.Now().Format(time.TimeOnly), interval)
					select {
					case <-ctx.Done():
						return context.Cause(ctx)
					case <-time.After(interval):
					}
				}
			})
		},
	}
	spanVar(cmd.Flags(), &interval, "interval", 2*time.Second, time.Second, time.Hour, "how often, 1s to 1h")
	countVar(cmd.Flags(), &top, "top", 20, 0, 100, "this many subscriptions")
	return c.connectFlags(cmd, true)
}

func newClusterCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "cluster", Short: "Version, nodes and the health of the configuration store", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.AdminService().GetCluster(ctx, &grapnelv1.GetClusterRequest{})
				if err != nil {
					return err
				}
				return c.showCluster(r)
			})
		},
	}
	return c.connectFlags(cmd, false)
}

func (c *cli) showCluster(r *grapnelv1.GetClusterResponse) error {
	if c.forPrograms() {
		return show(c, r, nil)
	}
	store := "healthy"
	if !r.GetStoreHealthy() {
		store = "WITHOUT QUORUM: deliveries go on, configuration cannot be changed"
	}
	c.said("Cluster %s, version %s, configuration store %s", r.GetClusterId(), r.GetVersion(), store)
	if text := dispatchText(r); text != "" {
		c.said("%s", text)
	}
	type node = *grapnelv1.Node
	t := newTable(c, []column[node]{
		{head: "NODE", value: func(n node) string { return lastSegment(n.GetName()) }},
		{head: "STATE", value: func(n node) string { return enumText(n.GetState()) }},
		{head: "ADDRESS", value: node.GetAddress},
		{head: "VERSION", value: node.GetVersion},
		{head: "PARTITIONS", value: func(n node) string { return fmt.Sprint(n.GetOwnedPartitions()) }},
		{head: "IN FLIGHT", value: func(n node) string { return fmt.Sprint(n.GetInFlight()) }},
		{head: "UP", value: func(n node) string { return age(n.GetStartTime()) }},
	})
	for _, n := range r.GetNodes() {
		if err := t.row(n); err != nil {
			return err
		}
	}
	return t.flush()
}
