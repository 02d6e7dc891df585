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
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newNamespaceCommand(c *cli) *cobra.Command {
	cmd := group("namespace", "Tenants and their limits",
		newNamespaceCreate(c), newNamespaceGet(c), newNamespaceList(c), newNamespaceUpdate(c),
		newNamespacePause(c), newNamespaceDisable(c), newNamespaceResume(c), newNamespaceDelete(c), newNamespaceUndelete(c))
	cmd.Aliases = []string{"namespaces", "ns"}
	return c.connectFlags(cmd, false)
}

func namespaceColumns() []column[*grapnelv1.Namespace] {
	type ns = *grapnelv1.Namespace
	return []column[ns]{
		{head: "ID", value: func(n ns) string { return lastSegment(n.GetName()) }},
		{head: "STATE", value: func(n ns) string { return enumText(n.GetState()) }},
		{head: "REASON", detail: true, value: ns.GetStateReason},
		{head: "LABELS", value: func(n ns) string { return pairsText(n.GetLabels()) }},
		{head: "MAX SUBSCRIPTIONS", detail: true, value: func(n ns) string { return number(n.GetQuota().GetMaxSubscriptions()) }},
		{head: "MAX PUBLISH RATE", detail: true, value: func(n ns) string { return number(n.GetQuota().GetMaxPublishRate()) }},
		{head: "MAX EVENT BYTES", detail: true, value: func(n ns) string { return number(n.GetQuota().GetMaxEventBytes()) }},
		{head: "MAX OPEN DELIVERIES", detail: true, value: func(n ns) string { return number(n.GetQuota().GetMaxOpenDeliveries()) }},
		{head: "RETENTION", value: func(n ns) string { return durationText(n.GetQuota().GetRetention()) }},
		{head: "DEAD LETTERS", detail: true, value: func(n ns) string { return durationText(n.GetQuota().GetDeadLetterRetention()) }},
		{head: "PAYLOADS", detail: true, value: func(n ns) string { return durationText(n.GetQuota().GetPayloadRetention()) }},
		{head: "ATTEMPTS", detail: true, value: func(n ns) string { return durationText(n.GetQuota().GetAttemptRetention()) }},
		{head: "WEIGHT", detail: true, value: func(n ns) string { return number(cmp.Or(n.GetWeight(), 1)) }},
		{head: "REQUIRES EVENT TYPES", detail: true, value: func(n ns) string { return yesOnly(n.GetRequireEventTypes()) }},
		{head: "SUBSCRIPTIONS", detail: true, value: func(n ns) string { return number(n.GetUsage().GetSubscriptions()) }},
		{head: "OPEN DELIVERIES", detail: true, value: func(n ns) string { return number(n.GetUsage().GetOpenDeliveries()) }},
		{head: "OLDEST DUE", detail: true, value: func(n ns) string { return durationText(n.GetUsage().GetOldestDueAge()) }},
		{head: "CREATED", detail: true, value: func(n ns) string { return timeText(n.GetCreateTime()) }},
		{head: "AGE", value: func(n ns) string { return age(n.GetCreateTime()) }},
		{head: "ERASED", detail: true, value: func(n ns) string { return timeText(n.GetPurgeTime()) }},
		{head: "UID", detail: true, value: ns.GetUid},
		{head: "ETAG", detail: true, value: ns.GetEtag},
	}
}

func completeNamespaces(c *cli) cobra.CompletionFunc {
	return complete(c, func(ctx context.Context, cl *client.Client) iter.Seq2[*grapnelv1.Namespace, error] {
		return cl.Namespaces(ctx)
	})
}

// namespaceFlags are what create and update set.
type namespaceFlags struct {
	labels                                     []string
	subscriptions, rate, bytes, openDeliveries int32
	retention, deadLetters, payloads, attempts time.Duration
	weight                                     int32
	requireTypes                               bool
}

func (f *namespaceFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVarP(&f.labels, "label", "l", nil, "label as `name=value`; repeat for more")
	countVar(flags, &f.subscriptions, "max-subscriptions", 0, 0, 0, "most subscriptions; 0 is no limit")
	countVar(flags, &f.rate, "max-publish-rate", 0, 0, 0, "most events accepted per second, of which ten seconds' worth may come at once; 0 is no limit")
	countVar(flags, &f.bytes, "max-event-bytes", 0, 0, 0, "most bytes of one payload; 0 is the default, 262144")
	countVar(flags, &f.openDeliveries, "max-open-deliveries", 0, 0, 0, "most open deliveries; 0 is no limit")
	spanVar(flags, &f.retention, "retention", 0, 0, 0, "how long final deliveries are kept; 0 is the default, 72h")
	spanVar(flags, &f.deadLetters, "dead-letter-retention", 0, 0, 0, "how long those without success are kept after their end; 0 is as long as --retention")
	spanVar(flags, &f.payloads, "payload-retention", 0, 0, 0, "how long events keep what they carry of which no delivery is open; 0 is as long as --retention")
	spanVar(flags, &f.attempts, "attempt-retention", 0, 0, 0, "how long failed attempts of such deliveries are kept; 0 is as long as --retention")
	countVar(flags, &f.weight, "weight", 0, 0, 100, "share beside other namespaces where receivers want more attempts than the server makes at a time, 1 to 100; 0 is the default, 1")
	flags.BoolVar(&f.requireTypes, "require-event-types", false, "refuse events whose type is not registered; see grapnel event-type")
}

