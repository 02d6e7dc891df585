package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newDeliveryCommand(c *cli) *cobra.Command {
	cmd := group("delivery", "Events on their way, and how that went",
		newDeliveryGet(c), newDeliveryList(c), newDeliveryTail(c), newDeliveryAttempts(c), newDeliveryRetry(c), newDeliveryCancel(c))
	cmd.Aliases = []string{"deliveries"}
	return c.connectFlags(cmd, true)
}

func deliveryColumns() []column[*grapnelv1.Delivery] {
	type delivery = *grapnelv1.Delivery
	return []column[delivery]{
		{head: "ID", value: func(d delivery) string { return lastSegment(d.GetName()) }},
		{head: "NAME", detail: true, value: delivery.GetName},
		{head: "EVENT", value: func(d delivery) string { return eventID(d.GetEvent()) }},
		{head: "TYPE", value: delivery.GetEventType},
		{head: "SUBSCRIPTION", value: func(d delivery) string { return lastSegment(d.GetSubscription()) }},
		{head: "STATE", value: func(d delivery) string { return enumText(d.GetState()) }},
		{head: "REASON", detail: true, value: delivery.GetStateReason},
		{head: "TRIGGER", detail: true, value: func(d delivery) string { return enumText(d.GetTrigger()) }},
		{head: "REPLAY", detail: true, value: func(d delivery) string { return lastSegment(d.GetReplayJob()) }},
		{head: "ATTEMPTS", value: func(d delivery) string { return fmt.Sprintf("%d/%d", d.GetAttemptCount(), d.GetMaxAttempts()) }},
		{head: "GAP", detail: true, value: func(d delivery) string { return number(d.GetOrderingGap()) }},
		{head: "LAST", value: func(d delivery) string { return outcomeText(d.GetLastAttempt()) }},
		{head: "NEXT", value: func(d delivery) string { return age(d.GetNextAttemptTime()) }},
		{head: "EXPIRES", detail: true, value: func(d delivery) string { return timeText(d.GetExpireTime()) }},
		{head: "CREATED", detail: true, value: func(d delivery) string { return timeText(d.GetCreateTime()) }},
		{head: "COMPLETED", detail: true, value: func(d delivery) string { return timeText(d.GetCompleteTime()) }},
		{head: "AGE", value: func(d delivery) string { return age(d.GetCreateTime()) }},
	}
}

// outcomeText is short: the response code, or what there was instead.
func outcomeText(a *grapnelv1.Attempt) string {
	if a == nil {
		return ""
	}
	if a.GetResponseCode() != 0 {
		return fmt.Sprint(a.GetResponseCode())
	}
	return enumText(a.GetOutcome())
}

func attemptColumns() []column[*grapnelv1.Attempt] {
	type attempt = *grapnelv1.Attempt
	return []column[attempt]{
		{head: "NUMBER", value: func(a attempt) string { return number(a.GetNumber()) }},
		{head: "START", value: func(a attempt) string { return timeText(a.GetStartTime()) }},
		{head: "TOOK", value: func(a attempt) string { return roundDuration(a.GetDuration().AsDuration()) }},
		{head: "OUTCOME", value: func(a attempt) string { return enumText(a.GetOutcome()) }},
		{head: "CODE", value: func(a attempt) string { return number(a.GetResponseCode()) }},
		{head: "PEER", value: attempt.GetPeer},
		{head: "ERROR", value: attempt.GetError},
		{head: "RETRY AFTER", detail: true, value: func(a attempt) string { return durationText(a.GetRetryAfter()) }},
		{head: "BATCH", detail: true, value: func(a attempt) string {
			if a.GetBatchSize() == 0 {
				return ""
			}
			return fmt.Sprintf("%s of %d", a.GetBatchId(), a.GetBatchSize())
		}},
		{head: "NODE", detail: true, value: attempt.GetNode},
		{head: "REQUEST", detail: true, value: func(a attempt) string { return pairsText(a.GetRequestHeaders()) }},
		{head: "RESPONSE", detail: true, value: func(a attempt) string { return pairsText(a.GetResponseHeaders()) }},
		{head: "BODY", detail: true, value: func(a attempt) string { return string(a.GetResponseBody()) }},
	}
}

