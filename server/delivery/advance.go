package delivery

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// Verdict is what a replay does with what it looks at.
type Verdict uint8

// Verdicts.
const (
	// Pass: it is not selected.
	Pass Verdict = iota
	// Skip: it is selected and cannot be sent; it counts as skipped.
	Skip
	// Take: it is to be sent.
	Take
)

// Picker selects what a replay sends. Its functions are called in no particular goroutine and must not block.
type Picker struct {
	// Namespace is required. Subscription and States narrow what is looked at, where they are known.
	Namespace    NamespaceKey
	Subscription SubscriptionKey
	States       []State
	// Since is inclusive and Until exclusive.
	Since, Until time.Time
	// Delivery says of a delivery that has ended whom its event is to be sent to again: To, or where that is 0 its own
	// subscription.
	Delivery func(*Delivery) (Target, Verdict)
	To       SubscriptionKey
	// Event, where set instead, says so of an event that Missing has had no delivery of, but skipped ones.
	Event   func(*Event) (Target, Verdict)
	Missing SubscriptionKey
	// Again: deliveries are opened again themselves; see ReplaySpec.Retry.
	Again bool
}

// Advance says how far one step of a replay has come in a partition.
type Advance struct {
	ReplayCounts
	// Done: the replay has nothing left to look at in this partition.
	Done bool
}

const (
	// advanceLook bounds what one step looks at, and advanceBytes the payload that it reads.
	advanceLook  = 2048
	advanceBytes = 4 << 20
)

// selected is a delivery, or an event, that a step is to send.
type selected struct {
	origin uint64
	// own is the delivery that was selected; it has no subscription where an event was.
	own ID
	to  Target
}

// errMoved says that another step of the same replay has been made meanwhile.
var errMoved = errors.New("the replay has gone on meanwhile")

// AdvanceReplay makes one step of a replay in one partition: it looks on, in the order of sequences, until limit
// deliveries are selected or it has looked at enough, and makes them in one commit with the note of how far it is. So each
// is made once, whatever ends in between. They are due now. A step that finds that its predecessor's commit was made
// although its caller had left makes none.
func (j *Journal) AdvanceReplay(ctx context.Context, r *Replay, partition uint16, pick *Picker, limit int) (Advance, error) {
	leave, err := j.enter()
	if err != nil {
		return Advance{}, err
	}
	defer leave()
	if j.space.low() {
		return Advance{}, ErrDiskFull
	}
	p := j.partitions[partition]
	at, err := p.cursor(j.db, r.Namespace, r.Key)
	if err != nil {
		return Advance{}, err
	}
	if at.done {
		return Advance{Done: true}, nil
	}
	if !at.begun() {
		if at, err = p.beginCursor(ctx, r); err != nil {
			return Advance{}, err
		}
	}
	step, found, err := p.look(ctx, pick, &at, limit, nil)
	if err != nil {
		return Advance{}, err
	}
	counts := step.counts
	if err := p.do(ctx, func(c *commit) error {
		if now, err := p.cursor(c.r, r.Namespace, r.Key); err != nil || now.step != at.step {
			return errors.Join(err, errMoved)
		}
		for i := range found {
			made, err := c.sendSelected(r, pick, &found[i])
			if err := p.passOver(err); err != nil {
				return err
			}
			if made {
				counts.Created++
			} else {
				counts.Skipped++
			}
		}
		next := at
		next.step, next.first, next.seq, next.sub, next.done = at.step+1, step.first, step.seq, step.sub, step.done
		next.add(counts)
		c.putCursor(r, &next)
		return nil
	}); errors.Is(err, errMoved) {
		return Advance{}, nil
	} else if err != nil {
		return Advance{}, err
	}
	return Advance{counts, step.done}, nil
}

// beginCursor notes that a replay has begun in this partition: nothing that is newer will be looked at.
func (p *partition) beginCursor(ctx context.Context, r *Replay) (cursor, error) {
	var made cursor
	err := p.do(ctx, func(c *commit) error {
		at, err := p.cursor(c.r, r.Namespace, r.Key)
		if err == nil && !at.begun() {
			at = cursor{step: 1, high: c.lastSeq + 1}
			if r.Spec.Erase {
				at.reachAhead(p)
			}
			c.putCursor(r, &at)
		}
		made = at
		return err
	})
	if err != nil {
		return cursor{}, err // made may still be in the committer's hands
	}
	return made, nil
}

