package schema

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"strings"
	"sync"
	"unicode/utf8"
)

const (
	// The steps that a check may take: of leastSteps and stepsPerByte, the sum. A step is a rule asked of a value, a few
	// bytes matched, a value compared: some 10 ns.
	leastSteps   = 20_000
	stepsPerByte = 16
	// maxTold is how many faults are written down; the others are counted.
	maxTold = 32
	// lookEvery is how many steps are taken between two looks at whether somebody still waits.
	lookEvery = 4096
)

// Mismatch is what a payload breaks of a schema.
type Mismatch struct {
	// Faults are the first 32.
	Faults []Fault
	// More is how many there are beside them, as far as the work that a check may take has let them be counted.
	More int
}

// Fault is one thing that is wrong with a payload. Its texts show names out of the payload and values out of the schema,
// none out of the payload.
type Fault struct {
	// Pointer is the JSON Pointer (RFC 6901) to the value; empty is the payload itself. Long names in it are cut.
	Pointer string
	// Description says in words what is wrong.
	Description string
	// Keyword is the schema's that says so; "json" for a payload that is not JSON, "work" for one that takes too much to
	// check.
	Keyword string
}

func (m *Mismatch) Error() string {
	texts := make([]string, len(m.Faults))
	for i, f := range m.Faults {
		texts[i] = f.Description
		if f.Pointer != "" {
			texts[i] = f.Pointer + " " + f.Description
		}
	}
	if m.More > 0 {
		texts = append(texts, fmt.Sprintf("and %d more", m.More))
	}
	return strings.Join(texts, "; ")
}

// checker is one check of one document.
type checker struct {
	document
	// left are the steps that may still be taken. When look of them are, done is looked at; ended says that it was closed.
	left, look int
	done       <-chan struct{}
	ended      bool
	// telling: faults are written down, and looking goes on behind them; else the first ends it.
	telling  bool
	mismatch Mismatch
}

// checkers keep their memory for the next.
var checkers = sync.Pool{New: func() any { return new(checker) }} //nolint:gochecknoglobals // memory, and no state

// maxKept is how many nodes are worth keeping.
const maxKept = 1 << 14

// Check returns nil for a payload that the schema allows; else what is wrong. It keeps nothing of the payload. Of equal
// names in one object each is checked. What it costs is bounded: see leastSteps. Its error is ctx's, when that has ended
// before the work was done.
func (s *Schema) Check(ctx context.Context, payload []byte) (*Mismatch, error) {
	c, _ := checkers.Get().(*checker)
	defer func() {
		c.mismatch = Mismatch{}
		if c.text, c.done = nil, nil; cap(c.nodes) <= maxKept && cap(c.read) <= maxKept {
			checkers.Put(c)
		}
	}()
	if err := c.parse(payload, maxDepth); err != nil {
		return &Mismatch{Faults: []Fault{{Description: "is not JSON: " + err.Error(), Keyword: "json"}}}, nil
	}
	c.done, c.ended, c.mismatch = ctx.Done(), false, Mismatch{}
	fits := c.pass(s.root, false)
	if !fits && c.left >= 0 {
		c.pass(s.root, true)
	}
	switch {
	case c.ended:
		return nil, context.Cause(ctx)
	case fits:
		return nil, nil //nolint:nilnil // nothing is wrong
	case len(c.mismatch.Faults) == 0: // the steps did not suffice for one
		c.mismatch.Faults = []Fault{{Description: "takes too much work to check against its schema", Keyword: "work"}}
	}
	found := c.mismatch
	return &found, nil
}

// pass checks the document once.
func (c *checker) pass(root *rule, telling bool) bool {
	c.left, c.telling = leastSteps+stepsPerByte*len(c.text), telling
	c.look = c.left - lookEvery
	return c.check(0, root, nil) && c.left >= 0
}

// spend takes steps; false when there are none left, and whatever follows is of no meaning.
func (c *checker) spend(n int) bool {
	c.left -= n
	return c.left >= c.look || c.pause()
}

// pause looks whether somebody still waits; if not, no steps are left.
func (c *checker) pause() bool {
	c.look = max(0, c.left-lookEvery)
	select {
	case <-c.done:
		c.ended, c.left = true, -1
	default:
	}
	return c.left >= 0
}

// decimal reads a number, which takes steps for its digits.
func (c *checker) decimal(i uint32) decimal {
	raw := c.raw(i)
	c.spend(len(raw) / 16)
	return number(raw)
}

// chars is a string without its escapes, which takes steps for its length.
func (c *checker) chars(i uint32) []byte {
	s := c.string(i)
	c.spend(len(s) / 32)
	return s
}

