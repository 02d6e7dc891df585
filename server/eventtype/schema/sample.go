package schema

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"regexp/syntax"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

const (
	// MaxSample bounds a sample's bytes.
	MaxSample = 64 << 10
	// sampleTries is how many ways through anyOf, oneOf and if are tried.
	sampleTries = 8
	// sampleValues bounds the values of one sample, and optionalValues those after which only what is required is made.
	sampleValues   = 5000
	optionalValues = 1000
	sampleDepth    = 32
	sampleText     = 16 << 10
	// sampleSteps are those that all tries may take together, each a schema looked at or a piece of a text made: some 100 ns.
	sampleSteps = 500_000
)

// ErrNoSample is wrapped with why no payload could be made that a schema allows.
var ErrNoSample = errors.New("no sample can be made of the schema")

// Sample makes a payload that a schema allows, in compact form and the same each time: of const, examples, default and
// enum where there are such, else of types, formats, patterns and bounds, with everything in it that the schema names,
// but for what would repeat itself. It is checked before it is returned. What it costs is bounded, whatever the schema.
// Errors: *Error, ErrNoSample, and ctx's when that has ended before.
func Sample(ctx context.Context, text []byte) ([]byte, error) {
	loaded, id, err := load(text)
	if err != nil {
		return nil, err
	}
	compiled, err := build(loaded, id, len(text))
	if err != nil {
		return nil, err
	}
	why := errors.New("it is too large, takes too much work or refers to itself too deep")
	left := sampleSteps
	for try := range sampleTries {
		m := sampler{try: try, done: ctx.Done(), left: &left}
		value, ok := m.value([]*jsonschema.Schema{loaded}, 0, 0)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !ok {
			continue
		}
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		if err := e.Encode(value); err != nil || b.Len() > MaxSample {
			continue
		}
		sample := bytes.TrimSpace(b.Bytes())
		bad, err := compiled.Check(ctx, sample)
		if err != nil {
			return nil, err
		}
		if bad == nil {
			return sample, nil
		}
		if try == 0 {
			why = bad
		}
	}
	return nil, fmt.Errorf("%w: of what was tried, %w", ErrNoSample, why)
}

// sampler makes one sample.
type sampler struct {
	// try says which alternatives are taken; from the second on, examples and defaults are passed over by turns.
	try    int
	values int
	// size is about how many bytes have been made.
	size int
	// open are the schemas of the values that are being made, and how often.
	open map[*jsonschema.Schema]int
	done <-chan struct{}
	left *int
}

// spend takes steps; false when there are none left, or nobody waits any more.
func (m *sampler) spend(n int) bool {
	if *m.left -= 1 + n; *m.left < 0 {
		return false
	}
	select {
	case <-m.done:
		*m.left = -1
		return false
	default:
		return true
	}
}

// fits takes room for a value that is there already; false when a sample has no room for it.
func (m *sampler) fits(value any) bool {
	if !m.spend(0) {
		return false
	}
	m.size += 4
	switch v := value.(type) {
	case string:
		m.size += len(v)
	case json.Number:
		m.size += len(v)
	case []any:
		for _, e := range v {
			if !m.fits(e) {
				return false
			}
		}
	case map[string]any:
		for name, e := range v {
			if m.size += len(name); !m.fits(e) {
				return false
			}
		}
	}
	return m.size <= MaxSample
}

// made is a value that is taken, where a sample has room for it.
func (m *sampler) made(value any) (any, bool) {
	before := m.size
	if !m.fits(value) {
		m.size = before
		return nil, false
	}
	return value, true
}

// flatten is the schemas that a value has to fit together: what they refer to and consist of, alternatives chosen.
func (m *sampler) flatten(list []*jsonschema.Schema) []*jsonschema.Schema {
	var out []*jsonschema.Schema
	var add func(*jsonschema.Schema)
	add = func(s *jsonschema.Schema) {
		if s == nil || !m.spend(len(out)/16) || slices.Contains(out, s) || len(out) > 4*maxChain {
			return
		}
		out = append(out, s)
		add(s.Ref)
		for _, sub := range s.AllOf {
			add(sub)
		}
		for _, alternatives := range [][]*jsonschema.Schema{s.AnyOf, s.OneOf} {
			if n := len(alternatives); n > 0 {
				add(alternatives[m.try%n])
			}
		}
		if s.If != nil && m.try%2 == 0 {
			add(s.If)
			add(s.Then)
		} else if s.If != nil {
			add(s.Else)
		}
	}
	for _, s := range list {
		add(s)
	}
	return out
}

