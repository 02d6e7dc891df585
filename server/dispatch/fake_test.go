package dispatch_test

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// record is a delivery on the fake's disk. It is open until its state is final.
type record struct {
	lane     delivery.LaneKey
	id       delivery.ID
	row      delivery.Row
	event    *delivery.Event
	state    delivery.State
	reason   string
	attempts []delivery.Attempt
	max      int
	expire   time.Time
	corrupt  bool
	// order is its ordering key. waits: another one has the turn; blocks: it has failed and keeps it; returned: a caller
	// has brought it back, out of its turn perhaps.
	order                   delivery.OrderKey
	suspicion               int
	parted                  uint8
	waits, blocks, returned bool
}

// memoryJournal keeps the journal's contract in memory: commits of a partition are visible to reads at once, and told to
// the follower later, in their order. Settles are gathered for a while. It fails the test when a delivery is settled
// twice, when a settle that need not look does not find its row, and when an event is released too often.
type memoryJournal struct {
	t *testing.T

	mu         sync.Mutex
	follower   follower
	partitions map[uint16]*partition
	records    map[delivery.ID]*record
	lanes      map[laneID][]*record // open ones, and some that have ended
	counter    uint64
	held       map[*delivery.Event]int
	heldBytes  int64
	mostBytes  int64
	failing    map[delivery.LaneKey]time.Time
	broken     error // of edits and reads
	reads      int
	readJobs   int
	turns      map[laneOrder]*record // who has the turn of an ordering key
	life       int                   // rises when it is closed: what an older life has begun is lost

	// attributes are those of events that are added.
	attributes map[string]string
	// eventType is that of the events that are published.
	eventType string

	settleEvery time.Duration
	// late, if set, has effects wait for up to that long, and refuses a settling commit now and then.
	late time.Duration
	rnd  *rand.Rand
}

type follower interface {
	delivery.Follower
}

type laneID struct {
	lane      delivery.LaneKey
	partition uint16
}

type laneOrder struct {
	lane delivery.LaneKey
	key  delivery.OrderKey
}

type partition struct {
	commit   delivery.Commit
	lastEdit delivery.Commit
	settles  []settle
	effects  []func()
	telling  sync.Mutex // held while effects are told, in order
}

type settle struct {
	job     *delivery.Job
	step    delivery.Step
	attempt *delivery.Attempt
	done    delivery.Settled
}

func newJournal(t *testing.T) *memoryJournal {
	return &memoryJournal{
		t: t, partitions: make(map[uint16]*partition), records: make(map[delivery.ID]*record),
		lanes: make(map[laneID][]*record), held: make(map[*delivery.Event]int),
		turns:   make(map[laneOrder]*record),
		failing: make(map[delivery.LaneKey]time.Time), settleEvery: 10 * time.Millisecond,
	}
}

func (f *memoryJournal) Now() time.Time { return time.Now() }

// close ends a life: orderly, what was settled is written; otherwise it is lost. Nothing is told any more.
func (f *memoryJournal) close(orderly bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.life++
	f.follower = nil
	clear(f.held)
	f.heldBytes = 0
	for number, p := range f.partitions {
		if orderly {
			f.settleNow(number, p)
		}
		p.settles, p.effects = nil, nil
	}
}

func (f *memoryJournal) partition(number uint16) *partition {
	p := f.partitions[number]
	if p == nil {
		p = &partition{}
		f.partitions[number] = p
	}
	return p
}

// tell tells a partition's effects. f.mu is not held.
func (f *memoryJournal) tell(number uint16) {
	f.mu.Lock()
	p, life := f.partition(number), f.life
	var wait time.Duration
	if f.late > 0 {
		wait = time.Duration(f.rnd.Int64N(int64(f.late)))
	}
	f.mu.Unlock()
	time.Sleep(wait)
	p.telling.Lock()
	defer p.telling.Unlock()
	for {
		f.mu.Lock()
		if f.life != life || len(p.effects) == 0 {
			f.mu.Unlock()
			return
		}
		effect := p.effects[0]
		p.effects = p.effects[1:]
		f.mu.Unlock()
		effect()
	}
}

// effect queues a call of the follower. f.mu is held.
func (f *memoryJournal) effect(p *partition, call func(follower)) {
	if to := f.follower; to != nil {
		p.effects = append(p.effects, func() { call(to) })
	}
}