// runes is how many characters a string has.
func (c *checker) runes(i uint32) int {
	if n := &c.nodes[i]; n.plain {
		return int(n.to - n.from)
	}
	s := c.string(i)
	c.spend(len(s) / 8)
	return utf8.RuneCount(s)
}

// fault writes down what is wrong and returns false. Its args are made texts of only where it is written down.
func (c *checker) fault(i uint32, keyword, format string, args ...any) bool {
	if !c.telling || c.left < 0 {
		return false
	}
	if len(c.mismatch.Faults) == maxTold {
		c.mismatch.More++
		c.spend(4)
		return false
	}
	c.mismatch.Faults = append(c.mismatch.Faults, Fault{c.pointer(i), fmt.Sprintf(format, args...), keyword})
	return false
}

// quiet checks without writing anything down.
func (c *checker) quiet(i uint32, r *rule, ev *evaluated) bool {
	told := c.telling
	c.telling = false
	ok := c.check(i, r, ev)
	c.telling = told
	return ok
}

// evaluated are the elements or members of a value that some rule has looked at, by their index; nil where nobody asks.
type evaluated struct {
	nodes map[uint32]bool
}

func (e *evaluated) add(i uint32) {
	if e == nil {
		return
	}
	if e.nodes == nil {
		e.nodes = make(map[uint32]bool)
	}
	e.nodes[i] = true
}

// merge takes over what another has, which ends with that.
func (c *checker) merge(e, other *evaluated) {
	switch {
	case e == nil || other == nil:
	case e.nodes == nil:
		e.nodes = other.nodes
	case c.spend(4 * len(other.nodes)):
		for i := range other.nodes {
			e.add(i)
		}
	}
}

// branch is for a rule that may turn out not to hold, whose looks then do not count.
func (e *evaluated) branch() *evaluated {
	if e == nil {
		return nil
	}
	return &evaluated{}
}

// check asks a rule of a value. What it has looked at goes into ev, unless that is nil.
func (c *checker) check(i uint32, r *rule, ev *evaluated) bool {
	if !c.spend(1) {
		return false
	}
	n := &c.nodes[i]
	switch {
	case r.never:
		return c.fault(i, "false", "is not allowed")
	case r.types != 0 && r.types&n.kind == 0 && (n.kind != kindNumber || r.types&kindInteger == 0 || !c.decimal(i).integer()):
		return c.telling && c.fault(i, "type", "must be %s, not %s", kinds(r.types), n.kind)
	}
	outer := ev
	if r.tracks {
		ev = &evaluated{}
	}
	ok := r.constant == nil || c.among(i, r.constant, "const")
	ok = ok && (r.enum == nil || c.among(i, r.enum, "enum"))
	switch {
	case !ok && !c.telling:
		return false
	case n.kind == kindObject && r.ofObject:
		ok = c.object(i, r, ev) && ok
	case n.kind == kindArray && r.ofArray:
		ok = c.array(i, r, ev) && ok
	case n.kind == kindString && r.ofString:
		ok = c.str(i, r) && ok
	case n.kind == kindNumber && r.limits != nil:
		ok = c.number(i, r) && ok
	}
	if !ok && !c.telling {
		return false
	}
	ok = c.chain(i, r, ev) && ok
	if r.tracks && (ok || c.telling) {
		ok = c.unevaluated(i, r, ev) && ok
		c.merge(outer, ev)
	}
	return ok
}

// kinds are several, for people.
type kinds kind

func (ks kinds) String() string {
	var texts []string
	for k := kindNull; k != 0; k <<= 1 {
		if kind(ks)&k != 0 {
			texts = append(texts, k.String())
		}
	}
	return strings.Join(texts, " or ")
}

// among looks for a value in an enum or a const.
func (c *checker) among(i uint32, v *values, keyword string) bool {
	if c.nodes[i].kind == kindString {
		if v.strings[string(c.chars(i))] {
			return true
		}
	} else {
		for _, other := range v.others {
			if c.equal(i, other, 0) {
				return true
			}
			if c.left < 0 {
				return false
			}
		}
	}
	if v.count == 1 {
		return c.fault(i, keyword, "must be %s", v.shown)
	}
	return c.fault(i, keyword, "must be one of %s", v.shown)
}

