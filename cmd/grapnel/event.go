package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newEventCommand(c *cli) *cobra.Command {
	cmd := group("event", "Events that were accepted", newEventGet(c), newEventList(c), newEventExplain(c), newEventMatch(c), newEventPurge(c))
	cmd.Aliases = []string{"events"}
	return c.connectFlags(cmd, true)
}

func eventColumns() []column[*grapnelv1.Event] {
	type event = *grapnelv1.Event
	return []column[event]{
		{head: "ID", value: event.GetId},
		{head: "TYPE", value: event.GetType},
		{head: "WEBHOOK-ID", detail: true, value: event.GetUid},
		{head: "SUBJECT", value: event.GetSubject},
		{head: "ORDERING KEY", detail: true, value: event.GetOrderingKey},
		{head: "SOURCE", detail: true, value: event.GetSource},
		{head: "CONTENT TYPE", detail: true, value: event.GetDataContentType},
		{head: "ATTRIBUTES", detail: true, value: func(e event) string { return pairsText(e.GetAttributes()) }},
		{head: "HEADERS", detail: true, value: func(e event) string { return pairsText(e.GetHeaders()) }},
		{head: "BYTES", value: func(e event) string { return number(e.GetSizeBytes()) }},
		{head: "MATCHED", value: func(e event) string { return fmt.Sprint(e.GetMatchedSubscriptions()) }},
		{head: "TIME", detail: true, value: func(e event) string { return timeText(e.GetTime()) }},
		{head: "ACCEPTED", value: func(e event) string { return timeText(e.GetAcceptTime()) }},
		{head: "DELIVER TIME", detail: true, value: func(e event) string { return timeText(e.GetDeliverTime()) }},
		{head: "TTL", detail: true, value: func(e event) string { return durationText(e.GetTtl()) }},
		{head: "PURGED", detail: true, value: func(e event) string { return timeText(e.GetPurgeTime()) }},
		{head: "PAYLOAD", detail: true, value: payloadText},
	}
}

func payloadText(e *grapnelv1.Event) string {
	switch p := e.GetPayload().(type) {
	case *grapnelv1.Event_Data:
		return string(p.Data)
	case *grapnelv1.Event_Text:
		return p.Text
	case *grapnelv1.Event_Json:
		return string(payloadBytes(e))
	}
	if e.GetPayloadPurged() {
		return "no longer kept"
	}
	return ""
}

// payloadBytes is the body as receivers get it.
func payloadBytes(e *grapnelv1.Event) []byte {
	switch p := e.GetPayload().(type) {
	case *grapnelv1.Event_Data:
		return p.Data
	case *grapnelv1.Event_Text:
		return []byte(p.Text)
	case *grapnelv1.Event_Json:
		text, err := protojson.Marshal(p.Json)
		if err == nil {
			return text
		}
	}
	return nil
}

func newEventGet(c *cli) *cobra.Command {
	var payload, raw bool
	cmd := &cobra.Command{
		Use: "get ID", Short: "Show an event", Args: oneID,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := excludes(cmd, "raw", "it prints the payload and nothing else", "payload", "output"); err != nil {
				return err
			}
			name, err := c.name(events, args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.EventService().GetEvent(ctx, &grapnelv1.GetEventRequest{Name: name, IncludePayload: payload || raw})
				if err != nil {
					return err
				}
				if raw {
					if r.GetEvent().GetPayloadPurged() {
						return fmt.Errorf("the payload of %s is no longer kept", name)
					}
					return c.exact(payloadBytes(r.GetEvent()))
				}
				return show(c, r.GetEvent(), eventColumns())
			})
		},
	}
	cmd.Flags().BoolVar(&payload, "payload", false, "show the payload too")
	cmd.Flags().BoolVar(&raw, "raw", false, "print the payload only, byte for byte; on a terminal, what it can show")
	return cmd
}

func newEventPurge(c *cli) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "purge ID", Short: "Take away what an event carries, and keep its history", Args: oneID,
		Long: `Takes away what an event carries, named by its id or by the webhook-id that receivers see: its payload, subject and
attributes, what transformers have made of it, and what is kept of requests and answers. Its open deliveries are cancelled,
and nothing of it can be sent again. Of what has become of it nothing is lost but words that may quote it.

grapnel erasure does it for all events of a person, and sees to it that no file of the server holds them any more.`,
		Example: "  grapnel event purge order-1001 -n acme --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(events, args[0])
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), yes, "the payload of "+name, "what it carries, for good"); err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.EventService().PurgeEventPayload(ctx, &grapnelv1.PurgeEventPayloadRequest{Name: name})
				if err != nil {
					return err
				}
				if c.forPrograms() {
					return show[*grapnelv1.PurgeEventPayloadResponse](c, r, nil)
				}
				c.said("purged %s; %s cancelled", name, several(int(r.GetCancelledDeliveries()), "delivery", "deliveries"))
				return nil
			})
		},
	}
	yesFlag(cmd, &yes)
	return cmd
}

func newEventList(c *cli) *cobra.Command {
	var f listFlags
	var faulty bool
	cmd := &cobra.Command{
		Use: "list", Short: "List events, newest first", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		Example: `  grapnel event list -n acme --type 'order.*' --since 1h
  grapnel event list -n acme --filter 'subject = "42"'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns, err := c.namespaceID()
			if err != nil {
				return err
			}
			all, err := f.terms("type", "accept_time", time.Now())
			if err != nil {
				return err
			}
			if faulty {
				all.add("condition_error_count > 0")
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Events(ctx, ns, client.Filter(all.String()), pageFor(f.limit)), f.limit, eventColumns())
			})
		},
	}
	f.register(cmd, "id, uid, type, subject, source, time, accept_time, matched_subscriptions, condition_error_count, attributes.KEY")
	cmd.Flags().BoolVar(&faulty, "condition-errors", false, "only those for which a subscription's condition could not be evaluated")
	return cmd
}

// pageFor fetches no more than is shown, and one more to know whether there is more.
func pageFor(limit int) client.ListOption {
	if limit <= 0 || limit >= 1000 {
		return client.PageSize(1000)
	}
	return client.PageSize(limit + 1)
}
