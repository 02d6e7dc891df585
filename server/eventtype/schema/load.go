package schema

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// base is what references without a $id are relative to.
const base = "https://schema.invalid/"

// outside refuses what a schema would have fetched.
type outside struct{}

var errOutside = errors.New("it leads out of the schema, and nothing is fetched")

// Load refuses.
func (outside) Load(string) (any, error) { return nil, errOutside }

// load reads and compiles a schema with the library, and returns its $id beside it. Its error is an *Error.
func load(text []byte) (s *jsonschema.Schema, id string, err error) {
	if len(text) > MaxBytes {
		return nil, "", &Error{Description: fmt.Sprintf("has %d bytes; at most %d are allowed", len(text), MaxBytes), Reason: "schema.size"}
	}
	if err := precheck(text); err != nil {
		return nil, "", err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		return nil, "", &Error{Description: "is not JSON: " + err.Error(), Reason: "schema.json"}
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	c.UseLoader(outside{})
	x := &expressions{made: make(map[string]expression)}
	c.UseRegexpEngine(x.compile)
	clamp(doc, false)
	if err = c.AddResource(base, doc); err == nil {
		s, err = c.Compile(base)
	}
	if err != nil {
		wrong := describe(err)
		if x.refused != nil { // behind a long pattern nobody would see it
			wrong.Description = "is no JSON Schema: " + x.refused.Error()
		}
		return nil, "", wrong
	}
	if object, ok := doc.(map[string]any); ok {
		id, _ = object["$id"].(string)
	}
	return s, id, nil
}

// precheck refuses what the library should not see: it recurses as deep as a text is nested, writes a number's exponent out,
// gives each subschema a pointer text of its own, and looks for each in a list of all.
func precheck(text []byte) error {
	var d document
	if err := d.parse(text, maxSchemaDepth); err != nil {
		return &Error{Description: "is not JSON: " + err.Error(), Reason: "schema.json"}
	}
	if k := d.nodes[0].kind; k != kindObject && k != kindBoolean {
		return &Error{Description: "is " + k.String() + "; a schema is an object, or true or false", Reason: "schema.json"}
	}
	if err := d.bounded(); err != nil {
		return err
	}
	for i := range d.nodes {
		if d.nodes[i].kind != kindNumber {
			continue
		}
		if n := number(d.raw(uint32(i))); len(n.digits) > 40 || n.exponent > 400 || n.exponent < -400 {
			return &Error{Pointer: d.pointer(uint32(i)), Reason: "schema.number",
				Description: "is a number of more than 40 digits, or with an exponent beyond 400"}
		}
	}
	if d.nodes[0].kind == kindBoolean {
		return nil
	}
	for i := uint32(1); i < d.nodes[0].next; i = d.nodes[i+1].next {
		if string(d.string(i)) != "$schema" {
			continue
		}
		switch draft := strings.TrimSuffix(string(d.string(i+1)), "#"); draft {
		case "https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema", "https://json-schema.org/draft-07/schema":
		default:
			return &Error{Pointer: "/$schema", Reason: "schema.draft", Description: "is " + quote(draft) +
				"; want https://json-schema.org/draft/2020-12/schema or http://json-schema.org/draft-07/schema"}
		}
	}
	return nil
}

// bounded refuses a schema that takes far more to compile than to read.
func (d *document) bounded() error {
	tooMuch := func(i uint32, format string, args ...any) error {
		return &Error{Pointer: cut(d.pointer(i), 100), Description: fmt.Sprintf(format, args...), Reason: "schema.size"}
	}
	values, schemas, pointers := 0, 0, 0
	var walk func(i uint32, pointer int) error
	walk = func(i uint32, pointer int) error {
		n := &d.nodes[i]
		if values++; values > maxValues {
			return tooMuch(0, "has more than %d values, those of objects and arrays counted", maxValues)
		}
		if n.kind == kindObject || n.kind == kindBoolean {
			schemas++
			pointers += pointer
		}
		switch {
		case schemas > maxSchemas:
			return tooMuch(0, "has more than %d objects and booleans", maxSchemas)
		case pointers > maxPointers:
			return tooMuch(i, "has names too long for so many schemas below them: the pointers to all take more than %d bytes", maxPointers)
		}
		for at := i + 1; at < n.next; at = d.nodes[at].next {
			length := pointer + 5 // an index
			if n.kind == kindObject {
				name := d.string(at)
				if len(name) > maxName {
					return tooMuch(at, "is a name of %d bytes; at most %d are allowed", len(name), maxName)
				}
				length = pointer + 1 + len(name)
				at++
			}
			if err := walk(at, length); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk(0, 0); err != nil {
		return err
	}
	return d.references()
}

// references bounds $ref to places where the library expects no schema, which has it look through the whole schema once
// more and check what is there anew, and what has an $id, each of which it compares with all others.
func (d *document) references() error {
	named, draft7 := 0, false
	var refs []string
	for i := range uint32(len(d.nodes)) { //nolint:gosec // as in add
		if d.nodes[i].kind != kindObject {
			continue
		}
		for key := i + 1; key < d.nodes[i].next; key = d.nodes[key+1].next {
			if d.nodes[key+1].kind != kindString {
				continue
			}
			switch value := string(d.string(key + 1)); string(d.string(key)) {
			case "$id", "id", "$anchor", "$dynamicAnchor":
				if i > 0 {
					named++
				}
			case "$schema":
				draft7 = draft7 || strings.Contains(value, "draft-07")
			case "$ref":
				refs = append(refs, value)
			}
		}
	}
	if named > maxNamed {
		return &Error{Description: fmt.Sprintf("has more than %d names by $id and $anchor", maxNamed), Reason: "schema.size"}
	}
	slices.Sort(refs)
	elsewhere := 0
	for _, ref := range slices.Compact(refs) {
		if ordinary(ref, draft7) {
			continue
		}
		size := len(d.text) // of what is below an $id, say
		if named == 0 {
			size = d.size(ref)
		}
		if elsewhere += 1024 + size; elsewhere > maxElsewhere {
			return &Error{Description: "has too many $ref to schemas that are not right below its " + place(draft7) + ": put them there", Reason: "schema.size"}
		}
	}
	return nil
}

// place is where schemas are that are referred to.
func place(draft7 bool) string {
	if draft7 {
		return "definitions"
	}
	return "$defs"
}

// ordinary reports whether a reference goes to the root, an $id, an $anchor, or right below such a place.
func ordinary(ref string, draft7 bool) bool {
	_, to, _ := strings.Cut(ref, "#")
	for _, p := range []string{"definitions", place(draft7)} {
		if name, ok := strings.CutPrefix(to, "/"+p+"/"); ok {
			return !strings.Contains(name, "/")
		}
	}
	return !strings.ContainsAny(to, "/%")
}

// size is how long the text of what a reference is to is: the whole, where that is not a pointer from the root.
func (d *document) size(ref string) int {
	pointer, ok := strings.CutPrefix(ref, "#")
	pointer, err := url.PathUnescape(pointer)
	at := uint32(0)
	for ok && err == nil && pointer != "" {
		var token string
		token, pointer, _ = strings.Cut(pointer[1:], "/")
		if pointer != "" {
			pointer = "/" + pointer
		}
		next := uint32(0)
		switch token = strings.NewReplacer("~1", "/", "~0", "~").Replace(token); d.nodes[at].kind {
		case kindObject:
			for key := at + 1; key < d.nodes[at].next; key = d.nodes[key+1].next {
				if string(d.string(key)) == token {
					next = key + 1
				}
			}
		case kindArray:
			k, err := strconv.Atoi(token)
			for e := at + 1; e < d.nodes[at].next && err == nil; e, k = d.nodes[e].next, k-1 {
				if k == 0 {
					next = e
				}
			}
		}
		if at = next; at == 0 {
			break
		}
	}
	return int(d.nodes[at].to - d.nodes[at].from)
}

// farBound stands for every length and count beyond it: no payload comes near.
const farBound = "2147483647"

// clamp makes lengths and counts that do not fit the library's int the longest: it takes their last bits. names says that
// what v has are schemas by names of their own.
func clamp(v any, names bool) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			clamp(e, false)
		}
	case map[string]any:
		for name, sub := range v {
			if names {
				clamp(sub, false)
				continue
			}
			switch name {
			case "const", "enum", "default", "examples":
			case "properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies":
				clamp(sub, true)
			case "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains":
				text, ok := sub.(json.Number)
				if !ok {
					continue
				}
				if n := number([]byte(text)); !n.negative && n.exponent > len(farBound) && n.integer() {
					v[name] = json.Number(farBound)
				}
			default:
				clamp(sub, false)
			}
		}
	}
}

