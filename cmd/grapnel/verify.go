package main

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	firstparty "github.com/grapnel/grapnel/plugins"
	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/webhook"
)

// incoming is a request as it was received.
type incoming struct {
	method, url string
	header      http.Header
	body        []byte
	at          time.Time
}

// verifier returns nil when a request's signature is by its key.
type verifier func(incoming) error

// errNoMatch is what every verifier says of a wrong signature.
var errNoMatch = errors.New("no signature fits the key")

// tolerance is how far the time in a signature may be from now, either way.
const tolerance = 5 * time.Minute

func missingHeader(name string) error {
	return fmt.Errorf("the header %s is missing", http.CanonicalHeaderKey(name))
}

func checkTime(at, now time.Time) error {
	if d := now.Sub(at); d > tolerance || d < -tolerance {
		return fmt.Errorf("the signature fits, but its time %s is more than %s from now", at.UTC().Format(time.RFC3339), shortDuration(tolerance))
	}
	return nil
}

// schemes are the signers whose signatures receive verifies.
func schemes() []string {
	return []string{
		"standard-webhooks", "svix", "stripe", "github", "slack", "shopify", "twilio", "square", "http-signature", "sigv4", "jws", "jwt",
		"convoy", "outpost", "webhookx", "hook0", "hmac",
	}
}

// newVerifier makes the verifier of a scheme. Its error shows nothing of the key.
func newVerifier(scheme string, config []byte, key, target string) (verifier, error) {
	switch {
	case !slices.Contains(schemes(), scheme):
		known := didYouMean(scheme, schemes())
		if known == "" {
			known = "; there are " + strings.Join(schemes(), ", ")
		}
		return nil, fmt.Errorf("there is no --scheme %s%s", scheme, known)
	case scheme == "standard-webhooks":
		return standardWebhooks(key, "webhook-")
	case scheme == "svix":
		return standardWebhooks(key, "svix-")
	case scheme == "jws" || scheme == "jwt":
		return joseVerifier(scheme, config, key)
	case scheme == "http-signature" && !keys.IsShared([]byte(key)):
		return messageSignature(key, target)
	}
	if len(bytes.TrimSpace(config)) == 0 {
		config = []byte(`{}`)
		if scheme == "shopify" { // the signature does not depend on it
			config = []byte(`{"shop_domain":"any.myshopify.com"}`)
		}
	}
	again := &signAgain{scheme: scheme, config: config, key: key, url: target}
	_, err := again.open(cmp.Or(target, "http://127.0.0.1/"))
	return again.verify, err
}

func standardWebhooks(key, prefix string) (verifier, error) {
	v, err := webhook.NewVerifier(key)
	if err != nil {
		return nil, err
	}
	return func(a incoming) error {
		h := http.Header{}
		for _, part := range []string{"id", "timestamp", "signature"} {
			values := a.header.Values(prefix + part)
			if len(values) == 0 {
				return missingHeader(prefix + part)
			}
			h[http.CanonicalHeaderKey("webhook-"+part)] = values
		}
		return v.With(webhook.Clock(func() time.Time { return a.at })).Verify(h, a.body)
	}, nil
}

// timed verifies t=UNIX,v1=HEX[,v1=HEX] over "ID.UNIX.BODY".
func timed(name, key string) verifier {
	return func(a incoming) error {
		header := a.header.Get(name)
		if header == "" {
			return missingHeader(name)
		}
		var at string
		for part := range strings.SplitSeq(header, ",") {
			name, value, _ := strings.Cut(part, "=")
			switch name {
			case "t":
				at = value
			case "v1":
				mac := hmac.New(sha256.New, []byte(key))
				fmt.Fprintf(mac, "%s.%s.%s", a.header.Get("Webhook-Id"), at, a.body)
				if given, err := hex.DecodeString(value); err == nil && hmac.Equal(given, mac.Sum(nil)) {
					return nil
				}
			}
		}
		return errNoMatch
	}
}

// signAgain verifies by signing the request once more, with the signer itself: what depends on the body in the headers that
// the signer sets must be in those that were received. That holds for every scheme in which the receiver has the sender's
// key and the same request gives the same signature.
type signAgain struct {
	scheme string
	config []byte
	key    string
	url    string // as the subscription has it; empty: as it was asked for
}

func (s *signAgain) open(target string) (*plugin.Local, error) {
	for _, k := range firstparty.Kinds() {
		if k.ID() == s.scheme {
			return plugin.OpenLocal(k, s.config, map[string][][]byte{usualSlot: {[]byte(s.key)}}, plugin.Target{URL: target, Method: http.MethodPost})
		}
	}
	return nil, fmt.Errorf("there is no signer %q", s.scheme)
}

