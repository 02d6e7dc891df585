package standardwebhooks

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Complaints about a key. They say what is wrong with its form and never show any of it.
var (
	errNoKey       = errors.New("no key is given")
	errPrefix      = errors.New("the key must start with whsec_ (HMAC) or whsk_ (ed25519 private key)")
	errPublic      = errors.New("the key starts with whpk_, which is a public key; signing needs the private one, whsk_")
	errURLAlphabet = errors.New("the part after the prefix uses the URL alphabet of base64 (- or _); it must be standard base64 (+ and /)")
	errSpace       = errors.New("the key has a space or a line break in or around it; remove it")
	errHex         = errors.New("the part after the prefix looks like hex; it must be standard base64 of the raw key bytes")
	errBase64      = errors.New("the part after the prefix is not standard base64")
)

// Bounds of the specification for HMAC keys.
const (
	minHMACBytes = 24
	maxHMACBytes = 64
)

// The algorithms, as they are named to SecretService.
const (
	algorithmHMAC    = "hmac-sha256"
	algorithmEd25519 = "ed25519"
)

// format is the specification's say over the slot "key".
func format() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc:        "whsec_ and base64 of 24 to 64 bytes, or whsk_ and base64 of an ed25519 key",
		Algorithms: []string{algorithmHMAC, algorithmEd25519},
		Generate:   generate,
		Read:       read,
	}
}

// generate makes an HMAC key of 32 bytes, or an ed25519 key written as seed and public key.
func generate(algorithm string) ([]byte, error) {
	raw := make([]byte, 32)
	_, _ = rand.Read(raw) // never fails
	if algorithm == algorithmEd25519 {
		return base64.StdEncoding.AppendEncode([]byte("whsk_"), ed25519.NewKeyFromSeed(raw)), nil
	}
	return base64.StdEncoding.AppendEncode([]byte("whsec_"), raw), nil
}

// read checks a key and says what its public half is.
func read(value []byte) (plugin.SecretInfo, error) {
	k, err := parseKey(value)
	if err != nil {
		return plugin.SecretInfo{}, err
	}
	if k.private == nil {
		return plugin.SecretInfo{Algorithm: algorithmHMAC}, nil
	}
	public := k.private[ed25519.SeedSize:]
	return plugin.SecretInfo{
		Algorithm: algorithmEd25519, PublicKey: "whpk_" + base64.StdEncoding.EncodeToString(public), JWK: k.pair.JWK(), KeyID: k.pair.ID(),
	}, nil
}

func parseKey(value []byte) (*key, error) {
	text := string(value)
	kind, encoded, found := strings.Cut(text, "_")
	switch {
	case len(text) == 0:
		return nil, errNoKey
	case strings.ContainsAny(text, " \t\r\n"):
		return nil, errSpace
	case found && kind == "whpk":
		return nil, errPublic
	case !found || kind != "whsec" && kind != "whsk":
		return nil, errPrefix
	}
	raw, err := decode(encoded)
	if err != nil {
		return nil, err
	}
	if kind == "whsk" {
		pair, err := keys.Parse(value)
		if err != nil {
			return nil, err
		}
		private, ok := pair.Signer().(ed25519.PrivateKey)
		if !ok {
			return nil, errPrefix
		}
		return &key{pair: pair, private: private}, nil
	}
	if len(raw) < minHMACBytes || len(raw) > maxHMACBytes {
		return nil, fmt.Errorf("an HMAC key is %d to %d bytes before base64; this one is %d", minHMACBytes, maxHMACBytes, len(raw))
	}
	return newHMACKey(raw), nil
}

// decode reads standard base64, padded or not. Hex is refused although it decodes: the receiver would be
// given the same text and the two sides would still agree, but on a key that nobody meant.
func decode(encoded string) ([]byte, error) {
	if strings.ContainsAny(encoded, "-_") {
		return nil, errURLAlphabet
	}
	if len(encoded) >= 2*minHMACBytes && strings.Trim(encoded, "0123456789abcdef") == "" {
		return nil, errHex
	}
	raw, err := base64.RawStdEncoding.Strict().DecodeString(strings.TrimRight(encoded, "="))
	if err != nil {
		return nil, errBase64
	}
	return raw, nil
}