// apply puts the flags that were given into n and returns the paths of what it set.
func (f *namespaceFlags) apply(cmd *cobra.Command, n *grapnelv1.Namespace) (paths []string, err error) {
	changed := cmd.Flags().Changed
	n.Quota = &grapnelv1.Quota{}
	if changed("label") {
		if n.Labels, err = parsePairs("label", f.labels); err != nil {
			return nil, err
		}
		paths = append(paths, "labels")
	}
	if changed("weight") {
		n.Weight = f.weight
		paths = append(paths, "weight")
	}
	if changed("require-event-types") {
		n.RequireEventTypes = f.requireTypes
		paths = append(paths, "require_event_types")
	}
	for _, limit := range []struct {
		flag, path string
		set        func()
	}{
		{"max-subscriptions", "max_subscriptions", func() { n.Quota.MaxSubscriptions = f.subscriptions }},
		{"max-publish-rate", "max_publish_rate", func() { n.Quota.MaxPublishRate = f.rate }},
		{"max-event-bytes", "max_event_bytes", func() { n.Quota.MaxEventBytes = f.bytes }},
		{"max-open-deliveries", "max_open_deliveries", func() { n.Quota.MaxOpenDeliveries = f.openDeliveries }},
		{"retention", "retention", func() { n.Quota.Retention = span(f.retention) }},
		{"dead-letter-retention", "dead_letter_retention", func() { n.Quota.DeadLetterRetention = span(f.deadLetters) }},
		{"payload-retention", "payload_retention", func() { n.Quota.PayloadRetention = span(f.payloads) }},
		{"attempt-retention", "attempt_retention", func() { n.Quota.AttemptRetention = span(f.attempts) }},
	} {
		if changed(limit.flag) {
			limit.set()
			paths = append(paths, "quota."+limit.path)
		}
	}
	return paths, nil
}

// span is a time that was given; none is no limit of its own.
func span(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func newNamespaceCreate(c *cli) *cobra.Command {
	var f namespaceFlags
	cmd := &cobra.Command{
		Use: "create ID", Short: "Add a namespace", Args: oneID,
		Example: "  grapnel namespace create acme --max-subscriptions 200 --retention 72h",
	}
	f.register(cmd)
	var begin initial
	begin.register(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, err := c.name(namespaces, args[0])
		if err != nil {
			return err
		}
		state, err := begin.of(grapnelv1.Namespace_State_value)
		if err != nil {
			return err
		}
		n := &grapnelv1.Namespace{}
		if _, err := f.apply(cmd, n); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			r, err := cl.NamespaceService().CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{
				NamespaceId: lastSegment(name), Namespace: n, InitialState: grapnelv1.Namespace_State(state), StateReason: begin.reason,
			})
			if err != nil {
				return err
			}
			return show(c, r.GetNamespace(), namespaceColumns())
		})
	}
	return cmd
}

func newNamespaceGet(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "get ID", Short: "Show a namespace with its limits and how much of them is used",
		Args: oneID, ValidArgsFunction: firstArg(completeNamespaces(c)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(namespaces, args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.NamespaceService().GetNamespace(ctx, &grapnelv1.GetNamespaceRequest{Name: name})
				if err != nil {
					return err
				}
				return show(c, r.GetNamespace(), namespaceColumns())
			})
		},
	}
}

func newNamespaceList(c *cli) *cobra.Command {
	var deleted bool
	cmd := &cobra.Command{
		Use: "list", Short: "List namespaces", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				var options []client.ListOption
				if deleted {
					options = append(options, client.ShowDeleted())
				}
				return list(c, cl.Namespaces(ctx, options...), 0, namespaceColumns())
			})
		},
	}
	cmd.Flags().BoolVar(&deleted, "show-deleted", false, "also those that wait to be erased")
	return cmd
}

func newNamespaceUpdate(c *cli) *cobra.Command {
	var f namespaceFlags
	var etag string
	cmd := &cobra.Command{
		Use: "update ID", Short: "Change labels and limits; what is not given stays",
		Args: oneID, ValidArgsFunction: firstArg(completeNamespaces(c)),
	}
	f.register(cmd)
	cmd.Flags().StringVar(&etag, "etag", "", "fail unless this is the current etag")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, err := c.name(namespaces, args[0])
		if err != nil {
			return err
		}
		n := &grapnelv1.Namespace{Name: name, Etag: etag}
		paths, err := f.apply(cmd, n)
		if err != nil {
			return err
		}
		if len(paths) == 0 {
			return usagef("nothing to change: give at least one flag")
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			r, err := cl.NamespaceService().UpdateNamespace(ctx, &grapnelv1.UpdateNamespaceRequest{
				Namespace: n, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
			})
			if err != nil {
				return err
			}
			return show(c, r.GetNamespace(), namespaceColumns())
		})
	}
	return cmd
}

