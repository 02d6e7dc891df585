package jose

import (
	"encoding/base64"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// JWSConfig says how a body is signed.
type JWSConfig struct {
	signing
	Header string `json:"header" default:"x-jws-signature" doc:"Name of the header that carries the signature."`
	B64    bool   `json:"b64" default:"true" doc:"Whether the body is base64url-encoded before it is signed, as RFC 7515 does; false signs its bytes (RFC 7797), which not every verifier knows."`
	IAT    bool   `json:"iat" default:"true" doc:"Whether the protected header says when the attempt was made (iat, unix seconds)."`
	Type   string `json:"typ" doc:"The typ header; empty leaves it out."`
}

// JWS is the signer "jws".
func JWS() plugin.Kind {
	return plugin.Signer("jws", buildJWS,
		plugin.Doc("Detached JSON Web Signature of the body (RFC 7515, RFC 7797) in a header; one live key signs, see sign_with"),
		plugin.Emits("x-jws-signature"), plugin.EmitsFrom(func(c JWSConfig) []string { return []string{c.Header} }),
		plugin.Example(map[string]any{"header": "x-jws-signature"}),
		plugin.Format("key", format()),
		plugin.Nondeterministic(),
		plugin.Check(func(c JWSConfig, t plugin.Target) []plugin.Problem {
			return append(checkHeader(c.Header, t), c.check()...)
		}))
}

func buildJWS(c JWSConfig, _ plugin.Target) (plugin.SignFunc, error) {
	k, err := liveKey(c.Key, c.Algorithm, c.SignWith)
	if err != nil {
		return nil, err
	}
	header, kid := strings.ToLower(c.Header), c.kid(k)
	return func(r *plugin.Request) error {
		var protected object
		protected.text("alg", k.alg)
		if !c.B64 {
			protected.raw("b64", "false")
			protected.raw("crit", `["b64"]`)
		}
		if c.IAT {
			protected.number("iat", r.Created.Unix())
		}
		protected.text("kid", kid)
		protected.text("typ", c.Type)
		lead := append(base64.RawURLEncoding.AppendEncode(nil, protected.bytes()), '.')
		payload := r.Body
		if c.B64 {
			payload = base64.RawURLEncoding.AppendEncode(make([]byte, 0, base64.RawURLEncoding.EncodedLen(len(r.Body))), r.Body)
		}
		signature, err := k.sign(lead, payload)
		if err != nil {
			return err
		}
		return put(r, header, string(base64.RawURLEncoding.AppendEncode(append(lead, '.'), signature)))
	}, nil
}
