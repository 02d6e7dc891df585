package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func newDescriptorsCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "descriptors [FILE]",
		Short: "Write the API's descriptor set, for clients in other languages",
		Long: `Writes a google.protobuf.FileDescriptorSet of the public API, the plugin protocol, what gRPC receivers implement, and
all that they import, comments and error details included, to FILE or standard output. It needs no server. protoc, buf, and tools
that load descriptors at run time take it instead of .proto files.`,
		Example: `  grapnel descriptors grapnel.binpb
  protoc --descriptor_set_in=grapnel.binpb --python_out=gen grapnel/v1/event.proto
  grapnel descriptors | buf generate -
  grpcurl -protoset <(grapnel descriptors) -plaintext 127.0.0.1:7070 grapnel.v1.AdminService/GetCluster`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 && args[0] != "-" {
				if err := os.WriteFile(args[0], grapnelv1.Descriptors(), 0o644); err != nil {
					return fmt.Errorf("write descriptors: %w", err)
				}
				return nil
			}
			if file, ok := c.stdout.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
				return usagef("descriptors are binary and standard output is a terminal: name a file, or redirect the output")
			}
			if _, err := c.stdout.Write(grapnelv1.Descriptors()); err != nil {
				return fmt.Errorf("write descriptors: %w", err)
			}
			return nil
		},
	}
}