func newNamespacePause(c *cli) *cobra.Command {
	return c.turnCommand(namespaces, "pause", "Stop all attempts of a namespace while events keep queueing", completeNamespaces(c),
		func(ctx context.Context, cl *client.Client, t turning) (stated, error) {
			r, err := cl.NamespaceService().PauseNamespace(ctx, &grapnelv1.PauseNamespaceRequest{Name: t.name, Reason: t.reason, Etag: t.etag})
			return r.GetNamespace(), err
		})
}

func newNamespaceDisable(c *cli) *cobra.Command {
	return c.turnCommand(namespaces, "disable", "Stop all attempts of a namespace, and record matching events as SKIPPED", completeNamespaces(c),
		func(ctx context.Context, cl *client.Client, t turning) (stated, error) {
			r, err := cl.NamespaceService().DisableNamespace(ctx, &grapnelv1.DisableNamespaceRequest{Name: t.name, Reason: t.reason, Etag: t.etag})
			return r.GetNamespace(), err
		})
}

func newNamespaceResume(c *cli) *cobra.Command {
	return c.turnCommand(namespaces, "resume", "Restart attempts of a namespace after a pause or disabling", completeNamespaces(c),
		func(ctx context.Context, cl *client.Client, t turning) (stated, error) {
			r, err := cl.NamespaceService().ResumeNamespace(ctx, &grapnelv1.ResumeNamespaceRequest{Name: t.name, Reason: t.reason, Etag: t.etag})
			return r.GetNamespace(), err
		})
}

// notEmpty is the server's refusal, told by what matters.
func notEmpty(name string, n int32) error {
	return &client.Error{
		Code: codes.FailedPrecondition, Reason: "RESOURCE_IN_USE", Message: fmt.Sprintf("%s has %s", name, several(n, "subscription", "subscriptions")),
	}
}

// namespaceLoss is what a deletion would take away; nothing when nothing is there.
func namespaceLoss(u *grapnelv1.Usage) string {
	var parts []string
	if n := u.GetSubscriptions(); n > 0 {
		parts = append(parts, several(n, "subscription", "subscriptions"))
	}
	if n := u.GetOpenDeliveries(); n > 0 {
		parts = append(parts, several(n, "open delivery", "open deliveries"))
	}
	return strings.Join(parts, " and ")
}

func newNamespaceDelete(c *cli) *cobra.Command {
	r := &grapnelv1.DeleteNamespaceRequest{}
	var yes bool
	cmd := &cobra.Command{
		Use: "delete ID", Short: "Mark a namespace deleted; it is erased after seven days",
		Long: `Marks a namespace deleted; it is erased after seven days, and grapnel namespace undelete takes it back until then. Its open deliveries are cancelled: where there are any, it
asks, or wants --yes when there is no terminal to ask at.`,
		Args: oneID, ValidArgsFunction: firstArg(completeNamespaces(c)),
	}
	yesFlag(cmd, &yes)
	cmd.Flags().BoolVar(&r.Force, "force", false, "delete although it has subscriptions")
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if r.Name, err = c.name(namespaces, args[0]); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			now, err := cl.NamespaceService().GetNamespace(ctx, &grapnelv1.GetNamespaceRequest{Name: r.GetName()})
			if err == nil {
				usage := now.GetNamespace().GetUsage()
				if n := usage.GetSubscriptions(); n > 0 && !r.GetForce() {
					return suggestion{notEmpty(r.GetName(), n), "--force deletes it all the same"}
				}
				err = c.confirm(cmd.Context(), yes, r.GetName(), namespaceLoss(usage))
			} else if errors.Is(err, client.ErrPermissionDenied) { // may delete, and not look
				err = c.confirm(cmd.Context(), yes, r.GetName(), "what may be open in it")
			}
			if err != nil {
				return err
			}
			answer, err := cl.NamespaceService().DeleteNamespace(ctx, r)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, answer.GetNamespace(), namespaceColumns())
			}
			_, err = fmt.Fprintf(c.stdout, "%s deleted; it will be erased %s\n", r.Name, age(answer.GetNamespace().GetPurgeTime()))
			return err
		})
	}
	return cmd
}

func newNamespaceUndelete(c *cli) *cobra.Command {
	r := &grapnelv1.UndeleteNamespaceRequest{}
	cmd := &cobra.Command{
		Use: "undelete ID", Short: "Take a deletion back, within its seven days; deliveries that it cancelled stay so",
		Args: oneID, ValidArgsFunction: firstArg(completeNamespaces(c)),
	}
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if r.Name, err = c.name(namespaces, args[0]); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			answer, err := cl.NamespaceService().UndeleteNamespace(ctx, r)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, answer.GetNamespace(), namespaceColumns())
			}
			c.said("%s is %s", r.GetName(), enumText(answer.GetNamespace().GetState()))
			return nil
		})
	}
	return cmd
}