// quote shows a bounded part of what was given.
func quote(s string) string {
	if len(s) > 80 {
		s = strings.ToValidUTF8(s[:80], "") + "…"
	}
	return fmt.Sprintf("%q", s)
}

// quoted is what quote shows, of which a text is made only where somebody reads it.
type quoted string

func (q quoted) String() string { return quote(string(q)) }

// compiledPattern is a regular expression and what a match of it costs.
type compiledPattern struct {
	*regexp.Regexp
	// weight is about how many steps one byte of text takes, times four.
	weight int
	// size is about how many bytes of memory it takes.
	size int
}

// expressions are those of one schema, each compiled once.
type expressions struct {
	made map[string]expression
	// size is that of all their programs.
	size int
	// refused is why the first was that is no fault of its syntax.
	refused error
}

type expression struct {
	pattern compiledPattern
	err     error
}

// compile is for the library, which asks twice for each.
func (x *expressions) compile(text string) (jsonschema.Regexp, error) {
	e, ok := x.made[text]
	if !ok {
		e.pattern, e.err = x.first(text)
		x.made[text] = e
		if _, wrong := errors.AsType[*syntax.Error](e.err); e.err != nil && !wrong && x.refused == nil {
			x.refused = e.err
		}
	}
	if e.err != nil {
		return nil, e.err
	}
	return e.pattern, nil
}

