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

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
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

// registry is the snapshot.
type registry struct {
	mu   sync.Mutex
	subs map[delivery.LaneKey]*subscription.Subscription
}

func (r *registry) Subscription(ns, id string) *subscription.Subscription {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.subs[delivery.LaneKey{Namespace: ns, Subscription: id}]
}

// receiver is the Attempter. answer decides when each attempt ends, and how; nil leaves it open for end.
type receiver struct {
	t      *testing.T
	answer func(sub *subscription.Subscription, job *delivery.Job) (time.Duration, *delivery.Result)

	mu      sync.Mutex
	started []start
	flying  map[delivery.ID]flight
	most    map[string]int
	now     map[string]int
}

type flight struct {
	job  *delivery.Job
	sink delivery.Sink
}

// forget drops what an engine that was killed had in flight.
func (r *receiver) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.flying)
	clear(r.now)
}

type start struct {
	id  delivery.ID
	sub string
	uri string
	job *delivery.Job
	at  time.Time
}

func (r *receiver) Attempt(sub *subscription.Subscription, job *delivery.Job, sink delivery.Sink) {
	r.mu.Lock()
	if r.flying[job.ID].job != nil {
		r.t.Errorf("two attempts of %v at once", job.ID)
	}
	r.flying[job.ID] = flight{job, sink}
	r.started = append(r.started, start{job.ID, sub.ID, sub.Proto.GetUri(), job, time.Now()})
	r.now[sub.ID]++
	r.most[sub.ID] = max(r.most[sub.ID], r.now[sub.ID])
	answer := r.answer
	r.mu.Unlock()
	if answer == nil {
		return
	}
	delay, result := answer(sub, job)
	switch {
	case result == nil:
	case delay == 0:
		r.end(job, *result)
	default:
		time.AfterFunc(delay, func() { r.end(job, *result) })
	}
}

func (r *receiver) end(job *delivery.Job, result delivery.Result) {
	r.mu.Lock()
	f := r.flying[job.ID]
	if f.job == job {
		delete(r.flying, job.ID)
		r.now[job.Subscription]--
	}
	r.mu.Unlock()
	if f.job == job {
		f.sink.Complete(job, result)
	}
}

func (r *receiver) starts() []start {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.started)
}

// atOnce is the highest number of attempts in flight for a subscription.
func (r *receiver) atOnce(sub string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.most[sub]
}

func (r *receiver) set(answer func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = answer
}

func ok() *delivery.Result {
	return &delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeSucceeded, ResponseCode: 200}}
}

func refused(code int) *delivery.Result {
	return &delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable, ResponseCode: code}}
}

func unspent() *delivery.Result { return &delivery.Result{Cause: delivery.CauseUnspent} }

func always(delay time.Duration, result func() *delivery.Result) func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
	return func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
		return delay, result()
	}
}

// world is an engine with everything around it.
type world struct {
	t        *testing.T
	journal  *memoryJournal
	registry *registry
	receiver *receiver
	engine   *dispatch.Engine
	options  dispatch.Options
	ran      chan error

	mu       sync.Mutex
	disabled []string
}

func newWorld(t *testing.T, change ...func(*dispatch.Options)) *world {
	w := &world{
		t: t, journal: newJournal(t),
		registry: &registry{subs: make(map[delivery.LaneKey]*subscription.Subscription)},
		receiver: &receiver{
			t: t, flying: make(map[delivery.ID]flight), most: make(map[string]int), now: make(map[string]int),
			answer: always(10*time.Millisecond, ok),
		},
	}
	w.options = dispatch.Options{Journal: w.journal, Subscriptions: w.registry, Attempter: w.receiver, Disable: w.disable}
	for _, c := range change {
		c(&w.options)
	}
	w.start()
	return w
}

func (w *world) start() {
	w.engine = dispatch.New(w.options)
	w.ran = make(chan error, 1)
	engine, ran := w.engine, w.ran
	go func() { ran <- engine.Run(context.Background()) }()
}

// stop drains the engine.
func (w *world) stop() {
	w.t.Helper()
	if err := w.engine.Stop(w.t.Context()); err != nil {
		w.t.Errorf("stop: %v", err)
	}
	if err := <-w.ran; err != nil {
		w.t.Errorf("run: %v", err)
	}
}

// kill abandons everything.
func (w *world) kill() error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := w.engine.Stop(ctx)
	<-w.ran
	w.receiver.forget()
	return err
}

// sub makes an active subscription, or changes it.
func (w *world) sub(id string, change ...func(*subscription.Subscription)) *subscription.Subscription {
	s := &subscription.Subscription{
		Proto:     &grapnelv1.Subscription{State: grapnelv1.Subscription_STATE_ACTIVE, Uri: "https://one.example"},
		Namespace: "acme", ID: id, UID: [16]byte{1}, MaxInFlight: 4, MaxAttempts: 4, MaxAge: time.Hour,
		Schedule: []time.Duration{5 * time.Second, 5 * time.Minute}, DisableAfter: 30 * time.Minute,
	}
	for _, c := range change {
		c(s)
	}
	w.put(s)
	return s
}

// put replaces a subscription and tells the engine; nil Proto deletes it.
func (w *world) put(s *subscription.Subscription) {
	key := delivery.LaneKey{Namespace: s.Namespace, Subscription: s.ID}
	w.registry.mu.Lock()
	old := w.registry.subs[key]
	w.registry.subs[key] = s
	w.registry.mu.Unlock()
	w.engine.Changed([]subscription.Change{{Old: old, New: s}})
}

func (w *world) remove(id string) {
	key := delivery.LaneKey{Namespace: "acme", Subscription: id}
	w.registry.mu.Lock()
	old := w.registry.subs[key]
	delete(w.registry.subs, key)
	w.registry.mu.Unlock()
	w.engine.Changed([]subscription.Change{{Old: old}})
}

func inState(state grapnelv1.Subscription_State) func(*subscription.Subscription) {
	return func(s *subscription.Subscription) { s.Proto.State = state }
}

func (w *world) disable(_ context.Context, sub *subscription.Subscription, reason string) error {
	w.mu.Lock()
	w.disabled = append(w.disabled, sub.ID+": "+reason)
	w.mu.Unlock()
	w.sub(sub.ID, inState(grapnelv1.Subscription_STATE_DISABLED))
	return nil
}

// wasDisabled lists what was disabled, and why.
func (w *world) wasDisabled() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.disabled)
}

// publish stores one delivery per subscription and offers it.
func (w *world) publish(sub *subscription.Subscription, partition uint16) delivery.ID {
	j := w.journal.add(sub, partition, 1024)
	id := j.ID
	w.engine.Offer([]*delivery.Job{j})
	w.journal.nowHanded(partition, id.Seq)
	return id
}

func (w *world) publishN(sub *subscription.Subscription, partition uint16, n int) []delivery.ID {
	var ids []delivery.ID
	for range n {
		ids = append(ids, w.publish(sub, partition))
	}
	return ids
}