// add stores an event with a delivery for each subscription, tells of it and returns their ids.
func (f *memoryJournal) add(number uint16, size int, deliver time.Time, subs ...*subscription.Subscription) []delivery.ID {
	return f.addKeyed(number, size, deliver, 0, subs...)
}

// addKeyed does that for an event with an ordering key.
func (f *memoryJournal) addKeyed(number uint16, size int, deliver time.Time, key delivery.OrderKey, subs ...*subscription.Subscription) []delivery.ID {
	f.mu.Lock()
	f.counter++
	now := time.Now()
	seq := uint64(now.UnixMilli())<<16 | f.counter&0xffff
	p := f.partition(number)
	p.commit++
	c := p.commit
	event := &delivery.Event{
		Namespace: laneOf(subs[0]).Namespace, ID: fmt.Sprint(f.counter), Partition: number, Seq: seq,
		AcceptTime: now, DeliverTime: deliver, Payload: make([]byte, size), UID: fmt.Sprint("uid", f.counter),
		Attributes: f.attributes, Type: f.eventType,
	}
	var jobs []delivery.Job
	var ids []delivery.ID
	for _, s := range subs {
		r := &record{
			lane: laneOf(s), event: event, state: delivery.Pending, max: cmp.Or(s.MaxAttempts, 5),
			id:     delivery.ID{Seq: seq, Partition: number, Subscription: laneOf(s).Subscription},
			row:    delivery.Row{Seq: seq, Epoch: 1},
			expire: now.Add(cmp.Or(s.MaxAge, time.Hour)),
		}
		if s.Ordered {
			r.order = key
		}
		if f.takeTurn(r); r.waits {
			f.records[r.id] = r
			k := laneID{r.lane, number}
			f.lanes[k] = append(f.lanes[k], r)
			ids = append(ids, r.id)
			continue
		}
		if !deliver.IsZero() {
			r.row.Kind, r.row.Due = delivery.Timer, delivery.InstantOf(deliver)
			r.expire = deliver.Add(cmp.Or(s.MaxAge, time.Hour))
			row := r.row
			f.effect(p, func(to follower) { to.Timed(c, r.lane, number, row) })
		} else {
			jobs = append(jobs, f.job(r, c))
		}
		f.records[r.id] = r
		k := laneID{r.lane, number}
		f.lanes[k] = append(f.lanes[k], r)
		ids = append(ids, r.id)
	}
	if len(jobs) > 0 {
		f.effect(p, func(to follower) {
			f.Hold(event)
			to.Offer(c, jobs)
			f.Release(event)
		})
	}
	f.mu.Unlock()
	f.tell(number)
	return ids
}

// takeTurn gives a delivery the turn of its ordering key, or has it wait.
func (f *memoryJournal) takeTurn(r *record) {
	at := laneOrder{r.lane, r.order}
	switch has := f.turns[at]; {
	case r.order == 0:
	case has == nil || has == r:
		f.turns[at] = r
	default:
		r.waits = true
	}
}

// passOn gives the turn of a delivery that has ended to the next.
func (f *memoryJournal) passOn(p *partition, c delivery.Commit, r *record) {
	at := laneOrder{r.lane, r.order}
	if r.order == 0 || f.turns[at] != r {
		return
	}
	delete(f.turns, at)
	r.blocks = false
	var next *record
	for _, w := range f.lanes[laneID{r.lane, r.id.Partition}] {
		if w.order == r.order && w.waits && !w.state.Final() && (next == nil || w.id.Seq < next.id.Seq) {
			next = w
		}
	}
	if next == nil {
		return
	}
	f.turns[at], next.waits = next, false
	next.expire = laterOf(next.expire, time.Now().Add(time.Hour))
	if next.returned {
		f.replace(p, c, next, time.Now())
		return
	}
	row := next.row
	f.effect(p, func(to follower) { to.Timed(c, next.lane, next.id.Partition, row) })
}

func (f *memoryJournal) Unblock(ctx context.Context, lane delivery.LaneKey, while func() bool) (int, error) {
	f.mu.Lock()
	n := 0
	var numbers []uint16
	for at, r := range f.turns {
		if at.lane == lane && r.blocks && (while == nil || while()) {
			p := f.partition(r.id.Partition)
			p.commit++
			f.passOn(p, p.commit, r)
			numbers = append(numbers, r.id.Partition)
			n++
		}
	}
	f.mu.Unlock()
	for _, number := range numbers {
		f.tell(number)
	}
	return n, ctx.Err()
}