// value makes one value; vary tells elements of one list apart.
func (m *sampler) value(list []*jsonschema.Schema, depth, vary int) (any, bool) {
	if m.values++; m.values > sampleValues || depth > sampleDepth || !m.spend(0) {
		return nil, false
	}
	all := m.flatten(list)
	for _, s := range all {
		if s.Bool != nil && !*s.Bool {
			return nil, false
		}
		if s.Const != nil {
			return m.made(*s.Const)
		}
	}
	for _, s := range all {
		switch {
		case len(s.Examples) > 0 && m.try%4 < 2:
			return m.made(s.Examples[vary%len(s.Examples)])
		case s.Default != nil && m.try%4 < 2:
			return m.made(*s.Default)
		}
	}
	for _, s := range all {
		if s.Enum != nil && len(s.Enum.Values) > 0 {
			return m.made(s.Enum.Values[(m.try/4+vary)%len(s.Enum.Values)])
		}
	}
	if m.open == nil {
		m.open = make(map[*jsonschema.Schema]int)
	}
	for _, s := range all {
		m.open[s]++
	}
	defer func() {
		for _, s := range all {
			m.open[s]--
		}
	}()
	switch kindOf(all, depth) {
	case kindObject:
		return m.object(all, depth)
	case kindArray:
		return m.array(all, depth)
	case kindString:
		return m.text(all, vary)
	case kindInteger:
		return m.numeral(all, true, vary)
	case kindNumber:
		return m.numeral(all, false, vary)
	case kindBoolean:
		return m.made(true)
	}
	return m.made(nil)
}

// kindOf chooses the kind of a value.
func kindOf(all []*jsonschema.Schema, depth int) kind {
	allowed := kind(0xff)
	for _, s := range all {
		if s.Types == nil {
			continue
		}
		var of kind
		for _, name := range s.Types.ToStrings() {
			if of |= kindNamed(name); name == "number" {
				of |= kindInteger
			}
		}
		allowed &= of
	}
	if allowed == 0xff {
		for _, s := range all {
			switch {
			case s.Properties != nil || s.Required != nil || s.AdditionalProperties != nil || s.PatternProperties != nil:
				return kindObject
			case s.Items != nil || s.Items2020 != nil || s.PrefixItems != nil || s.Contains != nil:
				return kindArray
			case s.Pattern != nil || s.Format != nil || s.MinLength != nil || s.MaxLength != nil:
				return kindString
			case s.Minimum != nil || s.Maximum != nil || s.ExclusiveMinimum != nil || s.ExclusiveMaximum != nil || s.MultipleOf != nil:
				return kindNumber
			}
		}
		if depth == 0 {
			return kindObject
		}
		return kindString
	}
	for _, k := range []kind{kindObject, kindArray, kindString, kindNumber, kindInteger, kindBoolean} {
		if allowed&k != 0 {
			return k
		}
	}
	return kindNull
}

// again reports whether a value of these schemas is being made already.
func (m *sampler) again(list []*jsonschema.Schema) bool {
	return slices.ContainsFunc(m.flatten(list), func(s *jsonschema.Schema) bool { return m.open[s] > 0 })
}

func (m *sampler) object(all []*jsonschema.Schema, depth int) (any, bool) {
	named := map[string][]*jsonschema.Schema{}
	required := map[string]bool{}
	least := 0
	for _, s := range all {
		for name, sub := range s.Properties {
			named[name] = append(named[name], sub)
		}
		for _, name := range s.Required {
			required[name] = true
		}
		if s.MinProperties != nil {
			least = max(least, *s.MinProperties)
		}
	}
	for i := 1; len(named) < least && i <= sampleValues && m.spend(4); i++ {
		if name := fmt.Sprintf("property%d", i); named[name] == nil {
			named[name], required[name] = m.others(all, name), true
		}
	}
	for name := range required {
		if named[name] == nil {
			named[name] = m.others(all, name)
		}
	}
	if !m.spend(2 * len(named)) {
		return nil, false
	}
	out := map[string]any{}
	for _, name := range slices.Sorted(maps.Keys(named)) {
		if !required[name] && (m.values > optionalValues || m.again(named[name])) {
			continue
		}
		value, ok := m.value(named[name], depth+1, 0)
		if ok {
			m.size += len(name)
			out[name] = value
		} else if required[name] {
			return nil, false
		}
	}
	return out, true
}