func (c *commit) putCursor(r *Replay, at *cursor) {
	p := c.p
	p.key = appendJobKey(p.key[:0], p.number, tagCursor, r.Namespace, r.Key)
	p.value = encodeCursor(p.value[:0], at)
	c.set(p.key, p.value)
	c.firm = true
}

// sendSelected sends what a step has selected, unless it cannot be any more.
func (c *commit) sendSelected(r *Replay, pick *Picker, s *selected) (made bool, err error) {
	p, ns := c.p, r.Namespace
	if pick.Again {
		lane := LaneKey{ns, s.own.Subscription}
		at, err := p.find(c.r, lane, s.own.Seq)
		if err != nil || at == nil || at.open || at.state == Succeeded {
			return false, err
		}
		at.job = r.Key
		err = c.reopen(lane, at)
		return err == nil, passGone(err)
	}
	to := s.to.UID.SubscriptionKey()
	day, err := p.home(c.r, ns, s.origin)
	if err != nil {
		return false, err
	}
	sent := false
	if err := p.eachReplay(c.r, day, ns, s.origin, func(lane LaneKey, _, job uint64) error {
		sent = sent || lane.Subscription == to && (job == r.Key || pick.Event != nil)
		return nil
	}); err != nil || sent {
		return false, err
	}
	if pick.Event != nil { // a skipped one may have been retried meanwhile
		if at, err := p.find(c.r, LaneKey{ns, to}, s.origin); err != nil || at != nil && at.state != Skipped {
			return false, err
		}
	}
	_, err = c.send(&sending{ns: ns, origin: s.origin, to: s.to, trigger: ByReplay, job: r.Key, jobID: r.ID})
	return err == nil, passGone(err)
}

// passGone takes it for no error that an event is retained no longer, or its payload is not.
func passGone(err error) error {
	if errors.Is(err, ErrNotFound) || errors.Is(err, errEventGone) || errors.Is(err, ErrPurged) {
		return nil
	}
	return err
}

// looked is how far a look has come.
type looked struct {
	counts ReplayCounts // but for Created
	first  uint64
	seq    uint64
	sub    SubscriptionKey
	done   bool
	// records and bytes are what it has cost.
	records, bytes int
	tally          *tally
}

// look looks on from a cursor, in one snapshot. With a tally it selects nothing that a commit would then leave out.
func (p *partition) look(ctx context.Context, pick *Picker, at *cursor, limit int, t *tally) (step looked, found []selected, err error) {
	r, _ := p.snapshot()
	defer func() { err = errors.Join(err, r.Close()) }()
	step = looked{first: at.first, seq: at.seq, sub: at.sub, tally: t}
	low, high := pick.between(at)
	if t != nil {
		t.low, t.high = low, high
	}
	low = max(low, at.seq)
	w := &upward{p: p, r: r, ns: pick.Namespace, low: low, high: high}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.open(pick); err != nil {
		return step, nil, err
	}
	for {
		seq, subs, all, err := w.next()
		if err != nil {
			return step, nil, err
		}
		if seq == 0 {
			step.done = true
			return step, found, nil
		}
		step.records++
		step.first = cmp.Or(step.first, seq)
		if pick.Event != nil {
			if seq > at.seq || at.sub == 0 {
				s, err := p.lookAtEvent(r, pick, seq, &step)
				if err := p.passOver(err); err != nil {
					return step, nil, err
				}
				if s != nil {
					found = append(found, *s)
				}
				step.seq, step.sub = seq, ^SubscriptionKey(0)
			}
		} else {
			full, err := p.lookAtDeliveries(r, pick, seq, subs, all, at, limit, &step, &found)
			if err != nil || full {
				return step, found, err
			}
		}
		if len(found) >= limit || step.records >= advanceLook || step.bytes >= advanceBytes {
			return step, found, nil
		}
		if err := ctx.Err(); err != nil {
			return step, nil, context.Cause(ctx)
		}
	}
}

