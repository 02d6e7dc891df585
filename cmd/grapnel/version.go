package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/grapnel/grapnel/sdk/client"
)

// build says what this binary was made from.
type build struct{ number, commit string }

// version comes from the SDK's version and what the Go tool stamped into the binary.
func version() build {
	b := build{number: client.Version}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	for _, setting := range info.Settings {
		switch {
		case setting.Key == "vcs.revision":
			b.commit = setting.Value[:min(len(setting.Value), 12)] + b.commit
		case setting.Key == "vcs.modified" && setting.Value == "true":
			b.commit += "-dirty"
		}
	}
	return b
}

func newVersionCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this binary",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			b := version()
			if c.output == formatJSON {
				return json.NewEncoder(c.stdout).Encode(map[string]string{
					"version": b.number, "commit": b.commit, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH,
				})
			}
			_, err := fmt.Fprintf(c.stdout, "grapnel %s (commit %s, %s, %s/%s)\n",
				b.number, cmp.Or(b.commit, "unknown"), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
	cmd.Flags().StringVarP(&c.output, "output", "o", formatTable, "table or json")
	must(cmd.RegisterFlagCompletionFunc("output", completeFormats))
	return plain(cmd)
}
