package dispatch_test

import (
	"context"
	"crypto/sha256"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// registry is the snapshot.
type registry struct {
	mu      sync.Mutex
	subs    map[delivery.LaneKey]*subscription.Subscription
	deleted map[delivery.LaneKey]bool
	closed  string // for all
	weights map[delivery.NamespaceKey]int
}

func newRegistry() *registry {
	return &registry{
		subs:    make(map[delivery.LaneKey]*subscription.Subscription),
		deleted: make(map[delivery.LaneKey]bool),
	}
}

func (r *registry) Subscription(lane delivery.LaneKey) *subscription.Subscription {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.subs[lane]
}

func (r *registry) DeadLetter(*subscription.Subscription) *delivery.DeadLetter { return nil }

func (r *registry) Deleted(lane delivery.LaneKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.deleted[lane]
}

func (r *registry) EndReason(delivery.LaneKey) string { return "subscription deleted" }

func (r *registry) Weight(ns delivery.NamespaceKey) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(1, r.weights[ns])
}

func (r *registry) Closed(delivery.LaneKey) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}

func (r *registry) swap(lane delivery.LaneKey, s *subscription.Subscription, deleted bool) (old *subscription.Subscription) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old = r.subs[lane]
	delete(r.subs, lane)
	if s != nil {
		r.subs[lane] = s
	}
	r.deleted[lane] = deleted
	return old
}

func uid(name string) (u [16]byte) {
	sum := sha256.Sum256([]byte(name))
	copy(u[:], sum[:])
	return u
}

func laneOf(s *subscription.Subscription) delivery.LaneKey {
	return delivery.LaneKey{
		Namespace:    delivery.UID(s.NamespaceUID).NamespaceKey(),
		Subscription: delivery.UID(s.UID).SubscriptionKey(),
	}
}

// lane is that of a subscription in acme, and acme its namespace.
func lane(id string) delivery.LaneKey {
	return delivery.LaneKey{Namespace: acme(), Subscription: delivery.UID(uid(id)).SubscriptionKey()}
}

func acme() delivery.NamespaceKey { return delivery.UID(uid("acme")).NamespaceKey() }

// receiver is the Attempter. answer decides when each attempt ends, and how; nil leaves it open for end.
type receiver struct {
	t      *testing.T
	answer func(sub *subscription.Subscription, job *delivery.Job) (time.Duration, *delivery.Result)

	// answerAll is answer for requests with several; without it answer counts for them, with the first.
	answerAll func(sub *subscription.Subscription, jobs []*delivery.Job) (time.Duration, *delivery.Result)

	mu      sync.Mutex
	batches []together
	started []start
	flying  map[delivery.ID]flight
	most    map[string]int
	now     map[string]int
	// accepted are the deliveries of ordering keys that succeeded, when they first did, in order.
	accepted []start
}

type flight struct {
	sub  string
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
	id     delivery.ID
	kind   delivery.Kind
	sub    string
	uri    string
	job    *delivery.Job
	event  *delivery.Event
	at     time.Time
	accept time.Time
}

func (r *receiver) Attempt(sub *subscription.Subscription, job *delivery.Job, sink delivery.Sink) {
	r.mu.Lock()
	if r.flying[job.ID].job != nil {
		r.t.Errorf("two attempts of %v at once", job.ID)
	}
	for id, f := range r.flying {
		if job.Order != 0 && f.sub == sub.ID && f.job.Order == job.Order {
			r.t.Errorf("%v and %v of one ordering key at once", id, job.ID)
		}
	}
	r.flying[job.ID] = flight{sub.ID, job, sink}
	r.started = append(r.started, start{
		job.ID, job.Kind, sub.ID, sub.Proto().GetUri(), job, job.Event, time.Now(), job.Event.AcceptTime,
	})
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
		r.now[f.sub]--
		if job.Order != 0 && result.Outcome == delivery.OutcomeSucceeded {
			r.accepted = append(r.accepted, start{id: job.ID, sub: f.sub, job: job})
		}
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

func timedOut() *delivery.Result {
	return &delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeTimedOut}}
}

func unspent() *delivery.Result { return &delivery.Result{Cause: delivery.CauseUnspent} }

func always(delay time.Duration, result func() *delivery.Result) func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
	return func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
		return delay, result()
	}
}

// hanging has the receivers whose subscriptions are called hangs… hang for 15 s, and the others answer after a delay.
func hanging(delay time.Duration) func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
	return func(sub *subscription.Subscription, _ *delivery.Job) (time.Duration, *delivery.Result) {
		if strings.HasPrefix(sub.ID, "hangs") {
			return 15 * time.Second, timedOut()
		}
		return delay, ok()
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

	mu        sync.Mutex
	disabled  []string
	workedOff []delivery.LaneKey
}