// others are the schemas for a property that is not named.
func (m *sampler) others(all []*jsonschema.Schema, name string) (out []*jsonschema.Schema) {
	for _, s := range all {
		for pattern, sub := range s.PatternProperties {
			weight := 1
			if c, ok := pattern.(compiledPattern); ok {
				weight = c.weight
			}
			if !m.spend(len(name) * weight / 4) {
				return nil
			}
			if pattern.MatchString(name) {
				out = append(out, sub)
			}
		}
		if sub, ok := s.AdditionalProperties.(*jsonschema.Schema); ok {
			out = append(out, sub)
		}
	}
	return out
}

func (m *sampler) array(all []*jsonschema.Schema, depth int) (any, bool) {
	least, most := 0, sampleValues
	var places [][]*jsonschema.Schema // of the first elements
	var rest, contains []*jsonschema.Schema
	at := func(i int, s *jsonschema.Schema) {
		for len(places) <= i {
			places = append(places, nil)
		}
		places[i] = append(places[i], s)
	}
	for _, s := range all {
		if s.MinItems != nil {
			least = max(least, *s.MinItems)
		}
		if s.MaxItems != nil {
			most = min(most, *s.MaxItems)
		}
		for i, sub := range s.PrefixItems {
			at(i, sub)
		}
		switch items := s.Items.(type) {
		case []*jsonschema.Schema:
			for i, sub := range items {
				at(i, sub)
			}
		case *jsonschema.Schema:
			rest = append(rest, items)
		}
		if s.Items2020 != nil {
			rest = append(rest, s.Items2020)
		}
		if s.Contains != nil {
			contains = append(contains, s.Contains)
		}
	}
	n := max(least, len(places), len(contains))
	if !m.spend(n / 16) {
		return nil, false
	}
	if n == 0 && !m.again(rest) {
		n = 1
	}
	out := []any{}
	for i := range min(n, most) {
		schemas := rest
		if i < len(places) {
			schemas = places[i]
		} else if k := i - len(places); k < len(contains) {
			schemas = append(slices.Clone(rest), contains[k])
		}
		value, ok := m.value(schemas, depth+1, i)
		if !ok && i < least {
			return nil, false
		} else if !ok {
			break
		}
		out = append(out, value)
	}
	return out, true
}

// sampleFormats are texts of known formats.
func sampleFormats(name string) string {
	switch name {
	case "date-time":
		return "2026-01-31T12:00:00Z"
	case "date":
		return "2026-01-31"
	case "time":
		return "12:00:00Z"
	case "duration":
		return "P1D"
	case "email", "idn-email":
		return "user@example.com"
	case "hostname", "idn-hostname":
		return "example.com"
	case "ipv4":
		return "192.0.2.1"
	case "ipv6":
		return "2001:db8::1"
	case "uri", "iri", "uri-reference", "iri-reference", "uri-template":
		return "https://example.com/"
	case "uuid":
		return "123e4567-e89b-42d3-a456-426614174000"
	case "json-pointer":
		return "/name"
	case "relative-json-pointer":
		return "0"
	case "regex":
		return ".*"
	case "semver":
		return "1.0.0"
	}
	return ""
}

// text makes a string.
func (m *sampler) text(all []*jsonschema.Schema, vary int) (any, bool) {
	least, most := 0, sampleText
	made, expression := "", ""
	for _, s := range all {
		if s.MinLength != nil {
			least = max(least, *s.MinLength)
		}
		if s.MaxLength != nil {
			most = min(most, *s.MaxLength)
		}
		if s.Format != nil && made == "" {
			made = sampleFormats(s.Format.Name)
		}
		if s.Pattern != nil && expression == "" {
			expression = s.Pattern.String()
		}
	}
	switch {
	case least > sampleText:
		return nil, false
	case expression != "":
		return m.matching(expression, least)
	case made == "":
		if made = "string"; vary > 0 {
			made = fmt.Sprintf("string %d", vary+1)
		}
		if len(made) > most {
			made = made[:max(0, most)]
		}
		made += strings.Repeat("x", max(0, least-len(made)))
	}
	return m.made(made)
}

// matching makes a text that an expression matches, with at least so many characters where it can.
func (m *sampler) matching(expression string, least int) (any, bool) {
	if !m.spend(len(expression)) {
		return nil, false
	}
	parsed, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return nil, false
	}
	parsed = parsed.Simplify()
	for _, more := range []int{0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024} {
		var b strings.Builder
		if !m.expand(&b, parsed, more) {
			return nil, false
		}
		if utf8.RuneCountInString(b.String()) >= least {
			return m.made(b.String())
		}
	}
	return nil, false
}

