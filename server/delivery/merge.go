package delivery

import (
	"bytes"
	"container/heap"

	"github.com/cockroachdb/pebble/v2"
)

// merger walks keys that end in a sequence, of several prefixes at once, newest first.
type merger struct {
	j       *Journal
	window  window
	sources sourceHeap
}

// source is one prefix. Its iterator stands on the key that ends in seq.
type source struct {
	it        *pebble.Iterator
	partition uint16
	lane      LaneKey
	seq       uint64
}

// place is a key that was reached; key and value are copies.
type place struct {
	partition  uint16
	seq        uint64
	lane       LaneKey
	key, value []byte
}

// open adds the keys of prefix that lie in the window. An empty lane marks events, whose values are read.
func (m *merger) open(prefix []byte, partition uint16, lane LaneKey) error {
	low, high := m.window.low, m.window.below(partition)
	if low >= high {
		return nil
	}
	it, err := m.j.db.NewIter(&pebble.IterOptions{
		LowerBound: appendSeq(bytes.Clone(prefix), low), UpperBound: appendSeq(bytes.Clone(prefix), high),
	})
	if err != nil {
		return err
	}
	s := &source{it: it, partition: partition, lane: lane}
	if ok, err := s.stand(m.j, it.Last()); !ok {
		return err
	}
	heap.Push(&m.sources, s)
	return nil
}

// stand reads the key reached; at the end it closes the iterator.
func (s *source) stand(j *Journal, valid bool) (bool, error) {
	if !valid {
		return false, s.it.Close() // reports what went wrong, if anything
	}
	seq, ok := lastSeqOf(s.it.Key())
	if !ok {
		err := j.corrupt(s.it.Key(), errBadKey)
		_ = s.it.Close()
		return false, err
	}
	s.seq = seq
	return true, nil
}

func (m *merger) empty() bool { return len(m.sources) == 0 }

// next takes all keys of the newest sequence and partition that is left; none at the end.
func (m *merger) next() ([]place, error) {
	var group []place
	for len(m.sources) > 0 {
		s := m.sources[0]
		if len(group) > 0 && (group[0].seq != s.seq || group[0].partition != s.partition) {
			break
		}
		at := place{partition: s.partition, seq: s.seq, lane: s.lane}
		if s.lane == (LaneKey{}) {
			value, err := s.it.ValueAndErr()
			if err != nil {
				return nil, err
			}
			at.key, at.value = bytes.Clone(s.it.Key()), bytes.Clone(value)
		}
		group = append(group, at)
		if ok, err := s.stand(m.j, s.it.Prev()); err != nil {
			heap.Pop(&m.sources)
			return nil, err
		} else if ok {
			heap.Fix(&m.sources, 0)
		} else {
			heap.Pop(&m.sources)
		}
	}
	return group, nil
}

func (m *merger) close() {
	for _, s := range m.sources {
		_ = s.it.Close() // reading has reported what matters
	}
	m.sources = nil
}

// sourceHeap has the newest sequence on top, the highest partition first among equals.
type sourceHeap []*source

func (h sourceHeap) Len() int { return len(h) }
func (h sourceHeap) Less(a, b int) bool {
	if h[a].seq != h[b].seq {
		return h[a].seq > h[b].seq
	}
	return h[a].partition > h[b].partition
}
func (h sourceHeap) Swap(a, b int) { h[a], h[b] = h[b], h[a] }

// Push is for container/heap.
func (h *sourceHeap) Push(x any) { *h = append(*h, x.(*source)) }

// Pop is for container/heap.
func (h *sourceHeap) Pop() any {
	last := len(*h) - 1
	s := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return s
}
