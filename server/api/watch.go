package api

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	defaultHeartbeat = 15 * time.Second
	// watchAhead is how many messages wait to be sent to one who watches, beside what flow control lets through.
	watchAhead = 64
	// watchAheadBytes is how much that may be, and allAheadBytes of all who watch.
	watchAheadBytes, allAheadBytes = 256 << 10, 64 << 20
)

// Why a watch ends before its caller does.
var (
	errWatchDrains = unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the server is stopping; go on from the last resume_token elsewhere", time.Second)
	errWatchAged   = unavailable(grapnelv1.ErrorReason_ERROR_REASON_DRAINING, "the connection has grown old; go on from the last resume_token on another one", time.Millisecond)
)

// WatchDeliveries tells what becomes of a namespace's deliveries.
func (s deliveryService) WatchDeliveries(r *grapnelv1.WatchDeliveriesRequest, stream grpc.ServerStreamingServer[grapnelv1.WatchDeliveriesResponse]) error {
	return watch(s.Server, r, stream, func(ns string, ch *delivery.Change, d *delivery.Delivery, token string) (*grapnelv1.WatchDeliveriesResponse, error) {
		m := &grapnelv1.WatchDeliveriesResponse{ResumeToken: token}
		if ch != nil {
			m.Delivery, m.AttemptEnded = s.deliveryProto(ns, d, false), ch.Attempted
		}
		return m, nil
	})
}

// WatchAttempts tells of the attempts at a namespace's deliveries as they end.
func (s deliveryService) WatchAttempts(r *grapnelv1.WatchAttemptsRequest, stream grpc.ServerStreamingServer[grapnelv1.WatchAttemptsResponse]) error {
	return watch(s.Server, r, stream, func(ns string, ch *delivery.Change, d *delivery.Delivery, token string) (*grapnelv1.WatchAttemptsResponse, error) {
		m := &grapnelv1.WatchAttemptsResponse{ResumeToken: token}
		switch {
		case ch == nil:
			return m, nil
		case !ch.Attempted || d.Last == nil:
			return nil, nil
		}
		last := d.Last
		if r.GetIncludeBodies() {
			attempts, err := s.Journal.Attempts(d.Namespace, d.ID)
			if err != nil && !errors.Is(err, delivery.ErrNotFound) {
				return nil, err
			}
			if i := slices.IndexFunc(attempts, func(a delivery.Attempt) bool { return a.Number == last.Number }); i >= 0 {
				last = &attempts[i]
			}
		}
		m.Attempt, m.Delivery = s.attemptProto(last, r.GetIncludeBodies()), s.deliveryProto(ns, d, false)
		m.Delivery.LastAttempt = nil
		return m, nil
	})
}

// watchRequest is what requests to watch have in common.
type watchRequest interface {
	GetParent() string
	GetFilter() string
	GetResumeToken() string
	GetHeartbeat() *durationpb.Duration
}

// watch sends what message makes of the changes of a namespace's deliveries, nothing where that is nil. It is asked for a
// heartbeat by a change that is nil.
func watch[M any](s *Server, r watchRequest, stream grpc.ServerStreamingServer[M],
	message func(ns string, ch *delivery.Change, d *delivery.Delivery, token string) (*M, error)) error {
	ns, space, err := s.existingNamespace("parent", r.GetParent())
	if err != nil {
		return err
	}
	f, err := parseFilter(r.GetFilter(), deliveryFields(ns))
	if err != nil {
		return err
	}
	q, err := watchQuery(space, f)
	if err != nil {
		return err
	}
	if q.After, err = delivery.ParsePosition(r.GetResumeToken()); err != nil {
		return notAToken()
	}
	if !s.edge.tailsOf.enter(ns) {
		return s.edge.tailsOf.refusal(ns, "watches")
	}
	defer s.edge.tailsOf.leave(ns)
	w, err := s.Journal.Watch(stream.Context(), q)
	if err != nil {
		return watchError(err)
	}
	defer w.Close()
	heartbeat := heartbeatOf(r)
	ctx, end := s.watchContext(stream.Context())
	defer end()
	out := sendTo(stream, s.WatchPatience, &s.edge.tailBytes)
	defer out.close()
	var quiet time.Time
	for first := true; ; first = false {
		var ch *delivery.Change
		if !first { // it begins with a heartbeat
			if ch, err = nextChange(ctx, w, quiet); err != nil {
				return watchError(err)
			}
		}
		var d *delivery.Delivery
		if ch == nil {
			if _, now, err := s.existingNamespace("parent", r.GetParent()); err != nil {
				return err
			} else if now != space { // deleted, and made anew
				return notFound(r.GetParent(), "namespace")
			}
		} else if d, err = ch.Delivery(); errors.Is(err, delivery.ErrNotFound) { // erased meanwhile
			continue
		} else if err != nil {
			return watchError(err)
		}
		token := w.Position().String()
		var m *M
		if ch == nil || f.Match(shownDelivery{d, false}) {
			if m, err = message(ns, ch, d, token); err != nil {
				return err
			}
		}
		if m == nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if time.Now().Before(quiet) {
				continue
			}
			if m, err = message(ns, nil, nil, token); err != nil { // much is told, but not what is wanted
				return err
			}
		}
		if err := out.send(ctx, m, nil); err != nil {
			return err
		}
		quiet = time.Now().Add(heartbeat)
	}
}

