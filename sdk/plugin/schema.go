package plugin

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// slot is a field of type Secret.
type slot struct {
	name string
	// field is what encoding/json would call it, of the config struct itself.
	field    string
	doc      string
	required bool
	kinds    []string
	index    []int
	format   SecretFormat // zero when values may be any text
}

// schema is one node of a config's shape, read from a Go type. It both prints itself as JSON Schema and
// checks values, so that the two cannot drift apart.
type schema struct {
	kind       string // object, array, string, integer, number, boolean, duration, any
	doc        string
	def        json.RawMessage
	enum       []string
	minimum    *float64
	maximum    *float64
	minText    string
	maxText    string
	minLength  *int // of a string, in characters; of an array, in elements
	maxLength  *int
	pattern    *regexp.Regexp
	format     string
	properties []property
	items      *schema // of array, and of object when it is a map
}

type property struct {
	name     string
	required bool
	schema   *schema
}

const maxDepth = 16

// schemaOf reads the config type C, which is a struct.
func schemaOf[C any]() (*schema, []slot, error) {
	t := reflect.TypeFor[C]()
	if t.Kind() != reflect.Struct {
		return &schema{kind: "object"}, nil, fmt.Errorf("config type %s is not a struct", t)
	}
	root := &schema{kind: "object"}
	var slots []slot
	err := root.addFields(t, nil, &slots, 0)
	return root, slots, err
}

func (s *schema) addFields(t reflect.Type, index []int, slots *[]slot, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("type %s is nested deeper than %d", t, maxDepth)
	}
	var errs []error
	for f := range t.Fields() {
		at := append(slices.Clone(index), f.Index...)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Type == reflect.TypeFor[Secret]():
			sl, err := slotOf(f, at)
			sl.field = cmp.Or(name, f.Name)
			if slots == nil {
				err = fmt.Errorf("field %s: a Secret must be a field of the config struct itself", f.Name)
			} else if err == nil {
				*slots = append(*slots, sl)
			}
			errs = append(errs, err)
			continue
		case f.Anonymous && name == "" && f.Type.Kind() == reflect.Struct:
			errs = append(errs, s.addFields(f.Type, at, slots, depth+1))
			continue
		case !f.IsExported() || name == "-":
			continue
		case name == "":
			name = f.Name
		}
		p, err := propertyOf(name, f, depth)
		if err != nil {
			errs = append(errs, fmt.Errorf("field %s: %w", f.Name, err))
			continue
		}
		s.properties = append(s.properties, p)
	}
	return errors.Join(errs...)
}

func slotOf(f reflect.StructField, index []int) (slot, error) {
	name := f.Tag.Get("slot")
	if name == "" || !f.IsExported() {
		return slot{}, fmt.Errorf("field %s: a Secret needs the tag slot:\"name\" and an exported field", f.Name)
	}
	s := slot{name: name, doc: f.Tag.Get("doc"), required: f.Tag.Get("required") == "true", index: index}
	if kinds := f.Tag.Get("kinds"); kinds != "" {
		s.kinds = strings.Split(kinds, ",")
	}
	return s, nil
}

func propertyOf(name string, f reflect.StructField, depth int) (property, error) {
	node, err := typeSchema(f.Type, depth+1)
	if err != nil {
		return property{}, err
	}
	node.doc = f.Tag.Get("doc")
	if err := node.setLengths(f.Tag.Get("minItems"), f.Tag.Get("maxItems"), "array"); err != nil {
		return property{}, err
	}
	if err := node.element().constrain(f.Tag); err != nil {
		return property{}, err
	}
	if def, ok := f.Tag.Lookup("default"); ok {
		if node.def, err = node.parseDefault(def); err != nil {
			return property{}, err
		}
	}
	return property{name: name, required: f.Tag.Get("required") == "true", schema: node}, nil
}

func typeSchema(t reflect.Type, depth int) (*schema, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("type %s is nested deeper than %d", t, maxDepth)
	}
	if t == reflect.TypeFor[Duration]() {
		return &schema{kind: "duration"}, nil
	}
	if t == reflect.TypeFor[json.RawMessage]() {
		return &schema{kind: "any"}, nil
	}
	switch t.Kind() {
	case reflect.String:
		return &schema{kind: "string"}, nil
	case reflect.Bool:
		return &schema{kind: "boolean"}, nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return &schema{kind: "integer"}, nil
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return &schema{kind: "integer", minimum: new(float64)}, nil
	case reflect.Float32, reflect.Float64:
		return &schema{kind: "number"}, nil
	case reflect.Interface:
		return &schema{kind: "any"}, nil
	case reflect.Pointer:
		return typeSchema(t.Elem(), depth+1)
	case reflect.Slice, reflect.Array:
		items, err := typeSchema(t.Elem(), depth+1)
		return &schema{kind: "array", items: items}, err
	case reflect.Map:
		if t.Key().Kind() != reflect.String {
			return nil, fmt.Errorf("map key of %s is not a string", t)
		}
		items, err := typeSchema(t.Elem(), depth+1)
		return &schema{kind: "object", items: items}, err
	case reflect.Struct:
		s := &schema{kind: "object"}
		return s, s.addFields(t, nil, nil, depth+1)
	default:
		return nil, fmt.Errorf("type %s has no JSON Schema", t)
	}
}

// element is what the tags about values mean: the field itself, or what its array or map holds.
func (s *schema) element() *schema {
	for s.items != nil {
		s = s.items
	}
	return s
}

