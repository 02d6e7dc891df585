// Package twilio signs requests as Twilio does (https://www.twilio.com/docs/usage/security): HMAC-SHA1
// over the URL, and over what a form has in it; any other body is bound by its SHA-256, which the signer
// puts into the URL's query as bodySHA256.
//
// The package refuses what the official libraries (npm twilio, twilio-go) read differently: a form that has
// a key twice with two values, escapes that mean nothing, or text that is not UTF-8. Fields are signed in
// the order of their keys, as Twilio's documentation has it; twilio-go orders key and value run together,
// and so fails on a form like A=z&AB=1. The URL is signed as the subscription has it, with a path of at
// least "/"; the libraries try it with and without a port, so https://host and https://host:443 are
// alike. There is no time in a signature, so a receiver cannot tell a replay.
package twilio

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // the scheme is defined with it
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strings"
	"sync"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	headerSignature = "x-twilio-signature"
	// digestParameter is where Twilio puts the hash of a body that is not a form. Libraries look for the
	// word anywhere in the URL.
	digestParameter = "bodySHA256"
	// tokenLength is that of every auth token Twilio has given out, in hexadecimal digits.
	tokenLength = 32
)

// Config is what a subscription says about its signatures.
type Config struct {
	Key      plugin.Secret `json:"-" slot:"key" doc:"Auth token that the receiver verifies with: 32 hexadecimal digits, used as text." required:"true"`
	SignWith string        `json:"sign_with" default:"newest" enum:"newest,oldest" doc:"Which of two live versions of the secret signs, for there is room for one signature. newest: the new one at once, so receivers must accept both while they overlap. oldest: the old one until its overlap ends, so that receivers can be switched meanwhile."`
}

// Kind is the signer "twilio".
func Kind() plugin.Kind {
	return plugin.Signer("twilio", build,
		plugin.Doc("X-Twilio-Signature as Twilio signs (https://www.twilio.com/docs/usage/security); forms, or other bodies by "+
			"bodySHA256 in the query; without a time; one signature: sign_with says which key signs during a rotation"),
		plugin.Emits(headerSignature),
		plugin.Example(struct{}{}),
		plugin.Check(check),
		plugin.Format("key", plugin.SecretFormat{
			Doc:        "32 hexadecimal digits, used as text",
			Algorithms: []string{"hmac-sha1"},
			Generate: func(string) ([]byte, error) {
				raw := make([]byte, tokenLength/2)
				_, _ = rand.Read(raw) // never fails
				return hex.AppendEncode(nil, raw), nil
			},
			Read: func(value []byte) (plugin.SecretInfo, error) {
				return plugin.SecretInfo{Algorithm: "hmac-sha1"}, checkToken(string(value))
			},
		}))
}

// checkToken says what is wrong with an auth token, and shows nothing of it. A short one passes, for
// receivers in tests have such; check warns of it.
func checkToken(token string) error {
	switch {
	case token == "":
		return errors.New("no auth token is given")
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		return errors.New("the auth token has a blank, a line break or a character outside ASCII in or around it; want 32 hexadecimal digits")
	case len(token) == tokenLength+2 && strings.HasPrefix(token, "AC"):
		return errors.New("this begins with AC and has 34 characters, so it is an account SID; want the auth token beside it, 32 hexadecimal digits")
	case len(token) == tokenLength+2 && strings.HasPrefix(token, "SK"):
		return errors.New("this begins with SK and has 34 characters, so it is an API key SID; want the auth token, 32 hexadecimal digits")
	}
	return nil
}

func check(c Config, t plugin.Target) []plugin.Problem {
	var problems []plugin.Problem
	if strings.Contains(t.URL, digestParameter) {
		problems = append(problems, plugin.Problem{
			Pointer: "/target/uri", Code: "target.query",
			Summary: "has " + digestParameter + " in it, which receivers look for and only the signer may set; take it out",
		})
	}
	for _, token := range c.Key.Values() {
		if len(token) < tokenLength {
			problems = append(problems, plugin.Problem{
				Pointer: "/secrets/key", Code: "secret.short", Warning: true,
				Summary: fmt.Sprintf("an auth token has %d characters, want %d: a shorter one can be guessed from one signed request", len(token), tokenLength),
			})
		}
	}
	return problems
}

func build(c Config, _ plugin.Target) (plugin.SignFunc, error) {
	values := c.Key.Values()
	if len(values) == 0 {
		return nil, errors.New("no auth token is given")
	}
	token := values[0]
	if c.SignWith == "oldest" {
		token = values[len(values)-1]
	}
	s := &signer{}
	s.states.New = func() any { return &state{mac: hmac.New(sha1.New, token), buf: make([]byte, 0, 512)} }
	return s.sign, nil
}

// signer is one instance. It is immutable but for its pool of keyed states.
type signer struct {
	states sync.Pool // of *state
}

// state is a keyed HMAC and room for what is signed.
type state struct {
	mac hash.Hash
	buf []byte
}

func (s *signer) sign(r *plugin.Request) error {
	form := isForm(r.Get("content-type"))
	if strings.Contains(r.URL, digestParameter) {
		return fmt.Errorf("the URL has %s in it already", digestParameter)
	}
	if encoding := r.Get("content-encoding"); form && encoding != "" {
		return fmt.Errorf("the body is a form in content-encoding %q, whose fields cannot be signed; send it uncompressed", encoding)
	}
	if !form && (len(r.Body) > 0 || carriesBody(r.Method)) {
		r.URL = withDigest(r.URL, r.Body)
	}
	st := s.states.Get().(*state)
	defer s.states.Put(st)
	st.buf = appendURL(st.buf[:0], r.URL)
	if form {
		var err error
		if st.buf, err = appendForm(st.buf, string(r.Body)); err != nil {
			return err
		}
	}
	st.mac.Reset()
	st.mac.Write(st.buf)
	st.buf = st.mac.Sum(st.buf[:0])
	r.Set(headerSignature, base64.StdEncoding.EncodeToString(st.buf))
	return nil
}

// carriesBody reports whether a request of the method has a body, be it an empty one.
func carriesBody(method string) bool {
	return method != "GET" && method != "HEAD" && method != "DELETE"
}

func isForm(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	return strings.EqualFold(strings.TrimSpace(media), "application/x-www-form-urlencoded")
}

// withDigest adds the body's SHA-256 to the query, behind what is there.
func withDigest(u string, body []byte) string {
	separator := "?"
	switch {
	case strings.HasSuffix(u, "?") || strings.HasSuffix(u, "&"):
		separator = ""
	case strings.Contains(u, "?"):
		separator = "&"
	}
	sum := sha256.Sum256(body)
	return u + separator + digestParameter + "=" + hex.EncodeToString(sum[:])
}

// appendURL adds the URL as its receiver sees it: without a path in it, "/" is requested.
func appendURL(dst []byte, u string) []byte {
	start := 0
	if i := strings.Index(u, "://"); i >= 0 {
		start = i + len("://")
	}
	end := len(u)
	if i := strings.IndexAny(u[start:], "/?"); i >= 0 {
		end = start + i
	}
	dst = append(dst, u[:end]...)
	if end == len(u) || u[end] == '?' {
		dst = append(dst, '/')
	}
	return append(dst, u[end:]...)
}
