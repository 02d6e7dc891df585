package delivery

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// What an event carries is purged, what has become of it stays. Purged are its payload, subject and attributes, what
// transformers have made of it, and of its deliveries what is kept of requests and answers, with the words of receivers and
// plugins, which may quote it. It keeps its id, type, source, times and ordering key, and its deliveries theirs.
//
// First comes the event itself, in one commit; from there on nothing is sent of it again, so that it has no deliveries but
// those it has. Then they, some at a time, and last it is noted that this is done. What a crash leaves half done is purged
// again by whoever purges next, or by a sweep, and until then dispatch cancels what it meets.

// Purged says of an event that its payload has been purged.
type Purged struct {
	// Time is when, Bytes what the payload had.
	Time  time.Time
	Bytes int
	// done: its deliveries have been, too.
	done bool
}

// PurgeCounts says what a purge has done.
type PurgeCounts struct {
	// Events whose payload it has purged, and Bytes of these payloads.
	Events, Bytes int64
	// Cancelled are the deliveries that were open, or blocked their ordering key.
	Cancelled int64
}

func (n *PurgeCounts) add(o PurgeCounts) {
	n.Events += o.Events
	n.Bytes += o.Bytes
	n.Cancelled += o.Cancelled
}

func (n *PurgeCounts) append(w *encoder) {
	for _, v := range [...]int64{n.Events, n.Bytes, n.Cancelled} {
		w.uint(uint64(max(v, 0)))
	}
}

func (d *decoder) purgeCounts() PurgeCounts {
	c := d.counts()
	return PurgeCounts{c.Scanned, c.Created, c.Skipped}
}

// ReasonPurged is why deliveries end as Cancelled whose event's payload has been purged.
const ReasonPurged = "the payload of its event was purged"

const (
	// purgeBatch bounds the deliveries that are purged in one commit.
	purgeBatch = 128
	// newsBatch bounds the rows of changes that are rewritten in one commit; each has 64 KiB at the most.
	newsBatch = 16
)

func (p *Purged) append(w *encoder) {
	w.byte(boolByte(p.done))
	w.time(p.Time)
	w.int(p.Bytes)
}

func (d *decoder) readPurged() *Purged {
	return &Purged{done: d.byte() == 1, Time: d.time(), Bytes: d.int()}
}

// PurgeEvent purges the payload of an event, durably, and all else that is kept of what it carried. Its open deliveries end
// as Cancelled, and so do those that have failed and block an ordering key, which goes on. An attempt in flight is left to
// end. One that has been purged before has nothing done. ErrNotFound says that there is no such event. When it fails half
// way, call it again. What it has purged is in files of the journal until those are written anew.
func (j *Journal) PurgeEvent(ctx context.Context, ns NamespaceKey, partition uint16, seq uint64) (PurgeCounts, error) {
	leave, err := j.enter()
	if err != nil {
		return PurgeCounts{}, err
	}
	defer leave()
	if int(partition) >= len(j.partitions) {
		return PurgeCounts{}, ErrNotFound
	}
	p := j.partitions[partition]
	e, err := p.readEvent(j.db, ns, seq)
	if err != nil {
		return PurgeCounts{}, err
	}
	if e.Purged != nil && e.Purged.done { // durably, whoever did it: retention does not wait for that
		return PurgeCounts{}, j.syncs.wait(ctx, j.syncs.written.Load())
	}
	var sum PurgeCounts
	unread, err := p.purge(ctx, ns, []uint64{seq}, nil, func(_ *commit, n PurgeCounts) error {
		sum.add(n)
		return nil
	}, func() {})
	if err != nil {
		return PurgeCounts{}, err // sum may still be in the committer's hands
	}
	return sum, errors.Join(unread...)
}

