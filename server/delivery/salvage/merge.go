package salvage

import (
	"bytes"
	"cmp"
	"container/heap"
	"slices"

	"github.com/cockroachdb/pebble/v2"
)

// source gives entries in order of key, and of one key the newest first.
type source interface {
	next() bool
	current() change
}

func (t *tableFile) current() change { return t.change }

// sorted are the changes of all logs, as a source.
type sorted struct {
	changes []change
	at      int // one beyond the current one
}

func (s *sorted) next() bool {
	s.at++
	return s.at <= len(s.changes)
}

func (s *sorted) current() change { return s.changes[s.at-1] }

// ofLogs sorts what is in the logs that are needed, and takes their range deletions apart.
func ofLogs(logs []*logFile) (*sorted, []erasure) {
	s := &sorted{}
	var erased []erasure
	for _, l := range logs {
		if !l.Needed {
			continue
		}
		for _, c := range l.changes {
			switch c.kind {
			case pebble.InternalKeyKindRangeDelete, pebble.InternalKeyKindExcise:
				erased = append(erased, erasure{from: c.key, to: c.value, seq: c.seq})
			case pebble.InternalKeyKindIngestSST: // a table, which is read as such
			default:
				s.changes = append(s.changes, c)
			}
		}
	}
	slices.SortFunc(s.changes, byKey)
	return s, erased
}

func byKey(a, b change) int {
	return cmp.Or(bytes.Compare(a.key, b.key), cmp.Compare(b.seq, a.seq))
}

// merged are all sources as one.
type merged struct {
	sources queue
	last    []byte
	any     bool
	cover   cover
}

func newMerged(sources []source, erased []erasure) *merged {
	m := &merged{cover: newCover(erased)}
	for _, s := range sources {
		if s.next() {
			m.sources = append(m.sources, s)
		}
	}
	heap.Init(&m.sources)
	return m
}

// each visits the rows that are there: of each key the newest entry, unless it is a deletion or under one.
func (m *merged) each(visit func(key, value []byte) error) error {
	for len(m.sources) > 0 {
		top := m.sources[0]
		c := top.current()
		if !m.any || !bytes.Equal(c.key, m.last) {
			m.any, m.last = true, append(m.last[:0], c.key...)
			if isSet(c.kind) && m.cover.seq(c.key) <= c.seq {
				if err := visit(c.key, c.value); err != nil {
					return err
				}
			}
		}
		if top.next() {
			heap.Fix(&m.sources, 0)
		} else {
			heap.Pop(&m.sources)
		}
	}
	return nil
}

func isSet(kind pebble.InternalKeyKind) bool {
	return kind == pebble.InternalKeyKindSet || kind == pebble.InternalKeyKindSetWithDelete
}

// queue is a heap of sources by their current entries.
type queue []source

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return byKey(q[i].current(), q[j].current()) < 0 }
func (q queue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(s any)        { *q = append(*q, s.(source)) }
func (q *queue) Pop() any {
	last := len(*q) - 1
	s := (*q)[last]
	*q = (*q)[:last]
	return s
}

// cover answers for keys that come in order.
type cover struct {
	coming []erasure // by from
	over   []erasure // those that have begun
}

func newCover(erased []erasure) cover {
	slices.SortFunc(erased, func(a, b erasure) int { return bytes.Compare(a.from, b.from) })
	return cover{coming: erased}
}

// seq is the sequence of the newest erasure over key; 0 means none.
func (c *cover) seq(key []byte) (newest uint64) {
	for len(c.coming) > 0 && bytes.Compare(c.coming[0].from, key) <= 0 {
		c.over = append(c.over, c.coming[0])
		c.coming = c.coming[1:]
	}
	c.over = slices.DeleteFunc(c.over, func(e erasure) bool { return bytes.Compare(e.to, key) <= 0 })
	for _, e := range c.over {
		newest = max(newest, e.seq)
	}
	return newest
}
