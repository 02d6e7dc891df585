package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newDeliveryTail(c *cli) *cobra.Command {
	var f deliveryFlags
	var token string
	var count int
	cmd := &cobra.Command{
		Use: "tail", Short: "Show what becomes of deliveries as it happens", Args: cobra.NoArgs,
		Long: `Shows a line for each change of a delivery: made, attempted, waiting, ended. It goes on after a connection that broke and a
server that was restarted, and shows each change once. It ends when it is interrupted, and says on standard error how another
one goes on where this one was.`,
		Example: `  grapnel delivery tail -n acme
  grapnel delivery tail -n acme --subscription orders --state failed,scheduled
  grapnel delivery tail -n acme --filter 'last_attempt.response_code >= 500' -o json`,
	}
	flags := cmd.Flags()
	f.registerTerms(cmd, deliveryFields)
	f.registerOwn(cmd, c)
	flags.StringVar(&token, "resume", "", "go on behind this `token` of an earlier one")
	countVar(flags, &count, "count", 0, 0, 0, "end after this many changes; 0 goes on")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ns, err := c.namespaceID()
		if err != nil {
			return err
		}
		expression, err := f.filter(c, time.Now())
		if err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			t := &tail{c: c, namespace: ns, token: token, count: count}
			return showChanges(t, cl.WatchDeliveries(ctx, ns, t.options(expression)...), func(ch client.DeliveryChange) (string, error) {
				return ch.ResumeToken, c.tailed(ch.Delivery)
			})
		})
	}
	return cmd
}

