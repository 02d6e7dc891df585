package delivery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/cockroachdb/pebble/v2"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

const (
	day = 24 * time.Hour
	// dedupWindow is how long an event id stays taken.
	dedupWindow = day
	// noMaxAge stands in for a target without MaxAge.
	noMaxAge = 10 * 365 * day
)

// appendCall is one Append; its parts are answered by several committers.
type appendCall struct {
	left    atomic.Int32
	done    chan struct{}
	results []AppendResult
}

// appendPart is what one partition has to do of an appendCall.
type appendPart struct {
	call    *appendCall
	entries []appendEntry
	bytes   int
}

type appendEntry struct {
	event  *Event
	result *AppendResult
}

func (c *appendCall) finish() {
	if c.left.Add(-1) == 0 {
		close(c.done)
	}
}

// Append stores events, each with one delivery per target, and returns one result per event, in order,
// once they are durable. An event whose namespace, ID and ContentHash were accepted within the last 24
// hours is a Duplicate of that one; with another hash it is ErrEventConflict. The events belong to the
// journal from here on, whatever the result; when ctx ends early they may still be stored.
func (j *Journal) Append(ctx context.Context, events []*Event) []AppendResult {
	if j.space.low() {
		j.metrics.refused.Add(uint64(len(events)))
		return sameResult(len(events), ErrDiskFull)
	}
	call := &appendCall{done: make(chan struct{}), results: make([]AppendResult, len(events))}
	parts := j.split(call, events)
	call.left.Store(int32(len(parts)))
	for _, part := range parts {
		p := j.partitions[part.entries[0].event.Partition]
		if !p.enqueue(part) {
			for _, e := range part.entries {
				e.result.Err = ErrClosed
			}
			call.finish()
		}
	}
	if len(parts) == 0 {
		return call.results
	}
	select {
	case <-call.done:
		return call.results
	case <-ctx.Done():
		// The committers still own call.results.
		return sameResult(len(events), context.Cause(ctx))
	}
}

func sameResult(n int, err error) []AppendResult {
	results := make([]AppendResult, n)
	for i := range results {
		results[i].Err = err
	}
	return results
}

// split groups the events that can be stored by partition, keeping their order.
func (j *Journal) split(call *appendCall, events []*Event) []appendPart {
	entries := make([]appendEntry, 0, len(events))
	sizes := make([]int32, len(j.partitions))
	for i, e := range events {
		result := &call.results[i]
		if result.Err = checkEvent(e); result.Err != nil {
			continue
		}
		e.Partition = partitionOf(e.Namespace, e.ID, len(j.partitions))
		sizes[e.Partition]++
		entries = append(entries, appendEntry{e, result})
	}
	if len(entries) == 0 {
		return nil
	}
	if int(sizes[entries[0].event.Partition]) == len(entries) {
		return []appendPart{{call, entries, sizeOf(entries)}}
	}
	grouped := make([]appendEntry, len(entries))
	var parts []appendPart
	next := make([]int32, len(sizes))
	var at int32
	for i, n := range sizes {
		next[i] = at
		if n > 0 {
			parts = append(parts, appendPart{call: call, entries: grouped[at : at+n : at+n]})
		}
		at += n
	}
	for _, e := range entries {
		k := e.event.Partition
		grouped[next[k]] = e
		next[k]++
	}
	for i := range parts {
		parts[i].bytes = sizeOf(parts[i].entries)
	}
	return parts
}

func sizeOf(entries []appendEntry) int {
	size := 0
	for _, e := range entries {
		size += len(e.event.Payload) + 128*len(e.event.Targets)
	}
	return size
}

// checkEvent refuses what has no key or cannot be encoded; the rules of the API are stricter.
func checkEvent(e *Event) error {
	switch {
	case e.Namespace == "" || strings.IndexByte(e.Namespace, 0) >= 0:
		return fmt.Errorf("%w: bad namespace %q", ErrInvalidEvent, e.Namespace)
	case e.ID == "":
		return fmt.Errorf("%w: no id", ErrInvalidEvent)
	case len(e.Targets) > 1<<16:
		return fmt.Errorf("%w: %d targets", ErrInvalidEvent, len(e.Targets))
	}
	for _, text := range [...]string{e.Namespace, e.ID, e.Source, e.Type, e.Subject, e.ContentType, e.Schema} {
		if !utf8.ValidString(text) {
			return fmt.Errorf("%w: text is not UTF-8", ErrInvalidEvent)
		}
	}
	for name, value := range e.Attributes {
		if !utf8.ValidString(name) || !utf8.ValidString(value) {
			return fmt.Errorf("%w: attribute is not UTF-8", ErrInvalidEvent)
		}
	}
	return checkTargets(e.Targets)
}

