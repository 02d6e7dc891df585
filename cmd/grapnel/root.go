package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// newRoot builds the whole command tree.
func newRoot(c *cli) *cobra.Command {
	root := group("grapnel", "A gRPC control plane for webhooks")
	root.Long = `Grapnel delivers webhooks: applications publish events to it over gRPC, and it signs and sends them to
every subscription that matches, until the receiver accepts them.

  grapnel demo      shows in a few seconds what it does
  grapnel server    runs it

Client commands talk to --addr (GRAPNEL_ADDR). They exit with 2 for wrong usage, and with 64 plus the
gRPC code when the server answers with an error, for example 69 for "not found".`
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetOut(c.stdout)
	root.SetErr(c.stderr)
	root.SetIn(c.stdin)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w; see %s --help", err, cmd.CommandPath())
	})
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return c.applyEnvironment(cmd) }
	root.AddGroup(
		&cobra.Group{ID: "run", Title: "Run it:"},
		&cobra.Group{ID: "use", Title: "Use it:"},
		&cobra.Group{ID: "see", Title: "Watch it:"},
	)
	add := func(id string, commands ...*cobra.Command) {
		for _, cmd := range commands {
			cmd.GroupID = id
			root.AddCommand(cmd)
		}
	}
	add("run", newServerCommand(c), newDemoCommand(c), newReceiveCommand(c), newBackupCommand(c), newRestoreCommand(c), newJournalCommand(c))
	add("use", newPublishCommand(c), newNamespaceCommand(c), newSubscriptionCommand(c), newSecretCommand(c),
		newEventCommand(c), newDeliveryCommand(c), newPluginCommand(c))
	add("see", newStatsCommand(c), newClusterCommand(c))
	root.AddCommand(newVersionCommand(c), newDescriptorsCommand(c))
	markRunning(c, root)
	return root
}

// group is a command that only has commands below it. Without one of them it explains itself; with a word
// it does not know it fails, instead of printing help and succeeding as cobra would.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:                        use,
		Short:                      short,
		SuggestionsMinimumDistance: 1,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			hint := ""
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				hint = fmt.Sprintf("; did you mean %s?", strings.Join(near, " or "))
			}
			return usagef("%s has no command %q%s", cmd.CommandPath(), args[0], hint)
		},
	}
	cmd.Args = cobra.ArbitraryArgs
	cmd.AddCommand(commands...)
	return cmd
}

// markRunning makes every command note that its usage was fine before it does anything.
func markRunning(c *cli, cmd *cobra.Command) {
	if runE := cmd.RunE; runE != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			c.running = true
			return runE(cmd, args)
		}
	}
	for _, below := range cmd.Commands() {
		markRunning(c, below)
	}
}

// oneID is for commands about one resource.
func oneID(cmd *cobra.Command, args []string) error { return exactly("ID or full name")(cmd, args) }

// exactly wants one argument and says what it is.
func exactly(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usagef("%s takes one %s, %d given; see %s --help", cmd.CommandPath(), what, len(args), cmd.CommandPath())
		}
		return nil
	}
}
