package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newErasureCommand(c *cli) *cobra.Command {
	cmd := group("erasure", "Taking away what events carry, a person's data above all, so that no file has it any more",
		newErasureCreate(c), newErasureGet(c), newErasureList(c), newErasureWait(c), newErasureCancel(c))
	cmd.Aliases = []string{"erasures"}
	return c.connectFlags(cmd, true)
}

func erasureColumns() []column[*grapnelv1.Erasure] {
	type job = *grapnelv1.Erasure
	return []column[job]{
		{head: "ID", value: func(j job) string { return lastSegment(j.GetName()) }},
		{head: "NAME", detail: true, value: job.GetName},
		{head: "STATE", value: func(j job) string { return enumText(j.GetState()) }},
		{head: "ERROR", detail: true, value: func(j job) string { return j.GetError().GetMessage() }},
		{head: "WAITS", detail: true, value: job.GetWaitReason},
		{head: "SCANNED", value: func(j job) string { return thousands(j.GetScannedCount()) }},
		{head: "ERASED", value: func(j job) string { return thousands(j.GetErasedCount()) }},
		{head: "BYTES", value: func(j job) string { return thousands(j.GetErasedBytes()) }},
		{head: "CANCELLED", value: func(j job) string { return thousands(j.GetCancelledCount()) }},
		{head: "UNREAD", detail: true, value: func(j job) string { return thousands(j.GetUnreadCount()) }},
		{head: "FILTER", detail: true, value: job.GetFilter},
		{head: "CONDITION", detail: true, value: job.GetCondition},
		{head: "FROM", detail: true, value: func(j job) string { return timeText(j.GetStartTime()) }},
		{head: "UNTIL", detail: true, value: func(j job) string { return timeText(j.GetEndTime()) }},
		{head: "VERIFIED", value: func(j job) string { return timeText(j.GetVerifyTime()) }},
		{head: "VERIFIED BYTES", detail: true, value: func(j job) string { return thousands(j.GetVerifiedBytes()) }},
		{head: "COMPLETED", detail: true, value: func(j job) string { return timeText(j.GetCompleteTime()) }},
		{head: "AGE", value: func(j job) string { return age(j.GetCreateTime()) }},
	}
}

// erasureFlags say what a job is to purge.
type erasureFlags struct {
	listFlags
	condition string
}

// job is what the flags ask for.
func (f *erasureFlags) job(now time.Time) (*grapnelv1.Erasure, error) {
	j := &grapnelv1.Erasure{Condition: f.condition}
	if err := f.span(now, &j.StartTime, &j.EndTime); err != nil {
		return nil, err
	}
	selecting := f.listFlags
	selecting.since, selecting.until = "", ""
	all, err := selecting.terms("type", "accept_time", now)
	if err != nil {
		return nil, err
	}
	if j.Filter = all.String(); j.Filter == "" && j.Condition == "" {
		return nil, usagef(`--filter is required, or --condition: what is to go, such as 'subject = "customer-42"'`)
	}
	return j, nil
}

func newErasureCreate(c *cli) *cobra.Command {
	var f erasureFlags
	var count, wait, yes bool
	cmd := &cobra.Command{
		Use: "create [ID]", Short: "Start an erasure", Args: cobra.MaximumNArgs(1),
		Long: `Starts a job of the server that takes away what events carry, of all that the flags select and that were accepted before:
payload, subject and attributes, what transformers have made of it, and what is kept of requests and answers. What is open of
them is cancelled. It goes on through restarts, and has succeeded when no file of the server's journal holds any of it any
more. What has become of the events stays. Repeating a command with the same ID finds the first job.`,
		Example: `  grapnel erasure create gdpr-1001 -n acme --filter 'subject = "customer-42"' --count
  grapnel erasure create gdpr-1001 -n acme --filter 'subject = "customer-42"' --yes --wait
  grapnel erasure create -n acme --type 'user.*' --condition 'event.data.user.id == 42' --yes`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := excludes(cmd, "count", "nothing is started to wait for", "wait"); err != nil {
				return err
			}
			if len(args) == 0 {
				args = []string{""}
			}
			return c.startErasure(cmd, &f, args[0], count, wait, yes)
		},
	}
	f.register(cmd, "id, uid, type, subject, source, ordering_key, time, accept_time, attributes.KEY")
	must(cmd.Flags().MarkHidden("limit"))
	flags := cmd.Flags()
	flags.StringVar(&f.condition, "condition", "", "CEL `expression` over event, as in subscriptions, such as event.data.user.id == 42")
	flags.BoolVar(&count, "count", false, "only count what it would purge")
	flags.BoolVar(&wait, "wait", false, "wait for its end")
	yesFlag(cmd, &yes)
	return cmd
}

