// Package schema owns JSON Schemas of payloads: which are taken, what a payload breaks and where, and what a payload could
// look like. It knows no event types and stores nothing.
//
// A schema comes from a stranger, and payloads from others, so that everything about them is bounded: the schema's size,
// nesting and patterns when it is compiled, which fetches nothing, and the work that one payload may take when it is
// checked. santhosh-tekuri/jsonschema checks a schema against its metaschema and resolves what it refers to. What it gives
// is turned into rules that are checked on the payload's own bytes: its own validator wants a tree of Go values, which
// takes longer to make than all the rest.
package schema

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"sort"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

const (
	// MaxBytes is how long a schema may be.
	MaxBytes = 256 << 10
	// maxPattern bounds a regular expression, and maxProgram what it compiles to.
	maxPattern = 1024
	maxProgram = 2000
	// maxPrograms bounds the memory of all expressions of a schema, of which an instruction takes instBytes and a character
	// in a class runeBytes, and maxSize that of a compiled schema.
	maxPrograms = 2 << 20
	instBytes   = 40
	runeBytes   = 4
	maxSize     = 6 << 20
	// maxValues bounds the values of a schema, maxSchemas those that may be schemas, maxPointers the bytes of the pointers to
	// these, and maxName those of a name.
	maxValues   = 50_000
	maxSchemas  = 5000
	maxPointers = 1 << 20
	maxName     = 1024
	// maxNamed bounds what has an $id or $anchor, and maxElsewhere the bytes of what is referred to in unusual places, with
	// a KiB counted for each.
	maxNamed     = 500
	maxElsewhere = 512 << 10
	// maxChain is how many rules may stand one behind the other for one value, through $ref, allOf and the like.
	maxChain = 64
)

// Schema is a compiled schema. Immutable, for use by any goroutine.
type Schema struct {
	// ID is the schema's $id, or empty.
	ID   string
	root *rule
	size int
}

// Size is about how many bytes of memory it takes.
func (s *Schema) Size() int { return s.size }

// An Error says why a text is not taken as a schema.
type Error struct {
	// Pointer is the JSON Pointer to what is wrong in the schema, where that is known.
	Pointer string
	// Description says in words what is wrong.
	Description string
	// Reason is stable, for machines, such as "schema.ref".
	Reason string
}

func (e *Error) Error() string {
	if e.Pointer == "" {
		return e.Description
	}
	return "at " + e.Pointer + ": " + e.Description
}

// Compile takes a text as a schema: JSON Schema 2020-12, or draft-07 if its $schema says so. Its error is an *Error. It
// takes about a millisecond for each 2 KiB, all bounds kept. A schema that would take more than 6 MiB is refused.
func Compile(text []byte) (*Schema, error) {
	loaded, id, err := load(text)
	if err != nil {
		return nil, err
	}
	return build(loaded, id, len(text))
}

// build makes a schema of what the library has compiled of so many bytes.
func build(loaded *jsonschema.Schema, id string, length int) (*Schema, error) {
	b := builder{made: make(map[*jsonschema.Schema]*rule), counted: make(map[*regexp.Regexp]bool), size: length}
	root := b.rule(loaded)
	if b.err != nil {
		return nil, b.err
	}
	if err := b.bound(); err != nil {
		return nil, err
	}
	b.size += len(b.all) * ruleBytes
	if b.size > maxSize {
		return nil, &Error{Reason: "schema.size",
			Description: fmt.Sprintf("would take %d bytes of memory once compiled; at most %d are allowed", b.size, maxSize)}
	}
	return &Schema{ID: id, root: root, size: b.size}, nil
}

// ruleBytes is about what a rule takes beside its texts, and nodeBytes a value in an enum.
const (
	ruleBytes = 640
	nodeBytes = 24
)

// builder makes rules of what the library has compiled.
type builder struct {
	made map[*jsonschema.Schema]*rule
	all  []*rule
	// counted are the expressions that size has.
	counted map[*regexp.Regexp]bool
	size    int
	err     error
}

func (b *builder) fail(s *jsonschema.Schema, reason, format string, args ...any) {
	if b.err == nil {
		b.err = &Error{Pointer: fragment(s.Location), Description: fmt.Sprintf(format, args...), Reason: reason}
	}
}

// rule is nil for none.
func (b *builder) rule(s *jsonschema.Schema) *rule {
	if s == nil || b.err != nil {
		return nil
	}
	if r, ok := b.made[s]; ok {
		return r
	}
	r := &rule{at: fragment(s.Location)}
	b.made[s] = r
	b.all = append(b.all, r)
	b.size += len(r.at)
	if s.Bool != nil {
		r.never = !*s.Bool
		return r
	}
	if s.DraftVersion != 2020 && s.DraftVersion != 7 {
		b.fail(s, "schema.draft", "is of another draft; want 2020-12 or draft-07")
		return r
	}
	if s.DynamicRef != nil || s.RecursiveRef != nil {
		b.fail(s, "schema.ref", "has a $dynamicRef, which is not taken; use $ref")
		return r
	}
	b.any(r, s)
	b.object(r, s)
	b.array(r, s)
	b.scalar(r, s)
	return r
}

