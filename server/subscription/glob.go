package subscription

import (
	"slices"
	"strings"
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

// index finds the subscriptions whose globs cover an event type, by their positions in the namespace's
// list, without looking at all of them. Immutable once built.
type index struct {
	// all have no globs and match everything.
	all []int32
	// exact holds globs without a star.
	exact map[string][]int32
	// root is a trie over what stands before a glob's first star.
	root node
}

type node struct {
	// next is sorted by its byte.
	next []edge
	// globs end their literal part here.
	globs []globAt
}

type edge struct {
	b  byte
	to *node
}

type globAt struct {
	glob string
	// any is set when the star ends the glob: whatever got here matches.
	any bool
	at  int32
}

func newIndex(subs []*Subscription) *index {
	x := &index{exact: make(map[string][]int32)}
	for i, s := range subs {
		at := int32(i)
		if len(s.globs) == 0 {
			x.all = append(x.all, at)
		}
		for _, g := range s.globs {
			star := strings.IndexByte(g, '*')
			if star < 0 {
				x.exact[g] = append(x.exact[g], at)
				continue
			}
			n := x.root.child(g[:star])
			n.globs = append(n.globs, globAt{glob: g, any: star == len(g)-1, at: at})
		}
	}
	return x
}

// child finds or makes the node at the end of a literal.
func (n *node) child(literal string) *node {
	for i := range len(literal) {
		at, ok := slices.BinarySearchFunc(n.next, literal[i], compareEdge)
		if !ok {
			n.next = slices.Insert(n.next, at, edge{b: literal[i], to: &node{}})
		}
		n = n.next[at].to
	}
	return n
}

func compareEdge(e edge, b byte) int { return int(e.b) - int(b) }

// find returns the positions that match, in order, each once.
func (x *index) find(eventType string) []int32 {
	found := append(slices.Clone(x.all), x.exact[eventType]...)
	n := &x.root
	for i := 0; ; i++ {
		for _, g := range n.globs {
			if g.any || globMatch(g.glob, eventType) {
				found = append(found, g.at)
			}
		}
		if i == len(eventType) {
			break
		}
		at, ok := slices.BinarySearchFunc(n.next, eventType[i], compareEdge)
		if !ok {
			break
		}
		n = n.next[at].to
	}
	slices.Sort(found)
	return slices.Compact(found)
}