// equal compares a value with one of another document, or of this one.
func (c *checker) equal(i uint32, d *document, j uint32) bool {
	n, m := &c.nodes[i], &d.nodes[j]
	if !c.spend(1+int(n.to-n.from)/16) || n.kind != m.kind || n.count != m.count {
		return false
	}
	switch n.kind {
	case kindBoolean:
		return n.to-n.from == m.to-m.from
	case kindNumber:
		return number(c.raw(i)).cmp(number(d.raw(j))) == 0
	case kindString:
		return bytes.Equal(c.string(i), d.string(j))
	case kindArray:
		for a, b := i+1, j+1; a < n.next; a, b = c.nodes[a].next, d.nodes[b].next {
			if !c.equal(a, d, b) {
				return false
			}
		}
	case kindObject:
		for a := i + 1; a < n.next; a = c.nodes[a+1].next {
			b := c.member(d, j, c.string(a))
			if b == 0 || !c.equal(a+1, d, b) {
				return false
			}
		}
	}
	return true
}

// member returns the index of a member's value, 0 when there is none.
func (c *checker) member(d *document, j uint32, name []byte) uint32 {
	for b := j + 1; b < d.nodes[j].next && c.spend(1+len(name)/256); b = d.nodes[b+1].next {
		if bytes.Equal(d.string(b), name) {
			return b + 1
		}
	}
	return 0
}

func (c *checker) object(i uint32, r *rule, ev *evaluated) bool {
	n := &c.nodes[i]
	ok := true
	if count := int(n.count); count < r.minProperties {
		ok = c.fault(i, "minProperties", "has %d properties; at least %d are wanted", count, r.minProperties)
	} else if r.maxProperties >= 0 && count > r.maxProperties {
		ok = c.fault(i, "maxProperties", "has %d properties; at most %d are allowed", count, r.maxProperties)
	}
	if !ok && !c.telling {
		return false
	}
	var few uint64 // the first 64 of required that are there
	var many map[int]bool
	for key := i + 1; key < n.next; key = c.nodes[key+1].next {
		name, value := c.chars(key), key+1
		if p, known := r.properties[string(name)]; known {
			switch {
			case p.required < 0:
			case p.required < 64:
				few |= 1 << p.required
			default:
				if many == nil {
					many = make(map[int]bool)
				}
				many[p.required] = true
			}
			if !c.field(r, p, key, value, name, ev) {
				ok = false
			}
		} else if !c.field(r, property{unnamed: true}, key, value, name, ev) {
			ok = false
		}
		if !ok && !c.telling || !c.spend(1) {
			return false
		}
	}
	if !c.spend(len(r.required)) {
		return false
	}
	for k, name := range r.required {
		if k < 64 && few&(1<<k) == 0 || k >= 64 && !many[k] {
			if ok = c.fault(i, "required", "lacks %s", quoted(name)); !c.telling {
				return false
			}
		}
	}
	return c.dependents(i, r, ev) && ok
}

// field checks one member of an object.
func (c *checker) field(r *rule, p property, key, value uint32, name []byte, ev *evaluated) bool {
	ok, looked := true, false
	if !p.unnamed {
		looked = true
		ok = c.check(value, p.rule, nil)
	}
	for k := range r.patterns {
		pattern := &r.patterns[k]
		if !c.spend(1+len(name)*pattern.weight/4) || !ok && !c.telling {
			return false
		}
		if pattern.Match(name) {
			looked = true
			ok = c.check(value, pattern.rule, nil) && ok
		}
	}
	if !looked && r.additional != nil {
		looked = true
		if r.additional.never {
			ok = c.fault(value, "additionalProperties", "is a property that the schema does not know")
		} else {
			ok = c.check(value, r.additional, nil) && ok
		}
	}
	if looked {
		ev.add(value)
	}
	if r.names != nil && (ok || c.telling) && !c.quiet(key, r.names, nil) {
		ok = c.fault(value, "propertyNames", "has a name that is not allowed")
	}
	return ok
}

func (c *checker) dependents(i uint32, r *rule, ev *evaluated) bool {
	if !c.spend(len(r.dependents)) {
		return false
	}
	ok := true
	for _, d := range r.dependents {
		if c.member(&c.document, i, []byte(d.name)) == 0 {
			continue
		}
		if !c.spend(len(d.required)) {
			return false
		}
		for _, name := range d.required {
			if c.member(&c.document, i, []byte(name)) == 0 {
				ok = c.fault(i, "dependentRequired", "has %s and so must have %s", quoted(d.name), quoted(name))
			}
		}
		if d.rule != nil {
			ok = c.check(i, d.rule, ev) && ok
		}
		if !ok && !c.telling {
			return false
		}
	}
	return ok
}