func (f *memoryJournal) BlockedLanes() (lanes []delivery.LaneKey, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for at, r := range f.turns {
		if r.blocks && !slices.Contains(lanes, at.lane) {
			lanes = append(lanes, at.lane)
		}
	}
	return lanes, nil
}

func (f *memoryJournal) job(r *record, asOf delivery.Commit) delivery.Job {
	return delivery.Job{
		ID: r.id, Event: r.event, Kind: r.row.Kind, Epoch: r.row.Epoch, Due: r.row.Due, AsOf: asOf,
		Attempts: len(r.attempts), MaxAttempts: r.max, Expire: r.expire, Order: r.order,
		Parted: r.parted, Suspicion: r.suspicion,
	}
}

func (f *memoryJournal) Hold(e *delivery.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hold(e)
}

func (f *memoryJournal) hold(e *delivery.Event) {
	if f.held[e]++; f.held[e] == 1 {
		f.heldBytes += eventSize(e)
		f.mostBytes = max(f.mostBytes, f.heldBytes)
	}
}

func eventSize(e *delivery.Event) int64 { return 400 + int64(len(e.Payload)) }

func (f *memoryJournal) Release(e *delivery.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.follower == nil {
		return
	}
	f.held[e]--
	switch n := f.held[e]; {
	case n == 0:
		delete(f.held, e)
		f.heldBytes -= eventSize(e)
	case n < 0:
		f.t.Errorf("event %v released too often", e.ID)
	}
}

func (f *memoryJournal) EventBytes() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.heldBytes
}

func (f *memoryJournal) Lanes() iter.Seq2[delivery.LaneState, error] {
	f.mu.Lock()
	var states []delivery.LaneState
	for k, records := range f.lanes {
		s := delivery.LaneState{Lane: k.lane, Partition: k.partition}
		for _, r := range records {
			switch {
			case r.state.Final() || r.waits:
			case r.row.Kind == delivery.FIFO:
				s.FIFO = delivery.Least(s.FIFO, r.row.Pos())
			default:
				s.Timer = delivery.Least(s.Timer, r.row.Pos())
			}
		}
		if s.FIFO.Some || s.Timer.Some {
			states = append(states, s)
		}
	}
	f.mu.Unlock()
	return func(yield func(delivery.LaneState, error) bool) {
		for _, s := range states {
			if !yield(s, nil) {
				return
			}
		}
	}
}

func (f *memoryJournal) LanesOf(number uint16) iter.Seq2[delivery.LaneState, error] {
	return func(yield func(delivery.LaneState, error) bool) {
		for s, err := range f.Lanes() {
			if s.Partition == number && !yield(s, err) {
				return
			}
		}
	}
}

func (f *memoryJournal) Read(lane delivery.LaneKey, number uint16, kind delivery.Kind, from delivery.Pos, until delivery.Instant, limit, maxBytes int) (delivery.Read, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads++
	if f.broken != nil {
		return delivery.Read{}, f.broken
	}
	k := laneID{lane, number}
	f.lanes[k] = slices.DeleteFunc(f.lanes[k], func(r *record) bool { return r.state.Final() })
	var rows []*record
	for _, r := range f.lanes[k] {
		if r.row.Kind == kind && !r.waits && !r.row.Pos().Before(from) {
			rows = append(rows, r)
		}
	}
	slices.SortFunc(rows, func(a, b *record) int {
		return cmp.Or(cmp.Compare(a.row.Due, b.row.Due), cmp.Compare(a.row.Seq, b.row.Seq))
	})
	read := delivery.Read{UpTo: f.partition(number).commit}
	for _, r := range rows {
		if len(read.Jobs) == limit || maxBytes <= 0 && len(read.Jobs) > 0 || kind == delivery.Timer && r.row.Due > until {
			read.Next = r.row.Pos()
			break
		}
		if r.corrupt {
			read.Aside = append(read.Aside, fmt.Errorf("row %+v is broken", r.row))
			continue
		}
		if f.held[r.event] == 0 {
			maxBytes -= len(r.event.Payload)
		}
		f.hold(r.event)
		read.Jobs = append(read.Jobs, f.job(r, read.UpTo))
	}
	f.readJobs += len(read.Jobs)
	return read, nil
}

