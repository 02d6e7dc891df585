// Package notice tells namespaces of what has happened to what is theirs, by operational events. It owns the types and the
// shapes of those, and how many there are; docs/operational-events.md is what subscribers may rely on. They are ordinary
// events otherwise, and stored as such.
//
// A Teller promises those who tell it something that they wait for nothing, and that nothing is made of it where no
// subscription covers its type. It holds what is to be told in memory, bounded over all and for each namespace, with room
// apart for what System is told of the server, and tells of one resource at most once in Interval: of many deliveries it tells how many there were and the first of them, of a
// subscription whose state changes to and fro the last state. What finds no room, or is not stored, is counted and lost, and
// so is what waits at a crash; an orderly stop stores it.
//
// Who tells it leaves out what comes of operational events themselves, and package subscription whom an event is about.
package notice

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/subscription"
)

// System is the namespace that is told of what is no tenant's: plugins, disks, the server's own quotas. It is made like
// any other; while it does not exist nobody is told.
const System = "grapnel-system"

// Interval is how often a resource is told of at most.
const Interval = 10 * time.Second

const (
	// gatherFor is how long the first notice of a resource waits for more.
	gatherFor = 100 * time.Millisecond
	// maxSlots bounds the resources that are told of within an Interval, maxOfNamespace those of one namespace; beyond both
	// there is room for as many of the server's own.
	maxSlots       = 4096
	maxOfNamespace = 256
	// recordMost bounds the events of one call of Record, and recordFor how long it may take.
	recordMost = 64
	recordFor  = 10 * time.Second
)

// Registry is what a Teller needs of *subscription.Registry.
type Registry interface {
	// Snapshot is called for each notice and must be cheap.
	Snapshot() *subscription.Snapshot
}

// Recorder is what a Teller needs of *ingest.Ingest.
type Recorder interface {
	Record(ctx context.Context, namespace delivery.NamespaceKey, events []*delivery.Event) []ingest.Result
}

// Options of a Teller. Registry and Recorder are required.
type Options struct {
	Registry Registry
	Recorder Recorder
	// Logger nil discards.
	Logger *slog.Logger
	// Registerer takes the metrics; nil means none.
	Registerer prometheus.Registerer
}

// Notice is something that has happened to a resource.
type Notice struct {
	// Namespace is told.
	Namespace delivery.NamespaceKey
	Type      Type
	// Subject is the resource's full name. It is the Teller's to keep, and so is Data.
	Subject string
	// ID is that of the event, so that a notice told again is stored once in a day; empty makes one.
	ID   string
	Time time.Time
	// Data is one of the shapes, as its Type has it.
	Data any
}

// Teller tells. Its methods may be called from any goroutine.
type Teller struct {
	registry Registry
	recorder Recorder
	log      *slog.Logger
	metrics  *metrics

	wake chan struct{} // size 1
	// sending is held, by what is in it, while notices are taken out and recorded, which keeps their order.
	sending chan struct{}

	mu      sync.Mutex // guards what follows; a leaf
	slots   map[place]*slot
	of      map[share]int // slots of a share
	next    time.Time     // when the first slot is due; zero when there is none
	stopped bool
}

// share is whose the slots are of which there are maxOfNamespace: a namespace's, or the server's own, which tenants do not
// fill, not even those of the namespace System.
type share struct {
	namespace delivery.NamespaceKey
	server    bool
}

// place is what is told of at most once in an Interval.
type place struct {
	share
	subject string
	topic   string
}

// slot is what is known of a place.
type slot struct {
	waiting *Notice
	// due is when the notice that waits is told; without one, when the slot is given up.
	due time.Time
	// told is the type of the last one.
	told Type
}

// New makes a Teller.
func New(o Options) *Teller {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Teller{
		registry: o.Registry, recorder: o.Recorder, log: o.Logger.With("component", "notice"), metrics: newMetrics(o.Registerer),
		wake: make(chan struct{}, 1), sending: make(chan struct{}, 1),
		slots: make(map[place]*slot), of: make(map[share]int),
	}
}

// Listens reports whether anything is made of a notice of a type to a namespace: whether it is worth its making.
func (t *Teller) Listens(namespace delivery.NamespaceKey, is Type) bool {
	snapshot := t.registry.Snapshot()
	ns := snapshot.NamespaceByKey(uint64(namespace))
	return ns != nil && snapshot.Covers(ns.ID, string(is))
}

// TellSystem tells the namespace System of what is the server's. It is heard if a subscription there covers the type, and
// there was room; else it may be told again. It never blocks.
func (t *Teller) TellSystem(n Notice) (heard bool) {
	ns := t.registry.Snapshot().Namespace(System)
	if ns == nil {
		return false
	}
	n.Namespace = delivery.UID(ns.UID).NamespaceKey()
	return t.tell(n, share{n.Namespace, true})
}

// Tell has a notice told before long, alone or with others, and reports whether it is going to be: false where nobody
// listens, and where there is no room. It never blocks.
func (t *Teller) Tell(n Notice) (taken bool) { return t.tell(n, share{n.Namespace, false}) }

