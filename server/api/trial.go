package api

import (
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// Errors that adapters of the Engine interface return.
var (
	// ErrTestLimited means that the subscription was tested less than a second ago.
	ErrTestLimited = errors.New("tested less than a second ago")
	// ErrStopping means that dispatch takes no more work.
	ErrStopping = errors.New("dispatch is stopping")
)

// testEventType is the type of the event that TestSubscription sends when the caller brings none.
const testEventType = "grapnel.test"

// TestSubscription makes one attempt now, with what the transformer makes of the event where there is one. It is OK whatever the target does; paused and disabled
// subscriptions can be tested too, also in a namespace that is, so that one can look before resuming; but not while
// all dispatch is paused.
func (s subscriptionService) TestSubscription(ctx context.Context, r *grapnelv1.TestSubscriptionRequest) (*grapnelv1.TestSubscriptionResponse, error) {
	sub, err := s.find(r.GetName())
	if err != nil {
		return nil, err
	}
	if err := s.writable(sub.Namespace); err != nil {
		return nil, err
	}
	if d := s.Registry.Snapshot().Dispatch(); d.Paused {
		return nil, invalidState(clusterName, "all dispatch is paused ("+d.Reason+"), and a test is an attempt; ResumeDispatch ends that")
	}
	event, err := testEvent(sub, r.GetEvent(), time.Now())
	if err == nil && r.GetEvent().GetType() != "" && r.GetEvent().GetPayload() == nil {
		err = s.fill(ctx, sub.Namespace, event, r.GetEvent().GetDataContentType() == "")
	}
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	result, err := s.Engine.Test(ctx, sub, event)
	switch {
	case errors.Is(err, ErrTestLimited):
		return nil, rateLimited(r.GetName(), "one test a second is made of a subscription", time.Second)
	case errors.Is(err, ErrStopping):
		return nil, unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the server is stopping", time.Second)
	case err != nil:
		return nil, toStatus(err, r.GetName())
	}
	out := &grapnelv1.TestSubscriptionResponse{Transformed: transformedProto(&result)}
	if result.Cause != delivery.CauseDropped {
		out.Attempt = s.attemptProto(&result.Attempt, true)
	}
	return out, nil
}

// transformedProto is what became of a trial's event; nil where no transformer has made anything of it.
func transformedProto(r *delivery.Result) *grapnelv1.TransformedEvent {
	switch {
	case r.Cause == delivery.CauseDropped:
		return &grapnelv1.TransformedEvent{Dropped: true, DropReason: r.Error}
	case r.Made == nil:
		return nil
	}
	out := &grapnelv1.TransformedEvent{Body: r.Made.Body, ContentType: r.Made.ContentType, Headers: map[string]string{}}
	for _, h := range r.Made.Headers {
		out.Headers[h.Name] = h.Value
	}
	return out
}

// fill gives an event without a payload a sample of its type, where that is registered, and if it is untyped the content
// type of one.
func (s subscriptionService) fill(ctx context.Context, ns string, event *delivery.Event, untyped bool) (err error) {
	t := s.EventTypes.In(ns).Get(event.Type)
	if t == nil || t.Proto.GetExample() == "" && len(t.Proto.GetSchemas()) == 0 {
		return nil
	}
	if event.Payload, _, err = t.Sample(ctx, event.Schema); err != nil {
		return err
	}
	if untyped {
		event.ContentType = "application/json"
	}
	return nil
}

// testEvent makes the event of a test: what the caller brings, or a sample. It is never stored, so nothing
// else gives it an id.
func testEvent(sub *subscription.Subscription, e *grapnelv1.Event, now time.Time) (*delivery.Event, error) {
	if proto.Size(e) == 0 {
		e = &grapnelv1.Event{
			Type:            testEventType,
			Subject:         sub.ID,
			DataContentType: "application/json",
			Payload:         &grapnelv1.Event_Text{Text: `{"message":"A test of this subscription by Grapnel. There is nothing to do."}`},
		}
	}
	event, faults := eventOf(sub.Namespace, e, now)
	if len(faults) > 0 {
		return nil, invalid(under("event", faults)...)
	}
	if event.ID == "" {
		event.ID = "test-" + strings.ToLower(rand.Text())
	}
	return event, nil
}
