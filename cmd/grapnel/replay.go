package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newReplayCommand(c *cli) *cobra.Command {
	cmd := group("replay", "Sending again what is on record, by the thousand",
		newReplayCreate(c), newReplayGet(c), newReplayList(c), newReplayWait(c), newReplayCancel(c))
	cmd.Aliases = []string{"replays"}
	return c.connectFlags(cmd, true)
}

func replayColumns() []column[*grapnelv1.ReplayJob] {
	type job = *grapnelv1.ReplayJob
	return []column[job]{
		{head: "ID", value: func(j job) string { return lastSegment(j.GetName()) }},
		{head: "NAME", detail: true, value: job.GetName},
		{head: "SUBSCRIPTION", value: func(j job) string { return lastSegment(j.GetSubscription()) }},
		{head: "STATE", value: func(j job) string { return enumText(j.GetState()) }},
		{head: "ERROR", detail: true, value: func(j job) string { return j.GetError().GetMessage() }},
		{head: "WAITS", detail: true, value: job.GetWaitReason},
		{head: "SCANNED", value: func(j job) string { return thousands(j.GetScannedCount()) }},
		{head: "CREATED", value: func(j job) string { return thousands(j.GetCreatedCount()) }},
		{head: "SKIPPED", value: func(j job) string { return thousands(j.GetSkippedCount()) }},
		{head: "OPEN", value: func(j job) string { return thousands(j.GetOpenCount()) }},
		{head: "RATE", detail: true, value: func(j job) string { return fmt.Sprintf("%g/s", j.GetMaxRate()) }},
		{head: "FILTER", detail: true, value: job.GetFilter},
		{head: "KIND", detail: true, value: replayKind},
		{head: "FROM", detail: true, value: func(j job) string { return timeText(j.GetStartTime()) }},
		{head: "UNTIL", detail: true, value: func(j job) string { return timeText(j.GetEndTime()) }},
		{head: "COMPLETED", detail: true, value: func(j job) string { return timeText(j.GetCompleteTime()) }},
		{head: "AGE", value: func(j job) string { return age(j.GetCreateTime()) }},
	}
}

func replayKind(j *grapnelv1.ReplayJob) string {
	switch {
	case j.GetMissingOnly():
		return "missing events"
	case j.GetRetry():
		return "retries"
	}
	return "new deliveries"
}

// replayFlags say what a job is to do.
type replayFlags struct {
	deliveryFlags
	to             string
	missing, retry bool
	rate           float64
}

// job is what the flags ask for.
func (f *replayFlags) job(c *cli, now time.Time) (*grapnelv1.ReplayJob, error) {
	j := &grapnelv1.ReplayJob{MissingOnly: f.missing, Retry: f.retry, MaxRate: f.rate}
	if f.since == "" {
		return nil, usagef("--since is required: from when on, such as 6h or 2026-01-31T12:00:00Z")
	}
	if err := f.span(now, &j.StartTime, &j.EndTime); err != nil {
		return nil, err
	}
	if f.to != "" {
		name, err := c.name(subscriptions, f.to)
		if err != nil {
			return nil, err
		}
		j.Subscription = name
	}
	selecting := f.deliveryFlags
	selecting.since, selecting.until = "", ""
	var err error
	j.Filter, err = selecting.filter(c, now)
	return j, err
}

