package outbound

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const uriPointer = "/target/uri"

// Address is where a URI leads.
type Address struct {
	Scheme string
	// Host is a name in ASCII or an IP address, without brackets.
	Host string
	Port uint16
	// URL is the whole.
	URL *url.URL
}

// String is host:port, as net.Dial takes it.
func (a *Address) String() string { return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))) }

// Parse reads a URI of one of the schemes, which come with their default ports. It refuses what a
// transport could only ignore: user names, queries and fragments.
func Parse(text string, ports map[string]uint16) (*Address, error) {
	a, err := ParseQuery(text, ports)
	if err == nil && (a.URL.RawQuery != "" || a.URL.ForceQuery) {
		return nil, fmt.Errorf("the URI has a query (?…), which %s does not send; remove it", a.Scheme)
	}
	return a, err
}

// ParseQuery is Parse for transports that send queries.
func ParseQuery(text string, ports map[string]uint16) (*Address, error) {
	u, err := url.Parse(text)
	if err != nil {
		// url.Error repeats the text, which may hold credentials.
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, fmt.Errorf("the URI cannot be read: %w", err)
	}
	port, known := ports[u.Scheme]
	switch {
	case !known:
		return nil, fmt.Errorf("the URI's scheme is %q; this transport carries %s", u.Scheme,
			strings.Join(slices.Sorted(maps.Keys(ports)), "://, ")+"://")
	case u.Opaque != "" || u.Hostname() == "":
		return nil, fmt.Errorf("the URI has no host; write %s://host:port", u.Scheme)
	case u.User != nil:
		return nil, errors.New("the URI holds a user name or password; keep credentials in a secret and fill one of the transport's slots")
	case u.Fragment != "" || strings.Contains(text, "#"):
		return nil, errors.New("the URI has a fragment (#…), which is never sent; remove it")
	}
	a := &Address{Scheme: u.Scheme, Host: u.Hostname(), Port: port, URL: u}
	if text := u.Port(); text != "" {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return nil, errors.New("the URI's port must be 1 to 65535")
		}
		a.Port = uint16(n)
	}
	return a, CheckHost(a.Host)
}

// CheckHost takes IP addresses without a zone, and names that mean the same to every resolver.
func CheckHost(host string) error {
	if strings.ContainsAny(host, ":%") {
		if addr, err := netip.ParseAddr(host); err != nil || addr.Zone() != "" {
			return errors.New("the URI's host is not an IPv6 address; zones and escaped characters are not taken")
		}
		return nil
	}
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"
	if strings.Trim(host, plain) != "" {
		return errors.New("the URI's host may have letters, digits, hyphens, dots and underscores only; write other names in their xn-- form")
	}
	return nil
}

// Check looks at what the address itself gives away; names are looked up when an attempt is made.
func (a *Address) Check(egress *plugin.Egress) []plugin.Problem {
	addr, err := netip.ParseAddr(a.Host)
	if err == nil {
		if egress.Check(netip.AddrPortFrom(addr, a.Port)) == nil {
			return nil
		}
		return []plugin.Problem{{
			Pointer: uriPointer, Code: "uri.egress",
			Summary: fmt.Sprintf("%s, port %d, is blocked by egress policy; an operator can open it", addr, a.Port),
		}}
	}
	anyPublic := netip.AddrFrom4([4]byte{1, 1, 1, 1})
	if egress.Check(netip.AddrPortFrom(anyPublic, a.Port)) == nil {
		return nil
	}
	return []plugin.Problem{{
		Pointer: uriPointer, Code: "uri.port", Warning: true,
		Summary: fmt.Sprintf("port %d is open only for addresses that an operator has allowed", a.Port),
	}}
}

// Invalid is the problem of a URI that Parse has refused.
func Invalid(err error) plugin.Problem {
	return plugin.Problem{Pointer: uriPointer, Code: "uri.invalid", Summary: err.Error()}
}

// Plaintext warns that the scheme hides nothing from the way.
func (a *Address) Plaintext(better string) plugin.Problem {
	return plugin.Problem{
		Pointer: uriPointer, Code: "uri.plaintext", Warning: true,
		Summary: fmt.Sprintf("%s sends the payload readable for everyone on the way; use %s", a.Scheme, better),
	}
}

// Escape makes a name a part of an RFC 6901 pointer.
func Escape(name string) string { return strings.NewReplacer("~", "~0", "/", "~1").Replace(name) }
