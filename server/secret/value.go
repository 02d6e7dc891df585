package secret

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"

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
)

// material is a value that has been checked, in the one form in which it is stored.
type material struct {
	value []byte
	// public is the public key in writing, where there is one.
	public string
	// generated is set when the server made the value, and then it is shown once.
	generated string
}

// newMaterial checks a given value, or makes one when it is empty. It returns an *InvalidError that says
// what is wrong without repeating any of it.
func newMaterial(kind grapnelv1.Secret_Kind, given string) (material, error) {
	switch kind {
	case grapnelv1.Secret_KIND_HMAC:
		return hmacMaterial(given)
	case grapnelv1.Secret_KIND_ED25519:
		return ed25519Material(given)
	case grapnelv1.Secret_KIND_UNSPECIFIED, grapnelv1.Secret_KIND_OPAQUE:
		switch {
		case given == "":
			return material{}, invalid("value", "secret.required", "is empty; an OPAQUE secret must be given (HMAC and ED25519 can be generated)")
		case len(given) > opaqueMost:
			return material{}, invalid("value", "secret.length", "has %d bytes; want at most %d", len(given), opaqueMost)
		}
		return material{value: []byte(given)}, nil
	}
	return material{}, invalid("kind", "enum.defined_only", "%d is not a kind; want KIND_HMAC, KIND_ED25519 or KIND_OPAQUE", kind)
}

func hmacMaterial(given string) (material, error) {
	if given == "" {
		key := make([]byte, hmacGenerated)
		if _, err := rand.Read(key); err != nil {
			return material{}, fmt.Errorf("generate secret: %w", err)
		}
		value := hmacPrefix + base64.StdEncoding.EncodeToString(key)
		return material{value: []byte(value), generated: value}, nil
	}
	key, err := parseValue(given, hmacPrefix, "HMAC")
	if err != nil {
		return material{}, err
	}
	if len(key) < hmacLeast || len(key) > hmacMost {
		return material{}, invalid("value", "secret.length", "decodes to %d bytes; an HMAC secret has %d to %d", len(key), hmacLeast, hmacMost)
	}
	return material{value: []byte(hmacPrefix + base64.StdEncoding.EncodeToString(key))}, nil
}

func ed25519Material(given string) (material, error) {
	seed := make([]byte, ed25519.SeedSize)
	if given == "" {
		if _, err := rand.Read(seed); err != nil {
			return material{}, fmt.Errorf("generate secret: %w", err)
		}
	} else {
		key, err := parseValue(given, privatePrefix, "ED25519")
		if err != nil {
			return material{}, err
		}
		if len(key) != ed25519.SeedSize && len(key) != ed25519.PrivateKeySize {
			return material{}, invalid("value", "secret.length", "decodes to %d bytes; an ED25519 secret has %d (the seed) or %d (seed and public key)",
				len(key), ed25519.SeedSize, ed25519.PrivateKeySize)
		}
		copy(seed, key)
		if len(key) == ed25519.PrivateKeySize && !bytes.Equal(ed25519.NewKeyFromSeed(seed), key) {
			return material{}, invalid("value", "secret.mismatch", "holds a public key that does not belong to its seed")
		}
	}
	private := ed25519.NewKeyFromSeed(seed)
	m := material{
		value:  []byte(privatePrefix + base64.StdEncoding.EncodeToString(private)),
		public: publicPrefix + base64.StdEncoding.EncodeToString(private[ed25519.SeedSize:]),
	}
	if given == "" {
		m.generated = string(m.value)
	}
	return m, nil
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
