package dispatch

import (
	"context"
	"errors"
	"fmt"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// A caller's change of a delivery is written while lane.io is held, so nothing that was read before it
// can come to memory after it. What it meets in memory decides:
//
//	waiting      taken out of its queue while the change is written, and put back if that fails or
//	             changes nothing
//	in flight    Cancel: written at once, and marked, so that its end adds the attempt and nothing else
//	             follows. Retry: refused
//	settling     the journal brings the two in order; the change stands, and the attempt becomes history
//	none         written. An Offer may bring the delivery to memory meanwhile: looked for afterwards
//
// A delivery that is retried becomes a timer that is due now and is read back as such, but one of the FIFO,
// which is due anyway, stays there.

// Cancel stops a delivery for good, durably. An attempt in flight is let end and becomes part of the
// history. It is idempotent; errors are the journal's.
func (e *Engine) Cancel(ctx context.Context, id delivery.ID, key delivery.LaneKey) (*delivery.Delivery, error) {
	l := e.editing(key)
	defer l.io.Unlock()
	defer l.mu.Unlock()
	x := e.index.get(id)
	taken := l.hold(x)
	marked := !taken && x.mark(reasonCancelled)
	l.mu.Unlock()
	d, err := e.journal.Cancel(ctx, id, reasonCancelled)
	l.mu.Lock()
	switch final := err == nil || errors.Is(err, delivery.ErrFinal) || errors.Is(err, delivery.ErrNotFound); {
	case taken && final:
		l.forget(x, true)
	case taken:
		l.unhold(x)
	case marked && !final:
		x.state.CompareAndSwap(cancelling, inFlight)
	case final:
		if x = e.index.get(id); l.hold(x) {
			l.forget(x, true)
		} else {
			x.mark(reasonCancelled)
		}
	}
	l.kick(time.Now())
	return d, err
}

// Retry makes a delivery due now, durably, with one attempt more if all are used up. It is refused with
// delivery.ErrInvalidState while an attempt is in flight, and when ifAttempts is neither negative nor the
// number of attempts that have ended.
func (e *Engine) Retry(ctx context.Context, id delivery.ID, key delivery.LaneKey, ifAttempts int) (*delivery.Delivery, error) {
	l := e.editing(key)
	defer l.io.Unlock()
	defer l.mu.Unlock()
	x := e.index.get(id)
	if x.flying() {
		return nil, fmt.Errorf("retry delivery %s: an attempt is in flight: %w", id, delivery.ErrInvalidState)
	}
	taken := l.hold(x)
	l.mu.Unlock()
	d, err := e.journal.Retry(ctx, id, ifAttempts)
	l.mu.Lock()
	scheduled := err == nil && d.State == delivery.Scheduled
	switch {
	case taken && scheduled:
		l.forget(x, true)
	case taken:
		x.job.Manual = x.job.Manual || err == nil
		l.unhold(x)
	}
	if scheduled {
		l.lower(l.part(id.Partition), time.Now().UnixNano())
	}
	l.kick(time.Now())
	return d, err
}

// editing returns the lane with io and mu held.
func (e *Engine) editing(key delivery.LaneKey) *lane {
	for {
		l := e.lane(key)
		l.mu.Unlock()
		l.io.Lock()
		l.mu.Lock()
		if !l.evicted {
			return l
		}
		l.mu.Unlock()
		l.io.Unlock()
	}
}

// hold takes a waiting entry out of its queue. l.mu is held.
func (l *lane) hold(x *entry) bool {
	if x == nil || x.lane != l || x.state.Load() != waiting {
		return false
	}
	l.queueOf(x).remove(x)
	x.state.Store(held)
	return true
}

func (l *lane) unhold(x *entry) {
	x.state.Store(waiting)
	l.queueOf(x).putBack(x)
}

// mark has an attempt in flight end as CANCELLED. lane.mu is held; nil is not in flight.
func (x *entry) mark(reason string) bool {
	if x == nil || x.state.Load() != inFlight {
		return false
	}
	x.reason = reason
	return x.state.CompareAndSwap(inFlight, cancelling)
}

func (x *entry) flying() bool {
	if x == nil {
		return false
	}
	switch x.state.Load() {
	case inFlight, cancelling, settling:
		return true
	}
	return false
}

// InFlight reports whether an attempt of the delivery is running.
func (e *Engine) InFlight(id delivery.ID) bool { return e.index.get(id).flying() }

// CancelLane cancels all open deliveries of one incarnation of a subscription, durably, and returns how
// many. No attempt of the lane starts meanwhile; those in flight are let end and become part of the
// history.
func (e *Engine) CancelLane(ctx context.Context, key delivery.LaneKey, uid delivery.UID, reason string) (int, error) {
	l := e.lane(key)
	l.cancels++
	for x := l.flying.head; x != nil; x = x.next {
		if x.job.SubscriptionUID == uid {
			x.mark(reason)
		}
	}
	l.mu.Unlock()
	l.io.Lock()
	defer l.io.Unlock()
	n, err := e.journal.CancelLane(ctx, key, uid, reason)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("cancel %s/%s: %w", key.Namespace, key.Subscription, err)
	} else {
		l.forgetAll(uid)
	}
	l.cancels--
	l.kick(time.Now())
	return n, err
}