// expand writes a text that an expression matches; more is how often what may be repeated is, beyond the least. False: it
// takes too much.
func (m *sampler) expand(b *strings.Builder, re *syntax.Regexp, more int) bool {
	if b.Len() > sampleText || !m.spend(len(re.Rune)/16) {
		return false
	}
	times := func(n int) bool {
		for range n {
			if !m.expand(b, re.Sub[0], more) {
				return false
			}
		}
		return true
	}
	switch re.Op {
	case syntax.OpLiteral:
		b.WriteString(string(re.Rune))
	case syntax.OpCharClass:
		b.WriteRune(someRune(re.Rune))
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		b.WriteByte('x')
	case syntax.OpCapture:
		return times(1)
	case syntax.OpStar, syntax.OpQuest:
		if re.Op == syntax.OpQuest {
			more = min(more, 1)
		}
		return times(more)
	case syntax.OpPlus:
		return times(1 + more)
	case syntax.OpRepeat:
		n := re.Min + more
		if re.Max >= 0 {
			n = min(n, re.Max)
		}
		return times(n)
	case syntax.OpConcat:
		for _, sub := range re.Sub {
			if !m.expand(b, sub, more) {
				return false
			}
		}
	case syntax.OpAlternate:
		return m.expand(b, re.Sub[0], more)
	}
	return true
}

// someRune is one of a class, a letter or digit if it has any.
func someRune(ranges []rune) rune {
	for _, wanted := range "aA1" {
		for i := 0; i+1 < len(ranges); i += 2 {
			if ranges[i] <= wanted && wanted <= ranges[i+1] {
				return wanted
			}
		}
	}
	for i := 0; i+1 < len(ranges); i += 2 {
		if ranges[i+1] >= ' ' {
			return max(ranges[i], ' ')
		}
	}
	if len(ranges) > 0 {
		return ranges[0]
	}
	return 'x'
}

// numeral makes a number: the least that is allowed, or zero.
func (m *sampler) numeral(all []*jsonschema.Schema, whole bool, vary int) (any, bool) {
	if !m.spend(100) {
		return nil, false
	}
	var low, high, step *big.Rat
	var lowOut, highOut bool
	for _, s := range all {
		for _, l := range []struct {
			limit *big.Rat
			out   bool
		}{{s.Minimum, false}, {s.ExclusiveMinimum, true}} {
			if l.limit != nil && (low == nil || l.limit.Cmp(low) >= 0) {
				low, lowOut = l.limit, l.out
			}
		}
		for _, l := range []struct {
			limit *big.Rat
			out   bool
		}{{s.Maximum, false}, {s.ExclusiveMaximum, true}} {
			if l.limit != nil && (high == nil || l.limit.Cmp(high) <= 0) {
				high, highOut = l.limit, l.out
			}
		}
		if s.MultipleOf != nil && (step == nil || s.MultipleOf.Cmp(step) > 0) {
			step = s.MultipleOf
		}
	}
	if step == nil && whole || step != nil && whole && !step.IsInt() {
		step = big.NewRat(1, 1)
	}
	value := new(big.Rat)
	switch {
	case low != nil && (low.Sign() > 0 || low.Sign() == 0 && lowOut || high != nil && high.Sign() < 0):
		value.Set(low)
	case high != nil && (high.Sign() < 0 || high.Sign() == 0 && highOut):
		value.Set(high)
		if step != nil {
			value = times(floor(new(big.Rat).Quo(value, step)), step)
		}
		if highOut && value.Cmp(high) == 0 {
			value.Sub(value, cmpOr(step))
		}
	}
	if step != nil {
		value = times(ceil(new(big.Rat).Quo(value, step)), step)
	}
	if low != nil && lowOut && value.Cmp(low) <= 0 {
		if value.Set(low); step != nil {
			value = new(big.Rat).Add(times(floor(new(big.Rat).Quo(low, step)), step), step)
		} else if high != nil {
			value.Add(low, high).Quo(value, big.NewRat(2, 1))
		} else {
			value.Add(low, big.NewRat(1, 1))
		}
	}
	value = new(big.Rat).Add(value, times(big.NewRat(int64(vary), 1), cmpOr(step)))
	return m.made(json.Number(decimalText(value)))
}

func cmpOr(step *big.Rat) *big.Rat {
	if step == nil {
		return big.NewRat(1, 1)
	}
	return step
}

func times(a, b *big.Rat) *big.Rat { return new(big.Rat).Mul(a, b) }

// floor and ceil are whole numbers beside one.
func floor(r *big.Rat) *big.Rat {
	return new(big.Rat).SetInt(new(big.Int).Div(r.Num(), r.Denom())) // Euclidean: towards the lower one
}

func ceil(r *big.Rat) *big.Rat {
	n := floor(r)
	if n.Cmp(r) < 0 {
		n.Add(n, big.NewRat(1, 1))
	}
	return n
}