// purge purges events of a namespace, of which may, unless it is nil, is asked in the commit that begins it. note is told in
// each commit what that has done, and may add to it. What cannot be read is passed over, and named. ErrNotFound: there was
// none to purge. rest is called between the commits of deliveries, of which an event may have many.
func (p *partition) purge(ctx context.Context, ns NamespaceKey, seqs []uint64, may func(c *commit, seq uint64) (bool, error),
	note func(*commit, PurgeCounts) error, rest func(),
) (unread []error, err error) {
	passed := make(chan []uint64, 1)
	if err := p.do(ctx, func(c *commit) error {
		var some []uint64
		for _, seq := range seqs {
			if may != nil {
				if ok, err := may(c, seq); err != nil {
					return err
				} else if !ok {
					continue
				}
			}
			switch found, err := c.purgeEvent(ns, seq); {
			case err != nil:
				return err
			case found:
				c.set(appendWaitKey(nil, p.number, kept, ns, seq), nil) // until it is done
				some = append(some, seq)
			}
		}
		passed <- some
		return nil
	}); err != nil {
		return nil, err
	}
	seqs = <-passed
	if len(seqs) == 0 {
		return nil, ErrNotFound
	}
	ctx = context.WithoutCancel(ctx) // what has no payload is not left with deliveries that are open
	all, unread, err := p.toPurge(ns, seqs)
	if err != nil {
		return nil, err
	}
	for some := range slices.Chunk(all, purgeBatch) {
		aside := make(chan []error, 1)
		if err := p.do(ctx, func(c *commit) error {
			n, unread := c.purgeDeliveries(some)
			aside <- unread
			return note(c, n)
		}); err != nil {
			return nil, err
		}
		unread = append(unread, <-aside...)
		rest()
	}
	if len(unread) > 0 {
		return unread, nil
	}
	own := make(map[uint64]bool)
	for _, at := range all {
		own[at.seq] = true
	}
	if err := p.purgeNews(ctx, ns, own, func(LaneKey, uint64) (bool, error) { return true, nil }); err != nil {
		return nil, err
	}
	return nil, p.do(ctx, func(c *commit) error {
		n, err := c.purgeDone(ns, seqs)
		if err != nil {
			return err
		}
		return note(c, n)
	})
}

// eachCopy visits the copies of a record that there are: in kept, and in its day, where a sweep that was cut short may have
// left it.
func (c *commit) eachCopy(seq uint64, key func(dayKey) []byte, visit func(key, value []byte) error) (found bool, err error) {
	for _, day := range [...]dayKey{kept, dayOf(seq)} {
		at := key(day)
		var value []byte
		there, err := c.p.j.get(c.r, at, func(v []byte) error {
			value = bytes.Clone(v)
			return nil
		})
		if err != nil {
			return found, err
		}
		if !there {
			continue
		}
		found = true
		if err := visit(at, value); err != nil {
			return found, err
		}
	}
	return found, nil
}

// purgeEvent takes the payload of an event away, and what was made of it, and reports whether there is such an event.
func (c *commit) purgeEvent(ns NamespaceKey, seq uint64) (bool, error) {
	p := c.p
	found, err := c.eachCopy(seq, func(day dayKey) []byte { return appendEventKey(nil, p.number, day, ns, seq) }, func(key, value []byte) error {
		return c.purgeRecord(key, value, false)
	})
	if err != nil || !found {
		return found, err
	}
	c.firm, c.edited = true, true
	for _, day := range [...]dayKey{kept, dayOf(seq)} {
		if err := c.deleteKeys(appendMade(nil, p.number, day, ns, seq)); err != nil {
			return true, err
		}
	}
	return true, nil
}

// purgeRecord takes what an event carries out of its record; done says that its deliveries have been purged, too.
func (c *commit) purgeRecord(key, value []byte, done bool) error {
	e, err := decodeEvent(value)
	if err != nil {
		return c.p.j.corrupt(key, err)
	}
	if e.Purged != nil {
		return nil
	}
	e.Purged = &Purged{Time: c.at, Bytes: len(e.Payload), done: done}
	e.Payload, e.Subject, e.Attributes, e.Headers, e.Trace = nil, "", nil, nil, nil
	for i := range e.Faults {
		e.Faults[i].Text = "its payload was purged"
	}
	c.set(key, withoutPayload(value, e))
	return nil
}

