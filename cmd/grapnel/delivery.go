package main

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newDeliveryCommand(c *cli) *cobra.Command {
	cmd := group("delivery", "Events on their way, and how that went",
		newDeliveryGet(c), newDeliveryList(c), newDeliveryAttempts(c), newDeliveryRetry(c), newDeliveryCancel(c))
	cmd.Aliases = []string{"deliveries"}
	return c.connectFlags(cmd, true)
}

func deliveryColumns() []column[*grapnelv1.Delivery] {
	type delivery = *grapnelv1.Delivery
	return []column[delivery]{
		{head: "ID", value: func(d delivery) string { return lastSegment(d.GetName()) }},
		{head: "NAME", detail: true, value: delivery.GetName},
		{head: "EVENT", value: func(d delivery) string { return lastSegment(d.GetEvent()) }},
		{head: "TYPE", value: delivery.GetEventType},
		{head: "SUBSCRIPTION", value: func(d delivery) string { return lastSegment(d.GetSubscription()) }},
		{head: "STATE", value: func(d delivery) string { return enumText(d.GetState()) }},
		{head: "REASON", detail: true, value: delivery.GetStateReason},
		{head: "ATTEMPTS", value: func(d delivery) string { return fmt.Sprintf("%d/%d", d.GetAttemptCount(), d.GetMaxAttempts()) }},
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
	cmd := &cobra.Command{
		Use: "retry ID", Short: "Make a delivery due now", Args: oneID,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(deliveries, args[0])
			if err != nil {
				return err
			}
			r := &grapnelv1.RetryDeliveryRequest{Name: name}
			if cmd.Flags().Changed("if-attempt-count") {
				r.IfAttemptCount = &after
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				answer, err := cl.DeliveryService().RetryDelivery(ctx, r)
				return c.newDeliveryState(answer.GetDelivery(), err)
			})
		},
	}
	countVar(cmd.Flags(), &after, "if-attempt-count", 0, 0, 0, "fail unless this many attempts have ended; guards against retrying twice")
	return cmd
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
