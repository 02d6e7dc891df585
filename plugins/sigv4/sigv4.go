// Package sigv4 signs requests with AWS Signature Version 4 in the Authorization header
// (https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html), for
// receivers behind API Gateway, Lambda function URLs, S3 and whatever else verifies as AWS does.
//
// It owns the canonical request: the path, query and headers as AWS rewrites them before it compares. The
// time comes from the host, so the same request gives the same bytes. There is room for one signature
// only: during a rotation one of the live keys signs. The package verifies nothing and fetches no
// credentials.
package sigv4

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// Names of the headers that are set.
const (
	headerAuthorization = "authorization"
	headerDate          = "x-amz-date"
	headerContent       = "x-amz-content-sha256"
	headerToken         = "x-amz-security-token"
)

const (
	algorithm       = "AWS4-HMAC-SHA256"
	unsignedPayload = "UNSIGNED-PAYLOAD"
	timeFormat      = "20060102T150405Z"
)

// Config says as whom and for which service requests are signed.
type Config struct {
	Region          string        `json:"region" required:"true" doc:"Region of the credential scope, such as us-east-1."`
	Service         string        `json:"service" required:"true" doc:"Service of the credential scope: execute-api for API Gateway, lambda for function URLs, s3."`
	AccessKeyID     string        `json:"access_key_id" doc:"Access key id, such as AKIA…; needed unless the secret holds it as ID:SECRET."`
	SignedHeaders   []string      `json:"signed_headers" default:"[\"content-type\",\"webhook-id\"]" doc:"Headers that are signed where a request has them, besides host and x-amz-*, which always are."`
	ContentSHA256   string        `json:"content_sha256" default:"auto" enum:"auto,on,off" doc:"Whether to send x-amz-content-sha256; auto does for S3, which requires it."`
	UnsignedPayload bool          `json:"unsigned_payload" doc:"Leave the body out of the signature (UNSIGNED-PAYLOAD); S3 only takes that over TLS."`
	SignWith        string        `json:"sign_with" default:"newest" enum:"newest,oldest" doc:"Which live key signs while a rotation overlaps: there is room for one signature."`
	Key             plugin.Secret `slot:"key" doc:"Secret access key, alone or as ID:SECRET, so that a rotation changes both halves at once." required:"true"`
	Token           plugin.Secret `slot:"session_token" doc:"Session token of temporary credentials, sent as x-amz-security-token."`
}

// Kind is the signer "sigv4".
func Kind() plugin.Kind {
	return plugin.Signer("sigv4", build,
		plugin.Doc("AWS Signature Version 4 in the Authorization header; one live key signs, see sign_with"),
		plugin.Emits(headerAuthorization, headerDate, headerContent, headerToken),
		plugin.Example(map[string]any{"region": "us-east-1", "service": "execute-api", "access_key_id": "AKIDEXAMPLE"}),
		plugin.Format("key", keyFormat()),
		plugin.Format("session_token", tokenFormat()),
		plugin.Check(check))
}

func build(c Config, target plugin.Target) (plugin.SignFunc, error) {
	value, token := pick(c.Key, c.SignWith), pick(c.Token, c.SignWith)
	if value == nil {
		return nil, errors.New("no key is given")
	}
	id, secret, err := readKey(value)
	if err != nil {
		return nil, err
	}
	if id == "" {
		id = c.AccessKeyID
	}
	if id == "" {
		return nil, errors.New("no access key id is given, neither in access_key_id nor before the secret")
	}
	s := &signer{
		id: id, secret: "AWS4" + secret, region: c.Region, service: c.Service, token: string(token),
		s3: isS3(c.Service), unsigned: c.UnsignedPayload,
		content: c.ContentSHA256 == "on" || c.ContentSHA256 == "auto" && (isS3(c.Service) || c.UnsignedPayload),
		signed:  lowerAll(c.SignedHeaders),
		url:     target.URL,
	}
	if t, err := parseTarget(target.URL, s.s3); err == nil {
		s.target = t
	}
	return s.sign, nil
}

// pick is the live version that signs; nil when there is none.
func pick(secret plugin.Secret, which string) []byte {
	values := secret.Values()
	switch {
	case len(values) == 0:
		return nil
	case which == "oldest":
		return values[len(values)-1]
	}
	return values[0]
}

// isS3 reports whether a service takes paths as S3 does: encoded once, and not normalised.
func isS3(service string) bool {
	return service == "s3" || service == "s3-object-lambda" || service == "s3-outposts" || service == "s3express"
}

// signer is one instance; it is immutable but for the key of the day.
type signer struct {
	id, secret, region, service, token string
	s3, unsigned, content              bool
	signed                             []string
	url                                string // the instance's own URL, and what was read in it
	target                             *target
	day                                atomic.Pointer[dayKey]
}

// dayKey is the signing key, which changes with the day of a request only.
type dayKey struct {
	day string
	key []byte
}

func (s *signer) sign(r *plugin.Request) error {
	for _, name := range []string{headerAuthorization, headerDate, headerContent, headerToken} {
		if r.Get(name) != "" {
			return fmt.Errorf("the request has a %s header already, which the signature sets", name)
		}
	}
	t := s.target
	if t == nil || r.URL != s.url {
		var err error
		if t, err = parseTarget(r.URL, s.s3); err != nil {
			return err
		}
	}
	at := r.Created.UTC().Format(timeFormat)
	payload := unsignedPayload
	if !s.unsigned {
		payload = hexSum(r.Body)
	}
	r.Set(headerDate, at)
	if s.content {
		r.Set(headerContent, payload)
	}
	if s.token != "" {
		r.Set(headerToken, s.token)
	}
	headers, names := s.canonicalHeaders(r, t)
	canonical := r.Method + "\n" + t.path + "\n" + t.query + "\n" + headers + "\n" + names + "\n" + payload
	scope := at[:8] + "/" + s.region + "/" + s.service + "/aws4_request"
	mac := sum(s.keyOf(at[:8]), algorithm+"\n"+at+"\n"+scope+"\n"+hexSum([]byte(canonical)))
	r.Set(headerAuthorization, algorithm+" Credential="+s.id+"/"+scope+", SignedHeaders="+names+", Signature="+hex.EncodeToString(mac))
	return nil
}

func (s *signer) keyOf(day string) []byte {
	if cached := s.day.Load(); cached != nil && cached.day == day {
		return cached.key
	}
	key := sum([]byte(s.secret), day)
	for _, part := range []string{s.region, s.service, "aws4_request"} {
		key = sum(key, part)
	}
	s.day.Store(&dayKey{day: day, key: key})
	return key
}

func sum(key []byte, text string) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(text))
	return mac.Sum(nil)
}

func hexSum(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
