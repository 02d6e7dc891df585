package schema_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/grapnel/grapnel/server/eventtype/schema"
)

func compile(t testing.TB, text string) *schema.Schema {
	t.Helper()
	s, err := schema.Compile([]byte(text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return s
}

func check(t testing.TB, s *schema.Schema, payload string) *schema.Mismatch {
	t.Helper()
	bad, err := s.Check(t.Context(), []byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	return bad
}

// Each payload breaks its schema in one place.
func TestFaultsPointIntoThePayload(t *testing.T) {
	for _, c := range []struct{ schema, payload, pointer, keyword, text string }{
		{`{"type":"object"}`, `[]`, "", "type", "must be an object, not an array"},
		{`{"type":["integer","null"]}`, `1.5`, "", "type", "must be null or an integer, not a number"},
		{`{"required":["id"]}`, `{"Id":1}`, "", "required", `lacks "id"`},
		{`{"properties":{"a":{"items":{"properties":{"b/c~d":{"type":"string"}}}}}}`, `{"a":[{},{"b/c~d":0}]}`, "/a/1/b~1c~0d", "type", "must be a string"},
		{`{"additionalProperties":false,"properties":{"a":true}}`, `{"a":1,"b":2}`, "/b", "additionalProperties", "does not know"},
		{`{"patternProperties":{"^x":{"minimum":3}}}`, `{"x1":2.5}`, "/x1", "minimum", "must be at least 3"},
		{`{"propertyNames":{"maxLength":2}}`, `{"abc":1}`, "/abc", "propertyNames", "name"},
		{`{"enum":["new","paid",3]}`, `"sent"`, "", "enum", `must be one of "new", "paid", 3`},
		{`{"const":{"a":[1,2.0]}}`, `{"a":[1,3]}`, "", "const", `must be {"a":[1,2.0]}`},
		{`{"minLength":3}`, `"äö"`, "", "minLength", "has 2 characters; at least 3"},
		{`{"maxLength":1}`, `"\u00e4\n"`, "", "maxLength", "has 2 characters"},
		{`{"pattern":"^ord_"}`, `"xord_"`, "", "pattern", `does not match "^ord_"`},
		{`{"format":"date-time"}`, `"yesterday"`, "", "format", "date-time"},
		{`{"exclusiveMaximum":0.1}`, `0.1000`, "", "exclusiveMaximum", "must be less than 0.1"},
		{`{"multipleOf":0.01}`, `19.995`, "", "multipleOf", "multiple of 0.01"},
		{`{"maximum":9007199254740993}`, `9007199254740994`, "", "maximum", "9007199254740993"},
		{`{"uniqueItems":true}`, `[{"a":1,"b":2},{"b":2.0,"a":1}]`, "/1", "uniqueItems", "twice"},
		{`{"contains":{"const":1},"minContains":2}`, `[1,0]`, "", "contains", "at least 2"},
		{`{"prefixItems":[true,{"type":"null"}],"items":false}`, `[1,null,2]`, "/2", "false", "not allowed"},
		{`{"$schema":"http://json-schema.org/draft-07/schema#","items":[true],"additionalItems":{"type":"string"}}`, `[1,2]`, "/1", "type", "a string"},
		{`{"dependentRequired":{"card":["address"]}}`, `{"card":1}`, "", "dependentRequired", `must have "address"`},
		{`{"not":{"type":"null"}}`, `null`, "", "not", "forbids"},
		{`{"oneOf":[{"minimum":1},{"minimum":2}]}`, `3`, "", "oneOf", "several"},
		{`{"anyOf":[{"type":"null"},{"$ref":"#/$defs/a"}],"$defs":{"a":{"type":"object","required":["x"]}}}`, `{}`, "", "required", `lacks "x"`},
		{`{"if":{"required":["a"]},"then":{"required":["b"]},"else":{"required":["c"]}}`, `{"a":1}`, "", "required", `lacks "b"`},
		{`{"allOf":[{"properties":{"a":true}}],"unevaluatedProperties":false}`, `{"a":1,"b":1}`, "/b", "unevaluatedProperties", "not known"},
		{`{"minProperties":1}`, `{}`, "", "minProperties", "at least 1"},
		{`{}`, `{"a":1,}`, "", "json", "wants a name in quotes at byte 7"},
		{`{}`, "", "", "json", "the text ends"},
		{`{}`, `{"a":01}`, "", "json", "not a number"},
		{`{}`, "\"\xff\"", "", "json", "UTF-8"},
		{`{}`, strings.Repeat("[", 200) + strings.Repeat("]", 200), "", "json", "deeper than 128"},
		// Of two with one name each has to fit.
		{`{"properties":{"a":{"type":"string"}}}`, `{"a":1,"a":"x"}`, "/a", "type", "a string"},
		// Strangers' control characters do not get through, nor names without end.
		{`{"additionalProperties":false}`, `{"\u001b[31m` + strings.Repeat("n", 1000) + `":1}`, "/\uFFFD[31m" + strings.Repeat("n", 59) + "…", "additionalProperties", ""},
	} {
		bad := check(t, compile(t, c.schema), c.payload)
		switch {
		case bad == nil:
			t.Errorf("%s allows %s", c.schema, c.payload)
		case len(bad.Faults) != 1 || bad.Faults[0].Pointer != c.pointer || bad.Faults[0].Keyword != c.keyword || !strings.Contains(bad.Faults[0].Description, c.text):
			t.Errorf("%s, %s: %+v", c.schema, c.payload, bad)
		}
	}
}

func TestPayloadsThatFit(t *testing.T) {
	if bad := check(t, compile(t, orderSchema), string(order())); bad != nil {
		t.Error(bad)
	}
	for _, c := range [][2]string{
		{`{"type":"integer","minimum":1e2}`, `100.0`},
		{`{"maximum":1}`, `-1e999999999`},
		{`{"multipleOf":1e-2}`, `4.35`},
		{`{"enum":["\u00e4",{"a":[1]}]}`, `"ä"`},
		{`{"enum":["\u00e4",{"a":[1]}]}`, `{"a":[1.0]}`},
		{`{"$ref":"#/$defs/tree","$defs":{"tree":{"properties":{"next":{"$ref":"#/$defs/tree"}},"unevaluatedProperties":false}}}`, `{"next":{"next":{}}}`},
		{`{"$schema":"http://json-schema.org/draft-07/schema#","$ref":"#/definitions/a","type":"null","definitions":{"a":{"type":"string"}}}`, `"draft-07 ignores what is beside $ref"`},
		{`{"$id":"https://example.com/a.json","properties":{"x":{"$ref":"b.json"}},"$defs":{"b":{"$id":"b.json","type":"string"}}}`, `{"x":"y"}`},
		{`{"format":"uri-template"}`, `"https://example.com/{/path}"`},
		{`true`, ` null `},
	} {
		if bad := check(t, compile(t, c[0]), c[1]); bad != nil {
			t.Errorf("%s, %s: %v", c[0], c[1], bad)
		}
	}
}

func TestSchemasThatAreRefused(t *testing.T) {
	chain := strings.Repeat(`{"allOf":[`, 31) + "true" + strings.Repeat(`]}`, 31) // 62 deep
	for _, c := range []struct{ text, pointer, reason, want string }{
		{`{"type":"text"}`, "/type", "schema.metaschema", "no JSON Schema"},
		{`{"properties":{"a":{"$ref":"https://example.com/other.json"}}}`, "", "schema.ref", `"https://example.com/other.json", which leads out of the schema, and nothing is fetched`},
		{`{"$ref":"other.json#/a"}`, "", "schema.ref", `"other.json"`},
		{`{"$ref":"file:///etc/passwd"}`, "", "schema.ref", "nothing is fetched"},
		{`{"$ref":"#/$defs/none"}`, "", "schema.ref", "which it does not have"},
		{`{"$schema":"http://json-schema.org/draft-04/schema#"}`, "/$schema", "schema.draft", "draft-04"},
		{`{"$defs":{"n":{"$dynamicAnchor":"n"}},"items":{"$dynamicRef":"#n"}}`, "/items", "schema.ref", "use $ref"},
		{`{"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"allOf":[{"$ref":"#/$defs/a"}]}},"$ref":"#/$defs/a"}`, "", "schema.cycle", "refers back to itself"},
		{`{"minimum":1e999999999}`, "/minimum", "schema.number", "exponent"},
		{`{"pattern":"` + strings.Repeat("x", 2000) + `"}`, "/pattern", "schema.metaschema", ""},
		{`{"pattern":"` + strings.Repeat("x{1000}", 100) + `"}`, "/pattern", "schema.metaschema", ""},
		{`{"pattern":"("}`, "/pattern", "schema.metaschema", ""},
		{`{"description":"` + strings.Repeat("x", schema.MaxBytes) + `"}`, "", "schema.size", "at most 262144"},
		{strings.Repeat(`{"not":`, 70) + "true" + strings.Repeat("}", 70), "", "schema.json", "deeper than 64"},
		{`{"$ref":"#/$defs/a","$defs":{"a":` + chain + `,"b":{}},"allOf":[{"$ref":"#/$defs/a"}]}`, "", "", ""},
		{`7`, "", "schema.json", "a schema is an object"},
		{`{`, "", "schema.json", "is not JSON"},
		{``, "", "schema.json", "is not JSON"},
	} {
		_, err := schema.Compile([]byte(c.text))
		wrong, ok := errors.AsType[*schema.Error](err)
		switch {
		case c.reason == "" && err != nil:
			t.Errorf("%.80s: %v", c.text, err)
		case c.reason == "":
		case !ok || wrong.Reason != c.reason || !strings.Contains(wrong.Description, c.want) || c.pointer != "" && wrong.Pointer != c.pointer:
			t.Errorf("%.80s: %#v", c.text, err)
		}
	}
	// Sixty-four rules for one value one behind the other are enough.
	var defs strings.Builder
	for i := range 70 {
		fmt.Fprintf(&defs, `"d%d":{"$ref":"#/$defs/d%d"},`, i, i+1)
	}
	_, err := schema.Compile([]byte(`{"$ref":"#/$defs/d0","$defs":{` + defs.String() + `"d70":{}}}`))
	if wrong, ok := errors.AsType[*schema.Error](err); !ok || wrong.Reason != "schema.depth" {
		t.Error(err)
	}
}

// What a hostile schema makes of a payload ends, and is a refusal: doubled references would take longer than the sun lasts.
func TestWorkIsBounded(t *testing.T) {
	var doubled strings.Builder
	doubled.WriteString(`{"$ref":"#/$defs/d0","$defs":{`)
	for i := range 28 {
		fmt.Fprintf(&doubled, `"d%d":{"allOf":[{"$ref":"#/$defs/d%d"},{"$ref":"#/$defs/d%d"}]},`, i, i+1, i+1)
	}
	doubled.WriteString(`"d28":{}}}`)
	nested := strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100)
	long := `["` + strings.Repeat("a", 1<<20) + `"]`
	many := "[" + strings.Repeat("[],", 100_000) + "{}]"
	for name, c := range map[string][2]string{
		"doubled":        {doubled.String(), `{}`},
		"in the payload": {`{"$ref":"#/$defs/a","$defs":{"a":{"allOf":[{"properties":{"a":{"$ref":"#/$defs/a"}}},{"properties":{"a":{"$ref":"#/$defs/a"}}}]}}}`, nested},
		"expression":     {`{"items":{"pattern":"(a|a)*(x{900}|y{900})$"}}`, long},
		"enum":           {`{"items":{"enum":[` + strings.Repeat(`[[]],`, 1000) + `[]]}}`, many},
	} {
		bad := check(t, compile(t, c[0]), c[1])
		if bad == nil || len(bad.Faults) != 1 || bad.Faults[0].Keyword != "work" {
			t.Errorf("%s: %.200v", name, bad)
		}
	}
	if bad := check(t, compile(t, `{"items":{"type":"string"},"uniqueItems":true}`), "["+strings.Repeat("1,", 5000)+"1]"); len(bad.Faults) != 32 || bad.More != 4970 {
		t.Errorf("%d told and %d more", len(bad.Faults), bad.More)
	}
}

// The library, which is slower, says the same of random schemas and payloads.
func TestAgreesWithTheLibrary(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	agreed, valid := 0, 0
	for range 3000 {
		text, err := json.Marshal(randomSchema(r, 3))
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		c := jsonschema.NewCompiler()
		c.AssertFormat()
		if err := c.AddResource("https://schema.invalid/", doc); err != nil {
			t.Fatal(err)
		}
		theirs, err := c.Compile("https://schema.invalid/")
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		ours := compile(t, string(text))
		for range 10 {
			payload, err := json.Marshal(randomValue(r, 3))
			if err != nil {
				t.Fatal(err)
			}
			value, err := jsonschema.UnmarshalJSON(bytes.NewReader(payload))
			if err != nil {
				t.Fatal(err)
			}
			want := theirs.Validate(value)
			got := check(t, ours, string(payload))
			if (want == nil) != (got == nil) {
				t.Fatalf("schema %s\npayload %s\ntheirs %v\nours %v", text, payload, want, got)
			}
			if agreed++; want == nil {
				valid++
			}
		}
	}
	if valid < agreed/10 || valid > agreed*9/10 {
		t.Errorf("%d of %d payloads were valid: that is no test", valid, agreed)
	}
}

func randomValue(r *rand.Rand, depth int) any {
	n := r.IntN(10)
	if depth == 0 {
		n = r.IntN(7)
	}
	switch n {
	case 0:
		return nil
	case 1:
		return r.IntN(2) == 0
	case 2, 3:
		return json.Number([]string{"0", "1", "2", "-3", "1.0", "2.5", "1e1", "100", "0.01"}[r.IntN(9)])
	case 4, 5, 6:
		return []string{"", "a", "ab", "abc", "ä", "x1", "2026-01-31"}[r.IntN(7)]
	case 7:
		out := make([]any, r.IntN(4))
		for i := range out {
			out[i] = randomValue(r, depth-1)
		}
		return out
	}
	out := map[string]any{}
	for range r.IntN(4) {
		out[[]string{"a", "b", "ab", "x1"}[r.IntN(4)]] = randomValue(r, depth-1)
	}
	return out
}

func randomSchema(r *rand.Rand, depth int) any {
	if depth == 0 || r.IntN(12) == 0 {
		return r.IntN(4) > 0
	}
	sub := func() any { return randomSchema(r, depth-1) }
	subs := func() []any {
		out := []any{sub()}
		for range r.IntN(2) {
			out = append(out, sub())
		}
		return out
	}
	out := map[string]any{}
	for range 1 + r.IntN(3) {
		switch r.IntN(26) {
		case 0, 1, 2:
			out["type"] = []string{"null", "boolean", "number", "integer", "string", "array", "object"}[r.IntN(7)]
		case 3:
			out["type"] = []any{"string", "object", "integer"}
		case 4, 5:
			out["properties"] = map[string]any{"a": sub(), "b": sub()}
		case 6:
			out["required"] = []any{"a"}
		case 7:
			out["additionalProperties"] = sub()
		case 8:
			out["patternProperties"] = map[string]any{"^a": sub()}
		case 9:
			out["items"] = sub()
		case 10:
			out["prefixItems"] = subs()
		case 11:
			out["contains"] = sub()
		case 12:
			out["minimum"] = r.IntN(3)
		case 13:
			out["multipleOf"] = json.Number([]string{"2", "0.5", "0.01"}[r.IntN(3)])
		case 14:
			out["maxLength"] = r.IntN(3)
		case 15:
			out["pattern"] = "^a"
		case 16:
			out["enum"] = []any{randomValue(r, 1), randomValue(r, 1), randomValue(r, 1)}
		case 17:
			out["allOf"] = subs()
		case 18:
			out["anyOf"] = subs()
		case 19:
			out["oneOf"] = subs()
		case 20:
			out["not"] = sub()
		case 21:
			out["if"], out["then"], out["else"] = sub(), sub(), sub()
		case 22:
			out["unevaluatedProperties"] = sub()
		case 23:
			out["unevaluatedItems"] = sub()
		case 24:
			out["dependentSchemas"] = map[string]any{"a": sub()}
		case 25:
			out["uniqueItems"] = true
		}
	}
	return out
}

func FuzzCheck(f *testing.F) {
	f.Add([]byte(orderSchema), order())
	f.Add([]byte(`{"pattern":"a+","uniqueItems":true}`), []byte(`["\ud800\udc00",1e5]`))
	f.Fuzz(func(t *testing.T, text, payload []byte) {
		s, err := schema.Compile(text)
		if err != nil {
			return
		}
		if bad := check(t, s, string(payload)); bad == nil && !json.Valid(payload) {
			t.Fatalf("%q is no JSON and allowed", payload)
		}
	})
}

func TestSamples(t *testing.T) {
	for _, c := range [][2]string{
		{orderSchema, ""},
		{`{"type":"object","properties":{"id":{"type":"string","examples":["o-1"]},"n":{"type":"integer","minimum":5}}}`, `{"id":"o-1","n":5}`},
		{`{"properties":{"a":{"const":3},"b":{"enum":["x","y"]},"c":{"default":true},"d":{"format":"date-time"}}}`,
			`{"a":3,"b":"x","c":true,"d":"2026-01-31T12:00:00Z"}`},
		{`{"allOf":[{"properties":{"a":{"type":"string"}}},{"properties":{"a":{"minLength":9},"b":{"type":"boolean"}},"required":["a"]}]}`,
			`{"a":"stringxxx","b":true}`},
		{`{"properties":{"code":{"pattern":"^[A-Z]{3}-\\d+$"},"long":{"pattern":"^x*$","minLength":5}}}`, `{"code":"AAA-1","long":"xxxxxxxx"}`},
		{`{"type":"number","exclusiveMinimum":0,"maximum":1}`, `0.5`},
		{`{"type":"integer","multipleOf":7,"minimum":8}`, `14`},
		{`{"type":"integer","maximum":-3}`, `-3`},
		{`{"type":"array","minItems":3,"uniqueItems":true,"items":{"type":"string"}}`, `["string","string 2","string 3"]`},
		{`{"anyOf":[false,{"type":"object","required":["a"]}]}`, `{"a":"string"}`},
		{`{"if":{"properties":{"k":{"const":1}}},"then":{"required":["x"]}}`, `{"k":1,"x":"string"}`},
		{`{"$ref":"#/$defs/node","$defs":{"node":{"type":"object","properties":{"name":{"type":"string"},"children":{"type":"array","items":{"$ref":"#/$defs/node"}}}}}}`,
			`{"children":[],"name":"string"}`},
		{`{"type":["null","string"]}`, `"string"`},
		{`{"minProperties":2,"additionalProperties":{"type":"integer"}}`, `{"property1":0,"property2":0}`},
	} {
		got, err := schema.Sample(t.Context(), []byte(c[0]))
		if err != nil {
			t.Errorf("%s: %v", c[0], err)
			continue
		}
		if c[1] != "" && string(got) != c[1] {
			t.Errorf("%s: %s, want %s", c[0], got, c[1])
		}
		if bad := check(t, compile(t, c[0]), string(got)); bad != nil {
			t.Errorf("%s: %s: %v", c[0], got, bad)
		}
		if again, _ := schema.Sample(t.Context(), []byte(c[0])); string(again) != string(got) {
			t.Errorf("%s: another one the second time", c[0])
		}
	}
	for _, text := range []string{
		`false`,
		`{"type":"string","pattern":"^a$","minLength":3}`,
		`{"type":"string","minLength":99999999}`,
		`{"type":"object","required":["next"],"properties":{"next":{"$ref":"#"}}}`,
		`{"type":"object","not":{"type":"object"}}`,
	} {
		if got, err := schema.Sample(t.Context(), []byte(text)); !errors.Is(err, schema.ErrNoSample) {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
}
