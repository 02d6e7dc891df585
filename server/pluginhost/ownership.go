package pluginhost

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/subscription"
)

// answer is the sink of one attempt that somebody waits for.
type answer chan delivery.Result

// Complete implements delivery.Sink.
func (a answer) Complete(_ *delivery.Job, r delivery.Result) { a <- r }

// CheckOwnership asks the receiver of a subscription, which need not be stored yet, whether it wants to be
// delivered to, in the way the transport's config says. A nil attempt means that the transport has no such
// check; a success, that the receiver agrees or that the config asks for no check. Otherwise the attempt is
// as one of a delivery would be, but its response headers are kept whatever the status. It takes the
// subscription's attempt timeout at most. The error is ErrUnknownPlugin, ErrUnavailable, or ctx's.
func (h *Host) CheckOwnership(ctx context.Context, sub *grapnelv1.Subscription) (*delivery.Attempt, error) {
	id := transportID(&h.kinds, sub)
	k := h.kinds.get(id)
	switch {
	case k == nil:
		return nil, h.missing(id)
	case !k.Proto.GetTransport().GetOwnershipCheck():
		return nil, nil
	case h.closed.Load():
		return nil, fmt.Errorf("%w: the server is stopping", ErrUnavailable)
	}
	b, err := h.resolve("transport", id, sub.GetTransport())
	if err != nil {
		return nil, err
	}
	asked := subscription.Of(sub)
	asked.MaxInFlight, asked.AttemptTimeout = 1, sub.GetAttemptTimeout().AsDuration()
	_, _ = rand.Read(asked.UID[:]) // an instance of its own beside the one that serves; it never fails
	pl := h.newPlan(asked, sub, b)
	defer h.retire(pl)
	pl.shape = wire.Empty()
	pl.ref, err = h.configureOne(pl, asked, sub, b)
	var refused *refusedError
	switch {
	case errors.As(err, &refused):
		return &delivery.Attempt{Number: 1, Start: time.Now(), Outcome: delivery.OutcomePluginError, Error: refused.why}, nil
	case err != nil:
		return nil, fmt.Errorf("%w: plugins/%s: %w", ErrUnavailable, id, err)
	}
	return h.attemptCheck(ctx, pl, asked)
}

// attemptCheck makes the attempt and waits for its end.
func (h *Host) attemptCheck(ctx context.Context, pl *plan, sub *subscription.Subscription) (*delivery.Attempt, error) {
	sink := make(answer, 1)
	h.metrics.open.Add(1)
	p := h.newPending(sub, &delivery.Job{Event: &delivery.Event{}, MaxAttempts: 1}, sink)
	p.Ownership = true
	h.submit(p, pl)
	select {
	case r := <-sink:
		if r.Cause == delivery.CauseUnspent {
			return nil, fmt.Errorf("%w: %s", ErrUnavailable, r.Error)
		}
		return &r.Attempt, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("ownership check: %w", context.Cause(ctx))
	}
}
