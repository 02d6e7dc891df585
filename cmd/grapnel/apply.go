package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// What became of an applied resource.
const (
	applyCreated   = "created"
	applyChanged   = "changed"
	applyUnchanged = "unchanged"
)

// applied is one resource of a file, a namespace, a subscription or an event type.
type applied struct {
	where string // file and number of the document, for errors
	name  string
	m     proto.Message
}

func newApplyCommand(c *cli) *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use: "apply -f FILE", Short: "Create or change namespaces, subscriptions and event types as files say",
		Long: `Reads resources from YAML, documents apart by ---, or from JSON, one object after another, and has the server's be as
they say: what is absent is created, what is there gets the file's content whole. Applying the same again changes nothing.
A resource says by its name what it is: namespaces/acme, namespaces/acme/subscriptions/orders,
namespaces/acme/eventTypes/order.created. What get -o yaml and list
-o yaml print can be applied; what only the server says, the etag too, is left out of it. Secrets are not applied, as their
keys have no place in such files.

Everything is read and checked before anything is done. Resources are then taken in turn, each with a line about what became
of it; one that fails does not keep the others, and the exit code is 1.`,
		Example: "  grapnel apply -f acme.yaml\n  grapnel subscription list -n acme -o yaml > acme.yaml\n  grapnel apply -f - < acme.yaml",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "`file` of resources, or - for standard input; repeat for more")
	must(cmd.MarkFlagFilename("file", "yaml", "yml", "json"))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if len(files) == 0 {
			return usagef("--file (-f) is required: a file of resources, or - for standard input")
		}
		var all []applied
		for _, path := range files {
			some, err := c.readResources(path)
			if err != nil {
				return err
			}
			all = append(all, some...)
		}
		if len(all) == 0 {
			return usagef("there is no resource in %s", strings.Join(files, ", "))
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error { return c.apply(ctx, cl, all) })
	}
	return plain(c.connectFlags(cmd, false))
}

// apply takes the resources in turn.
func (c *cli) apply(ctx context.Context, cl *client.Client, all []applied) error {
	failed := false
	for i, a := range all {
		result, warnings, err := a.apply(ctx, cl)
		var answer *client.Error
		if errors.As(err, &answer) && (i == 0 && (unreached(answer) || answer.Code == codes.DeadlineExceeded) || ctx.Err() != nil) {
			return err
		}
		c.warn(warnings)
		if err != nil {
			failed = true
			fmt.Fprintf(c.stderr, "%s: %s\n", a.where, clean(err.Error()))
			result = "failed"
		}
		if c.output == formatJSON {
			line, err := json.Marshal(map[string]string{"name": a.name, "result": result})
			if err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%s\n", line)
		} else {
			c.said("%s %s", a.name, result)
		}
	}
	if failed {
		return quietError{}
	}
	return nil
}

// readResources reads and checks all of a file.
func (c *cli) readResources(path string) ([]applied, error) {
	text, err := c.readFile(path)
	if err != nil {
		return nil, err
	}
	documents, err := documentsOf(text)
	if err != nil {
		return nil, usagef("%s: %w", path, err)
	}
	var all []applied
	for i, document := range documents {
		a, err := resourceOf(document)
		if err != nil {
			return nil, usagef("%s, resource %d: %w", path, i+1, err)
		}
		a.where = fmt.Sprintf("%s, resource %d, %s", path, i+1, a.name)
		all = append(all, a)
	}
	return all, nil
}

// documentsOf takes YAML or JSON apart into objects, as JSON. The elements of a list are documents too.
func documentsOf(text []byte) ([]json.RawMessage, error) {
	var documents []json.RawMessage
	add := func(tree any) error {
		elements, isList := tree.([]any)
		if !isList {
			elements = []any{tree}
		}
		for _, element := range elements {
			if element == nil { // nothing between two ---
				continue
			}
			document, err := json.Marshal(element)
			if err != nil {
				return err
			}
			documents = append(documents, document)
		}
		return nil
	}
	if trimmed := bytes.TrimSpace(text); len(trimmed) > 0 && trimmed[0] == '{' {
		decoder := json.NewDecoder(bytes.NewReader(text))
		decoder.UseNumber()
		for {
			var tree any
			if err := decoder.Decode(&tree); errors.Is(err, io.EOF) {
				return documents, nil
			} else if err != nil {
				break // YAML may begin with a brace, too
			}
			if err := add(tree); err != nil {
				return nil, err
			}
		}
		documents = nil
	}
	stream := newYAMLStream(text)
	for {
		tree, err := stream.next()
		if errors.Is(err, io.EOF) {
			return documents, nil
		} else if err != nil {
			return nil, err
		}
		if err := add(tree); err != nil {
			return nil, err
		}
	}
}

