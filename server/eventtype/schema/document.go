package schema

import (
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth is how deep a payload may be nested to be checked, and maxSchemaDepth a schema.
const (
	maxDepth       = 128
	maxSchemaDepth = 64
)

// kind is a JSON type, one bit each, so that a set of them is a mask.
type kind uint8

const (
	kindNull kind = 1 << iota
	kindBoolean
	kindNumber
	kindString
	kindArray
	kindObject
	// kindInteger is only in masks: a number without a fraction.
	kindInteger
)

func (k kind) String() string {
	switch k {
	case kindNull:
		return "null"
	case kindBoolean:
		return "a boolean"
	case kindNumber:
		return "a number"
	case kindString:
		return "a string"
	case kindArray:
		return "an array"
	case kindObject:
		return "an object"
	case kindInteger:
		return "an integer"
	}
	return "nothing"
}

// document is a JSON text taken apart: its values in the order in which they stand. A value that holds others is followed
// by them; of an object those are by turns names and values.
type document struct {
	text  []byte
	nodes []node
	// read are the strings with escapes, without them, that somebody has asked for.
	read []byte
}

// node is one value.
type node struct {
	kind kind
	// escaped strings hold a backslash; plain ones ASCII only and no backslash. Those that are apart were escaped, and stand
	// in document.read.
	escaped, plain, apart bool
	// from and to are its text: of a string without its quotes.
	from, to uint32
	// next is the index behind it and all it holds; count is how many elements or members it has.
	next, count uint32
}

// A syntaxError says where a text ceases to be JSON.
type syntaxError struct {
	offset int
	what   string
}

func (e *syntaxError) Error() string { return fmt.Sprintf("%s at byte %d", e.what, e.offset) }

// parser reads one document (RFC 8259). It keeps nothing and copies nothing.
type parser struct {
	*document
	at    int
	depth int
	most  int
}

// parse reads text, which must stay as it is while d is in use, into d.
func (d *document) parse(text []byte, most int) error {
	d.text, d.nodes, d.read = text, d.nodes[:0], d.read[:0]
	p := parser{document: d, most: most}
	p.space()
	if err := p.value(); err != nil {
		return err
	}
	if p.space(); p.at < len(text) {
		return p.fault("something follows the value")
	}
	return nil
}

func (p *parser) fault(what string) error { return &syntaxError{p.at, what} }

func (p *parser) space() {
	for p.at < len(p.text) && p.text[p.at] <= ' ' {
		switch p.text[p.at] {
		case ' ', '\t', '\n', '\r':
			p.at++
		default:
			return
		}
	}
}

// add notes a value whose text begins here, and returns its index.
func (p *parser) add(k kind) int {
	p.nodes = append(p.nodes, node{kind: k, from: uint32(p.at), next: uint32(len(p.nodes) + 1)}) //nolint:gosec // a message has 4 MiB at most
	return len(p.nodes) - 1
}

func (p *parser) value() error {
	if p.at == len(p.text) {
		return p.fault("the text ends where a value should be")
	}
	switch c := p.text[p.at]; {
	case c == '"':
		return p.str()
	case c == '{':
		return p.object()
	case c == '[':
		return p.array()
	case c == '-', c >= '0' && c <= '9':
		return p.number()
	case c == 't':
		return p.word("true", kindBoolean)
	case c == 'f':
		return p.word("false", kindBoolean)
	case c == 'n':
		return p.word("null", kindNull)
	}
	return p.fault("there is no value")
}

func (p *parser) word(word string, k kind) error {
	if len(p.text)-p.at < len(word) || string(p.text[p.at:p.at+len(word)]) != word {
		return p.fault("there is no value")
	}
	i := p.add(k)
	p.at += len(word)
	p.nodes[i].to = uint32(p.at) //nolint:gosec // as in add
	return nil
}

func (p *parser) digits() bool {
	from := p.at
	for p.at < len(p.text) && p.text[p.at] >= '0' && p.text[p.at] <= '9' {
		p.at++
	}
	return p.at > from
}

func (p *parser) is(c byte) bool { return p.at < len(p.text) && p.text[p.at] == c }

func (p *parser) isOne(chars string) bool {
	return p.at < len(p.text) && strings.IndexByte(chars, p.text[p.at]) >= 0
}

func (p *parser) number() error {
	i := p.add(kindNumber)
	if p.is('-') {
		p.at++
	}
	zero := p.is('0')
	from := p.at
	if !p.digits() || zero && p.at > from+1 {
		return p.fault("that is not a number")
	}
	if p.is('.') {
		p.at++
		if !p.digits() {
			return p.fault("that is not a number")
		}
	}
	if p.isOne("eE") {
		p.at++
		if p.isOne("+-") {
			p.at++
		}
		if !p.digits() {
			return p.fault("that is not a number")
		}
	}
	p.nodes[i].to = uint32(p.at) //nolint:gosec // as in add
	return nil
}

func (p *parser) str() error {
	p.at++
	i := p.add(kindString)
	n := &p.nodes[i]
	ascii := true
	for p.at < len(p.text) {
		for p.at < len(p.text) { // most of it
			if c := p.text[p.at]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
				break
			}
			p.at++
		}
		if p.at == len(p.text) {
			break
		}
		switch c := p.text[p.at]; {
		case c == '"':
			n.to, n.plain = uint32(p.at), ascii && !n.escaped //nolint:gosec // as in add
			if !ascii && !utf8.Valid(p.text[n.from:n.to]) {
				return p.fault("that is not UTF-8 in the string that ends")
			}
			p.at++
			return nil
		case c == '\\':
			n.escaped = true
			if err := p.escape(); err != nil {
				return err
			}
		case c < ' ':
			return p.fault("there is a control character in a string")
		default:
			ascii = false
			p.at++
		}
	}
	return p.fault("the text ends in a string")
}