// constrain reads the tags about values.
func (s *schema) constrain(tag reflect.StructTag) error {
	if enum := tag.Get("enum"); enum != "" {
		if s.kind != "string" && s.kind != "integer" && s.kind != "number" {
			return fmt.Errorf("enum: %s has none", article(s.kind))
		}
		s.enum = strings.Split(enum, ",")
	}
	if err := s.setBounds(tag.Get("minimum"), tag.Get("maximum")); err != nil {
		return err
	}
	if err := s.setLengths(tag.Get("minLength"), tag.Get("maxLength"), "string"); err != nil {
		return err
	}
	pattern, format := tag.Get("pattern"), tag.Get("format")
	if (pattern != "" || format != "") && s.kind != "string" {
		return fmt.Errorf("pattern and format are for strings, not for %s", article(s.kind))
	}
	if pattern != "" {
		var err error
		if s.pattern, err = regexp.Compile(pattern); err != nil {
			return fmt.Errorf("pattern %q: %w", pattern, err)
		}
	}
	if s.format = format; format != "" && formatOf(format) == nil {
		return fmt.Errorf("format %q: want one of %s", format, strings.Join(formatNames(), ", "))
	}
	return nil
}

// setLengths reads bounds of length, which only kind has.
func (s *schema) setLengths(low, high, kind string) error {
	for _, b := range []struct {
		text  string
		value **int
	}{{low, &s.minLength}, {high, &s.maxLength}} {
		if b.text == "" {
			continue
		}
		n, err := strconv.Atoi(b.text)
		if err != nil || n < 0 || s.kind != kind {
			return fmt.Errorf("length %q: want a number, 0 or more, of %s", b.text, article(kind))
		}
		*b.value = &n
	}
	return nil
}

func (s *schema) setBounds(low, high string) error {
	for _, b := range []struct {
		text  string
		value **float64
		kept  *string
	}{{low, &s.minimum, &s.minText}, {high, &s.maximum, &s.maxText}} {
		if b.text == "" {
			continue
		}
		if s.kind != "integer" && s.kind != "number" && s.kind != "duration" {
			return fmt.Errorf("bound %q: %s has none", b.text, article(s.kind))
		}
		v, err := s.number(b.text)
		if err != nil {
			return fmt.Errorf("bound %q: %w", b.text, err)
		}
		*b.value, *b.kept = &v, b.text
	}
	return nil
}

// number reads a bound; durations count in seconds.
func (s *schema) number(text string) (float64, error) {
	if s.kind == "duration" {
		d, err := time.ParseDuration(text)
		return d.Seconds(), err
	}
	return strconv.ParseFloat(text, 64)
}

func (s *schema) parseDefault(text string) (json.RawMessage, error) {
	raw := json.RawMessage(text)
	if s.kind == "string" || s.kind == "duration" {
		raw, _ = json.Marshal(text)
	}
	v, err := parseJSON(raw)
	if err != nil {
		return nil, fmt.Errorf("default %q: %w", text, err)
	}
	if problems := s.check(v, ""); len(problems) > 0 {
		return nil, fmt.Errorf("default %q: %s", text, problems[0].Summary)
	}
	return raw, nil
}

// document is the schema as JSON Schema 2020-12.
func (s *schema) document() ([]byte, error) {
	doc := s.node()
	doc["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	return json.Marshal(doc)
}

const durationPattern = `^([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h))*$`

func (s *schema) node() map[string]any {
	n := map[string]any{}
	if s.doc != "" {
		n["description"] = s.doc
	}
	if s.def != nil {
		n["default"] = s.def
	}
	switch s.kind {
	case "any":
		return n
	case "duration":
		n["type"], n["pattern"] = "string", durationPattern
		s.describeBounds(n)
		return n
	}
	n["type"] = s.kind
	if len(s.enum) > 0 {
		n["enum"] = s.enumValues()
	}
	if s.minimum != nil {
		n["minimum"] = *s.minimum
	}
	if s.maximum != nil {
		n["maximum"] = *s.maximum
	}
	if s.minLength != nil {
		n[map[string]string{"string": "minLength", "array": "minItems"}[s.kind]] = *s.minLength
	}
	if s.maxLength != nil {
		n[map[string]string{"string": "maxLength", "array": "maxItems"}[s.kind]] = *s.maxLength
	}
	if s.pattern != nil {
		n["pattern"] = s.pattern.String()
	}
	if s.format != "" {
		n["format"] = s.format
	}
	switch {
	case s.kind == "array":
		n["items"] = s.items.node()
	case s.kind == "object" && s.items != nil:
		n["additionalProperties"] = s.items.node()
	case s.kind == "object":
		s.objectNode(n)
	}
	return n
}

func (s *schema) describeBounds(n map[string]any) {
	text := s.doc
	if s.minText != "" {
		text += " At least " + s.minText + "."
	}
	if s.maxText != "" {
		text += " At most " + s.maxText + "."
	}
	if text = strings.TrimSpace(text); text != "" {
		n["description"] = text
	}
}

func (s *schema) objectNode(n map[string]any) {
	properties, required := map[string]any{}, []string{}
	for _, p := range s.properties {
		properties[p.name] = p.schema.node()
		if p.required && p.schema.def == nil {
			required = append(required, p.name)
		}
	}
	n["properties"], n["additionalProperties"] = properties, false
	if len(required) > 0 {
		n["required"] = required
	}
}

func (s *schema) enumValues() []any {
	values := make([]any, len(s.enum))
	for i, e := range s.enum {
		values[i] = e
		if s.kind == "integer" || s.kind == "number" {
			values[i] = json.Number(e)
		}
	}
	return values
}