func newSubscriptionWatch(c *cli) *cobra.Command {
	var filter, token string
	var count int
	var all bool
	cmd := &cobra.Command{
		Use: "watch", Short: "Show which subscriptions are made, changed and deleted as it happens", Args: cobra.NoArgs,
		Long: `Shows a line for each subscription that is made, changed or deleted. It goes on after a connection that broke and a server that
was restarted. It ends when it is interrupted, and says on standard error how another one goes on where this one was.`,
		Example: `  grapnel subscription watch -n acme
  grapnel subscription watch --all-namespaces
  grapnel subscription watch -n acme --filter 'state = DISABLED' -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns := "-"
			if !all {
				var err error
				if ns, err = c.namespaceID(); err != nil {
					return err
				}
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				t := &tail{c: c, namespace: ns, token: token, count: count}
				return showChanges(t, cl.Subscriptions(ns).Watch(ctx, t.options(filter)...), func(ch client.SubscriptionChange) (string, error) {
					return ch.ResumeToken, c.watchedSubscription(ch, all)
				})
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&filter, "filter", "", subscriptionTerms)
	flags.BoolVarP(&all, "all-namespaces", "A", false, "of all namespaces")
	flags.StringVar(&token, "resume", "", "go on behind this `token` of an earlier one")
	countVar(flags, &count, "count", 0, 0, 0, "end after this many changes; 0 goes on")
	return cmd
}

// watchedSubscription shows one change: a line for people, with the whole name where IDs may repeat, or what --output asks for, which
// says of what was deleted that it was.
func (c *cli) watchedSubscription(ch client.SubscriptionChange, whole bool) error {
	switch {
	case c.output == formatName:
		return c.document(ch.Subscription)
	case c.forPrograms():
		return c.document(&grapnelv1.WatchSubscriptionsResponse{Subscription: ch.Subscription, Deleted: ch.Deleted, ResumeToken: ch.ResumeToken})
	}
	s := ch.Subscription
	what, at, name := enumText(s.GetState()), s.GetUpdateTime(), lastSegment(s.GetName())
	if whole {
		name = s.GetName()
	}
	if ch.Deleted {
		what, at = "DELETED", timestamppb.Now()
	}
	fields := []string{at.AsTime().Local().Format("15:04:05"), fmt.Sprintf("%-8s", what), clean(name), clean(strings.Join(s.GetEventTypes(), ",")), clean(s.GetUri())}
	if s.GetStateReason() != "" && !ch.Deleted {
		fields = append(fields, clean(s.GetStateReason()))
	}
	return c.styled(strings.TrimRight(strings.Join(fields, "  "), " ") + "\n")
}

// tail is a command that shows changes until it has shown enough.
type tail struct {
	c         *cli
	namespace string
	token     string // where it begins, and is
	count     int
	standing  bool
}

// options have a watch say where it stands.
func (t *tail) options(expression string) []client.ListOption {
	return []client.ListOption{client.Filter(expression), client.ResumeFrom(t.token), client.Watching(func(token string) {
		if !t.standing {
			t.standing = true
			fmt.Fprintln(t.c.stderr, "watching namespaces/"+t.namespace)
		}
		t.token = token
	})}
}

// showChanges shows changes, of which show says how a watch goes on behind them.
func showChanges[T any](t *tail, changes iter.Seq2[T, error], show func(T) (token string, err error)) error {
	n := 0
	for ch, err := range changes {
		if err != nil {
			if t.token != "" && !errors.Is(err, client.ErrResumeTokenExpired) && !errors.Is(err, client.ErrInvalidField) {
				fmt.Fprintf(t.c.stderr, "to go on from here: --resume %s\n", t.token)
			}
			return err
		}
		if t.token, err = show(ch); err != nil {
			return err
		}
		if n++; n == t.count {
			return nil
		}
	}
	return nil
}

// tailed shows one change: a line for people, or what --output asks for.
func (c *cli) tailed(d *grapnelv1.Delivery) error {
	if c.forPrograms() {
		return c.document(d)
	}
	state := fmt.Sprintf("%-9s", enumText(d.GetState()))
	fields := []string{
		changedAt(d).Local().Format("15:04:05.000"), "", clean(lastSegment(d.GetSubscription())), clean(d.GetEventType()), clean(eventID(d.GetEvent())), happened(d),
	}
	if c.output == formatWide {
		fields = append(fields, clean(lastSegment(d.GetName())))
	}
	fields[1] = c.coloured(d.GetState(), state)
	return c.styled(strings.TrimRight(strings.Join(fields, "  "), " ") + "\n")
}

// document writes one of many messages, as --output asks.
func (c *cli) document(m proto.Message) error {
	text, err := c.encode(m, false)
	if err != nil {
		return err
	}
	if c.output == formatYAML {
		text = append([]byte("---\n"), text...)
	}
	_, err = c.stdout.Write(text)
	return err
}

// changedAt is when what a change shows has happened, as far as the delivery tells.
func changedAt(d *grapnelv1.Delivery) time.Time {
	var at *timestamppb.Timestamp
	switch a := d.GetLastAttempt(); {
	case d.GetCompleteTime() != nil:
		at = d.GetCompleteTime()
	case a != nil:
		return a.GetStartTime().AsTime().Add(a.GetDuration().AsDuration())
	default:
		at = d.GetCreateTime()
	}
	return at.AsTime()
}

// happened says what has led to a state, and what comes next.
func happened(d *grapnelv1.Delivery) string {
	var parts []string
	if a := d.GetLastAttempt(); a != nil {
		parts = append(parts, fmt.Sprintf("attempt %d: %s in %s", a.GetNumber(), cmp.Or(outcomeText(a), "no answer"), roundDuration(a.GetDuration().AsDuration())))
		if a.GetError() != "" {
			parts = append(parts, clean(a.GetError()))
		}
	}
	if d.GetNextAttemptTime() != nil && d.GetState() == grapnelv1.Delivery_STATE_SCHEDULED {
		parts = append(parts, "next at "+d.GetNextAttemptTime().AsTime().Local().Format("15:04:05"))
	}
	if d.GetStateReason() != "" {
		parts = append(parts, clean(d.GetStateReason()))
	}
	return strings.Join(parts, ", ")
}

// colours of states, for terminals whose owners have not said no to them (no-color.org).
var stateColours = map[grapnelv1.Delivery_State]string{
	grapnelv1.Delivery_STATE_SUCCEEDED: "32", grapnelv1.Delivery_STATE_SCHEDULED: "33", grapnelv1.Delivery_STATE_EXHAUSTED: "31",
	grapnelv1.Delivery_STATE_REJECTED: "31", grapnelv1.Delivery_STATE_CANCELLED: "90", grapnelv1.Delivery_STATE_SKIPPED: "90",
}

func (c *cli) coloured(state grapnelv1.Delivery_State, text string) string {
	colour := stateColours[state]
	if no, _ := c.lookupEnv("NO_COLOR"); colour == "" || no != "" || !isTerminal(c.stdout) {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}
