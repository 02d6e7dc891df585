package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"slices"

	"github.com/grapnel/grapnel/sdk/plugin"
)

type pseudonymConfig struct {
	Fields []string      `json:"fields" doc:"Fields whose values are replaced, at any depth." required:"true" minItems:"1"`
	Key    plugin.Secret `slot:"key" doc:"Shared key, any bytes." required:"true"`
}

// Pseudonym puts a pseudonym, the same for the same value, in the place of what names a person. A null is dropped.
func Pseudonym() plugin.Kind {
	return plugin.Transformer("example-pseudonym", func(c pseudonymConfig, _ plugin.Target) (plugin.TransformFunc, error) {
		return func(_ context.Context, e *plugin.Event) (*plugin.Transformed, error) {
			dec := json.NewDecoder(bytes.NewReader(e.Data))
			dec.UseNumber() // what is not replaced stays as it is
			var data any
			if err := dec.Decode(&data); err != nil || dec.More() {
				return nil, errors.New("the payload is not JSON")
			}
			if data == nil {
				return nil, plugin.Drop("the payload is null")
			}
			body, err := json.Marshal(c.hide(data))
			return &plugin.Transformed{Body: body}, err
		}, nil
	}, plugin.Doc("Pseudonyms in the place of what names a person"), plugin.Example(map[string]any{"fields": []string{"email", "phone"}}))
}

func (c pseudonymConfig) hide(value any) any {
	switch value := value.(type) {
	case []any:
		for i := range value {
			value[i] = c.hide(value[i])
		}
	case map[string]any:
		for name := range value {
			if value[name] != nil && slices.Contains(c.Fields, name) {
				value[name] = c.pseudonym(value[name])
			} else {
				value[name] = c.hide(value[name])
			}
		}
	}
	return value
}

func (c pseudonymConfig) pseudonym(value any) string {
	text, _ := json.Marshal(value) // it was read from JSON
	mac := hmac.New(sha256.New, c.Key.Values()[0])
	mac.Write(text)
	return hex.EncodeToString(mac.Sum(nil))[:32]
}
