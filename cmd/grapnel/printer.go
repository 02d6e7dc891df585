package main

import (
	"io"
	"os"
	"strings"
	"sync"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/term"
)

// clean shows what somebody else wrote so that it can neither steer the terminal, nor break the line it stands in, nor
// turn its direction: what does not print is written as in JSON (\u001b, \u202e, \n), a byte that is not UTF-8 as \xff.
func clean(s string) string { return escape(s, printable) }

// cleanLines is clean for texts that may have several lines.
func cleanLines(s string) string { return escape(s, printableOrBlank) }

func printable(r rune) bool { return unicode.IsPrint(r) || unicode.Is(unicode.Zs, r) }

func printableOrBlank(r rune) bool { return r == '\n' || r == '\t' || printable(r) }

func escape(s string, keep func(rune) bool) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r == utf8.RuneError || !keep(r) }) {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && size == 1:
			b.WriteString(`\x`)
			writeHex(&b, uint32(s[0]), 2)
		case keep(r):
			b.WriteRune(r)
		default:
			writeEscaped(&b, r)
		}
		s = s[size:]
	}
	return b.String()
}

// writeEscaped writes a rune as JSON may: within a string of JSON it means the same.
func writeEscaped(b *strings.Builder, r rune) {
	if i := strings.IndexRune("\n\r\t", r); i >= 0 {
		b.WriteByte('\\')
		b.WriteByte("nrt"[i])
		return
	}
	units := []rune{r}
	if r > 0xffff {
		high, low := utf16.EncodeRune(r)
		units = []rune{high, low}
	}
	for _, unit := range units {
		b.WriteString(`\u`)
		writeHex(b, uint32(unit), 4)
	}
}

func writeHex(b *strings.Builder, n uint32, digits int) {
	for shift := 4 * (digits - 1); shift >= 0; shift -= 4 {
		b.WriteByte("0123456789abcdef"[n>>shift&15])
	}
}

// printer is the one way out of this command: whatever came from elsewhere and was not escaped where it was put into a
// sentence or a table is escaped here, line breaks and tabs apart. JSON passes unchanged in meaning. Safe for concurrent use.
type printer struct {
	mu   sync.Mutex
	to   io.Writer
	rest []byte // the beginning of a character, whose end is yet to come
}

func newPrinter(to io.Writer) *printer { return &printer{to: to} }

func (p *printer) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	text := string(append(p.rest, b...))
	whole := len(text) - unfinished(text)
	p.rest = []byte(text[whole:])
	if _, err := io.WriteString(p.to, cleanLines(text[:whole])); err != nil {
		return 0, err
	}
	return len(b), nil
}

// unfinished is how many bytes at the end of s may be the beginning of a character.
func unfinished(s string) int {
	for n := 1; n < utf8.UTFMax && n <= len(s); n++ {
		if c := s[len(s)-n]; utf8.RuneStart(c) {
			if c >= utf8.RuneSelf && !utf8.FullRuneInString(s[len(s)-n:]) {
				return n
			}
			return 0
		}
	}
	return 0
}

// flush writes what will not be completed any more.
func (p *printer) flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, _ = io.WriteString(p.to, cleanLines(string(p.rest)))
	p.rest = nil
}

// exact writes bytes as they are to a file or a pipe. A terminal gets what it can show.
func (c *cli) exact(b []byte) error {
	to := c.stdout
	if p, ok := to.(*printer); ok && !isTerminal(p) {
		to = p.to
	}
	_, err := to.Write(b)
	return err
}

// styled writes what was put together of cleaned parts and of what steers the terminal, which is our own.
func (c *cli) styled(text string) error {
	to := c.stdout
	if p, ok := to.(*printer); ok {
		p.flush()
		to = p.to
	}
	_, err := io.WriteString(to, text)
	return err
}

// isTerminal reports whether a stream of this command is one that a person looks at.
func isTerminal(stream any) bool {
	if p, ok := stream.(*printer); ok {
		stream = p.to
	}
	file, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}