func (c *checker) array(i uint32, r *rule, ev *evaluated) bool {
	n := &c.nodes[i]
	ok := true
	if count := int(n.count); count < r.minItems {
		ok = c.fault(i, "minItems", "has %d elements; at least %d are wanted", count, r.minItems)
	} else if r.maxItems >= 0 && count > r.maxItems {
		ok = c.fault(i, "maxItems", "has %d elements; at most %d are allowed", count, r.maxItems)
	}
	if !ok && !c.telling {
		return false
	}
	if r.prefix != nil || r.items != nil {
		k := 0
		for e := i + 1; e < n.next; e, k = c.nodes[e].next, k+1 {
			rule := r.items
			if k < len(r.prefix) {
				rule = r.prefix[k]
			}
			if rule == nil {
				break
			}
			ok = c.check(e, rule, nil) && ok
			if ev.add(e); !ok && !c.telling || c.left < 0 {
				return false
			}
		}
	}
	if r.contains != nil {
		ok = c.contains(i, r, ev) && ok
	}
	if r.unique && n.count > 1 && (ok || c.telling) {
		ok = c.unique(i) && ok
	}
	return ok
}

func (c *checker) contains(i uint32, r *rule, ev *evaluated) bool {
	found := 0
	for e := i + 1; e < c.nodes[i].next && c.left >= 0; e = c.nodes[e].next {
		if c.quiet(e, r.contains, nil) {
			if found++; r.containsEvaluates {
				ev.add(e)
			}
		}
	}
	if found < r.minContains {
		return c.fault(i, "contains", "has %d elements of those that the schema wants; at least %d are wanted", found, r.minContains)
	}
	if r.maxContains >= 0 && found > r.maxContains {
		return c.fault(i, "maxContains", "has %d elements of those that the schema bounds; at most %d are allowed", found, r.maxContains)
	}
	return true
}

// unique compares elements that have one hash.
func (c *checker) unique(i uint32) bool {
	seed := maphash.MakeSeed()
	seen := make(map[uint64][]uint32, c.nodes[i].count)
	for e := i + 1; e < c.nodes[i].next; e = c.nodes[e].next {
		h := c.hash(seed, e)
		for _, other := range seen[h] {
			if c.equal(e, &c.document, other) {
				return c.fault(e, "uniqueItems", "is there twice")
			}
		}
		if c.left < 0 {
			return false
		}
		seen[h] = append(seen[h], e)
	}
	return true
}

// hash is the same for values that are equal.
func (c *checker) hash(seed maphash.Seed, i uint32) uint64 {
	n := &c.nodes[i]
	if !c.spend(1 + int(n.to-n.from)/16) {
		return 0
	}
	h := uint64(n.kind)
	switch n.kind {
	case kindBoolean:
		h += uint64(n.to - n.from)
	case kindNumber:
		d := number(c.raw(i))
		h += maphash.Bytes(seed, d.digits) + uint64(d.exponent)*31 //nolint:gosec // a hash
		if d.negative {
			h++
		}
	case kindString:
		h += maphash.Bytes(seed, c.string(i))
	case kindArray:
		for e := i + 1; e < n.next; e = c.nodes[e].next {
			h = h*1_000_003 + c.hash(seed, e)
		}
	case kindObject:
		for key := i + 1; key < n.next; key = c.nodes[key+1].next {
			h += maphash.Bytes(seed, c.string(key)) * (2*c.hash(seed, key+1) + 1)
		}
	}
	return h
}

func (c *checker) str(i uint32, r *rule) bool {
	ok := true
	if r.minLength > 0 || r.maxLength >= 0 {
		if runes := c.runes(i); runes < r.minLength {
			ok = c.fault(i, "minLength", "has %d characters; at least %d are wanted", runes, r.minLength)
		} else if r.maxLength >= 0 && runes > r.maxLength {
			ok = c.fault(i, "maxLength", "has %d characters; at most %d are allowed", runes, r.maxLength)
		}
	}
	if !ok && !c.telling {
		return false
	}
	length := int(c.nodes[i].to - c.nodes[i].from)
	if r.pattern != nil {
		if !c.spend(length * r.pattern.weight / 4) {
			return false
		}
		if !r.pattern.Match(c.string(i)) {
			ok = c.fault(i, "pattern", "does not match %s", quoted(r.pattern.text))
		}
	}
	if r.format != nil && (ok || c.telling) {
		if !c.spend(8 + length/8) {
			return false
		}
		if r.format(string(c.string(i))) != nil {
			ok = c.fault(i, "format", "is not of the format %s", r.formatName)
		}
	}
	return ok
}