// between are the sequences that a replay looks at, but for where it stands.
func (pick *Picker) between(at *cursor) (low, high uint64) {
	low, high = seqOrNone(pick.Since), at.high
	if !pick.Until.IsZero() {
		high = min(high, seqAt(pick.Until))
	}
	return low, high
}

func seqOrNone(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return seqAt(t)
}

// lookAtEvent looks at one event for a subscription that may have missed it.
func (p *partition) lookAtEvent(r pebble.Reader, pick *Picker, seq uint64, step *looked) (*selected, error) {
	step.counts.Scanned++
	lane := LaneKey{pick.Namespace, pick.Missing}
	at, err := p.find(r, lane, seq)
	if err != nil || at != nil && at.state != Skipped {
		return nil, err
	}
	day, err := p.home(r, lane.Namespace, seq)
	if err != nil {
		return nil, err
	}
	if at == nil { // what had one that is retained no longer is not missing
		head, err := p.readHead(r, day, lane.Namespace, seq)
		if err != nil {
			return nil, passGone(err)
		}
		had := false
		if err := p.targets(r, day, lane.Namespace, seq, &head, func(list *targetList) { _, had = list.find(pick.Missing) }); err != nil || had {
			return nil, err
		}
	}
	again := false
	if err := p.eachReplay(r, day, lane.Namespace, seq, func(to LaneKey, _, _ uint64) error {
		again = again || to == lane
		return nil
	}); err != nil || again {
		return nil, err
	}
	e, err := p.readEvent(r, lane.Namespace, seq)
	if err != nil {
		return nil, passGone(err)
	}
	if e.Purged != nil { // whether the subscription wants it can no longer be told
		step.counts.Skipped++
		return nil, nil
	}
	step.bytes += len(e.Payload)
	to, verdict := pick.Event(e)
	switch verdict {
	case Take:
		return &selected{origin: seq, to: to}, nil
	case Skip:
		step.counts.Skipped++
	}
	return nil, nil
}

// lookAtDeliveries looks at the deliveries of one sequence, and reports whether the step is full before their end.
func (p *partition) lookAtDeliveries(r pebble.Reader, pick *Picker, seq uint64, subs []SubscriptionKey, all bool, from *cursor, limit int, step *looked, found *[]selected) (bool, error) {
	if all {
		day, err := p.home(r, pick.Namespace, seq)
		if err != nil {
			return false, err
		}
		head, err := p.readHead(r, day, pick.Namespace, seq)
		if err == nil {
			err = p.targets(r, day, pick.Namespace, seq, &head, func(list *targetList) { subs = append(subs, list.keys()...) })
		}
		if err := p.passOver(passGone(err)); err != nil {
			return false, err
		}
	}
	slices.Sort(subs)
	for _, sub := range slices.Compact(subs) {
		if seq == from.seq && sub <= from.sub || pick.Subscription != 0 && sub != pick.Subscription {
			continue
		}
		if len(*found) >= limit || step.records >= 2*advanceLook {
			return true, nil
		}
		step.records++
		step.counts.Scanned++
		step.seq, step.sub = seq, sub
		if err := p.passOver(p.lookAtDelivery(r, pick, LaneKey{pick.Namespace, sub}, seq, step, found)); err != nil {
			return false, err
		}
	}
	step.seq, step.sub = seq, ^SubscriptionKey(0)
	return false, nil
}

func (p *partition) lookAtDelivery(r pebble.Reader, pick *Picker, lane LaneKey, seq uint64, step *looked, found *[]selected) error {
	at, to, verdict, err := p.judge(r, pick, lane, seq)
	if err != nil || at == nil {
		return err
	}
	if verdict == Take && step.tally != nil {
		if made, err := step.tally.makes(p, r, pick, lane, at); err != nil {
			return err
		} else if !made {
			verdict = Skip
		}
	}
	switch verdict {
	case Take:
		*found = append(*found, selected{origin: at.eventSeq(), own: ID{seq, p.number, lane.Subscription}, to: to})
	case Skip:
		step.counts.Skipped++
	}
	return nil
}

