package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newEventTypeCommand(c *cli) *cobra.Command {
	cmd := group("event-type", "Types of events: what they mean and what their payloads look like",
		newEventTypeCreate(c), newEventTypeGet(c), newEventTypeList(c), newEventTypeUpdate(c), newEventTypeDelete(c),
		newEventTypeSample(c), newEventTypeImport(c))
	cmd.Aliases = []string{"event-types"}
	return c.connectFlags(cmd, true)
}

func eventTypeColumns() []column[*grapnelv1.EventType] {
	type kind = *grapnelv1.EventType
	return []column[kind]{
		{head: "TYPE", value: kind.GetType},
		{head: "NAME", detail: true, value: kind.GetName},
		{head: "VERSIONS", value: schemaVersionsText},
		{head: "ENFORCEMENT", value: func(t kind) string { return enumText(t.GetEnforcement()) }},
		{head: "DEPRECATED", value: func(t kind) string {
			if t.GetDeprecated() && t.GetDeprecationReason() != "" {
				return "yes: " + t.GetDeprecationReason()
			}
			return yesOnly(t.GetDeprecated())
		}},
		{head: "DESCRIPTION", detail: true, value: kind.GetDescription},
		{head: "EXAMPLE", detail: true, value: kind.GetExample},
		{head: "CREATED", detail: true, value: func(t kind) string { return timeText(t.GetCreateTime()) }},
		{head: "UPDATED", detail: true, value: func(t kind) string { return timeText(t.GetUpdateTime()) }},
		{head: "AGE", value: func(t kind) string { return age(t.GetUpdateTime()) }},
		{head: "ETAG", detail: true, value: kind.GetEtag},
	}
}

