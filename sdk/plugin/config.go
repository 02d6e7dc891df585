package plugin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// decode makes a C of an instance's config and secrets: the shape is checked against the schema, defaults
// are filled in, then the author's own check runs.
func decode[C any](s *schema, slots []slot, in spec, check func(C, Target) []Problem) (C, []Problem) {
	var config C
	raw := in.config
	if len(bytes.TrimSpace(raw)) == 0 {
		raw = []byte("{}")
	}
	tree, err := parseJSON(raw)
	if err != nil {
		return config, []Problem{{Pointer: "/config", Code: "config.syntax", Summary: "the config is not JSON: " + err.Error()}}
	}
	tree = s.fill(tree)
	problems := s.check(tree, "/config")
	problems = append(problems, fillSlots(reflect.ValueOf(&config).Elem(), slots, in)...)
	if hasErrors(problems) {
		return config, problems
	}
	full, err := json.Marshal(tree)
	if err == nil {
		err = json.Unmarshal(full, &config)
	}
	if err != nil {
		return config, append(problems, typeProblem(err))
	}
	if check != nil {
		problems = append(problems, check(config, in.target)...)
	}
	return config, problems
}

func typeProblem(err error) Problem {
	p := Problem{Pointer: "/config", Code: "config.type", Summary: err.Error()}
	var te *json.UnmarshalTypeError
	if errors.As(err, &te) {
		p.Pointer = "/config/" + strings.ReplaceAll(te.Field, ".", "/")
		p.Summary = fmt.Sprintf("given a JSON %s that does not fit %s", te.Value, te.Type)
	}
	return p
}

func fillSlots(config reflect.Value, slots []slot, in spec) []Problem {
	var problems []Problem
	for name := range in.secrets {
		if !slices.ContainsFunc(slots, func(s slot) bool { return s.name == name }) {
			problems = append(problems, Problem{
				Pointer: "/secrets/" + escape(name), Code: "secret.unknown_slot",
				Summary: fmt.Sprintf("there is no secret slot %q; there %s", name, oneOf(slotNames(slots))),
			})
		}
	}
	for _, s := range slots {
		values := in.secrets[s.name]
		if len(values) == 0 && s.required && !in.shapeOnly {
			problems = append(problems, Problem{
				Pointer: "/secrets/" + escape(s.name), Code: "secret.missing",
				Summary: fmt.Sprintf("secret slot %q is empty and required", s.name),
			})
		}
		problems = append(problems, s.readAll(values)...)
		config.FieldByIndex(s.index).Set(reflect.ValueOf(Secret{values: values}))
	}
	return problems
}

func slotNames(slots []slot) []string {
	names := make([]string, len(slots))
	for i, s := range slots {
		names[i] = s.name
	}
	return names
}

func oneOf(names []string) string {
	switch len(names) {
	case 0:
		return "are none"
	case 1:
		return "is only " + names[0]
	}
	return "are " + strings.Join(names, ", ")
}

func parseJSON(raw []byte) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is text after the value")
	}
	return v, nil
}

// fill puts defaults where the value has nothing.
func (s *schema) fill(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for _, p := range s.properties {
			given, ok := v[p.name]
			switch {
			case ok:
				v[p.name] = p.schema.fill(given)
			case p.schema.def != nil:
				v[p.name], _ = parseJSON(p.schema.def) // parsed once already
			case p.schema.kind == "object" && len(p.schema.properties) > 0 && !p.required && p.schema.hasDefaults():
				v[p.name] = p.schema.fill(map[string]any{})
			}
		}
		if s.kind == "object" && s.items != nil {
			for k := range v {
				v[k] = s.items.fill(v[k])
			}
		}
	case []any:
		if s.items != nil {
			for i := range v {
				v[i] = s.items.fill(v[i])
			}
		}
	}
	return v
}

// prune leaves out what is zero and not required, as a struct has it that was filled in part.
func (s *schema) prune(v any) {
	fields, ok := v.(map[string]any)
	if !ok {
		return
	}
	for _, p := range s.properties {
		value, ok := fields[p.name]
		if !ok {
			continue
		}
		p.schema.prune(value)
		if !p.required && p.schema.zero(value) {
			delete(fields, p.name)
		}
	}
}

// zero reports whether v is what a field has that nobody set.
func (s *schema) zero(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case bool:
		return !v
	case string:
		return v == "" || s.kind == "duration" && v == Duration(0).String()
	case json.Number:
		f, err := v.Float64()
		return err == nil && f == 0
	case []any:
		return len(v) == 0
	case map[string]any:
		return len(v) == 0
	}
	return false
}

// cloneJSON copies a tree of JSON.
func cloneJSON(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, e := range v {
			out[k] = cloneJSON(e)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = cloneJSON(e)
		}
		return out
	}
	return v
}

// hasDefaults reports whether an absent object is worth making for its defaults: only when nothing in it
// is required, lest its absence become an error.
func (s *schema) hasDefaults() bool {
	found := false
	for _, p := range s.properties {
		if p.schema.def == nil && p.required {
			return false
		}
		found = found || p.schema.def != nil
	}
	return found
}

