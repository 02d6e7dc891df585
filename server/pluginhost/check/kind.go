package check

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Kind is one signer, transport or transformer, as its plugin has described it. It is immutable.
type Kind struct {
	ID     string
	Proto  *pluginv1.Kind
	schema *jsonschema.Schema // nil when the kind has no settings
}

// Signer reports whether it is one.
func (k *Kind) Signer() bool { return k.Proto.GetSigner() != nil }

// Role is "signer", "transport" or "transformer".
func (k *Kind) Role() string {
	switch {
	case k.Signer():
		return "signer"
	case k.Proto.GetTransformer() != nil:
		return "transformer"
	}
	return "transport"
}

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

// Bounds of what a plugin may say of a kind: it is kept, and listed.
const (
	maxDescription = 4 << 10
	maxSchema      = 256 << 10
	maxNames       = 64
	maxName        = 128
)

// bounded says which part of a description is too much.
func bounded(pk *pluginv1.Kind) error {
	names := slices.Concat(pk.GetSigner().GetEmitsHeaders(), pk.GetTransport().GetMayAddHeaders(), pk.GetTransport().GetUriSchemes())
	texts := []string{pk.GetDescription()}
	for _, s := range pk.GetSecretSlots() {
		names = append(names, s.GetName())
		names = append(names, s.GetAlgorithms()...)
		texts = append(texts, s.GetDescription(), s.GetFormat())
	}
	switch {
	case len(pk.GetConfigSchema()) > maxSchema || len(pk.GetConfigExample()) > maxSchema:
		return fmt.Errorf("its config schema or example is longer than %d bytes", maxSchema)
	case slices.ContainsFunc(texts, func(s string) bool { return len(s) > maxDescription }):
		return fmt.Errorf("one of its descriptions is longer than %d bytes", maxDescription)
	case len(names) > maxNames:
		return fmt.Errorf("it has more than %d headers, schemes, slots and algorithms", maxNames)
	case slices.ContainsFunc(names, func(s string) bool { return len(s) > maxName }):
		return fmt.Errorf("the name of one of its headers, schemes, slots or algorithms is longer than %d bytes", maxName)
	}
	return nil
}

// NewKind takes a description, or says what is wrong with it.
func NewKind(pk *pluginv1.Kind) (*Kind, error) {
	k := &Kind{ID: pk.GetId(), Proto: pk}
	if !regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`).MatchString(k.ID) {
		return nil, fmt.Errorf("kind %.80q: the id must match ^[a-z][a-z0-9-]{0,62}$", k.ID)
	}
	if pk.GetSigner() == nil && pk.GetTransport() == nil && pk.GetTransformer() == nil {
		return nil, fmt.Errorf("kind %q is neither signer nor transport nor transformer", k.ID)
	}
	if err := bounded(pk); err != nil {
		return nil, fmt.Errorf("kind %q: %w", k.ID, err)
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
