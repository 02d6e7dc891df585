package api

import (
	"iter"
	"strings"

	"github.com/grapnel/grapnel/server/subscription"
)

// maxExamined bounds how much of a snapshot one call of a list looks at, however little of it matches.
const maxExamined = 100_000

// pageOf is one page, and the key after which the next one begins; empty on the last page.
type pageOf[T any] struct {
	items []T
	next  string
}

// takePage collects up to size items that keep accepts. A page may be short, and more follow, when
// maxExamined items had to be looked at; nothing follows exactly when next is empty.
func takePage[T any](all iter.Seq[T], size int, keep func(T) bool, key func(T) string) pageOf[T] {
	var (
		page     pageOf[T]
		last     string
		examined int
	)
	for item := range all {
		if examined == maxExamined {
			page.next = last
			break
		}
		examined++
		if keep(item) {
			if len(page.items) == size {
				page.next = last
				break
			}
			page.items = append(page.items, item)
		}
		last = key(item)
	}
	return page
}

// inNamespaces lists a collection of one namespace, or of all that are not deleted when ns is "", after the
// item whose key (namespace/id) is given.
func inNamespaces[T any](snapshot *subscription.Snapshot, ns, after string, list func(ns, after string) iter.Seq[T]) iter.Seq[T] {
	afterNS, afterID, _ := strings.Cut(after, "/")
	if ns != "" {
		return list(ns, afterID)
	}
	return func(yield func(T) bool) {
		if afterNS != "" {
			for item := range list(afterNS, afterID) {
				if !yield(item) {
					return
				}
			}
		}
		for n := range snapshot.Namespaces(afterNS) {
			if n.Deleted() {
				continue
			}
			for item := range list(n.ID, "") {
				if !yield(item) {
					return
				}
			}
		}
	}
}

// listedNamespace reads the parent of a list: "" is every namespace, one that is named must exist.
func (s *Server) listedNamespace(parent string) (string, error) {
	ns, err := parseParent("parent", parent)
	if err != nil {
		return "", err
	}
	if ns != "" && s.Registry.Snapshot().Namespace(ns) == nil {
		return "", notFound(parent, "namespace")
	}
	return ns, nil
}
