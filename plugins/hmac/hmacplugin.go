// Package hmacplugin signs requests with HMAC over a template. One engine serves the generic kind "hmac",
// whose templates are in the subscription's config, and the schemes of Stripe, GitHub, Slack, Shopify,
// Square, Convoy, Outpost, WebhookX and Hook0, which are declared as data, one small file each.
//
// In a template {id} is the message id, {timestamp} the time of the attempt, {body} the body byte for
// byte, {method}, {url}, {host}, {path} and {query} come from the request's line, {nonce} is 16 random
// bytes in hex, {type} the event's type, {header:NAME} a header of the request; {signature} is one
// signature, and {signatures} the list of all live keys'. A literal brace is doubled.
//
// The package guarantees that the same request gives the same bytes, that what is signed is what is sent
// (a header that the request lacks is an error, never an empty text), that no header of another's is
// overwritten, and that errors show nothing of a secret. It verifies nothing.
package hmacplugin

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// Kinds are all signers of this package.
func Kinds() []plugin.Kind {
	return []plugin.Kind{
		stripe(), github(), slack(), shopify(), square(), convoy(), outpost(), webhookx(), hook0(), generic(),
	}
}

// Config is what a subscription says about a house format.
type Config struct {
	oneKey
	Algorithm       string            `json:"algorithm" default:"sha256" enum:"sha256,sha512,sha1" doc:"Hash of the HMAC."`
	Encoding        string            `json:"encoding" default:"hex" enum:"hex,base64,base64url" doc:"How a signature is written: hex in lower case, base64 with padding, or base64url without."`
	KeyEncoding     string            `json:"key_encoding" default:"raw" enum:"raw,hex,base64" doc:"How the secret is written: raw uses its text as it is, hex and base64 are decoded first."`
	Content         string            `json:"content" required:"true" doc:"Template of what is signed, such as {id}.{timestamp}.{body}. Variables: {id} {timestamp} {body} {method} {url} {host} {path} {query} {nonce} {type} {header:NAME}; a literal brace is doubled."`
	Headers         map[string]string `json:"headers" required:"true" doc:"Headers to set, by name, each a template: t={timestamp},v1={signature}. The variables are those of content but {body}, and two more. {signature} is one signature; while two keys are live, sign_with says whose. {signatures} is a list with the signature of every live key, newest first, made by signature_each and signature_join."`
	SignatureEach   string            `json:"signature_each" default:"{signature}" doc:"Template of one entry of {signatures}, such as v1={signature}."`
	SignatureJoin   string            `json:"signature_join" default:"," doc:"What stands between two entries of {signatures}."`
	TimestampFormat string            `json:"timestamp_format" default:"s" enum:"s,ms,rfc3339" doc:"How {timestamp} is written: unix seconds, unix milliseconds, or as 2006-01-02T15:04:05Z."`
}

// generic is the kind whose scheme is in its config.
func generic() plugin.Kind {
	secret := secretText{
		doc:       "any text of 16 characters or more, or hex or base64 of 16 bytes or more if key_encoding says so",
		algorithm: "hmac",
		// Digits and lower-case letters a to f, four by four: right for every key_encoding.
		make:   func() []byte { return []byte(randomHex(32)) },
		blanks: true,
	}
	build := func(c Config, _ plugin.Target) (plugin.SignFunc, error) {
		keys, problem := c.decodeKeys()
		if problem != nil {
			return nil, errors.New(problem.Summary)
		}
		_, oldest := c.live()
		s, faults := compile(c.scheme(), keys, oldest)
		if len(faults) > 0 {
			return nil, faults[0]
		}
		return s.sign, nil
	}
	return plugin.Signer("hmac", build,
		plugin.Doc("HMAC over a template of your own, put into headers of your own, for house formats"),
		plugin.Example(map[string]any{
			"content": "{id}.{timestamp}.{body}", "headers": map[string]string{"X-Signature": "t={timestamp},{signatures}"},
			"signature_each": "v1={signature}",
		}),
		plugin.EmitsFrom(func(c Config) []string { return slices.Collect(maps.Keys(c.Headers)) }),
		plugin.Format("key", secret.format()),
		plugin.Check(check))
}

func (c Config) scheme() scheme {
	s := scheme{
		algorithm: c.Algorithm, encoding: c.Encoding, content: c.Content,
		each: c.SignatureEach, join: c.SignatureJoin, timestamp: c.TimestampFormat,
	}
	for _, name := range slices.Sorted(maps.Keys(c.Headers)) {
		s.headers = append(s.headers, header{name: name, value: c.Headers[name]})
	}
	return s
}

// decodeKeys are the raw keys, newest first.
func (c Config) decodeKeys() ([][]byte, *plugin.Problem) {
	values, _ := c.live()
	keys := make([][]byte, len(values))
	for i, value := range values {
		raw, err := decodeKey(c.KeyEncoding, string(value))
		if err == nil && len(raw) < minSecret {
			err = fmt.Errorf("the key has %d bytes when decoded, want at least %d", len(raw), minSecret)
		}
		if err != nil {
			which := ""
			if len(values) > 1 {
				which = fmt.Sprintf("live version %d of %d, newest first: ", i+1, len(values))
			}
			return nil, &plugin.Problem{Pointer: "/secrets/key", Code: "secret.malformed", Summary: which + err.Error()}
		}
		keys[i] = raw
	}
	return keys, nil
}

// decodeKey's errors show nothing of the value, so they leave out what the decoders say.
func decodeKey(encoding, value string) ([]byte, error) {
	switch encoding {
	case "hex":
		raw, err := hex.DecodeString(value)
		if err != nil {
			return nil, errors.New("the secret is not hex, as key_encoding says; want an even number of hexadecimal digits, or key_encoding raw")
		}
		return raw, nil
	case "base64":
		raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(value, "="))
		if err != nil {
			return nil, errors.New("the secret is not standard base64 (with + and /), as key_encoding says; want that, or key_encoding raw")
		}
		return raw, nil
	}
	return []byte(value), nil
}
