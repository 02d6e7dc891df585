package dispatch_test

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// record is a delivery on the fake's disk.
type record struct {
	job      delivery.Job
	state    delivery.State
	reason   string
	due      time.Time
	attempts []delivery.Attempt
	edited   bool
}

// memoryJournal keeps the journal's promises in memory: reads show what was settled before, and only what
// onCommit has returned from. It fails the test when a delivery is settled twice.
type memoryJournal struct {
	t *testing.T

	mu       sync.Mutex
	records  map[delivery.ID]*record
	lanes    map[laneID][]*record // in the order of their sequences
	counter  uint64
	handed   map[uint16]uint64
	lowWater map[delivery.LaneKey]map[uint16]uint64
	failing  error // of edits
	reads    int
}

type laneID struct {
	lane      delivery.LaneKey
	partition uint16
}

func newJournal(t *testing.T) *memoryJournal {
	return &memoryJournal{
		t: t, records: make(map[delivery.ID]*record), lanes: make(map[laneID][]*record), handed: make(map[uint16]uint64),
		lowWater: make(map[delivery.LaneKey]map[uint16]uint64),
	}
}

// add stores a delivery of a new event and returns its job.
func (f *memoryJournal) add(sub *subscription.Subscription, partition uint16, size int) *delivery.Job {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counter++
	now := time.Now()
	seq := uint64(now.UnixMilli())<<16 | f.counter
	maxAge := cmp.Or(sub.MaxAge, time.Hour)
	job := delivery.Job{
		ID: delivery.ID{Seq: seq, Partition: partition},
		Event: &delivery.Event{
			Namespace: sub.Namespace, ID: fmt.Sprint(f.counter), Partition: partition, Seq: seq,
			AcceptTime: now, Payload: make([]byte, size), UID: fmt.Sprint("uid", f.counter),
		},
		Subscription: sub.ID, SubscriptionUID: sub.UID, MaxAttempts: cmp.Or(sub.MaxAttempts, 5), Expire: now.Add(maxAge),
	}
	r := &record{job: job, state: delivery.Pending}
	f.records[job.ID] = r
	k := laneID{job.Lane(), partition}
	f.lanes[k] = append(f.lanes[k], r)
	return &job
}

func (f *memoryJournal) nowHanded(partition uint16, seq uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.handed[partition] = max(f.handed[partition], seq)
}

// selectJobs returns at most limit jobs.
func (f *memoryJournal) selectJobs(lane delivery.LaneKey, partition uint16, from uint64, limit int, want func(*record) bool) []*delivery.Job {
	var jobs []*delivery.Job
	all := f.lanes[laneID{lane, partition}]
	first, _ := slices.BinarySearchFunc(all, from, func(r *record, seq uint64) int { return cmp.Compare(r.job.ID.Seq, seq) })
	for _, r := range all[first:] {
		if r.job.ID.Seq > f.handed[partition] || len(jobs) == limit {
			break
		}
		if want(r) {
			j := r.job
			j.Due, j.Attempts = r.due, len(r.attempts)
			jobs = append(jobs, &j)
		}
	}
	return jobs
}