func newReplayCreate(c *cli) *cobra.Command {
	var f replayFlags
	var count, wait bool
	cmd := &cobra.Command{
		Use: "create [ID]", Short: "Start a replay job", Args: cobra.MaximumNArgs(1),
		Long: `Starts a job of the server that delivers again what is on record, as new deliveries that carry the webhook-id which their
event has always had. It goes on through restarts and makes each delivery once. Without other flags it takes what ended
without success: of the subscription that --to names, or without it of all of them, each to its own again.

With --missing it takes events instead that the subscription wants as it is now and has had no delivery of: what was
published before it was made, or while it was disabled. Repeating a command with the same ID finds the first job.`,
		Example: "  grapnel replay create incident-42 -n acme --to orders --since 6h --wait\n" +
			"  grapnel replay create -n acme --to orders-v2 --subscription orders --state succeeded --since 24h --count\n" +
			"  grapnel replay create -n acme --to audit --missing --since 72h --max-rate 500",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := excludes(cmd, "count", "nothing is started to wait for", "wait"); err != nil {
				return err
			}
			if len(args) == 0 {
				args = []string{""}
			}
			return c.startReplay(cmd, &f, args[0], count, wait)
		},
	}
	f.register(cmd, c)
	must(cmd.Flags().MarkHidden("limit"))
	flags := cmd.Flags()
	flags.StringVar(&f.to, "to", "", "`subscription` to deliver to; without it each delivery goes to its own again")
	flags.BoolVar(&f.missing, "missing", false, "events that --to wants and has had no delivery of, instead of deliveries")
	flags.BoolVar(&f.retry, "retry", false, "retry the deliveries themselves instead of making new ones")
	rateFlag(cmd, &f.rate)
	flags.BoolVar(&count, "count", false, "only count what it would take")
	flags.BoolVar(&wait, "wait", false, "wait for its end, and show how far it is")
	must(cmd.RegisterFlagCompletionFunc("to", completeSubscriptions(c)))
	return cmd
}

func rateFlag(cmd *cobra.Command, rate *float64) {
	cmd.Flags().Float64Var(rate, "max-rate", 0, "deliveries made a second at most, up to 10000 (default 50)")
}

// startReplay creates a job, or counts what it would do.
func (c *cli) startReplay(cmd *cobra.Command, f *replayFlags, id string, count, wait bool) error {
	ns, err := c.namespaceID()
	if err != nil {
		return err
	}
	if id != "" {
		var name string
		if name, err = c.name(replays, id); err != nil {
			return err
		}
		id, ns = lastSegment(name), strings.Split(name, "/")[1]
	}
	job, err := f.job(c, time.Now())
	if err != nil {
		return err
	}
	return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
		if count {
			counted, err := cl.CountReplay(ctx, ns, job)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, counted, nil)
			}
			c.said("%s would be made; looked at %s", several(counted.GetCreatedCount(), "delivery", "deliveries"), thousands(counted.GetScannedCount()))
			return nil
		}
		made, err := cl.CreateReplay(ctx, ns, id, job)
		if err != nil {
			return err
		}
		if wait {
			return c.waitReplay(ctx, cl, ns, made.GetName())
		}
		if c.forPrograms() {
			return show(c, made, nil)
		}
		c.said("%s is %s; grapnel replay wait %s shows how far it is", made.GetName(), enumText(made.GetState()), lastSegment(made.GetName()))
		return nil
	})
}

func newReplayGet(c *cli) *cobra.Command {
	return c.replayVerb("get ID", "Show a replay job", func(ctx context.Context, cl *client.Client, ns, name string) error {
		job, err := cl.GetReplay(ctx, ns, name)
		if err != nil {
			return err
		}
		return show(c, job, replayColumns())
	})
}

func newReplayWait(c *cli) *cobra.Command {
	return c.replayVerb("wait ID", "Wait for a replay job to end, and show how far it is", c.waitReplay)
}

func newReplayCancel(c *cli) *cobra.Command {
	return c.replayVerb("cancel ID", "Stop a replay job; what it has made goes on", func(ctx context.Context, cl *client.Client, ns, name string) error {
		job, err := cl.CancelReplay(ctx, ns, name)
		if err != nil {
			return err
		}
		if c.forPrograms() {
			return show(c, job, nil)
		}
		c.said("%s is %s after %s", job.GetName(), enumText(job.GetState()), several(job.GetCreatedCount(), "delivery", "deliveries"))
		return nil
	})
}

func (c *cli) replayVerb(use, short string, run func(ctx context.Context, cl *client.Client, ns, name string) error) *cobra.Command {
	return jobVerb(c, replays, (*client.Client).Replays, use, short, run)
}

