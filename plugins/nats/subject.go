package natsplugin

import (
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const placeholder = "{type}"

var errNoType = errors.New("the subject needs the event's type, and the request has none")

// subjectOf is the template of the subjects to publish to: config's, or the URI's path with dots for
// slashes.
func subjectOf(c Config, a *outbound.Address) (template, pointer string) {
	if c.Subject != "" {
		return c.Subject, "/config/subject"
	}
	return strings.ReplaceAll(strings.Trim(a.URL.Path, "/"), "/", "."), "/target/uri"
}

func checkSubject(c Config, a *outbound.Address) (pointer string, err error) {
	template, pointer := subjectOf(c, a)
	path := strings.Trim(a.URL.Path, "/")
	switch {
	case c.Subject != "" && path != "":
		return pointer, errors.New("the subject is in the URI's path as well; give it in one place")
	case template == "":
		return pointer, fmt.Errorf("there is no subject; write it as the URI's path, %s://host:port/orders.created, or in config.subject", a.Scheme)
	}
	return pointer, checkTokens(strings.ReplaceAll(template, placeholder, "type"))
}

// checkTokens holds a subject against what may be published to: tokens with dots between, no wildcards.
func checkTokens(subject string) error {
	for token := range strings.SplitSeq(subject, ".") {
		switch {
		case token == "":
			return fmt.Errorf("%q has an empty part; want parts with single dots between, as in orders.created", subject)
		case strings.ContainsAny(token, "{}"):
			return fmt.Errorf("%q has a placeholder that there is not; there is only %s", subject, placeholder)
		case strings.ContainsFunc(token, unfit):
			return fmt.Errorf("%q has a wildcard, a blank or a control character, which cannot be published to", subject)
		}
	}
	if strings.HasPrefix(subject, "$JS.") || strings.HasPrefix(subject, "$SYS.") {
		return fmt.Errorf("%q steers the server, and is not for events", subject)
	}
	return nil
}

func unfit(r rune) bool {
	return r == '*' || r == '>' || unicode.IsSpace(r) || unicode.IsControl(r) || r == unicode.ReplacementChar
}

// fill puts the request's event type into a template. What a subject cannot hold becomes an underscore:
// types are the publisher's, and must not lead elsewhere.
func fill(template string, r *plugin.Request) (string, error) {
	if !strings.Contains(template, placeholder) {
		return template, nil
	}
	if r.EventType == "" {
		return "", errNoType
	}
	kind := r.EventType
	tokens := strings.Split(kind, ".")
	for i, token := range tokens {
		if tokens[i] = strings.Map(func(c rune) rune {
			if c == '$' || unfit(c) {
				return '_'
			}
			return c
		}, token); token == "" {
			tokens[i] = "_"
		}
	}
	return strings.ReplaceAll(template, placeholder, strings.Join(tokens, ".")), nil
}
