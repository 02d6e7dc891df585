package jose

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// JWTConfig says what a token claims.
type JWTConfig struct {
	signing
	Header   string                     `json:"header" default:"authorization" doc:"Name of the header that carries the token."`
	Prefix   *string                    `json:"prefix" doc:"What stands before the token. Default: \"Bearer \" in authorization, nothing in another header."`
	Issuer   string                     `json:"issuer" doc:"The iss claim; empty leaves it out."`
	Subject  string                     `json:"subject" doc:"The sub claim; empty leaves it out."`
	Audience []string                   `json:"audience" doc:"The aud claim: a string when there is one, an array when there are more."`
	Lifetime plugin.Duration            `json:"lifetime" default:"5m" minimum:"1s" maximum:"24h" doc:"How long after the attempt the token expires (exp), in whole seconds."`
	ID       string                     `json:"jti" default:"message" enum:"message,attempt,none" doc:"The jti claim: message is the webhook-id, the same on every attempt; attempt adds a random part, for receivers that take each jti once; none leaves it out."`
	BodyHash string                     `json:"body_hash" doc:"Name of a claim for the SHA-256 of the body, such as request_body_sha256; empty leaves it out, and then the token says nothing about the body."`
	BodyCode string                     `json:"body_hash_encoding" default:"hex" enum:"hex,base64url" doc:"How the claim of body_hash is written."`
	Claims   map[string]json.RawMessage `json:"claims" doc:"Further claims, the same in every token."`
	Type     string                     `json:"typ" default:"JWT" doc:"The typ header; empty leaves it out."`
}

// JWT is the signer "jwt".
func JWT() plugin.Kind {
	return plugin.Signer("jwt", buildJWT,
		plugin.Doc("JSON Web Token (RFC 7519) as bearer token, made for each attempt; one live key signs, see sign_with"),
		plugin.Emits("authorization"), plugin.EmitsFrom(func(c JWTConfig) []string { return []string{c.Header} }),
		plugin.Example(map[string]any{"issuer": "https://example.com", "audience": []string{"receiver"}, "body_hash": "request_body_sha256"}),
		plugin.Format("key", format()),
		plugin.Nondeterministic(),
		plugin.Check(checkJWT))
}

func checkJWT(c JWTConfig, t plugin.Target) []plugin.Problem {
	problems := checkHeader(c.Header, t)
	complain := func(pointer, format string, args ...any) {
		problems = append(problems, plugin.Problem{Pointer: "/config/" + pointer, Summary: fmt.Sprintf(format, args...)})
	}
	if c.Prefix != nil && strings.ContainsFunc(*c.Prefix, func(r rune) bool { return r < ' ' || r > '~' }) {
		complain("prefix", "only printable ASCII can be sent in a header")
	}
	if c.Lifetime.Std()%time.Second != 0 {
		complain("lifetime", "given %s, want whole seconds", c.Lifetime)
	}
	for i, audience := range c.Audience {
		if audience == "" {
			complain(fmt.Sprintf("audience/%d", i), "an audience cannot be empty")
		}
	}
	reserved := []string{"iss", "sub", "aud", "exp", "iat", "jti"}
	if slices.Contains(reserved, c.BodyHash) {
		complain("body_hash", "given %q, which is a claim of its own; take another name, such as request_body_sha256", c.BodyHash)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Claims)) {
		if slices.Contains(reserved, name) || name == c.BodyHash && name != "" {
			complain("claims/"+strings.NewReplacer("~", "~0", "/", "~1").Replace(name), "%q has a field of its own in the config", name)
		}
	}
	return append(problems, c.check()...)
}

func buildJWT(c JWTConfig, _ plugin.Target) (plugin.SignFunc, error) {
	k, err := liveKey(c.Key, c.Algorithm, c.SignWith)
	if err != nil {
		return nil, err
	}
	var protected object
	protected.text("alg", k.alg)
	protected.text("kid", c.kid(k))
	protected.text("typ", c.Type)
	lead := append(base64.RawURLEncoding.AppendEncode(nil, protected.bytes()), '.')
	header := strings.ToLower(c.Header)
	prefix := ""
	switch {
	case c.Prefix != nil:
		prefix = *c.Prefix
	case header == "authorization":
		prefix = "Bearer "
	}
	fixed := fixedClaims(&c)
	return func(r *plugin.Request) error {
		if c.ID == "attempt" && len(r.Nonce) == 0 {
			return errors.New("the host gave no nonce")
		}
		token := base64.RawURLEncoding.AppendEncode(slices.Clone(lead), c.claims(fixed, r))
		signature, err := k.sign(token)
		if err != nil {
			return err
		}
		token = base64.RawURLEncoding.AppendEncode(append(token, '.'), signature)
		return put(r, header, prefix+string(token))
	}, nil
}

// fixedClaims are those that every token has alike.
func fixedClaims(c *JWTConfig) []byte {
	var o object
	o.text("iss", c.Issuer)
	o.text("sub", c.Subject)
	switch len(c.Audience) {
	case 0:
	case 1:
		o.text("aud", c.Audience[0])
	default:
		all, _ := json.Marshal(c.Audience) // strings always marshal
		o.raw("aud", string(all))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Claims)) {
		o.raw(name, string(c.Claims[name]))
	}
	return o.buf
}

// claims are the payload of a request's token.
func (c *JWTConfig) claims(fixed []byte, r *plugin.Request) []byte {
	o := object{buf: slices.Clone(fixed)}
	created := r.Created.Unix()
	o.number("iat", created)
	o.number("exp", created+int64(c.Lifetime.Std()/time.Second))
	switch c.ID {
	case "message":
		o.text("jti", r.MessageID)
	case "attempt":
		o.text("jti", r.MessageID+"."+base64.RawURLEncoding.EncodeToString(r.Nonce))
	}
	if c.BodyHash != "" {
		sum := sha256.Sum256(r.Body)
		value := hex.EncodeToString(sum[:])
		if c.BodyCode == "base64url" {
			value = base64.RawURLEncoding.EncodeToString(sum[:])
		}
		o.text(c.BodyHash, value)
	}
	return o.bytes()
}
