package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/grapnel/grapnel/sdk/keys"
)

// verifyKey is what a receiver verifies with: a public key, or a shared one.
type verifyKey struct {
	public crypto.PublicKey
	shared []byte
}

// parseVerifyKey reads a public key in PEM, a private one, of which it takes the public half, or a shared key. Its errors
// show nothing of the key.
func parseVerifyKey(text string) (verifyKey, error) {
	if block, _ := pem.Decode([]byte(text)); block != nil && block.Type == "PUBLIC KEY" {
		public, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return verifyKey{}, errors.New("the public key in it cannot be read")
		}
		return verifyKey{public: public}, nil
	}
	if keys.IsShared([]byte(text)) {
		shared, err := keys.ParseShared([]byte(text))
		return verifyKey{shared: shared}, err
	}
	private, err := keys.Parse([]byte(text))
	if err != nil {
		return verifyKey{}, err
	}
	return verifyKey{public: private.Signer().Public()}, nil
}

// hmacHash is the hash of a symmetric algorithm of JOSE.
func hmacHash(alg string) func() hash.Hash {
	switch alg {
	case "HS256":
		return sha256.New
	case "HS384":
		return sha512.New384
	case "HS512":
		return sha512.New
	}
	return nil
}

// asymmetric are the names that RFC 7518 and RFC 9421 have for what is one algorithm.
func asymmetric(alg string) (crypto.Hash, bool) {
	switch alg {
	case "EdDSA", keys.Ed25519:
		return 0, true
	case "ES256", "RS256", keys.ECDSAP256, keys.RSAV15SHA256:
		return crypto.SHA256, true
	case "PS256":
		return crypto.SHA256, true
	case "ES384", keys.ECDSAP384:
		return crypto.SHA384, true
	case keys.RSAPSSSHA512:
		return crypto.SHA512, true
	}
	return 0, false
}

// verify checks a signature by the algorithm that was asked for: a key of another kind fits none.
func (k verifyKey) verify(alg string, message, signature []byte) error {
	if k.shared != nil {
		hashed := hmacHash(alg)
		if hashed == nil {
			return fmt.Errorf("the signature is by %s, and the key is a shared one", clean(alg))
		}
		mac := hmac.New(hashed, k.shared)
		mac.Write(message)
		return matched(hmac.Equal(mac.Sum(nil), signature))
	}
	hashed, ok := asymmetric(alg)
	if !ok {
		return fmt.Errorf("the signature is by %s, and the key is a public one", clean(alg))
	}
	var digest []byte
	if hashed != 0 {
		h := hashed.New()
		h.Write(message)
		digest = h.Sum(nil)
	}
	switch public := k.public.(type) {
	case ed25519.PublicKey:
		return matched(hashed == 0 && ed25519.Verify(public, message, signature))
	case *ecdsa.PublicKey:
		half := len(signature) / 2
		size := (public.Curve.Params().BitSize + 7) / 8
		if !strings.HasPrefix(strings.ToLower(alg), "e") || half != size || len(signature) != 2*size {
			return errNoMatch
		}
		return matched(ecdsa.Verify(public, digest, new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:])))
	case *rsa.PublicKey:
		switch alg {
		case "PS256", keys.RSAPSSSHA512:
			return matched(rsa.VerifyPSS(public, hashed, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil)
		case "RS256", keys.RSAV15SHA256:
			return matched(rsa.VerifyPKCS1v15(public, hashed, digest, signature) == nil)
		}
	}
	return errNoMatch
}

func matched(ok bool) error {
	if !ok {
		return errNoMatch
	}
	return nil
}

// joseConfig is what a receiver needs of the settings of jws and jwt.
type joseConfig struct {
	Header   string  `json:"header"`
	Prefix   *string `json:"prefix"`
	BodyHash string  `json:"body_hash"`
	BodyCode string  `json:"body_hash_encoding"`
}

