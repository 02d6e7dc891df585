package api

import (
	"context"
	"encoding/hex"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/encoding/gzip" // answers are compressed for callers that ask
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Limits of the listener.
const (
	maxMessage = 4 << 20
	// messageSlack lets a batch of exactly maxMessage bytes through, so that the refusal above it is ours.
	messageSlack = 256 << 10
	// defaultDeadline is given to unary calls that come without one.
	defaultDeadline = 30 * time.Second
)

// Header and trailer keys.
const (
	requestIDKey = "x-request-id"
	pushbackKey  = "grpc-retry-pushback-ms"
)

// ServerOptions is what grpc.NewServer needs so that the promises of this package hold; credentials and
// listeners are the caller's.
func (s *Server) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(s.edge.unary),
		grpc.ChainStreamInterceptor(s.edge.stream),
		grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			method, _ := grpc.MethodFromServerStream(stream)
			return unknownMethod(method)
		}),
		grpc.MaxRecvMsgSize(maxMessage + messageSlack),
		grpc.MaxSendMsgSize(maxMessage + messageSlack),
		grpc.MaxConcurrentStreams(250),
		grpc.MaxHeaderListSize(16 << 10),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 20 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time:                  30 * time.Second,
			Timeout:               10 * time.Second,
			MaxConnectionIdle:     15 * time.Minute,
			MaxConnectionAge:      30 * time.Minute,
			MaxConnectionAgeGrace: 5 * time.Minute,
		}),
	}
}

// edge is what every call passes on its way in and out, in this order: access log and request id, metrics,
// recovery, in-flight limit, deadline, validation, handler. It sends nothing before the handler has decided,
// because grpc clients retry only answers that begin with their trailers.
type edge struct {
	server  *Server
	log     *slog.Logger
	metrics edgeMetrics
	unaries limiter
	streams limiter
}

func newEdge(s *Server) *edge {
	return &edge{
		server:  s,
		log:     s.log,
		metrics: newEdgeMetrics(s.Registerer),
		unaries: limiter{most: int64(s.MaxCalls)},
		streams: limiter{most: int64(s.MaxCalls)},
	}
}

func (e *edge) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := e.serveUnary(ctx, req, info.FullMethod, handler)
	if err = e.finish(ctx, info.FullMethod, start, req, err); err != nil {
		return nil, err
	}
	return resp, nil
}

func (e *edge) serveUnary(ctx context.Context, req any, method string, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, panicked(p, debug.Stack())
		}
	}()
	if !e.unaries.enter() {
		return nil, e.unaries.refusal()
	}
	defer e.unaries.leave()
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultDeadline)
		defer cancel()
	}
	if checkedByInterceptor(method) {
		if err := e.server.validate(req); err != nil {
			return nil, err
		}
	}
	if takesRoom(method) {
		if err := e.server.Room(); err != nil {
			return nil, err
		}
	}
	return handler(ctx, req)
}

// takesRoom tells the methods after which the configuration store holds more than before. To pause and to resume is
// not among them: that is what an operator may need most while room is short.
func takesRoom(method string) bool {
	switch method {
	case grapnelv1.NamespaceService_CreateNamespace_FullMethodName, grapnelv1.NamespaceService_UpdateNamespace_FullMethodName,
		grapnelv1.SubscriptionService_CreateSubscription_FullMethodName, grapnelv1.SubscriptionService_UpdateSubscription_FullMethodName,
		grapnelv1.SecretService_CreateSecret_FullMethodName, grapnelv1.SecretService_RotateSecret_FullMethodName:
		return true
	}
	return false
}

func (e *edge) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	start := time.Now()
	err := e.serveStream(srv, stream, info.FullMethod, handler)
	return e.finish(stream.Context(), info.FullMethod, start, nil, err)
}

func (e *edge) serveStream(srv any, stream grpc.ServerStream, method string, handler grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = panicked(p, debug.Stack())
		}
	}()
	if !e.streams.enter() {
		return e.streams.refusal()
	}
	defer e.streams.leave()
	if checkedByInterceptor(method) {
		stream = &checkedStream{ServerStream: stream, server: e.server}
	}
	return handler(srv, stream)
}

// checkedStream validates what is received.
type checkedStream struct {
	grpc.ServerStream
	server *Server
}

