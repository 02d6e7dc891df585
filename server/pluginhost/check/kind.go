package check

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Kind is one signer or transport, as its plugin has described it. It is immutable.
type Kind struct {
	ID     string
	Proto  *pluginv1.Kind
	schema *jsonschema.Schema // nil when the kind has no settings
}

// Signer reports whether it is one; otherwise it is a transport.
func (k *Kind) Signer() bool { return k.Proto.GetSigner() != nil }

// Emits are the headers that it sets, lower case; none of a nil Kind.
func (k *Kind) Emits() []string {
	switch {
	case k == nil:
		return nil
	case k.Signer():
		return k.Proto.GetSigner().GetEmitsHeaders()
	}
	return k.Proto.GetTransport().GetMayAddHeaders()
}

// NewKind takes a description, or says what is wrong with it.
func NewKind(pk *pluginv1.Kind) (*Kind, error) {
	k := &Kind{ID: pk.GetId(), Proto: pk}
	if !regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`).MatchString(k.ID) {
		return nil, fmt.Errorf("kind %q: the id must match ^[a-z][a-z0-9-]{0,62}$", k.ID)
	}
	if pk.GetSigner() == nil && pk.GetTransport() == nil {
		return nil, fmt.Errorf("kind %q is neither signer nor transport", k.ID)
	}
	if pk.GetConfigSchema() == "" {
		return k, nil
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(pk.GetConfigSchema()))
	if err != nil {
		return nil, fmt.Errorf("kind %q: config schema is not JSON: %w", k.ID, err)
	}
	compiler := jsonschema.NewCompiler()
	compiler.DefaultDraft(jsonschema.Draft2020)
	compiler.UseLoader(noLoader{}) // a schema is whole; it fetches nothing
	if err := compiler.AddResource("config.json", doc); err != nil {
		return nil, fmt.Errorf("kind %q: config schema: %w", k.ID, err)
	}
	if k.schema, err = compiler.Compile("config.json"); err != nil {
		return nil, fmt.Errorf("kind %q: config schema: %w", k.ID, err)
	}
	if ex := pk.GetConfigExample(); ex != "" {
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader([]byte(ex)))
		if err == nil {
			err = k.schema.Validate(v)
		}
		if err != nil {
			return nil, fmt.Errorf("kind %q: its example does not pass its schema: %w", k.ID, err)
		}
	}
	return k, nil
}

type noLoader struct{}

func (noLoader) Load(url string) (any, error) {
	return nil, fmt.Errorf("schema refers to %s, which is not loaded", url)
}
