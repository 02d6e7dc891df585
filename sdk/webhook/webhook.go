// Package webhook is the receiver's side of Standard Webhooks: a Verifier that checks who sent a request,
// and a Handler that hands out each verified event once.
//
//	verifier, err := webhook.NewVerifier(os.Getenv("WEBHOOK_SECRET"))
//	...
//	http.Handle("/hooks", webhook.Handler(verifier, func(ctx context.Context, e webhook.Event) error {
//		return store(ctx, e.ID, e.Body)
//	}))
//
// It understands v1 (HMAC-SHA256, secrets whsec_…) and v1a (ed25519, public keys whpk_…) from Grapnel and
// every other sender that follows the specification, and imports only the standard library. A signature
// covers the id, the timestamp and the body; it does not cover other headers, so an Event's Type, Source,
// Subject and Attributes are as trustworthy as the TLS connection they came over.
package webhook

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Names of the headers that a signed request carries.
const (
	HeaderID        = "Webhook-Id"
	HeaderTimestamp = "Webhook-Timestamp"
	HeaderSignature = "Webhook-Signature"
)

// Why a request was not accepted. Verify wraps them with what was wrong; test with errors.Is.
var (
	// ErrMissingHeader means that one of the three headers is absent, empty, too long, or an id that cannot be
	// one: not a webhook.
	ErrMissingHeader = errors.New("webhook header missing")
	// ErrTimestamp means that the timestamp is no number, or further from now than the tolerance.
	ErrTimestamp = errors.New("webhook timestamp not accepted")
	// ErrNoMatch means that no signature is by any of the keys.
	ErrNoMatch = errors.New("no webhook signature matches")
)

// Bounds on what an unverified sender can make a Verifier do.
const (
	maxIDBytes        = 256
	maxSignatures     = 16
	maxSignatureBytes = 128 // one entry, in base64
)

const (
	defaultTolerance = 5 * time.Minute
	minSecretBytes   = 24
	maxSecretBytes   = 64
)

// Verifier checks signatures against one or more keys. Immutable and safe for concurrent use.
type Verifier struct {
	secrets   [][]byte
	publics   []ed25519.PublicKey
	tolerance time.Duration
	now       func() time.Time
}

// Option changes a Verifier; see Verifier.With.
type Option func(*Verifier)

// Tolerance is how far from now a timestamp may be, either way; 5 minutes when not set. It bounds how
// long a captured request can be played again.
func Tolerance(d time.Duration) Option { return func(v *Verifier) { v.tolerance = d } }

// Clock replaces time.Now.
func Clock(now func() time.Time) Option { return func(v *Verifier) { v.now = now } }

// NewVerifier takes the keys that may have signed: shared secrets (whsec_…) and public keys (whpk_…).
// Give the old and the new one while a rotation is going on. Its error never shows a key.
func NewVerifier(secrets ...string) (*Verifier, error) {
	if len(secrets) == 0 {
		return nil, errors.New("webhook: no key is given")
	}
	v := &Verifier{tolerance: defaultTolerance, now: time.Now}
	for i, text := range secrets {
		if err := v.add(text); err != nil {
			return nil, fmt.Errorf("webhook: key %d of %d: %w", i+1, len(secrets), err)
		}
	}
	return v, nil
}

// With returns a copy that the options have changed.
func (v *Verifier) With(opts ...Option) *Verifier {
	changed := *v
	for _, o := range opts {
		o(&changed)
	}
	return &changed
}

func (v *Verifier) add(text string) error {
	kind, encoded, _ := strings.Cut(text, "_")
	switch kind {
	case "whsec", "whpk":
	case "whsk":
		return errors.New("this is a private key (whsk_); a receiver needs the public one (whpk_)")
	default:
		return errors.New("it starts with neither whsec_ nor whpk_")
	}
	raw, err := decode(encoded)
	if err != nil {
		return errors.New("the part after the prefix is not standard base64")
	}
	if kind == "whpk" {
		if len(raw) != ed25519.PublicKeySize {
			return fmt.Errorf("a public key is %d bytes before base64; this one is %d", ed25519.PublicKeySize, len(raw))
		}
		v.publics = append(v.publics, raw)
		return nil
	}
	if len(raw) < minSecretBytes || len(raw) > maxSecretBytes {
		return fmt.Errorf("a secret is %d to %d bytes before base64; this one is %d", minSecretBytes, maxSecretBytes, len(raw))
	}
	v.secrets = append(v.secrets, raw)
	return nil
}

// Verify returns nil when body, exactly as received, was signed by one of the keys within the tolerance.
// Otherwise the error wraps ErrMissingHeader, ErrTimestamp or ErrNoMatch.
func (v *Verifier) Verify(header http.Header, body []byte) error {
	_, err := v.verify(header, body)
	return err
}

// verify also returns the timestamp.
func (v *Verifier) verify(header http.Header, body []byte) (time.Time, error) {
	at, err := v.plausible(header)
	if err != nil {
		return time.Time{}, err
	}
	lead := header.Get(HeaderID) + "." + header.Get(HeaderTimestamp) + "."
	if err := v.match(lead, body, header.Values(HeaderSignature)); err != nil {
		return time.Time{}, err
	}
	return at, nil
}