// judge has the picker judge a delivery; at is nil for one that it is not asked about.
func (p *partition) judge(r pebble.Reader, pick *Picker, lane LaneKey, seq uint64) (at *place, to Target, verdict Verdict, err error) {
	at, err = p.find(r, lane, seq)
	if err != nil || at == nil || at.open || len(pick.States) > 0 && !slices.Contains(pick.States, at.state) {
		return nil, to, Pass, err
	}
	d, err := p.deliveryOf(r, lane, at)
	if err != nil {
		return nil, to, Pass, passGone(err)
	}
	to, verdict = pick.Delivery(d)
	return at, to, verdict, nil
}

// upward walks the records of some kinds of a namespace in one partition, oldest first: through the days, and beside
// them what was kept.
type upward struct {
	p         *partition
	r         pebble.Reader
	ns        NamespaceKey
	low, high uint64
	sources   []*upSource
}

// upSource walks one kind through a list of days.
type upSource struct {
	w    *upward
	kind byte
	sub  SubscriptionKey
	days []dayKey
	it   *pebble.Iterator
	seq  uint64 // where it stands; 0 at the end
	at   SubscriptionKey
}

// open picks the kinds that cover a picker.
func (w *upward) open(pick *Picker) error {
	if w.low >= w.high {
		return nil
	}
	var days []dayKey
	if err := w.p.eachDay(w.r, dayOf(w.low), func(d dayKey) error {
		if d != kept && d <= dayOf(w.high-1) {
			days = append(days, d)
		}
		return nil
	}); err != nil {
		return err
	}
	kinds, sub := []byte{kindEvent, kindAgain}, SubscriptionKey(0)
	switch {
	case pick.Event != nil:
		kinds = kinds[:1]
	case pick.Subscription != 0:
		kinds, sub = []byte{kindDelivery}, pick.Subscription
	case len(pick.States) > 0 && !slices.Contains(pick.States, Succeeded):
		kinds = []byte{kindDead}
	}
	for _, kind := range kinds {
		for _, list := range [][]dayKey{days, {kept}} {
			s := &upSource{w: w, kind: kind, sub: sub, days: list}
			w.sources = append(w.sources, s)
			if err := s.next(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *upward) close() (err error) {
	for _, s := range w.sources {
		if s.it != nil {
			err = errors.Join(err, s.it.Close())
		}
	}
	return err
}

// next takes the oldest sequence that is left, 0 at the end, and what the sources name of it; all says that it is an event
// whose targets are meant.
func (w *upward) next() (seq uint64, subs []SubscriptionKey, all bool, err error) {
	for _, s := range w.sources {
		if s.seq != 0 && (seq == 0 || s.seq < seq) {
			seq = s.seq
		}
	}
	if seq == 0 {
		return 0, nil, false, nil
	}
	for _, s := range w.sources {
		for s.seq == seq {
			if s.kind == kindEvent {
				all = true
			} else {
				subs = append(subs, s.at)
			}
			if err := s.next(); err != nil {
				return 0, nil, false, err
			}
		}
	}
	return seq, subs, all, nil
}

// next moves on.
func (s *upSource) next() error {
	for {
		if s.it == nil {
			if len(s.days) == 0 {
				s.seq = 0
				return nil
			}
			if err := s.openDay(); err != nil {
				return err
			}
			if s.it.First() {
				return s.read()
			}
		} else if s.it.Next() {
			return s.read()
		}
		err := s.it.Close()
		if s.it = nil; err != nil {
			return err
		}
	}
}

func (s *upSource) openDay() (err error) {
	prefix := appendKind(nil, s.w.p.number, s.days[0], s.w.ns, s.kind)
	s.days = s.days[1:]
	if s.sub != 0 {
		prefix = appendU64(prefix, uint64(s.sub))
	}
	s.it, err = s.w.r.NewIter(&pebble.IterOptions{
		LowerBound: appendU64(bytes.Clone(prefix), s.w.low), UpperBound: appendU64(bytes.Clone(prefix), s.w.high),
	})
	return err
}

func (s *upSource) read() error {
	key := s.it.Key()
	_, _, kind, rest, ok := splitRecord(key)
	seq, valid := recordSeq(kind, rest)
	if !ok || !valid {
		return s.w.p.j.corrupt(key, errBadKey)
	}
	s.seq, s.at = seq, s.sub
	if (kind == kindDead || kind == kindAgain) && len(rest) == 16 {
		s.at = SubscriptionKey(binary.BigEndian.Uint64(rest[8:]))
	}
	return nil
}
