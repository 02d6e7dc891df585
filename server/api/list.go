package api

import (
	"iter"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/grapnel/grapnel/server/subscription"
)

// maxExamined bounds how much of a snapshot one call of a list looks at, however little of it matches.
const maxExamined = 100_000

// maxPageBytes bounds what a page holds, so that it fits into the 4 MiB that grpc's clients take by default. A page
// always has its first item, and no item comes near the bound.
const maxPageBytes = 3 << 20

// pageBytes adds up a page.
type pageBytes int

// full reports whether m is too much for a page that has something already; else it is counted.
func (n *pageBytes) full(m proto.Message) bool {
	size := pageBytes(proto.Size(m)) + 8
	if *n > 0 && *n+size > maxPageBytes {
		return true
	}
	*n += size
	return false
}

// pageOf is one page, and the key after which the next one begins; empty on the last page.
type pageOf[T any] struct {
	items []T
	next  string
}

// takePage collects up to size items that keep accepts; show is what stands in the page for one. A page may be short,
// and more follow, when it is full of bytes or maxExamined items had to be looked at; nothing follows exactly when next
// is empty.
func takePage[T any, M proto.Message](all iter.Seq[T], size int, keep func(T) bool, key func(T) string, show func(T) M) pageOf[M] {
	var (
		page     pageOf[M]
		bytes    pageBytes
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
			shown := show(item)
			if len(page.items) == size || bytes.full(shown) {
				page.next = last
				break
			}
			page.items = append(page.items, shown)
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
