package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

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

// deliveryStates are the states that --state takes, and two words for several.
func deliveryStates() map[string][]string {
	states := map[string][]string{
		"open":   {"PENDING", "SCHEDULED", "IN_FLIGHT"},
		"failed": {"EXHAUSTED", "REJECTED"},
	}
	for number, name := range grapnelv1.Delivery_State_name {
		if number != 0 {
			name = strings.TrimPrefix(name, "STATE_")
			states[strings.ToLower(strings.ReplaceAll(name, "_", "-"))] = []string{name}
		}
	}
	return states
}

// deliveryFilter joins the shorthand flags to a filter.
func (c *cli) deliveryFilter(filter string, states []string, subscription, event string) (string, error) {
	var terms []string
	if filter != "" {
		terms = append(terms, filter)
	}
	var wanted []string
	for _, state := range states {
		names, ok := deliveryStates()[strings.ToLower(strings.ReplaceAll(state, "_", "-"))]
		if !ok {
			known := slices.Sorted(maps.Keys(deliveryStates()))
			return "", usagef("--state %s: must be one of %s%s", state, strings.Join(known, ", "), didYouMean(state, known))
		}
		for _, name := range names {
			wanted = append(wanted, "state = "+name)
		}
	}
	if len(wanted) > 0 {
		terms = append(terms, "("+strings.Join(wanted, " OR ")+")")
	}
	for _, reference := range []struct {
		field, value string
		of           collection
	}{{"subscription", subscription, subscriptions}, {"event", event, events}} {
		if reference.value == "" {
			continue
		}
		name, err := c.name(reference.of, reference.value)
		if err != nil {
			return "", err
		}
		terms = append(terms, fmt.Sprintf("%s = %q", reference.field, name))
	}
	return strings.Join(terms, " AND "), nil
}

func newDeliveryList(c *cli) *cobra.Command {
	var filter, subscription, event string
	var states []string
	var limit int
	cmd := &cobra.Command{
		Use: "list", Short: "List deliveries, newest first", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		Example: `  grapnel delivery list -n acme --state failed --subscription orders
  grapnel delivery list -n acme --filter 'last_attempt.response_code >= 500'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns, err := c.namespaceID()
			if err != nil {
				return err
			}
			expression, err := c.deliveryFilter(filter, states, subscription, event)
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Deliveries(ctx, ns, client.Filter(expression), pageFor(limit)), limit, deliveryColumns())
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&filter, "filter", "", "`expression` over state, subscription, event, event_type, create_time, attempt_count, last_attempt.outcome, …")
	flags.StringSliceVar(&states, "state", nil, "only in these `states`; open and failed stand for several")
	flags.StringVar(&subscription, "subscription", "", "only of this subscription")
	flags.StringVar(&event, "event", "", "only of this event")
	countVar(flags, &limit, "limit", 100, 0, 0, "show at most this many; 0 shows all")
	must(cmd.RegisterFlagCompletionFunc("state", fixed(slices.Sorted(maps.Keys(deliveryStates()))...)))
	must(cmd.RegisterFlagCompletionFunc("subscription", completeSubscriptions(c)))
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
