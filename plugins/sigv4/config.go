package sigv4

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

func check(c Config, target plugin.Target) []plugin.Problem {
	var problems []plugin.Problem
	complain := func(pointer, code string, err error) {
		if err != nil {
			problems = append(problems, plugin.Problem{Pointer: pointer, Code: code, Summary: err.Error()})
		}
	}
	complain("/config/region", "", checkScope(c.Region, "us-east-1"))
	complain("/config/service", "", checkScope(c.Service, "execute-api"))
	if c.AccessKeyID != "" {
		complain("/config/access_key_id", "", checkScope(c.AccessKeyID, "AKIDEXAMPLE"))
	}
	if c.UnsignedPayload && c.ContentSHA256 == "off" {
		complain("/config/unsigned_payload", "", errors.New("an unsigned payload is announced in x-amz-content-sha256, which content_sha256 switches off"))
	}
	for i, name := range c.SignedHeaders {
		complain("/config/signed_headers/"+strconv.Itoa(i), "", checkSigned(strings.ToLower(name)))
	}
	if target.URL != "" {
		complain("/target/uri", "", checkTarget(target.URL, isS3(c.Service)))
	}
	for _, h := range target.Headers {
		switch strings.ToLower(h.Name) {
		case headerAuthorization, headerDate, headerContent, headerToken:
			complain("/config", "", fmt.Errorf("the subscription sets a header %q itself, which the signature needs", strings.ToLower(h.Name)))
		}
	}
	if n := len(c.Key.Values()); c.AccessKeyID == "" {
		for i, value := range c.Key.Values() {
			if id, _, err := readKey(value); err == nil && id == "" {
				which := "the secret"
				if n > 1 {
					which = fmt.Sprintf("live version %d of %d, newest first,", i+1, n)
				}
				complain("/config/access_key_id", "config.missing", fmt.Errorf("field \"access_key_id\" is missing, and %s is not written ID:SECRET", which))
				break
			}
		}
	}
	return problems
}

func checkScope(text, example string) error {
	if text == "" {
		return fmt.Errorf("it is empty; it is a word such as %s", example)
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == ',' }) {
		return fmt.Errorf("given %q, want a word such as %s, without space, slash and comma", text, example)
	}
	return nil
}

func checkSigned(name string) error {
	switch name {
	case "", headerAuthorization:
		return errors.New("it must name a header of the request, such as content-type")
	case "connection", "expect", "user-agent", "transfer-encoding", "x-amzn-trace-id", "traceparent", "tracestate":
		return fmt.Errorf("%s is changed on the way; a signature over it would not hold", name)
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r) }) {
		return fmt.Errorf("given %q, which is no header name", name)
	}
	return nil
}

// checkTarget refuses hosts of which the Host header could be written in two ways.
func checkTarget(text string, s3 bool) error {
	if _, err := parseTarget(text, s3); err != nil {
		return err
	}
	u, err := url.Parse(text)
	if err != nil {
		return errors.New("the URI cannot be read")
	}
	switch port := u.Port(); {
	case u.Scheme == "https" && port == "443", u.Scheme == "http" && port == "80":
		return fmt.Errorf("the Host header is signed; leave out :%s, the default port", port)
	case u.Host != strings.ToLower(u.Host):
		return errors.New("the Host header is signed; write the host in lower case")
	}
	return nil
}

// Complaints about a key. They show nothing of it.
var (
	errNoSecret = errors.New("no secret access key is given")
	errSpace    = errors.New("the secret access key has a space or a line break in or around it; remove it")
	errASCII    = errors.New("the secret access key has characters other than printable ASCII")
	errSwapped  = errors.New("this looks like an access key id, which belongs in access_key_id; the secret access key is the longer one")
	errColons   = errors.New("the secret access key has more than one colon; it is written alone or as ID:SECRET")
)

// readKey takes a secret access key apart from the id that may stand before it.
func readKey(value []byte) (id, secret string, err error) {
	text := string(value)
	switch {
	case text == "":
		return "", "", errNoSecret
	case strings.ContainsAny(text, " \t\r\n"):
		return "", "", errSpace
	case strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }):
		return "", "", errASCII
	case strings.Count(text, ":") > 1:
		return "", "", errColons
	}
	secret = text
	if before, after, found := strings.Cut(text, ":"); found {
		id, secret = before, after
		if id == "" || checkScope(id, "") != nil {
			return "", "", errors.New("what stands before the colon is no access key id")
		}
	}
	switch {
	case secret == "":
		return "", "", errNoSecret
	case len(secret) == 20 && (strings.HasPrefix(secret, "AKIA") || strings.HasPrefix(secret, "ASIA")):
		return "", "", errSwapped
	case len(secret) < 16:
		return "", "", fmt.Errorf("a secret access key has 40 characters; this one has %d, fewer than the 16 that are taken at least", len(secret))
	}
	return id, secret, nil
}

func keyFormat() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc: "a secret access key as AWS shows it, alone or after its access key id: ID:SECRET",
		Read: func(value []byte) (plugin.SecretInfo, error) {
			id, _, err := readKey(value)
			if err != nil {
				return plugin.SecretInfo{}, err
			}
			return plugin.SecretInfo{Algorithm: algorithm, KeyID: id}, nil
		},
	}
}

func tokenFormat() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc: "a session token as AWS STS gives it",
		Read: func(value []byte) (plugin.SecretInfo, error) {
			switch text := string(value); {
			case text == "":
				return plugin.SecretInfo{}, errors.New("no session token is given")
			case strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }):
				return plugin.SecretInfo{}, errors.New("the session token has white space or characters other than printable ASCII")
			}
			return plugin.SecretInfo{}, nil
		},
	}
}
