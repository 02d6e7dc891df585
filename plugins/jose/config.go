package jose

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// signing is what both kinds are told about their key.
type signing struct {
	Algorithm string        `json:"algorithm" default:"auto" enum:"auto,HS256,HS384,HS512,EdDSA,ES256,ES384,RS256,PS256" doc:"Signature algorithm; auto takes the key's: RS256 for an RSA key that does not say, for a shared key the longest hash that it is long enough for."`
	KeyID     *string       `json:"kid" doc:"The kid header. Default: the thumbprint (RFC 7638) of the public key, none for a shared key; empty leaves it out."`
	SignWith  string        `json:"sign_with" default:"newest" enum:"newest,oldest" doc:"Which live key signs while a rotation overlaps: there is room for one signature. With oldest, receivers can be given the new key before it is used."`
	Key       plugin.Secret `slot:"key" doc:"Private key, or the shared key of HS256, HS384 and HS512." required:"true"`
}

func (s *signing) check() []plugin.Problem {
	var problems []plugin.Problem
	values := s.Key.Values()
	for i, value := range values {
		which := ""
		if len(values) > 1 {
			which = "live version " + strconv.Itoa(i+1) + " of " + strconv.Itoa(len(values)) + ", newest first: "
		}
		k, err := parseKey(value, s.Algorithm)
		switch {
		case err != nil:
			problems = append(problems, plugin.Problem{Pointer: "/secrets/key", Code: "secret.malformed", Summary: which + err.Error()})
		case k.secret != nil && keys.LooksEncoded(value):
			problems = append(problems, plugin.Problem{
				Pointer: "/secrets/key", Code: "secret.ambiguous", Warning: true,
				Summary: which + "the shared key looks like base64 or hex, but its text is used as it stands; write base64: before base64 if its bytes are meant",
			})
		}
	}
	return problems
}

// kid is the kid header of a key; empty leaves it out.
func (s *signing) kid(k *key) string {
	if s.KeyID != nil {
		return *s.KeyID
	}
	return k.id
}

// checkHeader takes the name of a header that the signature can go in.
func checkHeader(name string, target plugin.Target) []plugin.Problem {
	problem := func(format string, args ...any) []plugin.Problem {
		return []plugin.Problem{{Pointer: "/config/header", Summary: fmt.Sprintf(format, args...)}}
	}
	lower := strings.ToLower(name)
	for i := range len(lower) {
		if c := lower[i]; c <= ' ' || c > '~' || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return problem("given %q, which is no header name", name)
		}
	}
	taken := strings.HasPrefix(lower, "ce-")
	switch lower {
	case "":
		return problem("a header name is missing")
	case "host", "content-length", "content-type", "content-encoding", "transfer-encoding", "connection", "te", "trailer", "upgrade",
		"expect", "keep-alive", "accept-encoding", "user-agent", "traceparent", "tracestate", "webhook-id":
		taken = true
	}
	if taken {
		return problem("given %q, which is set by others; take one of your own, such as x-jws-signature", name)
	}
	for _, h := range target.Headers {
		if strings.EqualFold(h.Name, name) {
			return problem("the subscription sets a header %q itself; the signature needs one of its own", lower)
		}
	}
	return nil
}

// put sets a header that nobody else has set.
func put(r *plugin.Request, name, value string) error {
	if r.Get(name) != "" {
		return fmt.Errorf("the request has a %s header already; two signers would overwrite each other", name)
	}
	r.Set(name, value)
	return nil
}

// object writes a JSON object member by member, in the order given.
type object struct{ buf []byte }

func (o *object) name(name string) {
	if len(o.buf) == 0 {
		o.buf = append(o.buf, '{')
	} else {
		o.buf = append(o.buf, ',')
	}
	o.buf = append(appendString(o.buf, name), ':')
}

// text adds a string, unless it is empty.
func (o *object) text(name, value string) {
	if value != "" {
		o.name(name)
		o.buf = appendString(o.buf, value)
	}
}

func (o *object) number(name string, value int64) {
	o.name(name)
	o.buf = strconv.AppendInt(o.buf, value, 10)
}

// raw adds JSON.
func (o *object) raw(name, value string) {
	o.name(name)
	o.buf = append(o.buf, value...)
}

func (o *object) bytes() []byte {
	if len(o.buf) == 0 {
		return []byte("{}")
	}
	return append(o.buf, '}')
}

func appendString(dst []byte, text string) []byte {
	quoted, _ := json.Marshal(text) // a string always marshals
	return append(dst, quoted...)
}

func format() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc:        "a private key as PEM (PKCS#8, SEC 1, PKCS#1), JSON Web Key or whsk_…; or a shared key of 32 bytes or more: " + keys.SharedDoc,
		Algorithms: algorithms(),
		Generate:   generate,
		Read: func(value []byte) (plugin.SecretInfo, error) {
			k, err := parseKey(value, "auto")
			if err != nil {
				return plugin.SecretInfo{}, err
			}
			info := plugin.SecretInfo{Algorithm: k.alg, KeyID: k.id}
			if k.private != nil {
				info.PublicKey, info.JWK = k.private.PublicPEM(), k.private.JWK()
			}
			return info, nil
		},
	}
}

// generate writes RSA keys as JSON Web Keys, which can say which algorithm they are for.
func generate(alg string) ([]byte, error) {
	if _, size := hashOf(alg); size > 0 {
		secret := make([]byte, size)
		rand.Read(secret) // never fails
		return []byte("base64:" + base64.StdEncoding.EncodeToString(secret)), nil
	}
	scheme := schemeOf(alg)
	if alg == PS256 || alg == RS256 {
		scheme = keys.RSA
	}
	value, err := keys.Generate(scheme)
	if err != nil || scheme != keys.RSA {
		return value, err
	}
	k, err := keys.Parse(value)
	if err != nil {
		return nil, errors.New("the key made cannot be read back")
	}
	return k.PrivateJWK(alg), nil
}
