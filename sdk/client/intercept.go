package client

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// How long and how often waitForQuota obeys a server that asks to wait.
const (
	maxQuotaWaits = 3
	maxQuotaWait  = 10 * time.Second
)

// unaryErrors makes every failure an *Error.
func unaryErrors(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if err := invoke(ctx, method, req, reply, cc, opts...); err != nil {
		return FromError(err)
	}
	return nil
}

// waitForQuota repeats a publish that was refused with a wait, because gRPC's own retries look at the
// pushback trailer only and give up after a fixed count. Events with an ID only: without one a repeat
// could publish twice.
func waitForQuota(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	for waits := 0; ; waits++ {
		err := invoke(ctx, method, req, reply, cc, opts...)
		if err == nil || waits == maxQuotaWaits || !idempotentPublish(req) {
			return err
		}
		e := FromError(err)
		if e.Code != codes.ResourceExhausted || !e.Retryable() || e.RetryAfter <= 0 || e.RetryAfter > maxQuotaWait {
			return err
		}
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < e.RetryAfter {
			return err
		}
		if !sleep(ctx, e.RetryAfter) {
			return err
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
