package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newSubscriptionCommand(c *cli) *cobra.Command {
	cmd := group("subscription", "Who receives which events, where and how",
		newSubscriptionCreate(c), newSubscriptionGet(c), newSubscriptionList(c), newSubscriptionUpdate(c),
		newSubscriptionDelete(c), newSubscriptionPause(c), newSubscriptionDisable(c), newSubscriptionResume(c), newSubscriptionTest(c),
		newSubscriptionWatch(c))
	cmd.Aliases = []string{"subscriptions", "sub"}
	return c.connectFlags(cmd, true)
}

func subscriptionColumns() []column[*grapnelv1.Subscription] {
	type sub = *grapnelv1.Subscription
	return []column[sub]{
		{head: "ID", value: func(s sub) string { return lastSegment(s.GetName()) }},
		{head: "NAME", detail: true, value: sub.GetName},
		{head: "DISPLAY NAME", detail: true, value: sub.GetDisplayName},
		{head: "STATE", value: func(s sub) string { return enumText(s.GetState()) }},
		{head: "REASON", detail: true, value: sub.GetStateReason},
		{head: "TYPES", value: func(s sub) string { return cmp.Or(strings.Join(s.GetEventTypes(), ","), "*") }},
		{head: "CONDITION", detail: true, value: sub.GetCondition},
		{head: "URI", value: sub.GetUri},
		{head: "DEAD LETTER", detail: true, value: func(s sub) string { return lastSegment(s.GetDeadLetter()) }},
		{head: "HEADERS", detail: true, value: func(s sub) string { return pairsText(s.GetHeaders()) }},
		{head: "HEADER TEMPLATES", detail: true, value: func(s sub) string { return pairsText(s.GetHeaderTemplates()) }},
		{head: "EVENT HEADERS", detail: true, value: func(s sub) string { return strings.Join(s.GetAllowedEventHeaders(), ", ") }},
		{head: "LABELS", detail: true, value: func(s sub) string { return pairsText(s.GetLabels()) }},
		{head: "PAYLOAD", detail: true, value: func(s sub) string { return shapeText(s.GetPayloadShape()) }},
		{head: "TRANSFORMER", detail: true, value: func(s sub) string { return bindingText(s.GetTransformer()) }},
		{head: "BATCHING", detail: true, value: func(s sub) string { return batchingText(s.GetBatching()) }},
		{head: "SIGNERS", detail: true, value: func(s sub) string { return bindingsText(s.GetSigners()) }},
		{head: "TRANSPORT", detail: true, value: func(s sub) string { return bindingText(s.GetTransport()) }},
		{head: "ATTEMPT TIMEOUT", detail: true, value: func(s sub) string { return durationText(s.GetAttemptTimeout()) }},
		{head: "RETRY", detail: true, value: func(s sub) string { return retryText(s.GetRetryPolicy()) }},
		{head: "MAX AGE", detail: true, value: func(s sub) string { return durationText(s.GetRetryPolicy().GetMaxAge()) }},
		{head: "MAX IN FLIGHT", detail: true, value: func(s sub) string { return number(s.GetMaxInFlight()) }},
		{head: "MAX RATE", detail: true, value: func(s sub) string { return rateText(s.GetMaxRate()) }},
		{head: "ORDER", detail: true, value: orderText},
		{head: "DISABLE AFTER", detail: true, value: func(s sub) string { return durationText(s.GetFailurePolicy().GetDisableAfter()) }},
		{head: "CREATED", detail: true, value: func(s sub) string { return timeText(s.GetCreateTime()) }},
		{head: "UPDATED", detail: true, value: func(s sub) string { return timeText(s.GetUpdateTime()) }},
		{head: "AGE", value: func(s sub) string { return age(s.GetCreateTime()) }},
		{head: "UID", detail: true, value: sub.GetUid},
		{head: "ETAG", detail: true, value: sub.GetEtag},
	}
}

// orderText is how an ordered subscription goes on with an ordering key; empty of one that is not.
func orderText(s *grapnelv1.Subscription) string {
	if !s.GetOrdered() {
		return ""
	}
	return "by key, " + strings.ToLower(strings.TrimPrefix(s.GetOnExhausted().String(), "ON_EXHAUSTED_")) + " when exhausted"
}

