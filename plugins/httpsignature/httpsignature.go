// Package httpsignature signs requests as RFC 9421 (HTTP Message Signatures) says, with the digest of the
// body that RFC 9530 defines.
//
// It owns the signature base: which components of a request are covered, how each is canonicalised, and
// the parameters that say so. The time and the nonce come from the host, so that Ed25519, HMAC and RSA
// PKCS#1 v1.5 give the same bytes for the same request. Every live version of the key signs under a label
// of its own, newest first, so that a receiver verifies throughout a rotation whichever version it has.
// The package verifies nothing.
package httpsignature

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Names of the headers that are set. Content-Digest is set only where it is covered.
const (
	headerInput     = "signature-input"
	headerSignature = "signature"
	headerDigest    = "content-digest"
)

// Config says what is signed and how.
type Config struct {
	Algorithm  string          `json:"algorithm" default:"auto" enum:"auto,hmac-sha256,ed25519,ecdsa-p256-sha256,ecdsa-p384-sha384,rsa-pss-sha512,rsa-v1_5-sha256" doc:"Signature algorithm; auto takes the key's, and rsa-pss-sha512 for an RSA key that does not say."`
	Components []string        `json:"components" default:"[\"@method\",\"@target-uri\",\"content-digest\",\"content-type\",\"webhook-id\"]" doc:"What is covered, in order: header names, @method, @target-uri, @authority, @scheme, @request-target, @path, @query, @query-param;name=\"…\"; a header may have ;bs."`
	Label      string          `json:"label" default:"sig1" doc:"Label of the signature in both headers; further live keys count on from it (sig2)."`
	Tag        string          `json:"tag" default:"webhook" doc:"The tag parameter; empty leaves it out."`
	Alg        bool            `json:"alg" default:"true" doc:"Whether to name the algorithm in the alg parameter."`
	Expires    plugin.Duration `json:"expires" default:"0s" minimum:"0s" maximum:"24h" doc:"How long after its creation a signature expires, in whole seconds; 0s leaves the parameter out."`
	KeyID      string          `json:"keyid" doc:"The keyid parameter. Default: the thumbprint (RFC 7638) of the public key, or the fingerprint of a shared key, as the secret's metadata shows it."`
	Nonce      bool            `json:"nonce" doc:"Whether to add a random nonce, which makes every attempt's signature unique."`
	Digest     string          `json:"digest" default:"sha-256" enum:"sha-256,sha-512" doc:"Hash of the Content-Digest header (RFC 9530)."`
	Key        plugin.Secret   `slot:"key" doc:"Private key, or the shared key of hmac-sha256." required:"true"`
}

// Kind is the signer "http-signature".
func Kind() plugin.Kind {
	return plugin.Signer("http-signature", build,
		plugin.Doc("HTTP Message Signatures (RFC 9421) with Content-Digest; each live key signs under a label of its own"),
		plugin.Emits(headerInput, headerSignature, headerDigest),
		plugin.Example(map[string]any{
			"components": []string{"@method", "@target-uri", headerDigest, "content-type", "webhook-id"}, "tag": "webhook",
		}),
		plugin.Format("key", format()),
		plugin.Nondeterministic(),
		plugin.Check(check))
}

func check(c Config, target plugin.Target) []plugin.Problem {
	var problems []plugin.Problem
	complain := func(pointer string, err error) {
		if err != nil {
			problems = append(problems, plugin.Problem{Pointer: pointer, Summary: err.Error()})
		}
	}
	seen := map[string]bool{}
	for i, text := range c.Components {
		at := "/config/components/" + strconv.Itoa(i)
		component, err := parseComponent(text)
		complain(at, err)
		if err == nil && seen[component.id] {
			complain(at, fmt.Errorf("%s is listed twice", component.id))
		}
		seen[component.id] = true
	}
	complain("/config/label", checkLabel(c.Label))
	complain("/config/tag", checkText(c.Tag))
	complain("/config/keyid", checkText(c.KeyID))
	if whole := c.Expires.Std().Truncate(second); whole != c.Expires.Std() {
		complain("/config/expires", fmt.Errorf("given %s, want whole seconds", c.Expires))
	}
	if target.URL != "" {
		_, err := parseTarget(target.URL)
		complain("/target/uri", err)
	}
	return slices.Concat(problems, warnings(c, target, seen), checkKeys(c))
}