// withoutPayload is the record of an event as it is now, with the targets of the record that it was read from.
func withoutPayload(before []byte, e *Event) []byte {
	d := readRecord(before)
	d.time()
	w := newRecord(nil)
	w.time(e.AcceptTime)
	place := d.b[0] | targetsPurged
	within, _ := d.targets()
	if w.byte(place); place&^targetsPurged == targetsWithin {
		w.bytes(within)
	}
	return appendEvent(w, e)
}

// purgeDone notes of events that nothing of what they carried is left.
func (c *commit) purgeDone(ns NamespaceKey, seqs []uint64) (n PurgeCounts, err error) {
	p := c.p
	for _, seq := range seqs {
		c.delete(appendWaitKey(nil, p.number, kept, ns, seq))
		counted := false
		if _, err := c.eachCopy(seq, func(day dayKey) []byte { return appendEventKey(nil, p.number, day, ns, seq) }, func(key, value []byte) error {
			e, err := decodeEvent(value)
			if err != nil {
				return p.j.corrupt(key, err)
			}
			if e.Purged == nil || e.Purged.done {
				return nil
			}
			e.Purged.done = true
			c.set(key, withoutPayload(value, e))
			if !counted {
				n.Events++
				n.Bytes += int64(e.Purged.Bytes)
			}
			counted = true
			return nil
		}); err != nil {
			return n, err
		}
	}
	c.firm = true
	return n, nil
}

// toPurge lists the deliveries of events that have been purged themselves, and names the events of which they cannot be read.
// Those that are gone meanwhile have none.
func (p *partition) toPurge(ns NamespaceKey, seqs []uint64) (all []rowAt, unread []error, err error) {
	r, _ := p.snapshot()
	defer func() { err = errors.Join(err, r.Close()) }()
	for _, seq := range seqs {
		err := passGone(p.deliveriesOf(r, ns, seq, func(lane LaneKey, own uint64) { all = append(all, rowAt{lane, own}) }))
		if fatal := p.passOver(err); fatal != nil {
			return nil, nil, fatal
		}
		if err != nil {
			unread = append(unread, fmt.Errorf("purge deliveries of event %d of partition %d: %w", seq, p.number, err))
		}
	}
	return all, unread, nil
}

// deliveriesOf visits the deliveries of an event, those that were made again, too.
func (p *partition) deliveriesOf(r pebble.Reader, ns NamespaceKey, seq uint64, visit func(lane LaneKey, own uint64)) error {
	day, err := p.home(r, ns, seq)
	if err != nil {
		return err
	}
	head, err := p.readHead(r, day, ns, seq)
	if err != nil {
		return err
	}
	if err := p.targets(r, day, ns, seq, &head, func(list *targetList) {
		for _, sub := range list.keys() {
			visit(LaneKey{ns, sub}, seq)
		}
	}); err != nil {
		return err
	}
	return p.eachReplay(r, day, ns, seq, func(lane LaneKey, own, _ uint64) error {
		visit(lane, own)
		return nil
	})
}

// purgeDeliveries purges deliveries of events that have been, and names those that cannot be read.
func (c *commit) purgeDeliveries(all []rowAt) (n PurgeCounts, unread []error) {
	c.firm = true
	for _, at := range all {
		cancelled, err := c.purgeDelivery(at.lane, at.seq)
		if err != nil {
			unread = append(unread, fmt.Errorf("purge delivery %s: %w", ID{at.seq, c.p.number, at.lane.Subscription}, err))
		}
		if cancelled {
			n.Cancelled++
		}
	}
	return n, unread
}

// purgeDelivery ends a delivery, if it is open, and takes what is kept of its requests and answers away.
func (c *commit) purgeDelivery(lane LaneKey, seq uint64) (cancelled bool, err error) {
	p := c.p
	for _, day := range [...]dayKey{kept, dayOf(seq)} {
		if err := c.purgeAttempts(appendAttempts(nil, p.number, day, lane, seq)); err != nil {
			return false, err
		}
	}
	if _, err := c.eachCopy(seq, func(day dayKey) []byte { return appendDeliveryKey(nil, p.number, day, lane, seq) }, func(key, value []byte) error {
		return c.stripRecord(kindDelivery, key, value)
	}); err != nil {
		return false, err
	}
	at, err := p.find(c.r, lane, seq)
	if err != nil || at == nil {
		return false, err
	}
	if !at.open {
		if blocks, err := p.blocking(c.r, lane, at); err != nil || !blocks {
			return false, err
		}
	}
	at.strip()
	if at.waits {
		return true, c.cancelWaiting(lane, at, ReasonPurged)
	}
	return true, c.cancel(lane, at, ReasonPurged)
}

