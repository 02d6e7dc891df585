package delivery

import (
	"errors"
	"slices"
	"time"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

// Query selects deliveries, newest first. Namespace is required, zero values select all.
type Query struct {
	Namespace    string
	Subscription string
	EventID      string
	States       []State
	// Since is inclusive and Until exclusive, by creation time.
	Since, Until time.Time
	// Match is applied last; nil matches all.
	Match func(*Delivery) bool
	// Limit is 50 when 0, and 1000 at most.
	Limit int
	// After is the Next of the previous page.
	After string
}

// Page of deliveries. It may be short or empty and still have a Next: a call reads a bounded number of
// records.
type Page struct {
	Deliveries []*Delivery
	// Next is empty on the last page.
	Next string
}

// EventQuery selects events, newest first. Namespace is required.
type EventQuery struct {
	Namespace    string
	Since, Until time.Time
	// Match is applied last; nil matches all.
	Match func(*Event) bool
	// Limit is 50 when 0, and 1000 at most.
	Limit int
	// After is the Next of the previous page.
	After string
}

// EventPage is like Page.
type EventPage struct {
	Events []*Event
	Next   string
}

const (
	defaultLimit = 50
	maxLimit     = 1000
	// scanLimit bounds the records that one call looks at.
	scanLimit = 10_000
	// pageBytes bounds the payload in a page of events.
	pageBytes = 16 << 20
	// maxSources bounds the iterators of a query; above it, events are walked instead.
	maxSources = 512
)

// Deliveries reads a page of deliveries, newest first; those of one event in the order of its targets. Settles
// show within 20 ms. ErrInvalidCursor says that Query.After is not the Next of a page.
func (j *Journal) Deliveries(q Query) (Page, error) {
	leave, err := j.enter()
	if err != nil {
		return Page{}, err
	}
	defer leave()
	s := &search{j: j, q: q, limit: limitOf(q.Limit)}
	if s.window, err = windowOf(q.Since, q.Until, q.After); err != nil {
		return Page{}, err
	}
	if q.EventID != "" {
		err = s.byEvent()
	} else {
		err = s.walk()
	}
	if err != nil {
		return Page{}, err
	}
	return s.page, nil
}

func limitOf(n int) int {
	if n <= 0 {
		return defaultLimit
	}
	return min(n, maxLimit)
}

// window is the part of the order that a call may return: sequences in [low, high), after the cursor. The
// order is descending by sequence and partition, ascending by ordinal.
type window struct {
	low, high uint64
	after     *ID
}

func windowOf(since, until time.Time, after string) (window, error) {
	w := window{high: ^uint64(0)}
	if !since.IsZero() {
		w.low = seqAt(since)
	}
	if !until.IsZero() {
		w.high = seqAt(until)
	}
	if after == "" {
		return w, nil
	}
	id, err := ParseID(after)
	if err != nil {
		return w, ErrInvalidCursor
	}
	w.after = &id
	return w, nil
}

// below is the first sequence of a partition that is too new.
func (w window) below(partition uint16) uint64 {
	if w.after == nil {
		return w.high
	}
	if partition <= w.after.Partition {
		return min(w.high, w.after.Seq+1)
	}
	return min(w.high, w.after.Seq)
}

// past reports whether the cursor has passed id.
func (w window) past(id ID) bool {
	return w.after != nil && id.Seq == w.after.Seq && id.Partition == w.after.Partition && id.Ordinal <= w.after.Ordinal
}

// search is one Deliveries call.
type search struct {
	j      *Journal
	q      Query
	window window
	limit  int
	page   Page
}

// byEvent looks only at the events of one id.
func (s *search) byEvent() error {
	partition := partitionOf(s.q.Namespace, s.q.EventID, len(s.j.partitions))
	seqs, err := s.j.sequences(partition, s.q.Namespace, s.q.EventID)
	if err != nil {
		return err
	}
	for _, seq := range seqs {
		if seq < s.window.low || seq >= s.window.below(partition) {
			continue
		}
		head, err := s.j.readHead(partition, s.q.Namespace, seq)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		found, err := s.ofEvent(partition, seq, head)
		if err != nil {
			return err
		}
		if s.add(found, true) {
			return nil
		}
	}
	return nil
}

// walk merges the sources that cover the query.
func (s *search) walk() error {
	m := &merger{j: s.j, window: s.window}
	defer m.close()
	if err := s.open(m); err != nil {
		return err
	}
	for looked := 0; ; looked++ {
		group, err := m.next()
		if err != nil || len(group) == 0 {
			return err
		}
		var found []*Delivery
		for _, at := range group {
			more, err := s.load(at)
			if err != nil {
				return err
			}
			found = append(found, more...)
		}
		slices.SortFunc(found, func(a, b *Delivery) int { return int(a.ID.Ordinal) - int(b.ID.Ordinal) })
		if s.add(found, !m.empty()) {
			return nil
		}
		if looked >= scanLimit && !m.empty() {
			s.page.Next = ID{group[0].seq, group[0].partition, ^uint16(0)}.String()
			return nil
		}
	}
}

// add puts what matches on the page and reports whether it is full.
func (s *search) add(found []*Delivery, more bool) bool {
	for i, d := range found {
		if s.window.past(d.ID) || s.q.Match != nil && !s.q.Match(d) {
			continue
		}
		s.page.Deliveries = append(s.page.Deliveries, d)
		if len(s.page.Deliveries) >= s.limit {
			if more || i+1 < len(found) {
				s.page.Next = d.ID.String()
			}
			return true
		}
	}
	return false
}

// open picks the cheapest sources: the index when all states asked for are in it, the lane's records, or the
// namespace's events.
func (s *search) open(m *merger) error {
	indexed := len(s.q.States) > 0
	for _, state := range s.q.States {
		// Pending is in the index only with a delivery time.
		indexed = indexed && state != Succeeded && state != Pending && state != InFlight
	}
	if indexed {
		lanes, err := s.lanes()
		if err != nil {
			return err
		}
		states := slices.Compact(slices.Sorted(slices.Values(s.q.States)))
		if n := len(lanes) * len(states); s.q.Subscription != "" || n <= maxSources {
			for _, at := range lanes {
				for _, state := range states {
					if err := m.open(appendStatePrefix(nil, at.partition, at.lane, state), at.partition, at.lane); err != nil {
						return err
					}
				}
			}
			return nil
		}
	}
	for _, p := range s.j.partitions {
		prefix, lane := appendSpace(nil, p.index, tagEvent, s.q.Namespace), LaneKey{}
		if s.q.Subscription != "" {
			lane = LaneKey{s.q.Namespace, s.q.Subscription}
			prefix = appendLane(nil, p.index, tagDelivery, lane)
		}
		if err := m.open(prefix, p.index, lane); err != nil {
			return err
		}
	}
	return nil
}

type laneAt struct {
	partition uint16
	lane      LaneKey
}

// lanes lists where the query's lanes have index entries; it gives up above maxSources.
func (s *search) lanes() (lanes []laneAt, err error) {
	for _, p := range s.j.partitions {
		if s.q.Subscription != "" {
			lanes = append(lanes, laneAt{p.index, LaneKey{s.q.Namespace, s.q.Subscription}})
			continue
		}
		prefix := appendSpace(nil, p.index, tagIndex, s.q.Namespace)
		err := s.j.lanesUnder(s.j.db, prefix, func(lane LaneKey) error {
			lanes = append(lanes, laneAt{p.index, lane})
			if len(lanes) > maxSources {
				return errStopped
			}
			return nil
		})
		if errors.Is(err, errStopped) {
			return lanes, nil
		}
		if err != nil {
			return nil, err
		}
	}
	return lanes, nil
}

// load reads the deliveries at one place, those in other states left out.
func (s *search) load(at place) ([]*Delivery, error) {
	if at.lane == (LaneKey{}) {
		head, err := s.j.head(at.key, at.value)
		if err != nil {
			return nil, err
		}
		return s.ofEvent(at.partition, at.seq, &head)
	}
	var rec storev1.DeliveryRecord
	err := s.j.get(appendDeliveryKey(nil, at.partition, at.lane, at.seq), &rec)
	if errors.Is(err, ErrNotFound) || err == nil && !s.wants(&rec) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	head, err := s.j.readHead(at.partition, at.lane.Namespace, at.seq)
	if errors.Is(err, ErrNotFound) {
		return nil, nil // erased since
	}
	if err != nil {
		return nil, err
	}
	id := ID{at.seq, at.partition, uint16(rec.GetOrdinal())}
	return []*Delivery{deliveryOf(id, at.lane, &rec, head)}, nil
}

// ofEvent reads an event's deliveries, in order.
func (s *search) ofEvent(partition uint16, seq uint64, head *eventHead) ([]*Delivery, error) {
	var found []*Delivery
	for i, name := range head.targets {
		if s.q.Subscription != "" && s.q.Subscription != name {
			continue
		}
		lane := LaneKey{s.q.Namespace, name}
		var rec storev1.DeliveryRecord
		err := s.j.get(appendDeliveryKey(nil, partition, lane, seq), &rec)
		if errors.Is(err, ErrNotFound) || err == nil && !s.wants(&rec) {
			continue
		}
		if err != nil {
			return nil, err
		}
		found = append(found, deliveryOf(ID{seq, partition, uint16(i)}, lane, &rec, head))
	}
	return found, nil
}

func (s *search) wants(rec *storev1.DeliveryRecord) bool {
	return len(s.q.States) == 0 || slices.Contains(s.q.States, State(rec.GetState()))
}

// Events reads a page of events, newest first, with their payloads.
func (j *Journal) Events(q EventQuery) (EventPage, error) {
	leave, err := j.enter()
	if err != nil {
		return EventPage{}, err
	}
	defer leave()
	w, err := windowOf(q.Since, q.Until, q.After)
	if err != nil {
		return EventPage{}, err
	}
	m := &merger{j: j, window: w}
	defer m.close()
	for _, p := range j.partitions {
		if err := m.open(appendSpace(nil, p.index, tagEvent, q.Namespace), p.index, LaneKey{}); err != nil {
			return EventPage{}, err
		}
	}
	var page EventPage
	for looked, bytes := 0, 0; ; looked++ {
		group, err := m.next()
		if err != nil || len(group) == 0 {
			return page, err
		}
		at := group[0]
		id := ID{at.seq, at.partition, 0}
		if w.past(id) {
			continue
		}
		e, err := j.eventOf(at.partition, q.Namespace, at.seq, at.key, at.value)
		if err != nil {
			return EventPage{}, err
		}
		if q.Match == nil || q.Match(e) {
			page.Events = append(page.Events, e)
			bytes += len(e.Payload)
		}
		full := len(page.Events) >= limitOf(q.Limit) || bytes >= pageBytes || looked >= scanLimit
		if full && !m.empty() {
			page.Next = id.String()
			return page, nil
		}
	}
}
