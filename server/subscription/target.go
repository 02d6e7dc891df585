package subscription

import (
	"crypto/sha256"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/grapnel/grapnel/internal/header"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Origin is what attempts of a subscription connect to, and through what: whether a connection comes about, or an answer in
// time, is the same matter for all that have the same. The zero Origin is that of a subscription whose URI names no host.
type Origin struct {
	// Host is scheme, host and port, as in https://hooks.example.com:443; the port is left out where the scheme's is not
	// known.
	Host string
	// through is the transport: another plugin, proxy or client certificate may come through, or not.
	through [32]byte
}

// Origin of the subscription. It is computed.
func (s *Subscription) Origin() Origin {
	p := s.Proto()
	u, err := url.Parse(p.GetUri())
	if err != nil || u.Hostname() == "" {
		return Origin{}
	}
	scheme, port := strings.ToLower(u.Scheme), u.Port()
	switch {
	case port != "":
	case scheme == "https":
		port = "443"
	case scheme == "http":
		port = "80"
	}
	host := strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if port != "" {
		host += ":" + port
	}
	return Origin{Host: scheme + "://" + host, through: through(p)}
}

func through(p *grapnelv1.Subscription) [32]byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(p.GetTransport())
	if err != nil {
		b = []byte(p.GetUid())
	}
	return sha256.Sum256(b)
}

// uri checks where requests go. Whether the address may be reached is decided when it is dialled.
func (c *checker) uri(field, uri string) {
	if uri == "" {
		c.add(field, "uri.required", "is empty; want an absolute URL, such as https://hooks.example.com/orders")
		return
	}
	if len(uri) > 2048 {
		c.add(field, "uri.length", "has %d characters; want at most 2048", len(uri))
		return
	}
	for i := range len(uri) {
		if b := uri[i]; b <= ' ' || b >= 0x7f {
			c.add(field, "uri.characters", "holds a blank, a control character or a character outside ASCII at position %d; percent-encode it (host names: use the xn-- form)", i)
			return
		}
	}
	u, err := url.Parse(uri)
	if err != nil {
		// The parser's text may hold the userinfo.
		c.add(field, "uri.syntax", "is not a URL; want an absolute URL, such as https://hooks.example.com/orders")
		return
	}
	if u.User != nil {
		c.add(field, "uri.userinfo", "holds a user name or password; keep it in a secret that the transport refers to")
		return
	}
	switch {
	case u.Scheme == "":
		c.add(field, "uri.scheme", "has no scheme; want an absolute URL, such as https://hooks.example.com/orders")
	case u.Hostname() == "" && (transportFor(uri) != "" || u.Path == ""):
		// Another scheme's URI may name a place on this machine, as in file-spool:///orders.
		c.add(field, "uri.host", "has no host behind %s:; want an absolute URL, such as %s://hooks.example.com/orders", u.Scheme, u.Scheme)
	}
	if u.Fragment != "" || strings.Contains(uri, "#") {
		c.add(field, "uri.fragment", "has a fragment (%q), which is never sent; leave it out", "#"+u.Fragment)
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
			c.add(field, "uri.port", "port %q is out of range; want 1 to 65535", p)
		}
	} else if strings.HasSuffix(u.Host, ":") {
		c.add(field, "uri.port", "ends the host in ':' without a port; leave the ':' out")
	}
}

const (
	maxHeaderName  = 128
	maxHeaderValue = 4096
)

// headers checks what is added to each request.
func (c *checker) headers(field string, headers map[string]string) {
	if len(headers) > 32 {
		c.add(field, "map.max_pairs", "has %d headers; want at most 32", len(headers))
	}
	seen := make(map[string]string, len(headers))
	for _, name := range sortedKeys(headers) {
		at := fmt.Sprintf("%s[%q]", field, name)
		value, lower := headers[name], strings.ToLower(name)
		if !isToken(name) || len(name) > maxHeaderName {
			c.add(at, "headers.name", "%q is not a header name; want letters, digits and hyphens, such as X-Team", name)
			continue
		}
		if first, ok := seen[lower]; ok {
			c.add(at, "headers.unique", "%q and %q are the same header; names do not depend on case", first, name)
		}
		seen[lower] = name
		if why := reserved(lower); why != "" {
			c.add(at, "headers.reserved", "%q cannot be set here: %s", name, why)
		}
		c.headerValue(at, value)
	}
}

// headerValue checks what a subscription says of a header's value, and reports whether that is right.
func (c *checker) headerValue(at, value string) bool {
	switch {
	case !isFieldValue(value):
		c.add(at, "headers.value", "the value holds a line break or another control character; want one line of text")
	case value != strings.TrimSpace(value):
		c.add(at, "headers.value", "the value begins or ends with a blank, which is not kept on the way; leave it out")
	case len(value) > maxHeaderValue:
		c.add(at, "headers.value", "the value has %d bytes; want at most %d", len(value), maxHeaderValue)
	case looksSecret(value):
		c.add(at, "headers.secret", "this looks like a secret; store it with SecretService.CreateSecret and use it through a plugin's secrets")
	default:
		return true
	}
	return false
}

// reserved says why a header may not be set by a subscription; empty means it may.
func reserved(name string) string {
	name = header.Key(name)
	const (
		hop   = "it belongs to one connection and is set by the transport"
		event = "it is made from each event"
		auth  = "headers can be read by many; keep credentials in a secret (SecretService.CreateSecret) and name it in the secrets of a signer or of the transport"
	)
	switch {
	case strings.HasPrefix(name, "webhook-"):
		return "headers that begin with webhook- are set by the signer"
	case strings.HasPrefix(name, "ce-"):
		return "headers that begin with ce- carry the event's attributes"
	case slices.Contains([]string{"authorization", "proxy-authorization", "cookie"}, name):
		return auth
	case slices.Contains([]string{"content-type", "traceparent"}, name):
		return event
	case slices.Contains([]string{"host", "user-agent"}, name):
		return "it is set by the transport"
	case slices.Contains([]string{"accept-encoding", "connection", "content-length", "expect", "http2-settings", "keep-alive", "proxy-connection",
		"te", "trailer", "transfer-encoding", "upgrade"}, name):
		return hop
	}
	return ""
}

// isToken reports whether s is a token of RFC 9110.
func isToken(s string) bool {
	for i := range len(s) {
		b := s[i]
		alnum := b >= '0' && b <= '9' || b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z'
		if !alnum && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(b)) {
			return false
		}
	}
	return s != ""
}

// isFieldValue reports whether s can be sent as a header value: no control character but tab.
func isFieldValue(s string) bool {
	for i := range len(s) {
		if b := s[i]; b < ' ' && b != '\t' || b == 0x7f {
			return false
		}
	}
	return true
}
