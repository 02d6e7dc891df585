package main

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newEventExplain(c *cli) *cobra.Command {
	var at string
	var attempts bool
	cmd := &cobra.Command{
		Use: "explain ID", Short: "Say what has become of an event at each subscription, and why", Args: oneID,
		Long: `Says what has become of an event, named by its id or by the webhook-id that receivers see: for each delivery where it
stands and why, and for each other subscription of the namespace why the event did not go there.`,
		Example: `  grapnel event explain order-1001 -n acme
  grapnel event explain order-1001 -n acme --subscription billing --attempts`,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(events, args[0])
			if err != nil {
				return err
			}
			if at != "" {
				if at, err = c.name(subscriptions, at); err != nil {
					return err
				}
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				accounts := cl.Explain(ctx, name, client.AtSubscription(at))
				if c.forPrograms() {
					return list(c, accounts, 0, accountColumns())
				}
				r, err := cl.EventService().GetEvent(ctx, &grapnelv1.GetEventRequest{Name: name})
				if err != nil {
					return err
				}
				c.said("%s", eventLine(r.GetEvent()))
				t := newTable(c, accountColumns())
				for account, err := range accounts {
					if err != nil {
						t.flush()
						return err
					}
					if err := t.row(account); err != nil {
						return err
					}
					if attempts {
						attemptLines(t.w, account.GetAttempts())
					}
				}
				return t.flush()
			})
		},
	}
	cmd.Flags().StringVar(&at, "subscription", "", "only what became of it at this subscription")
	cmd.Flags().BoolVar(&attempts, "attempts", false, "also each attempt, below its delivery")
	must(cmd.RegisterFlagCompletionFunc("subscription", completeSubscriptions(c)))
	return cmd
}

// eventLine is an event in a line.
func eventLine(e *grapnelv1.Event) string {
	words := []string{e.GetId() + " (" + e.GetType() + ")", "accepted " + timeText(e.GetAcceptTime())}
	if key := e.GetOrderingKey(); key != "" {
		words = append(words, "ordering key "+key)
	}
	if e.GetPayloadPurged() {
		words = append(words, "payload purged "+timeText(e.GetPurgeTime()))
	}
	words = append(words, "webhook-id "+e.GetUid(), several(int(e.GetMatchedSubscriptions()), "subscription", "subscriptions")+" matched")
	return strings.Join(words, ", ")
}

func accountColumns() []column[*grapnelv1.EventAccount] {
	type account = *grapnelv1.EventAccount
	return []column[account]{
		{head: "SUBSCRIPTION", value: func(a account) string { return lastSegment(a.GetSubscription()) }},
		{head: "DELIVERY", detail: true, value: func(a account) string { return lastSegment(a.GetDelivery().GetName()) }},
		{head: "STATE", value: func(a account) string { return enumText(a.GetDelivery().GetState()) }},
		{head: "ATTEMPTS", value: func(a account) string {
			if a.GetDelivery() == nil {
				return ""
			}
			return fmt.Sprintf("%d/%d", a.GetDelivery().GetAttemptCount(), a.GetDelivery().GetMaxAttempts())
		}},
		{head: "WHY", value: func(a account) string { return a.GetCause() + valuesText(a.GetMatch().GetValues()) }},
	}
}

// valuesText is what a condition has read, behind a sentence.
func valuesText(values []*grapnelv1.ConditionValue) string {
	if len(values) == 0 {
		return ""
	}
	read := make([]string, len(values))
	for i, v := range values {
		read[i] = v.GetExpression() + " is " + v.GetValue()
	}
	return " (" + strings.Join(read, ", ") + ")"
}

// attemptLines are the attempts of the row above, in its columns.
func attemptLines(w *tabwriter.Writer, attempts []*grapnelv1.Attempt) {
	for _, a := range attempts {
		why := a.GetError()
		if code := a.GetResponseCode(); code != 0 && !strings.Contains(why, fmt.Sprint(code)) {
			why = strings.TrimSpace(fmt.Sprint(code) + " " + why)
		}
		took := roundDuration(a.GetDuration().AsDuration())
		fmt.Fprintf(w, "  %d\t%s\t%s\t%s\n", a.GetNumber(), enumText(a.GetOutcome()), took,
			clean(a.GetStartTime().AsTime().Local().Format(time.TimeOnly)+" "+why))
	}
}

func newEventMatch(c *cli) *cobra.Command {
	f := &publishFlags{}
	var only bool
	cmd := &cobra.Command{
		Use: "match", Short: "Say which subscriptions an event would go to, and why not to the others; nothing is sent", Args: cobra.NoArgs,
		Example: `  grapnel event match -n acme --type order.created --data '{"amount":12}'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns, err := c.namespaceID()
			if err != nil {
				return err
			}
			e, err := f.build(c, time.Now())
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Subscriptions(ns).Match(ctx, e, only), 0, matchColumns())
			})
		},
	}
	f.describe(cmd)
	cmd.Flags().BoolVar(&only, "matching-only", false, "only those that it would go to, wait for, or be skipped by")
	return cmd
}

func matchColumns() []column[*grapnelv1.SubscriptionMatch] {
	type match = *grapnelv1.SubscriptionMatch
	return []column[match]{
		{head: "SUBSCRIPTION", value: func(m match) string { return lastSegment(m.GetSubscription()) }},
		{head: "VERDICT", value: func(m match) string { return enumText(m.GetVerdict()) }},
		{head: "WHY", value: func(m match) string { return strings.TrimSpace(m.GetReason() + valuesText(m.GetValues())) }},
	}
}
