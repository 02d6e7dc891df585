package outbound

import (
	"html"
	"strconv"
	"strings"
)

const (
	// mark stands where a secret stood.
	mark = "[redacted]"
	// shortest is the length below which taking a value out of texts would tear ordinary words apart and protect nothing.
	shortest = 6
	// longestReference bounds a character reference of HTML, such as &quot; or &#x2f;.
	longestReference = 10
)

// Echo returns text with [redacted] in the place of each value, also of one that was escaped on its way back: as in JSON, in a
// URI or in HTML, all of it or parts. With cut the text may end within a value, whose beginning is then taken out, too.
// Values of less than six bytes stay. What it costs grows with the text times the values.
func Echo(text string, values []string, cut bool) string {
	var out strings.Builder
	done := 0
	for i := 0; i < len(text); {
		n := 0
		for _, v := range values {
			if len(v) >= shortest {
				n = max(n, echoed(text[i:], v, cut))
			}
		}
		if n == 0 {
			i++
			continue
		}
		out.WriteString(text[done:i] + mark)
		i += n
		done = i
	}
	if done == 0 {
		return text
	}
	return out.String() + text[done:]
}

// echoed is the length of what text begins with and means the value, 0 for nothing.
func echoed(text, value string, cut bool) int {
	if strings.HasPrefix(text, value) {
		return len(value)
	}
	at, seen := 0, 0
	for seen < len(value) {
		rest := text[at:]
		if cut && seen >= shortest && (rest == "" || len(rest) < longestReference && strings.IndexByte(`\%&`, rest[0]) >= 0) {
			return len(text) // it was cut off here, perhaps within an escape
		}
		n, m := escaped(rest, value[seen:])
		if n == 0 {
			return 0
		}
		at, seen = at+n, seen+m
	}
	return at
}

// escaped says how many bytes at the beginning of text mean how many at the beginning of value.
func escaped(text, value string) (n, m int) {
	if text == "" {
		return 0, 0
	}
	is := func(n int, meant string) (int, int) {
		if meant != "" && n <= len(text) && strings.HasPrefix(value, meant) {
			return n, len(meant)
		}
		return 0, 0
	}
	switch {
	case text[0] == '%':
		if b, ok := number(text, 1, 2); ok {
			n, m = is(3, string([]byte{byte(b)}))
		}
	case text[0] == '&':
		if end := strings.IndexByte(text[:min(len(text), longestReference)], ';'); end > 0 {
			n, m = is(end+1, html.UnescapeString(text[:end+1]))
		}
	case text[0] == '+' && value[0] == ' ':
		return 1, 1
	case text[0] == '\\':
		slashes := len(text) - len(strings.TrimLeft(text, `\`)) // JSON in JSON has more of them
		rest := text[slashes:]
		switch {
		case value[0] == '\\':
			n, m = is(min(slashes, 2), `\`)
		case rest == "":
		case rest[0] == 'u':
			if r, ok := number(rest, 1, 4); ok {
				n, m = is(slashes+5, string(rune(r)))
			}
		case rest[0] == 'x':
			if b, ok := number(rest, 1, 2); ok {
				n, m = is(slashes+3, string([]byte{byte(b)}))
			}
		}
		if n == 0 && rest != "" && value[0] != '\\' && rest[0] == value[0] {
			return slashes + 1, 1
		}
	}
	if n == 0 && text[0] == value[0] {
		return 1, 1
	}
	return n, m
}

// number reads digits hexadecimal digits of text.
func number(text string, from, digits int) (uint64, bool) {
	if len(text) < from+digits {
		return 0, false
	}
	v, err := strconv.ParseUint(text[from:from+digits], 16, 32)
	return v, err == nil
}