func (s *signAgain) verify(a incoming) error {
	target := cmp.Or(s.url, a.url)
	target = withoutQuery(target, "bodySHA256") // Twilio's signer has put it there
	local, err := s.open(target)
	if err != nil {
		return err
	}
	sign := func(at time.Time, nonce, body []byte) (*plugin.Request, error) {
		r := &plugin.Request{
			MessageID: cmp.Or(a.header.Get("Webhook-Id"), "msg"), EventType: cmp.Or(a.header.Get("Ce-Type"), "event"), Created: at, Nonce: nonce,
			Method: a.method, URL: target, Body: body, AttemptNumber: 1,
		}
		for name, values := range a.header {
			if slices.ContainsFunc(local.Emits(), func(e string) bool { return strings.EqualFold(e, name) }) {
				continue
			}
			for _, value := range values {
				r.Add(name, value)
			}
		}
		return r, local.Sign(r)
	}
	var texts []string
	for _, name := range local.Emits() {
		texts = append(texts, a.header.Values(name)...)
	}
	nonces := append(noncesIn(texts), make([]byte, 16))
	var lacks error
	for _, at := range append(timesIn(texts), a.at) {
		for _, nonce := range nonces {
			signed, err := sign(at, nonce, a.body)
			if err != nil {
				return err
			}
			other, err := sign(at, nonce, append(bytes.Clone(a.body), 0))
			if err != nil {
				return err
			}
			fits, carried := true, false
			for _, name := range local.Emits() {
				want := signed.Get(name)
				if want == other.Get(name) {
					continue // says nothing about the body
				}
				carried = true
				got := a.header.Values(name)
				if len(got) == 0 {
					lacks = missingHeader(name)
				}
				fits = fits && slices.ContainsFunc(got, func(g string) bool { return holds(g, want) })
			}
			if !carried {
				return errors.New("the signature says nothing about the body: there is nothing to verify")
			}
			if !fits {
				continue
			}
			later, err := sign(at.Add(time.Hour), nonce, a.body)
			if err == nil && differs(signed, later, other, local.Emits()) {
				return checkTime(at, a.at)
			}
			return nil
		}
	}
	return cmp.Or(lacks, errNoMatch)
}

// differs reports whether a header that depends on the body depends on the time too.
func differs(signed, later, other *plugin.Request, names []string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		return signed.Get(name) != other.Get(name) && signed.Get(name) != later.Get(name)
	})
}

// holds reports whether every part of want is a part of got: a header may carry the signatures of more keys than one.
func holds(got, want string) bool {
	parts := func(text string) []string {
		return strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(",;= ", r) })
	}
	have := parts(got)
	for _, part := range parts(want) {
		if !slices.Contains(have, part) {
			return false
		}
	}
	return true
}

func withoutQuery(target, parameter string) string {
	u, err := url.Parse(target)
	if err != nil || !strings.Contains(u.RawQuery, parameter+"=") {
		return target
	}
	kept := slices.DeleteFunc(strings.Split(u.RawQuery, "&"), func(pair string) bool { return strings.HasPrefix(pair, parameter+"=") })
	u.RawQuery = strings.Join(kept, "&")
	return u.String()
}

// mostCandidates bounds what an unverified sender can make a verifier try.
const mostCandidates = 8

// timesIn are the times in headers, in the forms that schemes write them.
func timesIn(texts []string) []time.Time {
	var times []time.Time
	form := regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z|\d{8}T\d{6}Z|\b\d{10}(\d{3})?\b`)
	for _, text := range texts {
		for _, word := range form.FindAllString(text, mostCandidates) {
			at, err := time.Parse(time.RFC3339Nano, word)
			if err != nil {
				at, err = time.Parse("20060102T150405Z", word)
			}
			if n, numberErr := strconv.ParseInt(word, 10, 64); numberErr == nil {
				at, err = time.Unix(n, 0), nil
				if len(word) == 13 {
					at = time.UnixMilli(n)
				}
			}
			if err == nil && len(times) < mostCandidates {
				times = append(times, at)
			}
		}
	}
	return times
}

// noncesIn are words of 16 bytes in hex.
func noncesIn(texts []string) [][]byte {
	var nonces [][]byte
	form := regexp.MustCompile(`\b[0-9a-f]{32}\b`)
	for _, text := range texts {
		for _, word := range form.FindAllString(text, mostCandidates) {
			if raw, err := hex.DecodeString(word); err == nil && len(nonces) < mostCandidates {
				nonces = append(nonces, raw)
			}
		}
	}
	return nonces
}
