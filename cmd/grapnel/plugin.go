package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	firstparty "github.com/grapnel/grapnel/plugins"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/server"
)

func newPluginCommand(c *cli) *cobra.Command {
	cmd := group("plugin", "Signers and transports", newPluginList(c), newPluginGet(c), newPluginValidate(c),
		plain(newPluginNew(c)), plain(newPluginTest(c)), plain(newPluginBench(c)), plain(newPluginTry(c)), newPluginReceiver(c), plain(newPluginInstall(c)),
		plain(newPluginEnable(c, true)), plain(newPluginEnable(c, false)), plain(newPluginRemove(c)), plain(newPluginVerify(c)),
		newPluginServe(c))
	cmd.Aliases = []string{"plugins"}
	return c.connectFlags(cmd, false)
}

func pluginColumns() []column[*grapnelv1.Plugin] {
	type plug = *grapnelv1.Plugin
	return []column[plug]{
		{head: "ID", value: func(p plug) string { return lastSegment(p.GetName()) }},
		{head: "ROLES", value: func(p plug) string {
			var roles []string
			for _, r := range p.GetRoles() {
				roles = append(roles, strings.ToLower(enumText(r)))
			}
			return strings.Join(roles, ",")
		}},
		{head: "PROVIDER", value: plug.GetProvider},
		{head: "VERSION", value: plug.GetVersion},
		{head: "HEALTH", value: func(p plug) string { return enumText(p.GetHealth()) }},
		{head: "RESTARTS", value: ofProcess(func(i *grapnelv1.PluginInstance) string { return strconv.Itoa(int(i.GetRestartCount())) })},
		{head: "LAST CRASH", value: ofProcess(func(i *grapnelv1.PluginInstance) string {
			if i.GetLastCrashTime() == nil {
				return ""
			}
			return age(i.GetLastCrashTime()) + " ago"
		})},
		{head: "IN FLIGHT", value: ofProcess(func(i *grapnelv1.PluginInstance) string { return strconv.Itoa(int(i.GetInFlight())) })},
		{head: "P50/P99", value: ofProcess(func(i *grapnelv1.PluginInstance) string {
			if i.GetP99Latency() == nil {
				return ""
			}
			return i.GetP50Latency().AsDuration().String() + "/" + i.GetP99Latency().AsDuration().String()
		})},
		{head: "SHA-256", value: ofProcess(func(i *grapnelv1.PluginInstance) string { return i.GetChecksum()[:min(12, len(i.GetChecksum()))] })},
		{head: "SCHEMES", value: func(p plug) string { return strings.Join(p.GetUriSchemes(), ",") }},
		{head: "DESCRIPTION", detail: true, value: plug.GetDescription},
		{head: "PROTOCOL", detail: true, value: plug.GetProtocolVersion},
		{head: "HEADERS", detail: true, value: func(p plug) string { return strings.Join(p.GetHeaders(), ", ") }},
		{head: "SECRETS", detail: true, value: slotsText},
		{head: "CONFIG SCHEMA", detail: true, value: func(p plug) string { return structText(p.GetConfigSchema()) }},
		{head: "CONFIG EXAMPLE", detail: true, value: func(p plug) string { return structText(p.GetConfigExample()) }},
		{head: "PROCESSES", detail: true, value: instancesText},
	}
}

// ofProcess is a column of a plugin's process; while one replaces another, of both.
func ofProcess(value func(*grapnelv1.PluginInstance) string) func(*grapnelv1.Plugin) string {
	return func(p *grapnelv1.Plugin) string {
		var words []string
		for _, i := range p.GetInstances() {
			if text := value(i); text != "" {
				words = append(words, text)
			}
		}
		return strings.Join(words, " ")
	}
}

