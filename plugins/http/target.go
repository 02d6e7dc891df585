package httpplugin

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// target is a URI taken apart and checked, so that no attempt has to.
type target struct {
	text     string
	url      *url.URL
	scheme   string
	host     string // for the Host header
	hostname string // to look up and to verify, no brackets
	port     uint16
	path     string // path and query, as in the request line
}

// addr is what to dial.
func (t *target) addr() string { return net.JoinHostPort(t.hostname, strconv.Itoa(int(t.port))) }

func parseTarget(text string) (*target, error) {
	u, err := url.Parse(text)
	if err != nil {
		// url.Error repeats the text, which may hold credentials.
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, fmt.Errorf("the URI cannot be read: %w", err)
	}
	t := &target{text: text, url: u, scheme: u.Scheme, hostname: u.Hostname(), path: u.RequestURI()}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("the URI must start with https:// or http://")
	case u.Opaque != "" || u.Host == "" || t.hostname == "":
		return nil, errors.New("the URI has no host; write https://host/path")
	case u.User != nil:
		return nil, errors.New("the URI holds a user name or password; send credentials in a header instead")
	case u.Fragment != "" || strings.Contains(text, "#"):
		return nil, errors.New("the URI has a fragment (#…), which is never sent; remove it")
	}
	if err := t.setPort(u.Port()); err != nil {
		return nil, err
	}
	if err := checkHostname(t.hostname); err != nil {
		return nil, err
	}
	if i := strings.IndexFunc(t.path, func(r rune) bool { return r <= ' ' || r > '~' }); i >= 0 {
		return nil, errors.New("path and query must be percent-encoded ASCII: no spaces, no other characters")
	}
	return t, nil
}

func (t *target) setPort(text string) error {
	t.host = strings.TrimSuffix(t.url.Host, ":")
	if text == "" {
		t.port = 80
		if t.scheme == "https" {
			t.port = 443
		}
		return nil
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return errors.New("the URI's port must be 1 to 65535")
	}
	t.port = uint16(port)
	return nil
}

// checkHostname takes IP addresses and plain host names. What it lets through needs no escaping in a
// header and means the same to every resolver.
func checkHostname(name string) error {
	if strings.ContainsRune(name, '%') {
		return errors.New("the URI's host has a zone or an escaped character; write a plain name or address")
	}
	if strings.ContainsRune(name, ':') {
		if _, err := netip.ParseAddr(name); err != nil {
			return errors.New("the URI's host is not a valid IPv6 address")
		}
		return nil
	}
	for _, c := range name {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		case c > '~':
			return errors.New("the URI's host has characters outside ASCII; write it in its xn-- form")
		default:
			return errors.New("the URI's host may have letters, digits, hyphens, dots and underscores only")
		}
	}
	return nil
}
