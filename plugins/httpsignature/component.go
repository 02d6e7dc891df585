package httpsignature

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// component is one thing covered.
type component struct {
	name  string // "@method", or a header name in lower case
	id    string // as in the signature base: "@query-param";name="x"
	query string // name of @query-param, encoded
	bytes bool   // parameter bs
}

// derived are the derived components of RFC 9421 section 2.2.
func derived() []string {
	return []string{"@method", "@target-uri", "@authority", "@scheme", "@request-target", "@path", "@query", "@query-param"}
}

// parseComponent reads a component identifier, its name in quotes or without.
func parseComponent(text string) (component, error) {
	name, params, _ := strings.Cut(text, ";")
	if params != "" || strings.HasSuffix(text, ";") {
		params = ";" + params
	}
	if unquoted, ok := strings.CutPrefix(name, `"`); ok {
		if unquoted, ok = strings.CutSuffix(unquoted, `"`); !ok {
			return component{}, fmt.Errorf("given %q, whose name has a quote at one end only", text)
		}
		name = unquoted
	}
	c := component{name: strings.ToLower(name)}
	if err := c.checkName(); err != nil {
		return component{}, err
	}
	c.id = `"` + c.name + `"`
	for params != "" {
		rest, err := c.readParam(params[1:])
		if err != nil {
			return component{}, err
		}
		params = rest
	}
	if c.name == "@query-param" && !strings.Contains(c.id, ";name=") {
		return component{}, errors.New(`@query-param needs the parameter it means: @query-param;name="id"`)
	}
	return c, nil
}

func (c *component) checkName() error {
	if strings.HasPrefix(c.name, "@") {
		for _, known := range derived() {
			if c.name == known {
				return nil
			}
		}
		if c.name == "@status" {
			return errors.New("@status is of responses only")
		}
		return fmt.Errorf("there is no derived component %q; there are %s", c.name, strings.Join(derived(), ", "))
	}
	switch c.name {
	case "":
		return errors.New("a component is a header name or a derived component such as @method")
	case headerInput, headerSignature:
		return fmt.Errorf("%s is what the signature itself sets; it cannot cover it", c.name)
	case "host":
		return errors.New("host is covered as @authority")
	case "te", "expect", "trailer", "upgrade", "connection", "keep-alive", "accept-encoding", "proxy-connection", "transfer-encoding":
		return fmt.Errorf("%s belongs to the connection, which comes after the signature", c.name)
	}
	if strings.ContainsFunc(c.name, func(r rune) bool {
		return r > '~' || r <= ' ' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
	}) {
		return fmt.Errorf("given %q, which is no header name", c.name)
	}
	return nil
}

// readParam reads one parameter and returns what follows, from its semicolon on.
func (c *component) readParam(text string) (string, error) {
	end := strings.IndexAny(text, "=;")
	if end < 0 {
		end = len(text)
	}
	key, rest := text[:end], text[end:]
	var value string
	if quoted, ok := strings.CutPrefix(rest, `="`); ok {
		var found bool
		if value, rest, found = strings.Cut(quoted, `"`); !found {
			return "", fmt.Errorf("the value of parameter %q has no closing quote", key)
		}
	}
	if rest != "" && rest[0] != ';' {
		return "", fmt.Errorf("parameter %q cannot be read; a value is written in double quotes", key)
	}
	return rest, c.setParam(key, value)
}

func (c *component) setParam(key, value string) error {
	isQuery, isHeader := c.name == "@query-param", c.name[0] != '@'
	switch {
	case key == "name" && isQuery && !strings.Contains(c.id, ";name="):
		decoded, err := url.QueryUnescape(value)
		if err != nil || value == "" {
			return fmt.Errorf("name %q is no percent-encoded name of a query parameter", value)
		}
		if want := encodeQuery(decoded); want != value {
			return fmt.Errorf("name is given %q, want its percent-encoded form %q", value, want)
		}
		c.query = value
		c.id += ";name=" + quote(value)
	case key == "bs" && value == "" && isHeader && !c.bytes:
		c.bytes = true
		c.id += ";bs"
	case key == "sf" || key == "key":
		return fmt.Errorf("parameter %q, which reads headers as structured fields, is not offered; cover the whole header", key)
	case key == "req":
		return errors.New(`parameter "req" is of responses only`)
	case key == "tr":
		return errors.New(`parameter "tr" is of trailers, which requests here do not have`)
	default:
		return fmt.Errorf("%s takes no parameter %q here", c.name, key)
	}
	return nil
}

// append adds the component's value to dst.
func (c *component) append(dst []byte, r *plugin.Request, t *target) ([]byte, error) {
	switch c.name {
	case "@method":
		return append(dst, r.Method...), nil
	case "@target-uri":
		dst = append(append(append(dst, t.scheme...), "://"...), t.authority...)
		return append(dst, t.requestTarget...), nil
	case "@authority":
		return append(dst, t.authority...), nil
	case "@scheme":
		return append(dst, t.scheme...), nil
	case "@request-target":
		return append(dst, t.requestTarget...), nil
	case "@path":
		return append(dst, t.path...), nil
	case "@query":
		return append(append(dst, '?'), t.query...), nil
	case "@query-param":
		return t.appendParam(dst, c.query)
	}
	return c.appendField(dst, r)
}

// appendField combines the values of a header (RFC 9421 sections 2.1 and 2.1.3).
func (c *component) appendField(dst []byte, r *plugin.Request) ([]byte, error) {
	found := false
	for i := range r.Headers {
		h := &r.Headers[i]
		if len(h.Name) != len(c.name) || !strings.EqualFold(h.Name, c.name) {
			continue
		}
		if found {
			dst = append(dst, ", "...)
		}
		found = true
		value := unfold(h.Value)
		if c.bytes {
			dst = append(base64.StdEncoding.AppendEncode(append(dst, ':'), []byte(value)), ':')
			continue
		}
		if strings.ContainsFunc(value, func(r rune) bool { return r > '~' || r < ' ' && r != '\t' }) {
			return nil, errors.New("the header's value has characters outside ASCII; cover it as bytes, with ;bs")
		}
		dst = append(dst, value...)
	}
	switch {
	case found:
		return dst, nil
	case c.name == "content-length":
		return strconv.AppendInt(dst, int64(len(r.Body)), 10), nil
	}
	return nil, errors.New("the request has no such header")
}

// unfold strips white space around a value and writes a folded line as one.
func unfold(value string) string {
	value = strings.Trim(value, " \t\r\n")
	if !strings.ContainsAny(value, "\r\n") {
		return value
	}
	lines := strings.Split(strings.ReplaceAll(value, "\r\n", "\n"), "\n")
	for i, line := range lines {
		lines[i] = strings.Trim(line, " \t\r")
	}
	return strings.Join(lines, " ")
}
