package hmacplugin

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// variable is what a part of a template stands for.
type variable int

const (
	literal variable = iota
	id
	timestamp
	body
	method
	address
	path
	query
	host
	nonce
	eventType
	headerValue
	signature
	signatures
)

// names are the variables as they are written in braces; {header:NAME} comes on top.
func names() map[string]variable {
	return map[string]variable{
		"id": id, "timestamp": timestamp, "body": body, "method": method, "url": address, "path": path,
		"query": query, "host": host, "nonce": nonce, "type": eventType, "signature": signature, "signatures": signatures,
	}
}

// part is one piece of a template: a literal's text, a header's name in lower case, or a variable alone.
type part struct {
	variable variable
	text     string
}

// template is a compiled text: literals and variables in order.
type template []part

// parse compiles a text in which {name} is a variable and a literal brace is doubled. The variables in
// barred have no value where the template is used.
func parse(text string, barred ...variable) (template, error) {
	var t template
	var plain strings.Builder
	flush := func() {
		if plain.Len() > 0 {
			t = append(t, part{text: plain.String()})
			plain.Reset()
		}
	}
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c != '{' && c != '}':
			plain.WriteByte(c)
		case i+1 < len(text) && text[i+1] == c:
			plain.WriteByte(c)
			i++
		case c == '}':
			return nil, fmt.Errorf("the } at character %d closes nothing; a literal brace is written twice: }}", i+1)
		default:
			end := strings.IndexByte(text[i:], '}')
			if end < 0 {
				return nil, fmt.Errorf("the { at character %d is never closed; a literal brace is written twice: {{", i+1)
			}
			p, err := parseVariable(text[i+1 : i+end])
			if err != nil {
				return nil, fmt.Errorf("%w (at character %d)", err, i+1)
			}
			if slices.Contains(barred, p.variable) {
				return nil, fmt.Errorf("%s cannot stand here (at character %d); there are %s", text[i:i+end+1], i+1, known(barred))
			}
			flush()
			t = append(t, p)
			i += end
		}
	}
	flush()
	return t, nil
}

func parseVariable(name string) (part, error) {
	if header, ok := strings.CutPrefix(name, "header:"); ok {
		if !isToken(header) {
			return part{}, fmt.Errorf("%q is not a header name; want {header:NAME}, such as {header:content-type}", header)
		}
		return part{variable: headerValue, text: strings.ToLower(header)}, nil
	}
	if v, ok := names()[name]; ok {
		return part{variable: v}, nil
	}
	return part{}, fmt.Errorf("{%s} is not a variable; there are %s", name, known(nil))
}

// known lists the variables for people.
func known(barred []variable) string {
	out := []string{"{header:NAME}"}
	for name, v := range names() {
		if !slices.Contains(barred, v) {
			out = append(out, "{"+name+"}")
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// quote makes a literal of any text.
func quote(text string) string {
	return strings.NewReplacer("{", "{{", "}", "}}").Replace(text)
}

// has reports whether the variable occurs.
func (t template) has(v variable) bool {
	return slices.ContainsFunc(t, func(p part) bool { return p.variable == v })
}

// errAbsent says that the request does not have what a variable stands for. What is signed must be what
// is sent, so nothing is signed in its place.
var errAbsent = errors.New("which this request does not carry")

// values are what the variables stand for in one request.
type values struct {
	request   *plugin.Request
	timestamp []byte
	// signature and signatures are empty until they are known.
	signature  []byte
	signatures []byte
}

// append adds the part's text to dst.
func (p *part) append(dst []byte, v *values) ([]byte, error) {
	r := v.request
	switch p.variable {
	case literal:
		return append(dst, p.text...), nil
	case id:
		return append(dst, r.MessageID...), nil
	case timestamp:
		return append(dst, v.timestamp...), nil
	case body:
		return append(dst, r.Body...), nil
	case method:
		return append(dst, r.Method...), nil
	case address:
		return append(dst, r.URL...), nil
	case nonce:
		return hex.AppendEncode(dst, r.Nonce), nil
	case signature:
		return append(dst, v.signature...), nil
	case signatures:
		return append(dst, v.signatures...), nil
	case eventType:
		if r.EventType == "" {
			return dst, p.absent()
		}
		return append(dst, r.EventType...), nil
	case headerValue:
		value := r.Get(p.text)
		if value == "" {
			return dst, p.absent()
		}
		return append(dst, value...), nil
	}
	h, pa, q := split(r.URL)
	switch p.variable {
	case host:
		return append(dst, h...), nil
	case path:
		return append(dst, pa...), nil
	default:
		return append(dst, q...), nil
	}
}

func (p *part) absent() error {
	if p.variable == eventType {
		return fmt.Errorf("{type} is the event's type, %w", errAbsent)
	}
	return fmt.Errorf("{header:%s} is a header %w", p.text, errAbsent)
}

// append adds the text of the whole template to dst.
func (t template) append(dst []byte, v *values) ([]byte, error) {
	var err error
	for i := range t {
		if dst, err = t[i].append(dst, v); err != nil {
			return dst, err
		}
	}
	return dst, nil
}

// text is the template's text. What is a string already is not copied; room is for the rest.
func (t template) text(room []byte, v *values) (string, error) {
	if len(t) == 1 {
		switch p := &t[0]; p.variable {
		case literal:
			return p.text, nil
		case id:
			return v.request.MessageID, nil
		case eventType:
			if v.request.EventType != "" {
				return v.request.EventType, nil
			}
			return "", p.absent()
		case headerValue:
			if value := v.request.Get(p.text); value != "" {
				return value, nil
			}
			return "", p.absent()
		}
	}
	out, err := t.append(room, v)
	return string(out), err
}

// split cuts a URL into the host with its port, the path as it is sent (at least "/") and the query
// without its question mark.
func split(u string) (host, path, query string) {
	if _, after, ok := strings.Cut(u, "://"); ok {
		u = after
	}
	u, query, _ = strings.Cut(u, "?")
	if i := strings.IndexByte(u, '/'); i >= 0 {
		return u[:i], u[i:], query
	}
	return u, "/", query
}

// isToken reports whether s is a header name (RFC 9110, token).
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		alnum := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !alnum && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return s != ""
}

// isFieldValue reports whether s can be sent in a header as it is: printable ASCII, no blank at either end.
func isFieldValue(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return s == strings.TrimSpace(s)
}
