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
	return func(yield func(DeliveryChange, error) bool) {
		r := &grapnelv1.WatchDeliveriesRequest{Parent: namespaceName(namespace), Filter: s.filter, ResumeToken: s.resume}
		for try := 1; ; try++ {
			token := r.ResumeToken
			more, err := c.watchOnce(ctx, r, &s, func(ch DeliveryChange) bool { return yield(ch, nil) })
			if r.ResumeToken != token {
				try = 0
			}
			if !more {
				return
			}
			e := FromError(err)
			if ctx.Err() != nil || r.ResumeToken == "" || !lostWatch(e) || try > mostLost && e.Code != codes.Unavailable || !sleep(ctx, max(backoff(max(try, 1)), e.RetryAfter)) {
				if ctx.Err() != nil { // the caller's wish before all
					yield(DeliveryChange{}, context.Cause(ctx))
					return
				}
				yield(DeliveryChange{}, e)
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

// watchOnce is one stream. It reports false when the loop has had enough.
func (c *Client) watchOnce(ctx context.Context, r *grapnelv1.WatchDeliveriesRequest, s *listSettings, tell func(DeliveryChange) bool) (more bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dead := time.AfterFunc(silence, cancel)
	defer dead.Stop()
	stream, err := c.DeliveryService().WatchDeliveries(ctx, r)
	if err != nil {
		return true, err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return true, err
		}
		r.ResumeToken = m.GetResumeToken()
		if m.GetDelivery() == nil && s.watching != nil {
			s.watching(r.ResumeToken)
		}
		if m.GetDelivery() != nil {
			dead.Stop() // the loop takes the time that it takes
			if !tell(DeliveryChange{m.GetDelivery(), r.ResumeToken}) {
				return false, nil
			}
		}
		dead.Reset(silence)
	}
}