// warnings are of what works and may not be meant.
func warnings(c Config, target plugin.Target, covered map[string]bool) []plugin.Problem {
	var problems []plugin.Problem
	warn := func(pointer, code, summary string) {
		problems = append(problems, plugin.Problem{Pointer: pointer, Code: code, Summary: summary, Warning: true})
	}
	if !slices.ContainsFunc(c.Components, func(text string) bool {
		component, err := parseComponent(text)
		return err != nil || component.name == headerDigest
	}) {
		warn("/config/components", "config.body_not_covered", "the signature does not cover the body; content-digest would")
	}
	u, err := url.Parse(target.URL)
	if err != nil || !covered[`"@authority"`] && !covered[`"@target-uri"`] {
		return problems
	}
	if t, err := parseTarget(target.URL); err == nil && t.authority != u.Host {
		warn("/target/uri", "config.authority",
			"the host is signed as "+t.authority+" (lower case, no default port); write the URI so, lest a receiver compare it with the Host header as sent")
	}
	return problems
}

// checkKeys says which keys do not fit the algorithm, and warns of shared keys that may be misread.
func checkKeys(c Config) []plugin.Problem {
	var problems []plugin.Problem
	for i, value := range c.Key.Values() {
		k, err := parseKey(value, c.Algorithm)
		switch {
		case err != nil:
			problems = append(problems, plugin.Problem{
				Pointer: "/secrets/key", Code: "secret.malformed", Summary: versionText(i, len(c.Key.Values())) + err.Error(),
			})
		case k.private == nil && keys.LooksEncoded(value):
			problems = append(problems, plugin.Problem{
				Pointer: "/secrets/key", Code: "secret.ambiguous", Warning: true,
				Summary: versionText(i, len(c.Key.Values())) + "the shared key looks like base64 or hex, but its text is used as it stands; write base64: before base64 if its bytes are meant",
			})
		}
	}
	return problems
}

func versionText(i, n int) string {
	if n == 1 {
		return ""
	}
	return "live version " + strconv.Itoa(i+1) + " of " + strconv.Itoa(n) + ", newest first: "
}

// checkLabel takes keys of structured dictionaries (RFC 8941 section 3.1.2).
func checkLabel(label string) error {
	for i, c := range []byte(label) {
		switch {
		case 'a' <= c && c <= 'z', c == '*':
		case i > 0 && ('0' <= c && c <= '9' || c == '_' || c == '-' || c == '.'):
		default:
			return fmt.Errorf("given %q, want lower-case letters, digits and _-.*, starting with a letter", label)
		}
	}
	if label == "" || len(label) > 64 {
		return errors.New("a label has 1 to 64 characters")
	}
	return nil
}

// checkText takes what a structured string can hold (RFC 8941 section 3.3.3).
func checkText(text string) error {
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
		return errors.New("only printable ASCII can be written in a parameter")
	}
	if len(text) > 256 {
		return fmt.Errorf("given %d characters, want at most 256", len(text))
	}
	return nil
}

func build(c Config, target plugin.Target) (plugin.SignFunc, error) {
	s := &signer{digest: c.Digest, nonce: c.Nonce, expires: int64(c.Expires.Std() / second)}
	var list strings.Builder
	for _, text := range c.Components {
		component, err := parseComponent(text)
		if err != nil {
			return nil, err
		}
		s.components = append(s.components, component)
		s.digests = s.digests || component.name == headerDigest
		if list.Len() > 0 {
			list.WriteByte(' ')
		}
		list.WriteString(component.id)
	}
	s.list = "(" + list.String() + ");created="
	for i, value := range c.Key.Values() {
		k, err := parseKey(value, c.Algorithm)
		if err != nil {
			return nil, err
		}
		k.label = labelOf(c.Label, i)
		k.params = paramsOf(c, k)
		s.keys = append(s.keys, k)
	}
	if len(s.keys) == 0 {
		return nil, errors.New("no key is given")
	}
	s.url = target.URL
	if t, err := parseTarget(target.URL); err == nil {
		s.target = t
	}
	return s.sign, nil
}

// labelOf is the label of the key at an index: it counts on from the number at the label's end, or from
// 2 where there is none.
func labelOf(label string, index int) string {
	if index == 0 {
		return label
	}
	stem := strings.TrimRight(label, "0123456789")
	number, err := strconv.Atoi(label[len(stem):])
	if err != nil {
		stem, number = label, 1
	}
	return stem + strconv.Itoa(number+index)
}

// paramsOf are the parameters that follow those of time.
func paramsOf(c Config, k *key) string {
	id := c.KeyID
	if id == "" {
		id = k.id
	}
	params := ";keyid=" + quote(id)
	if c.Alg {
		params += ";alg=" + quote(k.scheme)
	}
	if c.Tag != "" {
		params += ";tag=" + quote(c.Tag)
	}
	return params
}

// quote writes a structured string.
func quote(text string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(text) + `"`
}
