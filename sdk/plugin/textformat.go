package plugin

import (
	"errors"
	"fmt"
	"net/mail"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

// formatNames are the values of the tag format, as JSON Schema has them.
func formatNames() []string {
	return []string{"date-time", "email", "hostname", "ipv4", "ipv6", "uri"}
}

// formatOf is the check behind a value of the tag format; nil for one that there is not. Its error says what would be
// right.
func formatOf(name string) func(text string) error {
	if !slices.Contains(formatNames(), name) {
		return nil
	}
	return func(text string) error {
		switch name {
		case "date-time":
			if _, err := time.Parse(time.RFC3339, text); err != nil {
				return errors.New("such as 2026-01-02T15:04:05Z")
			}
		case "email":
			if a, err := mail.ParseAddress(text); err != nil || a.Address != text {
				return errors.New("such as events@example.com")
			}
		case "hostname":
			return hostname(text)
		case "ipv4", "ipv6":
			a, err := netip.ParseAddr(text)
			if err != nil || a.Zone() != "" || a.Is4() != (name == "ipv4") {
				return fmt.Errorf("such as %s", map[string]string{"ipv4": "192.0.2.1", "ipv6": "2001:db8::1"}[name])
			}
		case "uri":
			if u, err := url.Parse(text); err != nil || !u.IsAbs() {
				return errors.New("such as https://example.com/path")
			}
		}
		return nil
	}
}

// hostname takes names of RFC 1123: labels of letters, digits and hyphens.
func hostname(text string) error {
	wrong := errors.New("such as events.example.com")
	if len(text) == 0 || len(text) > 253 {
		return wrong
	}
	for label := range strings.SplitSeq(text, ".") {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return wrong
		}
		for _, c := range label {
			if c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
				return wrong
			}
		}
	}
	return nil
}