func schemaVersionsText(t *grapnelv1.EventType) string {
	var words []string
	for _, v := range t.GetSchemas() {
		word := v.GetVersion()
		if v.GetDeprecated() {
			word += " (deprecated)"
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

// eventTypeFlags are what create and update set.
type eventTypeFlags struct {
	description, reason, example, enforcement string
	schema, version                           string
	remove, deprecateVersions                 []string
	deprecated                                bool
}

func (f *eventTypeFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.description, "description", "", "text for people")
	flags.StringVar(&f.schema, "schema", "", "JSON Schema of the payload: text, `@file`, or - for standard input")
	flags.StringVar(&f.version, "schema-version", "1", "`name` of the version that --schema is")
	flags.StringVar(&f.example, "example", "", "a payload as it might be: text, `@file`, or - for standard input")
	flags.StringVar(&f.enforcement, "enforcement", "", "what becomes of events that the schema does not allow: off, the default, warn or reject")
	flags.BoolVar(&f.deprecated, "deprecated", false, "not to be used any more")
	flags.StringVar(&f.reason, "deprecation-reason", "", "why, and what to use instead")
	must(cmd.RegisterFlagCompletionFunc("enforcement", fixed("off", "warn", "reject")))
}

// apply puts the flags that were given into t and returns the paths of what it set.
func (f *eventTypeFlags) apply(cmd *cobra.Command, c *cli, t *grapnelv1.EventType) (paths []string, err error) {
	if err := needs(cmd, "schema-version", "schema"); err != nil {
		return nil, err
	}
	read := func(flag, value string) (string, error) {
		text, err := c.readValue(value)
		if err != nil {
			return "", fmt.Errorf("read --%s: %w", flag, err)
		}
		return string(bytes.TrimSpace(text)), nil
	}
	for _, flag := range []struct {
		name, path string
		set        func() error
	}{
		{"description", "description", func() error { t.Description = f.description; return nil }},
		{"deprecated", "deprecated", func() error { t.Deprecated = f.deprecated; return nil }},
		{"deprecation-reason", "deprecation_reason", func() error { t.DeprecationReason = f.reason; return nil }},
		{"example", "example", func() (err error) { t.Example, err = read("example", f.example); return err }},
		{"enforcement", "enforcement", func() (err error) { t.Enforcement, err = enforcement(f.enforcement); return err }},
		{"schema", "schemas", func() error {
			text, err := read("schema", f.schema)
			if err != nil {
				return err
			}
			putVersion(t, f.version, text)
			return nil
		}},
		{"deprecate-version", "schemas", func() error { return f.eachVersion("deprecate-version", f.deprecateVersions, t, false) }},
		{"remove-version", "schemas", func() error { return f.eachVersion("remove-version", f.remove, t, true) }},
	} {
		if cmd.Flags().Changed(flag.name) {
			if err := flag.set(); err != nil {
				return nil, err
			}
			if !slices.Contains(paths, flag.path) {
				paths = append(paths, flag.path)
			}
		}
	}
	if cmd.Flags().Changed("deprecated") && !f.deprecated && !cmd.Flags().Changed("deprecation-reason") {
		t.DeprecationReason = ""
		paths = append(paths, "deprecation_reason")
	}
	return paths, nil
}

// eachVersion removes versions, or marks them deprecated.
func (f *eventTypeFlags) eachVersion(flag string, names []string, t *grapnelv1.EventType, remove bool) error {
	for _, name := range names {
		at := slices.IndexFunc(t.GetSchemas(), func(v *grapnelv1.EventTypeSchema) bool { return v.GetVersion() == name })
		switch {
		case at < 0:
			return usagef("--%s %s: there is no such version; there are %s", flag, name, schemaVersionsText(t))
		case remove:
			t.Schemas = slices.Delete(t.Schemas, at, at+1)
		default:
			t.Schemas[at].Deprecated = true
		}
	}
	return nil
}

// putVersion replaces a version's schema, or adds it as the newest.
func putVersion(t *grapnelv1.EventType, version, text string) {
	for _, v := range t.GetSchemas() {
		if v.GetVersion() == version {
			v.JsonSchema = text
			return
		}
	}
	t.Schemas = append(t.Schemas, &grapnelv1.EventTypeSchema{Version: version, JsonSchema: text})
}

// enforcement reads --enforcement.
func enforcement(text string) (grapnelv1.EventType_Enforcement, error) {
	n, ok := grapnelv1.EventType_Enforcement_value["ENFORCEMENT_"+strings.ToUpper(text)]
	if !ok || n == 0 {
		return 0, usagef("--enforcement %s: must be off, warn or reject%s", text, didYouMean(text, []string{"off", "warn", "reject"}))
	}
	return grapnelv1.EventType_Enforcement(n), nil
}

// eventTypeName is the full name of a type given by itself or by its full name, and the two parts that make it.
func (c *cli) eventTypeName(arg string) (parent, id, name string, err error) {
	if name, err = c.name(eventTypes, arg); err != nil {
		return "", "", "", err
	}
	return name[:strings.Index(name, "/eventTypes/")], eventID(name), name, nil
}

// oneType is for commands about one event type.
func oneType(cmd *cobra.Command, args []string) error {
	return exactly("event type or full name")(cmd, args)
}

func newEventTypeCreate(c *cli) *cobra.Command {
	var f eventTypeFlags
	var validateOnly bool
	cmd := &cobra.Command{
		Use: "create TYPE", Short: "Register a type of events", Args: oneType,
		Example: `  grapnel event-type create order.created -n acme --description 'An order was placed.'
  grapnel event-type create order.paid -n acme --schema @order-paid.json --enforcement reject`,
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&validateOnly, "validate-only", false, "check everything and store nothing")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		parent, id, _, err := c.eventTypeName(args[0])
		if err != nil {
			return err
		}
		t := &grapnelv1.EventType{}
		if _, err := f.apply(cmd, c, t); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			r, err := cl.EventTypeService().CreateEventType(ctx, &grapnelv1.CreateEventTypeRequest{
				Parent: parent, EventTypeId: id, EventType: t, ValidateOnly: validateOnly,
			})
			if err != nil {
				return err
			}
			return show(c, r.GetEventType(), eventTypeColumns())
		})
	}
	return cmd
}