// first bounds expressions. Go's take time in proportion to the text (RE2), times the size of the program.
func (x *expressions) first(text string) (none compiledPattern, err error) {
	if len(text) > maxPattern {
		return none, fmt.Errorf("a pattern of %d bytes; at most %d are allowed", len(text), maxPattern)
	}
	parsed, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return none, err
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		return none, err
	}
	n := len(program.Inst)
	if n > maxProgram {
		return none, fmt.Errorf("a pattern that takes %d steps for each character; at most %d are allowed", n, maxProgram)
	}
	size := 512 + 2*len(text) + instBytes*n
	for i := range program.Inst {
		size += runeBytes * len(program.Inst[i].Rune)
	}
	if program.StartCond()&syntax.EmptyBeginText != 0 { // another program, where it can be matched in one pass
		size *= 3
	}
	if x.size += size; x.size > maxPrograms {
		return none, fmt.Errorf("the patterns of the schema take more than %d bytes of memory together", maxPrograms)
	}
	re, err := regexp.Compile(text)
	if err != nil {
		return none, err
	}
	// In a long one many places may be looked at for each character.
	return compiledPattern{re, 1 + n/8 + n*n/1024, size}, nil
}

// pattern takes an expression over from the library. Equal ones are one.
func (b *builder) pattern(p jsonschema.Regexp) pattern {
	c, ok := p.(compiledPattern)
	if !ok { // the library compiles with nothing else
		return pattern{Regexp: regexp.MustCompile(regexp.QuoteMeta(p.String())), text: p.String(), weight: 1}
	}
	if !b.counted[c.Regexp] {
		b.counted[c.Regexp] = true
		b.size += c.size
	}
	return pattern{Regexp: c.Regexp, text: p.String(), weight: c.weight}
}

// decimalText is a fraction that was read from a decimal, as one.
func decimalText(rat interface{ FloatString(int) string }) string {
	r, ok := rat.(*big.Rat)
	if !ok {
		return "0"
	}
	digits, _ := r.FloatPrec()
	return r.FloatString(digits)
}

// fragment is the JSON Pointer in a location.
func fragment(location string) string {
	_, pointer, _ := strings.Cut(location, "#")
	if text, err := url.PathUnescape(pointer); err == nil {
		return text
	}
	return pointer
}

// describe turns what the library says into words about the schema.
func describe(err error) *Error {
	if bad, ok := errors.AsType[*jsonschema.SchemaValidationError](err); ok {
		if invalid, ok := errors.AsType[*jsonschema.ValidationError](bad.Err); ok {
			leaf := deepest(invalid)
			_, text, _ := strings.Cut(leaf.Error(), "': ") // behind where it is
			return &Error{
				Pointer:     fragment(bad.URL) + pointerOf(leaf.InstanceLocation),
				Description: "is no JSON Schema: " + cut(text, 300),
				Reason:      "schema.metaschema",
			}
		}
	}
	if bad, ok := errors.AsType[*jsonschema.LoadURLError](err); ok {
		return &Error{Description: "refers to " + quote(strings.TrimPrefix(bad.URL, base)) +
			", which leads out of the schema, and nothing is fetched: put it into $defs", Reason: "schema.ref"}
	}
	if bad, ok := errors.AsType[*jsonschema.JSONPointerNotFoundError](err); ok {
		return &Error{Description: "refers to " + quote(strings.TrimPrefix(bad.URL, base)) + ", which it does not have", Reason: "schema.ref"}
	}
	if bad, ok := errors.AsType[*jsonschema.AnchorNotFoundError](err); ok {
		return &Error{Description: "refers to " + quote(strings.TrimPrefix(bad.Reference, base)) + ", which it does not have", Reason: "schema.ref"}
	}
	return &Error{Description: "cannot be compiled: " + cut(strings.ReplaceAll(err.Error(), base, ""), 300), Reason: "schema"}
}

// deepest is the first of the faults that have no further cause.
func deepest(e *jsonschema.ValidationError) *jsonschema.ValidationError {
	for len(e.Causes) > 0 {
		e = e.Causes[0]
	}
	return e
}

func pointerOf(tokens []string) string {
	var b strings.Builder
	for _, t := range tokens {
		b.WriteByte('/')
		writeToken(&b, []byte(t))
	}
	return b.String()
}

func cut(s string, most int) string {
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