func (c *checker) number(i uint32, r *rule) bool {
	n := c.decimal(i)
	ok := true
	for k := range r.limits {
		l := &r.limits[k]
		switch {
		case l.kind == multiple:
			if !c.spend(n.divisionSteps(l.value)) {
				return false
			}
			if is, divided := n.multipleOf(l.value); !divided {
				ok = c.fault(i, "multipleOf", "has too many digits to be divided by %s", l.text)
			} else if !is {
				ok = c.fault(i, "multipleOf", "must be a multiple of %s", l.text)
			}
		case l.kind == atLeast && n.cmp(l.value) < 0:
			ok = c.fault(i, "minimum", "must be at least %s", l.text)
		case l.kind == above && n.cmp(l.value) <= 0:
			ok = c.fault(i, "exclusiveMinimum", "must be more than %s", l.text)
		case l.kind == atMost && n.cmp(l.value) > 0:
			ok = c.fault(i, "maximum", "must be at most %s", l.text)
		case l.kind == below && n.cmp(l.value) >= 0:
			ok = c.fault(i, "exclusiveMaximum", "must be less than %s", l.text)
		}
		if !ok && !c.telling {
			return false
		}
	}
	return ok
}

// chain asks the rules that a rule is made of.
func (c *checker) chain(i uint32, r *rule, ev *evaluated) bool {
	ok := r.ref == nil || c.check(i, r.ref, ev)
	for _, sub := range r.all {
		if !ok && !c.telling {
			return false
		}
		ok = c.check(i, sub, ev) && ok
	}
	if r.not != nil && (ok || c.telling) && c.quiet(i, r.not, nil) {
		ok = c.fault(i, "not", "is what the schema forbids")
	}
	if r.anyOf != nil && (ok || c.telling) {
		ok = c.alternatives(i, r.anyOf, "anyOf", false, ev) && ok
	}
	if r.oneOf != nil && (ok || c.telling) {
		ok = c.alternatives(i, r.oneOf, "oneOf", true, ev) && ok
	}
	if r.when != nil && (ok || c.telling) {
		branch := ev.branch()
		next := r.otherwise
		if c.quiet(i, r.when, branch) {
			c.merge(ev, branch)
			next = r.then
		}
		if next != nil {
			ok = c.check(i, next, ev) && ok
		}
	}
	return ok
}

// alternatives checks anyOf and oneOf. Where one alternative alone is for values of this kind, what is wrong is told of
// that: most often the others are null.
func (c *checker) alternatives(i uint32, list []*rule, keyword string, one bool, ev *evaluated) bool {
	held := 0
	for _, sub := range list {
		branch := ev.branch()
		if !c.quiet(i, sub, branch) {
			continue
		}
		c.merge(ev, branch)
		if held++; held > 1 && one || ev == nil && !one {
			break
		}
	}
	switch {
	case held == 1, held > 1 && !one:
		return true
	case held > 1:
		return c.fault(i, keyword, "fits several of the %d alternatives, and only one is allowed", len(list))
	case !c.telling:
		return false
	}
	var likely []*rule
	if !c.spend(len(list)) {
		return false
	}
	for _, sub := range list {
		if sub.takes(c.nodes[i].kind, maxChain) {
			likely = append(likely, sub)
		}
	}
	if len(likely) == 1 {
		return c.check(i, likely[0], nil)
	}
	return c.fault(i, keyword, "fits none of the %d alternatives", len(list))
}

// takes reports whether a rule's type, or that of what it refers to, is one for a kind.
func (r *rule) takes(k kind, most int) bool {
	switch {
	case r.never, r.types != 0 && r.types&k == 0 && (k != kindNumber || r.types&kindInteger == 0):
		return false
	case r.ref != nil && most > 0:
		return r.ref.takes(k, most-1)
	}
	return true
}

func (c *checker) unevaluated(i uint32, r *rule, ev *evaluated) bool {
	n := &c.nodes[i]
	ok := true
	look := func(value uint32, rule *rule, what string) {
		switch {
		case ev.nodes[value]:
			return
		case rule.never:
			ok = c.fault(value, what, "is not known to the schema")
		default:
			ok = c.check(value, rule, nil) && ok
		}
		ev.add(value)
	}
	switch {
	case n.kind == kindObject && r.unevaluatedProperties != nil:
		for key := i + 1; key < n.next && (ok || c.telling) && c.spend(1); key = c.nodes[key+1].next {
			look(key+1, r.unevaluatedProperties, "unevaluatedProperties")
		}
	case n.kind == kindArray && r.unevaluatedItems != nil:
		for e := i + 1; e < n.next && (ok || c.telling) && c.spend(1); e = c.nodes[e].next {
			look(e, r.unevaluatedItems, "unevaluatedItems")
		}
	}
	return ok
}
