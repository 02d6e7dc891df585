package httpplugin

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxHeader is how large the header of a request may be, in sum: most servers take less.
	maxHeader = 32 << 10
	// maxKeptHeader is how much of the header of a response is handed on, in sum, and maxKeptFields in how many fields.
	maxKeptHeader = 4 << 10
	maxKeptFields = 64
	// maxRetryAfter is longer than a date and a number that means anything.
	maxRetryAfter = 64
)

// errLargeHeader is a request whose header is too large.
type errLargeHeader struct{ bytes int }

func (e errLargeHeader) Error() string {
	return fmt.Sprintf("the request's header has %d bytes; at most %d are sent, and many receivers take less: publish fewer or shorter attributes", e.bytes, maxHeader)
}

// checkHeader refuses what would break the framing of the request or belongs to the connection, and not
// to whoever asked for the header.
func checkHeader(name, value string) error {
	if name == "" {
		return errors.New("a header has no name")
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

// fields appends what the request's header has besides what belongs to the connection, checked, in lower case as it
// came. Every version of HTTP renders the same list.
func (i *instance) fields(dst []plugin.Header, r *plugin.Request, token string) ([]plugin.Header, error) {
	dst = append(dst, i.fixed...)
	if token != "" {
		dst = append(dst, plugin.Header{Name: i.auth.header, Value: "Bearer " + token})
	}
	agent, trace, state := i.agent == "", r.Traceparent == "", r.Tracestate == ""
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
		case "tracestate":
			state = true
		}
		dst = append(dst, h)
	}
	if !agent {
		dst = append(dst, plugin.Header{Name: "user-agent", Value: i.agent})
	}
	if !trace {
		if err := checkHeader("traceparent", r.Traceparent); err != nil {
			return dst, err
		}
		dst = append(dst, plugin.Header{Name: "traceparent", Value: r.Traceparent})
	}
	if !state {
		if err := checkHeader("tracestate", r.Tracestate); err != nil {
			return dst, err
		}
		dst = append(dst, plugin.Header{Name: "tracestate", Value: r.Tracestate})
	}
	size := 0
	for _, h := range dst {
		size += len(h.Name) + len(h.Value) + len(": \r\n")
	}
	if size > maxHeader {
		return dst, errLargeHeader{size}
	}
	return dst, nil
}

// appendHead writes the request line and the header, up to and with the empty line.
func (i *instance) appendHead(dst []byte, t *target, fields []plugin.Header, length int) []byte {
	if t == i.wire {
		dst = append(dst, i.lead...)
	} else {
		dst = i.appendLead(dst, t)
	}
	for _, f := range fields {
		dst = appendHeader(dst, f.Name, f.Value)
	}
	dst = append(dst, "Content-Length: "...)
	dst = strconv.AppendInt(dst, int64(length), 10)
	return append(dst, "\r\n\r\n"...)
}

// appendLead writes what is the same for every attempt of an instance.
func (i *instance) appendLead(dst []byte, t *target) []byte {
	dst = append(dst, i.method...)
	dst = append(dst, ' ')
	dst = append(dst, t.path...)
	dst = append(dst, " HTTP/1.1\r\n"...)
	dst = appendHeader(dst, "host", t.host)
	return appendHeader(dst, "accept-encoding", "identity")
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

// keep is what is handed on of a response's header: its short fields before its long ones, within bounds in sum, in the
// order of their names.
func keep(header http.Header) []plugin.Header {
	if len(header) == 0 {
		return nil
	}
	var all []plugin.Header
	for _, name := range slices.Sorted(maps.Keys(header)) {
		for _, value := range header[name] {
			all = append(all, plugin.Header{Name: strings.ToLower(name), Value: value})
		}
	}
	size := func(h plugin.Header) int { return len(h.Name) + len(h.Value) }
	sum := 0
	for _, h := range all {
		sum += size(h)
	}
	if sum <= maxKeptHeader && len(all) <= maxKeptFields {
		return all
	}
	slices.SortStableFunc(all, func(a, b plugin.Header) int { return size(a) - size(b) })
	kept := 0
	sum = 0
	for kept < len(all) && kept < maxKeptFields && sum+size(all[kept]) <= maxKeptHeader {
		sum += size(all[kept])
		kept++
	}
	all = all[:kept]
	slices.SortStableFunc(all, func(a, b plugin.Header) int { return strings.Compare(a.Name, b.Name) })
	return all
}
