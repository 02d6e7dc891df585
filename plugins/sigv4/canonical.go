package sigv4

import (
	"errors"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// target is a URL in the parts of a canonical request.
type target struct {
	host  string // as it will be sent
	path  string
	query string
}

func parseTarget(text string, s3 bool) (*target, error) {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.Opaque != "" {
		// The parser's error repeats the text, which may hold credentials.
		return nil, errors.New("the URI cannot be read; it must look like https://host/path")
	}
	t := &target{host: strings.TrimSuffix(u.Host, ":")}
	if t.path, err = canonicalPath(u.EscapedPath(), s3); err != nil {
		return nil, err
	}
	t.query, err = canonicalQuery(u.RawQuery)
	return t, err
}

// canonicalPath encodes every segment of the path as it is sent, so what was encoded is so twice, after
// dots and empty segments are resolved. S3 compares with the path decoded and encoded once.
func canonicalPath(sent string, s3 bool) (string, error) {
	if s3 {
		decoded, err := url.PathUnescape(sent)
		if err != nil {
			return "", errors.New("the URI's path is not percent-encoded properly")
		}
		if !strings.HasPrefix(decoded, "/") {
			decoded = "/" + decoded
		}
		return encode(decoded, true), nil
	}
	var segments []string
	for segment := range strings.SplitSeq(sent, "/") {
		switch segment {
		case "", ".":
		case "..":
			segments = segments[:max(0, len(segments)-1)]
		default:
			segments = append(segments, encode(segment, false))
		}
	}
	path := "/" + strings.Join(segments, "/")
	last := sent[strings.LastIndexByte(sent, '/')+1:]
	if len(segments) > 0 && (last == "" || last == "." || last == "..") {
		path += "/"
	}
	return path, nil
}

// canonicalQuery decodes names and values, encodes them anew and sorts them.
func canonicalQuery(sent string) (string, error) {
	var pairs [][2]string
	for pair := range strings.SplitSeq(sent, "&") {
		if pair == "" {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		var decoded [2]string
		for i, part := range []string{name, value} {
			text, err := url.QueryUnescape(part)
			if err != nil {
				return "", errors.New("the URI's query is not percent-encoded properly")
			}
			decoded[i] = encode(text, false)
		}
		pairs = append(pairs, decoded)
	}
	slices.SortStableFunc(pairs, func(a, b [2]string) int {
		if c := strings.Compare(a[0], b[0]); c != 0 {
			return c
		}
		return strings.Compare(a[1], b[1])
	})
	var b strings.Builder
	for i, p := range pairs {
		if i > 0 {
			b.WriteByte('&')
		}
		b.WriteString(p[0] + "=" + p[1])
	}
	return b.String(), nil
}

// encode percent-encodes all but the unreserved characters of RFC 3986, and slashes where kept.
func encode(text string, keepSlash bool) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for _, c := range []byte(text) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~", c) >= 0, c == '/' && keepSlash:
			b.WriteByte(c)
		default:
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		}
	}
	return b.String()
}

// canonicalHeaders are the lines of the headers that are signed, and their names.
func (s *signer) canonicalHeaders(r *plugin.Request, t *target) (lines, names string) {
	values := map[string][]string{"host": {t.host}}
	for i := range r.Headers {
		name := strings.ToLower(r.Headers[i].Name)
		if name != "host" && slices.Contains(s.signed, name) || strings.HasPrefix(name, "x-amz-") {
			values[name] = append(values[name], trim(r.Headers[i].Value))
		}
	}
	if name := "content-length"; slices.Contains(s.signed, name) && values[name] == nil {
		values[name] = []string{strconv.Itoa(len(r.Body))} // as the transport will send it
	}
	sorted := make([]string, 0, len(values))
	for name := range values {
		sorted = append(sorted, name)
	}
	slices.Sort(sorted)
	var b strings.Builder
	for _, name := range sorted {
		b.WriteString(name + ":" + strings.Join(values[name], ",") + "\n")
	}
	return b.String(), strings.Join(sorted, ";")
}

// trim strips white space around a value and makes one space of several within.
func trim(value string) string {
	value = strings.Trim(value, " \t\r\n")
	if !strings.Contains(value, "  ") {
		return value
	}
	var b strings.Builder
	for i := range len(value) {
		if value[i] != ' ' || value[i-1] != ' ' {
			b.WriteByte(value[i])
		}
	}
	return b.String()
}

func lowerAll(names []string) []string {
	out := make([]string, len(names))
	for i, name := range names {
		out[i] = strings.ToLower(name)
	}
	return out
}
