package delivery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// ReplayState is where a replay stands. The numbers are those of grapnel.v1.ReplayJob.State.
type ReplayState uint8

// States of a replay.
const (
	ReplayPending   ReplayState = 1
	ReplayRunning   ReplayState = 2
	ReplaySucceeded ReplayState = 3
	ReplayFailed    ReplayState = 4
	ReplayCancelled ReplayState = 5
)

// Ended reports whether the replay makes no further deliveries.
func (s ReplayState) Ended() bool { return s >= ReplaySucceeded }

// ReplaySpec is what a replay is to do.
type ReplaySpec struct {
	// Erase makes it an erasure: it purges the events that Filter and Condition select, of those accepted from Since to Until,
	// and has no use for the rest. It is stored apart from replays and lives as they do.
	Erase     bool
	Condition string
	// Subscription is the last segment of the name of the one to deliver to, UID its UID; without them every delivery that
	// is selected goes to its own again.
	Subscription string
	UID          UID
	// Since is inclusive and Until exclusive, by when deliveries were made; of events, by when they were accepted.
	Since, Until time.Time
	Filter       string
	// Missing selects events that have had no delivery to the subscription, but skipped ones, instead of deliveries.
	Missing bool
	// Retry opens the deliveries that are selected again instead of making new ones.
	Retry bool
	// MaxRate is how many are made a second.
	MaxRate float64
}

// ReplayCounts says how far a replay has come.
type ReplayCounts struct {
	// Scanned are the deliveries, or events, that it has looked at, Created those made or opened again, Skipped those that
	// it selected and could not make; of an erasure those that could not be read.
	Scanned, Created, Skipped int64
}

func (c *ReplayCounts) add(o ReplayCounts) {
	c.Scanned += o.Scanned
	c.Created += o.Created
	c.Skipped += o.Skipped
}

// Replay is a job that sends again what is on record, or one that erases. A journal keeps it until it is erased itself.
type Replay struct {
	// Key names the replay within its namespace for the journal, ID for people. Keys rise with the time of creation.
	Key       uint64
	Namespace NamespaceKey
	ID        string
	Spec      ReplaySpec
	// ContentHash covers what was asked for; equal hashes make a repeated ID the same replay.
	ContentHash [16]byte
	State       ReplayState
	// Reason says why it has failed.
	Reason               string
	CreateTime, DoneTime time.Time
	Counts               ReplayCounts
	// Purged is what an erasure has purged, and Proof that nothing of it is left on disk; zero before that is known.
	Purged PurgeCounts
	Proof  Proof
	// Progress is about how much of what there is to look at it has looked at, from 0 to 1.
	Progress float64
}

// Errors of replays.
var (
	// ErrReplayExists says that there is another replay with this id.
	ErrReplayExists = errors.New("another replay has this id")
	// ErrTooManyReplays says that as many replays of the namespace go on as may at once.
	ErrTooManyReplays = errors.New("too many replays go on")
)

const (
	// maxReplays bounds the replays of a namespace that are kept; those that ended first give way.
	maxReplays = 256
	// maxReplayText bounds the texts of a replay.
	maxReplayText = 4096
)

// tag is of the keys that keep replays, or erasures.
func (s *ReplaySpec) tag() byte {
	if s.Erase {
		return tagErasure
	}
	return tagJob
}

// replayHome is the partition that keeps the replays of a namespace.
func (j *Journal) replayHome(ns NamespaceKey) *partition {
	return j.partitions[uint64(ns)*0x9e3779b97f4a7c15>>32%uint64(len(j.partitions))]
}

