// Package ingest owns what "accepted" means: an event is accepted when its namespace exists, its limits and
// the schema of its type allow it, it has been matched against the subscriptions of one snapshot, and the journal has stored it
// with all its deliveries. Publishing, and whatever else makes events, goes through it.
//
// It keeps nothing on disk itself: rates are counted in memory and begin anew with the process.
package ingest

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/eventtype"
	"github.com/grapnel/grapnel/server/subscription"
	"github.com/grapnel/grapnel/server/tracing"
)

// Journal is what ingest needs of *delivery.Journal.
type Journal interface {
	Append(ctx context.Context, events []delivery.Publication) []delivery.AppendResult
	// OpenIn counts the open deliveries of a namespace.
	OpenIn(namespace delivery.NamespaceKey) int64
}

// Registry is what ingest needs of *subscription.Registry.
type Registry interface {
	// Snapshot returns the current subscriptions; it is called once per Publish and must be cheap.
	Snapshot() *subscription.Snapshot
}

// EventTypes is what ingest needs of *eventtype.Store.
type EventTypes interface {
	// In returns what a namespace has registered, nil when nothing; it is called once per Publish and must be cheap.
	In(namespace string) *eventtype.Catalog
	// Damaged reports whether a type is registered in a way that cannot be read. It is asked only about what In does not show.
	Damaged(namespace, id string) bool
}

// Options of an Ingest. Registry and Journal are required.
type Options struct {
	Registry Registry
	Journal  Journal
	// Near is told that a namespace is near a quota, or at it, about once an hour for each of them while it is. It must not
	// block. Nil is told nothing.
	Near func(Near)
	// EventTypes are what payloads are checked against; nil checks nothing.
	EventTypes EventTypes
	// Tracer decides which events are sampled, and makes the spans of their publication; nil samples none.
	Tracer *tracing.Tracer
	// Logger gets a line per refused event at Debug; nil discards.
	Logger *slog.Logger
	// Registerer takes the metrics; nil keeps none.
	Registerer prometheus.Registerer
}

// Near is how far a namespace is from a quota.
type Near struct {
	Namespace *subscription.Namespace
	// Quota is the field of grapnel.v1.Quota.
	Quota string
	// Used of Limit: open deliveries, or events a second over the last ten.
	Used, Limit int64
	Time        time.Time
}

// Result is what became of one event.
type Result struct {
	// Event is the stored one: for a duplicate the original. nil when refused, or when Record has stored none.
	Event *delivery.Event
	// Duplicate is set when the same event was accepted before; nothing new was queued.
	Duplicate bool
	// Err is nil, one of the errors of this package, or what the journal said.
	Err error
}

// Ingest accepts events. Its methods may be called at the same time.
type Ingest struct {
	registry Registry
	journal  Journal
	tellNear func(Near)
	types    EventTypes
	tracer   *tracing.Tracer
	log      *slog.Logger
	metrics  metrics
	draining atomic.Bool
	meters   meters
	tallies  tallies
	// faults count conditions that could not be evaluated.
	faults tallies
}

// New builds an Ingest.
func New(o Options) *Ingest {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Ingest{
		registry: o.Registry,
		journal:  o.Journal,
		tellNear: o.Near,
		types:    o.EventTypes,
		tracer:   o.Tracer,
		log:      o.Logger.With("component", "ingest"),
		metrics:  newMetrics(o.Registerer),
	}
}

// Drain makes every later Publish refuse all events with ErrDraining. Calls under way are finished.
func (i *Ingest) Drain() { i.draining.Store(true) }

// Rate is how many events a second the namespace has had accepted over the last minute.
func (i *Ingest) Rate(namespace string) float64 {
	if ns := i.registry.Snapshot().Namespace(namespace); ns != nil {
		if m := i.meters.find(ns.UID); m != nil {
			return m.rate(time.Now())
		}
	}
	return 0
}

// Accepted is how many events a namespace, or all with "", has had accepted within a window of a minute to a day, since
// the process started. Windows are rounded up to whole minutes, above an hour to whole hours.
func (i *Ingest) Accepted(namespace string, window time.Duration) int64 {
	return i.counted(&i.tallies, namespace, window)
}

// ConditionErrors is how many conditions could not be evaluated for accepted events; namespace and window are as for
// Accepted.
func (i *Ingest) ConditionErrors(namespace string, window time.Duration) int64 {
	return i.counted(&i.faults, namespace, window)
}

