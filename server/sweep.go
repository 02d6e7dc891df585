package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// sweepEvery is how often what has outlived its time is looked for.
const sweepEvery = 10 * time.Minute

// graveTime is how long a tombstone is kept at least: longer than any publish that was matched before the deletion
// takes to be stored.
const graveTime = time.Hour

// sweep drops history past its retention, erases namespaces past their purge time, and forgets deletions that have
// been worked off, now and then. A fault is logged and met again at the next turn.
func (s *Server) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := s.sweepOnce(ctx, 0); err != nil && ctx.Err() == nil {
			s.log.Error("what has outlived its time could not all be erased", "err", err)
		}
	}
}

// sweepOnce is one turn. A keep above zero stands in for the retention of every namespace.
func (s *Server) sweepOnce(ctx context.Context, keep time.Duration) error {
	snapshot := s.registry.Snapshot()
	kept := retention(snapshot)
	if keep > 0 {
		kept = delivery.Retention{Shortest: keep, Of: func(delivery.NamespaceKey) time.Duration { return keep }}
	}
	errs := []error{s.journal.Retain(ctx, kept), s.journal.EraseReplays(ctx, func(ns delivery.NamespaceKey) time.Time {
		return s.journal.Now().Add(-kept.Of(ns))
	})}
	for n := range snapshot.Namespaces("") {
		if !n.Deleted() || n.Proto().GetPurgeTime().AsTime().After(time.Now()) {
			continue
		}
		if err := s.purge(ctx, n); err != nil {
			errs = append(errs, fmt.Errorf("erase namespace %s: %w", n.ID, err))
		}
	}
	return errors.Join(append(errs, s.forget(ctx, snapshot))...)
}

// forget removes the tombstones of which the journal has nothing open any more.
func (s *Server) forget(ctx context.Context, snapshot *subscription.Snapshot) error {
	if !s.journal.Counted() {
		return nil
	}
	var uids [][16]byte
	for t := range snapshot.Tombstones() {
		ns := delivery.UID(t.NamespaceUID).NamespaceKey()
		open := s.journal.OpenIn(ns)
		if !t.OfNamespace {
			open = s.journal.OpenOf(delivery.LaneKey{Namespace: ns, Subscription: delivery.UID(t.UID).SubscriptionKey()})
		}
		if open == 0 && time.Since(t.Time) > graveTime {
			uids = append(uids, t.UID)
		}
	}
	return s.registry.Forget(ctx, uids...)
}

// purge erases a namespace: first its events, so that a crash in between leaves it marked and is repeated.
func (s *Server) purge(ctx context.Context, n *subscription.Namespace) error {
	if err := s.journal.DropNamespace(ctx, delivery.UID(n.UID).NamespaceKey()); err != nil {
		return err
	}
	return s.registry.PurgeNamespace(ctx, n.ID)
}

// retention is what the namespaces of a snapshot keep. What is of none of them keeps as long as they do by default.
func retention(snapshot *subscription.Snapshot) delivery.Retention {
	quota := new(subscription.Namespace).Quota()
	standard := quota.Retention
	shortest, parts := standard, make(map[delivery.NamespaceKey]delivery.Parts)
	for n := range snapshot.Namespaces("") {
		q := n.Quota()
		shortest = min(shortest, q.Retention)
		if q.PayloadRetention < q.Retention || q.AttemptRetention < q.Retention {
			parts[delivery.UID(n.UID).NamespaceKey()] = delivery.Parts{Payloads: q.PayloadRetention, Attempts: q.AttemptRetention}
		}
	}
	return delivery.Retention{Shortest: shortest, Parts: parts, Of: func(ns delivery.NamespaceKey) time.Duration {
		if n := snapshot.NamespaceByKey(uint64(ns)); n != nil {
			return n.Quota().Retention
		}
		return standard
	}, Dead: func(ns delivery.NamespaceKey) time.Duration {
		if n := snapshot.NamespaceByKey(uint64(ns)); n != nil {
			return n.Quota().DeadLetterRetention
		}
		return quota.DeadLetterRetention
	}}
}