// joseVerifier checks a detached signature of the body (RFC 7515 appendix F, RFC 7797), or a token (RFC 7519).
func joseVerifier(scheme string, config []byte, key string) (verifier, error) {
	k, err := parseVerifyKey(key)
	if err != nil {
		return nil, err
	}
	c := joseConfig{Header: "x-jws-signature"}
	if scheme == "jwt" {
		c.Header = "authorization"
	}
	if len(config) > 0 {
		if err := json.Unmarshal(config, &c); err != nil {
			return nil, fmt.Errorf("--scheme-config: must be a JSON object: %w", err)
		}
	}
	return func(a incoming) error {
		text := a.header.Get(c.Header)
		if text == "" {
			return missingHeader(c.Header)
		}
		if scheme == "jws" {
			return k.jws(text, a.body, a.at)
		}
		prefix := ""
		if strings.EqualFold(c.Header, "authorization") {
			prefix = "Bearer "
		}
		if c.Prefix != nil {
			prefix = *c.Prefix
		}
		token, ok := strings.CutPrefix(text, prefix)
		if !ok {
			return fmt.Errorf("the header %s does not begin with %q", c.Header, prefix)
		}
		return k.jwt(token, a, c)
	}, nil
}

// protected reads the header of a JWS.
func protected(part string) (alg string, b64 bool, iat int64, err error) {
	raw, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return "", false, 0, errors.New("the signature's header is not base64url")
	}
	header := struct {
		Alg string `json:"alg"`
		B64 *bool  `json:"b64"`
		IAT int64  `json:"iat"`
	}{}
	if err := json.Unmarshal(raw, &header); err != nil {
		return "", false, 0, errors.New("the signature's header is not JSON")
	}
	return header.Alg, header.B64 == nil || *header.B64, header.IAT, nil
}

func (k verifyKey) jws(text string, body []byte, now time.Time) error {
	parts := strings.Split(text, ".")
	if len(parts) != 3 || parts[1] != "" {
		return errors.New("it is no detached signature: want HEADER..SIGNATURE")
	}
	alg, b64, iat, err := protected(parts[0])
	if err != nil {
		return err
	}
	payload := string(body)
	if b64 {
		payload = base64.RawURLEncoding.EncodeToString(body)
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		return errNoMatch
	}
	if err := k.verify(alg, []byte(parts[0]+"."+payload), signature); err != nil || iat == 0 {
		return err
	}
	return checkTime(time.Unix(iat, 0), now)
}

func (k verifyKey) jwt(token string, a incoming, c joseConfig) error {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return errors.New("it is no token: want HEADER.CLAIMS.SIGNATURE")
	}
	alg, _, _, err := protected(parts[0])
	if err != nil {
		return err
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		return errNoMatch
	}
	if err := k.verify(alg, []byte(parts[0]+"."+parts[1]), signature); err != nil {
		return err
	}
	var claims map[string]any
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(raw, &claims) != nil {
		return errors.New("the token's claims are not JSON")
	}
	if exp, ok := claims["exp"].(float64); ok && a.at.After(time.Unix(int64(exp), 0)) {
		return errors.New("the token has expired")
	}
	if c.BodyHash == "" {
		return nil
	}
	sum := sha256.Sum256(a.body)
	want := fmt.Sprintf("%x", sum)
	if c.BodyCode == "base64url" {
		want = base64.RawURLEncoding.EncodeToString(sum[:])
	}
	if claims[c.BodyHash] != want {
		return fmt.Errorf("the claim %s is not that of the body", c.BodyHash)
	}
	return nil
}

// messageSignature checks signatures of RFC 9421 by a public key. Covered headers are read as one line, and of derived
// components those that the signer http-signature has by default and some more; another one is named in the error.
func messageSignature(key, target string) (verifier, error) {
	k, err := parseVerifyKey(key)
	if err != nil {
		return nil, err
	}
	entry := regexp.MustCompile(`([a-z*][a-z0-9_.*-]*)=(\(([^)]*)\)([^,]*))`)
	return func(a incoming) error {
		for _, name := range []string{"Signature-Input", "Signature"} {
			if a.header.Get(name) == "" {
				return missingHeader(name)
			}
		}
		if target != "" {
			a.url = target
		}
		err := errNoMatch
		for _, found := range entry.FindAllStringSubmatch(a.header.Get("Signature-Input"), mostCandidates) {
			label, params, list, rest := found[1], found[2], found[3], found[4]
			_, after, ok := strings.Cut(a.header.Get("Signature"), label+"=:")
			text, _, closed := strings.Cut(after, ":")
			signature, decodeErr := base64.StdEncoding.DecodeString(text)
			if !ok || !closed || decodeErr != nil {
				continue
			}
			if err = k.message(a, list, params, rest, signature); err == nil {
				return nil
			}
		}
		return err
	}, nil
}