func (i *Ingest) counted(t *tallies, namespace string, window time.Duration) int64 {
	if namespace == "" {
		return t.sum(nil, time.Now(), window)
	}
	ns := i.registry.Snapshot().Namespace(namespace)
	if ns == nil {
		return 0
	}
	return t.sum(&ns.UID, time.Now(), window)
}

// Publish accepts or refuses each event on its own; results[k] answers events[k]. It returns when the
// accepted ones are durable. The events become the journal's: the caller must not change them or their
// payloads any more. Events whose ID is empty get a new one. Errors of a Result: those of this package,
// *eventtype.MismatchError, delivery.ErrEventConflict, ErrDiskFull, ErrClosed, or the context's.
func (i *Ingest) Publish(ctx context.Context, namespace string, events []*delivery.Event) []Result {
	results := make([]Result, len(events))
	traced := i.tracer.Publish(ctx, namespace, events)
	ns, admitted := i.admit(ctx, namespace, events, results)
	if len(admitted) > 0 {
		taken := traced.Append(func(k int) bool { return results[k].Err == nil })
		i.store(ctx, ns, admitted, results)
		taken()
	}
	if traced != nil {
		traced.End(func(k int) tracing.Published {
			if err := results[k].Err; err != nil {
				return tracing.Published{Refused: outcomeOf(err)}
			}
			return tracing.Published{UID: results[k].Event.UID, Duplicate: results[k].Duplicate}
		})
	}
	i.metrics.count(results)
	if i.log.Enabled(ctx, slog.LevelDebug) {
		i.logRefusals(ctx, namespace, events, results)
	}
	return results
}

// Refusal is why no event at all would be taken for the namespace now, or nil: ErrDraining,
// ErrNamespaceNotFound, ErrNamespaceDeleted or a *QuotaError. Publish looks again.
func (i *Ingest) Refusal(namespace string) error {
	return i.refusal(namespace, i.registry.Snapshot().Namespace(namespace))
}

func (i *Ingest) logRefusals(ctx context.Context, namespace string, events []*delivery.Event, results []Result) {
	for k := range results {
		if err := results[k].Err; err != nil {
			i.log.LogAttrs(ctx, slog.LevelDebug, "event refused",
				slog.String("namespace", namespace), slog.String("event_id", events[k].ID), slog.Any("err", err))
		}
	}
}

// admit refuses by setting an Err, and returns the namespace and the rest, matched.
func (i *Ingest) admit(ctx context.Context, namespace string, events []*delivery.Event, results []Result) (*subscription.Namespace, []delivery.Publication) {
	snap := i.registry.Snapshot()
	ns := snap.Namespace(namespace)
	if err := i.refusal(namespace, ns); err != nil {
		for k := range results {
			results[k].Err = err
		}
		return nil, nil
	}
	limits := ns.Quota()
	var types *eventtype.Catalog
	if i.types != nil {
		types = i.types.In(namespace)
	}
	registered := types != nil || ns.RequireEventTypes
	left := 0
	for k, ev := range events {
		if size := len(ev.Payload); size > limits.MaxEventBytes {
			results[k].Err = tooLarge(size, limits.MaxEventBytes)
			continue
		}
		if registered {
			if results[k].Err = i.checkType(ctx, ns, types, ev); results[k].Err != nil {
				continue
			}
		}
		left++
	}
	var granted int
	var wait time.Duration
	now := time.Now()
	i.meters.use(ns.UID, now, func(m *meter) { granted, wait = m.take(now, left, limits.MaxPublishRate) })
	if granted < left {
		i.near(ns, rateQuota, int64(limits.MaxPublishRate), int64(limits.MaxPublishRate), now)
	}
	var candidate subscription.Candidate
	admitted := make([]delivery.Publication, 0, min(granted, left))
	for k, ev := range events {
		if results[k].Err != nil {
			continue
		}
		if len(admitted) == granted {
			results[k].Err = &RateError{Namespace: namespace, Limit: limits.MaxPublishRate, RetryAfter: wait}
			continue
		}
		ev.Namespace = delivery.UID(ns.UID).NamespaceKey()
		if ev.ID == "" {
			ev.ID = uuid.Must(uuid.NewV7()).String()
		}
		admitted = append(admitted, delivery.Publication{Event: ev, Targets: targets(snap, ns, &candidate, ev, time.Time{})})
	}
	return ns, admitted
}