// shapeText is what a body is made of, as the flags say it.
func shapeText(p *grapnelv1.PayloadShape) string {
	if p == nil {
		return ""
	}
	words := []string{strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(p.GetFormat().String(), "FORMAT_"), "_", "-"))}
	if p.GetContentType() != "" {
		words = append(words, "as "+p.GetContentType())
	}
	if p.GetCompression() == grapnelv1.PayloadShape_COMPRESSION_GZIP {
		words = append(words, "gzip")
	}
	return strings.Join(words, ", ")
}

// batchingText is how deliveries share requests; empty where they do not.
func batchingText(b *grapnelv1.Batching) string {
	if b == nil {
		return ""
	}
	return fmt.Sprintf("%s of up to %d events or %d bytes, after %s", strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(b.GetFormat().String(), "FORMAT_"), "_", "-")),
		b.GetMaxEvents(), b.GetMaxBytes(), cmp.Or(durationText(b.GetMaxWait()), "0s"))
}

func bindingsText(all []*grapnelv1.PluginBinding) string {
	words := make([]string, len(all))
	for i, b := range all {
		words[i] = bindingText(b)
	}
	return strings.Join(words, "; ")
}

func bindingText(b *grapnelv1.PluginBinding) string {
	words := []string{lastSegment(b.GetPlugin())}
	if len(b.GetSecrets()) > 0 {
		words = append(words, pairsText(b.GetSecrets()))
	}
	if len(b.GetConfig().GetFields()) > 0 {
		if text, err := marshal(b.GetConfig()); err == nil {
			words = append(words, string(text))
		}
	}
	return strings.TrimSpace(strings.Join(words, " "))
}

func retryText(p *grapnelv1.RetryPolicy) string {
	if p == nil {
		return ""
	}
	var delays []string
	for _, d := range p.GetSchedule() {
		delays = append(delays, durationText(d))
	}
	how := "after " + strings.Join(delays, ", ")
	if len(delays) == 0 {
		how = fmt.Sprintf("after %s, times %g up to %s", cmp.Or(durationText(p.GetInitialBackoff()), "5s"),
			cmp.Or(p.GetMultiplier(), 2.5), cmp.Or(durationText(p.GetMaxBackoff()), "6h"))
	}
	if p.GetMaxAttempts() > 0 {
		return fmt.Sprintf("%d attempts, %s", p.GetMaxAttempts(), how)
	}
	return how
}

func rateText(rate float64) string {
	if rate == 0 {
		return ""
	}
	return fmt.Sprintf("%g/s", rate)
}

func completeSubscriptions(c *cli) cobra.CompletionFunc {
	return complete(c, func(ctx context.Context, cl *client.Client) iter.Seq2[*grapnelv1.Subscription, error] {
		return cl.Subscriptions(c.namespace).List(ctx)
	})
}

func newSubscriptionCreate(c *cli) *cobra.Command {
	var f subscriptionFlags
	var validateOnly bool
	cmd := &cobra.Command{
		Use: "create ID", Short: "Add a subscription", Args: oneID,
		Example: `  grapnel subscription create orders -n acme --uri https://hooks.example.com/orders \
      --type 'order.*' --secret orders-key
  grapnel subscription create large -n acme --uri https://example.com/x --secret orders-key \
      --condition 'event.data.total > 100.0' --schedule 10s,1m,10m
  grapnel subscription create both -n acme --uri https://example.com/x --payload cloudevents --gzip \
      --signer stripe --secret stripe-key --signer github --secret github-key
  grapnel subscription create orders -n acme -f orders.yaml --validate-only
  grapnel subscription create later -n acme --uri https://example.com/x --secret orders-key --state paused`,
	}
	f.register(cmd, c)
	var begin initial
	begin.register(cmd)
	cmd.Flags().BoolVar(&validateOnly, "validate-only", false, "check everything and store nothing")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		parent, id, err := c.created(subscriptions, args[0])
		if err != nil {
			return err
		}
		state, err := begin.of(grapnelv1.Subscription_State_value)
		if err != nil {
			return err
		}
		s := &grapnelv1.Subscription{}
		if _, err := f.apply(cmd, c, parent, s); err != nil {
			return err
		}
		if err := f.sameName(s, parent+"/subscriptions/"+id); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			r, err := cl.SubscriptionService().CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
				Parent: parent, SubscriptionId: id, Subscription: s, RequestId: client.NewID(), ValidateOnly: validateOnly,
				InitialState: grapnelv1.Subscription_State(state), StateReason: begin.reason,
			})
			if err != nil {
				return err
			}
			c.warn(r.GetWarnings())
			return show(c, r.GetSubscription(), subscriptionColumns())
		})
	}
	return cmd
}

