package delivery

import (
	"cmp"
	"context"
	"fmt"
	"sync/atomic"
	"time"
	"unicode/utf8"
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
	Publication
	result *AppendResult
}

func (c *appendCall) finish() {
	if c.left.Add(-1) == 0 {
		close(c.done)
	}
}

// Append stores events, each with one delivery per target, and returns one result per event, in order,
// once they are durable. An event whose namespace, Source, ID and ContentHash were accepted within the last 24
// hours is a Duplicate of that one; with another hash it is ErrEventConflict; with another OrderingKey it is another event. The events and targets belong to
// the journal from here on, whatever the result; when ctx ends early they may still be stored.
func (j *Journal) Append(ctx context.Context, events []Publication) []AppendResult {
	if j.space.low() {
		j.metrics.refused.Add(uint64(len(events)))
		return sameResult(len(events), ErrDiskFull)
	}
	call := &appendCall{done: make(chan struct{}), results: make([]AppendResult, len(events))}
	parts := j.split(call, events)
	call.left.Store(int32(len(parts)))
	for _, part := range parts {
		p := j.partitions[part.entries[0].Event.Partition]
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
func (j *Journal) split(call *appendCall, events []Publication) []appendPart {
	entries := make([]appendEntry, 0, len(events))
	sizes := make([]int32, len(j.partitions))
	for i := range events {
		result := &call.results[i]
		if result.Err = checkPublication(&events[i]); result.Err != nil {
			continue
		}
		e := events[i].Event
		e.Partition = partitionOf(e.Namespace, cmp.Or(e.OrderingKey, e.ID), len(j.partitions))
		sizes[e.Partition]++
		entries = append(entries, appendEntry{events[i], result})
	}
	if len(entries) == 0 {
		return nil
	}
	if int(sizes[entries[0].Event.Partition]) == len(entries) {
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
		k := e.Event.Partition
		grouped[next[k]] = e
		next[k]++
	}
	for i := range parts {
		parts[i].bytes = sizeOf(parts[i].entries)
	}
	return parts
}

// sizeOf is about what the entries take in a batch.
func sizeOf(entries []appendEntry) int {
	size := 0
	for _, e := range entries {
		size += 160 + sizeOfEvent(e.Event) + sizeOfTargets(e.Targets) + 56*len(e.Targets)
	}
	return size
}

// maxTargets keeps an event's batch, and the record of its targets, to a size that the journal's engine takes.
const maxTargets = 1 << 20

// checkPublication refuses what cannot be encoded; the rules of the API are stricter.
func checkPublication(pub *Publication) error {
	e := pub.Event
	switch {
	case e.ID == "":
		return fmt.Errorf("%w: no id", ErrInvalidEvent)
	case len(pub.Targets) > maxTargets:
		return fmt.Errorf("%w: %d targets, at most %d are possible", ErrInvalidEvent, len(pub.Targets), maxTargets)
	}
	for _, text := range [...]string{e.ID, e.Source, e.Type, e.Subject, e.ContentType, e.Schema, e.OrderingKey} {
		if !utf8.ValidString(text) {
			return fmt.Errorf("%w: text is not UTF-8", ErrInvalidEvent)
		}
	}
	for name, value := range e.Attributes {
		if !utf8.ValidString(name) || !utf8.ValidString(value) {
			return fmt.Errorf("%w: attribute is not UTF-8", ErrInvalidEvent)
		}
	}
	for name, value := range e.Headers {
		if !utf8.ValidString(name) || !utf8.ValidString(value) {
			return fmt.Errorf("%w: header is not UTF-8", ErrInvalidEvent)
		}
	}
	return checkTargets(pub.Targets)
}

// checkTargets refuses a subscription twice: it is part of the key, so one event can have it once.
func checkTargets(targets []Target) error {
	if len(targets) < 2 {
		return nil
	}
	seen := make(map[SubscriptionKey]struct{}, len(targets))
	for i := range targets {
		key := targets[i].UID.SubscriptionKey()
		if _, twice := seen[key]; twice {
			return fmt.Errorf("%w: subscription %q twice", ErrInvalidEvent, targets[i].Subscription)
		}
		seen[key] = struct{}{}
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

// inRound finds events of the same round by their identity.
type inRound map[spacedIdentity]*Event

type spacedIdentity struct {
	ns NamespaceKey
	identity
}

// publish prepares the appends of a round.
func (c *commit) publish(parts []appendPart) {
	var seen inRound
	if len(parts) > 1 || len(parts) == 1 && len(parts[0].entries) > 1 {
		seen = make(inRound)
	}
	for i := range parts {
		for _, e := range parts[i].entries {
			c.outcomes = append(c.outcomes, outcome{e.result, c.publishOne(&e.Publication, seen)})
		}
	}
	// Records of a kind together: neighbours are much cheaper to insert than keys of different kinds in turn.
	for i := range c.stored {
		c.putEvent(&c.stored[i])
	}
	for i := range c.stored {
		c.putTargets(&c.stored[i])
	}
	for i := range c.stored {
		c.target(&c.stored[i])
	}
}

func (c *commit) putEvent(pub *Publication) {
	p, e := c.p, pub.Event
	p.key = appendEventKey(p.key[:0], p.number, dayOf(e.Seq), e.Namespace, e.Seq)
	p.value = encodeEvent(p.value[:0], e, pub.Targets)
	c.set(p.key, p.value)
	if cap(p.value) > 1<<20 {
		p.value = nil // a large event's memory is not kept
	}
}

// putTargets adds the record of those targets that are too many for the event's.
func (c *commit) putTargets(pub *Publication) {
	p, e := c.p, pub.Event
	if targetsPlace(pub.Targets) != targetsApart {
		return
	}
	p.key = appendTargetsKey(p.key[:0], p.number, dayOf(e.Seq), e.Namespace, e.Seq)
	p.value = encodeTargets(p.value[:0], pub.Targets)
	c.set(p.key, p.value)
}

// publishOne gives the event its sequence, and is to store it unless it is known.
func (c *commit) publishOne(pub *Publication, seen inRound) AppendResult {
	p, e := c.p, pub.Event
	id := identityOf(e.Source, e.ID, e.OrderingKey)
	if seen != nil {
		if first := seen[spacedIdentity{e.Namespace, id}]; first != nil {
			return c.known(first, first.ContentHash == e.ContentHash)
		}
	}
	seq := p.nextSeq(c.lastSeq, c.at)
	today := dayOf(seq)
	if mixed := id.mixed(e.Namespace); !p.ids.fresh(mixed) {
		if result, known := c.lookUp(e, id, today); known {
			return result
		}
		c.ids = append(c.ids, mixed)
	} else {
		c.ids = append(c.ids, mixed)
	}
	if seen != nil {
		seen[spacedIdentity{e.Namespace, id}] = e
	}
	c.lastSeq = seq
	e.Partition, e.Seq, e.AcceptTime, e.UID = p.number, seq, c.at, eventUID(p.memory.journal, p.number, seq)
	e.Matched, e.Skipped = len(pub.Targets), 0
	for i := range pub.Targets {
		if pub.Targets[i].Skip {
			e.Skipped++
		}
	}
	p.key = appendIdentityKey(p.key[:0], p.number, today, e.Namespace, id)
	p.value = encodeKnown(p.value[:0], &known{seq, InstantOf(c.at), e.ContentHash, e.Matched, e.Skipped, e.FaultCount})
	c.set(p.key, p.value)
	if e.OrderingKey != "" {
		c.noteKeyed()
	}
	c.stored = append(c.stored, *pub)
	return AppendResult{Event: e}
}

// noteKeyed has the partition remember that ids lead to it that are not its own.
func (c *commit) noteKeyed() {
	m := c.p.memory
	if c.memory != nil {
		m = *c.memory
	}
	if !m.keyed {
		m.keyed = true
		c.memory = &m
	}
}

// target adds the deliveries of an event.
func (c *commit) target(pub *Publication) {
	e := pub.Event
	today := dayOf(e.Seq)
	start, deferred := startOf(e)
	row := Row{Kind: FIFO, Seq: e.Seq, Epoch: 1}
	order, watched := orderKeyOf(e.OrderingKey), c.p.j.watches.watched(e.Namespace)
	if deferred {
		row.Kind, row.Due = Timer, InstantOf(start)
	}
	for i := range pub.Targets {
		t := &pub.Targets[i]
		lane := LaneKey{e.Namespace, t.UID.SubscriptionKey()}
		age := maxAge(t.MaxAge, e.TTL)
		pr := progress{epoch: 1, maxAttempts: max(t.MaxAttempts, 1), expire: InstantOf(start.Add(age)), order: t.order(order)}
		if !t.Skip {
			due := Instant(0) // of one that waits for its turn
			if pr.order == 0 || c.queueUp(t, lane, row, &pr, age) {
				c.putRow(lane, row, &pr)
				due = row.Due
			}
			if watched {
				c.changed(lane, e.Seq, &standing{progress: pr, state: Pending, due: due})
			}
			continue
		}
		c.putStanding(today, lane, e.Seq, &standing{progress: pr, state: Skipped, reason: reasonSkipped, complete: InstantOf(c.at)})
		c.bury(today, lane, e.Seq, Skipped)
	}
}

// order is the ordering key of an event for a target.
func (t *Target) order(key OrderKey) OrderKey {
	if !t.Ordered {
		return 0
	}
	return key
}

// startOf is when the first attempt may be made, and whether that is later than now.
func startOf(e *Event) (start time.Time, deferred bool) {
	if e.DeliverTime.After(e.AcceptTime) {
		return e.DeliverTime, true
	}
	return e.AcceptTime, false
}

const reasonSkipped = "the subscription or its namespace was disabled"

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

// known answers for an event whose identity is taken.
func (c *commit) known(original *Event, same bool) AppendResult {
	if !same {
		c.refused++
		return AppendResult{Err: ErrEventConflict}
	}
	c.duplicate++
	return AppendResult{Event: original, Duplicate: true}
}

// lookUp finds the event of this identity among those of the last 24 hours.
func (c *commit) lookUp(e *Event, id identity, today dayKey) (AppendResult, bool) {
	p := c.p
	days := idDaysOf(today)
	if p.ahead.high != 0 && c.at.Sub(p.ahead.noticed.Time()) <= dedupWindow {
		days = append(days, p.aheadDays...)
	}
	for _, d := range days {
		var k known
		found, err := p.j.get(c.r, appendIdentityKey(nil, p.number, d, e.Namespace, id), func(value []byte) (err error) {
			k, err = decodeKnown(value)
			return err
		})
		if err != nil {
			return AppendResult{Err: fmt.Errorf("look up event: %w", err)}, true
		}
		if !found {
			continue
		}
		if c.at.Sub(k.accept.Time()) > dedupWindow {
			return AppendResult{}, false
		}
		return c.known(c.original(e, &k), k.hash == e.ContentHash), true
	}
	return AppendResult{}, false
}

// original reads the event that e repeats, or makes it up from e when it is no longer retained.
func (c *commit) original(e *Event, k *known) *Event {
	p := c.p
	if first, err := p.readEvent(c.r, e.Namespace, k.seq); err == nil {
		return first
	}
	first := *e
	first.Partition, first.Seq = p.number, k.seq
	first.AcceptTime, first.UID = k.accept.Time(), eventUID(p.memory.journal, p.number, k.seq)
	first.Matched, first.Skipped, first.FaultCount, first.Faults = k.matched, k.skipped, k.faults, nil
	return &first
}