func (f *memoryJournal) Settle(j *delivery.Job, s delivery.Step, a *delivery.Attempt, done delivery.Settled) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.follower == nil {
		f.t.Errorf("delivery %v settled after the journal was closed", j.ID)
		return
	}
	number := j.ID.Partition
	p := f.partition(number)
	p.settles = append(p.settles, settle{j, s, a, done})
	if len(p.settles) == 1 {
		f.settleLater(number)
	}
}

func (f *memoryJournal) settleLater(number uint16) {
	life := f.life
	time.AfterFunc(f.settleEvery, func() {
		f.mu.Lock()
		if f.life != life {
			f.mu.Unlock()
			return
		}
		if f.late > 0 && f.rnd.IntN(5) == 0 { // refused: they are queued again
			f.settleLater(number)
			f.mu.Unlock()
			return
		}
		f.settleNow(number, f.partition(number))
		f.mu.Unlock()
		f.tell(number)
	})
}

func (f *memoryJournal) settleNow(number uint16, p *partition) {
	if len(p.settles) == 0 {
		return
	}
	p.commit++
	c := p.commit
	for _, s := range p.settles {
		f.settle(p, c, s)
	}
	p.settles = nil
}

func (f *memoryJournal) settle(p *partition, c delivery.Commit, s settle) {
	j := s.job
	r := f.records[j.ID]
	same := !r.state.Final() && !r.waits && r.row.Epoch == j.Epoch
	if !same && j.AsOf >= p.lastEdit {
		f.t.Errorf("delivery %v of epoch %d settled as %d, but it is %d of epoch %d", j.ID, j.Epoch, s.step.State, r.state, r.row.Epoch)
	}
	if s.attempt != nil {
		if same && s.attempt.Number != len(r.attempts)+1 {
			f.t.Errorf("delivery %v: attempt number %d after %d attempts", j.ID, s.attempt.Number, len(r.attempts))
		}
		r.attempts = append(r.attempts, *s.attempt)
	}
	f.effect(p, func(follower) { s.done.Settled(c) })
	if !same && (r.state.Final() || s.step.State != delivery.Succeeded) {
		return
	}
	if !same && !r.waits { // a success ends what is open, which the follower is told of as of an edit
		row := r.row
		p.lastEdit = c
		f.effect(p, func(to follower) { to.Edited(c, r.lane, j.ID.Partition, row.Seq, row.Epoch) })
	}
	r.state, r.reason = s.step.State, s.step.Reason
	r.parted, r.suspicion = j.Parted, j.Suspicion
	switch {
	case s.step.State == delivery.Scheduled:
		f.replace(p, c, r, s.step.Due)
	case s.step.Block && s.step.State != delivery.Succeeded && r.order != 0 && !r.waits:
		r.blocks = true
	case r.waits:
		r.waits = false
	default:
		f.passOn(p, c, r)
	}
}

// replace gives an open delivery its next row, and tells of it.
func (f *memoryJournal) replace(p *partition, c delivery.Commit, r *record, due time.Time) {
	r.row = delivery.Row{Kind: delivery.Timer, Due: delivery.InstantOf(due), Seq: r.row.Seq, Epoch: r.row.Epoch + 1}
	row := r.row
	f.effect(p, func(to follower) { to.Timed(c, r.lane, r.id.Partition, row) })
}

func (f *memoryJournal) SetFailing(lane delivery.LaneKey, since time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if since.IsZero() {
		delete(f.failing, lane)
	} else {
		f.failing[lane] = since
	}
}

func (f *memoryJournal) Failing() (map[delivery.LaneKey]time.Time, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	notes := make(map[delivery.LaneKey]time.Time)
	for k, v := range f.failing {
		notes[k] = v
	}
	return notes, nil
}

