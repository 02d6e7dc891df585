package subscription

import (
	"iter"
	"slices"
	"strings"

	"github.com/tidwall/btree"
)

// globMatch reports whether a glob covers the whole of s. A star matches any run of characters, an empty
// one and dots too; every other character matches itself. Its time is at most the product of the lengths.
func globMatch(glob, s string) bool {
	star, mark := -1, 0
	i, j := 0, 0
	for j < len(s) {
		switch {
		case i < len(glob) && glob[i] == '*':
			star, mark = i, j
			i++
		case i < len(glob) && glob[i] == s[j]:
			i++
			j++
		case star >= 0:
			// Let the latest star take one character more; earlier stars never need to.
			mark++
			i, j = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(glob[i:], "*") == ""
}

// globAt is one glob of one subscription, where it is found: under the text that is known of every type it
// covers.
type globAt struct {
	// text is the whole glob, what stands before its first star, or, backwards, what stands behind its last:
	// the longer of the two tells more.
	text string
	sub  *Subscription
	// number is that of the glob among those of the subscription; 0 of one that has none.
	number int32
	kind   globKind
	// after sorts behind everything of the same text; for searching only.
	after bool
}

type globKind uint8

const (
	whole globKind = iota
	beginning
	ending
)

func lessGlob(a, b globAt) bool {
	if c := strings.Compare(a.sub.Namespace, b.sub.Namespace); c != 0 {
		return c < 0
	}
	if a.kind != b.kind {
		return a.kind < b.kind
	}
	if c := strings.Compare(a.text, b.text); c != 0 {
		return c < 0
	}
	if a.after != b.after {
		return b.after
	}
	if c := strings.Compare(a.sub.ID, b.sub.ID); c != 0 {
		return c < 0
	}
	return a.glob() < b.glob()
}

// glob is the whole glob.
func (g globAt) glob() string {
	if len(g.sub.globs) == 0 {
		return everything
	}
	return g.sub.globs[g.number]
}

// everything is the glob of a subscription that has none.
const everything = "*"

// covers reports whether the glob covers a type under whose text it was found.
func (g globAt) covers(eventType string) bool {
	// One star and the text: nothing is left to look at.
	return g.kind == whole || len(g.glob()) == len(g.text)+1 || globMatch(g.glob(), eventType)
}

// placesOf goes through the globs of a subscription; without any it covers everything.
func placesOf(s *Subscription) iter.Seq[globAt] {
	return func(yield func(globAt) bool) {
		if len(s.globs) == 0 {
			yield(placeOf(s, 0))
		}
		for i := range s.globs {
			if !yield(placeOf(s, i)) {
				return
			}
		}
	}
}

func placeOf(s *Subscription, number int) globAt {
	g := globAt{sub: s, number: int32(number)} //nolint:gosec // there are few
	glob := g.glob()
	first := strings.IndexByte(glob, '*')
	if first < 0 {
		g.text = glob
		return g
	}
	end := glob[strings.LastIndexByte(glob, '*')+1:]
	if first >= len(end) {
		g.kind, g.text = beginning, glob[:first]
	} else {
		g.kind, g.text = ending, backwards(end)
	}
	return g
}

func backwards(s string) string {
	b := []byte(s)
	slices.Reverse(b)
	return string(b)
}

// find returns the subscriptions of a namespace whose globs cover a type, in the order of their IDs, each
// once. Its cost goes by what it finds and by globs that share a beginning or an end with the type.
func find(globs *btree.BTreeG[globAt], ns, eventType string) []*Subscription {
	f := finder{globs: globs, ns: ns, at: named(ns, ""), eventType: eventType, operational: Operational(eventType)}
	f.take(whole, eventType)
	f.walk(ending, backwards(eventType))
	// What is under the empty text is most, as a rule, and comes last.
	f.walk(beginning, eventType)
	return f.found
}

type finder struct {
	globs         *btree.BTreeG[globAt]
	ns, eventType string
	at            *Subscription // before all of the namespace
	// operational: the type is.
	operational  bool
	found, batch []*Subscription
}

// walk takes what stands under each text that s begins with, the longest first.
func (f *finder) walk(kind globKind, s string) {
	for {
		text, ok := f.last(kind, s)
		if !ok {
			return
		}
		if !strings.HasPrefix(s, text) {
			// What s begins with and sorts before text is something text begins with, too.
			s = s[:sameBytes(s, text)]
			continue
		}
		if kind == beginning && f.operational && !Operational(text) {
			return // what covers everything else, which may be most, is not looked at
		}
		f.take(kind, text)
		if text == "" {
			return
		}
		s = text[:len(text)-1]
	}
}

// last returns the greatest text that is not above s.
func (f *finder) last(kind globKind, s string) (text string, ok bool) {
	f.globs.Descend(globAt{sub: f.at, kind: kind, text: s, after: true}, func(g globAt) bool {
		text, ok = g.text, g.sub.Namespace == f.ns && g.kind == kind
		return false
	})
	return text, ok
}

// take adds the subscriptions under one text.
func (f *finder) take(kind globKind, text string) {
	f.batch = f.batch[:0]
	f.globs.Ascend(globAt{sub: f.at, kind: kind, text: text}, func(g globAt) bool {
		if g.sub.Namespace != f.ns || g.kind != kind || g.text != text {
			return false
		}
		if (!f.operational || Operational(g.glob())) && g.covers(f.eventType) {
			f.batch = append(f.batch, g.sub)
		}
		return true
	})
	f.found = merge(f.found, f.batch)
}

// merge returns two sorted lists as one, each subscription once. The second stays the caller's.
func merge(a, b []*Subscription) []*Subscription {
	if len(b) == 0 {
		return a
	}
	out := make([]*Subscription, 0, len(a)+len(b))
	for len(a) > 0 || len(b) > 0 {
		var next *Subscription
		if len(b) == 0 || len(a) > 0 && a[0].ID <= b[0].ID {
			next, a = a[0], a[1:]
		} else {
			next, b = b[0], b[1:]
		}
		if len(out) == 0 || out[len(out)-1].ID != next.ID {
			out = append(out, next)
		}
	}
	return out
}

// sameBytes returns how many bytes two strings have in common at their beginning.
func sameBytes(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}
