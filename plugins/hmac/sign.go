package hmacplugin

import (
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // old schemes are defined with it
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// scheme is one way to sign, as data.
type scheme struct {
	// algorithm is the hash: sha256, sha512 or sha1.
	algorithm string
	// encoding is how a signature is written: hex (lower case), base64, or base64url without padding.
	encoding string
	// content is the template of what is signed.
	content string
	// headers are set in this order: first those without a signature, which the content may then name.
	headers []header
	// each is the template of one entry of {signatures}, and join stands between two entries.
	each, join string
	// timestamp is how {timestamp} is written: s (unix seconds, also when empty), ms (unix milliseconds),
	// or rfc3339 (UTC, whole seconds).
	timestamp string
}

// header is one header that a scheme sets.
type header struct {
	name  string
	value string // a template
	// optional headers are left out of a request that lacks what the value is made of.
	optional bool
}

// fault is something wrong with a scheme; at says in which of its fields.
type fault struct {
	at  string
	err error
}

func (f fault) Error() string { return f.at + ": " + f.err.Error() }

// signer is a compiled scheme with its keys. It is immutable but for the pools in its keys.
type signer struct {
	scheme  scheme
	content template
	each    template
	plain   []compiled // headers without a signature
	signed  []compiled
	// keys are the live ones, newest first; one is the key for {signature}.
	keys      []*key
	one       *key
	wantsOne  bool
	wantsEach bool
}

type compiled struct {
	name     string
	value    template
	optional bool
}

// key is one live key with keyed states to reuse, which spares two blocks of hashing and the
// allocations of each signature.
type key struct {
	states sync.Pool // of *state
}

// state is a keyed HMAC, and room for what the content has beside the body and for the sum.
type state struct {
	mac hash.Hash
	buf []byte
}

// compile makes a signer of a scheme and its raw keys, newest first. Without keys the templates are
// checked all the same, and the signer must not be used.
func compile(s scheme, keys [][]byte, oldest bool) (*signer, []fault) {
	var faults []fault
	c := &signer{scheme: s}
	read := func(at, text string, barred ...variable) template {
		t, err := parse(text, barred...)
		if err != nil {
			faults = append(faults, fault{at, err})
		}
		return t
	}
	c.content = read("content", s.content, signature, signatures)
	c.each = read("signature_each", s.each, body, signatures)
	for _, h := range s.headers {
		out := compiled{h.name, read("headers/"+h.name, h.value, body), h.optional}
		if out.value.has(signature) || out.value.has(signatures) {
			c.signed = append(c.signed, out)
			c.wantsOne = c.wantsOne || out.value.has(signature)
			c.wantsEach = c.wantsEach || out.value.has(signatures)
			continue
		}
		c.plain = append(c.plain, out)
	}
	for _, k := range keys {
		c.keys = append(c.keys, newKey(s.algorithm, k))
	}
	if len(c.keys) > 0 {
		c.one = c.keys[0]
		if oldest {
			c.one = c.keys[len(c.keys)-1]
		}
	}
	return c, faults
}

func newKey(algorithm string, value []byte) *key {
	digest := sha256.New
	switch algorithm {
	case "sha512":
		digest = sha512.New
	case "sha1":
		digest = sha1.New
	}
	k := &key{}
	k.states.New = func() any {
		return &state{mac: hmac.New(digest, value), buf: make([]byte, 0, 256)}
	}
	return k
}

// sign is a plugin.SignFunc.
func (s *signer) sign(r *plugin.Request) error {
	var clock [32]byte
	v := values{request: r, timestamp: s.appendTime(clock[:0], r.Created)}
	if err := set(s.plain, &v); err != nil {
		return err
	}
	var err error
	if s.wantsOne {
		var room [128]byte
		if v.signature, err = s.one.sign(room[:0], s, &v); err != nil {
			return err
		}
	}
	if s.wantsEach {
		var room [192]byte
		if v.signatures, err = s.list(room[:0], v); err != nil {
			return err
		}
	}
	return set(s.signed, &v)
}

func (s *signer) appendTime(dst []byte, t time.Time) []byte {
	switch s.scheme.timestamp {
	case "ms":
		return strconv.AppendInt(dst, t.UnixMilli(), 10)
	case "rfc3339":
		return t.UTC().AppendFormat(dst, time.RFC3339)
	}
	return strconv.AppendInt(dst, t.Unix(), 10)
}

// list adds the entries of {signatures} to dst, one per live key.
func (s *signer) list(dst []byte, v values) ([]byte, error) {
	var room [128]byte
	var err error
	for i, k := range s.keys {
		if i > 0 {
			dst = append(dst, s.scheme.join...)
		}
		if v.signature, err = k.sign(room[:0], s, &v); err != nil {
			return dst, err
		}
		if dst, err = s.each.append(dst, &v); err != nil {
			return dst, err
		}
	}
	return dst, nil
}

// set adds the headers to the request. A header that is there already is another's: neither may be lost.
func set(headers []compiled, v *values) error {
	for i := range headers {
		h := &headers[i]
		if v.request.Get(h.name) != "" {
			return fmt.Errorf("header %s is set twice: by this signer, and by another one or the subscription's own headers", h.name)
		}
		var room [256]byte
		text, err := h.value.text(room[:0], v)
		switch {
		case err == nil:
			v.request.Add(h.name, text)
		case !h.optional || !errors.Is(err, errAbsent):
			return fmt.Errorf("header %s: %w", h.name, err)
		}
	}
	return nil
}

// sign adds the encoded signature of the request to dst. The body goes into the hash where it lies.
func (k *key) sign(dst []byte, s *signer, v *values) ([]byte, error) {
	st := k.states.Get().(*state)
	defer k.states.Put(st)
	st.mac.Reset()
	st.buf = st.buf[:0]
	var err error
	for i := range s.content {
		if p := &s.content[i]; p.variable != body {
			if st.buf, err = p.append(st.buf, v); err != nil {
				return dst, fmt.Errorf("content: %w", err)
			}
			continue
		}
		st.mac.Write(st.buf)
		st.mac.Write(v.request.Body)
		st.buf = st.buf[:0]
	}
	st.mac.Write(st.buf)
	st.buf = st.mac.Sum(st.buf[:0])
	switch s.scheme.encoding {
	case "base64":
		return base64.StdEncoding.AppendEncode(dst, st.buf), nil
	case "base64url":
		return base64.RawURLEncoding.AppendEncode(dst, st.buf), nil
	}
	return hex.AppendEncode(dst, st.buf), nil
}

// chain signs with several schemes, one after the other.
func chain(signers []*signer) plugin.SignFunc {
	if len(signers) == 1 {
		return signers[0].sign
	}
	signers = slices.Clone(signers)
	return func(r *plugin.Request) error {
		for _, s := range signers {
			if err := s.sign(r); err != nil {
				return err
			}
		}
		return nil
	}
}