func (b *builder) rules(list []*jsonschema.Schema) []*rule {
	var out []*rule
	for _, s := range list {
		out = append(out, b.rule(s))
	}
	return out
}

// any takes the keywords for values of any kind.
func (b *builder) any(r *rule, s *jsonschema.Schema) {
	if s.Types != nil {
		for _, name := range s.Types.ToStrings() {
			r.types |= kindNamed(name)
		}
	}
	if s.Const != nil {
		r.constant = b.values([]any{*s.Const})
	}
	if s.Enum != nil {
		r.enum = b.values(s.Enum.Values)
	}
	r.ref = b.rule(s.Ref)
	r.all, r.anyOf, r.oneOf = b.rules(s.AllOf), b.rules(s.AnyOf), b.rules(s.OneOf)
	r.not, r.when, r.then, r.otherwise = b.rule(s.Not), b.rule(s.If), b.rule(s.Then), b.rule(s.Else)
	r.unevaluatedProperties, r.unevaluatedItems = b.rule(s.UnevaluatedProperties), b.rule(s.UnevaluatedItems)
	r.tracks = r.unevaluatedProperties != nil || r.unevaluatedItems != nil
}

func kindNamed(name string) kind {
	switch name {
	case "null":
		return kindNull
	case "boolean":
		return kindBoolean
	case "number":
		return kindNumber
	case "integer":
		return kindInteger
	case "string":
		return kindString
	case "array":
		return kindArray
	}
	return kindObject
}

// values reads an enum or a const.
func (b *builder) values(list []any) *values {
	v := &values{strings: make(map[string]bool)}
	for _, item := range list {
		text, err := json.Marshal(item)
		if err != nil {
			continue // it came from JSON
		}
		b.size += 2*len(text) + 64
		if len(v.shown) < 200 {
			if v.shown != "" {
				v.shown += ", "
			}
			v.shown += string(text)
		}
		v.count++
		if s, ok := item.(string); ok {
			v.strings[s] = true
			continue
		}
		d := &document{}
		if err := d.parse(text, maxSchemaDepth); err == nil {
			d.settle()
			d.nodes = slices.Clone(d.nodes) // without what they grew by
			b.size += nodeBytes*len(d.nodes) + 64
			v.others = append(v.others, d)
		}
	}
	if len(v.shown) >= 200 {
		v.shown = strings.ToValidUTF8(v.shown[:min(len(v.shown), 200)], "") + "…"
	}
	return v
}

func (b *builder) object(r *rule, s *jsonschema.Schema) {
	r.minProperties, r.maxProperties = bound(s.MinProperties), bound(s.MaxProperties)
	r.required = slices.Clone(s.Required)
	if len(s.Properties) > 0 || len(s.Required) > 0 {
		r.properties = make(map[string]property, len(s.Properties))
	}
	for name, sub := range s.Properties {
		r.properties[name] = property{rule: b.rule(sub), required: -1}
		b.size += len(name) + 48
	}
	for i, name := range r.required {
		p, known := r.properties[name]
		if !known {
			p = property{unnamed: true}
		}
		p.required = i
		r.properties[name] = p
		b.size += len(name) + 48
	}
	for pattern, sub := range s.PatternProperties {
		b.size += 64
		r.patterns = append(r.patterns, patternRule{b.pattern(pattern), b.rule(sub)})
	}
	sort.Slice(r.patterns, func(i, j int) bool { return r.patterns[i].text < r.patterns[j].text })
	r.additional = b.boolOr(s.AdditionalProperties)
	r.names = b.rule(s.PropertyNames)
	for name, needs := range s.Dependencies {
		switch d := needs.(type) {
		case []string:
			r.dependents = append(r.dependents, b.dependency(name, d))
		case *jsonschema.Schema:
			r.dependents = append(r.dependents, dependency{name: name, rule: b.rule(d)})
		}
	}
	for name, required := range s.DependentRequired {
		r.dependents = append(r.dependents, b.dependency(name, required))
	}
	for name, sub := range s.DependentSchemas {
		r.dependents = append(r.dependents, dependency{name: name, rule: b.rule(sub)})
	}
	sort.SliceStable(r.dependents, func(i, j int) bool { return r.dependents[i].name < r.dependents[j].name })
	r.ofObject = r.minProperties > 0 || r.maxProperties >= 0 || r.properties != nil || r.patterns != nil || r.additional != nil ||
		r.names != nil || r.dependents != nil
}

// dependency is one of names.
func (b *builder) dependency(name string, required []string) dependency {
	b.size += len(name) + 48
	for _, needed := range required {
		b.size += len(needed) + 16
	}
	return dependency{name: name, required: required}
}

