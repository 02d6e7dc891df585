package check

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	schemakind "github.com/santhosh-tekuri/jsonschema/v6/kind"
)

// Config looks for secrets in the wrong place, then holds a config against the kind's schema. field is what the config is
// called.
func Config(k *Kind, config any, field string) []Diagnostic {
	if ds := secretLookalikes(config, field); len(ds) > 0 {
		return ds
	}
	if k.schema == nil {
		if m, ok := config.(map[string]any); ok && len(m) == 0 {
			return nil
		}
		return []Diagnostic{{Field: field, Code: "config.unknown_field", Summary: fmt.Sprintf("plugins/%s has no settings, want an empty config", k.ID)}}
	}
	err := k.schema.Validate(config)
	var invalid *jsonschema.ValidationError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &invalid):
		return []Diagnostic{{Field: field, Code: "config.invalid", Summary: err.Error()}}
	}
	var ds []Diagnostic
	for _, leaf := range leaves(invalid) {
		ds = append(ds, shapeDiagnostics(k, leaf, config, field)...)
	}
	slices.SortStableFunc(ds, func(a, b Diagnostic) int { return cmp.Compare(a.Field, b.Field) })
	return slices.Compact(ds)
}

// secretLookalikes finds values that belong into a secret. The value is not repeated.
func secretLookalikes(v any, field string) []Diagnostic {
	switch v := v.(type) {
	case map[string]any:
		var ds []Diagnostic
		for _, k := range slices.Sorted(maps.Keys(v)) {
			ds = append(ds, secretLookalikes(v[k], field+"."+k)...)
		}
		return ds
	case []any:
		var ds []Diagnostic
		for i, e := range v {
			ds = append(ds, secretLookalikes(e, fmt.Sprintf("%s[%d]", field, i))...)
		}
		return ds
	case string:
		for _, start := range []string{"whsec_", "whsk_", "-----BEGIN"} {
			if strings.HasPrefix(strings.TrimSpace(v), start) {
				return []Diagnostic{{Field: field, Code: "config.secret_value", Summary: fmt.Sprintf(
					"the value looks like a secret (it begins with %q); store it with SecretService.CreateSecret and name it in the binding's secrets", start)}}
			}
		}
	}
	return nil
}

// leaves are the complaints at the ends of a tree of them.
func leaves(e *jsonschema.ValidationError) []*jsonschema.ValidationError {
	if len(e.Causes) == 0 {
		return []*jsonschema.ValidationError{e}
	}
	var out []*jsonschema.ValidationError
	for _, c := range e.Causes {
		out = append(out, leaves(c)...)
	}
	return out
}

// shapeDiagnostics says in words what one complaint means: field, given, right.
func shapeDiagnostics(k *Kind, e *jsonschema.ValidationError, config any, field string) []Diagnostic {
	at := joinPath(field, e.InstanceLocation)
	given := shown(valueAt(config, e.InstanceLocation))
	one := func(code, format string, args ...any) []Diagnostic {
		return []Diagnostic{{Field: at, Code: code, Summary: fmt.Sprintf(format, args...)}}
	}
	switch why := e.ErrorKind.(type) {
	case *schemakind.AdditionalProperties:
		known := propertiesAt(k, e.InstanceLocation)
		var ds []Diagnostic
		for _, name := range why.Properties {
			ds = append(ds, Diagnostic{Field: at + "." + name, Code: "config.unknown_field", Summary: fmt.Sprintf(
				"plugins/%s has no setting %q here; it has %s", k.ID, name, cmp.Or(strings.Join(known, ", "), "none"))})
		}
		return ds
	case *schemakind.Required:
		var ds []Diagnostic
		for _, name := range why.Missing {
			ds = append(ds, Diagnostic{Field: at + "." + name, Code: "config.missing", Summary: fmt.Sprintf(
				"plugins/%s needs the setting %q", k.ID, name)})
		}
		return ds
	case *schemakind.Type:
		return one("config.type", "given %s, want %s", given, strings.Join(why.Want, " or "))
	case *schemakind.Enum:
		want := make([]string, len(why.Want))
		for i, v := range why.Want {
			want[i] = shown(v)
		}
		return one("config.enum", "given %s, want one of %s", given, strings.Join(want, ", "))
	case *schemakind.Minimum:
		return one("config.range", "given %s, want at least %s", given, why.Want.RatString())
	case *schemakind.Maximum:
		return one("config.range", "given %s, want at most %s", given, why.Want.RatString())
	case *schemakind.Pattern:
		if strings.Contains(why.Want, "(ns|us|µs|ms|s|m|h)") {
			return one("config.pattern", "given %s, want a duration such as \"1m30s\"", given)
		}
		return one("config.pattern", "given %s, want a match of %s", given, why.Want)
	}
	// The library's text is in its error, after the place.
	text := e.Error()
	if i := strings.LastIndex(text, "': "); i >= 0 {
		text = text[i+3:]
	}
	return one("config.invalid", "given %s: %s", given, strings.TrimSpace(text))
}

// propertiesAt are the settings that the kind's schema knows at a place; nil where that is hard to say.
func propertiesAt(k *Kind, at []string) []string {
	var node map[string]any
	if json.Unmarshal([]byte(k.Proto.GetConfigSchema()), &node) != nil {
		return nil
	}
	for _, segment := range at {
		properties, _ := node["properties"].(map[string]any)
		next, ok := properties[segment].(map[string]any)
		if !ok {
			if next, ok = node["items"].(map[string]any); !ok {
				return nil
			}
		}
		node = next
	}
	properties, _ := node["properties"].(map[string]any)
	return slices.Sorted(maps.Keys(properties))
}

func valueAt(v any, at []string) any {
	for _, segment := range at {
		switch in := v.(type) {
		case map[string]any:
			v = in[segment]
		case []any:
			var i int
			if _, err := fmt.Sscan(segment, &i); err != nil || i < 0 || i >= len(in) {
				return nil
			}
			v = in[i]
		}
	}
	return v
}

// shown is a value as JSON, cut short.
func shown(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return "a value"
	}
	if len(b) > 60 {
		return string(b[:60]) + "…"
	}
	return string(b)
}
