package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// publishFlags describe one event, or how to read many.
type publishFlags struct {
	event       grapnelv1.Event
	data        string
	attributes  []string
	headers     []string
	deliverTime string
	at          string
	ttl         time.Duration
	lines       bool
	stream      bool
	wait        time.Duration
}

func newPublishCommand(c *cli) *cobra.Command {
	f := &publishFlags{}
	cmd := &cobra.Command{
		Use:   "publish",
		Short: "Publish one event, or many from standard input",
		Long: `Publishes one event, given by flags, and prints its name once it is stored durably.

With --jsonl it reads standard input instead, one event a line in the API's JSON, and sends them in batches:

  {"type":"order.created","id":"o-1","json":{"order":1}}
  {"type":"order.created","id":"o-2","text":"plain text"}

"json" is a payload given in place, "text" is sent as it is, "data" is base64. Lines without "id" get one;
with an "id" in every line the whole command can be repeated safely after any failure. --type, --source and
--subject fill what a line leaves out. Lines that fail are named on standard error, and the exit code is 1.`,
		Example: `  grapnel publish -n acme --type order.created --data '{"order":1001}'
  grapnel publish -n acme --type report.ready --data @report.json --id report-7 --attribute tenant=eu
  grapnel publish -n acme --type reminder --data - --deliver-time 2h < body.txt
  grapnel publish -n acme --type order.paid --data '{"order":1001}' --ordering-key order-1001
  grapnel publish -n acme --jsonl < events.jsonl`,
		Args: cobra.NoArgs,
	}
	f.register(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.check(cmd); err != nil {
			return err
		}
		ns, err := c.namespaceID()
		if err != nil {
			return err
		}
		if f.lines {
			return f.publishLines(cmd, c, ns)
		}
		return f.publishOne(cmd, c, ns)
	}
	return c.connectFlags(cmd, true)
}

func (f *publishFlags) register(cmd *cobra.Command) {
	f.describe(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.event.OrderingKey, "ordering-key", "", "ordered subscriptions get the events of a key one after another")
	flags.StringArrayVarP(&f.headers, "header", "H", nil, "header as `name=value`, sent to subscriptions that allow it; repeat for more; not for secrets")
	flags.StringVar(&f.deliverTime, "deliver-time", "", "first attempt not before this `time`, RFC 3339, or a delay such as 2h")
	spanVar(flags, &f.ttl, "ttl", 0, 0, 0, "do not attempt it for longer than this")
	flags.BoolVar(&f.lines, "jsonl", false, "read events from standard input, one JSON object a line")
	spanVar(flags, &f.wait, "wait", 0, 0, 0, "wait up to this long until its deliveries have ended, which is watched, and show them; exits with 1 unless all succeeded")
	flags.BoolVar(&f.stream, "stream", false, "with --jsonl: use one PublishStream instead of batches")
}

// describe registers what an event is made of.
func (f *publishFlags) describe(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.event.Type, "type", "", "what happened, such as order.created")
	flags.StringVar(&f.data, "data", "", "the body: text, `@file`, or - for standard input")
	flags.StringVar(&f.event.Id, "id", "", "event ID; publishing it again is then harmless")
	flags.StringVar(&f.event.Source, "source", "", "CloudEvents source; default //grapnel/NAMESPACE")
	flags.StringVar(&f.event.Subject, "subject", "", "what the event is about")
	flags.StringVar(&f.event.DataContentType, "content-type", "", "media type of the body; default by what it looks like")
	flags.StringVar(&f.event.DataSchema, "data-schema", "", "URI of the body's schema")
	flags.StringArrayVar(&f.attributes, "attribute", nil, "extension attribute as `name=value`; repeat for more")
	flags.StringVar(&f.at, "time", "", "when it happened, RFC 3339; default now")
}

// check refuses flags that would have no say.
func (f *publishFlags) check(cmd *cobra.Command) error {
	if err := excludes(cmd, "jsonl", "each line of standard input is an event of its own", "data", "id", "ordering-key", "content-type", "data-schema",
		"attribute", "header", "time", "deliver-time", "ttl", "wait"); err != nil {
		return err
	}
	return needs(cmd, "stream", "jsonl")
}

// build makes the one event that the flags describe.
func (f *publishFlags) build(c *cli, now time.Time) (*grapnelv1.Event, error) {
	e := &f.event
	if e.GetType() == "" {
		return nil, usagef("--type is required, such as --type order.created")
	}
	body, err := c.readValue(f.data)
	if err != nil {
		return nil, fmt.Errorf("read --data: %w", err)
	}
	e.Payload = &grapnelv1.Event_Data{Data: body}
	e.DataContentType = cmp.Or(e.GetDataContentType(), guessContentType(body))
	if len(f.attributes) > 0 {
		if e.Attributes, err = parsePairs("attribute", f.attributes); err != nil {
			return nil, err
		}
	}
	if len(f.headers) > 0 {
		if e.Headers, err = parsePairs("header", f.headers); err != nil {
			return nil, err
		}
	}
	if f.at != "" {
		at, err := time.Parse(time.RFC3339Nano, f.at)
		if err != nil {
			return nil, usagef("--time: %q is not RFC 3339, such as 2026-01-31T12:00:00Z", f.at)
		}
		e.Time = timestamppb.New(at)
	}
	if f.deliverTime != "" {
		at, err := parseWhen(f.deliverTime, now)
		if err != nil {
			return nil, usagef("--deliver-time: %w", err)
		}
		e.DeliverTime = timestamppb.New(at)
	}
	if f.ttl != 0 {
		e.Ttl = durationpb.New(f.ttl)
	}
	e.Id = cmp.Or(e.GetId(), client.NewID())
	return e, nil
}