// CreateReplay stores a replay, durably, as PENDING, and completes it by its key and time. When one with this id and
// content is there already it returns that one. ErrReplayExists says that it has other content, ErrTooManyReplays that
// running of the namespace have not ended.
func (j *Journal) CreateReplay(ctx context.Context, r *Replay, running int) (*Replay, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	if n := len(r.ID) + len(r.Spec.Filter) + len(r.Spec.Subscription); n > maxReplayText || len(r.Spec.Condition) > maxReplayText {
		return nil, fmt.Errorf("replay %s: %d bytes of text, at most %d are possible", r.ID, n, maxReplayText)
	}
	p := j.replayHome(r.Namespace)
	var made *Replay
	err = p.do(ctx, func(c *commit) error {
		known, err := p.replays(c.r, r.Namespace)
		if err != nil {
			return err
		}
		going, kept := 0, 0
		for _, k := range known {
			if k.Spec.Erase != r.Spec.Erase {
				continue
			}
			kept++
			if k.ID == r.ID {
				if k.ContentHash != r.ContentHash {
					return ErrReplayExists
				}
				made = k
				return nil
			}
			if !k.State.Ended() {
				going++
			}
		}
		if going >= running {
			return ErrTooManyReplays
		}
		surplus := kept - maxReplays + 1
		for _, k := range known {
			if surplus > 0 && k.State.Ended() && k.Spec.Erase == r.Spec.Erase {
				c.delete(appendJobKey(nil, p.number, k.Spec.tag(), k.Namespace, k.Key))
				surplus--
			}
		}
		own := *r
		own.Key = p.nextSeq(c.lastSeq, c.at)
		if n := len(known); n > 0 {
			own.Key = max(own.Key, known[n-1].Key+1) // the clock may have been ahead
		}
		own.State, own.CreateTime = ReplayPending, c.at
		c.putReplay(&own)
		made = &own
		return nil
	})
	if err != nil {
		return nil, err // made may still be in the committer's hands
	}
	return made, nil
}

func (c *commit) putReplay(r *Replay) {
	p := c.p
	p.key = appendJobKey(p.key[:0], p.number, r.Spec.tag(), r.Namespace, r.Key)
	p.value = encodeReplay(p.value[:0], r)
	c.set(p.key, p.value)
	c.firm = true
}

// EndReplay notes, durably, how a replay has ended, with what it has counted, and forgets where it stood. One that has
// ended before stays as it is; ErrNotFound says that it is there no longer.
func (j *Journal) EndReplay(ctx context.Context, ns NamespaceKey, key uint64, state ReplayState, reason string) (*Replay, error) {
	return j.endReplay(ctx, ns, key, state, reason, Proof{})
}

// EndErasure is EndReplay for an erasure that has come to its end, with the proof that it has.
func (j *Journal) EndErasure(ctx context.Context, ns NamespaceKey, key uint64, proof Proof) (*Replay, error) {
	return j.endReplay(ctx, ns, key, ReplaySucceeded, "", proof)
}

