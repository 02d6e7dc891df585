package httpplugin

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// checkHeader refuses what would break the framing of the request or belongs to the connection, and not
// to whoever asked for the header.
func checkHeader(name, value string) error {
	if name == "" {
		return fmt.Errorf("a header has no name")
	}
	for i := range len(name) {
		if !tokenByte(name[i]) {
			return fmt.Errorf("header name %q may have letters, digits and hyphens only", name)
		}
	}
	for i := range len(value) {
		if c := value[i]; c < ' ' && c != '\t' || c == 0x7f {
			return fmt.Errorf("the value of header %q has a line break or another control character", name)
		}
	}
	if reserved(name) {
		return fmt.Errorf("header %q is reserved for the transport", name)
	}
	return nil
}

// reserved names frame the request or steer the connection. The lengths come first because this runs for
// every header of every attempt.
func reserved(name string) bool {
	switch len(name) {
	case 2, 4, 6, 7, 10, 14, 15, 16, 17:
	default:
		return false
	}
	switch strings.ToLower(name) {
	case "te", "host", "expect", "trailer", "upgrade", "connection", "keep-alive", "content-length",
		"accept-encoding", "proxy-connection", "transfer-encoding":
		return true
	}
	return false
}

// tokenByte is RFC 9110's tchar.
func tokenByte(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	}
	switch c {
	case '!', '#', '$', '%', '&', '\'', '*', '+', '-', '.', '^', '_', '`', '|', '~':
		return true
	}
	return false
}

// appendHead writes the request line and the header, up to and with the empty line.
func (i *instance) appendHead(dst []byte, t *target, r *plugin.Request, token string) ([]byte, error) {
	if t == i.wire {
		dst = append(dst, i.lead...)
	} else {
		dst = i.appendLead(dst, t)
	}
	if token != "" {
		dst = appendHeader(dst, i.auth.header, "Bearer "+token)
	}
	agent, trace := false, false
	for _, h := range r.Headers {
		if err := checkHeader(h.Name, h.Value); err != nil {
			return dst, err
		}
		if err := i.conflict(h.Name); err != nil {
			return dst, err
		}
		switch h.Name {
		case "user-agent":
			agent = true
		case "traceparent":
			trace = true
		}
		dst = appendHeader(dst, h.Name, h.Value)
	}
	if !agent && i.agent != "" {
		dst = appendHeader(dst, "user-agent", i.agent)
	}
	if !trace && r.Traceparent != "" {
		if err := checkHeader("traceparent", r.Traceparent); err != nil {
			return dst, err
		}
		dst = appendHeader(dst, "traceparent", r.Traceparent)
	}
	dst = append(dst, "Content-Length: "...)
	dst = strconv.AppendInt(dst, int64(len(r.Body)), 10)
	return append(dst, "\r\n\r\n"...), nil
}

// appendLead writes what is the same for every attempt of an instance.
func (i *instance) appendLead(dst []byte, t *target) []byte {
	dst = append(dst, i.method...)
	dst = append(dst, ' ')
	dst = append(dst, t.path...)
	dst = append(dst, " HTTP/1.1\r\n"...)
	dst = appendHeader(dst, "host", t.host)
	dst = appendHeader(dst, "accept-encoding", "identity")
	for _, h := range i.fixed {
		dst = appendHeader(dst, h.Name, h.Value)
	}
	return dst
}

// appendHeader writes the name in canonical form: HTTP/1 receivers that compare names with regard to case
// expect that one.
func appendHeader(dst []byte, name, value string) []byte {
	upper := true
	for i := range len(name) {
		c := name[i]
		if upper && 'a' <= c && c <= 'z' {
			c -= 'a' - 'A'
		}
		upper = c == '-'
		dst = append(dst, c)
	}
	dst = append(dst, ": "...)
	dst = append(dst, value...)
	return append(dst, "\r\n"...)
}
