package schema

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"regexp"
	"regexp/syntax"
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
	c.UseRegexpEngine(compilePattern)
	if err := c.AddResource(base, doc); err != nil {
		return nil, "", describe(err)
	}
	if s, err = c.Compile(base); err != nil {
		return nil, "", describe(err)
	}
	if object, ok := doc.(map[string]any); ok {
		id, _ = object["$id"].(string)
	}
	return s, id, nil
}

// precheck refuses what the library should not see: it recurses as deep as a text is nested, and writes a number's
// exponent out.
func precheck(text []byte) error {
	var d document
	if err := d.parse(text, maxSchemaDepth); err != nil {
		return &Error{Description: "is not JSON: " + err.Error(), Reason: "schema.json"}
	}
	if k := d.nodes[0].kind; k != kindObject && k != kindBoolean {
		return &Error{Description: "is " + k.String() + "; a schema is an object, or true or false", Reason: "schema.json"}
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
	// weight is about how many steps one byte of text takes.
	weight int
}

// compilePattern bounds expressions. Go's take time in proportion to the text (RE2), times the size of the program.
func compilePattern(text string) (jsonschema.Regexp, error) {
	if len(text) > maxPattern {
		return nil, fmt.Errorf("a pattern of %d bytes; at most %d are allowed", len(text), maxPattern)
	}
	parsed, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return nil, err
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		return nil, err
	}
	if n := len(program.Inst); n > maxProgram {
		return nil, fmt.Errorf("a pattern that takes %d steps for each character; at most %d are allowed", n, maxProgram)
	}
	re, err := regexp.Compile(text)
	if err != nil {
		return nil, err
	}
	return compiledPattern{re, 1 + len(program.Inst)/8}, nil
}

// pattern takes an expression over from the library.
func (b *builder) pattern(p jsonschema.Regexp) pattern {
	c, ok := p.(compiledPattern)
	if !ok { // the library compiles with nothing else
		return pattern{Regexp: regexp.MustCompile(regexp.QuoteMeta(p.String())), text: p.String(), weight: 1}
	}
	b.size += 16 * (len(p.String()) + 8*c.weight)
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
