package client

import (
	"context"
	"errors"
	"iter"
	"time"

	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// DeliveryChange is a delivery right after it was made, has gone on or has ended.
type DeliveryChange struct {
	Delivery *grapnelv1.Delivery
	// ResumeToken goes on behind this change: see ResumeFrom.
	ResumeToken string
}

// ResumeFrom has a watch go on behind what an earlier one has told, of this process or another.
func ResumeFrom(token string) ListOption { return func(s *listSettings) { s.resume = token } }

// Watching has f called with a resume token whenever a watch stands, from when on nothing is left out, and with each heartbeat.
func Watching(f func(token string)) ListOption { return func(s *listSettings) { s.watching = f } }

// silence is after how long without a message, not even a heartbeat, a watch takes its stream for dead.
const silence = time.Minute

// mostLost is how often a watch goes on without getting any further, unless no server is there.
const mostLost = 5

// WatchDeliveries tells what becomes of a namespace's deliveries, each change once, those of a delivery in order; Filter,
// ResumeFrom and Watching have a say. It goes on after a connection that broke, a server that was restarted and a loop that
// was slow, for as long as the server keeps changes; a server that is not there to begin with is an error, as it is of other
// lists. An error is yielded once, last: ErrResumeTokenExpired when it was away for too long, ctx's when that has ended, and
// what is wrong with the request.
func (c *Client) WatchDeliveries(ctx context.Context, namespace string, opts ...ListOption) iter.Seq2[DeliveryChange, error] {
	s := listOptions(opts)
	r := &grapnelv1.WatchDeliveriesRequest{Parent: namespaceName(namespace), Filter: s.filter}
	return watch(ctx, s, func(ctx context.Context, token string) (receiving[*grapnelv1.WatchDeliveriesResponse], error) {
		r.ResumeToken = token
		return c.DeliveryService().WatchDeliveries(ctx, r)
	}, func(m *grapnelv1.WatchDeliveriesResponse) (DeliveryChange, bool) {
		return DeliveryChange{m.GetDelivery(), m.GetResumeToken()}, m.GetDelivery() != nil
	})
}

// SubscriptionChange is a subscription after it was made, changed or deleted.
type SubscriptionChange struct {
	// Subscription is as it was last when it is Deleted, with its name only where that is not known any more.
	Subscription *grapnelv1.Subscription
	Deleted      bool
	// ResumeToken goes on behind this change: see ResumeFrom.
	ResumeToken string
}

// Watch tells which subscriptions of the namespace are made, changed and deleted, in order, as WatchDeliveries tells what becomes
// of deliveries. To one who was away ErrResumeTokenExpired comes sooner: see the RPC.
func (s Subscriptions) Watch(ctx context.Context, opts ...ListOption) iter.Seq2[SubscriptionChange, error] {
	set := listOptions(opts)
	r := &grapnelv1.WatchSubscriptionsRequest{Parent: namespaceName(s.namespace), Filter: set.filter}
	return watch(ctx, set, func(ctx context.Context, token string) (receiving[*grapnelv1.WatchSubscriptionsResponse], error) {
		r.ResumeToken = token
		return s.c.SubscriptionService().WatchSubscriptions(ctx, r)
	}, func(m *grapnelv1.WatchSubscriptionsResponse) (SubscriptionChange, bool) {
		return SubscriptionChange{m.GetSubscription(), m.GetDeleted(), m.GetResumeToken()}, m.GetSubscription() != nil
	})
}

// receiving is a stream of a watch.
type receiving[M any] interface{ Recv() (M, error) }

// watch yields what change makes of the messages of streams, false for a heartbeat, each opened where the one before has ended.
func watch[M interface{ GetResumeToken() string }, T any](ctx context.Context, s listSettings,
	open func(ctx context.Context, token string) (receiving[M], error), change func(M) (T, bool)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		w := watcher[M, T]{open: open, change: change, token: s.resume, watching: s.watching, tell: func(ch T) bool { return yield(ch, nil) }}
		var none T
		for try := 1; ; try++ {
			token := w.token
			more, err := w.once(ctx)
			if w.token != token {
				try = 0
			}
			if !more {
				return
			}
			e := FromError(err)
			if ctx.Err() != nil || w.token == "" || !lostWatch(e) || try > mostLost && e.Code != codes.Unavailable || !sleep(ctx, max(backoff(max(try, 1)), e.RetryAfter)) {
				if ctx.Err() != nil { // the caller's wish before all
					yield(none, context.Cause(ctx))
					return
				}
				yield(none, e)
				return
			}
		}
	}
}

// lostWatch tells errors behind which a watch may go on.
func lostWatch(e *Error) bool {
	switch e.Code {
	case codes.Unavailable, codes.Internal, codes.Unknown, codes.Canceled, codes.DeadlineExceeded: // of the stream, and not of the caller
		return true
	case codes.Aborted:
		return errors.Is(e, ErrSlowConsumer)
	case codes.ResourceExhausted:
		return e.RetryAfter > 0
	}
	return false
}

type watcher[M interface{ GetResumeToken() string }, T any] struct {
	open     func(ctx context.Context, token string) (receiving[M], error)
	change   func(M) (T, bool)
	token    string
	watching func(token string)
	tell     func(T) bool
}

// once is one stream. It reports false when the loop has had enough.
func (w *watcher[M, T]) once(ctx context.Context) (more bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dead := time.AfterFunc(silence, cancel)
	defer dead.Stop()
	stream, err := w.open(ctx, w.token)
	if err != nil {
		return true, err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return true, err
		}
		w.token = m.GetResumeToken()
		ch, told := w.change(m)
		if !told && w.watching != nil {
			w.watching(w.token)
		}
		if told {
			dead.Stop() // the loop takes the time that it takes
			if !w.tell(ch) {
				return false, nil
			}
		}
		dead.Reset(silence)
	}
}