func checkTargets(targets []Target) error {
	// The subscription is part of the key, so one event can have it once.
	var seen map[string]struct{}
	if len(targets) > 1 {
		seen = make(map[string]struct{}, len(targets))
	}
	for i := range targets {
		name := targets[i].Subscription
		if name == "" || strings.IndexByte(name, 0) >= 0 || !utf8.ValidString(name) {
			return fmt.Errorf("%w: bad subscription %q", ErrInvalidEvent, name)
		}
		if seen == nil {
			continue
		}
		if _, twice := seen[name]; twice {
			return fmt.Errorf("%w: subscription %q twice", ErrInvalidEvent, name)
		}
		seen[name] = struct{}{}
	}
	return nil
}

func (p *partition) enqueue(part appendPart) bool {
	p.mu.Lock()
	if p.closing || !p.j.started.Load() {
		p.mu.Unlock()
		return false
	}
	p.appends = append(p.appends, part)
	first := len(p.appends) == 1
	p.mu.Unlock()
	if first {
		p.signal()
	}
	return true
}

// applyAppends adds the events to the batch and reports whether any was fresh.
func (p *partition) applyAppends(b *pebble.Batch, parts []appendPart) bool {
	fresh := false
	clear(p.seen)
	many := len(parts) > 1 || len(parts) == 1 && len(parts[0].entries) > 1
	for i := range parts {
		for _, e := range parts[i].entries {
			*e.result = p.appendOne(b, e.event, many)
			fresh = fresh || e.result.Err == nil && !e.result.Duplicate
		}
	}
	return fresh
}

// appendOne gives the event its sequence and adds its records to the batch, unless it is known.
func (p *partition) appendOne(b *pebble.Batch, e *Event, many bool) AppendResult {
	seq := max(p.lastSeq+1, seqAt(p.now))
	if many {
		id := eventKey{e.Namespace, e.ID}
		if first := p.seen[id]; first != nil {
			return p.known(first, first.ContentHash == e.ContentHash)
		}
		p.seen[id] = e
	}
	today := dayOf(seq)
	p.key = appendIdempotencyKey(p.key[:0], p.index, today, e.Namespace, e.ID)
	p.filter.turn(today)
	hash := p.filter.hash(p.key)
	if result, known := p.lookUp(e, today, hash); known {
		if many {
			delete(p.seen, eventKey{e.Namespace, e.ID})
		}
		return result
	}
	p.filter.add(hash)
	p.lastSeq = seq
	e.Seq, e.AcceptTime, e.UID = seq, p.now, eventUID(p.j.id, p.index, seq)
	p.idem.Seq, p.idem.ContentHash, p.idem.Targets = seq, e.ContentHash[:], uint32(len(e.Targets))
	putRecord(b, p.key, &p.idem)
	eventRecord(&p.event, e)
	p.key = appendEventKey(p.key[:0], p.index, e.Namespace, seq)
	putRecord(b, p.key, &p.event)
	p.appendDeliveries(b, e)
	if e.Namespace != p.lastSpace {
		p.j.addSpace(e.Namespace)
		p.lastSpace = e.Namespace
	}
	p.j.metrics.stored.Add(1)
	return AppendResult{Event: e}
}

func dayOf(seq uint64) uint32 { return uint32(seq >> seqCounterBits / uint64(day.Milliseconds())) }

func (p *partition) known(original *Event, same bool) AppendResult {
	if !same {
		p.j.metrics.refused.Add(1)
		return AppendResult{Err: ErrEventConflict}
	}
	p.j.metrics.duplicates.Add(1)
	return AppendResult{Event: original, Duplicate: true}
}

// lookUp finds the event of this id in the records of today and yesterday; p.key is today's key.
func (p *partition) lookUp(e *Event, today uint32, hash uint64) (AppendResult, bool) {
	if p.filter.fresh(hash) {
		return AppendResult{}, false
	}
	for d := today; d+2 > today; d-- {
		binary.BigEndian.PutUint32(p.key[bodyOffset:], d)
		value, closer, err := p.j.db.Get(p.key)
		if errors.Is(err, pebble.ErrNotFound) {
			continue
		}
		if err != nil {
			return AppendResult{Err: fmt.Errorf("look up event: %w", err)}, true
		}
		var rec storev1.IdempotencyRecord
		err = p.j.decode(p.key, value, &rec)
		_ = closer.Close()
		if err != nil {
			return AppendResult{Err: err}, true
		}
		if p.now.Sub(seqTime(rec.GetSeq())) > dedupWindow {
			break
		}
		return p.known(p.original(e, &rec), string(rec.GetContentHash()) == string(e.ContentHash[:])), true
	}
	binary.BigEndian.PutUint32(p.key[bodyOffset:], today)
	return AppendResult{}, false
}