func newSubscriptionGet(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "get ID", Short: "Show a subscription and how it goes", Args: oneID, ValidArgsFunction: firstArg(completeSubscriptions(c)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(subscriptions, args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.SubscriptionService().GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: name})
				if err != nil {
					return err
				}
				return show(c, r.GetSubscription(), append(subscriptionColumns(), statusColumns(r.GetStatus())...))
			})
		},
	}
}

// statusColumns are how deliveries of the one subscription that is shown go.
func statusColumns(s *grapnelv1.SubscriptionStatus) []column[*grapnelv1.Subscription] {
	var all []column[*grapnelv1.Subscription]
	add := func(head, text string) {
		all = append(all, column[*grapnelv1.Subscription]{head: head, detail: true, value: func(*grapnelv1.Subscription) string { return text }})
	}
	if s == nil {
		return nil
	}
	delivering := "yes"
	if !s.GetOpen() {
		delivering = "no: " + s.GetWaitReason()
		if s.GetWaitUntil() != nil {
			delivering += ", until " + timeText(s.GetWaitUntil())
		}
	} else if s.GetSlow() {
		delivering = "yes, few at a time: the target is slow"
	}
	breaker := enumText(s.GetBreaker())
	if s.GetBreakerSince() != nil {
		breaker += " since " + timeText(s.GetBreakerSince())
	}
	limit := number(s.GetInFlightLimit())
	if s.GetLimitReason() != "" {
		limit += ", " + s.GetLimitReason()
	}
	add("DELIVERING", delivering)
	add("BREAKER", breaker)
	add("NEXT PROBE", timeText(s.GetNextProbeTime()))
	add("HOST DOWN SINCE", timeText(s.GetHostDownSince()))
	add("HOST'S NEXT PROBE", timeText(s.GetHostProbeTime()))
	add("FAILING SINCE", timeText(s.GetFailingSince()))
	add("DISABLED AT", timeText(s.GetDisableTime()))
	add("LAST SUCCESS", timeText(s.GetLastSuccessTime()))
	add("OPEN DELIVERIES", number(s.GetOpenDeliveries()))
	add("IN FLIGHT", number(s.GetInFlight()))
	add("IN FLIGHT AT MOST", limit)
	add("OLDEST DUE", latencyText(s.GetOldestDueAge()))
	add("LATENCY", latencyText(s.GetLatency()))
	add("CONDITION ERRORS", number(s.GetConditionErrors()))
	add("LAST CONDITION ERROR", s.GetLastConditionError())
	return all
}

const subscriptionTerms = "`expression` over state, event_type, uri, labels.KEY, signer, transport, secret, uid, display_name, create_time"

func newSubscriptionList(c *cli) *cobra.Command {
	var filter string
	var all bool
	cmd := &cobra.Command{
		Use: "list", Short: "List subscriptions", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		Example: "  grapnel subscription list -n acme --filter 'state = DISABLED'\n  grapnel subscription list --all-namespaces",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns, columns := "-", subscriptionColumns()
			if all {
				columns[0] = columns[1] // full names, as IDs repeat
				columns[0].detail = false
			} else {
				var err error
				if ns, err = c.namespaceID(); err != nil {
					return err
				}
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Subscriptions(ns).List(ctx, client.Filter(filter)), 0, columns)
			})
		},
	}
	cmd.Flags().StringVar(&filter, "filter", "", subscriptionTerms)
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

