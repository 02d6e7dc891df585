package secret

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"
	"unicode/utf8"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

const (
	hmacPrefix    = "whsec_"
	privatePrefix = "whsk_"
	publicPrefix  = "whpk_"

	hmacGenerated = 32
	hmacLeast     = 24
	hmacMost      = 64
	opaqueMost    = 64 << 10
	publicMost    = 16 << 10
)

// Material is a value that has been checked, in the one form in which it is stored, with what is known of it.
// It prints without the value.
type Material struct {
	Kind grapnelv1.Secret_Kind
	// Plugin is whose value it is, plugins/{plugin}, and Slot its secret slot; both empty when the kind says
	// what it is.
	Plugin, Slot string
	// Value is never empty.
	Value []byte
	// Algorithm, PublicKey, JWK and KeyID are as in grapnel.v1.SecretVersion. All may be empty.
	Algorithm, PublicKey, JWK, KeyID string
	// Made is set when the value was made and not given: then it is to be shown, once.
	Made bool
}

// String leaves the value out.
func (m Material) String() string { return "secret material" }

// GoString leaves the value out.
func (m Material) GoString() string { return "secret.Material()" }

// MarshalJSON leaves the value out.
func (m Material) MarshalJSON() ([]byte, error) { return []byte("{}"), nil }

// Generated returns the value when it was made, else nothing.
func (m Material) Generated() string {
	if !m.Made {
		return ""
	}
	return string(m.Value)
}

// Make checks a given value by its kind, or makes one when it is empty. It returns an *InvalidError that says
// what is wrong without repeating any of it. A kind that is not set means OPAQUE.
func Make(kind grapnelv1.Secret_Kind, given string) (Material, error) {
	switch kind {
	case grapnelv1.Secret_KIND_HMAC:
		return hmacMaterial(given)
	case grapnelv1.Secret_KIND_ED25519:
		return ed25519Material(given)
	case grapnelv1.Secret_KIND_UNSPECIFIED, grapnelv1.Secret_KIND_OPAQUE:
		switch {
		case given == "":
			return Material{}, invalid("value", "secret.required", "is empty; an OPAQUE secret must be given (HMAC and ED25519 can be generated)")
		case len(given) > opaqueMost:
			return Material{}, invalid("value", "secret.length", "has %d bytes; want at most %d", len(given), opaqueMost)
		}
		return Material{Kind: grapnelv1.Secret_KIND_OPAQUE, Value: []byte(given)}, nil
	}
	return Material{}, invalid("kind", "enum.defined_only", "%d is not a kind; want KIND_HMAC, KIND_ED25519 or KIND_OPAQUE", kind)
}

func hmacMaterial(given string) (Material, error) {
	if given == "" {
		key := make([]byte, hmacGenerated)
		if _, err := rand.Read(key); err != nil {
			return Material{}, fmt.Errorf("generate secret: %w", err)
		}
		value := hmacPrefix + base64.StdEncoding.EncodeToString(key)
		return Material{Kind: grapnelv1.Secret_KIND_HMAC, Value: []byte(value), Made: true}, nil
	}
	key, err := parseValue(given, hmacPrefix, "HMAC")
	if err != nil {
		return Material{}, err
	}
	if len(key) < hmacLeast || len(key) > hmacMost {
		return Material{}, invalid("value", "secret.length", "decodes to %d bytes; an HMAC secret has %d to %d", len(key), hmacLeast, hmacMost)
	}
	return Material{Kind: grapnelv1.Secret_KIND_HMAC, Value: []byte(hmacPrefix + base64.StdEncoding.EncodeToString(key))}, nil
}

func ed25519Material(given string) (Material, error) {
	seed := make([]byte, ed25519.SeedSize)
	if given == "" {
		if _, err := rand.Read(seed); err != nil {
			return Material{}, fmt.Errorf("generate secret: %w", err)
		}
	} else {
		key, err := parseValue(given, privatePrefix, "ED25519")
		if err != nil {
			return Material{}, err
		}
		if len(key) != ed25519.SeedSize && len(key) != ed25519.PrivateKeySize {
			return Material{}, invalid("value", "secret.length", "decodes to %d bytes; an ED25519 secret has %d (the seed) or %d (seed and public key)",
				len(key), ed25519.SeedSize, ed25519.PrivateKeySize)
		}
		copy(seed, key)
		if len(key) == ed25519.PrivateKeySize && !bytes.Equal(ed25519.NewKeyFromSeed(seed), key) {
			return Material{}, invalid("value", "secret.mismatch", "holds a public key that does not belong to its seed")
		}
	}
	private := ed25519.NewKeyFromSeed(seed)
	return Material{
		Kind:      grapnelv1.Secret_KIND_ED25519,
		Value:     []byte(privatePrefix + base64.StdEncoding.EncodeToString(private)),
		PublicKey: publicPrefix + base64.StdEncoding.EncodeToString(private[ed25519.SeedSize:]),
		Made:      given == "",
	}, nil
}

// check returns an *InvalidError for what may not be stored. What Make returns passes; this is for what a
// plugin returned.
func (m Material) check() error {
	var bad InvalidError
	add := func(field, reason, format string, args ...any) {
		bad.Violations = append(bad.Violations, Violation{Field: field, Reason: reason, Description: fmt.Sprintf(format, args...)})
	}
	from := m.Plugin
	if from == "" {
		from = "the value"
	}
	if len(m.Value) == 0 || len(m.Value) > opaqueMost {
		add("value", "secret.length", "%s gives %d bytes to store; want 1 to %d", from, len(m.Value), opaqueMost)
	}
	for _, public := range []struct{ what, text string }{
		{"an algorithm", m.Algorithm}, {"a public key", m.PublicKey}, {"a JSON Web Key", m.JWK}, {"a key id", m.KeyID},
	} {
		if len(public.text) > publicMost || !utf8.ValidString(public.text) || strings.ContainsRune(public.text, 0) {
			add("value", "secret.public", "%s gives %s that is not text of at most %d bytes", from, public.what, publicMost)
		}
	}
	if m.JWK != "" {
		if _, err := readJWK(m.JWK); err != nil {
			add("value", "secret.jwk", "%s gives a JSON Web Key that cannot be published: %v", from, err)
		}
	}
	if m.Plugin != "" && m.Kind != grapnelv1.Secret_KIND_OPAQUE {
		add("kind", "secret.kind", "%s goes with no plugin; want no kind, or KIND_OPAQUE", m.Kind)
	}
	if len(bad.Violations) > 0 {
		return &bad
	}
	return nil
}

// parseValue takes off the prefix and decodes the rest; padding may be left out.
func parseValue(given, prefix, kind string) ([]byte, error) {
	text, ok := strings.CutPrefix(given, prefix)
	if !ok {
		return nil, invalid("value", "secret.prefix", "does not begin with %s; want %s and base64 for an %s secret", prefix, prefix, kind)
	}
	key, err := base64.RawStdEncoding.Strict().DecodeString(strings.TrimRight(text, "="))
	if err != nil || strings.ContainsAny(text, "\r\n") {
		return nil, invalid("value", "secret.base64", "is not standard base64 behind %s", prefix)
	}
	return key, nil
}

// invalid makes an *InvalidError of one violation.
func invalid(field, reason, format string, args ...any) error {
	return &InvalidError{Violations: []Violation{{Field: field, Reason: reason, Description: fmt.Sprintf(format, args...)}}}
}