func (f *memoryJournal) Lanes() iter.Seq2[delivery.LaneState, error] {
	f.mu.Lock()
	states := make(map[laneID]delivery.LaneState)
	for id, r := range f.records {
		if r.state.Final() {
			continue
		}
		k := laneID{r.job.Lane(), id.Partition}
		s := states[k]
		s.Lane, s.Partition = k.lane, k.partition
		if r.due.IsZero() {
			if s.From == 0 || id.Seq < s.From {
				s.From = id.Seq
			}
		} else if s.NextDue.IsZero() || r.due.Before(s.NextDue) {
			s.NextDue = r.due
		}
		states[k] = s
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

func (f *memoryJournal) cut(jobs []*delivery.Job, limit, maxBytes int) (got, rest []*delivery.Job) {
	for i, j := range jobs {
		if i >= limit || maxBytes <= 0 && i > 0 {
			return jobs[:i], jobs[i:]
		}
		maxBytes -= len(j.Event.Payload)
	}
	return jobs, nil
}

func (f *memoryJournal) Backlog(lane delivery.LaneKey, partition uint16, from uint64, limit, maxBytes int) ([]*delivery.Job, uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads++
	jobs := f.selectJobs(lane, partition, from, limit+1, func(r *record) bool {
		return r.state == delivery.Pending && r.due.IsZero()
	})
	got, rest := f.cut(jobs, limit, maxBytes)
	if len(rest) > 0 {
		return got, rest[0].ID.Seq, nil
	}
	return got, 0, nil
}

func (f *memoryJournal) Timers(lane delivery.LaneKey, partition uint16, until time.Time, limit, maxBytes int) ([]*delivery.Job, time.Time, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads++
	jobs := f.selectJobs(lane, partition, 0, -1, func(r *record) bool { return !r.state.Final() && !r.due.IsZero() })
	slices.SortFunc(jobs, func(a, b *delivery.Job) int {
		return cmp.Or(a.Due.Compare(b.Due), cmp.Compare(a.ID.Seq, b.ID.Seq))
	})
	due := len(jobs)
	for i, j := range jobs {
		if j.Due.After(until) {
			due = i
			break
		}
	}
	got, _ := f.cut(jobs[:due], limit, maxBytes)
	if len(got) < len(jobs) {
		return got, jobs[len(got)].Due, nil
	}
	return got, time.Time{}, nil
}

func (f *memoryJournal) Settle(j *delivery.Job, s delivery.Step, a *delivery.Attempt) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.records[j.ID]
	if r.edited {
		if a != nil {
			r.attempts = append(r.attempts, *a)
		}
		return
	}
	if r.state.Final() || !r.due.Equal(j.Due) {
		f.t.Errorf("delivery %v settled as %d from due %v, but it is %d due %v", j.ID, s.State, j.Due, r.state, r.due)
	}
	if a != nil {
		if a.Number != len(r.attempts)+1 {
			f.t.Errorf("delivery %v: attempt number %d after %d attempts", j.ID, a.Number, len(r.attempts))
		}
		r.attempts = append(r.attempts, *a)
	}
	r.state, r.due, r.reason = s.State, s.Due, s.Reason
}

func (f *memoryJournal) SetLowWater(lane delivery.LaneKey, partition uint16, seq uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.lowWater[lane] == nil {
		f.lowWater[lane] = make(map[uint16]uint64)
	}
	f.lowWater[lane][partition] = seq
	for _, r := range f.lanes[laneID{lane, partition}] {
		if r.job.ID.Seq < seq && r.state == delivery.Pending && r.due.IsZero() {
			f.t.Errorf("low water %d passes pending delivery %v", seq, r.job.ID)
		}
	}
}

func (f *memoryJournal) Cancel(_ context.Context, id delivery.ID, reason string) (*delivery.Delivery, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing != nil {
		return nil, f.failing
	}
	r := f.records[id]
	switch {
	case r == nil:
		return nil, delivery.ErrNotFound
	case r.state == delivery.Cancelled:
	case r.state.Final():
		return nil, delivery.ErrFinal
	default:
		r.state, r.due, r.reason, r.edited = delivery.Cancelled, time.Time{}, reason, true
	}
	return &delivery.Delivery{ID: id, State: r.state}, nil
}

func (f *memoryJournal) Retry(_ context.Context, id delivery.ID, ifAttempts int) (*delivery.Delivery, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing != nil {
		return nil, f.failing
	}
	r := f.records[id]
	switch {
	case r == nil:
		return nil, delivery.ErrNotFound
	case r.state == delivery.Succeeded || ifAttempts >= 0 && ifAttempts != len(r.attempts):
		return nil, delivery.ErrInvalidState
	case r.state == delivery.Pending && r.due.IsZero():
		return &delivery.Delivery{ID: id, State: r.state}, nil
	}
	r.state, r.due, r.reason, r.edited = delivery.Scheduled, time.Now(), "", false
	r.job.MaxAttempts = max(r.job.MaxAttempts, len(r.attempts)+1)
	return &delivery.Delivery{ID: id, State: r.state, NextAttempt: r.due}, nil
}

func (f *memoryJournal) CancelLane(_ context.Context, lane delivery.LaneKey, uid delivery.UID, reason string) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, r := range f.records {
		if r.job.Lane() == lane && r.job.SubscriptionUID == uid {
			if !r.state.Final() {
				n++
				r.state, r.due, r.reason = delivery.Cancelled, time.Time{}, reason
			}
			r.edited = true
		}
	}
	return n, nil
}

func (f *memoryJournal) OpenOf(lane delivery.LaneKey) int64 {
	return int64(f.count(func(r *record) bool { return r.job.Lane() == lane && !r.state.Final() }))
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

func (f *memoryJournal) low(lane delivery.LaneKey, partition uint16) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lowWater[lane][partition]
}

// postpone makes a stored delivery due later.
func (f *memoryJournal) postpone(id delivery.ID, due time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.records[id].due, f.records[id].job.Expire = due, due.Add(time.Hour)
}

func (f *memoryJournal) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failing = err
}

func (f *memoryJournal) readCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reads
}

func (f *memoryJournal) get(id delivery.ID) record {
	f.mu.Lock()
	defer f.mu.Unlock()
	return *f.records[id]
}
