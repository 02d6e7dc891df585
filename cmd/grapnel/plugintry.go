package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/sdk/conformance"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost"
)

// tryTimeout is how long a transformer may take in a try.
const tryTimeout = 15 * time.Second

// pluginTry is one `grapnel plugin try`.
type pluginTry struct {
	c                              *cli
	config, data, contentType      string
	eventType, id, source, subject string
	attributes, secrets            []string
}

func newPluginTry(c *cli) *cobra.Command {
	p := &pluginTry{c: c}
	cmd := &cobra.Command{
		Use:   "try KIND [flags] [-- COMMAND [ARG...]]",
		Short: "Have a transformer transform an event, without a server",
		Long: `Starts a plugin, has one of its transformers transform an event, and writes the body to standard output; its content
type and headers, or why the event is dropped, go to standard error. There is no server, and nothing is sent or stored.
Without a COMMAND the plugin is the one in this binary: cel, jq, template and javascript. With a server,
grapnel subscription test shows the same for what is stored, and sends it.`,
		Example: `  grapnel plugin try jq --config '{"program": "{text: .data.name}"}' --data '{"name": "Ada"}'
  grapnel plugin try template --config '{"ready": "slack"}' --type order.paid --data @order.json
  grapnel plugin try acme-shape --data '{}' -- ./acme-shape`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return p.run(cmd.Context(), args[0], args[1:]) },
	}
	f := cmd.Flags()
	f.StringVar(&p.config, "config", "{}", "the settings: JSON, `@file` or - for standard input")
	f.StringVar(&p.data, "data", "{}", "payload: text, `@file` or - for standard input")
	f.StringVar(&p.contentType, "content-type", "", "media type of --data; JSON or text by what it is unless given")
	f.StringVar(&p.eventType, "type", "grapnel.test", "type of the event")
	f.StringVar(&p.id, "id", "", "its id; made up unless given")
	f.StringVar(&p.source, "source", "//grapnel/try", "its source")
	f.StringVar(&p.subject, "subject", "", "its subject")
	f.StringArrayVar(&p.attributes, "attribute", nil, "further attribute as `name=value`; repeat for more")
	f.StringArrayVar(&p.secrets, "secret", nil, "value of a secret slot as `slot=@FILE`; repeat for more")
	return cmd
}

func (p *pluginTry) run(ctx context.Context, kind string, command []string) error {
	config, err := p.c.readStruct("config", p.config)
	if err != nil {
		return err
	}
	data, err := p.c.readValue(p.data)
	if err != nil {
		return fmt.Errorf("read --data: %w", err)
	}
	event := &delivery.Event{
		ID: cmp.Or(p.id, client.NewID()), Source: p.source, Type: p.eventType, Subject: p.subject, Time: time.Now(),
		ContentType: cmp.Or(p.contentType, guessContentType(data)), Payload: data, UID: "evt_try",
	}
	if event.Attributes, err = parsePairs("attribute", p.attributes); err != nil {
		return err
	}
	binding := &grapnelv1.PluginBinding{Plugin: pluginName(kind), Config: config, Secrets: map[string]string{}}
	values := map[string][]byte{}
	for _, word := range p.secrets {
		slot, from, ok := strings.Cut(word, "=")
		if !ok || !strings.HasPrefix(from, "@") {
			return usagef("--secret %s: must be slot=@FILE, for the command line is no place for keys", slot)
		}
		name := "namespaces/try/secrets/" + slot
		if values[name], err = p.c.readValue(from); err != nil {
			return fmt.Errorf("read --secret %s: %w", slot, err)
		}
		binding.Secrets[slot] = name
	}
	if len(command) == 0 {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		command = []string{self, "plugin", "serve"}
	} else if command, err = conformance.Resolve(command); err != nil {
		return err
	}
	r, err := tryTransformer(ctx, command, binding, values, event)
	if err != nil {
		return err
	}
	return p.show(r)
}

// tryTransformer runs the plugin for one event.
func tryTransformer(ctx context.Context, command []string, binding *grapnelv1.PluginBinding, values map[string][]byte, event *delivery.Event) (*delivery.Result, error) {
	dir, err := os.MkdirTemp("", "grapnel-try-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // it is empty
	host, err := pluginhost.New(pluginhost.Options{
		Plugins: []pluginhost.Spec{{Path: command[0], Args: command[1:], Builtin: true}}, Dir: dir,
		Secrets: func(name string) ([]pluginhost.SecretVersion, bool) {
			value, ok := values[name]
			return []pluginhost.SecretVersion{{Number: 1, Value: value}}, ok
		},
	})
	if err != nil {
		return nil, err
	}
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = host.Run(running) // returns nil
	}()
	defer func() {
		cancel()
		<-ended
	}()
	starting, stop := context.WithTimeout(ctx, tryTimeout)
	defer stop()
	if err := host.Ready(starting); err != nil {
		return nil, err
	}
	sub := &grapnelv1.Subscription{Name: "namespaces/try/subscriptions/try", Uri: "https://receiver.example/", Transformer: binding}
	return host.TryTransformer(ctx, sub, event, tryTimeout)
}

// tell says what is beside the body.
func (p *pluginTry) tell(what, text string) {
	fmt.Fprintf(p.c.stderr, "%s: %s\n", clean(what), clean(text))
}

func (p *pluginTry) show(r *delivery.Result) error {
	switch {
	case r.Cause == delivery.CauseDropped:
		p.tell("dropped", cmp.Or(r.Error, "no reason given"))
		return nil
	case r.Made == nil:
		return errors.New(r.Error)
	}
	p.tell("content-type", r.Made.ContentType)
	for _, h := range r.Made.Headers {
		p.tell(h.Name, h.Value)
	}
	_, err := fmt.Fprintf(p.c.stdout, "%s\n", r.Made.Body)
	return err
}
