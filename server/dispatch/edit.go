package dispatch

import (
	"context"
	"fmt"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/window"
	"github.com/grapnel/grapnel/server/subscription"
)

// A caller's change goes to the journal, which tells the engine of it as its Follower before it answers, whether the
// caller is still there or not. So nothing is done here that belongs to the change.

// Cancel stops a delivery for good, durably. An attempt in flight is let end and becomes part of the
// history. It is idempotent; errors are the journal's.
func (e *Engine) Cancel(ctx context.Context, id delivery.ID, key delivery.LaneKey) (*delivery.Delivery, error) {
	return e.journal.Cancel(ctx, key, id, reasonCancelled)
}

// Retry makes a delivery due now, durably, with one attempt more if all are used up, and opens its lane if the target or
// a plugin has closed it. It is refused with delivery.ErrInvalidState while an attempt is in flight, when the subscription is
// deleted, and when ifAttempts is neither negative nor the number of attempts that have ended.
func (e *Engine) Retry(ctx context.Context, id delivery.ID, key delivery.LaneKey, ifAttempts int) (*delivery.Delivery, error) {
	if e.InFlight(id, key) {
		return nil, fmt.Errorf("retry delivery %s: an attempt is in flight: %w", id, delivery.ErrInvalidState)
	}
	if e.subs.Subscription(key) == nil && e.subs.Deleted(key) {
		return nil, fmt.Errorf("retry delivery %s: its subscription is deleted: %w", id, delivery.ErrInvalidState)
	}
	d, err := e.journal.Retry(ctx, key, id, ifAttempts)
	if err != nil && ctx.Err() == nil {
		return d, err
	}
	// Where the caller has left, the change may have been made all the same.
	l := e.lane(key)
	defer l.mu.Unlock()
	if x := l.held[place{id.Seq, id.Partition}]; x != nil && x.stage == window.Waiting && x.Kind == delivery.FIFO {
		x.Manual = true
	}
	l.open(e.now())
	l.kick(e.now())
	return d, err
}

// InFlight reports whether an attempt of the delivery is running, or has just ended and is being settled.
func (e *Engine) InFlight(id delivery.ID, key delivery.LaneKey) bool {
	l := e.find(key)
	if l == nil {
		return false
	}
	defer l.mu.Unlock()
	x := l.held[place{id.Seq, id.Partition}]
	return x != nil && x.stage != window.Waiting
}

