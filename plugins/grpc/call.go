package grpcplugin

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	receiverv1 "github.com/grapnel/grapnel/proto/grapnel/receiver/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// clockSkew is how much earlier than here a deadline may pass at the receiver, which counts from the
// arrival of a rounded duration.
const clockSkew = 50 * time.Millisecond

// call is one call on one link.
type call struct {
	link *link
	keep int // of the status message
	// secret is what the receiver is shown, and what is taken out of what it says.
	secret string

	// suspect says that the link should take no further calls.
	suspect bool
	// unsent says that the link had ended before any of the call was sent.
	unsent bool
}

// progress is how far a call has come. Its fields are set on gRPC's goroutines.
type progress struct {
	begun    atomic.Bool // the request's header was handed to the connection
	answered atomic.Bool // the receiver sent a status
}

type progressKey struct{}

func (c *call) do(ctx context.Context, m *receiverv1.DeliverRequest) (*plugin.Response, error) {
	var p progress
	began := time.Now()
	ended := c.link.call()
	_, err := receiverv1.NewReceiverServiceClient(c.link.client).Deliver(context.WithValue(ctx, progressKey{}, &p), m)
	ended()
	peer := c.link.conn.Peer()
	st := status.Convert(err)
	state := plugin.NotSent
	if p.begun.Load() {
		state = plugin.MaybeSent
	}
	switch deadline, _ := ctx.Deadline(); {
	case p.answered.Load() && st.Code() == codes.DeadlineExceeded && time.Until(deadline) < clockSkew:
		return nil, outbound.Late(plugin.Sent, peer) // the receiver gave up at the deadline that it was told
	case p.answered.Load():
		return response(st, c.secret, c.keep, peer), nil
	case ctx.Err() != nil, st.Code() == codes.DeadlineExceeded:
		c.suspect = !c.link.conn.HeardSince(began)
		return nil, interrupted(ctx, state, peer)
	case state == plugin.NotSent && !c.link.Usable():
		c.unsent = true
		return nil, &plugin.Failure{
			Source: plugin.SourceEndpoint, Code: plugin.CodeConnect, WireState: plugin.NotSent, Peer: peer,
			Message: "the receiver ends connections before they can be used",
		}
	case state == plugin.NotSent:
		return nil, outbound.Unfit("gRPC did not take the call: " + st.Code().String())
	case c.link.conn.Broke() != nil:
		return nil, outbound.Lost(plugin.MaybeSent, peer)
	}
	return nil, &plugin.Failure{
		Source: plugin.SourceEndpoint, Code: plugin.CodeProtocol, WireState: plugin.MaybeSent, Peer: peer,
		Message: "the receiver did not answer in gRPC",
	}
}

// interrupted is a call that gRPC gave up for its deadline, perhaps a moment before ctx did.
func interrupted(ctx context.Context, state plugin.WireState, peer string) *plugin.Failure {
	f := outbound.Interrupted(ctx, state, peer)
	if state == plugin.NotSent && f.Code == plugin.CodeTimeout {
		f.Message = "the receiver took no more calls on the connection"
	}
	return f
}

// follower is a stats.Handler that notes how far each call has come. gRPC's own retry is of calls that the
// receiver says it has not looked at: those begin anew.
type follower struct{}

func (follower) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

func (follower) HandleRPC(ctx context.Context, s stats.RPCStats) {
	p, ok := ctx.Value(progressKey{}).(*progress)
	if !ok {
		return
	}
	switch s := s.(type) {
	case *stats.Begin:
		if s.IsTransparentRetryAttempt {
			p.begun.Store(false)
		}
	case *stats.OutHeader:
		p.begun.Store(true)
	case *stats.InTrailer:
		p.answered.Store(true)
	}
}

func (follower) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (follower) HandleConn(context.Context, stats.ConnStats) {}
