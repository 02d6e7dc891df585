package main

import (
	"context"
	"iter"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grapnel/grapnel/sdk/client"
)

// jobVerb is a command about one job of the server, of a kind that all lists. run is given the job's namespace and full name.
func jobVerb[M interface{ GetName() string }](c *cli, kind collection, all func(*client.Client, context.Context, string, ...client.ListOption) iter.Seq2[M, error],
	use, short string, run func(ctx context.Context, cl *client.Client, ns, name string) error,
) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Args: oneID,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(kind, args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return run(ctx, cl, strings.Split(name, "/")[1], name)
			})
		},
	}
	cmd.ValidArgsFunction = firstArg(func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		ns, err := c.namespaceID()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return complete(c, func(ctx context.Context, cl *client.Client) iter.Seq2[M, error] {
			return all(cl, ctx, ns)
		})(cmd, args, typed)
	})
	return cmd
}

// span sets what --since and --until name.
func (f *listFlags) span(now time.Time, from, until **timestamppb.Timestamp) error {
	for _, bound := range []struct {
		flag, text string
		to         **timestamppb.Timestamp
	}{{"since", f.since, from}, {"until", f.until, until}} {
		if bound.text == "" {
			continue
		}
		at, err := parsePast(bound.text, now)
		if err != nil {
			return usagef("--%s: %w", bound.flag, err)
		}
		*bound.to = timestamppb.New(at)
	}
	return nil
}
