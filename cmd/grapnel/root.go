package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newRoot builds the whole command tree.
func newRoot(c *cli) *cobra.Command {
	root := group("grapnel", "A gRPC control plane for webhooks")
	root.Long = `Grapnel delivers webhooks: applications publish events to it over gRPC, and it signs and sends them to
every subscription that matches, until the receiver accepts them.

  grapnel demo      shows in a few seconds what it does
  grapnel server    runs it

Client commands talk to --addr, or to the server of a context (grapnel context). These flags can be set by the environment
too: GRAPNEL_ADDR, GRAPNEL_CONTEXT, GRAPNEL_NAMESPACE, GRAPNEL_OUTPUT, GRAPNEL_TIMEOUT, GRAPNEL_TLS, GRAPNEL_TLS_CA,
GRAPNEL_TOKEN_FILE and GRAPNEL_PLUGIN_DIR; of grapnel server, all can. Flags go before the environment.

Exit codes: 0 success; 1 not all that was asked for was done; 2 wrong usage; 64 plus the gRPC code when the server answers
with an error, for example 69 for "not found" and 78 when there is none; 130 after an interrupt. With --output json the
error is one JSON object on standard error: {"error":{"code","reason","message","violations","hint","exit"}}.`
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetOut(c.stdout)
	root.SetErr(c.stderr)
	root.SetIn(c.stdin)
	root.SetFlagErrorFunc(flagError)
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return c.settle(cmd) }
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
	add("run", newServerCommand(c), newDemoCommand(c), newReceiveCommand(c), newListenCommand(c), newBackupCommand(c), newRestoreCommand(c), newJournalCommand(c))
	add("use", newPublishCommand(c), newNamespaceCommand(c), newSubscriptionCommand(c), newSecretCommand(c), newEventTypeCommand(c),
		newEventCommand(c), newDeliveryCommand(c), newReplayCommand(c), newErasureCommand(c), newPluginCommand(c), newApplyCommand(c), newDispatchCommand(c), newContextCommand(c))
	add("see", newStatsCommand(c), newTopCommand(c), newClusterCommand(c))
	root.AddCommand(newVersionCommand(c), newDescriptorsCommand(c))
	root.SetHelpCommand(newHelpCommand(root))
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			shells := cmd.Commands()
			cmd.Args, cmd.RunE = cobra.ArbitraryArgs, func(cmd *cobra.Command, args []string) error {
				return explain(cmd, args, "shell", shells)
			}
		}
	}
	markRunning(c, root)
	nameEnvironment(root)
	completeTypeFlags(c, root)
	return root
}

// nameEnvironment adds to the help of flags which variable sets them; of the server, all have one.
func nameEnvironment(cmd *cobra.Command) {
	if cmd.Name() != "server" && cmd.Name() != "context" {
		add := func(f *pflag.Flag) {
			if clientEnvironment(f.Name) {
				f.Usage += " (" + environmentName(f.Name) + ")"
			}
		}
		cmd.Flags().VisitAll(add)
		cmd.PersistentFlags().VisitAll(add)
		for _, below := range cmd.Commands() {
			nameEnvironment(below)
		}
	}
}

// completeTypeFlags has every --type of an event complete to the types that are registered.
func completeTypeFlags(c *cli, cmd *cobra.Command) {
	if cmd.Flags().Lookup("type") != nil {
		must(cmd.RegisterFlagCompletionFunc("type", completeTypes(c)))
	}
	for _, below := range cmd.Commands() {
		completeTypeFlags(c, below)
	}
}

// settle sets the flags that were not given from the environment and the context, and checks what all commands share.
func (c *cli) settle(cmd *cobra.Command) error {
	c.namespaceSaid = cmd.Flags().Changed("namespace")
	first, second := c.applyEnvironment, c.applyContext
	if cmd.Flags().Changed("context") {
		first, second = second, first
	}
	if err := first(cmd); err != nil {
		return err
	}
	if err := second(cmd); err != nil {
		return err
	}
	return c.readOutput(cmd)
}

// newHelpCommand is cobra's, but for a topic that there is not.
func newHelpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "Explain a command",
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			if cmd, rest, err := root.Find(args); err == nil && len(rest) == 0 {
				for _, below := range cmd.Commands() {
					if below.IsAvailableCommand() {
						names = append(names, below.Name()+"\t"+below.Short)
					}
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 && cmd.HasSubCommands() {
				return explain(cmd, rest, "command", cmd.Commands())
			}
			if len(rest) > 0 {
				return usagef("%s has no commands below it, such as %q", cmd.CommandPath(), rest[0])
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	}
}

// explain prints the help of a command that only has commands below it, and refuses a word that is none of them.
func explain(cmd *cobra.Command, args []string, what string, below []*cobra.Command) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	var names []string
	for _, known := range below {
		if !known.Hidden {
			names = append(append(names, known.Name()), known.Aliases...)
		}
	}
	hint := didYouMean(args[0], names)
	if what == "shell" {
		hint = fmt.Sprintf("; there are %s", strings.Join(names, ", "))
	}
	if near := cmd.SuggestionsFor(args[0]); hint == "" && len(near) > 0 {
		hint = fmt.Sprintf("; did you mean %s?", strings.Join(near, " or "))
	}
	if hint == "" {
		hint = fmt.Sprintf("; see %s --help", cmd.CommandPath())
	}
	return usagef("%s has no %s %q%s", cmd.CommandPath(), what, args[0], hint)
}

// group is a command that only has commands below it. Without one of them it explains itself; with a word
// it does not know it fails, instead of printing help and succeeding as cobra would.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:                        use,
		Short:                      short,
		SuggestionsMinimumDistance: 1,
		RunE: func(cmd *cobra.Command, args []string) error {
			return explain(cmd, args, "command", cmd.Commands())
		},
	}
	cmd.Args = cobra.ArbitraryArgs
	cmd.AddCommand(commands...)
	return cmd
}

// markRunning makes every command note that its usage was fine before it does anything, and refuse words it has no use for
// in the same way.
func markRunning(c *cli, cmd *cobra.Command) {
	if args := cmd.Args; args != nil {
		cmd.Args = func(cmd *cobra.Command, given []string) error {
			err := args(cmd, given)
			if err != nil && !errors.As(err, new(usageError)) { // cobra's takes every word for a command
				return usagef("%s takes no argument, %q given; see %s --help", cmd.CommandPath(), given[0], cmd.CommandPath())
			}
			return err
		}
	}
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