// original reads the event that e repeats, or makes it up from e when it is no longer retained.
func (p *partition) original(e *Event, rec *storev1.IdempotencyRecord) *Event {
	if first, err := p.j.readEvent(p.index, e.Namespace, rec.GetSeq()); err == nil {
		return first
	}
	first := *e
	first.Partition, first.Seq = p.index, rec.GetSeq()
	first.AcceptTime, first.UID = seqTime(rec.GetSeq()), eventUID(p.j.id, p.index, rec.GetSeq())
	first.Targets = make([]Target, rec.GetTargets())
	return &first
}

// appendDeliveries adds a delivery per target, and collects the jobs of those that are due.
func (p *partition) appendDeliveries(b *pebble.Batch, e *Event) {
	if len(e.Targets) == 0 {
		return
	}
	start, deferred := e.AcceptTime, e.DeliverTime.After(e.AcceptTime)
	if deferred {
		start = e.DeliverTime
	}
	// One block per event: its jobs hold the same event anyway.
	var jobs []Job
	if !deferred {
		jobs = make([]Job, 0, len(e.Targets))
	}
	rec := &p.delivery
	for i := range e.Targets {
		t := &e.Targets[i]
		lane := LaneKey{e.Namespace, t.Subscription}
		expire := start.Add(maxAge(t.MaxAge, e.TTL))
		rec.Reset()
		rec.State, rec.Ordinal, rec.SubscriptionUid = uint32(Pending), uint32(i), t.UID[:]
		rec.MaxAttempts, rec.ExpireTime = uint32(max(t.MaxAttempts, 1)), expire.UnixNano()
		switch {
		case t.Skip:
			rec.State, rec.CompleteTime, rec.StateReason = uint32(Skipped), e.AcceptTime.UnixNano(), reasonSkipped
			p.putIndex(b, lane, Skipped, e.Seq)
		case deferred:
			rec.NextAttemptTime = e.DeliverTime.UnixNano()
			p.putIndex(b, lane, Pending, e.Seq)
			p.putTimer(b, lane, rec.NextAttemptTime, e.Seq)
			p.timers = append(p.timers, laneTimer{lane, e.DeliverTime})
		default:
			jobs = append(jobs, Job{
				ID: ID{Seq: e.Seq, Partition: p.index, Ordinal: uint16(i)}, Event: e, Subscription: t.Subscription,
				SubscriptionUID: t.UID, MaxAttempts: max(t.MaxAttempts, 1), Expire: expire,
			})
			p.jobs = append(p.jobs, &jobs[len(jobs)-1])
		}
		if !t.Skip {
			p.j.counts.add(lane, 1)
		}
		p.key = appendDeliveryKey(p.key[:0], p.index, lane, e.Seq)
		putRecord(b, p.key, rec)
	}
}

const reasonSkipped = "the subscription was disabled"

// maxAge is the lower of the two bounds that are set.
func maxAge(target, ttl time.Duration) time.Duration {
	if target <= 0 {
		target = noMaxAge
	}
	if ttl > 0 {
		return min(target, ttl)
	}
	return target
}

func (p *partition) putIndex(b *pebble.Batch, lane LaneKey, state State, seq uint64) {
	p.key = appendIndexKey(p.key[:0], p.index, lane, state, seq)
	putMark(b, p.key)
}

func (p *partition) deleteIndex(b *pebble.Batch, lane LaneKey, state State, seq uint64) {
	p.key = appendIndexKey(p.key[:0], p.index, lane, state, seq)
	deleteKey(b, p.key)
}

func (p *partition) putTimer(b *pebble.Batch, lane LaneKey, due int64, seq uint64) {
	p.key = appendTimerKey(p.key[:0], p.index, lane, due, seq)
	putMark(b, p.key)
}

func (p *partition) deleteTimer(b *pebble.Batch, lane LaneKey, due int64, seq uint64) {
	p.key = appendTimerKey(p.key[:0], p.index, lane, due, seq)
	deleteKey(b, p.key)
}