func heartbeatOf(r watchRequest) time.Duration {
	if r.GetHeartbeat() == nil {
		return defaultHeartbeat
	}
	return r.GetHeartbeat().AsDuration()
}

func notAToken() *Error {
	return invalid(Violation{"resume_token", "must be from a message of a watch, as it came", "resume_token"})
}

// watchQuery is what the journal can use of a filter.
func watchQuery(space delivery.NamespaceKey, f *filter.Filter[shownDelivery]) (delivery.WatchQuery, error) {
	q := delivery.WatchQuery{Namespace: space}
	if values, known := f.OneOf("state"); known {
		if len(values) > 0 && !slices.ContainsFunc(values, func(v string) bool { return v != "IN_FLIGHT" }) {
			return q, filterError("a watch does not tell when attempts begin, so that no delivery is IN_FLIGHT in it; say PENDING or SCHEDULED", 0, nil)
		}
		q.States = storedStates(values)
	}
	// By uid only: the name may be another subscription's while the watch goes on.
	if values, known := f.OneOf("subscription_uid"); known && len(values) == 1 {
		if u, err := uuid.Parse(values[0]); err == nil {
			q.Subscription = delivery.UID(u).SubscriptionKey()
		}
	}
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
	case errors.Is(err, delivery.ErrExpired), errors.Is(err, subscription.ErrCompacted):
		return &Error{
			code: codes.OutOfRange, reason: grapnelv1.ErrorReason_ERROR_REASON_RESUME_TOKEN_EXPIRED,
			message: "what has changed since the resume_token is not kept any more: list what there is, and begin without a token",
		}
	case errors.Is(err, delivery.ErrTooManyWatched), errors.Is(err, delivery.ErrTooManyWide):
		return rateLimited("watches", err.Error(), time.Minute)
	}
	return err
}

// outbox sends messages to one who watches, and notices when nobody reads them.
type outbox[M any] struct {
	messages chan waitingMessage[M]
	failed   chan error
	patience time.Duration
	// queued are the bytes of what waits, and all those of all who watch.
	queued atomic.Int64
	all    *atomic.Int64
	freed  chan struct{}
}

type waitingMessage[M any] struct {
	message *M
	size    int64
}

func sendTo[M any](stream grpc.ServerStreamingServer[M], patience time.Duration, all *atomic.Int64) *outbox[M] {
	o := &outbox[M]{
		messages: make(chan waitingMessage[M], watchAhead), failed: make(chan error, 1), patience: patience,
		all: all, freed: make(chan struct{}, 1),
	}
	go func() {
		for m := range o.messages {
			err := stream.Send(m.message)
			o.add(-m.size)
			select {
			case o.freed <- struct{}{}:
			default:
			}
			if err != nil {
				o.failed <- err
				break
			}
		}
		for m := range o.messages { // nobody gets them
			o.add(-m.size)
		}
	}()
	return o
}

func (o *outbox[M]) add(size int64) {
	o.queued.Add(size)
	o.all.Add(size)
}

// close has the sender end when it has sent what it can.
func (o *outbox[M]) close() { close(o.messages) }

// fits reports whether a message may wait with the others. One alone may, whatever its size.
func (o *outbox[M]) fits(size int64) bool {
	queued := o.queued.Load() // below zero where something was sent before it was counted
	return queued <= 0 || queued+size <= watchAheadBytes && o.all.Load()+size <= allAheadBytes
}

// offer reports whether there was room for the message.
func (o *outbox[M]) offer(m waitingMessage[M]) bool {
	if !o.fits(m.size) {
		return false
	}
	select {
	case o.messages <- m:
		o.add(m.size)
		return true
	default:
		return false
	}
}

// send waits for room. meanwhile, if not nil, is called before it has to.
func (o *outbox[M]) send(ctx context.Context, m *M, meanwhile func()) error {
	next := waitingMessage[M]{m, int64(proto.Size(any(m).(proto.Message)))}
	if o.offer(next) {
		return nil
	}
	if meanwhile != nil {
		meanwhile()
	}
	late := time.NewTimer(o.patience)
	defer late.Stop()
	for {
		room := o.messages
		if !o.fits(next.size) {
			room = nil
		}
		select {
		case room <- next:
			o.add(next.size)
			return nil
		case <-o.freed:
		case err := <-o.failed:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-late.C:
			return &Error{
				code: codes.Aborted, reason: grapnelv1.ErrorReason_ERROR_REASON_SLOW_CONSUMER,
				message: "nothing has been read for " + o.patience.String() + "; go on from the last resume_token that you have read",
			}
		}
	}
}