func newSubscriptionUpdate(c *cli) *cobra.Command {
	var f subscriptionFlags
	var etag string
	var allowMissing, validateOnly bool
	cmd := &cobra.Command{
		Use: "update ID", Short: "Change a subscription; what is not given stays",
		Long: `Changes what the flags name and leaves the rest. A flag with an empty value clears: --condition ''.
--secret and --signer-config without --signer change the first signer. With --signer, the signers named are
all there are; one that is there already keeps the settings and secrets that are not given.
With --file the whole content is replaced by the file's.`,
		Args: oneID, ValidArgsFunction: firstArg(completeSubscriptions(c)),
		Example: "  grapnel subscription update orders -n acme --uri https://new.example.com/orders\n" +
			"  grapnel subscription update orders -n acme --schedule 5s,1m,1h\n" +
			"  grapnel subscription update orders -n acme --secret new-key",
	}
	f.register(cmd, c)
	cmd.Flags().StringVar(&etag, "etag", "", "fail unless this is the current etag")
	cmd.Flags().BoolVar(&allowMissing, "allow-missing", false, "create it when absent")
	cmd.Flags().BoolVar(&validateOnly, "validate-only", false, "check everything and store nothing")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, err := c.name(subscriptions, args[0])
		if err != nil {
			return err
		}
		parent := strings.TrimSuffix(name, "/subscriptions/"+lastSegment(name))
		s := &grapnelv1.Subscription{}
		paths, err := f.apply(cmd, c, parent, s)
		if err != nil {
			return err
		}
		if len(paths) == 0 {
			return usagef("nothing to change: give at least one flag")
		}
		if err := f.sameName(s, name); err != nil {
			return err
		}
		s.Name, s.Etag = name, cmp.Or(etag, s.GetEtag())
		r := &grapnelv1.UpdateSubscriptionRequest{
			Subscription: s, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
			AllowMissing: allowMissing, ValidateOnly: validateOnly,
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			r, err := f.update(ctx, cl, r)
			if err != nil {
				return err
			}
			c.warn(r.GetWarnings())
			return show(c, r.GetSubscription(), subscriptionColumns())
		})
	}
	return cmd
}

// openDeliveries says how many deliveries of a subscription are open, in words; nothing for none.
func openDeliveries(ctx context.Context, cl *client.Client, name string) (string, error) {
	r, err := cl.SubscriptionService().GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: name})
	switch {
	case errors.Is(err, client.ErrNotFound): // deleting says what is missing, or that it may be
		return "", nil
	case errors.Is(err, client.ErrPermissionDenied): // may delete, and not look
		return "its open deliveries", nil
	case err != nil:
		return "", err
	}
	if n := r.GetStatus().GetOpenDeliveries(); n > 0 {
		return several(n, "open delivery", "open deliveries"), nil
	}
	return "", nil
}

func newSubscriptionDelete(c *cli) *cobra.Command {
	r := &grapnelv1.DeleteSubscriptionRequest{}
	var yes bool
	cmd := &cobra.Command{
		Use: "delete ID", Short: "Remove a subscription and cancel its open deliveries",
		Long: `Removes a subscription and cancels its open deliveries: where there are any, it asks, or wants --yes when there is no
terminal to ask at.`,
		Args: oneID, ValidArgsFunction: firstArg(completeSubscriptions(c)),
	}
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag")
	cmd.Flags().BoolVar(&r.AllowMissing, "allow-missing", false, "succeed when it is already gone")
	yesFlag(cmd, &yes)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if r.Name, err = c.name(subscriptions, args[0]); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			loss := ""
			if !yes {
				var err error
				if loss, err = openDeliveries(ctx, cl, r.GetName()); err != nil {
					return err
				}
			}
			if err := c.confirm(cmd.Context(), yes, r.GetName(), loss); err != nil {
				return err
			}
			answer, err := cl.SubscriptionService().DeleteSubscription(ctx, r)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, answer, nil)
			}
			c.said("%s deleted, %s cancelled", r.Name, several(answer.GetCancelledDeliveries(), "delivery", "deliveries"))
			return nil
		})
	}
	return cmd
}