// edit makes a change, whether the caller is still there or not.
func (f *memoryJournal) edit(ctx context.Context, id delivery.ID, change func(p *partition, r *record) error) (*delivery.Delivery, error) {
	f.mu.Lock()
	r, broken := f.records[id], f.broken
	switch {
	case broken != nil:
		f.mu.Unlock()
		return nil, broken
	case r == nil:
		f.mu.Unlock()
		return nil, delivery.ErrNotFound
	}
	err := change(f.partition(id.Partition), r)
	d := &delivery.Delivery{ID: id, State: r.state, NextAttempt: r.row.Due.Time()}
	f.mu.Unlock()
	f.tell(id.Partition)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

func (f *memoryJournal) Cancel(ctx context.Context, _ delivery.LaneKey, id delivery.ID, reason string) (*delivery.Delivery, error) {
	return f.edit(ctx, id, func(p *partition, r *record) error {
		switch {
		case r.state == delivery.Cancelled:
		case r.state.Final() && !r.blocks:
			return delivery.ErrFinal
		default:
			p.commit++
			f.cancel(p, r, reason)
		}
		return nil
	})
}

func (f *memoryJournal) cancel(p *partition, r *record, reason string) {
	c, row := p.commit, r.row
	p.lastEdit = c
	was := r.state
	r.state, r.reason = delivery.Cancelled, reason
	if r.waits {
		r.waits = false
		return
	}
	if !was.Final() {
		f.effect(p, func(to follower) { to.Edited(c, r.lane, r.id.Partition, row.Seq, row.Epoch) })
	}
	f.passOn(p, c, r)
}

func (f *memoryJournal) Retry(ctx context.Context, _ delivery.LaneKey, id delivery.ID, ifAttempts int) (*delivery.Delivery, error) {
	return f.edit(ctx, id, func(p *partition, r *record) error {
		switch {
		case r.state == delivery.Succeeded || ifAttempts >= 0 && ifAttempts != len(r.attempts):
			return delivery.ErrInvalidState
		case !r.state.Final() && (r.waits || r.row.Kind == delivery.FIFO):
			return nil
		}
		p.commit++
		c, row := p.commit, r.row
		p.lastEdit = c
		if !r.state.Final() {
			f.effect(p, func(to follower) { to.Edited(c, r.lane, id.Partition, row.Seq, row.Epoch) })
		} else {
			k := laneID{r.lane, id.Partition}
			if !slices.Contains(f.lanes[k], r) {
				f.lanes[k] = append(f.lanes[k], r)
			}
			r.returned, r.blocks = true, false
			f.takeTurn(r)
		}
		r.state, r.reason = delivery.Scheduled, ""
		r.max, r.expire = max(r.max, len(r.attempts)+1), laterOf(r.expire, time.Now().Add(time.Minute))
		if r.waits {
			r.row.Epoch++
			return nil
		}
		f.replace(p, c, r, time.Now())
		return nil
	})
}

func laterOf(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func (f *memoryJournal) CancelLane(ctx context.Context, lane delivery.LaneKey, reason string, while func() bool) (int, error) {
	f.mu.Lock()
	if err := f.broken; err != nil {
		f.mu.Unlock()
		return 0, err
	}
	n := 0
	var numbers []uint16
	for k, records := range f.lanes {
		if k.lane != lane || while != nil && !while() {
			continue
		}
		p := f.partition(k.partition)
		numbers = append(numbers, k.partition)
		for _, waits := range []bool{true, false} {
			for _, r := range records {
				if !r.state.Final() && r.waits == waits {
					p.commit++
					f.cancel(p, r, reason)
					n++
				}
			}
		}
		for at, r := range f.turns {
			if at.lane == lane && r.blocks && r.id.Partition == k.partition {
				r.blocks = false
				delete(f.turns, at)
			}
		}
	}
	f.mu.Unlock()
	for _, number := range numbers {
		f.tell(number)
	}
	return n, ctx.Err()
}

func (f *memoryJournal) OpenOf(lane delivery.LaneKey) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := int64(0)
	for k, records := range f.lanes {
		if k.lane != lane {
			continue
		}
		for _, r := range records {
			if !r.state.Final() {
				n++
			}
		}
	}
	return n
}

func (f *memoryJournal) count(want func(*record) bool) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, r := range f.records {
		if want(r) {
			n++
		}
	}
	return n
}

func (f *memoryJournal) states() map[delivery.State]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := make(map[delivery.State]int)
	for _, r := range f.records {
		m[r.state]++
	}
	return m
}

func (f *memoryJournal) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = err
}

func (f *memoryJournal) corrupt(id delivery.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.records[id].corrupt = true
}

// readCount is how many reads there were, and how many jobs they returned.
func (f *memoryJournal) readCount() (reads, jobs int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reads, f.readJobs
}

func (f *memoryJournal) get(id delivery.ID) record {
	f.mu.Lock()
	defer f.mu.Unlock()
	return *f.records[id]
}