func (k verifyKey) message(a incoming, list, params, rest string, signature []byte) error {
	var base strings.Builder
	for quoted := range strings.FieldsSeq(list) {
		name, err := strconv.Unquote(quoted)
		if err != nil {
			return fmt.Errorf("the covered component %s is none that this receiver reads", clean(quoted))
		}
		value, err := component(a, name)
		if err != nil {
			return err
		}
		fmt.Fprintf(&base, "%s: %s\n", quoted, value)
	}
	fmt.Fprintf(&base, `"@signature-params": %s`, params)
	alg := parameter(rest, "alg")
	if alg == "" {
		alg = defaultAlgorithm(k.public)
	}
	if err := k.verify(alg, []byte(base.String()), signature); err != nil {
		return err
	}
	if created, err := strconv.ParseInt(parameter(rest, "created"), 10, 64); err == nil {
		return checkTime(time.Unix(created, 0), a.at)
	}
	return nil
}

// parameter is the value of ;name= without its quotes.
func parameter(params, name string) string {
	for part := range strings.SplitSeq(params, ";") {
		if value, ok := strings.CutPrefix(strings.TrimSpace(part), name+"="); ok {
			return strings.Trim(value, `"`)
		}
	}
	return ""
}

func defaultAlgorithm(public crypto.PublicKey) string {
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		if key.Curve.Params().BitSize == 384 {
			return keys.ECDSAP384
		}
		return keys.ECDSAP256
	case *rsa.PublicKey:
		return keys.RSAPSSSHA512
	}
	return keys.Ed25519
}

// component is the value of a covered component.
func component(a incoming, name string) (string, error) {
	u, err := url.Parse(a.url)
	if err != nil {
		return "", err
	}
	switch name {
	case "@method":
		return a.method, nil
	case "@target-uri":
		return a.url, nil
	case "@authority":
		return strings.ToLower(u.Host), nil
	case "@scheme":
		return u.Scheme, nil
	case "@request-target":
		return u.RequestURI(), nil
	case "@path":
		return u.EscapedPath(), nil
	case "@query":
		return "?" + u.RawQuery, nil
	case "content-digest":
		if err := checkDigest(a); err != nil {
			return "", err
		}
	}
	values := a.header.Values(name)
	if strings.HasPrefix(name, "@") {
		return "", fmt.Errorf("the covered component %s is none that this receiver reads", clean(name))
	}
	if len(values) == 0 {
		return "", missingHeader(name)
	}
	trimmed := make([]string, len(values))
	for i, value := range values {
		trimmed[i] = strings.TrimSpace(value)
	}
	return strings.Join(trimmed, ", "), nil
}

// checkDigest compares Content-Digest (RFC 9530) with the body.
func checkDigest(a incoming) error {
	given := a.header.Get("Content-Digest")
	if given == "" {
		return missingHeader("content-digest")
	}
	name, value, _ := strings.Cut(given, "=")
	var sum []byte
	switch name {
	case "sha-256":
		s := sha256.Sum256(a.body)
		sum = s[:]
	case "sha-512":
		s := sha512.Sum512(a.body)
		sum = s[:]
	default:
		return fmt.Errorf("the digest is by %s, and this receiver knows sha-256 and sha-512", clean(name))
	}
	if value != ":"+base64.StdEncoding.EncodeToString(sum)+":" {
		return errors.New("the header Content-Digest is not that of the body")
	}
	return nil
}
