package filter

import (
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Parse reads a filter over the given fields. An empty text is the filter that everything passes. The error
// is an *Error.
func Parse[T any](text string, fields []Field[T]) (*Filter[T], error) {
	p := &parser[T]{text: text, fields: fields}
	if len(text) > MaxLength {
		return nil, p.fail(MaxLength, "the filter is longer than "+strconv.Itoa(MaxLength)+" characters")
	}
	if !utf8.ValidString(text) {
		return nil, p.fail(0, "the filter is not valid UTF-8")
	}
	f := &Filter[T]{}
	p.space()
	if p.end() {
		return f, nil
	}
	for {
		t, err := p.term()
		if err != nil {
			return nil, err
		}
		f.terms = append(f.terms, t)
		p.space()
		if p.end() {
			return f, nil
		}
		if !p.keyword("AND") {
			return nil, p.unexpected("AND")
		}
	}
}

type parser[T any] struct {
	text   string
	pos    int
	fields []Field[T]
	count  int
}

func (p *parser[T]) term() (term[T], error) {
	p.space()
	if p.keyword("NOT") {
		p.space()
		if p.peek() == '(' {
			return nil, p.fail(p.pos, "NOT stands before a single comparison, not before a bracket")
		}
		r, err := p.restriction()
		r.not = true
		return term[T]{r}, err
	}
	open := p.pos
	bracket := p.peek() == '('
	if bracket {
		p.pos++
	}
	var t term[T]
	for {
		r, err := p.restriction()
		if err != nil {
			return nil, err
		}
		t = append(t, r)
		p.space()
		if !p.keyword("OR") {
			break
		}
	}
	if !bracket {
		for _, r := range t[1:] {
			if r.field != t[0].field || r.key != t[0].key {
				return nil, p.fail(r.offset, "put brackets around an OR of different fields")
			}
		}
		return t, nil
	}
	if p.peek() != ')' {
		if p.end() {
			return nil, p.fail(open, "this bracket is not closed")
		}
		if p.keyword("AND") {
			return nil, p.fail(p.pos-3, "inside brackets there can be OR only")
		}
		return nil, p.unexpected("OR or )")
	}
	p.pos++
	return t, nil
}

func (p *parser[T]) restriction() (restriction[T], error) {
	p.space()
	start := p.pos
	name := p.word("=<>!:()\"'")
	r := restriction[T]{offset: start}
	if name == "" {
		return r, p.unexpected("a field")
	}
	if r.field, r.key = p.field(name); r.field == nil {
		return r, p.fail(start, "there is no field "+strconv.Quote(name))
	}
	p.space()
	at := p.pos
	if r.op = p.op(); r.op == "" {
		return r, p.unexpected("a comparison (= != < <= > >= :) after " + name)
	}
	if allowed := r.ops(); !slices.Contains(allowed, r.op) {
		return r, p.fail(at, name+" can be compared with "+joinOps(allowed)+" only")
	}
	p.space()
	at = p.pos
	text, star, err := p.value(name)
	if err != nil {
		return r, err
	}
	if p.count++; p.count > MaxRestrictions {
		return r, p.fail(start, "a filter has at most "+strconv.Itoa(MaxRestrictions)+" comparisons")
	}
	r.value, err = p.typed(&r, name, text, star, at)
	return r, err
}

// field finds a field by name, or a map by what stands before the first dot after its name.
func (p *parser[T]) field(name string) (*Field[T], string) {
	for i := range p.fields {
		f := &p.fields[i]
		if name == f.Name {
			return f, ""
		}
		if key, ok := strings.CutPrefix(name, f.Name+"."); ok && f.Map != nil && key != "" {
			return f, key
		}
	}
	return nil, ""
}

func (r *restriction[T]) ops() []Op {
	switch {
	case r.field.Int != nil, r.field.Time != nil:
		return []Op{Equal, NotEqual, Less, LessOrEqual, Greater, GreaterOrEqual}
	case r.field.Map != nil && r.key == "":
		return []Op{Has}
	case r.field.Values != nil:
		return []Op{Equal, NotEqual}
	}
	return []Op{Equal, NotEqual, Has}
}

func joinOps(ops []Op) string {
	texts := make([]string, len(ops))
	for i, op := range ops {
		texts[i] = string(op)
	}
	return strings.Join(texts, " ")
}

func (p *parser[T]) op() Op {
	for _, op := range []Op{NotEqual, LessOrEqual, GreaterOrEqual, Equal, Less, Greater, Has} {
		if strings.HasPrefix(p.text[p.pos:], string(op)) {
			p.pos += len(op)
			return op
		}
	}
	return ""
}

// value reads a bare or quoted value; star tells that a * ended it. Behind a backslash in quotes a * is the character.
func (p *parser[T]) value(name string) (text string, star bool, err error) {
	start := p.pos
	quote := p.peek()
	if quote != '"' && quote != '\'' {
		text = p.word("()")
		if text == "" {
			return "", false, p.unexpected("a value for " + name)
		}
		return p.star(text, start)
	}
	var b strings.Builder
	for p.pos++; ; p.pos++ {
		if p.end() {
			return "", false, p.fail(start, "this quote is not closed")
		}
		c := p.text[p.pos]
		switch {
		case c == quote:
			p.pos++
			return b.String(), star, nil
		case star:
			return "", false, p.fail(start, "a * can stand only at the end of a value; \\* is one that is meant")
		case c == '*':
			star = true
			continue
		case c == '\\' && p.pos+1 < len(p.text):
			p.pos++
			c = p.text[p.pos]
		}
		b.WriteByte(c)
	}
}

func (p *parser[T]) star(text string, start int) (string, bool, error) {
	body, star := strings.CutSuffix(text, "*")
	if strings.Contains(body, "*") {
		return "", false, p.fail(start, "a * can stand only at the end of a value")
	}
	return body, star, nil
}

// typed turns the text of a value into what the field is compared with.
func (p *parser[T]) typed(r *restriction[T], name, text string, star bool, at int) (value, error) {
	f := r.field
	switch {
	case f.Int != nil:
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || star {
			return value{}, p.fail(at, name+" is compared with a whole number, such as 3")
		}
		return value{num: n}, nil
	case f.Time != nil:
		t, err := time.Parse(time.RFC3339Nano, text)
		if err != nil || star {
			return value{}, p.fail(at, name+" is compared with a time as in RFC 3339, such as 2026-11-20T08:00:00Z")
		}
		return value{time: t}, nil
	case f.Values != nil:
		known := slices.IndexFunc(f.Values, func(v string) bool { return strings.EqualFold(text, v) || strings.EqualFold(text, f.Prefix+v) })
		if star || known < 0 {
			return value{}, p.fail(at, name+" is one of "+strings.Join(f.Values, ", "))
		}
		return value{text: f.Values[known]}, nil
	case f.Canonical != nil:
		v, err := f.Canonical(text)
		if err != nil {
			return value{}, p.fail(at, name+" "+err.Error())
		}
		return value{text: v, prefix: star}, nil
	}
	return value{text: text, prefix: star}, nil
}

// word reads up to white space or one of the characters in stop.
func (p *parser[T]) word(stop string) string {
	rest := p.text[p.pos:]
	n := strings.IndexFunc(rest, func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune(stop, r) })
	if n < 0 {
		n = len(rest)
	}
	p.pos += n
	return rest[:n]
}

