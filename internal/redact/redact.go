// Package redact takes the values of secrets out of texts.
package redact

import (
	"encoding/base64"
	"slices"
	"strings"
	"sync"
)

// Mark stands where a secret stood.
const Mark = "[redacted]"

const (
	// shortest is the length from which values are looked for: shorter ones would tear ordinary words apart, and protect
	// nothing.
	shortest = 6
	// shortestLine is the same for the single lines of a value that has several.
	shortestLine = 16
	// longestPrefix bounds the name in front of values such as whsec_….
	longestPrefix = 12
)

// Set are values that must not be seen. What a look costs grows with the text and not with the set. The zero Set is
// empty; all methods are safe for concurrent use.
type Set struct {
	mu sync.RWMutex // guards what follows
	// forms are what is looked for, by their first bytes, and how many values want it.
	forms map[[shortest]byte]map[string]int
	// least is at most the length of the shortest, and first has the bytes that one may begin with, a bit each: both know
	// those too that have been removed, until all are.
	least int
	first [4]uint64
}

// Add has a value taken out of texts: itself, what follows the prefix in such as whsec_…, the key of which that is the
// base64, and if it has several lines each long one, since output comes in lines. A value counts as often as it was added.
func (s *Set) Add(value string) { s.change(value, 1) }

// Remove takes back one Add.
func (s *Set) Remove(value string) { s.change(value, -1) }

func (s *Set) change(value string, by int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	each(value, func(form string) {
		key := [shortest]byte([]byte(form[:shortest]))
		if s.forms == nil {
			s.forms = map[[shortest]byte]map[string]int{}
		}
		if len(s.forms) == 0 {
			s.least, s.first = len(form), [4]uint64{}
		}
		s.least = min(s.least, len(form))
		s.first[form[0]/64] |= 1 << (form[0] % 64)
		if s.forms[key] == nil {
			s.forms[key] = map[string]int{}
		}
		if s.forms[key][form] += by; s.forms[key][form] <= 0 {
			delete(s.forms[key], form)
		}
		if len(s.forms[key]) == 0 {
			delete(s.forms, key)
		}
	})
}

// each calls f with what is looked for because of a value.
func each(value string, f func(form string)) {
	if len(value) < shortest {
		return
	}
	f(value)
	if i := strings.IndexByte(value, '_'); i > 0 && i < longestPrefix && len(value)-i-1 >= shortest {
		f(value[i+1:]) // whsec_…: the part that counts, and the key that it stands for
		if key, err := base64.StdEncoding.DecodeString(value[i+1:]); err == nil && len(key) >= shortest {
			f(string(key))
		}
	}
	if !strings.Contains(value, "\n") {
		return
	}
	var private []string
	var shown strings.Builder // a modulus is in the key and in its certificate, and a line of it may be a line of both
	public := false           // within a PEM block that is no key: a certificate may be shown
	for line := range strings.Lines(value) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "-----BEGIN "); ok {
			public = !strings.Contains(name, "PRIVATE KEY")
		}
		switch {
		case strings.HasPrefix(line, "-----"):
		case public:
			shown.WriteString(line)
		case len(line) >= shortestLine:
			private = append(private, line)
		}
		public = public && !strings.HasPrefix(line, "-----END ")
	}
	for _, line := range private {
		if !strings.Contains(shown.String(), line) {
			f(line)
		}
	}
}

// Clean returns text with Mark in the place of each value, and of a beginning of one that the text ends in: it may have
// been cut off. Values are found as they are and as libraries write them into errors: see views.
func (s *Set) Clean(text string) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if len(s.forms) == 0 || len(text) < shortest {
		return text
	}
	var found []span
	for i := 0; i+shortest <= len(text); i++ {
		if n := longest(s, text[i:], true); n > 0 {
			found = append(found, span{i, i + n})
		}
	}
	views(text, s.least, func(v *view) {
		for i := 0; i+shortest <= len(v.bytes); i++ {
			if n := longest(s, v.bytes[i:], v.last); n > 0 {
				found = append(found, span{v.place(i).from, v.place(i + n - 1).to})
			}
		}
	})
	if len(found) == 0 {
		return text
	}
	slices.SortFunc(found, func(a, b span) int { return a.from - b.from })
	var out strings.Builder
	done := 0 // text up to here is in out
	for k := 0; k < len(found); {
		taken := found[k] // those that overlap or touch go as one
		for k++; k < len(found) && found[k].from <= taken.to; k++ {
			taken.to = max(taken.to, found[k].to)
		}
		out.WriteString(text[done:taken.from] + Mark)
		done = taken.to
	}
	out.WriteString(text[done:])
	return out.String()
}

// span is a part of a text.
type span struct{ from, to int }

// longest is the length of the longest value that text begins with, or, where the text may have been cut off, that begins
// with text.
func longest[T string | []byte](s *Set, text T, cut bool) int {
	if s.first[text[0]/64]&(1<<(text[0]%64)) == 0 {
		return 0
	}
	longest := 0
	for form := range s.forms[[shortest]byte([]byte(text[:shortest]))] {
		n := min(len(form), len(text))
		if string(text[:n]) == form[:n] && (n == len(form) || cut) {
			longest = max(longest, n)
		}
	}
	return longest
}

// Text is Clean with a set of values, for those who need it once.
func Text(text string, values [][]byte) string {
	var s Set
	for _, v := range values {
		s.Add(string(v))
	}
	return s.Clean(text)
}

// Line is what may be shown of a stranger's text: valid UTF-8 on one line, without secrets and without control characters,
// lest it steer the terminal of who reads it, and cut to most bytes and an ellipsis.
func Line(s *Set, text string, most int) string {
	// What is looked at is bounded as well; Clean knows beginnings of secrets at the end.
	text = s.Clean(strings.ToValidUTF8(text[:min(len(text), max(16<<10, 2*most))], "\uFFFD"))
	text = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0:
			return '\uFFFD'
		}
		return r
	}, text)
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}
