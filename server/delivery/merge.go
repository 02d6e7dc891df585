package delivery

import (
	"container/heap"
	"encoding/binary"
	"errors"
	"slices"

	"github.com/cockroachdb/pebble/v2"
)

// merger walks the records of several partitions and days at once, newest first, each partition as of one moment.
type merger struct {
	j         *Journal
	window    window
	snapshots []*pebble.Snapshot // by partition
	sources   sourceHeap
}

// spot is an event that a source stands on, and the subscription that the source names; 0 for all of the event's.
type spot struct {
	p   *partition
	ns  NamespaceKey
	seq uint64
	sub SubscriptionKey
}

// source yields spots of one partition in order.
type source interface {
	// stand returns where the source stands.
	stand() spot
	// next moves on; false at the end.
	next() (bool, error)
	close() error
}

func (j *Journal) merge(w window) (*merger, error) {
	m := &merger{j: j, window: w, snapshots: make([]*pebble.Snapshot, len(j.partitions))}
	for i, p := range j.partitions {
		m.snapshots[i], _ = p.snapshot()
	}
	return m, nil
}

func (m *merger) close() {
	for _, s := range m.sources {
		_ = s.close() // reading has reported what matters
	}
	for _, s := range m.snapshots {
		_ = s.Close()
	}
}

// push adds a source that has not moved yet.
func (m *merger) push(s source) error {
	ok, err := s.next()
	if err != nil || !ok {
		return errors.Join(err, s.close())
	}
	heap.Push(&m.sources, s)
	return nil
}

func (m *merger) empty() bool { return len(m.sources) == 0 }

// next takes all spots of the newest event that is left; none at the end.
func (m *merger) next() ([]spot, error) {
	var group []spot
	for len(m.sources) > 0 {
		s := m.sources[0]
		at := s.stand()
		if len(group) > 0 && newer(group[0], at) != 0 {
			break
		}
		group = append(group, at)
		ok, err := s.next()
		switch {
		case err != nil:
			heap.Pop(&m.sources)
			return nil, errors.Join(err, s.close())
		case ok:
			heap.Fix(&m.sources, 0)
		default:
			heap.Pop(&m.sources)
			if err := s.close(); err != nil {
				return nil, err
			}
		}
	}
	return group, nil
}

// openDays adds a namespace's records of a kind, of one subscription where it is given, in all partitions: day
// after day, and beside them what was kept.
func (m *merger) openDays(ns NamespaceKey, kind byte, sub SubscriptionKey) error {
	for _, p := range m.j.partitions {
		low, high := m.window.low, m.window.below(p.number)
		if low >= high {
			continue
		}
		base := daySource{m: m, p: p, ns: ns, kind: kind, sub: sub, low: low, high: high}
		var days []dayKey
		if err := p.eachDay(m.snapshots[p.number], dayOf(low), func(d dayKey) error {
			if d != kept && d <= dayOf(high-1) {
				days = append(days, d)
			}
			return nil
		}); err != nil {
			return err
		}
		slices.Reverse(days)
		for _, list := range [][]dayKey{days, {kept}} {
			s := base
			s.days = list
			if err := m.push(&s); err != nil {
				return err
			}
		}
	}
	return nil
}

// daySource walks the records of a kind through a list of days, from the last key to the first.
type daySource struct {
	m         *merger
	p         *partition
	ns        NamespaceKey
	kind      byte
	sub       SubscriptionKey
	low, high uint64
	days      []dayKey
	it        *pebble.Iterator
	at        spot
}

func (s *daySource) stand() spot { return s.at }

func (s *daySource) close() error {
	if s.it == nil {
		return nil
	}
	err := s.it.Close()
	s.it = nil
	return err
}

func (s *daySource) next() (bool, error) {
	for {
		if s.it != nil {
			if s.it.Prev() {
				return true, s.read()
			}
			if err := s.close(); err != nil {
				return false, err
			}
		}
		if len(s.days) == 0 {
			return false, nil
		}
		if err := s.openDay(); err != nil {
			return false, err
		}
		if s.it.Last() {
			return true, s.read()
		}
		if err := s.close(); err != nil {
			return false, err
		}
	}
}

func (s *daySource) openDay() (err error) {
	prefix := appendKind(nil, s.p.number, s.days[0], s.ns, s.kind)
	s.days = s.days[1:]
	if s.sub != 0 {
		prefix = appendU64(prefix, uint64(s.sub))
	}
	s.it, err = s.m.snapshots[s.p.number].NewIter(&pebble.IterOptions{
		LowerBound: appendU64(prefix[:len(prefix):len(prefix)], s.low),
		UpperBound: appendU64(prefix[:len(prefix):len(prefix)], s.high),
	})
	return err
}