// check lists what is wrong with v.
func (s *schema) check(v any, at string) []Problem {
	wrong := func(code, format string, args ...any) []Problem {
		return []Problem{{Pointer: at, Code: code, Summary: fmt.Sprintf(format, args...)}}
	}
	switch s.kind {
	case "any":
		return nil
	case "object":
		m, ok := v.(map[string]any)
		if !ok {
			return wrong("config.type", "given %s, want an object", typeName(v))
		}
		return s.checkObject(m, at)
	case "array":
		list, ok := v.([]any)
		if !ok {
			return wrong("config.type", "given %s, want an array", typeName(v))
		}
		problems := s.checkLength(len(list), "elements", at)
		for i, e := range list {
			problems = append(problems, s.items.check(e, at+"/"+strconv.Itoa(i))...)
		}
		return problems
	case "boolean":
		if _, ok := v.(bool); !ok {
			return wrong("config.type", "given %s, want true or false", typeName(v))
		}
	case "string":
		text, ok := v.(string)
		if !ok {
			return wrong("config.type", "given %s, want a string", typeName(v))
		}
		if len(s.enum) > 0 && !slices.Contains(s.enum, text) {
			return wrong("config.enum", "given %q, want one of %s", text, strings.Join(s.enum, ", "))
		}
		return s.checkText(text, at)
	case "duration":
		text, _ := v.(string)
		d, err := time.ParseDuration(text)
		if err != nil {
			return wrong("config.type", "given %s, want a duration such as \"1m30s\"", shown(v))
		}
		return s.checkRange(d.Seconds(), text, at)
	default:
		return s.checkNumber(v, at)
	}
	return nil
}

func (s *schema) checkText(text, at string) []Problem {
	problems := s.checkLength(utf8.RuneCountInString(text), "characters", at)
	if s.pattern != nil && !s.pattern.MatchString(text) {
		problems = append(problems, Problem{Pointer: at, Code: "config.pattern", Summary: fmt.Sprintf("given %q, want text that matches %s", text, s.pattern)})
	}
	if s.format != "" {
		if err := formatOf(s.format)(text); err != nil {
			problems = append(problems, Problem{Pointer: at, Code: "config.format", Summary: fmt.Sprintf("given %q, want %s: %v", text, s.format, err)})
		}
	}
	return problems
}

func (s *schema) checkLength(n int, of, at string) []Problem {
	switch {
	case s.minLength != nil && n < *s.minLength:
		return []Problem{{Pointer: at, Code: "config.length", Summary: fmt.Sprintf("given %d %s, want at least %d", n, of, *s.minLength)}}
	case s.maxLength != nil && n > *s.maxLength:
		return []Problem{{Pointer: at, Code: "config.length", Summary: fmt.Sprintf("given %d %s, want at most %d", n, of, *s.maxLength)}}
	}
	return nil
}

func (s *schema) checkNumber(v any, at string) []Problem {
	n, ok := v.(json.Number)
	if !ok {
		return []Problem{{Pointer: at, Code: "config.type", Summary: fmt.Sprintf("given %s, want %s", typeName(v), article(s.kind))}}
	}
	f, err := n.Float64()
	if err != nil || (s.kind == "integer" && f != math.Trunc(f)) {
		return []Problem{{Pointer: at, Code: "config.type", Summary: fmt.Sprintf("given %s, want %s", n, article(s.kind))}}
	}
	if len(s.enum) > 0 && !slices.Contains(s.enum, n.String()) {
		return []Problem{{Pointer: at, Code: "config.enum", Summary: fmt.Sprintf("given %s, want one of %s", n, strings.Join(s.enum, ", "))}}
	}
	return s.checkRange(f, n.String(), at)
}

func (s *schema) checkRange(f float64, given, at string) []Problem {
	bound := func(text string, v *float64) string {
		if text != "" {
			return text
		}
		return strconv.FormatFloat(*v, 'g', -1, 64)
	}
	switch {
	case s.minimum != nil && f < *s.minimum:
		return []Problem{{Pointer: at, Code: "config.range", Summary: fmt.Sprintf("given %s, want at least %s", given, bound(s.minText, s.minimum))}}
	case s.maximum != nil && f > *s.maximum:
		return []Problem{{Pointer: at, Code: "config.range", Summary: fmt.Sprintf("given %s, want at most %s", given, bound(s.maxText, s.maximum))}}
	}
	return nil
}

func (s *schema) checkObject(m map[string]any, at string) []Problem {
	var problems []Problem
	if s.items != nil {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			problems = append(problems, s.items.check(m[k], at+"/"+escape(k))...)
		}
		return problems
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if !slices.ContainsFunc(s.properties, func(p property) bool { return p.name == k }) {
			problems = append(problems, s.unknown(k, at))
		}
	}
	for _, p := range s.properties {
		v, ok := m[p.name]
		switch {
		case ok:
			problems = append(problems, p.schema.check(v, at+"/"+escape(p.name))...)
		case p.required:
			problems = append(problems, Problem{
				Pointer: at + "/" + escape(p.name), Code: "config.missing",
				Summary: fmt.Sprintf("field %q is missing and required", p.name),
			})
		}
	}
	return problems
}

// unknown complains about a field that there is not.
func (s *schema) unknown(name, at string) Problem {
	names := make([]string, len(s.properties))
	for i, p := range s.properties {
		names[i] = p.name
	}
	return Problem{
		Pointer: at + "/" + escape(name), Code: "config.unknown_field",
		Summary: fmt.Sprintf("there is no field %q; there %s", name, oneOf(names)),
	}
}

// escape is RFC 6901's.
func escape(segment string) string {
	if !strings.ContainsAny(segment, "~/") {
		return segment
	}
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(segment)
}

func typeName(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case map[string]any:
		return "an object"
	case []any:
		return "an array"
	case string:
		return "the string " + strconv.Quote(v)
	case json.Number:
		return "the number " + v.String()
	default:
		return fmt.Sprint(v)
	}
}

func shown(v any) string {
	if s, ok := v.(string); ok {
		return strconv.Quote(s)
	}
	return typeName(v)
}

func article(kind string) string {
	switch kind {
	case "integer", "object", "array":
		return "an " + kind
	case "any":
		return "a field of any type"
	}
	return "a " + kind
}