func newEventTypeGet(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "get TYPE", Short: "Show a type and how its events fit", Args: oneType, ValidArgsFunction: firstArg(completeTypes(c)),
		Long: "Shows a type and how many events its schema did not allow. The schemas are in -o json and -o yaml.",
		RunE: func(cmd *cobra.Command, args []string) error {
			_, _, name, err := c.eventTypeName(args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.EventTypeService().GetEventType(ctx, &grapnelv1.GetEventTypeRequest{Name: name})
				if err != nil {
					return err
				}
				columns := eventTypeColumns()
				add := func(head, text string) {
					columns = append(columns, column[*grapnelv1.EventType]{head: head, detail: true, value: func(*grapnelv1.EventType) string { return text }})
				}
				add("MISMATCHES", number(r.GetStatus().GetMismatches()))
				add("LAST MISMATCH", r.GetStatus().GetLastMismatch())
				add("LAST MISMATCH AT", timeText(r.GetStatus().GetLastMismatchTime()))
				return show(c, r.GetEventType(), columns)
			})
		},
	}
}

func newEventTypeList(c *cli) *cobra.Command {
	var filter string
	var all bool
	cmd := &cobra.Command{
		Use: "list", Short: "List types", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		Long:    "Lists types in their order. -o json and -o yaml have the schemas, too.",
		Example: "  grapnel event-type list -n acme --filter 'type = order.* AND deprecated = false'",
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ns, columns := "-", eventTypeColumns()
		if all {
			columns[0], columns[1].detail = columns[1], false // full names, as types repeat
			columns = slices.Delete(columns, 1, 2)
			columns[0].detail = false
		} else {
			var err error
			if ns, err = c.namespaceID(); err != nil {
				return err
			}
		}
		options := []client.ListOption{client.Filter(filter)}
		if c.forPrograms() && c.output != formatName {
			options = append(options, client.IncludeBodies(), client.PageSize(50))
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			return list(c, cl.EventTypes(ns).List(ctx, options...), 0, columns)
		})
	}
	cmd.Flags().StringVar(&filter, "filter", "", "`expression` over type, deprecated, enforcement, version, create_time, update_time")
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

func newEventTypeUpdate(c *cli) *cobra.Command {
	var f eventTypeFlags
	var etag string
	var validateOnly bool
	cmd := &cobra.Command{
		Use: "update TYPE", Short: "Change a type; what is not given stays", Args: oneType, ValidArgsFunction: firstArg(completeTypes(c)),
		Long: `Changes what the flags name and leaves the rest. --schema replaces the version of that name, or adds it as the newest. What
was accepted before is not looked at again.`,
		Example: `  grapnel event-type update order.paid -n acme --schema @v2.json --schema-version 2
  grapnel event-type update order.paid -n acme --deprecate-version 1
  grapnel event-type update order.paid -n acme --deprecated --deprecation-reason 'use order.settled'`,
	}
	f.register(cmd)
	cmd.Flags().StringSliceVar(&f.deprecateVersions, "deprecate-version", nil, "`version` that is not for new events; repeat for more")
	cmd.Flags().StringSliceVar(&f.remove, "remove-version", nil, "`version` to remove; repeat for more")
	cmd.Flags().StringVar(&etag, "etag", "", "fail unless this is the current etag")
	cmd.Flags().BoolVar(&validateOnly, "validate-only", false, "check everything and store nothing")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		_, _, name, err := c.eventTypeName(args[0])
		if err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			before, err := cl.EventTypeService().GetEventType(ctx, &grapnelv1.GetEventTypeRequest{Name: name})
			if err != nil {
				return err
			}
			t := before.GetEventType()
			paths, err := f.apply(cmd, c, t)
			if err != nil {
				return err
			}
			if len(paths) == 0 {
				return usagef("nothing to change: give at least one flag")
			}
			// A version is put among those that were there a moment ago.
			if etag != "" || !slices.Contains(paths, "schemas") {
				t.Etag = etag
			}
			r, err := cl.EventTypeService().UpdateEventType(ctx, &grapnelv1.UpdateEventTypeRequest{
				EventType: t, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}, ValidateOnly: validateOnly,
			})
			if err != nil {
				return err
			}
			return show(c, r.GetEventType(), eventTypeColumns())
		})
	}
	return cmd
}

