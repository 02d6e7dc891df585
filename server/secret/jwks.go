package secret

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// MediaTypeJWKS is the media type of what Store.JWKS returns (RFC 7517, section 8.5.2).
const MediaTypeJWKS = "application/jwk-set+json"

// publicKey is the public part of a JSON Web Key (RFC 7517; members by RFC 7518, section 6, and RFC 8037,
// section 2). It has no field for anything private, so that none can be published by accident.
type publicKey struct {
	KeyType   string `json:"kty"`
	Use       string `json:"use,omitempty"`
	Algorithm string `json:"alg,omitempty"`
	ID        string `json:"kid,omitempty"`
	Curve     string `json:"crv,omitempty"`
	X         string `json:"x,omitempty"`
	Y         string `json:"y,omitempty"`
	N         string `json:"n,omitempty"`
	E         string `json:"e,omitempty"`
}

// readJWK reads a JSON Web Key and refuses what is not the public half of a key pair. Its error shows
// nothing of the key.
func readJWK(text string) (publicKey, error) {
	var members map[string]json.RawMessage
	var k publicKey
	if json.Unmarshal([]byte(text), &members) != nil || json.Unmarshal([]byte(text), &k) != nil {
		return publicKey{}, errors.New("it is not a JSON object with text in it")
	}
	for _, private := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} {
		if _, ok := members[private]; ok {
			return publicKey{}, fmt.Errorf("it holds the private member %q", private)
		}
	}
	complete := false
	switch k.KeyType {
	case "OKP":
		complete = k.Curve != "" && k.X != ""
	case "EC":
		complete = k.Curve != "" && k.X != "" && k.Y != ""
	case "RSA":
		complete = k.N != "" && k.E != ""
	default:
		return publicKey{}, errors.New("its kty is not OKP, EC or RSA")
	}
	if !complete {
		return publicKey{}, errors.New("members that make up a public key are missing")
	}
	return k, nil
}

// thumbprint is the key's ID by RFC 7638: SHA-256 over its required members in the order of their names.
func (k publicKey) thumbprint() string {
	var required any
	switch k.KeyType {
	case "OKP":
		required = struct {
			Curve   string `json:"crv"`
			KeyType string `json:"kty"`
			X       string `json:"x"`
		}{k.Curve, k.KeyType, k.X}
	case "EC":
		required = struct {
			Curve   string `json:"crv"`
			KeyType string `json:"kty"`
			X       string `json:"x"`
			Y       string `json:"y"`
		}{k.Curve, k.KeyType, k.X, k.Y}
	default:
		required = struct {
			E       string `json:"e"`
			KeyType string `json:"kty"`
			N       string `json:"n"`
		}{k.E, k.KeyType, k.N}
	}
	sum := sha256.Sum256(compact(required))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// standardWebhooksJWK makes the JSON Web Key of a public key in the writing of Standard Webhooks, and its ID.
// That scheme has no key IDs; others that take the same keys do.
func standardWebhooksJWK(public string) (jwk, id string) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(public, publicPrefix))
	if err != nil || len(raw) == 0 {
		return "", ""
	}
	k := publicKey{KeyType: "OKP", Curve: "Ed25519", X: base64.RawURLEncoding.EncodeToString(raw), Algorithm: "EdDSA", Use: "sig"}
	k.ID = k.thumbprint()
	return string(compact(k)), k.ID
}

// JWKS returns the JSON Web Key Set (RFC 7517) of a namespace: the public half of every live version of its
// secrets that has one, each with kid, alg where it is known, and use, in the order of secrets' names and
// newest first. The same keys give the same bytes. A key that two secrets share is in it once.
func (s *Store) JWKS(ns string) []byte {
	set := struct {
		Keys []publicKey `json:"keys"`
	}{Keys: []publicKey{}}
	for sec := range s.List(ns, "") {
		for _, v := range sec.Proto.GetVersions() {
			if v.GetJwk() == "" {
				continue
			}
			k, err := readJWK(v.GetJwk())
			if err != nil {
				s.log.Error("stored public key is not published", "secret", sec.name(), "version", v.GetVersion(), "err", err)
				continue
			}
			// What signatures call the key comes first: it is what receivers look for.
			for _, id := range []string{v.GetKeyId(), k.ID, k.thumbprint()} {
				if k.ID = id; id != "" {
					break
				}
			}
			if k.Use == "" {
				k.Use = "sig"
			}
			if k.Algorithm == "" {
				k.Algorithm = joseAlgorithm(v.GetAlgorithm())
			}
			if !slices.Contains(set.Keys, k) {
				set.Keys = append(set.Keys, k)
			}
		}
	}
	return compact(set)
}

// joseAlgorithm is the name in RFC 7518 and RFC 8037 of an algorithm as plugins name it, empty when there is
// none.
func joseAlgorithm(name string) string {
	switch name {
	case "ed25519":
		return "EdDSA"
	case "ecdsa-p256-sha256":
		return "ES256"
	case "ecdsa-p384-sha384":
		return "ES384"
	case "rsa-pss-sha512":
		return "PS512"
	case "rsa-v1_5-sha256":
		return "RS256"
	}
	return ""
}

// compact is v as JSON without blanks, and without the escapes that are meant for HTML.
func compact(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if e.Encode(v) != nil {
		return nil // structs of strings always encode
	}
	return bytes.TrimSpace(b.Bytes())
}
