package httpsignature

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const second = time.Second

// signer is one instance; it is immutable but for the pools in its keys.
type signer struct {
	components []component
	list       string // the covered components and ";created=", as in the parameters
	digests    bool   // content-digest is covered
	digest     string
	nonce      bool
	expires    int64
	keys       []*key
	url        string // the instance's own URL, and what was read in it
	target     *target
}

func (s *signer) sign(r *plugin.Request) error {
	for _, name := range []string{headerInput, headerSignature} {
		if r.Get(name) != "" {
			return fmt.Errorf("the request has a %s header already; two signers would overwrite each other", name)
		}
	}
	if s.digests {
		if err := s.setDigest(r); err != nil {
			return err
		}
	}
	t := s.target
	if t == nil || r.URL != s.url {
		var err error
		if t, err = parseTarget(r.URL); err != nil {
			return err
		}
	}
	base := make([]byte, 0, 512)
	for i := range s.components {
		c := &s.components[i]
		base = append(base, c.id...)
		base = append(base, ": "...)
		var err error
		if base, err = c.append(base, r, t); err != nil {
			return fmt.Errorf("component %s: %w", c.id, err)
		}
		base = append(base, '\n')
	}
	base = append(base, `"@signature-params": `...)
	times, err := s.times(r)
	if err != nil {
		return err
	}
	var input, signatures []byte
	for i, k := range s.keys {
		if i > 0 {
			input, signatures = append(input, ", "...), append(signatures, ", "...)
		}
		params := s.list + times + k.params
		signature, err := k.sign(append(base[:len(base):len(base)], params...))
		if err != nil {
			return err
		}
		input = append(append(append(input, k.label...), '='), params...)
		signatures = append(append(signatures, k.label...), "=:"...)
		signatures = append(base64.StdEncoding.AppendEncode(signatures, signature), ':')
	}
	r.Set(headerInput, string(input))
	r.Set(headerSignature, string(signatures))
	return nil
}

// times are the parameters that differ from one request to the next, from the value of created on.
func (s *signer) times(r *plugin.Request) (string, error) {
	created := r.Created.Unix()
	out := strconv.AppendInt(make([]byte, 0, 80), created, 10)
	if s.expires > 0 {
		out = strconv.AppendInt(append(out, ";expires="...), created+s.expires, 10)
	}
	if s.nonce {
		if len(r.Nonce) == 0 {
			return "", errors.New("the host gave no nonce")
		}
		out = append(out, `;nonce="`...)
		out = append(base64.RawURLEncoding.AppendEncode(out, r.Nonce), '"')
	}
	return string(out), nil
}

// setDigest adds Content-Digest, unless the request has the very same.
func (s *signer) setDigest(r *plugin.Request) error {
	sum := digestOf(s.digest, r.Body)
	if given := r.Get(headerDigest); given != "" {
		if given != sum {
			return errors.New("the request has a content-digest header already, and not the one of this body and hash")
		}
		return nil
	}
	r.Set(headerDigest, sum)
	return nil
}

// digestOf is the value of Content-Digest.
func digestOf(algorithm string, body []byte) string {
	var sum []byte
	if algorithm == "sha-512" {
		s := sha512.Sum512(body)
		sum = s[:]
	} else {
		s := sha256.Sum256(body)
		sum = s[:]
	}
	return algorithm + "=:" + base64.StdEncoding.EncodeToString(sum) + ":"
}
