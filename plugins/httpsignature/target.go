package httpsignature

import (
	"errors"
	"net/url"
	"strings"
)

// target is a URL in the parts that components name, as it will be sent.
type target struct {
	scheme        string
	authority     string // host in lower case, with the port unless it is the scheme's own
	path          string
	query         string // without the question mark
	requestTarget string
}

func parseTarget(text string) (*target, error) {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.Opaque != "" {
		// The parser's error repeats the text, which may hold credentials.
		return nil, errors.New("the URI cannot be read; it must look like https://host/path")
	}
	t := &target{
		scheme: u.Scheme, authority: strings.ToLower(strings.TrimSuffix(u.Host, ":")),
		path: u.EscapedPath(), query: u.RawQuery, requestTarget: u.RequestURI(),
	}
	if t.path == "" {
		t.path = "/"
	}
	switch port := u.Port(); {
	case t.scheme == "https" && port == "443", t.scheme == "http" && port == "80":
		t.authority = strings.TrimSuffix(t.authority, ":"+port)
	}
	return t, nil
}

// appendParam adds the value of the one query parameter of that name (RFC 9421 section 2.2.8).
func (t *target) appendParam(dst []byte, name string) ([]byte, error) {
	found := false
	for pair := range strings.SplitSeq(t.query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(key)
		if pair == "" || err != nil || encodeQuery(key) != name {
			continue
		}
		if found {
			return nil, errors.New("the query has the parameter more than once, which cannot be signed; cover @query")
		}
		found = true
		decoded, err := url.QueryUnescape(value)
		if err != nil {
			return nil, errors.New("the query parameter's value is not percent-encoded properly")
		}
		dst = append(dst, encodeQuery(decoded)...)
	}
	if !found {
		return nil, errors.New("the query has no such parameter")
	}
	return dst, nil
}

// encodeQuery percent-encodes by the application/x-www-form-urlencoded set of the URL standard, with %20
// for a space.
func encodeQuery(text string) string {
	var b strings.Builder
	for _, c := range []byte(text) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("*-._", c) >= 0:
			b.WriteByte(c)
		default:
			const digits = "0123456789ABCDEF"
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		}
	}
	return b.String()
}
