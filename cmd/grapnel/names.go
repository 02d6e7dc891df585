package main

import (
	"context"
	"iter"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/grapnel/grapnel/sdk/client"
)

// collection is the plural segment of a resource name.
type collection string

const (
	namespaces    collection = "namespaces"
	subscriptions collection = "subscriptions"
	secrets       collection = "secrets"
	events        collection = "events"
	deliveries    collection = "deliveries"
	plugins       collection = "plugins"
)

// name turns what a person typed, an ID or a full name, into a full name.
func (c *cli) name(of collection, arg string) (string, error) {
	if of == namespaces || of == plugins {
		id := strings.TrimPrefix(arg, string(of)+"/")
		if id == "" || strings.Contains(id, "/") {
			return "", usagef("%q is not the name of one of the %s", arg, of)
		}
		return string(of) + "/" + id, nil
	}
	if strings.Contains(arg, "/") {
		parts := strings.Split(arg, "/")
		if len(parts) != 4 || parts[0] != "namespaces" || parts[2] != string(of) || parts[1] == "" || parts[3] == "" {
			return "", usagef("%q does not look like namespaces/NAMESPACE/%s/ID", arg, of)
		}
		return arg, nil
	}
	if arg == "" {
		return "", usagef("an empty ID is not the name of one of the %s", of)
	}
	ns, err := c.namespaceID()
	if err != nil {
		return "", err
	}
	return "namespaces/" + ns + "/" + string(of) + "/" + arg, nil
}

// namespaceID is the namespace that the flags or the environment give.
func (c *cli) namespaceID() (string, error) {
	id := strings.TrimPrefix(c.namespace, "namespaces/")
	if id == "" {
		return "", usagef("no namespace given: use --namespace (-n), GRAPNEL_NAMESPACE, or a full name such as namespaces/acme/subscriptions/orders")
	}
	if strings.Contains(id, "/") {
		return "", usagef("--namespace %s: must be an ID such as acme", c.namespace)
	}
	return id, nil
}

func (c *cli) parent() (string, error) {
	id, err := c.namespaceID()
	return "namespaces/" + id, err
}

// created splits the argument of a create command, an ID or a full name, into parent and ID.
func (c *cli) created(of collection, arg string) (parent, id string, err error) {
	name, err := c.name(of, arg)
	if err != nil {
		return "", "", err
	}
	id = lastSegment(name)
	return strings.TrimSuffix(name, "/"+string(of)+"/"+id), id, nil
}

// completion limits, so that the Tab key never hangs or floods.
const (
	completionTimeout = time.Second
	completionLimit   = 200
)

// complete offers IDs from the server; without one within reach, nothing.
func complete[T interface{ GetName() string }](c *cli, items func(context.Context, *client.Client) iter.Seq2[T, error]) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		_ = c.applyEnvironment(cmd)
		ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
		defer cancel()
		connection, err := c.dial(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer func() { _ = connection.Close() }()
		var ids []string
		for item, err := range items(ctx, connection) {
			if err != nil || len(ids) == completionLimit {
				break
			}
			ids = append(ids, lastSegment(item.GetName()))
		}
		return ids, cobra.ShellCompDirectiveNoFileComp
	}
}

// firstArg completes the one argument of a command, and nothing after it.
func firstArg(f cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return f(cmd, args, typed)
	}
}