func (c *checkedStream) RecvMsg(m any) error {
	if err := c.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return c.server.validate(m)
}

// checkedByInterceptor tells the methods whose requests are validated here: ours, except PublishService,
// which answers per event and checks by hand because it is the hot path.
func checkedByInterceptor(method string) bool {
	return ours(method) && !strings.HasPrefix(method, "/grapnel.v1.PublishService/")
}

// ours tells the methods of this API from those of health and reflection.
func ours(method string) bool { return strings.HasPrefix(method, "/grapnel.v1.") }

// finish turns err into what the caller sees, and counts and logs the call.
func (e *edge) finish(ctx context.Context, method string, start time.Time, req any, err error) error {
	took := time.Since(start)
	var refusal *Error
	if err == nil {
		// The usual case, kept free of work.
	} else if ours(method) {
		refusal = toStatus(err, resourceOf(req))
	} else {
		refusal = fromStatus(err)
	}
	series := e.metrics.of(method)
	e.metrics.observe(series, refusal, took)
	level := levelOf(series, refusal)
	logged := e.log.Enabled(ctx, level)
	if refusal == nil && !logged {
		return nil
	}
	id := requestID(ctx)
	if refusal != nil {
		refusal = refusal.withRequest(id)
		trailer := metadata.Pairs(requestIDKey, id)
		if wait := refusal.pushback(); wait != "" {
			trailer.Set(pushbackKey, wait)
		}
		grpc.SetTrailer(ctx, trailer) //nolint:errcheck // fails only when the call is already answered
	}
	if logged {
		e.logCall(ctx, level, method, id, took, req, refusal)
	}
	if refusal == nil {
		return nil
	}
	return refusal
}

// logCall writes the access log. Of a request it takes the resource name, if it is one; the whole request
// goes to the log only through redact, and only when the server is at fault.
func (e *edge) logCall(ctx context.Context, level slog.Level, method, id string, took time.Duration, req any, refusal *Error) {
	attrs := make([]slog.Attr, 0, 10)
	attrs = append(attrs,
		slog.String("method", strings.TrimPrefix(method, "/")),
		slog.String("code", refusal.codeName()),
		slog.Duration("duration", took),
		slog.String("request_id", id),
	)
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		attrs = append(attrs, slog.String("peer", p.Addr.String()))
	}
	if name := resourceOf(req); isResourceName(name) {
		attrs = append(attrs, slog.String("resource", name))
	}
	if refusal != nil {
		attrs = append(attrs, slog.String("reason", refusal.Reason()))
		if refusal.serverFault() {
			attrs = append(attrs, slog.Any("err", refusal.cause))
			if m, ok := req.(proto.Message); ok {
				attrs = append(attrs, slog.String("request", redactedText(m)))
			}
		}
	}
	e.log.LogAttrs(ctx, level, "call", attrs...)
}

// levelOf chooses what an operator sees by default: changes of configuration, refused changes and faults of
// the server, but not each read and each publish.
func levelOf(m methodMetrics, refusal *Error) slog.Level {
	switch {
	case refusal != nil && refusal.serverFault():
		return slog.LevelError
	case m.changes:
		return slog.LevelInfo
	}
	return slog.LevelDebug
}

// requestID is the caller's, when it sent one fit for a log, else a new one.
func requestID(ctx context.Context) string {
	if v := metadata.ValueFromIncomingContext(ctx, requestIDKey); len(v) == 1 && isEventID(v[0]) && len(v[0]) <= 64 {
		return v[0]
	}
	var raw [8]byte
	for i, n := 0, rand.Uint64(); i < len(raw); i++ {
		raw[i] = byte(n >> (8 * i))
	}
	return hex.EncodeToString(raw[:])
}

// limiter bounds calls in progress.
type limiter struct {
	most int64
	now  atomic.Int64
}

func (l *limiter) enter() bool {
	if l.now.Add(1) > l.most {
		l.now.Add(-1)
		return false
	}
	return true
}

func (l *limiter) leave() { l.now.Add(-1) }

func (l *limiter) refusal() *Error {
	return rateLimited("server", "the server has "+strconv.FormatInt(l.most, 10)+" calls in progress, which is all it takes at a time", 200*time.Millisecond)
}