// boolOr is a keyword that is a boolean or a schema.
func (b *builder) boolOr(v any) *rule {
	switch v := v.(type) {
	case bool:
		r := &rule{never: !v}
		b.all = append(b.all, r)
		return r
	case *jsonschema.Schema:
		return b.rule(v)
	}
	return nil
}

func (b *builder) array(r *rule, s *jsonschema.Schema) {
	r.minItems, r.maxItems, r.unique = bound(s.MinItems), bound(s.MaxItems), s.UniqueItems
	if s.DraftVersion >= 2020 {
		r.prefix, r.items = b.rules(s.PrefixItems), b.rule(s.Items2020)
	} else {
		switch items := s.Items.(type) {
		case []*jsonschema.Schema:
			r.prefix, r.items = b.rules(items), b.boolOr(s.AdditionalItems)
		default:
			r.items = b.boolOr(items)
		}
	}
	if r.contains = b.rule(s.Contains); r.contains != nil {
		r.minContains, r.maxContains = 1, bound(s.MaxContains)
		if s.MinContains != nil {
			r.minContains = *s.MinContains
		}
		r.containsEvaluates = s.DraftVersion >= 2020
	}
	r.ofArray = r.minItems > 0 || r.maxItems >= 0 || r.unique || r.prefix != nil || r.items != nil || r.contains != nil
}

func (b *builder) scalar(r *rule, s *jsonschema.Schema) {
	r.minLength, r.maxLength = bound(s.MinLength), bound(s.MaxLength)
	if s.Pattern != nil {
		p := b.pattern(s.Pattern)
		r.pattern = &p
	}
	// A payload is not to have expressions compiled, and the library refuses templates that are right.
	if s.Format != nil && s.Format.Name != "regex" && s.Format.Name != "uri-template" {
		r.format, r.formatName = s.Format.Validate, s.Format.Name
	}
	r.ofString = r.minLength > 0 || r.maxLength >= 0 || r.pattern != nil || r.format != nil
	for _, l := range []struct {
		rat  interface{ FloatString(int) string }
		set  bool
		kind limitKind
	}{
		{s.Minimum, s.Minimum != nil, atLeast}, {s.ExclusiveMinimum, s.ExclusiveMinimum != nil, above},
		{s.Maximum, s.Maximum != nil, atMost}, {s.ExclusiveMaximum, s.ExclusiveMaximum != nil, below},
		{s.MultipleOf, s.MultipleOf != nil, multiple},
	} {
		if l.set {
			text := decimalText(l.rat)
			r.limits = append(r.limits, limit{kind: l.kind, value: number([]byte(text)), text: text})
		}
	}
}

// bound is a length or a count that a keyword sets, or -1.
func bound(n *int) int {
	if n == nil {
		return -1
	}
	return *n
}

// chained are the rules that a rule asks about the same value.
func (r *rule) chained() []*rule {
	out := slices.Concat(r.all, r.anyOf, r.oneOf, []*rule{r.ref, r.not, r.when, r.then, r.otherwise})
	for _, d := range r.dependents {
		out = append(out, d.rule)
	}
	return slices.DeleteFunc(out, func(r *rule) bool { return r == nil })
}

// bound refuses rules that come back to themselves without going into the payload, or stand too many behind each other.
func (b *builder) bound() error {
	const entered = -1
	depths := make(map[*rule]int, len(b.all))
	var walk func(*rule) (int, error)
	walk = func(r *rule) (int, error) {
		switch d := depths[r]; {
		case d == entered:
			return 0, &Error{Pointer: r.at, Reason: "schema.cycle",
				Description: "refers back to itself without going into the payload, so that it would never be done"}
		case d > 0:
			return d, nil
		}
		depths[r] = entered
		most := 0
		for _, sub := range r.chained() {
			d, err := walk(sub)
			if err != nil {
				return 0, err
			}
			most = max(most, d)
		}
		if most++; most > maxChain {
			return 0, &Error{Pointer: r.at, Reason: "schema.depth",
				Description: fmt.Sprintf("has more than %d schemas for one value one behind the other, through $ref, allOf and the like", maxChain)}
		}
		depths[r] = most
		return most, nil
	}
	for _, r := range b.all {
		if _, err := walk(r); err != nil {
			return err
		}
	}
	return nil
}

// ID is the $id of a schema, empty where it has none. It looks at no more.
func ID(text []byte) string {
	var d document
	if d.parse(text, maxSchemaDepth) != nil || d.nodes[0].kind != kindObject {
		return ""
	}
	for i := uint32(1); i < d.nodes[0].next; i = d.nodes[i+1].next {
		if string(d.string(i)) == "$id" && d.nodes[i+1].kind == kindString {
			return string(d.string(i + 1))
		}
	}
	return ""
}
