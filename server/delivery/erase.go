package delivery

import (
	"context"
	"errors"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// An erasure walks the events of a namespace as a replay does, with the same cursor, and purges what it selects. Then it sees
// to it that no file of the journal holds any of it (see scrub.go).

const (
	// eraseStep bounds the events that one step of an erasure purges, and eraseTargets the deliveries that these were made with:
	// but for the last event, which is purged as a whole.
	eraseStep    = 64
	eraseTargets = 1024
)

// Selects says whether an erasure is to purge an event. It is called in no particular goroutine and must not block.
type Selects func(*Event) bool

// BeginErasure notes in all partitions that an erasure begins: it looks at nothing that is accepted afterwards, and at all that
// was before, whatever clock gave its sequence. It may be called again.
func (j *Journal) BeginErasure(ctx context.Context, r *Replay) error {
	leave, err := j.enter()
	if err != nil {
		return err
	}
	defer leave()
	for _, p := range j.partitions {
		at, err := p.cursor(j.db, r.Namespace, r.Key)
		if err == nil && !at.begun() {
			_, err = p.beginCursor(ctx, r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// reachAhead has an erasure that begins look at what a wrong clock has put into the future, too: it was accepted before.
func (at *cursor) reachAhead(p *partition) {
	if p.ahead.high >= at.high {
		at.ahead, at.high = aheadOf{at.high, p.ahead.times}, p.ahead.high+1
	}
}

// AdvanceErasure makes one step of an erasure in one partition: it looks on, in the order of sequences, until some events
// are selected or it has looked at enough, and purges those. What a crash has left half purged is purged again. It looks at
// nothing that was accepted after BeginErasure, or not before its Until. rest is called between commits of a step that has
// several: one event may have many deliveries.
func (j *Journal) AdvanceErasure(ctx context.Context, r *Replay, partition uint16, selects Selects, rest func()) (Advance, error) {
	leave, err := j.enter()
	if err != nil {
		return Advance{}, err
	}
	defer leave()
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
	step, found, err := p.lookToErase(ctx, r, selects, &at)
	if err != nil {
		return Advance{}, err
	}
	counts := step.counts
	if len(found) > 0 {
		unread, err := p.eraseEvents(ctx, r, found, rest)
		if err != nil {
			return Advance{}, err
		}
		counts.Skipped += unread
	}
	if step.done {
		left := p.remainsOfEvents(j.db, r.Namespace)
		if err := p.purgeNews(ctx, r.Namespace, nil, func(lane LaneKey, seq uint64) (bool, error) {
			of, err := left(lane, seq)
			return of == remainsPurged, err
		}); err != nil {
			return Advance{}, err
		}
	}
	if err := p.do(ctx, func(c *commit) error {
		next, err := p.cursor(c.r, r.Namespace, r.Key)
		if err != nil || next.step != at.step {
			return errors.Join(err, errMoved)
		}
		next.step, next.first, next.seq, next.done = at.step+1, step.first, step.seq, step.done
		next.add(counts)
		c.putCursor(r, &next)
		return nil
	}); errors.Is(err, errMoved) {
		return Advance{}, nil
	} else if err != nil {
		return Advance{}, err
	}
	counts.Created = int64(len(found))
	return Advance{counts, step.done}, nil
}

// eraseEvents purges events, and says how many could not be read as a whole.
func (p *partition) eraseEvents(ctx context.Context, r *Replay, seqs []uint64, rest func()) (unread int64, err error) {
	aside, err := p.purge(ctx, r.Namespace, seqs, nil, func(c *commit, n PurgeCounts) error {
		now, err := p.cursor(c.r, r.Namespace, r.Key)
		if err == nil && now.begun() {
			now.purged.add(n)
			c.putCursor(r, &now)
		}
		return err
	}, rest)
	if passed := p.passOver(passGone(err)); passed != nil {
		return 0, passed
	} else if err != nil {
		aside = append(aside, err)
	}
	if len(aside) == 0 || errors.Is(err, ErrNotFound) {
		return 0, nil
	}
	if len(seqs) == 1 {
		return 1, p.passOver(aside[0])
	}
	for _, seq := range seqs { // the others are not to be left half done
		n, err := p.eraseEvents(ctx, r, []uint64{seq}, rest)
		if err != nil {
			return unread, err
		}
		unread += n
	}
	return unread, nil
}

// CountErasure counts what an erasure would purge as of now, and purges nothing. It looks a little at a time, as a step does,
// each time when turn has it look.
func (j *Journal) CountErasure(ctx context.Context, r *Replay, selects Selects, turn func(look func() error) error) (*Replay, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	sum := *r
	for _, p := range j.partitions {
		p.visible.RLock()
		at := cursor{high: p.appliedSeq + 1}
		at.reachAhead(p)
		p.visible.RUnlock()
		for !at.done {
			if err := turn(func() error {
				step, found, err := p.lookToErase(ctx, r, func(e *Event) bool {
					picked := selects(e)
					if picked {
						sum.Purged.Bytes += int64(len(e.Payload))
					}
					return picked
				}, &at)
				if err != nil {
					return err
				}
				sum.Counts.add(step.counts)
				sum.Purged.Events += int64(len(found))
				at.seq, at.done = step.seq, step.done
				return nil
			}); err != nil {
				return nil, err
			}
		}
	}
	return &sum, nil
}

// erasedRange are the sequences that an erasure looks at in a partition. An event's lies at the time when it was accepted, or behind
// that by as much as a clock had been ahead that was set back.
func (r *Replay) erasedRange(at *cursor) (low, high uint64) {
	pick := Picker{Since: r.Spec.Since, Until: r.Spec.Until}
	if !pick.Until.IsZero() {
		pick.Until = pick.Until.Add(maxAhead)
	}
	return pick.between(at)
}

// spans reports whether an erasure is about events that were accepted when this one was.
func (s *ReplaySpec) spans(e *Event) bool {
	return !e.AcceptTime.Before(s.Since) && (s.Until.IsZero() || e.AcceptTime.Before(s.Until))
}

// lookToErase looks on from a cursor, in one snapshot, for events that are to be purged.
func (p *partition) lookToErase(ctx context.Context, job *Replay, selects Selects, at *cursor) (step looked, found []uint64, err error) {
	r, _ := p.snapshot()
	defer func() { err = errors.Join(err, r.Close()) }()
	step = looked{first: at.first, seq: at.seq}
	low, high := job.erasedRange(at)
	w := &upward{p: p, r: r, ns: job.Namespace, low: max(low, at.seq), high: high}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.open(&Picker{Event: func(*Event) (Target, Verdict) { return Target{}, Pass }}); err != nil {
		return step, nil, err
	}
	targets := 0
	for len(found) < eraseStep && targets < eraseTargets && step.records < advanceLook && step.bytes < advanceBytes {
		seq, _, _, err := w.next()
		if err != nil {
			return step, nil, err
		}
		if seq == 0 {
			step.done = true
			return step, found, nil
		}
		if seq == at.seq {
			continue
		}
		step.records++
		if step.first == 0 {
			step.first = seq
		}
		step.seq = seq
		if !at.before(seq) {
			continue
		}
		e, err := p.readEvent(r, job.Namespace, seq)
		if err := p.passOver(passGone(err)); err != nil {
			return step, nil, err
		}
		if err == nil {
			if step.bytes += len(e.Payload); !job.Spec.spans(e) {
				continue
			}
		}
		step.counts.Scanned++
		switch {
		case err != nil:
			if !errors.Is(err, ErrNotFound) {
				step.counts.Skipped++
			}
		case e.Purged != nil:
			if !e.Purged.done { // cut short
				found, targets = append(found, seq), targets+e.Matched
			}
		case selects(e):
			found, targets = append(found, seq), targets+e.Matched
		}
		if err := ctx.Err(); err != nil {
			return step, nil, context.Cause(ctx)
		}
	}
	return step, found, nil
}

// maxKnownRemains bounds what remainsOfEvents remembers.
const maxKnownRemains = 1 << 16

// remainsOfEvents tells of deliveries of a namespace what there is of their events.
func (p *partition) remainsOfEvents(r pebble.Reader, ns NamespaceKey) func(lane LaneKey, seq uint64) (remains, error) {
	type name struct {
		sub SubscriptionKey
		seq uint64
	}
	known := make(map[name]remains)
	return func(lane LaneKey, seq uint64) (remains, error) {
		at := name{lane.Subscription, seq}
		if left, ok := known[at]; ok {
			return left, nil
		}
		origin := seq
		day, err := p.homeOf(r, lane, seq, true)
		if err != nil {
			return remainsAll, err
		}
		if a, err := p.readAgain(r, day, lane, seq); err != nil {
			return remainsAll, err
		} else if a != nil {
			origin = a.origin
		}
		left, err := p.remainsOf(r, ns, origin)
		if err != nil {
			return remainsAll, err
		}
		if len(known) >= maxKnownRemains {
			clear(known)
		}
		known[at] = left
		return left, nil
	}
}

// Proof says that no file of the journal holds anything of what an erasure has selected.
type Proof struct {
	// Time is when the last of them was looked through, Bytes how much that was of tables.
	Time  time.Time
	Bytes int64
}
