package celplugin

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	maxDeep = 1000
	// maxText is the most JSON that is written of a result; a body may be one text in it, with escapes.
	maxText = 2 * plugin.MaxTransformed
)

// appendJSON writes a value as JSON: integers exactly, whatever their size, maps in the order of their keys, bytes in base64,
// timestamps and durations as protobuf does.
func appendJSON(b []byte, v ref.Val, deep int) ([]byte, error) {
	switch {
	case deep > maxDeep:
		return nil, errDeep
	case len(b) > maxText:
		return nil, script.TooLarge(len(b))
	}
	switch v := v.(type) {
	case traits.Mapper:
		return appendMap(b, v, deep)
	case traits.Lister:
		b = append(b, '[')
		for it := v.Iterator(); it.HasNext() == types.True; {
			var err error
			if b, err = appendJSON(b, it.Next(), deep+1); err != nil {
				return nil, err
			}
			b = append(b, ',')
		}
		return shut(b, '[', ']'), nil
	case types.Timestamp, types.Duration:
		text, ok := v.ConvertToType(types.StringType).(types.String)
		if !ok {
			return nil, fmt.Errorf("a %s cannot be written as JSON", v.Type().TypeName())
		}
		return appendValue(b, string(text))
	case types.Null:
		return append(b, "null"...), nil
	case types.Bool, types.Int, types.Uint, types.Double, types.String, types.Bytes:
		return appendValue(b, v.Value())
	case *types.Err:
		return nil, v
	}
	return nil, fmt.Errorf("a %s cannot be written as JSON; want maps, lists, texts, numbers, booleans and null", v.Type().TypeName())
}

func appendMap(b []byte, m traits.Mapper, deep int) ([]byte, error) {
	type member struct {
		name string
		key  ref.Val
	}
	var members []member
	for it := m.Iterator(); it.HasNext() == types.True; {
		key := it.Next()
		name, ok := key.ConvertToType(types.StringType).(types.String)
		if !ok {
			return nil, fmt.Errorf("a key that is a %s cannot be written as JSON", key.Type().TypeName())
		}
		members = append(members, member{string(name), key})
	}
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.name, b.name) })
	b = append(b, '{')
	for i, k := range members {
		if i > 0 && members[i-1].name == k.name {
			return nil, fmt.Errorf("a map has two keys that are %.100q in JSON", k.name)
		}
		var err error
		if b, err = appendValue(b, k.name); err != nil {
			return nil, err
		}
		if b, err = appendJSON(append(b, ':'), m.Get(k.key), deep+1); err != nil {
			return nil, err
		}
		b = append(b, ',')
	}
	return shut(b, '{', '}'), nil
}

// shut puts the end in place of the last comma.
func shut(b []byte, begin, end byte) []byte {
	if b[len(b)-1] == begin {
		return append(b, end)
	}
	b[len(b)-1] = end
	return b
}

func appendValue(b []byte, v any) ([]byte, error) {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false) // six bytes for each <
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("write the result as JSON: %w", err)
	}
	return append(b, bytes.TrimSuffix(text.Bytes(), []byte{'\n'})...), nil
}
