package dispatch

import (
	"context"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

func (e *Engine) Offer(jobs []*delivery.Job)                                   {}
func (e *Engine) Timer(lane delivery.LaneKey, partition uint16, due time.Time) {}
func (e *Engine) Run(ctx context.Context) error                                { return nil }
func (e *Engine) Stop(ctx context.Context) error                               { return nil }
func (e *Engine) Complete(*delivery.Job, delivery.Result)                      {}
func (e *Engine) Changed(changes []subscription.Change)                        {}
func (e *Engine) Cancel(ctx context.Context, id delivery.ID, lane delivery.LaneKey) (*delivery.Delivery, error) {
	return nil, nil
}
func (e *Engine) Retry(ctx context.Context, id delivery.ID, lane delivery.LaneKey, ifAttempts int) (*delivery.Delivery, error) {
	return nil, nil
}
func (e *Engine) CancelLane(ctx context.Context, lane delivery.LaneKey, uid delivery.UID, reason string) (int, error) {
	return 0, nil
}
func (e *Engine) InFlight(id delivery.ID) bool { return false }
func (e *Engine) Test(ctx context.Context, sub *subscription.Subscription, event *delivery.Event) (delivery.Attempt, error) {
	return delivery.Attempt{}, nil
}
func (e *Engine) Stats(ns string, window time.Duration, top int) (total Stats, per []Stats) { return }
func (e *Engine) OldestDue(ns string) time.Duration                                         { return 0 }

// Stats are counters over a window, kept in memory since the engine started.
type Stats struct {
	// Lane is the zero value for a total.
	Lane delivery.LaneKey
	// Events accepted.
	Events int64
	// Attempts ended.
	Attempts int64
	// FailedAttempts did not succeed.
	FailedAttempts int64
	// Succeeded deliveries.
	Succeeded int64
	// Failed deliveries: exhausted or rejected.
	Failed int64
	// Open deliveries now.
	Open int64
	// InFlight attempts now.
	InFlight int64
	// P50 and P99 of the time from accept to success; 0 when nothing succeeded.
	P50, P99 time.Duration
	// OldestDue is the age of the oldest delivery that is due; see Engine.OldestDue.
	OldestDue time.Duration
}