func newReplayList(c *cli) *cobra.Command {
	var filter string
	var limit int
	cmd := &cobra.Command{
		Use: "list", Short: "List replay jobs, newest first", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns, err := c.namespaceID()
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Replays(ctx, ns, client.Filter(filter), pageFor(limit)), limit, replayColumns())
			})
		},
	}
	cmd.Flags().StringVar(&filter, "filter", "", "`expression` over state, subscription, create_time")
	countVar(cmd.Flags(), &limit, "limit", 100, 0, 0, "show at most this many; 0 shows all")
	return cmd
}

// waitReplay waits for a job, and shows how far it is on standard error: in one line that moves on a terminal, in plain
// lines elsewhere.
func (c *cli) waitReplay(ctx context.Context, cl *client.Client, ns, name string) error {
	p := &replayProgress{to: c.stderr}
	if isTerminal(c.stderr) {
		p.bar = true
		if whole, ok := c.stderr.(*printer); ok {
			p.to = whole.to // which takes the sequences that move the cursor
		}
	}
	job, err := cl.WaitReplay(ctx, ns, name, p.tell)
	p.end()
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("no longer waiting; %s goes on: %w", name, err)
		}
		return err
	}
	if c.forPrograms() {
		if err := show(c, job, nil); err != nil {
			return err
		}
	} else {
		skipped := ""
		if n := job.GetSkippedCount(); n > 0 {
			skipped = fmt.Sprintf(", %s skipped", thousands(n))
		}
		c.said("%s is %s: %s made%s, %s open", job.GetName(), enumText(job.GetState()),
			several(job.GetCreatedCount(), "delivery", "deliveries"), skipped, thousands(job.GetOpenCount()))
	}
	switch job.GetState() {
	case grapnelv1.ReplayJob_STATE_SUCCEEDED:
		return nil
	case grapnelv1.ReplayJob_STATE_FAILED:
		fmt.Fprintf(c.stderr, "%s failed: %s\n", clean(job.GetName()), clean(job.GetError().GetMessage()))
	}
	return quietError{}
}

// replayProgress is the line about a job.
type replayProgress struct {
	to   io.Writer
	bar  bool
	last string
	told bool
	when time.Time
	made int64
}

// plainEvery is how often a line that does not move is written.
const plainEvery = 10 * time.Second

func (p *replayProgress) tell(j *grapnelv1.ReplayJob) {
	now := time.Now()
	line := p.line(j, now)
	switch {
	case p.bar:
		fmt.Fprintf(p.to, "\r\x1b[K%s", clean(line))
		p.told, p.when, p.made = true, now, j.GetCreatedCount()
	case !client.ReplayEnded(j) && now.Sub(p.when) >= plainEvery && line != p.last:
		fmt.Fprintln(p.to, clean(line))
		p.last, p.when, p.made = line, now, j.GetCreatedCount()
	}
}

// line is how a job stands. How much there is in all nobody knows before its end; the part of its time that it has looked at
// is what the bar shows.
func (p *replayProgress) line(j *grapnelv1.ReplayJob, now time.Time) string {
	rate := ""
	if took := now.Sub(p.when); !p.when.IsZero() && took > 0 {
		rate = fmt.Sprintf(", %s/s", thousands(int64(float64(j.GetCreatedCount()-p.made)/took.Seconds())))
	}
	line := fmt.Sprintf("%s made%s, %s looked at, %s open", thousands(j.GetCreatedCount()), rate, thousands(j.GetScannedCount()), thousands(j.GetOpenCount()))
	if j.GetSkippedCount() > 0 {
		line += fmt.Sprintf(", %s skipped", thousands(j.GetSkippedCount()))
	}
	if p.bar {
		const width = 20
		full := int(j.GetProgress() * width)
		line = fmt.Sprintf("[%s%s] %3.0f%%  ", strings.Repeat("=", full), strings.Repeat(" ", width-full), 100*j.GetProgress()) + line
	}
	if j.GetWaitReason() != "" {
		line += "; waits: " + j.GetWaitReason()
	}
	return line
}

func (p *replayProgress) end() {
	if p.told {
		fmt.Fprint(p.to, "\r\x1b[K")
	}
}
