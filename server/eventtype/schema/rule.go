package schema

import "regexp"

// rule is what a schema asks of one value. Immutable once built; rules refer to each other, also in circles.
type rule struct {
	// at is where it stands in the schema.
	at string
	// never allows no value.
	never bool
	// types are the kinds allowed; none is all.
	types          kind
	constant, enum *values

	ref                         *rule
	all, anyOf, oneOf           []*rule
	not, when, then, otherwise  *rule
	unevaluatedProperties       *rule
	unevaluatedItems            *rule
	tracks                      bool
	ofObject, ofArray, ofString bool

	// Bounds are -1 where there is none.
	minProperties, maxProperties int
	properties                   map[string]property
	required                     []string
	patterns                     []patternRule
	additional                   *rule
	names                        *rule
	dependents                   []dependency

	minItems, maxItems       int
	unique                   bool
	prefix                   []*rule
	items                    *rule
	contains                 *rule
	minContains, maxContains int
	containsEvaluates        bool

	minLength, maxLength int
	pattern              *pattern
	format               func(any) error
	formatName           string

	limits []limit
}

// property is a name that properties or required has.
type property struct {
	rule *rule
	// required is its index in required, or -1. unnamed: properties does not have it.
	required int
	unnamed  bool
}

type pattern struct {
	*regexp.Regexp
	text   string
	weight int
}

type patternRule struct {
	pattern
	rule *rule
}

// dependency is what is asked of an object that has a name.
type dependency struct {
	name     string
	required []string
	rule     *rule
}

// values are those of an enum or a const.
type values struct {
	strings map[string]bool
	others  []*document
	count   int
	// shown is the list for people, cut.
	shown string
}

type limitKind uint8

const (
	atLeast limitKind = iota
	above
	atMost
	below
	multiple
)

// limit is a bound of a number.
type limit struct {
	kind  limitKind
	value decimal
	text  string
}
