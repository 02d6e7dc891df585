package delivery

import (
	"cmp"
	"errors"
	"slices"
	"time"
)

// Query selects deliveries, newest first. Namespace is required, zero values select all.
type Query struct {
	Namespace    NamespaceKey
	Subscription SubscriptionKey
	// EventID is of events that are retained; EventUID, a webhook-id, too. A delivery that was made again may be retained longer.
	EventID, EventUID string
	States            []State
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
	Namespace    NamespaceKey
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
	// scanLimit bounds the deliveries or events that one call looks at.
	scanLimit = 10_000
	// pageBytes bounds the payload in a page of events.
	pageBytes = 16 << 20
)

// Deliveries reads a page of deliveries, newest first; those of one event in the order of their subscriptions'
// keys. Settles show within 20 ms. ErrInvalidCursor says that Query.After is not the Next of a page.
func (j *Journal) Deliveries(q Query) (Page, error) {
	leave, err := j.enter()
	if err != nil {
		return Page{}, err
	}
	defer leave()
	s := &search{q: q, limit: limitOf(q.Limit)}
	if s.window, err = windowOf(q.Since, q.Until, q.After); err != nil {
		return Page{}, err
	}
	if s.merger, err = j.merge(s.window); err != nil {
		return Page{}, err
	}
	defer s.merger.close()
	if err := s.open(j); err != nil {
		return Page{}, err
	}
	if err := s.walk(); err != nil {
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
// order is descending by sequence and partition, ascending by subscription.
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

// holds reports whether a sequence of a partition is in the window.
func (w window) holds(partition uint16, seq uint64) bool {
	return seq >= w.low && seq < w.below(partition)
}

// past reports whether the cursor has passed id.
func (w window) past(id ID) bool {
	return w.after != nil && id.Seq == w.after.Seq && id.Partition == w.after.Partition && id.Subscription <= w.after.Subscription
}

// search is one Deliveries call.
type search struct {
	q      Query
	window window
	merger *merger
	limit  int
	looked int
	page   Page
}

// open picks the sources that cover the query: the event's own, those that have ended without success, the lane's,
// or the targets of all events.
func (s *search) open(j *Journal) error {
	m, q := s.merger, &s.q
	lane := LaneKey{q.Namespace, q.Subscription}
	dead := len(q.States) > 0 && !slices.ContainsFunc(q.States, func(st State) bool { return !st.Final() || st == Succeeded })
	switch {
	case q.EventUID != "":
		if partition, seq, ok := parseUID(j.id, q.EventUID); ok && int(partition) < len(j.partitions) {
			return m.openTargets(j.partitions[partition], q.Namespace, []uint64{seq})
		}
		return nil
	case q.EventID != "":
		for _, p := range j.idPartitions(q.Namespace, q.EventID) {
			seqs, err := p.sequences(q.Namespace, q.EventID)
			if err == nil {
				err = m.openTargets(p, q.Namespace, seqs)
			}
			if err != nil {
				return err
			}
		}
		return nil
	case dead && q.Subscription == 0:
		return m.openDays(q.Namespace, kindDead, 0)
	case q.Subscription != 0:
		if err := m.openDays(q.Namespace, kindDelivery, q.Subscription); err != nil {
			return err
		}
		return m.openRows(lane)
	}
	if err := m.openDays(q.Namespace, kindAgain, 0); err != nil {
		return err
	}
	return m.openDays(q.Namespace, kindEvent, 0)
}

// walk goes through the events that the sources have, newest first.
func (s *search) walk() error {
	for {
		group, err := s.merger.next()
		if err != nil || len(group) == 0 {
			return err
		}
		full, err := s.visit(group)
		if err != nil || full {
			return err
		}
	}
}

// visit looks at the deliveries of one event, and reports whether the page is full.
func (s *search) visit(group []spot) (full bool, err error) {
	at := s.merger.at(group[0])
	lanes := at.lanes(group)
	if len(lanes) == 0 { // an event without targets has been looked at too
		s.looked++
		return s.full(ID{at.seq, at.p.number, ^SubscriptionKey(0)}, !s.merger.empty()), nil
	}
	for i, sub := range lanes {
		id := ID{at.seq, at.p.number, sub}
		if s.window.past(id) || s.q.Subscription != 0 && s.q.Subscription != sub {
			continue
		}
		s.looked++
		d, err := at.delivery(LaneKey{s.q.Namespace, sub}, s.q.States)
		if err != nil {
			return false, err
		}
		if d != nil && (s.q.Match == nil || s.q.Match(d)) {
			s.page.Deliveries = append(s.page.Deliveries, d)
		}
		if s.full(id, i+1 < len(lanes) || !s.merger.empty()) {
			return true, nil
		}
	}
	return false, nil
}

// full reports whether the page ends at a delivery; more says whether another follows.
func (s *search) full(id ID, more bool) bool {
	if len(s.page.Deliveries) < s.limit && s.looked < scanLimit {
		return false
	}
	if more {
		s.page.Next = id.String()
	}
	return true
}

// eventAt is one event during a search: what its deliveries share is read once.
type eventAt struct {
	p       *partition
	m       *merger
	ns      NamespaceKey
	seq     uint64
	day     dayKey
	found   bool
	head    eventHead
	targets targetList
	err     error
}

// at reads an event's head and targets.
func (m *merger) at(s spot) *eventAt {
	e := &eventAt{p: s.p, m: m, ns: s.ns, seq: s.seq}
	r := m.snapshots[s.p.number]
	if e.day, e.err = s.p.home(r, s.ns, s.seq); e.err != nil {
		return e
	}
	e.head, e.err = s.p.readHead(r, e.day, s.ns, s.seq)
	if errors.Is(e.err, ErrNotFound) {
		e.err = nil // erased since, or the sequence of a delivery that was made again
		return e
	}
	if e.err != nil {
		return e
	}
	e.found = true
	e.err = s.p.targets(r, e.day, s.ns, s.seq, &e.head, func(list *targetList) { e.targets = list.clone() })
	return e
}

// lanes are the subscriptions to look at, in order: those that the sources name, or all targets.
func (e *eventAt) lanes(group []spot) []SubscriptionKey {
	var subs []SubscriptionKey
	for _, s := range group {
		if s.sub == 0 {
			subs = make([]SubscriptionKey, e.targets.n)
			for i := range subs {
				subs[i] = e.targets.uid(i).SubscriptionKey()
			}
			return subs
		}
		subs = append(subs, s.sub)
	}
	slices.Sort(subs)
	return slices.Compact(subs)
}

// delivery reads one of the event's deliveries; nil when it is in none of the states asked for, or gone.
func (e *eventAt) delivery(lane LaneKey, states []State) (*Delivery, error) {
	if e.err != nil {
		return nil, e.err
	}
	r := e.m.snapshots[e.p.number]
	at, err := e.p.find(r, lane, e.seq)
	if err != nil || at == nil || len(states) > 0 && !slices.Contains(states, at.state) {
		return nil, err
	}
	if at.origin != 0 {
		d, err := e.p.deliveryOf(r, lane, at)
		if errors.Is(err, ErrNotFound) {
			err = nil
		}
		return d, err
	}
	if !e.found {
		return nil, nil
	}
	target := e.targets.target(lane.Subscription)
	return e.p.show(e.m.snapshots[e.p.number], lane, at, &e.head, &target), nil
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
	m, err := j.merge(w)
	if err != nil {
		return EventPage{}, err
	}
	defer m.close()
	if err := m.openDays(q.Namespace, kindEvent, 0); err != nil {
		return EventPage{}, err
	}
	var page EventPage
	for looked, size := 0, 0; ; looked++ {
		group, err := m.next()
		if err != nil || len(group) == 0 {
			return page, err
		}
		at := group[0]
		id := ID{at.seq, at.p.number, 0}
		if w.past(id) {
			continue
		}
		e, err := at.p.readEvent(m.snapshots[at.p.number], q.Namespace, at.seq)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return EventPage{}, err
		}
		if err == nil && (q.Match == nil || q.Match(e)) {
			page.Events = append(page.Events, e)
			size += len(e.Payload)
		}
		full := len(page.Events) >= limitOf(q.Limit) || size >= pageBytes || looked >= scanLimit
		if full && !m.empty() {
			page.Next = id.String()
			return page, nil
		}
	}
}

// newer orders spots: the highest sequence first, the highest partition first among equals.
func newer(a, b spot) int {
	return cmp.Or(cmp.Compare(b.seq, a.seq), cmp.Compare(b.p.number, a.p.number))
}
