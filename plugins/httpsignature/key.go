package httpsignature

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"hash"
	"sync"

	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const hmacSHA256 = "hmac-sha256"

// key is one live version: a private key, or a shared one with ready-keyed states to reuse.
type key struct {
	private *keys.Key
	scheme  string
	id      string
	states  sync.Pool // of hash.Hash
	label   string
	params  string // those that follow the times
}

func (k *key) sign(base []byte) ([]byte, error) {
	if k.private != nil {
		return k.private.Sign(k.scheme, base)
	}
	mac := k.states.Get().(hash.Hash)
	mac.Reset()
	mac.Write(base)
	sum := mac.Sum(nil)
	k.states.Put(mac)
	return sum, nil
}

// parseKey reads a key for an algorithm of the config; "auto" takes the key's own.
func parseKey(value []byte, algorithm string) (*key, error) {
	if keys.IsShared(value) {
		secret, err := keys.ParseShared(value)
		switch {
		case err != nil:
			return nil, err
		case algorithm != "auto" && algorithm != hmacSHA256:
			return nil, fmt.Errorf("a shared key cannot sign %s, which the config asks for; it is for %s", algorithm, hmacSHA256)
		}
		k := &key{scheme: hmacSHA256, id: fingerprint(secret)}
		k.states.New = func() any { return hmac.New(sha256.New, secret) }
		return k, nil
	}
	private, err := keys.Parse(value)
	if err != nil {
		return nil, err
	}
	k := &key{private: private, scheme: algorithm, id: private.ID()}
	if algorithm == "auto" {
		k.scheme = schemeOf(private)
	}
	if !private.CanSign(k.scheme) {
		return nil, fmt.Errorf("a key for %s cannot sign %s, which the config asks for", private.Algorithm(), algorithm)
	}
	return k, nil
}

// schemeOf is what a key is for: an RSA key may say so by its alg.
func schemeOf(k *keys.Key) string {
	switch {
	case k.Algorithm() != keys.RSA:
		return k.Algorithm()
	case k.Alg() == "RS256":
		return keys.RSAV15SHA256
	}
	return keys.RSAPSSSHA512
}

// fingerprint names a shared key: 16 hex digits that tell keys apart and from which none can be computed.
func fingerprint(secret []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte("http-signature keyid"))
	return hex.EncodeToString(mac.Sum(nil)[:8])
}

func format() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc: "a private key as PEM (PKCS#8, SEC 1, PKCS#1), JSON Web Key or whsk_…; or a shared key of 16 bytes or more: " + keys.SharedDoc,
		Algorithms: []string{
			keys.Ed25519, keys.ECDSAP256, keys.ECDSAP384, keys.RSAPSSSHA512, keys.RSAV15SHA256, hmacSHA256,
		},
		Generate: generate,
		Read: func(value []byte) (plugin.SecretInfo, error) {
			k, err := parseKey(value, "auto")
			if err != nil {
				return plugin.SecretInfo{}, err
			}
			info := plugin.SecretInfo{Algorithm: k.scheme, KeyID: k.id}
			if k.private != nil {
				info.PublicKey, info.JWK = k.private.PublicPEM(), k.private.JWK()
			}
			return info, nil
		},
	}
}

// generate writes RSA keys as JSON Web Keys, which can say which of the schemes they are for.
func generate(algorithm string) ([]byte, error) {
	if algorithm == hmacSHA256 {
		secret := make([]byte, 32)
		rand.Read(secret) // never fails
		return []byte("base64:" + base64.StdEncoding.EncodeToString(secret)), nil
	}
	value, err := keys.Generate(algorithm)
	alg := map[string]string{keys.RSAPSSSHA512: "PS512", keys.RSAV15SHA256: "RS256"}[algorithm]
	if err != nil || alg == "" {
		return value, err
	}
	k, err := keys.Parse(value)
	if err != nil {
		return nil, fmt.Errorf("read the key made: %w", err)
	}
	return k.PrivateJWK(alg), nil
}
