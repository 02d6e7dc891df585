package client

import (
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// How often and for how long repeatPublish tries.
const (
	maxPublishTries = 5
	maxPublishWait  = 10 * time.Second
)

// unaryErrors makes every failure an *Error.
func unaryErrors(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if err := invoke(ctx, method, req, reply, cc, opts...); err != nil {
		return FromError(err)
	}
	return nil
}

// once is for calls whose caller does the repeating.
type once struct{ grpc.EmptyCallOption }

// repeatPublish returns an interceptor that repeats a publish that a server was not ready for, or whose
// connection broke. The shipped service config leaves that to clients, because it cannot tell events with an
// ID from those without, which a repeat could store twice; nor would gRPC's own retries wait as long as the
// server asks, or tell that an earlier try may have stored what a later one is refused for.
func repeatPublish(failFast bool) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if !idempotentPublish(req) || slices.ContainsFunc(opts, func(o grpc.CallOption) bool { _, is := o.(once); return is }) {
			return invoke(ctx, method, req, reply, cc, opts...)
		}
		unknown := false
		for try := 1; ; try++ {
			err := invoke(ctx, method, req, reply, cc, opts...)
			if err == nil {
				return nil
			}
			e := FromError(err)
			v := verdictOf(e)
			unknown = unknown || !v.known()
			e.lost = unknown
			wait := max(backoff(try), e.RetryAfter)
			deadline, bounded := ctx.Deadline()
			switch {
			case try == maxPublishTries, v != deferred && e.Code != codes.Unavailable:
				return e
			case failFast && e.Reason == "", wait > maxPublishWait, bounded && time.Until(deadline) < wait:
				return e
			case !sleep(ctx, wait):
				return e
			}
		}
	}
}

func idempotentPublish(req any) bool {
	switch r := req.(type) {
	case *grapnelv1.PublishRequest:
		return r.GetEvent().GetId() != ""
	case *grapnelv1.BatchPublishRequest:
		for _, event := range r.GetEvents() {
			if event.GetId() == "" {
				return false
			}
		}
		return true
	}
	return false
}

// sleep reports whether d passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// streamErrors makes every failure of a stream an *Error, but not its proper end, io.EOF.
func streamErrors(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, FromError(err)
	}
	return errorStream{stream}, nil
}

type errorStream struct{ grpc.ClientStream }

func (s errorStream) RecvMsg(m any) error { return streamError(s.ClientStream.RecvMsg(m)) }

func (s errorStream) SendMsg(m any) error { return streamError(s.ClientStream.SendMsg(m)) }

func streamError(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return FromError(err)
}