// parseWhen reads a time, or a delay from now.
func parseWhen(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil {
		return now.Add(d), nil
	}
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is neither RFC 3339, such as 2026-01-31T12:00:00Z, nor a delay such as 2h", text)
	}
	return at, nil
}

func guessContentType(body []byte) string {
	switch {
	case json.Valid(body):
		return "application/json"
	case utf8.Valid(body):
		return "text/plain; charset=utf-8"
	}
	return "application/octet-stream"
}

func (f *publishFlags) publishOne(cmd *cobra.Command, c *cli, ns string) error {
	e, err := f.build(c, time.Now())
	if err != nil {
		return err
	}
	return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
		r, err := cl.PublishService().Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/" + ns, Event: e})
		if err != nil {
			return err
		}
		if f.wait > 0 {
			return f.watch(cmd.Context(), c, cl, ns, r)
		}
		if c.forPrograms() {
			return show(c, r, nil)
		}
		switch {
		case r.GetDuplicate():
			c.said("%s was published before; nothing new is sent", r.GetName())
		case r.GetMatchedSubscriptions() == 0:
			c.said("%s stored; no subscription matches it, and grapnel event explain says why", r.GetName())
		case r.GetMatchedSubscriptions() == 1:
			c.said("%s stored, for 1 subscription", r.GetName())
		default:
			c.said("%s stored, for %d subscriptions", r.GetName(), r.GetMatchedSubscriptions())
		}
		return nil
	})
}

// watch waits until the deliveries of what was published have ended, and shows them as delivery list does. What --wait
// bounds is the waiting, and not the last look: an answer that was cut short would show deliveries as not made.
func (f *publishFlags) watch(ctx context.Context, c *cli, cl *client.Client, ns string, r *grapnelv1.PublishResponse) error {
	w := &ending{cl: cl, namespace: ns, filter: client.Filter(fmt.Sprintf("event = %q", r.GetName())), matched: int(r.GetMatchedSubscriptions())}
	if err := w.wait(ctx, f.wait); err != nil {
		return err
	}
	all, err := w.look(ctx)
	if err != nil {
		return err
	}
	t := newTable(c, deliveryColumns())
	succeeded := 0
	for _, d := range all {
		if d.GetState() == grapnelv1.Delivery_STATE_SUCCEEDED {
			succeeded++
		}
		if err := t.row(d); err != nil {
			return err
		}
	}
	if err := t.flush(); err != nil {
		return err
	}
	if most := max(len(all), int(r.GetMatchedSubscriptions())); succeeded < most {
		return fmt.Errorf("%d of %s of %s succeeded", succeeded, several(most, "delivery", "deliveries"), r.GetName())
	}
	if len(all) == 0 {
		c.said("%s stored; no subscription matches it", r.GetName())
	}
	return nil
}

// ending are the deliveries of one event, until they have ended.
type ending struct {
	cl        *client.Client
	namespace string
	filter    client.ListOption
	matched   int
	// looked: what there was when the watch began is known. ended says of each delivery that is known whether it has, and open
	// is how many have not.
	looked bool
	ended  map[string]bool
	open   int
}

// wait returns when all have ended, or after a time; an error is that of looking, or ctx's. Changes are watched: the watch stands
// before the first look, so that no end falls in between. Where the server lets nobody watch, as when too many do, it looks five
// times a second instead.
func (w *ending) wait(ctx context.Context, most time.Duration) error {
	waiting, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	watching, enough := context.WithCancel(waiting)
	defer enough()
	var failed error
	stands := client.Watching(func(string) {
		_, failed = w.look(waiting)
		if failed != nil || w.over() {
			enough()
		}
	})
	for ch, err := range w.cl.WatchDeliveries(watching, w.namespace, w.filter, stands) {
		if err != nil {
			break
		}
		if w.note(ch.Delivery); w.over() {
			break
		}
	}
	pause := time.NewTicker(200 * time.Millisecond)
	defer pause.Stop()
	for failed == nil && !w.over() && waiting.Err() == nil {
		if _, failed = w.look(waiting); failed != nil || w.over() {
			break
		}
		select {
		case <-pause.C:
		case <-waiting.Done():
		}
	}
	if waiting.Err() != nil { // whatever a look that was cut short says
		return ctx.Err()
	}
	return failed
}

// look lists what there is.
func (w *ending) look(ctx context.Context) ([]*grapnelv1.Delivery, error) {
	all, err := collect(nil, w.cl.Deliveries(ctx, w.namespace, w.filter, client.PageSize(1000)))
	w.looked, w.ended, w.open = err == nil, make(map[string]bool, len(all)), 0
	for _, d := range all {
		w.note(d)
	}
	return all, err
}

// note takes in where a delivery stands.
func (w *ending) note(d *grapnelv1.Delivery) {
	if !w.looked {
		return
	}
	ended, known := w.ended[d.GetName()]
	if known && !ended {
		w.open--
	}
	if w.ended[d.GetName()] = client.Ended(d); !client.Ended(d) {
		w.open++
	}
}

// over reports whether all that were matched are known, and all that are known have ended.
func (w *ending) over() bool { return w.looked && w.open == 0 && len(w.ended) >= w.matched }

// collect appends all items to a slice. On an error the slice holds what came before it.
func collect[T any](to []T, items iter.Seq2[T, error]) ([]T, error) {
	for item, err := range items {
		if err != nil {
			return to, err
		}
		to = append(to, item)
	}
	return to, nil
}
