package twilio

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// pair is one decoded field of a form.
type pair struct{ key, value string }

// appendForm adds the form's fields to dst as they are signed: decoded, in the order of their keys, key
// and value without anything between. The errors are about what the official libraries would read
// differently, or not at all; they show keys, which are no secrets, and no values.
func appendForm(dst []byte, form string) ([]byte, error) {
	pairs, err := parseForm(form)
	if err != nil {
		return dst, err
	}
	slices.SortStableFunc(pairs, func(a, b pair) int { return cmp.Compare(a.key, b.key) })
	for i, p := range pairs {
		if i > 0 && pairs[i-1].key == p.key {
			// Of a list, npm's library signs each value once and Go's only the first.
			if pairs[i-1].value != p.value {
				return dst, fmt.Errorf("the form has the key %q twice with different values, which Twilio's libraries verify differently; want each key once", p.key)
			}
			continue
		}
		dst = append(dst, p.key...)
		dst = append(dst, p.value...)
	}
	return dst, nil
}

func parseForm(form string) ([]pair, error) {
	var pairs []pair
	for field := range strings.SplitSeq(form, "&") {
		if field == "" {
			continue
		}
		if strings.Contains(field, ";") {
			return nil, fmt.Errorf("field %d of the form has a bare semicolon, which some receivers take for a separator; want %%3B", len(pairs)+1)
		}
		rawKey, rawValue, _ := strings.Cut(field, "=")
		key, keyErr := url.QueryUnescape(rawKey)
		value, valueErr := url.QueryUnescape(rawValue)
		if err := cmp.Or(keyErr, valueErr); err != nil {
			return nil, fmt.Errorf("field %d of the form has a %% that begins no escape; want %%25 for a percent sign", len(pairs)+1)
		}
		if !utf8.ValidString(key) || !utf8.ValidString(value) {
			return nil, fmt.Errorf("field %d of the form is not UTF-8, and receivers differ in how they read it", len(pairs)+1)
		}
		pairs = append(pairs, pair{key, value})
	}
	return pairs, nil
}
