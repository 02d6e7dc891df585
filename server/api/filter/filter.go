// Package filter is the filter language of the list methods, a subset of AIP-160:
//
//	filter      = term { "AND" term }
//	term        = restriction | "NOT" restriction | "(" restriction { "OR" restriction } ")"
//	restriction = field op value          op = "=" "!=" "<" "<=" ">" ">=" ":"
//
// Brackets may be left out when all sides of an OR name the same field. A value is a bare word, which ends
// at white space or a bracket, or is quoted with " or '. A * at the end of a text matches any rest;
// one that is meant is \* in quotes. ":" asks whether a text holds another, a list has an element, or a map has a key.
//
// Parse checks everything against a table of fields, so that a Filter that exists can be evaluated without
// an error. A Filter is a predicate, and tells what an index can use of it.
package filter

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Limits of a filter.
const (
	MaxLength       = 2048
	MaxRestrictions = 20
)

// Op is a comparison.
type Op string

// The comparisons.
const (
	Equal          Op = "="
	NotEqual       Op = "!="
	Less           Op = "<"
	LessOrEqual    Op = "<="
	Greater        Op = ">"
	GreaterOrEqual Op = ">="
	Has            Op = ":"
)

// Field is something that a filter may name. Exactly one of the getters is set and decides its type.
type Field[T any] struct {
	// Name is what the caller writes; of a map, what stands before ".KEY".
	Name string

	// Text is a string. With Values it is one of these.
	Text func(T) string
	// Texts is a list of strings; a comparison holds when it holds for an element.
	Texts func(T) []string
	// Map is a map of strings.
	Map func(T) map[string]string
	// Int is a whole number.
	Int func(T) int64
	// Time is a time; the zero time is before all others.
	Time func(T) time.Time

	// Values, for Text, are the names that exist, in whatever case they are given; Prefix may stand before each.
	Values []string
	Prefix string
	// Canonical, for Text, may change a value before it is compared, for example a resource name into an
	// id, or refuse it with an error that says in words what it must be.
	Canonical func(string) (string, error)
}

// Error says what is wrong with a filter and where.
type Error struct {
	Message string
	// Offset is the byte at which it went wrong.
	Offset int
	// Fields are those that exist.
	Fields []string
}

func (e *Error) Error() string { return fmt.Sprintf("%s (at character %d)", e.Message, e.Offset+1) }

// Filter is a parsed filter over T. The zero value and nil match everything. Immutable.
type Filter[T any] struct {
	terms []term[T]
}

// term holds when one of its restrictions does.
type term[T any] []restriction[T]

type restriction[T any] struct {
	field *Field[T]
	// key is set for fields of a map.
	key    string
	op     Op
	not    bool
	value  value
	offset int
}

// value is what a field is compared with, by the field's type.
type value struct {
	text   string
	prefix bool
	num    int64
	time   time.Time
}

// Match reports whether t passes.
func (f *Filter[T]) Match(t T) bool {
	if f == nil {
		return true
	}
	for _, term := range f.terms {
		if !slices.ContainsFunc(term, func(r restriction[T]) bool { return r.match(t) }) {
			return false
		}
	}
	return true
}

// Names reports whether the filter says anything about a field.
func (f *Filter[T]) Names(field string) bool {
	return f != nil && slices.ContainsFunc(f.terms, func(t term[T]) bool {
		return slices.ContainsFunc(t, func(r restriction[T]) bool { return r.field.Name == field })
	})
}

// Empty reports whether everything passes.
func (f *Filter[T]) Empty() bool { return f == nil || len(f.terms) == 0 }

// OneOf returns the values that the text field must have one of for t to pass, when the filter says so:
// known is false when it does not. It may return values of which some cannot pass.
func (f *Filter[T]) OneOf(field string) (values []string, known bool) {
	if f == nil {
		return nil, false
	}
	for _, term := range f.terms {
		set, ok := term.oneOf(field)
		switch {
		case !ok:
		case !known:
			values, known = set, true
		default:
			values = slices.DeleteFunc(values, func(v string) bool { return !slices.Contains(set, v) })
		}
	}
	return values, known
}

func (t term[T]) oneOf(field string) ([]string, bool) {
	var set []string
	for _, r := range t {
		if r.field.Name != field || r.field.Text == nil || r.op != Equal || r.not || r.value.prefix {
			return nil, false
		}
		if !slices.Contains(set, r.value.text) {
			set = append(set, r.value.text)
		}
	}
	return set, true
}

// Between returns bounds of the time field outside which nothing passes: since is inclusive, until is not,
// and zero means no bound. The bounds are whole milliseconds.
func (f *Filter[T]) Between(field string) (since, until time.Time) {
	if f == nil {
		return since, until
	}
	for _, term := range f.terms {
		if len(term) != 1 || term[0].field.Name != field || term[0].field.Time == nil || term[0].not {
			continue
		}
		at := term[0].value.time
		low, high := at.Truncate(time.Millisecond), at.Truncate(time.Millisecond).Add(time.Millisecond)
		switch term[0].op {
		case Greater, GreaterOrEqual:
			since = later(since, low)
		case Less, LessOrEqual:
			until = earlier(until, high)
		case Equal:
			since, until = later(since, low), earlier(until, high)
		}
	}
	return since, until
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

func (r *restriction[T]) match(t T) bool { return r.holds(t) != r.not }

func (r *restriction[T]) holds(t T) bool {
	f := r.field
	switch {
	case f.Text != nil:
		return r.compareText(f.Text(t))
	case f.Int != nil:
		return compare(r.op, cmpInt(f.Int(t), r.value.num))
	case f.Time != nil:
		return compare(r.op, f.Time(t).Compare(r.value.time))
	case f.Texts != nil:
		any := slices.ContainsFunc(f.Texts(t), func(s string) bool { return r.value.equals(s) })
		return any != (r.op == NotEqual)
	case r.key == "": // map:key
		_, ok := f.Map(t)[r.value.text]
		return ok
	default:
		v, ok := f.Map(t)[r.key]
		if r.op == Has && r.value.text == "" && r.value.prefix {
			return ok
		}
		return ok && r.compareText(v) || !ok && r.op == NotEqual
	}
}

func (r *restriction[T]) compareText(s string) bool {
	switch r.op {
	case Has:
		return strings.Contains(s, r.value.text)
	case NotEqual:
		return !r.value.equals(s)
	}
	return r.value.equals(s)
}

func (v value) equals(s string) bool {
	if v.prefix {
		return strings.HasPrefix(s, v.text)
	}
	return s == v.text
}

func cmpInt(a, b int64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func compare(op Op, c int) bool {
	switch op {
	case Equal:
		return c == 0
	case NotEqual:
		return c != 0
	case Less:
		return c < 0
	case LessOrEqual:
		return c <= 0
	case Greater:
		return c > 0
	case GreaterOrEqual:
		return c >= 0
	}
	return false
}