// plausible checks what can be checked without a body.
func (v *Verifier) plausible(header http.Header) (time.Time, error) {
	id, timestamp := header.Get(HeaderID), header.Get(HeaderTimestamp)
	signatures := header.Values(HeaderSignature)
	switch {
	case id == "":
		return time.Time{}, fmt.Errorf("%w: %s", ErrMissingHeader, HeaderID)
	case len(id) > maxIDBytes:
		return time.Time{}, fmt.Errorf("%w: %s is longer than %d bytes", ErrMissingHeader, HeaderID, maxIDBytes)
	case !isID(id):
		// With a dot, the signature of one message would be that of another with a longer id as well.
		return time.Time{}, fmt.Errorf("%w: %s may have visible ASCII characters but no dot", ErrMissingHeader, HeaderID)
	case timestamp == "":
		return time.Time{}, fmt.Errorf("%w: %s", ErrMissingHeader, HeaderTimestamp)
	case len(signatures) == 0 || signatures[0] == "":
		return time.Time{}, fmt.Errorf("%w: %s", ErrMissingHeader, HeaderSignature)
	}
	return v.parseTimestamp(timestamp)
}

func isID(id string) bool {
	return strings.IndexFunc(id, func(r rune) bool { return r <= ' ' || r > '~' || r == '.' }) < 0
}

func (v *Verifier) parseTimestamp(text string) (time.Time, error) {
	// ParseUint takes digits only: no sign, no space, nothing that two sides could read differently.
	seconds, err := strconv.ParseUint(text, 10, 40)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: not unix seconds", ErrTimestamp)
	}
	at := time.Unix(int64(seconds), 0)
	switch age := v.now().Sub(at); {
	case age > v.tolerance:
		return time.Time{}, fmt.Errorf("%w: too old, by %s where %s is allowed", ErrTimestamp, age.Round(time.Second), v.tolerance)
	case age < -v.tolerance:
		return time.Time{}, fmt.Errorf("%w: too far in the future, by %s where %s is allowed; are both clocks right?", ErrTimestamp, -age.Round(time.Second), v.tolerance)
	}
	return at, nil
}

// match returns nil when any of the signatures is by any of the keys. Entries of unknown versions are skipped,
// as the specification asks.
func (v *Verifier) match(lead string, body []byte, signatures []string) error {
	macs, points := readSignatures(signatures)
	switch {
	case v.matchHMAC(lead, body, macs), v.matchEd25519(lead, body, points):
		return nil
	case len(macs) == 0 && len(points) == 0:
		return fmt.Errorf("%w: there is no well-formed one of version v1 or v1a", ErrNoMatch)
	case len(macs) == 0 && len(v.publics) == 0:
		return fmt.Errorf("%w: they are of version v1a, for which a public key (whpk_) is needed", ErrNoMatch)
	case len(points) == 0 && len(v.secrets) == 0:
		return fmt.Errorf("%w: they are of version v1, for which a secret (whsec_) is needed", ErrNoMatch)
	}
	return fmt.Errorf("%w: %d of version v1 and %d of v1a against %d secrets and %d public keys; it must be the body as received, byte for byte",
		ErrNoMatch, len(macs), len(points), len(v.secrets), len(v.publics))
}

// readSignatures takes the well-formed among the first entries: there are more than a rotation ever makes, and
// each costs a verification.
func readSignatures(lines []string) (macs, points [][]byte) {
	entries := 0
	for _, line := range lines {
		for entry := range strings.FieldsSeq(line) {
			if entries++; entries > maxSignatures {
				return macs, points
			}
			version, encoded, _ := strings.Cut(entry, ",")
			if len(encoded) > maxSignatureBytes {
				continue
			}
			// Strict, so that a signature has one spelling only, but for its padding.
			raw, err := base64.RawStdEncoding.Strict().DecodeString(strings.TrimRight(encoded, "="))
			switch {
			case err != nil:
			case version == "v1" && len(raw) == sha256.Size:
				macs = append(macs, raw)
			case version == "v1a" && len(raw) == ed25519.SignatureSize:
				points = append(points, raw)
			}
		}
	}
	return macs, points
}

func (v *Verifier) matchHMAC(lead string, body []byte, given [][]byte) bool {
	if len(given) == 0 {
		return false
	}
	found := false
	for _, secret := range v.secrets {
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(lead))
		mac.Write(body)
		want := mac.Sum(nil)
		for _, g := range given {
			found = hmac.Equal(want, g) || found // no early end: time says nothing about which
		}
	}
	return found
}

func (v *Verifier) matchEd25519(lead string, body []byte, given [][]byte) bool {
	if len(given) == 0 || len(v.publics) == 0 {
		return false
	}
	content := append([]byte(lead), body...)
	for _, public := range v.publics {
		for _, g := range given {
			if ed25519.Verify(public, content, g) {
				return true
			}
		}
	}
	return false
}

// decode reads standard base64, padded or not.
func decode(text string) ([]byte, error) {
	return base64.RawStdEncoding.DecodeString(strings.TrimRight(text, "="))
}
