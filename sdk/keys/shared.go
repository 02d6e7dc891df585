package keys

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// minShared is the least that a shared key may have: below 128 bits it can be guessed from a signature.
const minShared = 16

// SharedDoc says how a shared key is written, for the docs of schemes that use ParseShared.
const SharedDoc = "base64: and base64 of its bytes, whsec_ and the same, a JSON Web Key of kty oct, or any other text, whose bytes are the key as they stand"

// IsShared reports whether a value is meant as a shared key: it is not in one of the forms that Parse
// reads, nor in one that Parse knows and refuses.
func IsShared(value []byte) bool {
	value = bytes.TrimSpace(value)
	switch {
	case len(value) == 0:
		return false
	case value[0] == '{':
		var j struct {
			Kty string `json:"kty"`
		}
		return json.Unmarshal(value, &j) == nil && j.Kty == "oct"
	}
	for _, prefix := range []string{"whsk_", "whpk_", "ssh-", "ecdsa-sha2-"} {
		if bytes.HasPrefix(value, []byte(prefix)) {
			return false
		}
	}
	return !bytes.Contains(value, []byte("-----BEGIN "))
}

// ParseShared reads a shared key, in this order: a JSON Web Key of kty oct; base64: or whsec_ followed by
// base64 (standard or URL alphabet, padded or not); any other text, whose UTF-8 bytes are the key as they
// stand. It takes 16 bytes or more. Errors show nothing of the value.
func ParseShared(value []byte) ([]byte, error) {
	if len(value) > maxValue {
		return nil, fmt.Errorf("the shared key has %d bytes; at most %d are taken", len(value), maxValue)
	}
	text := string(value)
	encoded, found := strings.CutPrefix(text, "base64:")
	if !found {
		encoded, found = strings.CutPrefix(text, "whsec_")
	}
	var secret []byte
	var err error
	switch {
	case len(bytes.TrimSpace(value)) == 0:
		return nil, errEmpty
	case !IsShared(value):
		return nil, errors.New("this is no shared key but one half of a key pair")
	case strings.TrimSpace(text) != text && !strings.HasPrefix(strings.TrimSpace(text), "{"):
		return nil, errors.New("the shared key has a space or a line break around it; remove it, or write base64: and base64 of its bytes")
	case found:
		secret, err = decodeAny(encoded)
	case text[0] == '{', strings.HasPrefix(strings.TrimSpace(text), "{"):
		secret, err = parseOct(value)
	default:
		secret = []byte(text)
	}
	if err != nil {
		return nil, err
	}
	if len(secret) < minShared {
		return nil, fmt.Errorf("a shared key needs at least %d bytes; this one has %d", minShared, len(secret))
	}
	return secret, nil
}

func parseOct(value []byte) ([]byte, error) {
	var j struct {
		K string `json:"k"`
	}
	if json.Unmarshal(value, &j) != nil {
		return nil, errors.New("the JSON Web Key cannot be read: its k is not a string")
	}
	return decodeMember("k", j.K, 0)
}

func decodeAny(encoded string) ([]byte, error) {
	plain := strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(encoded, "="))
	raw, err := base64.RawStdEncoding.Strict().DecodeString(plain)
	if err != nil || strings.ContainsAny(encoded, "\r\n") {
		return nil, errors.New("the part after the prefix is not base64")
	}
	return raw, nil
}

// LooksEncoded reports whether a shared key that is taken as text has the looks of base64 or hex of 16
// bytes or more, so that its user may have meant the bytes.
func LooksEncoded(value []byte) bool {
	text := string(value)
	if len(text) < 2*minShared || strings.HasPrefix(text, "base64:") || strings.HasPrefix(text, "whsec_") {
		return false
	}
	if strings.Trim(text, "0123456789abcdefABCDEF") == "" && len(text)%2 == 0 {
		return true
	}
	_, err := base64.StdEncoding.Strict().DecodeString(text)
	return err == nil && strings.HasSuffix(text, "=")
}