// keyword takes the word k if it is next.
func (p *parser[T]) keyword(k string) bool {
	rest, ok := strings.CutPrefix(p.text[p.pos:], k)
	if !ok {
		return false
	}
	if r, _ := utf8.DecodeRuneInString(rest); rest != "" && !unicode.IsSpace(r) && r != '(' {
		return false
	}
	p.pos += len(k)
	return true
}

func (p *parser[T]) space() {
	p.pos = len(p.text) - len(strings.TrimLeftFunc(p.text[p.pos:], unicode.IsSpace))
}

func (p *parser[T]) end() bool { return p.pos == len(p.text) }

// peek is the next byte, 0 at the end.
func (p *parser[T]) peek() byte {
	if p.end() {
		return 0
	}
	return p.text[p.pos]
}

func (p *parser[T]) unexpected(want string) *Error {
	at := p.pos
	if p.end() {
		return p.fail(at, "the filter ends where "+want+" should be")
	}
	if c := p.peek(); c == ')' || c == '(' {
		return p.fail(at, want+" should be here instead of "+string(c))
	}
	got := p.word("()")
	for _, k := range []string{"AND", "OR", "NOT"} {
		if got != k && strings.EqualFold(got, k) {
			return p.fail(at, "write "+k+" in capitals")
		}
	}
	if len(got) > 40 {
		got = strings.ToValidUTF8(got[:40], "") + "…"
	}
	return p.fail(at, want+" should be here instead of "+strconv.Quote(got))
}

func (p *parser[T]) fail(at int, message string) *Error {
	names := make([]string, 0, len(p.fields))
	for _, f := range p.fields {
		if f.Map != nil {
			names = append(names, f.Name+".KEY")
		} else {
			names = append(names, f.Name)
		}
	}
	return &Error{Message: message + "; the fields are " + strings.Join(names, ", "), Offset: at, Fields: names}
}
