package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// notTaken is what became of a type that could not be imported.
const notTaken = "not taken"

// maxVersions is how many schemas a type may have.
const maxVersions = 16

func newEventTypeImport(c *cli) *cobra.Command {
	var prefix, version, level string
	var dry bool
	cmd := &cobra.Command{
		Use: "import FILE", Short: "Register the webhooks of an OpenAPI or AsyncAPI file", Args: exactly("file, or - for standard input"),
		Long: `Registers every webhook of an OpenAPI file (webhooks of 3.1, x-webhooks of 3.0) or message of an AsyncAPI file (2 and 3), in
JSON or YAML, as an event type: its description, whether it is deprecated, the schema of its JSON payload with everything that
it refers to within the file, and an example. What refers out of the file is not taken, for nothing is fetched.

The schema becomes the version that the file's info.version names; if it is the same as that of the newest version, no version
is added. Enforcement is not touched where a type is registered already. Importing the same file again changes nothing. Each
type gets a line about what became of it; one that cannot be taken does not keep the others, and the exit code is 1.`,
		Example: `  grapnel event-type import openapi.yaml -n acme --dry-run
  grapnel event-type import openapi.yaml -n acme --prefix acme. --enforcement warn`,
	}
	cmd.Flags().StringVar(&prefix, "prefix", "", "`text` to put before the name of each webhook")
	cmd.Flags().StringVar(&version, "schema-version", "", "`name` of the schemas' version; default the file's info.version")
	cmd.Flags().StringVar(&level, "enforcement", "off", "of types that are new: off, warn or reject")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "check everything, say what would happen, and store nothing")
	must(cmd.RegisterFlagCompletionFunc("enforcement", fixed("off", "warn", "reject")))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		parent, err := c.parent()
		if err != nil {
			return err
		}
		of, err := enforcement(level)
		if err != nil {
			return err
		}
		text, err := c.readFile(args[0])
		if err != nil {
			return err
		}
		described, err := describedTypes(text)
		if err != nil {
			return usagef("%s: %w", args[0], err)
		}
		if described.empty() {
			return usagef("%s has no webhooks and no messages", args[0])
		}
		m := importer{c: c, parent: parent, prefix: prefix, version: version, enforcement: of, dry: dry}
		if m.version == "" {
			m.version = described.version
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error { return m.run(ctx, cl, described) })
	}
	return plain(cmd)
}

// importer takes the types of one file.
type importer struct {
	c               *cli
	parent          string
	prefix, version string
	enforcement     grapnelv1.EventType_Enforcement
	dry             bool
}

func (m importer) run(ctx context.Context, cl *client.Client, described description) error {
	counts, asked := map[string]int{}, false
	for d, err := range described.all {
		if err != nil {
			counts[notTaken]++
			m.tell(d.where, notTaken, err.Error())
			continue
		}
		id := m.prefix + d.id
		name := m.parent + "/eventTypes/" + client.EscapeID(id)
		result, notes, err := m.take(ctx, cl, id, name, d)
		var answer *client.Error
		if errors.As(err, &answer) && (!asked && (unreached(answer) || answer.Code == codes.DeadlineExceeded || errors.Is(err, client.ErrNotFound)) || ctx.Err() != nil) {
			return err
		}
		asked = true
		if err != nil {
			name, result, notes, d.notes = d.where, notTaken, []string{err.Error()}, nil
		}
		counts[result]++
		m.tell(name, result, strings.Join(append(notes, d.notes...), "; "))
	}
	would := ""
	if m.dry {
		would = "nothing is stored; it would be "
	}
	m.c.said("%s%d created, %d changed, %d unchanged, %d not taken", would, counts[applyCreated], counts[applyChanged], counts[applyUnchanged], counts[notTaken])
	if counts[notTaken] > 0 {
		return quietError{}
	}
	return nil
}

// tell prints what became of one; what was not taken goes to standard error.
func (m importer) tell(name, result, why string) {
	switch {
	case m.c.output == formatJSON:
		line, err := json.Marshal(map[string]string{"name": name, "result": result, "note": why})
		if err == nil { // three texts always encode
			fmt.Fprintf(m.c.stdout, "%s\n", line)
		}
	case result == notTaken:
		fmt.Fprintf(m.c.stderr, "%s: not taken: %s\n", clean(name), clean(why))
	case why != "":
		m.c.said("%s %s: %s", name, result, why)
	default:
		m.c.said("%s %s", name, result)
	}
}

// take has the server's type be as the file says.
func (m importer) take(ctx context.Context, cl *client.Client, id, name string, d describedType) (result string, notes []string, err error) {
	before, err := registeredType(ctx, cl, name)
	if err != nil {
		return "", nil, err
	}
	wanted := &grapnelv1.EventType{Enforcement: m.enforcement}
	result = applyCreated
	if before != nil {
		wanted, result = proto.CloneOf(before), applyChanged
	}
	wanted.Description, wanted.Deprecated, wanted.Example = d.description, d.deprecated, d.example
	if !d.deprecated {
		wanted.DeprecationReason = ""
	}
	if newest := newestSchema(wanted); d.schema != "" && newest != d.schema {
		putVersion(wanted, m.version, d.schema)
		if n := len(wanted.GetSchemas()); n > maxVersions {
			notes = append(notes, "version "+wanted.GetSchemas()[0].GetVersion()+" is removed, as a type has 16 at most")
			wanted.Schemas = slices.Delete(wanted.Schemas, 0, n-maxVersions)
		}
	}
	if before != nil && proto.Equal(before, wanted) {
		return applyUnchanged, nil, nil
	}
	err = m.store(ctx, cl, id, wanted, before)
	if bad := onlyExample(err); bad != "" {
		wanted.Example = ""
		if notes = append(notes, "its example is left out: "+bad); before != nil && proto.Equal(before, wanted) {
			return applyUnchanged, notes, nil
		}
		err = m.store(ctx, cl, id, wanted, before)
	}
	return result, notes, err
}

// newestSchema is the schema that applies to events that name no version.
func newestSchema(t *grapnelv1.EventType) string {
	for _, v := range slices.Backward(t.GetSchemas()) {
		if !v.GetDeprecated() {
			return v.GetJsonSchema()
		}
	}
	return ""
}

func (m importer) store(ctx context.Context, cl *client.Client, id string, wanted, before *grapnelv1.EventType) error {
	if before == nil {
		_, err := cl.EventTypeService().CreateEventType(ctx, &grapnelv1.CreateEventTypeRequest{
			Parent: m.parent, EventTypeId: id, EventType: wanted, ValidateOnly: m.dry,
		})
		return err
	}
	wanted.Etag = before.GetEtag()
	_, err := cl.EventTypeService().UpdateEventType(ctx, &grapnelv1.UpdateEventTypeRequest{
		EventType: wanted, ValidateOnly: m.dry,
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"description", "deprecated", "deprecation_reason", "example", "schemas"}},
	})
	return err
}

// onlyExample says what is wrong with an example, if nothing else was.
func onlyExample(err error) string {
	var answer *client.Error
	if !errors.As(err, &answer) || !errors.Is(err, client.ErrInvalidField) || len(answer.Violations) == 0 {
		return ""
	}
	for _, v := range answer.Violations {
		if !strings.HasPrefix(v.Field, "event_type.example") {
			return ""
		}
	}
	first := answer.Violations[0]
	return strings.TrimSpace(strings.TrimPrefix(first.Field, "event_type.example") + " " + first.Description)
}