func newDeliveryGet(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "get ID", Short: "Show a delivery", Args: oneID,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(deliveries, args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.DeliveryService().GetDelivery(ctx, &grapnelv1.GetDeliveryRequest{Name: name})
				if err != nil {
					return err
				}
				return show(c, r.GetDelivery(), deliveryColumns())
			})
		},
	}
}

func newDeliveryList(c *cli) *cobra.Command {
	var f deliveryFlags
	cmd := &cobra.Command{
		Use: "list", Short: "List deliveries, newest first", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		Example: `  grapnel delivery list -n acme --state failed --subscription orders --since 2h
  grapnel delivery list -n acme --filter 'last_attempt.response_code >= 500'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns, err := c.namespaceID()
			if err != nil {
				return err
			}
			expression, err := f.filter(c, time.Now())
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Deliveries(ctx, ns, client.Filter(expression), pageFor(f.limit)), f.limit, deliveryColumns())
			})
		},
	}
	f.register(cmd, c)
	return cmd
}

func newDeliveryAttempts(c *cli) *cobra.Command {
	var bodies bool
	cmd := &cobra.Command{
		Use: "attempts ID", Short: "List the attempts at a delivery, first to last", Args: oneID,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(deliveries, args[0])
			if err != nil {
				return err
			}
			columns := attemptColumns()
			var options []client.ListOption
			if bodies {
				options = append(options, client.IncludeBodies())
				columns[len(columns)-1].detail = false
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Attempts(ctx, name, options...), 0, columns)
			})
		},
	}
	cmd.Flags().BoolVar(&bodies, "include-bodies", false, "also the start of the response body; with -o json the headers too")
	return cmd
}

func newDeliveryRetry(c *cli) *cobra.Command {
	var after int32
	var again, job bool
	var f replayFlags
	cmd := &cobra.Command{
		Use: "retry [ID...]", Short: "Make deliveries due now: those named, or all that the flags select",
		Long: `Makes deliveries due now: those that are named, or all that the flags select, as delivery list does; after an outage,
those that were given up. Each is told that cannot be, and the exit code is then 1.

With --job the server does it: a replay job takes all that the flags select, at --max-rate, and goes on whatever becomes of
this command, which shows how far it is.`,
		Example: "  grapnel delivery retry 06h2ideteo002000jgn86mcguvp74 -n acme\n" +
			"  grapnel delivery retry -n acme --state failed --subscription orders --since 6h\n" +
			"  grapnel delivery retry -n acme --filter 'last_attempt.response_code = 503' --since 24h --job --max-rate 500",
	}
	f.register(cmd, c)
	countVar(cmd.Flags(), &after, "if-attempt-count", 0, 0, 0, "fail unless this many attempts have ended; guards against retrying twice")
	cmd.Flags().BoolVar(&again, "allow-succeeded", false, "also send those again that have succeeded, each as a new delivery")
	cmd.Flags().BoolVar(&job, "job", false, "have a replay job of the server do it, all that the flags select")
	rateFlag(cmd, &f.rate)
	cmd.Flags().Lookup("limit").Usage = "at most this many of those that the flags select, newest first; 0 takes all"
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		lifted := ""
		retry := func(ctx context.Context, cl *client.Client, name string) (*grapnelv1.Delivery, error) {
			r := &grapnelv1.RetryDeliveryRequest{Name: name, AllowSucceeded: again}
			if cmd.Flags().Changed("if-attempt-count") {
				r.IfAttemptCount = &after
			}
			answer, err := cl.DeliveryService().RetryDelivery(ctx, r)
			if len(args) == 1 && err == nil {
				lifted = answer.GetLifted()
			}
			return answer.GetDelivery(), err
		}
		names, err := f.named(cmd, c, args)
		if err != nil {
			return err
		}
		if err := needs(cmd, "max-rate", "job"); err != nil {
			return err
		}
		if job {
			if err := excludes(cmd, "job", "a job takes all that the flags select", "limit", "if-attempt-count", "allow-succeeded"); err != nil {
				return err
			}
			if len(names) > 0 {
				return usagef("--job takes what the flags select, and %s names one", args[0])
			}
			f.retry = true
			return c.startReplay(cmd, &f, "", false, true)
		}
		if len(names) == 1 {
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				d, err := retry(ctx, cl, names[0])
				if err := c.newDeliveryState(d, err); err != nil {
					return err
				}
				c.lifted(lifted)
				return nil
			})
		}
		if len(names) > 1 {
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error { return c.retryAll(ctx, cl, names, retry) })
		}
		ns, err := c.namespaceID()
		if err != nil {
			return err
		}
		expression, err := f.filter(c, time.Now())
		if err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			// All are listed before the first is retried, so that none is met twice.
			for d, err := range cl.Deliveries(ctx, ns, client.Filter(expression), pageFor(f.limit)) {
				if err != nil {
					return err
				}
				if f.limit > 0 && len(names) == f.limit {
					fmt.Fprintf(c.stderr, "only the newest %d are taken; see --limit\n", f.limit)
					break
				}
				names = append(names, d.GetName())
			}
			return c.retryAll(ctx, cl, names, retry)
		})
	}
	return cmd
}

// named are the deliveries that the arguments name. Without any, the flags must select some.
func (f *deliveryFlags) named(cmd *cobra.Command, c *cli, args []string) ([]string, error) {
	selecting := []string{"filter", "type", "since", "until", "state", "subscription", "event", "outcome", "code"}
	given := slices.IndexFunc(selecting, cmd.Flags().Changed)
	switch {
	case len(args) == 0 && given < 0:
		return nil, usagef("%s takes IDs or full names, or flags that select deliveries, such as --state failed; see %s --help", cmd.CommandPath(), cmd.CommandPath())
	case len(args) > 0 && given >= 0:
		return nil, usagef("--%s selects deliveries, and %s names some: give one of the two", selecting[given], args[0])
	}
	var names []string
	for _, arg := range args {
		name, err := c.name(deliveries, arg)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// retryAll retries each, whatever becomes of the others.
func (c *cli) retryAll(ctx context.Context, cl *client.Client, names []string,
	retry func(context.Context, *client.Client, string) (*grapnelv1.Delivery, error),
) error {
	retried, failed := 0, 0
	for _, name := range names {
		d, err := retry(ctx, cl, name)
		var answer *client.Error
		switch {
		case err == nil:
			retried++
			if c.forPrograms() {
				text, err := c.encode(d, false)
				if err != nil {
					return err
				}
				if _, err := c.stdout.Write(text); err != nil {
					return err
				}
			}
		case errors.As(err, &answer) && unreached(answer) || ctx.Err() != nil:
			return fmt.Errorf("after %s: %w", several(retried, "delivery", "deliveries"), err)
		default:
			failed++
			fmt.Fprintf(c.stderr, "%s: %s\n", clean(name), clean(err.Error()))
		}
	}
	c.said("%s due now", several(retried, "delivery is", "deliveries are"))
	if failed > 0 {
		return quietError{}
	}
	return nil
}

func newDeliveryCancel(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "cancel ID", Short: "Stop a delivery for good", Args: oneID,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(deliveries, args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				answer, err := cl.DeliveryService().CancelDelivery(ctx, &grapnelv1.CancelDeliveryRequest{Name: name})
				return c.newDeliveryState(answer.GetDelivery(), err)
			})
		},
	}
}

func (c *cli) newDeliveryState(d *grapnelv1.Delivery, err error) error {
	if err != nil {
		return err
	}
	if c.forPrograms() {
		return show(c, d, nil)
	}
	next := ""
	if d.GetNextAttemptTime() != nil {
		next = ", next attempt " + cmp.Or(age(d.GetNextAttemptTime()), "now")
	}
	c.said("%s is %s%s", d.GetName(), enumText(d.GetState()), next)
	return nil
}