// startErasure creates a job, or counts what it would do.
func (c *cli) startErasure(cmd *cobra.Command, f *erasureFlags, id string, count, wait, yes bool) error {
	ns, err := c.namespaceID()
	if err != nil {
		return err
	}
	if id != "" {
		var name string
		if name, err = c.name(erasures, id); err != nil {
			return err
		}
		id, ns = lastSegment(name), strings.Split(name, "/")[1]
	}
	job, err := f.job(time.Now())
	if err != nil {
		return err
	}
	return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
		if count {
			counted, err := cl.CountErasure(ctx, ns, job)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, counted, nil)
			}
			c.said("%s would be purged; looked at %s", several(counted.GetErasedCount(), "event", "events"), thousands(counted.GetScannedCount()))
			return nil
		}
		if err := c.confirm(ctx, yes, "what events of "+ns+" carry", "all that "+strings.TrimSpace(job.GetFilter()+" "+job.GetCondition())+" selects, for good"); err != nil {
			return err
		}
		made, err := cl.CreateErasure(ctx, ns, id, job)
		if err != nil {
			return err
		}
		if wait {
			return c.waitErasure(ctx, cl, ns, made.GetName())
		}
		if c.forPrograms() {
			return show(c, made, nil)
		}
		c.said("%s is %s; grapnel erasure wait %s waits for its end", made.GetName(), enumText(made.GetState()), lastSegment(made.GetName()))
		return nil
	})
}

func newErasureGet(c *cli) *cobra.Command {
	return c.erasureVerb("get ID", "Show an erasure", func(ctx context.Context, cl *client.Client, ns, name string) error {
		job, err := cl.GetErasure(ctx, ns, name)
		if err != nil {
			return err
		}
		return show(c, job, erasureColumns())
	})
}

func newErasureWait(c *cli) *cobra.Command {
	return c.erasureVerb("wait ID", "Wait for an erasure to end", c.waitErasure)
}

// waitErasure waits for a job, and says how it has ended.
func (c *cli) waitErasure(ctx context.Context, cl *client.Client, ns, name string) error {
	job, err := cl.WaitErasure(ctx, ns, name, nil)
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
		c.said("%s is %s: %s purged of %s, %s cancelled", job.GetName(), enumText(job.GetState()), several(job.GetErasedCount(), "event", "events"),
			thousands(job.GetScannedCount()), several(job.GetCancelledCount(), "delivery", "deliveries"))
		if n := job.GetUnreadCount(); n > 0 {
			c.said("%s could not be read", several(n, "event", "events"))
		}
	}
	switch job.GetState() {
	case grapnelv1.Erasure_STATE_SUCCEEDED:
		return nil
	case grapnelv1.Erasure_STATE_FAILED:
		fmt.Fprintf(c.stderr, "%s failed: %s\n", clean(job.GetName()), clean(job.GetError().GetMessage()))
	}
	return quietError{}
}

func newErasureCancel(c *cli) *cobra.Command {
	return c.erasureVerb("cancel ID", "Stop an erasure; what it has purged stays so", func(ctx context.Context, cl *client.Client, ns, name string) error {
		job, err := cl.CancelErasure(ctx, ns, name)
		if err != nil {
			return err
		}
		if c.forPrograms() {
			return show(c, job, nil)
		}
		c.said("%s is %s after %s", job.GetName(), enumText(job.GetState()), several(job.GetErasedCount(), "event", "events"))
		return nil
	})
}

func (c *cli) erasureVerb(use, short string, run func(ctx context.Context, cl *client.Client, ns, name string) error) *cobra.Command {
	return jobVerb(c, erasures, (*client.Client).Erasures, use, short, run)
}

func newErasureList(c *cli) *cobra.Command {
	var filter string
	var limit int
	cmd := &cobra.Command{
		Use: "list", Short: "List erasures, newest first", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns, err := c.namespaceID()
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Erasures(ctx, ns, client.Filter(filter), pageFor(limit)), limit, erasureColumns())
			})
		},
	}
	cmd.Flags().StringVar(&filter, "filter", "", "`expression` over state, create_time")
	countVar(cmd.Flags(), &limit, "limit", 100, 0, 0, "show at most this many; 0 shows all")
	return cmd
}
