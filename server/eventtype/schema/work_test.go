package schema_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/server/eventtype/schema"
)

func repeated(n int, item string) string { return strings.TrimSuffix(strings.Repeat(item+",", n), ",") }

func numbered(n int, format string) string {
	items := make([]string, n)
	for i := range items {
		items[i] = strings.ReplaceAll(format, "@", fmt.Sprint(i))
	}
	return strings.Join(items, ",")
}

// Whatever is read takes steps for its length, each time: a rule costs no less because its text is long.
func TestLongTextsAreWork(t *testing.T) {
	escaped := `"` + strings.Repeat("x", 64<<10) + `\n"`
	for name, c := range map[string][2]string{
		"maxLength":  {`{"allOf":[` + repeated(4000, `{"maxLength":99999999}`) + `]}`, escaped},
		"const":      {`{"allOf":[` + repeated(2000, `{"not":{"const":"a"}}`) + `]}`, escaped},
		"name":       {`{"allOf":[` + repeated(2000, `{"propertyNames":true}`) + `]}`, `{` + escaped + `:1}`},
		"number":     {`{"allOf":[` + repeated(4000, `{"minimum":1}`) + `]}`, strings.Repeat("9", 64<<10)},
		"integer":    {`{"allOf":[` + repeated(4000, `{"type":"integer"}`) + `]}`, strings.Repeat("9", 64<<10)},
		"division":   {`{"items":{"allOf":[` + repeated(50, `{"multipleOf":3e-390}`) + `]}}`, `[` + repeated(5000, `3e399`) + `]`},
		"expression": {`{"pattern":"(a?){490}b"}`, `"` + strings.Repeat("a", 32<<10) + `"`},
		"dependents": {`{"items":{"dependentRequired":{` + numbered(4000, `"@":[]`) + `}}}`, `[` + repeated(20_000, `{}`) + `]`},
	} {
		bad := check(t, compile(t, c[0]), c[1])
		if bad == nil || bad.Faults[0].Keyword != "work" {
			t.Errorf("%s: %.200v", name, bad)
		}
	}
}

// What a payload lacks is told and counted as far as the steps go, which is not for each of 5000 names of each of 20,000
// values.
func TestTellingIsBounded(t *testing.T) {
	s := compile(t, `{"items":{"required":[`+numbered(5000, `"@"`)+`]}}`)
	bad := check(t, s, `[`+repeated(20_000, `{}`)+`]`)
	if bad == nil || len(bad.Faults) != 32 || bad.Faults[0].Description != `lacks "0"` || bad.More < 4000 || bad.More > 2_000_000 {
		t.Errorf("%.200v", bad)
	}
}

// Ordinary numbers and strings, many of them, are no work.
func TestOrdinaryPayloadsAreLittleWork(t *testing.T) {
	for schema, payload := range map[string]string{
		`{"items":{"multipleOf":0.01}}`:                                                                     `[` + repeated(5000, `19.99`) + `]`,
		`{"items":{"format":"date-time","pattern":"^[0-9]{4}-[0-9]{2}-[0-9]{2}T"}}`:                         `[` + repeated(5000, `"2026-01-31T12:00:00Z"`) + `]`,
		`{"items":{"pattern":"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"}}`:            `[` + repeated(5000, `"123e4567-e89b-42d3-a456-426614174000"`) + `]`,
		`{"items":{"type":"string","minLength":1,"maxLength":100}}`:                                         `[` + repeated(5000, `"ä\n"`) + `]`,
		`{"items":{"required":["id"],"properties":{"id":{"type":"integer"}},"additionalProperties":false}}`: `[` + repeated(5000, `{"id":1}`) + `]`,
	} {
		if bad := check(t, compile(t, schema), payload); bad != nil {
			t.Errorf("%s: %.200v", schema, bad)
		}
	}
}

func TestDivisions(t *testing.T) {
	for _, c := range []struct {
		multiple, number string
		fits             bool
	}{
		{"0.01", "19.99", true}, {"0.01", "19.995", false}, {"0.01", "-4.35", true}, {"0.01", "0.00", true}, {"0.01", "0e9", true}, {"3", "1e2", false},
		{"3", "12e1", true}, {"0.3", "0.9", true}, {"0.3", "1", false}, {"1e-300", "1e300", true}, {"7", "700000000000000000000", true},
		{"7", "700000000000000000001", false}, {"1.5", "-3", true}, {"100", "1e2", true}, {"100", "150", false}, {"2e18", "1e18", false}, {"5e-17", "1e1", true},
	} {
		if bad := check(t, compile(t, `{"multipleOf":`+c.multiple+`}`), c.number); (bad == nil) != c.fits {
			t.Errorf("%s by %s: %v", c.number, c.multiple, bad)
		}
	}
}

// A check and a sample end with their caller.
func TestNobodyWaits(t *testing.T) {
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if bad, err := compile(t, `{"items":{"type":"integer"}}`).Check(ctx, []byte(`[`+repeated(20_000, `1`)+`]`)); !errors.Is(err, gone) || bad != nil {
		t.Errorf("%v, %v", bad, err)
	}
	if got, err := schema.Sample(ctx, []byte(orderSchema)); !errors.Is(err, gone) {
		t.Errorf("%s, %v", got, err)
	}
}

// What would take samples too long is no sample.
func TestSamplesAreBounded(t *testing.T) {
	for name, text := range map[string]string{
		"nothing repeated": `{"type":"string","minLength":1,"pattern":"((((^)*)*)*)*"}`,
		"names": `{"$defs":{"a":{"type":"object","minProperties":5000,"required":["A"],"properties":{"A":false},"patternProperties":{` +
			numbered(200, `"q@$":true`) + `}}},"properties":{` + numbered(100, `"p@":{"allOf":[{"$ref":"#/$defs/a"}]}`) + `},"required":["p1"]}`,
		"large values": `{"$defs":{"a":{"const":"` + strings.Repeat("x", 100<<10) + `"}},"type":"array","minItems":4000,"items":{"$ref":"#/$defs/a"}}`,
		"elements":     `{"type":"array","minItems":2147483647,"items":{"type":"string"}}`,
	} {
		if got, err := schema.Sample(t.Context(), []byte(text)); !errors.Is(err, schema.ErrNoSample) {
			t.Errorf("%s: %.100s, %v", name, got, err)
		}
	}
	// What need not be there is left out where there is no room for it.
	got, err := schema.Sample(t.Context(), []byte(`{"properties":{"a":{"const":"`+strings.Repeat("x", 100<<10)+`"},"b":{"const":1}}}`))
	if string(got) != `{"b":1}` || err != nil {
		t.Errorf("%.100s, %v", got, err)
	}
}