// CancelLane cancels all open deliveries of a subscription, durably, and returns how
// many, as long as while says so; nil is always. No attempt of the lane starts meanwhile; those in flight are let end
// and become part of the history.
func (e *Engine) CancelLane(ctx context.Context, key delivery.LaneKey, reason string, while func() bool) (int, error) {
	l := e.lane(key)
	l.cancels++
	l.mu.Unlock()
	n, err := e.journal.CancelLane(ctx, key, reason, while)
	if err != nil {
		err = fmt.Errorf("cancel the deliveries of lane %x/%x: %w", key.Namespace, key.Subscription, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancels--
	l.kick(e.now())
	return n, err
}

// Deleting leaves it to the caller to cancel what is open of a subscription that it is about to delete, so that it can
// say how many there were. What is left when it calls done is cancelled in the background.
func (e *Engine) Deleting(key delivery.LaneKey) (done func()) { return e.graves.claim(key) }

// Changed follows the registry. When it has returned no attempt starts with an older snapshot. What is left of
// subscriptions whose deletion has been seen is cancelled in the background.
func (e *Engine) Changed(changes []subscription.Change) {
	for _, c := range changes {
		if c.Gate != nil {
			e.gated(c.Gate)
		}
		if c.Tombstone != nil && c.Old == nil {
			e.buried(c.Tombstone)
		}
		if c.Old != nil && (c.New == nil || c.New.UID != c.Old.UID) {
			e.changed(laneOf(c.Old), c.Old, nil)
		}
		if c.New != nil {
			old := c.Old
			if old != nil && old.UID != c.New.UID {
				old = nil
			}
			e.changed(laneOf(c.New), old, c.New)
		}
	}
}

// buried follows the news of a deletion alone.
func (e *Engine) buried(t *subscription.Tombstone) {
	ns := delivery.UID(t.NamespaceUID).NamespaceKey()
	if !t.OfNamespace {
		e.changed(delivery.LaneKey{Namespace: ns, Subscription: delivery.UID(t.UID).SubscriptionKey()}, nil, nil)
		return
	}
	for _, l := range e.allLanes() {
		if l.key.Namespace == ns {
			e.changed(l.key, nil, nil)
		}
	}
}

// gated follows what closes or opens many lanes at once. A time without attempts is none of failing: what has been failing
// begins anew when it is over.
func (e *Engine) gated(g *subscription.Gate) {
	ns := delivery.UID(g.NamespaceUID).NamespaceKey()
	for _, l := range e.allLanes() {
		if ns == 0 || l.key.Namespace == ns {
			e.turn(l.key, g.Opened)
		}
	}
	if !g.Opened {
		return
	}
	for _, key := range e.failingAway(ns) {
		e.turn(key, true)
	}
}

// turn has a lane look again.
func (e *Engine) turn(key delivery.LaneKey, opened bool) {
	l := e.starting(key, opened)
	if l == nil {
		return
	}
	defer l.start.Unlock()
	failing := opened && !l.health.FailingSince().IsZero()
	if failing {
		l.health.Forgive()
	}
	l.sweepAt = time.Time{}
	l.kick(e.now())
	l.mu.Unlock()
	if failing {
		l.note()
	}
}

// failingAway lists those of a namespace, or of all with 0, whose target has been failing and that have no lane.
func (e *Engine) failingAway(ns delivery.NamespaceKey) (keys []delivery.LaneKey) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	for key, h := range e.healths {
		if !h.FailingSince().IsZero() && (ns == 0 || key.Namespace == ns) {
			keys = append(keys, key)
		}
	}
	return keys
}

func (e *Engine) changed(key delivery.LaneKey, was, is *subscription.Subscription) {
	renewed := was != nil && is != nil && newTarget(was, is)
	again := was != nil && is != nil && resumed(was, is)
	if is == nil && e.subs.Deleted(key) {
		e.graves.add(key)
	}
	if was != nil && is != nil && was.BlocksKeys && !is.BlocksKeys {
		e.unblocks.add(key, e.now())
		e.unblocks.add(key, e.now().Add(walkAgain)) // an attempt may have ended just now
	}
	l := e.starting(key, renewed || again)
	if l == nil {
		return
	}
	defer l.start.Unlock()
	failing := !l.health.FailingSince().IsZero()
	switch {
	case renewed:
		l.retarget()
	case again:
		l.open(e.now())
		l.health.Forgive()
	case l.pacer != nil && was != nil && is != nil && was.MaxRate != is.MaxRate:
		l.pacer.until = time.Time{}
	}
	l.sweepAt = time.Time{}
	l.kick(e.now())
	l.mu.Unlock()
	if failing && (renewed || again) {
		l.note()
	}
}

// starting returns the lane with start and mu held, so that whoever looked at an older snapshot has handed its attempts
// over. Without one it is made, or nil.
func (e *Engine) starting(key delivery.LaneKey, made bool) *lane {
	for {
		l := e.find(key)
		if l == nil && made {
			l = e.lane(key)
		}
		if l == nil {
			return nil
		}
		l.mu.Unlock()
		l.start.Lock()
		l.mu.Lock()
		if !l.evicted {
			return l
		}
		l.mu.Unlock()
		l.start.Unlock()
	}
}

// note writes down since when the target has been failing. It is called after a change, without l.mu.
func (l *lane) note() {
	l.noting.Lock()
	defer l.noting.Unlock()
	l.mu.Lock()
	since := l.health.FailingSince()
	l.mu.Unlock()
	l.e.journal.SetFailing(l.key, since)
}

// newTarget reports whether what is known of the old target says nothing about the new one.
func newTarget(was, is *subscription.Subscription) bool {
	a, b := was.Proto(), is.Proto()
	return a.GetUri() != b.GetUri() || a.GetTransport().GetPlugin() != b.GetTransport().GetPlugin()
}

func resumed(was, is *subscription.Subscription) bool {
	return is.State == grapnelv1.Subscription_STATE_ACTIVE && was.State != is.State
}
