package main

import (
	"context"
	"iter"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/server/delivery"
)

// collection is the plural segment of a resource name.
type collection string

const (
	namespaces    collection = "namespaces"
	subscriptions collection = "subscriptions"
	secrets       collection = "secrets"
	events        collection = "events"
	deliveries    collection = "deliveries"
	replays       collection = "replayJobs"
	erasures      collection = "erasures"
	plugins       collection = "plugins"
	eventTypes    collection = "eventTypes"
)

// noun is what one of a collection is called.
func (of collection) noun() string {
	switch of {
	case deliveries:
		return "delivery"
	case replays:
		return "replay job"
	case eventTypes:
		return "event type"
	}
	return strings.TrimSuffix(string(of), "s")
}

// name turns what a person typed, an ID or a full name, into a full name.
func (c *cli) name(of collection, arg string) (string, error) {
	if of == namespaces || of == plugins {
		id := strings.TrimPrefix(arg, string(of)+"/")
		return string(of) + "/" + id, checkID("", of, id)
	}
	if !strings.HasPrefix(arg, "namespaces/") {
		ns, err := c.namespaceID()
		if err != nil {
			return "", err
		}
		id := arg
		if of == events || of == eventTypes {
			id = client.EscapeID(arg)
		}
		return "namespaces/" + ns + "/" + string(of) + "/" + id, checkID("", of, arg)
	}
	parts := strings.SplitN(arg, "/", 4)
	if len(parts) != 4 || parts[2] != string(of) || parts[1] == "" || parts[3] == "" {
		return "", usagef("%q does not look like namespaces/NAMESPACE/%s/ID", arg, of)
	}
	if given := strings.TrimPrefix(c.namespace, "namespaces/"); c.namespaceSaid && given != parts[1] {
		return "", usagef("%s is in namespace %s, and --namespace says %s: give one of the two", arg, parts[1], given)
	}
	if err := checkID("", namespaces, parts[1]); err != nil {
		return "", err
	}
	return arg, checkID("", of, parts[3])
}

// eventID is the ID in the name of an event or an event type.
func eventID(name string) string {
	escaped := lastSegment(name)
	if id, err := url.PathUnescape(escaped); err == nil {
		return id
	}
	return escaped
}

// checkID says early, and about the ID, what the server would say about the whole name. flag is where it was given, if not
// as an argument.
func checkID(flag string, of collection, id string) error {
	where := of.noun() + " ID"
	if flag != "" {
		where = flag
	}
	switch {
	case id == "":
		return usagef("%s: an empty text is none", where)
	case of == events, of == eventTypes:
		return nil // the server knows best what publishers may choose
	case of == deliveries:
		if _, err := delivery.ParseID(id); err != nil {
			return usagef("%s %q is not one: want %d letters and digits, as grapnel delivery list shows them", where, id, len(delivery.ID{}.String()))
		}
		return nil
	}
	rest := strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789-")
	if rest != "" || len(id) > 63 || id[0] < 'a' || id[0] > 'z' {
		return usagef("%s %q is not one: want 1 to 63 lower-case letters, digits and hyphens, a letter first", where, id)
	}
	return nil
}

// namespaceID is the namespace that the flags, the environment or a context give.
func (c *cli) namespaceID() (string, error) {
	id := strings.TrimPrefix(c.namespace, "namespaces/")
	if id == "" {
		return "", usagef("no namespace given: use --namespace (-n), GRAPNEL_NAMESPACE, a context, or a full name such as namespaces/acme/subscriptions/orders")
	}
	return id, checkID("--namespace", namespaces, id)
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

// complete offers IDs from the server; without one within reach, nothing.
func complete[T interface{ GetName() string }](c *cli, items func(context.Context, *client.Client) iter.Seq2[T, error]) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		if c.settle(cmd) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
		defer cancel()
		connection, err := c.dial(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer func() { _ = connection.Close() }()
		return someIDs(items(ctx, connection)), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeTypes offers registered event types.
func completeTypes(c *cli) cobra.CompletionFunc {
	escaped := complete(c, func(ctx context.Context, cl *client.Client) iter.Seq2[*grapnelv1.EventType, error] {
		return cl.EventTypes(c.namespace).List(ctx)
	})
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		ids, directive := escaped(cmd, args, typed)
		for i, id := range ids {
			ids[i] = eventID(id)
		}
		return ids, directive
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
