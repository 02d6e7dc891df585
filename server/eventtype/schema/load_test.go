package schema_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/server/eventtype/schema"
)

// A schema that takes far more to compile, or to keep, than to read is refused before.
func TestCompilingIsBounded(t *testing.T) {
	long := strings.Repeat("n", 1000)
	for name, c := range map[string][2]string{
		"long name":      {`{"properties":{"` + strings.Repeat("n", 1025) + `":true}}`, "a name of 1025 bytes"},
		"long pointers":  {`{"properties":{"` + long + `":{"allOf":[` + repeated(1100, `true`) + `]}}}`, "names too long"},
		"many schemas":   {`{"allOf":[` + repeated(5001, `{}`) + `]}`, "5000 objects"},
		"many values":    {`{"enum":[[` + repeated(60_000, `0`) + `]]}`, "50000 values"},
		"many ids":       {`{"$defs":{` + numbered(1000, `"a@":{"$id":"i@","$anchor":"x"}`) + `}}`, "500 names"},
		"odd references": {`{"x":{` + numbered(600, `"a@":{}`) + `},"allOf":[` + numbered(600, `{"$ref":"#/x/a@"}`) + `]}`, "$defs"},
		"one inside the other": {`{"x":` + strings.Repeat(`{"a":`, 40) + `{"enum":[` + repeated(20_000, `0`) + `]}` + strings.Repeat("}", 40) +
			`,"allOf":[{"$ref":"#/x"},{"$ref":"#/x/a"},` + func() string {
			var b strings.Builder
			for i := range 30 {
				b.WriteString(`{"$ref":"#/x` + strings.Repeat("/a", i+2) + `"},`)
			}
			return b.String()
		}() + `true]}`, "$defs"},
	} {
		_, err := schema.Compile([]byte(c[0]))
		if wrong, ok := errors.AsType[*schema.Error](err); !ok || wrong.Reason != "schema.size" || !strings.Contains(wrong.Description, c[1]) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, text := range map[string]string{
		"programs": `{"allOf":[` + numbered(1000, `{"pattern":"@x{990}"}`) + `]}`,
		"classes":  `{"allOf":[` + numbered(20, `{"pattern":"@`+strings.Repeat(`\\pL`, 200)+`"}`) + `]}`,
	} {
		_, err := schema.Compile([]byte(text))
		if err == nil || !strings.Contains(err.Error(), "bytes of memory together") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What is ordinary is not refused, however much there is of it.
	for name, text := range map[string]string{
		"definitions": `{"$defs":{` + numbered(1000, `"a@":{"type":"string"}`) + `},"properties":{` + numbered(1000, `"p@":{"$ref":"#/$defs/a@"}`) + `}}`,
		"enum":        `{"enum":[` + numbered(20_000, `"c@"`) + `]}`,
		"expressions": `{"properties":{` + numbered(100, `"p@":{"pattern":"^[a-z]{2,8}-@$"}`) + `}}`,
		"equal ones":  `{"properties":{` + numbered(1000, `"p@":{"pattern":"^(\\p{L}|[0-9]){1,40}$"}`) + `}}`,
		"bundle":      `{"$id":"https://example.com/all","$defs":{` + numbered(100, `"a@":{"$id":"a@","type":"string"}`) + `},"properties":{` + numbered(100, `"p@":{"$ref":"a@"}`) + `}}`,
		"components":  `{"components":{"schemas":{` + numbered(50, `"a@":{"type":"string"}`) + `}},"properties":{` + numbered(50, `"p@":{"$ref":"#/components/schemas/a@"}`) + `}}`,
	} {
		if _, err := schema.Compile([]byte(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Size counts what a stranger chooses the size of.
func TestSizes(t *testing.T) {
	small := compile(t, `{"pattern":"a"}`).Size()
	for name, c := range map[string]struct {
		text string
		most int
	}{
		"program": {`{"pattern":"x{990}"}`, 990 * 40},
		"class":   {`{"pattern":"\\pL\\pL\\pL\\pL\\pL\\pL\\pL\\pL"}`, 8 * 1000 * 4},
		"enum":    {`{"enum":[[` + repeated(10_000, `0`) + `]]}`, 10_000 * 24},
	} {
		if got := compile(t, c.text).Size() - small; got < c.most {
			t.Errorf("%s: %d bytes, want %d", name, got, c.most)
		}
	}
	one, many := compile(t, `{"allOf":[{"pattern":"x{900}"}]}`).Size(), compile(t, `{"allOf":[`+repeated(10, `{"pattern":"x{900}"}`)+`]}`).Size()
	if many > one+10*1000 {
		t.Errorf("ten equal expressions take %d bytes, and one %d", many, one)
	}
}

// A bound that does not fit an int is no other bound: generators write the largest number of their language.
func TestBoundsBeyondAnInt(t *testing.T) {
	for _, c := range []struct {
		schema, payload string
		fits            bool
	}{
		{`{"maxLength":1e300}`, `"a"`, true},
		{`{"maxLength":9223372036854775807}`, `"a"`, true},
		{`{"minLength":1e300}`, `""`, false},
		{`{"maxItems":18446744073709551616}`, `[1]`, true},
		{`{"maxItems":9223372036854775808}`, `[1]`, true},
		{`{"maxProperties":1.8446744073709552e19}`, `{"a":1}`, true},
		{`{"minItems":18446744073709551616}`, `[]`, false},
		{`{"minProperties":36893488147419103232}`, `{}`, false},
		{`{"contains":true,"maxContains":1e30}`, `[1]`, true},
		{`{"properties":{"default":{"maxLength":1e300}}}`, `{"default":"a"}`, true},
		{`{"properties":{"maxLength":{"maxLength":0}}}`, `{"maxLength":"a"}`, false},
		{`{"const":{"maxLength":1e300}}`, `{"maxLength":1e300}`, true},
		{`{"const":{"maxLength":1e300}}`, `{"maxLength":2147483647}`, false},
	} {
		if bad := check(t, compile(t, c.schema), c.payload); (bad == nil) != c.fits {
			t.Errorf("%s of %s: %v, want fits %v", c.payload, c.schema, bad, c.fits)
		}
	}
	if _, err := schema.Compile([]byte(`{"maxLength":-1e300}`)); err == nil {
		t.Error("a length below zero is taken")
	}
}