func slotsText(p *grapnelv1.Plugin) string {
	var words []string
	for _, s := range p.GetSecretSlots() {
		word := s.GetSlot()
		if s.GetRequired() {
			word += " (required)"
		}
		word += ": " + s.GetDescription()
		if s.GetFormat() != "" {
			word += " Written as " + s.GetFormat() + "."
		}
		if len(s.GetAlgorithms()) > 0 {
			word += " Made by the server: " + strings.Join(s.GetAlgorithms(), ", ") + "."
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

func structText(s *structpb.Struct) string {
	if s == nil {
		return ""
	}
	text, err := marshal(s)
	if err != nil {
		return ""
	}
	return string(text)
}

func instancesText(p *grapnelv1.Plugin) string {
	var all []string
	for _, i := range p.GetInstances() {
		text := fmt.Sprintf("%s %s, pid %d, version %s, SHA-256 %s, %d restarts, %d in flight", i.GetNode(), enumText(i.GetHealth()), i.GetPid(),
			i.GetVersion(), i.GetChecksum(), i.GetRestartCount(), i.GetInFlight())
		if i.GetP99Latency() != nil {
			text += fmt.Sprintf(", adds p50 %v, p99 %v", i.GetP50Latency().AsDuration(), i.GetP99Latency().AsDuration())
		}
		if i.GetLastError() != "" {
			text += ", last error: " + i.GetLastError()
		}
		if i.GetLastCrashTime() != nil {
			text += fmt.Sprintf(", last crash at %s with the output: %s", i.GetLastCrashTime().AsTime().Format(time.RFC3339),
				strings.Join(i.GetLastOutput(), " | "))
		}
		all = append(all, text)
	}
	return strings.Join(all, "; ")
}

func completePlugins(c *cli) cobra.CompletionFunc {
	return complete(c, func(ctx context.Context, cl *client.Client) iter.Seq2[*grapnelv1.Plugin, error] {
		return cl.Plugins(ctx)
	})
}

func newPluginList(c *cli) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "list", Short: "List plugins and their health, or what is installed in a directory", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir != "" {
				if c.output != formatTable && c.output != formatJSON {
					return usagef("--output %s: with --plugin-dir it must be table or json", c.output)
				}
				return listInstalled(c, dir)
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Plugins(ctx), 0, pluginColumns())
			})
		},
	}
	cmd.Flags().StringVar(&dir, "plugin-dir", "", "show what is installed in this `directory`, without asking a server")
	return cmd
}

func newPluginGet(c *cli) *cobra.Command {
	var schema bool
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "get ID", Short: "Show a plugin with its settings, secrets and processes",
		Args: oneID, ValidArgsFunction: firstArg(completePlugins(c)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(plugins, args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := getPlugin(ctx, cl, name, wait)
				if err != nil {
					return err
				}
				if !schema {
					return show(c, r.GetPlugin(), pluginColumns())
				}
				var text bytes.Buffer
				if err := json.Indent(&text, []byte(structText(r.GetPlugin().GetConfigSchema())), "", "  "); err != nil {
					return fmt.Errorf("%s has no schema", name)
				}
				_, err = fmt.Fprintln(c.stdout, text.String())
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&schema, "schema", false, "print the JSON Schema of its settings only")
	spanVar(cmd.Flags(), &wait, "wait", 0, 0, 0, "wait up to this long until it is there and serves")
	return cmd
}

// getPlugin asks for a plugin, again and again until it serves or the wait is over.
func getPlugin(ctx context.Context, cl *client.Client, name string, wait time.Duration) (*grapnelv1.GetPluginResponse, error) {
	deadline := time.Now().Add(wait)
	for {
		r, err := cl.PluginService().GetPlugin(ctx, &grapnelv1.GetPluginRequest{Name: name})
		serves := err == nil && r.GetPlugin().GetHealth() == grapnelv1.Plugin_HEALTH_SERVING
		if serves || !time.Now().Before(deadline) {
			return r, err
		}
		pause := time.NewTimer(200 * time.Millisecond)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return r, err
		}
	}
}

func newPluginValidate(c *cli) *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use: "validate ID", Short: "Check settings the way creating a subscription would",
		Args: oneID, ValidArgsFunction: firstArg(completePlugins(c)),
		Example: `  grapnel plugin validate http --config '{"method":"PUT"}'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(plugins, args[0])
			if err != nil {
				return err
			}
			settings, err := c.readStruct("config", config)
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.PluginService().ValidatePluginConfig(ctx, &grapnelv1.ValidatePluginConfigRequest{Name: name, Config: settings})
				if err != nil {
					return err
				}
				if c.forPrograms() {
					return show(c, r, nil)
				}
				c.said("valid")
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&config, "config", "{}", "the settings: JSON, `@file` or - for standard input")
	return cmd
}

// mostThreads of a first-party process: it starts no others, and a thread waits for a disk or a name server only.
const mostThreads = 2000

// builtinParts are the processes of the bundled plugin, as the server takes them.
func builtinParts() []server.BuiltinPart {
	var parts []server.BuiltinPart
	for _, p := range firstparty.Parts() {
		parts = append(parts, server.BuiltinPart{Name: p.Name, Kinds: p.Names(), Confined: p.Confined})
	}
	return parts
}

// newPluginServe is what the server starts this binary as; people have no use for it.
func newPluginServe(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "serve [part]", Short: "Serve the first-party plugins, or a part of them, to a Grapnel server", Hidden: true, Args: cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			c.releaseSignals() // the SDK decides what ends a plugin
			debug.SetMaxThreads(mostThreads)
			return firstparty.Serve(strings.Join(args, ""), version().number)
		},
	}
}