// forgetAll removes what waits for an incarnation. It came to memory before the lane was closed, so the
// journal has cancelled it.
func (l *lane) forgetAll(uid delivery.UID) {
	for _, q := range []*queue{&l.fresh, &l.retries} {
		for x := q.head; x != nil; {
			next := x.next
			if x.job.SubscriptionUID == uid {
				q.remove(x)
				l.forget(x, true)
			}
			x = next
		}
	}
}

// Changed follows the registry. When it has returned no attempt starts with an older snapshot. What was
// deleted is cancelled in the background, after a restart by the recovery.
func (e *Engine) Changed(changes []subscription.Change) {
	for _, c := range changes {
		some := c.New
		if some == nil {
			some = c.Old
		}
		if some == nil {
			continue
		}
		key := delivery.LaneKey{Namespace: some.Namespace, Subscription: some.ID}
		if c.Old != nil && (c.New == nil || c.New.UID != c.Old.UID) {
			e.cancelDeleted(key, c.Old.UID)
		}
		e.mu.RLock()
		l := e.lanes[key]
		e.mu.RUnlock()
		if l != nil {
			l.changed(c)
		}
	}
}

func (l *lane) changed(c subscription.Change) {
	l.start.Lock() // whoever looked at the old snapshot has handed its attempts over
	defer l.start.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.Old == nil || c.New == nil || c.Old.UID != c.New.UID {
		l.closed, l.park, l.failing, l.limiter = time.Time{}, 0, time.Time{}, nil
	} else {
		was, is := c.Old.Proto, c.New.Proto
		resumed := is.GetState() == grapnelv1.Subscription_STATE_ACTIVE && was.GetState() != is.GetState()
		if resumed {
			l.failing = time.Time{}
		}
		if resumed || was.GetUri() != is.GetUri() || c.Old.MaxRate != c.New.MaxRate {
			l.closed, l.park = time.Time{}, 0
		}
	}
	l.sweepAt = time.Time{}
	l.kick(time.Now())
}

// cancelDeleted cancels what a deleted subscription left, and tries until it is done or the engine stops.
func (e *Engine) cancelDeleted(key delivery.LaneKey, uid delivery.UID) {
	e.background(e.taking, func(ctx context.Context) {
		for {
			_, err := e.CancelLane(ctx, key, uid, reasonDeleted)
			if err == nil || ctx.Err() != nil {
				return
			}
			e.log.Warn("deliveries of a deleted subscription not cancelled yet",
				"namespace_id", key.Namespace, "subscription_id", key.Subscription, "err", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(readAgain):
			}
		}
	})
}
