package api

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
)

const (
	defaultHeartbeat = 15 * time.Second
	// watchAhead is how many messages wait to be sent to one who watches, beside what flow control lets through.
	watchAhead = 64
)

// Why a watch ends before its caller does.
var (
	errWatchDrains = unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the server is stopping; go on from the last resume_token elsewhere", time.Second)
	errWatchAged   = unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the connection has grown old; go on from the last resume_token on another one", time.Millisecond)
)

// WatchDeliveries tells what becomes of a namespace's deliveries.
func (s deliveryService) WatchDeliveries(r *grapnelv1.WatchDeliveriesRequest, stream grpc.ServerStreamingServer[grapnelv1.WatchDeliveriesResponse]) error {
	ns, space, err := s.existingNamespace("parent", r.GetParent())
	if err != nil {
		return err
	}
	f, err := parseFilter(r.GetFilter(), deliveryFields(ns))
	if err != nil {
		return err
	}
	q, err := s.watchQuery(ns, space, f)
	if err != nil {
		return err
	}
	if q.After, err = delivery.ParsePosition(r.GetResumeToken()); err != nil {
		return invalid(Violation{"resume_token", "must be from a message of WatchDeliveries, as it came", "resume_token"})
	}
	if !s.edge.streamsOf.enter(ns) {
		return s.edge.streamsOf.refusal(ns, "streams")
	}
	defer s.edge.streamsOf.leave(ns)
	w, err := s.Journal.Watch(stream.Context(), q)
	if err != nil {
		return watchError(err)
	}
	defer w.Close()
	heartbeat := defaultHeartbeat
	if r.GetHeartbeat() != nil {
		heartbeat = r.GetHeartbeat().AsDuration()
	}
	ctx, end := s.watchContext(stream.Context())
	defer end()
	out := s.sendTo(stream)
	defer out.close()
	if err := out.send(ctx, &grapnelv1.WatchDeliveriesResponse{ResumeToken: w.Position().String()}); err != nil {
		return err
	}
	quiet := time.Now()
	for {
		ch, err := nextChange(ctx, w, quiet.Add(heartbeat))
		if err != nil {
			return watchError(err)
		}
		m := &grapnelv1.WatchDeliveriesResponse{}
		if ch != nil {
			d, err := ch.Delivery()
			switch {
			case errors.Is(err, delivery.ErrNotFound): // erased meanwhile
				continue
			case err != nil:
				return watchError(err)
			case !f.Match(shownDelivery{d, false}):
				continue
			}
			m.Delivery = s.deliveryProto(ns, d, false)
		} else if now, _, err := s.existingNamespace("parent", r.GetParent()); err != nil || now != ns {
			return err
		}
		m.ResumeToken = w.Position().String()
		if err := out.send(ctx, m); err != nil {
			return err
		}
		quiet = time.Now()
	}
}

// watchQuery is what the journal can use of a filter.
func (s *Server) watchQuery(ns string, space delivery.NamespaceKey, f *filter.Filter[shownDelivery]) (delivery.WatchQuery, error) {
	q := delivery.WatchQuery{Namespace: space}
	if values, known := f.OneOf("state"); known {
		if !slices.ContainsFunc(values, func(v string) bool { return v != "IN_FLIGHT" }) && len(values) > 0 {
			return q, filterError("a watch does not tell when attempts begin, so that no delivery is IN_FLIGHT in it; say PENDING or SCHEDULED", 0, nil)
		}
		q.States = storedStates(values)
	}
	list := delivery.Query{Namespace: space}
	s.narrow(&list, ns, f) // where nothing can pass, nothing does
	q.Subscription = list.Subscription
	return q, nil
}

// nextChange is nil when there is none until then.
func nextChange(ctx context.Context, w *delivery.Watcher, until time.Time) (*delivery.Change, error) {
	waiting, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	ch, err := w.Next(waiting)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, nil
	}
	return ch, err
}

// watchContext ends with the stream, when the server stops, and when the connection has grown old.
func (s *Server) watchContext(stream context.Context) (ctx context.Context, end func()) {
	ctx, cancel := context.WithCancelCause(stream)
	old := s.old(stream)
	go func() {
		defer old.Stop()
		select {
		case <-s.draining:
			cancel(errWatchDrains)
		case <-old.C:
			cancel(errWatchAged)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(context.Canceled) }
}

func watchError(err error) error {
	switch {
	case errors.Is(err, delivery.ErrExpired):
		return &Error{
			code: codes.OutOfRange, reason: grapnelv1.ErrorReason_ERROR_REASON_RESUME_TOKEN_EXPIRED,
			message: "what has changed since the resume_token is not kept any more: list what there is, and begin without a token",
		}
	case errors.Is(err, delivery.ErrTooManyWatched):
		return rateLimited("watches", err.Error(), time.Minute)
	}
	return err
}

// outbox sends messages to one who watches, and notices when nobody reads them.
type outbox struct {
	messages chan *grapnelv1.WatchDeliveriesResponse
	failed   chan error
	patience time.Duration
	last     string // token of the last message that was taken on
}

func (s *Server) sendTo(stream grpc.ServerStreamingServer[grapnelv1.WatchDeliveriesResponse]) *outbox {
	o := &outbox{messages: make(chan *grapnelv1.WatchDeliveriesResponse, watchAhead), failed: make(chan error, 1), patience: s.WatchPatience}
	go func() {
		for m := range o.messages {
			if err := stream.Send(m); err != nil {
				o.failed <- err
				return
			}
		}
	}()
	return o
}

// close has the sender end when it has sent what it can.
func (o *outbox) close() { close(o.messages) }

func (o *outbox) send(ctx context.Context, m *grapnelv1.WatchDeliveriesResponse) error {
	select {
	case o.messages <- m:
		o.last = m.GetResumeToken()
		return nil
	default:
	}
	late := time.NewTimer(o.patience)
	defer late.Stop()
	select {
	case o.messages <- m:
		o.last = m.GetResumeToken()
		return nil
	case err := <-o.failed:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-late.C:
		return &Error{
			code: codes.Aborted, reason: grapnelv1.ErrorReason_ERROR_REASON_SLOW_CONSUMER,
			message:  "nothing has been read for " + o.patience.String() + "; go on from the last resume_token that you have read",
			metadata: map[string]string{"resume_token": o.last},
		}
	}
}