// checkType refuses an event whose type is not registered, where it should be, or whose payload the type's schema does
// not allow, where that is enforced.
func (i *Ingest) checkType(ctx context.Context, ns *subscription.Namespace, types *eventtype.Catalog, ev *delivery.Event) error {
	t := types.Get(ev.Type)
	if t == nil {
		if ns.RequireEventTypes && (i.types == nil || !i.types.Damaged(ns.ID, ev.Type)) {
			return &UnregisteredError{Namespace: ns.ID}
		}
		return nil
	}
	err := t.Check(ctx, ev.ContentType, ev.Schema, ev.Payload)
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*eventtype.MismatchError](err); ok {
		i.metrics.mismatches.Inc()
		if !t.Rejects() {
			return nil
		}
	}
	return err // who gave up waiting for the schema's turn, too
}

// refusal is the reason to take no event at all, or nil.
func (i *Ingest) refusal(namespace string, ns *subscription.Namespace) error {
	switch {
	case i.draining.Load():
		return ErrDraining
	case ns == nil:
		return ErrNamespaceNotFound
	case ns.Deleted():
		return ErrNamespaceDeleted
	}
	return i.full(ns, 0)
}

// full is the refusal of a namespace with as many open deliveries as it may have, and spare ones more.
func (i *Ingest) full(ns *subscription.Namespace, spare int64) error {
	limit := int64(ns.Quota().MaxOpenDeliveries)
	if limit == 0 {
		return nil
	}
	open := i.journal.OpenIn(delivery.UID(ns.UID).NamespaceKey())
	if isNear(open, limit) {
		i.near(ns, openQuota, open, limit, time.Now())
	}
	if open >= limit+spare {
		return &QuotaError{Namespace: ns.ID, Name: openQuota, Limit: limit}
	}
	return nil
}

// store appends what was admitted: the events that have no error yet.
func (i *Ingest) store(ctx context.Context, ns *subscription.Namespace, admitted []delivery.Publication, results []Result) {
	stored := i.journal.Append(ctx, admitted)
	next, accepted, faults := 0, 0, 0
	for k := range results {
		if results[k].Err != nil {
			continue
		}
		r := stored[next]
		next++
		if r.Err != nil {
			results[k].Err = r.Err
			continue
		}
		results[k].Event, results[k].Duplicate = r.Event, r.Duplicate
		if !r.Duplicate {
			accepted++
			faults += r.Event.FaultCount
		}
	}
	now := time.Now()
	var recent int64
	i.meters.use(ns.UID, now, func(m *meter) { recent = m.add(now, accepted) })
	if recent > 0 {
		const seconds = int64(burst / time.Second)
		if limit := int64(ns.Quota().MaxPublishRate); limit > 0 && isNear(recent, limit*seconds) {
			i.near(ns, rateQuota, recent/seconds, limit, now)
		}
	}
	i.tallies.add(ns.UID, now, accepted)
	i.faults.add(ns.UID, now, faults)
	i.metrics.conditions.Add(float64(faults))
}

// Candidate is an event as conditions see it. It shares the event's attributes and payload.
func Candidate(ev *delivery.Event) subscription.Candidate {
	return subscription.Candidate{
		ID:          ev.ID,
		Source:      ev.Source,
		Type:        ev.Type,
		Subject:     ev.Subject,
		Time:        ev.Time,
		ContentType: ev.ContentType,
		Attributes:  ev.Attributes,
		Data:        ev.Payload,
	}
}

// targets lists the subscriptions that match ev, in the snapshot's order, and notes in ev whose conditions could not be
// evaluated. Those made after until are left out, unless that is zero.
func targets(snap *subscription.Snapshot, ns *subscription.Namespace, c *subscription.Candidate, ev *delivery.Event, until time.Time) []delivery.Target {
	*c = Candidate(ev)
	subs := snap.Match(ns.ID, c)
	ev.FaultCount = c.FaultCount
	for _, f := range c.Faults {
		ev.Faults = append(ev.Faults, delivery.Fault(f))
	}
	if len(subs) == 0 {
		return nil
	}
	out := make([]delivery.Target, 0, len(subs))
	for _, sub := range subs {
		if !until.IsZero() && sub.CreateTime().After(until) {
			continue
		}
		out = append(out, delivery.Target{
			Subscription: sub.ID,
			UID:          sub.UID,
			MaxAttempts:  sub.MaxAttempts,
			MaxAge:       sub.MaxAge,
			Skip:         ns.Disabled() || sub.State == grapnelv1.Subscription_STATE_DISABLED,
			Ordered:      sub.Ordered,
		})
	}
	return out
}
