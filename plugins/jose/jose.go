// Package jose signs requests with JSON Web Signatures: the kind "jws" puts a detached signature of the
// body in a header (RFC 7515 appendix F, RFC 7797), the kind "jwt" a bearer token (RFC 7519) that says
// who sends, when, and if asked what.
//
// It owns the JOSE header, the claims and the encodings, of which every byte follows from the request and
// the config; the time comes from the host. There is room for one signature only, so during a rotation
// one of the live keys signs, and receivers must take both. The package verifies nothing.
package jose

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"maps"
	"slices"
	"strings"

	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Names of algorithms (RFC 7518 section 3.1, RFC 8037 section 3.1).
const (
	HS256 = "HS256"
	HS384 = "HS384"
	HS512 = "HS512"
	EdDSA = "EdDSA"
	ES256 = "ES256"
	ES384 = "ES384"
	RS256 = "RS256"
	PS256 = "PS256"
)

// Kinds are the signers "jws" and "jwt".
func Kinds() []plugin.Kind { return []plugin.Kind{JWS(), JWT()} }

// algorithms are all that can sign, the default for new keys first.
func algorithms() []string { return []string{EdDSA, ES256, ES384, PS256, RS256, HS256, HS384, HS512} }

// schemeOf is what sdk/keys calls an algorithm; empty for the symmetric ones.
func schemeOf(alg string) string {
	switch alg {
	case EdDSA:
		return keys.Ed25519
	case ES256:
		return keys.ECDSAP256
	case ES384:
		return keys.ECDSAP384
	case RS256:
		return keys.RSAV15SHA256
	case PS256:
		return keys.RSAPSSSHA256
	}
	return ""
}

// algOf is what a private key signs by unless told otherwise. An RSA key that was read from a JSON Web Key
// may say so itself; without that it is RS256, which every library knows.
func algOf(k *keys.Key) string {
	switch k.Algorithm() {
	case keys.Ed25519:
		return EdDSA
	case keys.ECDSAP256:
		return ES256
	case keys.ECDSAP384:
		return ES384
	}
	if k.Alg() == PS256 {
		return PS256
	}
	return RS256
}

// hashOf is the hash of a symmetric algorithm and its size, which is also the least size of a key for it
// (RFC 7518 section 3.2).
func hashOf(alg string) (func() hash.Hash, int) {
	switch alg {
	case HS256:
		return sha256.New, sha256.Size
	case HS384:
		return sha512.New384, sha512.Size384
	case HS512:
		return sha512.New, sha512.Size
	}
	return nil, 0
}

// Compact is the compact serialisation (RFC 7515 section 7.1) of payload, signed by k. The header's alg is
// put in: what is given there if k can sign it, otherwise an error; by default EdDSA, ES256 or ES384 by
// the key, and for RSA the key's own alg or RS256.
func Compact(k *keys.Key, header map[string]any, payload []byte) (string, error) {
	alg := algOf(k)
	if given, ok := header["alg"]; ok {
		if alg, ok = given.(string); !ok || schemeOf(alg) == "" {
			return "", fmt.Errorf("alg %v is none of %s", given, strings.Join(algorithms()[:5], ", "))
		}
	}
	header = maps.Clone(header)
	if header == nil {
		header = map[string]any{}
	}
	header["alg"] = alg
	protected, err := json.Marshal(header)
	if err != nil {
		return "", fmt.Errorf("marshal JOSE header: %w", err)
	}
	input := base64.RawURLEncoding.AppendEncode(nil, protected)
	input = base64.RawURLEncoding.AppendEncode(append(input, '.'), payload)
	signature, err := k.Sign(schemeOf(alg), input)
	if err != nil {
		return "", err
	}
	return string(base64.RawURLEncoding.AppendEncode(append(input, '.'), signature)), nil
}

// key is one live version as the config has it sign.
type key struct {
	alg     string
	id      string
	private *keys.Key
	secret  []byte
}

// parseKey reads a key for an algorithm of the config; "auto" takes the key's own.
func parseKey(value []byte, algorithm string) (*key, error) {
	if keys.IsShared(value) {
		return parseShared(value, algorithm)
	}
	private, err := keys.Parse(value)
	if err != nil {
		return nil, err
	}
	k := &key{alg: algorithm, id: private.ID(), private: private}
	if algorithm == "auto" {
		k.alg = algOf(private)
	}
	if !private.CanSign(schemeOf(k.alg)) {
		return nil, fmt.Errorf("a key for %s cannot sign %s, which the config asks for", private.Algorithm(), algorithm)
	}
	return k, nil
}

func parseShared(value []byte, algorithm string) (*key, error) {
	secret, err := keys.ParseShared(value)
	if err != nil {
		return nil, err
	}
	k := &key{alg: algorithm, secret: secret}
	if algorithm == "auto" {
		k.alg = HS256
		for _, larger := range []string{HS384, HS512} {
			if _, size := hashOf(larger); len(secret) >= size {
				k.alg = larger
			}
		}
	}
	_, size := hashOf(k.alg)
	switch {
	case size == 0:
		return nil, fmt.Errorf("a shared key cannot sign %s, which the config asks for", algorithm)
	case len(secret) < size:
		return nil, fmt.Errorf("a shared key for %s needs at least %d bytes (RFC 7518); this one has %d", k.alg, size, len(secret))
	}
	return k, nil
}

func (k *key) sign(input ...[]byte) ([]byte, error) {
	if k.private != nil {
		return k.private.Sign(schemeOf(k.alg), slices.Concat(input...))
	}
	newHash, _ := hashOf(k.alg)
	mac := hmac.New(newHash, k.secret)
	for _, part := range input {
		mac.Write(part)
	}
	return mac.Sum(nil), nil
}

// liveKey is the key that signs: of the live versions, the newest or the oldest.
func liveKey(secret plugin.Secret, algorithm, which string) (*key, error) {
	values := secret.Values()
	if len(values) == 0 {
		return nil, errors.New("no key is given")
	}
	value := values[0]
	if which == "oldest" {
		value = values[len(values)-1]
	}
	return parseKey(value, algorithm)
}