func newSubscriptionPause(c *cli) *cobra.Command {
	return c.turnCommand(subscriptions, "pause", "Stop attempts while events keep queueing", completeSubscriptions(c),
		func(ctx context.Context, cl *client.Client, t turning) (stated, error) {
			r, err := cl.SubscriptionService().PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: t.name, Reason: t.reason, Etag: t.etag})
			return r.GetSubscription(), err
		})
}

func newSubscriptionDisable(c *cli) *cobra.Command {
	return c.turnCommand(subscriptions, "disable", "Stop attempts, and record matching events as SKIPPED", completeSubscriptions(c),
		func(ctx context.Context, cl *client.Client, t turning) (stated, error) {
			r, err := cl.SubscriptionService().DisableSubscription(ctx, &grapnelv1.DisableSubscriptionRequest{Name: t.name, Reason: t.reason, Etag: t.etag})
			return r.GetSubscription(), err
		})
}

func newSubscriptionResume(c *cli) *cobra.Command {
	return c.turnCommand(subscriptions, "resume", "Restart attempts after a pause or disabling, also an automatic one", completeSubscriptions(c),
		func(ctx context.Context, cl *client.Client, t turning) (stated, error) {
			r, err := cl.SubscriptionService().ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: t.name, Reason: t.reason, Etag: t.etag})
			if err == nil {
				c.lifted(r.GetLifted())
			}
			return r.GetSubscription(), err
		})
}

// lifted tells people what held deliveries back until now.
func (c *cli) lifted(what string) {
	if what != "" && !c.forPrograms() {
		c.said("lifted: %s", what)
	}
}

// errNotAccepted is the outcome of a test that reached the server but not the receiver's approval.
var errNotAccepted = errors.New("the receiver did not accept the test")

func newSubscriptionTest(c *cli) *cobra.Command {
	var eventType, data, contentType string
	cmd := &cobra.Command{
		Use: "test ID", Short: "Make one attempt now and show it; nothing is stored or retried",
		Long: "Makes one attempt now and shows it, with what the transformer made of the event where there is one. Nothing is stored or retried. " +
			"Exits with 1 when the receiver does not accept it.",
		Args: oneID, ValidArgsFunction: firstArg(completeSubscriptions(c)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(subscriptions, args[0])
			if err != nil {
				return err
			}
			if err := needs(cmd, "content-type", "data"); err != nil {
				return err
			}
			r := &grapnelv1.TestSubscriptionRequest{Name: name}
			if eventType != "" || data != "" {
				body, err := c.readValue(data)
				if err != nil {
					return fmt.Errorf("read --data: %w", err)
				}
				r.Event = &grapnelv1.Event{
					Id: client.NewID(), Type: cmp.Or(eventType, "grapnel.test"),
				}
				if cmd.Flags().Changed("data") {
					r.Event.DataContentType, r.Event.Payload = cmp.Or(contentType, guessContentType(body)), &grapnelv1.Event_Data{Data: body}
				}
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				answer, err := cl.SubscriptionService().TestSubscription(ctx, r)
				if err != nil {
					return err
				}
				if t := answer.GetTransformed(); t.GetDropped() {
					c.said("the transformer drops the event: %s", cmp.Or(t.GetDropReason(), "no reason given"))
					return nil
				} else if t != nil {
					c.said("sent as %s: %s", t.GetContentType(), string(t.GetBody()))
				}
				if err := show(c, answer.GetAttempt(), attemptColumns()); err != nil {
					return err
				}
				if answer.GetAttempt().GetOutcome() != grapnelv1.Attempt_OUTCOME_SUCCEEDED {
					return errNotAccepted
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&eventType, "type", "", "type of the event to send; default grapnel.test. Without --data a registered type is sent as a sample")
	cmd.Flags().StringVar(&data, "data", "", "body: text, `@file` or - for standard input")
	cmd.Flags().StringVar(&contentType, "content-type", "", "media type of --data")
	return cmd
}
