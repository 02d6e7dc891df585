package server

import (
	"context"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

// sweepEvery is how often what has outlived its time is looked for.
const sweepEvery = 10 * time.Minute

// sweep drops history past its retention and erases namespaces past their purge time, now and then.
// A fault is logged and met again at the next turn.
func (s *Server) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		snapshot := s.registry.Snapshot()
		retention := func(ns string) time.Duration {
			if n := snapshot.Namespace(ns); n != nil {
				return n.Quota().Retention
			}
			return new(subscription.Namespace).Quota().Retention
		}
		if err := s.journal.Retain(ctx, retention); err != nil && ctx.Err() == nil {
			s.log.Error("history past its retention could not be dropped", "err", err)
		}
		for n := range snapshot.Namespaces("") {
			if n.Proto.GetState() != grapnelv1.Namespace_STATE_DELETED || n.Proto.GetPurgeTime().AsTime().After(time.Now()) {
				continue
			}
			if err := s.purge(ctx, n.ID); err != nil && ctx.Err() == nil {
				s.log.Error("namespace could not be erased", "namespace", n.ID, "err", err)
			}
		}
	}
}

// purge erases a namespace: first its events, so that a crash in between leaves it marked and is repeated.
func (s *Server) purge(ctx context.Context, ns string) error {
	if err := s.journal.DropNamespace(ctx, ns); err != nil {
		return err
	}
	return s.registry.PurgeNamespace(ctx, ns)
}
