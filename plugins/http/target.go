package httpplugin

import (
	"errors"
	"strings"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
)

// target is a URI taken apart and checked, so that no attempt has to.
type target struct {
	*outbound.Address
	text string
	host string // for the Host header
	path string // path and query, as in the request line
}

// addr is what to dial.
func (t *target) addr() string { return t.String() }

func parseTarget(text string) (*target, error) {
	a, err := outbound.ParseQuery(text, map[string]uint16{"http": 80, "https": 443})
	if err != nil {
		return nil, err
	}
	t := &target{Address: a, text: text, host: strings.TrimSuffix(a.URL.Host, ":"), path: a.URL.RequestURI()}
	if strings.ContainsFunc(t.path, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return nil, errors.New("path and query must be percent-encoded ASCII: no spaces, no other characters")
	}
	return t, nil
}