func (p *parser) escape() error {
	p.at++
	if !p.isOne(`"\/bfnrtu`) {
		return p.fault("that is no escape")
	}
	if p.text[p.at] == 'u' {
		for range 4 {
			if p.at++; !p.isOne("0123456789abcdefABCDEF") {
				return p.fault("that is no escape")
			}
		}
	}
	p.at++
	return nil
}

// open and shut are the two ends of what holds others.
func (p *parser) open(k kind) (int, error) {
	if p.depth++; p.depth > p.most {
		return 0, p.fault(fmt.Sprintf("it is nested deeper than %d levels", p.most))
	}
	i := p.add(k)
	p.at++
	p.space()
	return i, nil
}

func (p *parser) shut(i int) error {
	p.depth--
	p.at++
	n := &p.nodes[i]
	n.to, n.next = uint32(p.at), uint32(len(p.nodes)) //nolint:gosec // as in add
	return nil
}

func (p *parser) array() error {
	i, err := p.open(kindArray)
	if err != nil {
		return err
	}
	if p.is(']') {
		return p.shut(i)
	}
	for {
		if err := p.value(); err != nil {
			return err
		}
		p.nodes[i].count++
		p.space()
		switch {
		case p.is(']'):
			return p.shut(i)
		case !p.is(','):
			return p.fault("an array wants , or ]")
		}
		p.at++
		p.space()
	}
}

func (p *parser) object() error {
	i, err := p.open(kindObject)
	if err != nil {
		return err
	}
	if p.is('}') {
		return p.shut(i)
	}
	for {
		if !p.is('"') {
			return p.fault("an object wants a name in quotes")
		}
		if err := p.str(); err != nil {
			return err
		}
		if p.space(); !p.is(':') {
			return p.fault("an object wants : behind a name")
		}
		p.at++
		p.space()
		if err := p.value(); err != nil {
			return err
		}
		p.nodes[i].count++
		p.space()
		switch {
		case p.is('}'):
			return p.shut(i)
		case !p.is(','):
			return p.fault("an object wants , or }")
		}
		p.at++
		p.space()
	}
}

// raw is the text of a value that is no string, as it stands.
func (d *document) raw(i uint32) []byte { return d.text[d.nodes[i].from:d.nodes[i].to] }

// string is a string without its escapes, which are read once: that changes the document. It may be part of its text.
func (d *document) string(i uint32) []byte {
	n := &d.nodes[i]
	if n.escaped {
		from := len(d.read)
		d.read = unescape(d.read, d.text[n.from:n.to])
		n.escaped, n.apart = false, true
		n.from, n.to = uint32(from), uint32(len(d.read)) //nolint:gosec // no escape is shorter than what it stands for
	}
	if n.apart {
		return d.read[n.from:n.to]
	}
	return d.text[n.from:n.to]
}

// settle reads all escapes, so that the document does not change any more.
func (d *document) settle() {
	for i := range d.nodes {
		if d.nodes[i].escaped {
			d.string(uint32(i)) //nolint:gosec // as in add
		}
	}
}

// unescape appends a string that the parser has let through, without its escapes.
func unescape(out, s []byte) []byte {
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			out = append(out, s[i])
			continue
		}
		i++
		switch c := s[i]; c {
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			r := hex4(s[i+1:])
			i += 4
			if utf16.IsSurrogate(r) && i+6 < len(s) && s[i+1] == '\\' && s[i+2] == 'u' {
				if both := utf16.DecodeRune(r, hex4(s[i+3:])); both != utf8.RuneError {
					r, i = both, i+6
				}
			}
			out = utf8.AppendRune(out, r) // half a pair becomes U+FFFD
		default:
			out = append(out, c)
		}
	}
	return out
}

func hex4(s []byte) rune {
	var r rune
	for _, c := range s[:4] {
		r <<= 4
		switch {
		case c >= 'a':
			r |= rune(c - 'a' + 10)
		case c >= 'A':
			r |= rune(c - 'A' + 10)
		default:
			r |= rune(c - '0')
		}
	}
	return r
}

// pointer is the JSON Pointer (RFC 6901) to a value; "" is the whole document. It walks there from the root.
func (d *document) pointer(target uint32) string {
	var b strings.Builder
	for at := uint32(0); at != target; {
		n := &d.nodes[at]
		child, index := at+1, 0
		for child < n.next {
			key := child
			if n.kind == kindObject {
				child++
			}
			if target == key || target < d.nodes[child].next {
				b.WriteByte('/')
				if n.kind == kindObject {
					writeToken(&b, d.string(key))
				} else {
					fmt.Fprint(&b, index)
				}
				at = child
				if target == key {
					return b.String()
				}
				break
			}
			child, index = d.nodes[child].next, index+1
		}
		if child >= n.next {
			break // not in the document, which no caller asks
		}
	}
	return b.String()
}

// maxToken bounds what a name out of a payload takes in a pointer; so long a one ends in an ellipsis.
const maxToken = 64

// writeToken writes a name into a pointer. Control characters, which are a stranger's, do not get through.
func writeToken(b *strings.Builder, name []byte) {
	n := 0
	for _, r := range string(name) {
		if n++; n > maxToken {
			b.WriteString("…")
			return
		}
		switch {
		case r == '~':
			b.WriteString("~0")
		case r == '/':
			b.WriteString("~1")
		case r < ' ' || r >= 0x7f && r <= 0x9f:
			b.WriteRune(utf8.RuneError)
		default:
			b.WriteRune(r)
		}
	}
}