func (t *Teller) tell(n Notice, of share) (taken bool) {
	if !t.Listens(n.Namespace, n.Type) {
		return false
	}
	bound(&n)
	at := place{of, n.Subject, n.topic()}
	most := maxSlots
	if of.server {
		most += maxOfNamespace
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.slots[at]
	switch {
	case t.stopped:
		t.metrics.dropped(dropStopping, 1)
		return false
	case s == nil && (len(t.slots) >= most || t.of[of] >= maxOfNamespace):
		t.metrics.dropped(dropCrowded, 1)
		return false
	case s == nil:
		s = &slot{waiting: &n, due: time.Now().Add(gatherFor)}
		t.slots[at] = s
		t.of[of]++
		if t.next.IsZero() || s.due.Before(t.next) {
			t.next = s.due
			select {
			case t.wake <- struct{}{}:
			default:
			}
		}
	case s.waiting != nil:
		t.metrics.coalesced.Inc()
		s.waiting = merge(s.waiting, &n)
	default:
		s.waiting = &n
	}
	if n.Type.isState() && n.Type == s.told {
		s.waiting = nil // there and back again
	}
	return true
}

// Run tells what is due until ctx ends. Call it once.
func (t *Teller) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.wake:
		case <-timer.C:
			if t.flush(ctx, false) != nil {
				return nil // ctx has ended
			}
		}
		t.mu.Lock()
		next := t.next
		t.mu.Unlock()
		if !next.IsZero() {
			timer.Reset(max(time.Until(next), gatherFor/2)) // what is due meanwhile is told with it
		}
	}
}

// Stop tells all that waits at once, and nothing from then on. Its error is that of ctx, when that ends before.
func (t *Teller) Stop(ctx context.Context) error {
	t.mu.Lock()
	t.stopped = true
	t.mu.Unlock()
	return t.flush(ctx, true)
}

// flush tells what is due, or all.
func (t *Teller) flush(ctx context.Context, all bool) error {
	select {
	case t.sending <- struct{}{}:
		defer func() { <-t.sending }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for ns, notices := range t.take(time.Now(), all) {
		for len(notices) > 0 {
			n := min(len(notices), recordMost)
			t.record(ctx, ns, notices[:n])
			notices = notices[n:]
		}
	}
	return context.Cause(ctx)
}

// take takes out what is due, or all, by namespaces.
func (t *Teller) take(now time.Time, all bool) map[delivery.NamespaceKey][]*Notice {
	t.mu.Lock()
	defer t.mu.Unlock()
	due := make(map[delivery.NamespaceKey][]*Notice)
	t.next = time.Time{}
	for at, s := range t.slots {
		if all && s.waiting != nil || !s.due.After(now) {
			if s.waiting == nil {
				delete(t.slots, at)
				if t.of[at.share]--; t.of[at.share] == 0 {
					delete(t.of, at.share)
				}
				continue
			}
			due[at.namespace] = append(due[at.namespace], s.waiting)
			s.told, s.waiting, s.due = s.waiting.Type, nil, now.Add(Interval)
		}
		if t.next.IsZero() || s.due.Before(t.next) {
			t.next = s.due
		}
	}
	return due
}

// record stores notices of one namespace.
func (t *Teller) record(ctx context.Context, key delivery.NamespaceKey, notices []*Notice) {
	ns := t.registry.Snapshot().NamespaceByKey(uint64(key))
	if ns == nil {
		return // it is gone, and those who would have been told with it
	}
	lost, why := 0, error(nil)
	events := make([]*delivery.Event, 0, len(notices))
	for _, n := range notices {
		if ev, err := n.event(ns.ID); err != nil {
			lost, why = lost+1, err
		} else {
			events = append(events, ev)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, recordFor)
	defer cancel()
	for _, r := range t.recorder.Record(ctx, key, events) {
		switch {
		case r.Err != nil:
			lost, why = lost+1, r.Err
		case r.Event != nil && !r.Duplicate:
			t.metrics.recorded(r.Event.Type)
		}
	}
	if lost > 0 {
		t.metrics.dropped(dropRefused, lost)
		t.log.Warn("operational events not stored", "namespace_id", ns.ID, "count", lost, "err", why)
	}
}

// event is the notice as it is stored in a namespace.
func (n *Notice) event(ns string) (*delivery.Event, error) {
	payload, err := encode(n.Data)
	if err != nil {
		return nil, fmt.Errorf("write %s as JSON: %w", n.Type, err)
	}
	ev := &delivery.Event{
		ID: n.ID, Source: subscription.OperationalSource + ns, Type: string(n.Type), Subject: n.Subject, Time: n.Time,
		ContentType: "application/json", Payload: payload,
		// What is told of a resource is told in order.
		OrderingKey: strings.TrimPrefix(n.Subject, "namespaces/"+ns+"/"),
	}
	if ev.ID != "" {
		ev.ContentHash = hash(n.ID, string(n.Type), n.Subject)
	}
	return ev, nil
}