// resourceOf reads one object, whose name says what it is.
func resourceOf(document []byte) (applied, error) {
	var named struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal(document, &named); err != nil {
		return applied{}, errors.New("want an object with a name, such as name: namespaces/acme/subscriptions/orders")
	}
	a := applied{name: named.Name}
	parts := strings.Split(named.Name, "/")
	switch {
	case named.Name == "":
		return a, errors.New("it has no name; want one such as namespaces/acme/subscriptions/orders")
	case len(parts) == 2 && parts[0] == "namespaces":
		a.m = &grapnelv1.Namespace{}
	case len(parts) == 4 && parts[0] == "namespaces" && parts[2] == "subscriptions":
		a.m = &grapnelv1.Subscription{}
	case len(parts) == 4 && parts[0] == "namespaces" && parts[2] == "eventTypes":
		a.m = &grapnelv1.EventType{}
	case len(parts) == 4 && parts[0] == "namespaces" && parts[2] == "secrets":
		return a, fmt.Errorf("%s: secrets are not applied; grapnel secret create makes one", named.Name)
	default:
		return a, fmt.Errorf("%q is the name of neither a namespace (namespaces/acme) nor a subscription (namespaces/acme/subscriptions/orders) nor an event type (namespaces/acme/eventTypes/order.created)", named.Name)
	}
	of := collection(parts[len(parts)-2])
	if err := checkID("", of, parts[len(parts)-1]); err != nil {
		return a, err
	}
	if err := decodeJSON(document, a.m); err != nil {
		return a, fmt.Errorf("%s: %w", named.Name, err)
	}
	return a, nil
}

func (a applied) apply(ctx context.Context, cl *client.Client) (result string, warnings []string, err error) {
	all := &fieldmaskpb.FieldMask{Paths: []string{"*"}}
	switch m := a.m.(type) {
	case *grapnelv1.Namespace:
		m.Etag = ""
		service := cl.NamespaceService()
		before, err := service.GetNamespace(ctx, &grapnelv1.GetNamespaceRequest{Name: a.name})
		if errors.Is(err, client.ErrNotFound) {
			_, err := service.CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{NamespaceId: lastSegment(a.name), Namespace: m})
			return applyCreated, nil, err
		}
		if err != nil {
			return "", nil, err
		}
		after, err := service.UpdateNamespace(ctx, &grapnelv1.UpdateNamespaceRequest{Namespace: m, UpdateMask: all})
		return difference(before.GetNamespace(), after.GetNamespace()), nil, err
	case *grapnelv1.Subscription:
		m.Etag = ""
		service := cl.SubscriptionService()
		before, err := service.GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: a.name})
		if errors.Is(err, client.ErrNotFound) {
			id := lastSegment(a.name)
			r, err := service.CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
				Parent: strings.TrimSuffix(a.name, "/subscriptions/"+id), SubscriptionId: id, Subscription: m, RequestId: client.NewID(),
			})
			return applyCreated, r.GetWarnings(), err
		}
		if err != nil {
			return "", nil, err
		}
		after, err := service.UpdateSubscription(ctx, &grapnelv1.UpdateSubscriptionRequest{Subscription: m, UpdateMask: all})
		return difference(before.GetSubscription(), after.GetSubscription()), after.GetWarnings(), err
	case *grapnelv1.EventType:
		m.Etag = ""
		service := cl.EventTypeService()
		before, err := registeredType(ctx, cl, a.name)
		if err != nil {
			return "", nil, err
		}
		if before == nil {
			parent, _, _ := strings.Cut(a.name, "/eventTypes/")
			_, err := service.CreateEventType(ctx, &grapnelv1.CreateEventTypeRequest{Parent: parent, EventTypeId: eventID(a.name), EventType: m})
			return applyCreated, nil, err
		}
		after, err := service.UpdateEventType(ctx, &grapnelv1.UpdateEventTypeRequest{EventType: m, UpdateMask: all})
		return difference(before, after.GetEventType()), nil, err
	}
	return "", nil, fmt.Errorf("%s cannot be applied", a.name)
}

// difference compares what callers may write.
func difference[T proto.Message](before, after T) string {
	for _, m := range []T{before, after} {
		fields := m.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			switch f := fields.Get(i); f.Name() {
			case "etag", "update_time", "usage", "status", "state", "state_reason", "effective_quota":
				m.ProtoReflect().Clear(f)
			}
		}
	}
	if proto.Equal(before, after) {
		return applyUnchanged
	}
	return applyChanged
}