func newWorld(t *testing.T, change ...func(*dispatch.Options)) *world {
	w := &world{
		t: t, journal: newJournal(t), registry: newRegistry(),
		receiver: &receiver{
			t: t, flying: make(map[delivery.ID]flight), most: make(map[string]int), now: make(map[string]int),
			answer: always(10*time.Millisecond, ok),
		},
	}
	w.options = dispatch.Options{
		Journal: w.journal, Subscriptions: w.registry, Attempter: w.receiver, Disable: w.disable, WorkedOff: w.noteWorkedOff,
		Starts: 700,
	}
	for _, c := range change {
		c(&w.options)
	}
	w.start()
	return w
}

func (w *world) start() {
	w.engine = dispatch.New(w.options)
	w.journal.mu.Lock()
	w.journal.follower = w.engine
	w.journal.mu.Unlock()
	w.ran = make(chan error, 1)
	engine, ran := w.engine, w.ran
	go func() { ran <- engine.Run(context.Background()) }()
}

// stop drains the engine and closes the journal.
func (w *world) stop() {
	w.t.Helper()
	if err := w.engine.Stop(w.t.Context()); err != nil {
		w.t.Errorf("stop: %v", err)
	}
	if err := <-w.ran; err != nil {
		w.t.Errorf("run: %v", err)
	}
	w.journal.close(true)
}

// kill abandons everything.
func (w *world) kill() error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := w.engine.Stop(ctx)
	<-w.ran
	w.journal.close(false)
	w.receiver.forget()
	return err
}

// sub makes an active subscription, or changes it.
func (w *world) sub(id string, change ...func(*subscription.Subscription)) *subscription.Subscription {
	s := subscription.Of(&grapnelv1.Subscription{
		Name: "namespaces/acme/subscriptions/" + id, State: grapnelv1.Subscription_STATE_ACTIVE, Uri: "https://" + id + ".example", CreateTime: timestamppb.Now(),
	})
	s.UID, s.NamespaceUID = uid(id), uid("acme")
	*s.Policy = subscription.Policy{
		MaxInFlight: 4, MaxAttempts: 4, MaxAge: time.Hour, AttemptTimeout: 15 * time.Second,
		Schedule: []time.Duration{5 * time.Second, 5 * time.Minute}, DisableAfter: 30 * time.Minute,
	}
	for _, c := range change {
		c(s)
	}
	w.put(s)
	return s
}

// put replaces a subscription and tells the engine.
func (w *world) put(s *subscription.Subscription) {
	old := w.registry.swap(laneOf(s), s, false)
	w.engine.Changed([]subscription.Change{{Old: old, New: s}})
}

// remove takes a subscription out of the snapshot: deleted, or absent.
func (w *world) remove(id string, deleted bool) {
	old := w.registry.swap(lane(id), nil, deleted)
	w.engine.Changed([]subscription.Change{{Old: old}})
}

// on has a subscription's receiver be on a host; else each has one of its own.
func on(host string) func(*subscription.Subscription) {
	return func(s *subscription.Subscription) { s.Proto().Uri = "https://" + host + "/" + s.ID }
}

func inState(state grapnelv1.Subscription_State) func(*subscription.Subscription) {
	return func(s *subscription.Subscription) { s.State = state }
}

func inNamespace(name string) func(*subscription.Subscription) {
	return func(s *subscription.Subscription) { s.Namespace, s.NamespaceUID = name, uid(name) }
}

func (w *world) disable(_ context.Context, sub *subscription.Subscription, reason string) error {
	w.mu.Lock()
	w.disabled = append(w.disabled, sub.ID+": "+reason)
	w.mu.Unlock()
	w.sub(sub.ID, inState(grapnelv1.Subscription_STATE_DISABLED))
	return nil
}

func (w *world) noteWorkedOff(key delivery.LaneKey) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.workedOff = append(w.workedOff, key)
}

// wasDisabled lists what was disabled, and why; wasWorkedOff what WorkedOff was called for.
func (w *world) wasDisabled() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.disabled)
}

func (w *world) wasWorkedOff() []delivery.LaneKey {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.workedOff)
}

// publish stores an event with one delivery, and has it offered.
func (w *world) publish(sub *subscription.Subscription, partition uint16) delivery.ID {
	return w.journal.add(partition, 1024, time.Time{}, sub)[0]
}

func (w *world) publishN(sub *subscription.Subscription, partition uint16, n int) []delivery.ID {
	var ids []delivery.ID
	for range n {
		ids = append(ids, w.publish(sub, partition))
	}
	return ids
}