// eventTypeLoss is what a deletion takes away for good: the schemas, as no other place need have them.
func eventTypeLoss(ctx context.Context, cl *client.Client, name string) (string, error) {
	t, err := registeredType(ctx, cl, name)
	switch n := len(t.GetSchemas()); {
	case errors.Is(err, client.ErrPermissionDenied): // may delete, and not look
		return "its schemas", nil
	case err != nil || n == 0: // deleting says what is missing, or that it may be
		return "", err
	case n == 1:
		return "its schema", nil
	default:
		return fmt.Sprintf("its schema in %d versions", n), nil
	}
}

func newEventTypeDelete(c *cli) *cobra.Command {
	r := &grapnelv1.DeleteEventTypeRequest{}
	var yes bool
	cmd := &cobra.Command{
		Use: "delete TYPE", Short: "Remove a type; its events go on being published", Args: oneType, ValidArgsFunction: firstArg(completeTypes(c)),
		Long: `Removes a type with its schemas: where there are any, it asks, or wants --yes when there is no terminal to ask at. Its events
go on being published, unless the namespace wants types registered.`,
	}
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag")
	cmd.Flags().BoolVar(&r.AllowMissing, "allow-missing", false, "succeed when it is already gone")
	yesFlag(cmd, &yes)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if _, _, r.Name, err = c.eventTypeName(args[0]); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			loss := ""
			if !yes {
				var err error
				if loss, err = eventTypeLoss(ctx, cl, r.GetName()); err != nil {
					return err
				}
			}
			if err := c.confirm(cmd.Context(), yes, r.GetName(), loss); err != nil {
				return err
			}
			answer, err := cl.EventTypeService().DeleteEventType(ctx, r)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, answer, nil)
			}
			c.said("%s deleted", r.Name)
			return nil
		})
	}
	return cmd
}

func newEventTypeSample(c *cli) *cobra.Command {
	r := &grapnelv1.SampleEventTypeRequest{}
	cmd := &cobra.Command{
		Use: "sample TYPE", Short: "Make a payload that the type's schema allows", Args: oneType, ValidArgsFunction: firstArg(completeTypes(c)),
		Long: `Prints a payload that the type's schema allows: its example, or one that is made of the schema, the same each time.
subscription test sends it when it is given a type and no data.`,
		Example: "  grapnel event-type sample order.created -n acme | grapnel publish -n acme --type order.created --data -",
	}
	cmd.Flags().StringVar(&r.Version, "schema-version", "", "`version` of the schema; default the one that applies to events that name none")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if _, _, r.Name, err = c.eventTypeName(args[0]); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			answer, err := cl.EventTypeService().SampleEventType(ctx, r)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, answer, nil)
			}
			_, err = fmt.Fprintln(c.stdout, clean(answer.GetPayload()))
			return err
		})
	}
	return cmd
}

// registeredType reads a type, nil when there is none.
func registeredType(ctx context.Context, cl *client.Client, name string) (*grapnelv1.EventType, error) {
	r, err := cl.EventTypeService().GetEventType(ctx, &grapnelv1.GetEventTypeRequest{Name: name})
	if errors.Is(err, client.ErrNotFound) {
		return nil, nil
	}
	return r.GetEventType(), err
}