// purgeAttempts takes what is kept of requests and answers out of the attempts of a delivery.
func (c *commit) purgeAttempts(prefix []byte) error {
	var keys, values [][]byte // an iterator is not to be disturbed
	if err := c.p.j.scan(c.r, prefix, prefixEnd(prefix), func(key, value []byte) error {
		if quotes(kindAttempt, value) {
			keys, values = append(keys, bytes.Clone(key)), append(values, bytes.Clone(value))
		}
		return nil
	}); err != nil {
		return err
	}
	for i, key := range keys {
		if err := c.stripRecord(kindAttempt, key, values[i]); err != nil {
			return err
		}
	}
	return nil
}

// quotes reports whether the record of a delivery or an attempt may quote its event; of an attempt that cannot be read nobody
// can tell what it says.
func quotes(kind byte, value []byte) bool {
	if kind == kindAttempt {
		a, err := decodeAttempt(value)
		return err != nil || a.strip()
	}
	st, err := decodeStanding(value)
	return err == nil && st.strip()
}

// stripRecord takes out of the record of a delivery or an attempt what may quote its event.
func (c *commit) stripRecord(kind byte, key, value []byte) error {
	after, quotes, err := c.p.stripped(kind, key, value)
	switch {
	case err != nil || !quotes:
		return err
	case after == nil:
		c.delete(key)
	default:
		c.set(key, after)
	}
	return nil
}

// stripped is the record of a delivery or an attempt without what may quote its event, if it does; nil where it is to go.
func (p *partition) stripped(kind byte, key, value []byte) (after []byte, quotes bool, err error) {
	if kind == kindAttempt {
		a, err := decodeAttempt(value)
		switch {
		case err != nil:
			return nil, true, nil
		case !a.strip():
			return nil, false, nil
		}
		return encodeAttempt(nil, a), true, nil
	}
	st, err := decodeStanding(value)
	if err != nil {
		return nil, false, p.j.corrupt(key, err)
	}
	if !st.strip() {
		return nil, false, nil
	}
	return encodeStanding(nil, &st), true, nil
}

// strip takes away what an attempt may quote of its event, and reports whether there was anything.
func (a *Attempt) strip() bool {
	if a.Error == "" && len(a.ResponseBody)+len(a.ResponseHeaders)+len(a.RequestHeaders) == 0 {
		return false
	}
	a.Error, a.ResponseBody, a.ResponseHeaders, a.RequestHeaders = "", nil, nil, nil
	return true
}

// strip takes away what a standing may quote of its event, and reports whether there was anything.
func (s *standing) strip() bool {
	reason := stripReason(s.reason)
	any := reason != s.reason
	s.reason = reason
	if s.last != nil && s.last.Error != "" {
		last := *s.last
		last.Error = ""
		s.last, any = &last, true
	}
	if s.letter != nil && stripReason(s.letter.Reason) != s.letter.Reason {
		letter := *s.letter
		letter.Reason = stripReason(letter.Reason)
		s.letter, any = &letter, true
	}
	return any
}

// stripReason is what Next says of itself, without the words of a receiver or plugin that follow a colon.
func stripReason(reason string) string {
	said, suffix := reason, ""
	for _, end := range [...]string{reasonGoesOn, reasonBlocks} {
		if cut, ok := strings.CutSuffix(reason, end); ok {
			said, suffix = cut, end
		}
	}
	said, _, _ = strings.Cut(said, ": ")
	return said + suffix
}

// remains says what there is of an event.
type remains uint8

const (
	remainsAll remains = iota
	remainsPurged
	remainsNone // it is retained no longer
)

