package pluginhost

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/check"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/subscription"
)

// TryTransformer has the transformer of a subscription, which need not be stored and is not otherwise looked at, transform an
// event. Nothing is sent or stored. The result has Made where it succeeded, and CauseDropped where nothing would be sent. It
// takes timeout at most. The error is ErrUnknownPlugin, ErrUnavailable, or ctx's.
func (h *Host) TryTransformer(ctx context.Context, sub *grapnelv1.Subscription, event *delivery.Event, timeout time.Duration) (*delivery.Result, error) {
	id := check.TransformerID(sub.GetTransformer())
	switch k := h.kinds.get(id); {
	case k == nil:
		return nil, h.missing(id)
	case k.Role() != "transformer":
		return nil, fmt.Errorf("%w: plugins/%s is a %s, want a transformer", ErrUnknownPlugin, id, k.Role())
	}
	b, err := h.resolve("transformer", id, sub.GetTransformer())
	if err != nil {
		return nil, err
	}
	asked := subscription.Of(sub)
	asked.MaxInFlight, asked.AttemptTimeout = 1, timeout
	_, _ = rand.Read(asked.UID[:]) // an instance of its own; it never fails
	pl := &plan{uid: asked.UID, uri: sub.GetUri(), timeout: timeout, grace: h.timing.grace, shape: wire.ShapeOf(sub)}
	defer h.retire(pl)
	ref, err := h.configureOne(pl, asked, sub, b)
	var refused *refusedError
	switch {
	case errors.As(err, &refused):
		return &delivery.Result{Cause: delivery.CausePlugin, Attempt: delivery.Attempt{Outcome: delivery.OutcomePluginError, Error: refused.why}}, nil
	case err != nil:
		return nil, fmt.Errorf("%w: plugins/%s: %w", ErrUnavailable, id, err)
	}
	pl.transformer = &hop{conn: b.conn, ref: ref, id: id}
	sink := make(answer, 1)
	h.metrics.open.Add(1)
	p := h.newPending(asked, &delivery.Job{Event: event, MaxAttempts: 1}, sink)
	p.tried = true
	p.plan, p.Timeout, p.Ref = pl, timeout, ref
	if b.conn.transforms.enqueue(p) != accepted {
		h.unspent(p, "the plugin was restarted meanwhile")
	}
	select {
	case r := <-sink:
		if r.Cause == delivery.CauseUnspent {
			return nil, fmt.Errorf("%w: %s", ErrUnavailable, r.Error)
		}
		return &r, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("try plugins/%s: %w", id, context.Cause(ctx))
	}
}