// read takes the spot from the key.
func (s *daySource) read() error {
	key := s.it.Key()
	_, _, kind, rest, ok := splitRecord(key)
	seq, valid := recordSeq(kind, rest)
	if !ok || !valid {
		return s.m.j.corrupt(key, errBadKey)
	}
	s.at = spot{p: s.p, ns: s.ns, seq: seq, sub: s.sub}
	if (kind == kindDead || kind == kindAgain) && len(rest) == 16 {
		s.at.sub = SubscriptionKey(binary.BigEndian.Uint64(rest[8:]))
	}
	return nil
}

// listSource yields what was collected before.
type listSource struct{ spots []spot }

func (s *listSource) stand() spot { return s.spots[0] }

func (s *listSource) next() (bool, error) {
	if len(s.spots) > 0 {
		s.spots = s.spots[1:]
	}
	return len(s.spots) > 0, nil
}

func (s *listSource) close() error { return nil }

// pushList adds spots that are in any order; those outside of the window are left out.
func (m *merger) pushList(spots []spot) error {
	spots = slices.DeleteFunc(spots, func(s spot) bool { return !m.window.holds(s.p.number, s.seq) })
	slices.SortFunc(spots, newer)
	return m.push(&listSource{append([]spot{{}}, spots...)})
}

// openTargets adds all deliveries of some events of a partition.
func (m *merger) openTargets(p *partition, ns NamespaceKey, seqs []uint64) error {
	spots := make([]spot, 0, len(seqs))
	r := m.snapshots[p.number]
	for _, seq := range seqs {
		spots = append(spots, spot{p: p, ns: ns, seq: seq})
		day, err := p.home(r, ns, seq)
		if err != nil {
			return err
		}
		if err := p.eachReplay(r, day, ns, seq, func(lane LaneKey, own, _ uint64) error {
			spots = append(spots, spot{p: p, ns: ns, seq: own, sub: lane.Subscription})
			return nil
		}); err != nil {
			return err
		}
	}
	return m.pushList(spots)
}

// maxTimers bounds the rows of a lane's timers in one partition that a query sorts.
const maxTimers = 100_000

// openRows adds a lane's deliveries that are PENDING, which have no other record: those of the FIFO, which are in
// order, and those that wait for their event's delivery time, which are sorted.
func (m *merger) openRows(lane LaneKey) error {
	for _, p := range m.j.partitions {
		r := m.snapshots[p.number]
		low, high := m.window.low, m.window.below(p.number)
		if low < high {
			it, err := r.NewIter(&pebble.IterOptions{
				LowerBound: appendRow(nil, p.number, lane, Row{Seq: low}), UpperBound: appendRow(nil, p.number, lane, Row{Seq: high}),
			})
			if err != nil {
				return err
			}
			if err := m.push(&fifoSource{m: m, p: p, lane: lane, it: it}); err != nil {
				return err
			}
		}
		var spots []spot
		prefix := appendLane(nil, p.number, tagTimer, lane)
		err := m.j.scan(r, prefix, prefixEnd(prefix), func(key, value []byte) error {
			_, row, ok := splitRow(key)
			if !ok {
				return m.j.corrupt(key, errBadKey)
			}
			if pr, err := decodeProgress(value); err == nil && pr.attempts == 0 {
				spots = append(spots, spot{p: p, ns: lane.Namespace, seq: row.Seq, sub: lane.Subscription})
			}
			if len(spots) >= maxTimers {
				return errStopped
			}
			return nil
		})
		if err != nil && !errors.Is(err, errStopped) {
			return err
		}
		if err := m.pushList(spots); err != nil {
			return err
		}
	}
	return nil
}

// fifoSource walks a lane's FIFO from its end.
type fifoSource struct {
	m     *merger
	p     *partition
	lane  LaneKey
	it    *pebble.Iterator
	moved bool
	at    spot
}

func (s *fifoSource) stand() spot { return s.at }

func (s *fifoSource) next() (bool, error) {
	var ok bool
	if s.moved {
		ok = s.it.Prev()
	} else {
		ok, s.moved = s.it.Last(), true
	}
	if !ok {
		return false, s.it.Error()
	}
	_, row, valid := splitRow(s.it.Key())
	if !valid {
		return false, s.m.j.corrupt(s.it.Key(), errBadKey)
	}
	s.at = spot{p: s.p, ns: s.lane.Namespace, seq: row.Seq, sub: s.lane.Subscription}
	return true, nil
}

func (s *fifoSource) close() error { return s.it.Close() }

// sourceHeap has the newest spot on top.
type sourceHeap []source

func (h sourceHeap) Len() int           { return len(h) }
func (h sourceHeap) Less(a, b int) bool { return newer(h[a].stand(), h[b].stand()) < 0 }
func (h sourceHeap) Swap(a, b int)      { h[a], h[b] = h[b], h[a] }

// Push is for container/heap.
func (h *sourceHeap) Push(x any) { *h = append(*h, x.(source)) }

// Pop is for container/heap.
func (h *sourceHeap) Pop() any {
	last := len(*h) - 1
	s := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return s
}
