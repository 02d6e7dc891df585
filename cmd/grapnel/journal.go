package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/delivery/salvage"
)

// newJournalCommand is about a journal that no server is using.
func newJournalCommand(c *cli) *cobra.Command {
	cmd := group("journal", "Check and repair a journal while its server is stopped",
		newJournalCheckCommand(c), newJournalSalvageCommand(c), newJournalSetAsideCommand(c), newJournalExportCommand(c))
	cmd.Long = `These commands work on the files of a journal, by default ./grapnel-data/journal, while no server uses them.

  check      reads everything and names each file and record that cannot be read; changes nothing
  salvage    copies what can be read into a new directory
  set-aside  takes one damaged record out, so that nothing meets it any more
  export     writes the events that can be read as lines of JSON`
	return cmd
}

// exactDir wants the journal's directory.
func exactDir(cmd *cobra.Command, args []string) error {
	return exactly("directory of a journal, such as ./grapnel-data/journal")(cmd, args)
}

func newJournalCheckCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "check DIR", Short: "Read everything, and name what cannot be read", Args: exactDir,
		Long:    "Reads every file and every record. Exits with 0 when all can be read, with 1 when something is damaged.",
		Example: "  grapnel journal check ./grapnel-data/journal",
		RunE: func(cmd *cobra.Command, args []string) error {
			files, err := salvage.Check(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := files.Write(c.stdout); err != nil {
				return err
			}
			sum, err := delivery.Inspect(cmd.Context(), args[0], c.tellDamage)
			if err != nil {
				return fmt.Errorf("%w; `grapnel journal salvage %s NEW-DIR` copies what can be read", err, args[0])
			}
			fmt.Fprintf(c.stdout, "%d events, %d deliveries, %d of them open; %d records damaged\n",
				sum.Events, sum.Deliveries, sum.Open, sum.Damaged)
			if files.Damaged() || sum.Damaged > 0 {
				return fmt.Errorf("the journal is damaged: `grapnel journal salvage %s NEW-DIR` copies what can be read, "+
					"`grapnel journal set-aside %s KEY` takes one record out", args[0], args[0])
			}
			return nil
		},
	}
}

// tellDamage prints one damaged record.
func (c *cli) tellDamage(d delivery.Damage) {
	fmt.Fprintf(c.stdout, "DAMAGED: %s: %s\n", d.What, d.Reason)
	if d.Key != "" {
		fmt.Fprintf(c.stdout, "  key %s\n", d.Key)
	}
}

func newJournalSalvageCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "salvage DIR NEW-DIR", Short: "Copy what can be read into a new directory",
		Long: `Copies every record that can be read in DIR, also behind damage, into a new journal in NEW-DIR, and says what could
not be read. DIR is not changed. To go on with the copy, put it in DIR's place and start the server with --accept-loss.`,
		Example: "  grapnel journal salvage ./grapnel-data/journal ./salvaged",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("%s wants two arguments, the directory of a journal and a new one; got %d", cmd.CommandPath(), len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			files, err := salvage.Copy(cmd.Context(), args[0], args[1], delivery.EngineOptions())
			if err != nil {
				return err
			}
			if err := files.Write(c.stdout); err != nil {
				return err
			}
			made, err := delivery.Complete(args[1], server.HighWater(args[0]))
			if made {
				fmt.Fprintln(c.stdout, "the journal's first record could not be read and was made anew")
			}
			return err
		},
	}
}

func newJournalSetAsideCommand(c *cli) *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use: "set-aside DIR KEY", Short: "Take one damaged record out of a journal",
		Long: `Takes the record that journal check has named by KEY out of the journal. It is written to --to first, as a line of
JSON; what belongs to it, such as an event whose delivery it was, stays.`,
		Example: "  grapnel journal set-aside ./grapnel-data/journal 0003710a… --to aside.json",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("%s wants two arguments, the directory of a journal and a key; got %d", cmd.CommandPath(), len(args))
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) (err error) {
			out := c.stdout
			if to != "" {
				file, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
				if err != nil {
					return fmt.Errorf("open --to: %w", err)
				}
				defer file.Close()
				out = file
			}
			return delivery.SetAside(args[0], args[1], out)
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "append the record to this `file`; default standard output")
	return cmd
}

func newJournalExportCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "export DIR", Short: "Write the events that can be read as lines of JSON", Args: exactDir,
		Long: `Writes each event of the journal with where its deliveries stand, one line of JSON an event, to standard output, and
what cannot be read to standard error. Payloads are in it.`,
		Example: "  grapnel journal export ./grapnel-data/journal > events.jsonl",
		RunE: func(cmd *cobra.Command, args []string) error {
			damaged := 0
			n, err := delivery.Export(cmd.Context(), args[0], c.stdout, func(d delivery.Damage) {
				damaged++
				fmt.Fprintf(c.stderr, "DAMAGED: %s: %s\n", d.What, d.Reason)
			})
			if err != nil {
				return fmt.Errorf("after %d events: %w", n, err)
			}
			if damaged > 0 {
				return fmt.Errorf("%d events exported, %d cannot be read", n, damaged)
			}
			_, err = io.WriteString(c.stderr, fmt.Sprintf("%d events\n", n))
			return err
		},
	}
}