func (j *Journal) endReplay(ctx context.Context, ns NamespaceKey, key uint64, state ReplayState, reason string, proof Proof) (*Replay, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	counts, purged, err := j.replayCounts(ns, key)
	if err != nil {
		return nil, err
	}
	p := j.replayHome(ns)
	var after *Replay
	err = p.do(ctx, func(c *commit) error {
		r, err := p.replay(c.r, ns, key)
		if err != nil {
			return err
		}
		if after = r; r.State.Ended() {
			return nil
		}
		r.State, r.Reason, r.DoneTime, r.Counts = state, validText(reason[:min(len(reason), maxReason)]), c.at, counts
		r.Purged, r.Proof = purged, proof
		c.putReplay(r)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return after, j.forgetCursors(ctx, ns, key)
}

// forgetCursors erases where a replay that has ended stood.
func (j *Journal) forgetCursors(ctx context.Context, ns NamespaceKey, key uint64) error {
	for _, p := range j.partitions {
		if err := p.do(ctx, func(c *commit) error {
			c.delete(appendJobKey(nil, p.number, tagCursor, ns, key))
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// StartReplay notes, durably, that a replay runs.
func (j *Journal) StartReplay(ctx context.Context, ns NamespaceKey, key uint64) error {
	leave, err := j.enter()
	if err != nil {
		return err
	}
	defer leave()
	p := j.replayHome(ns)
	return p.do(ctx, func(c *commit) error {
		r, err := p.replay(c.r, ns, key)
		if err != nil || r.State != ReplayPending {
			return err
		}
		r.State = ReplayRunning
		c.putReplay(r)
		return nil
	})
}

// Replays reads the replays of a namespace, oldest first; of all of them with 0.
func (j *Journal) Replays(ns NamespaceKey) ([]*Replay, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	if ns != 0 {
		return j.replayHome(ns).replays(j.db, ns)
	}
	var all []*Replay
	for _, p := range j.partitions {
		some, err := p.replays(j.db, 0)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	slices.SortFunc(all, func(a, b *Replay) int { return cmp.Compare(a.Key, b.Key) })
	return all, nil
}

// Replay reads one replay, with what it has counted so far; ErrNotFound when there is none.
func (j *Journal) Replay(ns NamespaceKey, key uint64) (*Replay, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	r, err := j.replayHome(ns).replay(j.db, ns, key)
	if err != nil || r.State.Ended() {
		return r, err
	}
	until := ^uint64(0)
	if !r.Spec.Until.IsZero() {
		until = seqAt(r.Spec.Until)
	}
	for _, p := range j.partitions {
		at, err := p.cursor(j.db, ns, key)
		if err != nil {
			return nil, err
		}
		r.Counts.add(at.ReplayCounts)
		r.Purged.add(at.purged)
		r.Progress += at.progress(until) / float64(len(j.partitions))
	}
	return r, nil
}

// replayCounts sums up what a replay has counted in the partitions.
func (j *Journal) replayCounts(ns NamespaceKey, key uint64) (sum ReplayCounts, purged PurgeCounts, err error) {
	for _, p := range j.partitions {
		at, err := p.cursor(j.db, ns, key)
		if err != nil {
			return sum, purged, err
		}
		sum.add(at.ReplayCounts)
		purged.add(at.purged)
	}
	return sum, purged, nil
}

// EraseReplays erases replays that have ended before a time, by namespace, and what is left of where those stood that
// have ended.
func (j *Journal) EraseReplays(ctx context.Context, before func(NamespaceKey) time.Time) error {
	leave, err := j.enter()
	if err != nil {
		return err
	}
	defer leave()
	for _, p := range j.partitions {
		known, err := p.replays(j.db, 0)
		if err != nil {
			return err
		}
		for some := range slices.Chunk(slices.DeleteFunc(known, func(r *Replay) bool {
			return !r.State.Ended() || !r.DoneTime.Before(before(r.Namespace))
		}), eraseAtOnce) {
			if err := p.do(ctx, func(c *commit) error {
				for _, r := range some {
					c.delete(appendJobKey(nil, p.number, r.Spec.tag(), r.Namespace, r.Key))
				}
				return nil
			}); err != nil {
				return err
			}
		}
		if err := p.tidyCursors(ctx); err != nil {
			return err
		}
	}
	return nil
}

// tidyCursors erases cursors that a crash has left of replays which have ended.
func (p *partition) tidyCursors(ctx context.Context) error {
	var left []jobKey
	prefix := appendTag(nil, p.number, tagCursor)
	if err := p.j.scan(p.j.db, prefix, prefixEnd(prefix), func(key, _ []byte) error {
		ns, job, ok := splitJob(key)
		if !ok {
			return p.j.corrupt(key, errBadKey)
		}
		r, err := p.j.replayHome(ns).replay(p.j.db, ns, job)
		if errors.Is(err, ErrNotFound) || err == nil && r.State.Ended() {
			left, err = append(left, jobKey{ns, job}), nil
		}
		return err
	}); err != nil || len(left) == 0 {
		return err
	}
	return p.do(ctx, func(c *commit) error {
		for _, l := range left {
			c.delete(appendJobKey(nil, p.number, tagCursor, l.ns, l.job))
		}
		return nil
	})
}

// ReplayOpen is how many deliveries that a replay has made or opened again are open. It is too low until Counted.
func (j *Journal) ReplayOpen(ns NamespaceKey, key uint64) int64 {
	return max(j.counts.ofJob(jobKey{ns, key}), 0)
}

// replays reads those of a namespace that this partition keeps, or of all with 0, oldest first within a namespace.
func (p *partition) replays(r pebble.Reader, ns NamespaceKey) (all []*Replay, err error) {
	for _, tag := range [...]byte{tagJob, tagErasure} {
		prefix := appendTag(nil, p.number, tag)
		if ns != 0 {
			prefix = appendSpace(nil, p.number, tag, ns)
		}
		if err := p.j.scan(r, prefix, prefixEnd(prefix), func(key, value []byte) error {
			job, err := decodeReplay(value, tag == tagErasure)
			if err != nil {
				return p.j.corrupt(key, err)
			}
			space, name, ok := splitJob(key)
			if !ok {
				return p.j.corrupt(key, errBadKey)
			}
			job.Namespace, job.Key = space, name
			all = append(all, job)
			return nil
		}); err != nil {
			return all, err
		}
	}
	slices.SortFunc(all, func(a, b *Replay) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Key, b.Key))
	})
	return all, nil
}

func (p *partition) replay(r pebble.Reader, ns NamespaceKey, key uint64) (job *Replay, err error) {
	for _, tag := range [...]byte{tagJob, tagErasure} { // no two of a namespace have one key
		if found, err := p.j.get(r, appendJobKey(nil, p.number, tag, ns, key), func(value []byte) (err error) {
			job, err = decodeReplay(value, tag == tagErasure)
			return err
		}); err != nil {
			return nil, err
		} else if found {
			break
		}
	}
	if job == nil {
		return nil, ErrNotFound
	}
	job.Namespace, job.Key = ns, key
	if job.State.Ended() {
		job.Progress = 1
	}
	return job, nil
}

// cursor is a c record: where a replay stands in one partition.
type cursor struct {
	// step tells whether another commit has moved it since it was read.
	step uint64
	// high bounds what the replay looks at, so that it never meets what it makes itself.
	high uint64
	// first is the first sequence that it has looked at, seq and sub the last place; none before the first.
	first, seq uint64
	sub        SubscriptionKey
	done       bool
	ReplayCounts
	// purged is what an erasure has purged.
	purged PurgeCounts
	// ahead is set of an erasure where a wrong clock has put sequences into the future.
	ahead aheadOf
}

// aheadOf tells what lay in the future when an erasure began from what has come there since: present was the next sequence,
// heals how often a wrong clock had been noticed.
type aheadOf struct {
	present uint64
	heals   int
}

// before reports whether a sequence below high had been given when the erasure began. Where a clock was wrong more often than
// sequences can tell, all of the future had.
func (at *cursor) before(seq uint64) bool {
	return at.ahead.present == 0 || seq < at.ahead.present || at.ahead.heals > maxHeals || healsOf(seq) < at.ahead.heals
}

// progress is how much of the sequences below a bound the replay has looked at.
func (at *cursor) progress(until uint64) float64 {
	switch high := min(at.high, until); {
	case at.done:
		return 1
	case at.first == 0 || high <= at.first:
		return 0
	default:
		return min(float64(at.seq-at.first)/float64(high-at.first), 1)
	}
}

// begun reports whether the replay has a cursor in this partition.
func (at *cursor) begun() bool { return at.step > 0 }

func (p *partition) cursor(r pebble.Reader, ns NamespaceKey, key uint64) (at cursor, err error) {
	_, err = p.j.get(r, appendJobKey(nil, p.number, tagCursor, ns, key), func(value []byte) (err error) {
		at, err = decodeCursor(value)
		return err
	})
	return at, err
}

func encodeCursor(b []byte, at *cursor) []byte {
	w := newRecord(b)
	w.uint(at.step)
	w.uint(at.high)
	w.uint(at.first)
	w.uint(at.seq)
	w.uint(uint64(at.sub))
	done := byte(0)
	if at.done {
		done = 1
	}
	w.byte(done)
	for _, n := range [...]int64{at.Scanned, at.Created, at.Skipped} {
		w.uint(uint64(max(n, 0)))
	}
	if at.purged != (PurgeCounts{}) || at.ahead.present > 0 {
		at.purged.append(&w)
	}
	if at.ahead.present > 0 {
		w.uint(at.ahead.present)
		w.int(at.ahead.heals)
	}
	return w
}

func decodeCursor(value []byte) (at cursor, err error) {
	d := readRecord(value)
	at.step, at.high, at.first, at.seq = d.uint(), d.uint(), d.uint(), d.uint()
	at.sub, at.done = SubscriptionKey(d.uint()), d.byte() == 1
	at.ReplayCounts = d.counts()
	if d.err == nil && len(d.b) > 0 {
		at.purged = d.purgeCounts()
	}
	if d.err == nil && len(d.b) > 0 {
		at.ahead = aheadOf{d.uint(), d.int()}
	}
	return at, d.err
}

func (d *decoder) counts() ReplayCounts {
	n := func() int64 { return int64(min(d.uint(), math.MaxInt64)) } //nolint:gosec // bounded by the line itself
	return ReplayCounts{n(), n(), n()}
}

const (
	replayMissing = 1 << iota
	replayRetry
)

func encodeReplay(b []byte, r *Replay) []byte {
	w := newRecord(b)
	w.text(r.ID)
	w = append(w, r.ContentHash[:]...)
	w.byte(byte(r.State))
	w.text(r.Reason)
	w.time(r.CreateTime)
	w.time(r.DoneTime)
	for _, n := range [...]int64{r.Counts.Scanned, r.Counts.Created, r.Counts.Skipped} {
		w.uint(uint64(max(n, 0)))
	}
	s := &r.Spec
	w.text(s.Subscription)
	w = append(w, s.UID[:]...)
	w.time(s.Since)
	w.time(s.Until)
	w.text(s.Filter)
	flags := byte(0)
	if s.Missing {
		flags |= replayMissing
	}
	if s.Retry {
		flags |= replayRetry
	}
	w.byte(flags)
	w.uint(math.Float64bits(s.MaxRate))
	if s.Erase {
		w.text(s.Condition)
		r.Purged.append(&w)
		w.time(r.Proof.Time)
		w.uint(uint64(max(r.Proof.Bytes, 0)))
	}
	return w
}

func decodeReplay(value []byte, erase bool) (*Replay, error) {
	d := readRecord(value)
	r := &Replay{ID: d.text()}
	copy(r.ContentHash[:], d.fixed(len(r.ContentHash)))
	r.State, r.Reason, r.CreateTime, r.DoneTime = ReplayState(d.byte()), d.text(), d.time(), d.time()
	r.Counts = d.counts()
	s := &r.Spec
	s.Subscription = d.text()
	copy(s.UID[:], d.fixed(len(s.UID)))
	s.Since, s.Until, s.Filter = d.time(), d.time(), d.text()
	flags := d.byte()
	s.Missing, s.Retry = flags&replayMissing != 0, flags&replayRetry != 0
	s.MaxRate = math.Float64frombits(d.uint())
	if s.Erase = erase; erase {
		s.Condition, r.Purged = d.text(), d.purgeCounts()
		r.Proof = Proof{Time: d.time(), Bytes: int64(min(d.uint(), math.MaxInt64))} //nolint:gosec // bounded by the line itself
	}
	return r, d.err
}