// remainsOf says what there is of a delivery's event.
func (p *partition) remainsOf(r pebble.Reader, ns NamespaceKey, seq uint64) (remains, error) {
	day, err := p.home(r, ns, seq)
	if err != nil {
		return remainsAll, err
	}
	head, err := p.readHead(r, day, ns, seq)
	switch {
	case errors.Is(err, ErrNotFound):
		return remainsNone, nil
	case head.purged:
		return remainsPurged, err
	}
	return remainsAll, err
}

// purgedOf reports whether the payload of a delivery's event has been purged.
func (p *partition) purgedOf(r pebble.Reader, ns NamespaceKey, seq uint64) (bool, error) {
	left, err := p.remainsOf(r, ns, seq)
	return left == remainsPurged, err
}

// purgeNews takes what changes of erased deliveries may quote out of what is kept for those who watch. Nothing else than some
// sequences is looked at, unless they are nil.
func (p *partition) purgeNews(ctx context.Context, ns NamespaceKey, only map[uint64]bool, erased func(lane LaneKey, seq uint64) (bool, error)) error {
	prefix := appendSpace(nil, p.number, tagNews, ns)
	type row struct{ key, before, after []byte }
	var rows []row
	flush := func() error {
		some := rows
		rows = nil
		if len(some) == 0 {
			return nil
		}
		return p.do(ctx, func(c *commit) error {
			c.firm = true
			for _, row := range some {
				var now []byte
				found, err := p.j.get(c.r, row.key, func(value []byte) error {
					now = bytes.Clone(value)
					return nil
				})
				if err == nil && found && !bytes.Equal(now, row.before) { // something else of it has been purged meanwhile
					row.after, err = p.stripNews(ns, row.key, now, only, erased)
				}
				if err != nil {
					return err
				}
				if found && row.after != nil { // else it has been trimmed
					c.set(row.key, row.after)
				}
			}
			return nil
		})
	}
	r, _ := p.snapshot()
	err := p.j.scan(r, prefix, prefixEnd(prefix), func(key, value []byte) error {
		after, err := p.stripNews(ns, key, value, only, erased)
		if err != nil {
			return p.passOver(err)
		}
		if after == nil {
			return nil
		}
		if rows = append(rows, row{bytes.Clone(key), bytes.Clone(value), after}); len(rows) < newsBatch {
			return nil
		}
		return flush()
	})
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	return flush()
}

// stripNews is a row of changes without what those of erased deliveries may quote; nil when there is nothing. Only those of
// some sequences are decoded, unless they are nil.
func (p *partition) stripNews(ns NamespaceKey, key, value []byte, only map[uint64]bool, erased func(lane LaneKey, seq uint64) (bool, error)) ([]byte, error) {
	d := readRecord(value)
	first, count, last := d.uint(), d.uint(), d.byte()
	if d.err != nil {
		return nil, p.j.corrupt(key, d.err)
	}
	w := newRecord(nil)
	w.uint(first)
	w.uint(count)
	w.byte(last)
	stripped, kept := false, d.b // what has not been written yet
	for body := d.b; len(body) > 0; {
		if len(body) < changeHead {
			return nil, p.j.corrupt(key, errTruncated)
		}
		size := uint64(binary.BigEndian.Uint32(body[changeHead-4:]))
		if size > uint64(len(body)-changeHead) {
			return nil, p.j.corrupt(key, errTruncated)
		}
		at, record := body, body[changeHead:changeHead+size]
		body = body[changeHead+size:]
		seq := binary.BigEndian.Uint64(at[8:])
		if only != nil && !only[seq] {
			continue
		}
		st, err := decodeStanding(record)
		if err != nil {
			return nil, p.j.corrupt(key, err)
		}
		if !st.strip() {
			continue
		}
		if gone, err := erased(LaneKey{ns, SubscriptionKey(binary.BigEndian.Uint64(at))}, seq); err != nil {
			return nil, err
		} else if !gone {
			continue
		}
		record = encodeStanding(nil, &st)
		w = append(w, kept[:len(kept)-len(at)+changeHead-4]...)
		w = binary.BigEndian.AppendUint32(w, uint32(len(record)))
		w = append(w, record...)
		stripped, kept = true, body
	}
	if !stripped {
		return nil, nil
	}
	return append(w, kept...), nil
}
