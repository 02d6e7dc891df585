package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// turning is what brings a resource into another state.
type turning struct{ name, reason, etag string }

// stated is a resource that has one.
type stated interface {
	proto.Message
	GetName() string
}

// turnCommand is a verb that brings a namespace or subscription into another state.
func (c *cli) turnCommand(of collection, verb, short string, completion cobra.CompletionFunc,
	call func(context.Context, *client.Client, turning) (stated, error)) *cobra.Command {
	var t turning
	cmd := &cobra.Command{Use: verb + " ID", Short: short, Args: oneID, ValidArgsFunction: firstArg(completion)}
	cmd.Flags().StringVar(&t.reason, "reason", "", "shown to those who wonder")
	cmd.Flags().StringVar(&t.etag, "etag", "", "fail unless this is the current etag")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if t.name, err = c.name(of, args[0]); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			now, err := call(ctx, cl, t)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, now, nil)
			}
			c.said("%s is %s", now.GetName(), stateOf(now))
			return nil
		})
	}
	return cmd
}

func stateOf(m stated) string {
	field := m.ProtoReflect().Descriptor().Fields().ByName("state")
	value := field.Enum().Values().ByNumber(m.ProtoReflect().Get(field).Enum())
	return strings.TrimPrefix(string(value.Name()), "STATE_")
}

// initial is the state that something is created in.
type initial struct{ state, reason string }

func (i *initial) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&i.state, "state", "", "begin as `active`, the default, paused or disabled")
	cmd.Flags().StringVar(&i.reason, "reason", "", "why it begins so, shown to those who wonder")
	must(cmd.RegisterFlagCompletionFunc("state", fixed("active", "paused", "disabled")))
}

// of is its number in an enum; 0 when it was not given.
func (i *initial) of(numbers map[string]int32) (int32, error) {
	switch i.state {
	case "":
		return 0, nil
	case "active", "paused", "disabled":
		return numbers["STATE_"+strings.ToUpper(i.state)], nil
	}
	return 0, usagef("--state %q: want active, paused or disabled", i.state)
}

func newDispatchCommand(c *cli) *cobra.Command {
	cmd := group("dispatch", "The switch for all attempts in the cluster", newDispatchPause(c), newDispatchResume(c))
	cmd.Long = `Stops and restarts all attempts in the cluster, for everybody, also across restarts. Events are accepted meanwhile, and
queue. grapnel cluster says how it stands.`
	return c.connectFlags(cmd, false)
}

func newDispatchPause(c *cli) *cobra.Command {
	r := &grapnelv1.PauseDispatchRequest{}
	cmd := &cobra.Command{
		Use: "pause --reason TEXT", Short: "Stop all attempts; what is in flight is let end", Args: cobra.NoArgs,
		Example: "  grapnel dispatch pause --reason 'our egress address is being changed'",
	}
	cmd.Flags().StringVar(&r.Reason, "reason", "", "shown to those who wonder; required")
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if r.GetReason() == "" {
			return usagef("--reason is required: everybody's deliveries stop, and they will ask why")
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			answer, err := cl.AdminService().PauseDispatch(ctx, r)
			return c.turned(answer, err, "dispatch is paused for all")
		})
	}
	return cmd
}

func newDispatchResume(c *cli) *cobra.Command {
	r := &grapnelv1.ResumeDispatchRequest{}
	cmd := &cobra.Command{Use: "resume", Short: "Restart attempts", Args: cobra.NoArgs}
	cmd.Flags().StringVar(&r.Reason, "reason", "", "shown to those who wonder")
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			answer, err := cl.AdminService().ResumeDispatch(ctx, r)
			return c.turned(answer, err, "dispatch goes on")
		})
	}
	return cmd
}

func (c *cli) turned(answer proto.Message, err error, words string) error {
	if err != nil {
		return err
	}
	if c.forPrograms() {
		return show(c, answer, nil)
	}
	c.said("%s", words)
	return nil
}

// dispatchText is how the switch stands, when that is worth a line.
func dispatchText(r *grapnelv1.GetClusterResponse) string {
	if !r.GetDispatchPaused() {
		return ""
	}
	return fmt.Sprintf("DISPATCH IS PAUSED for all since %s: %s", timeText(r.GetDispatchChangeTime()), cmp.Or(clean(r.GetPauseReason()), "no reason given"))
}
