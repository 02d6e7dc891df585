package conformance

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// shape is a kind's config schema.
type shape struct {
	schema *jsonschema.Schema
	root   map[string]any
}

// shapeOf compiles the schema as the server does. An empty one allows no settings.
func shapeOf(k *pluginv1.Kind) (*shape, error) {
	text := k.GetConfigSchema()
	if text == "" {
		text = `{"type":"object","additionalProperties":false}`
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("the config schema is not JSON: %w", err)
	}
	root, ok := doc.(map[string]any)
	if !ok {
		return nil, errors.New("the config schema is not an object")
	}
	compiler := jsonschema.NewCompiler()
	compiler.DefaultDraft(jsonschema.Draft2020)
	compiler.UseLoader(noLoader{})
	if err := compiler.AddResource("config.json", doc); err != nil {
		return nil, fmt.Errorf("the config schema: %w", err)
	}
	schema, err := compiler.Compile("config.json")
	if err != nil {
		return nil, fmt.Errorf("the config schema: %w", err)
	}
	return &shape{schema: schema, root: root}, nil
}

type noLoader struct{}

func (noLoader) Load(url string) (any, error) {
	return nil, fmt.Errorf("it refers to %s; a schema must be whole", url)
}

func (s *shape) valid(tree map[string]any) bool { return s.schema.Validate(tree) == nil }

func (s *shape) property(name string) map[string]any {
	properties, _ := s.root["properties"].(map[string]any)
	p, _ := properties[name].(map[string]any)
	return p
}

// fields are the names of the settings that are declared.
func (s *shape) fields() []string {
	properties, _ := s.root["properties"].(map[string]any)
	var names []string
	for name := range properties {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// wrongType reports whether value is of another JSON type than the field says.
func (s *shape) wrongType(field string, value any) bool {
	var types []string
	switch t := s.property(field)["type"].(type) {
	case string:
		types = []string{t}
	case []any:
		for _, one := range t {
			text, _ := one.(string)
			types = append(types, text)
		}
	}
	var is string
	switch value.(type) {
	case bool:
		is = "boolean"
	case string:
		is = "string"
	case []any:
		is = "array"
	case map[string]any:
		is = "object"
	default:
		return len(types) > 0 && !slices.Contains(types, "number") && !slices.Contains(types, "integer")
	}
	return len(types) > 0 && !slices.Contains(types, is)
}

func (s *shape) required() []string {
	list, _ := s.root["required"].([]any)
	var names []string
	for _, one := range list {
		if name, ok := one.(string); ok {
			names = append(names, name)
		}
	}
	return names
}

func schemas(t *trial) error {
	return t.each("kind", any1, func(u *subject) error {
		sh, err := shapeOf(u.kind)
		if err != nil {
			return err
		}
		example := u.kind.GetConfigExample()
		if example == "" {
			if len(sh.required()) > 0 {
				return errors.New("it has required settings and no example")
			}
			return nil
		}
		tree, err := jsonschema.UnmarshalJSON(strings.NewReader(example))
		if err != nil {
			return fmt.Errorf("the example is not JSON: %w", err)
		}
		if err := sh.schema.Validate(tree); err != nil {
			return fmt.Errorf("the example does not pass the schema: %w", err)
		}
		return nil
	})
}
