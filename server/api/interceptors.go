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
	// testDeadline is that of TestSubscription: the longest attempt_timeout fits.
	testDeadline = 75 * time.Second
	// waitDeadline is that of WaitReplayJob: its longest timeout fits.
	waitDeadline = maxWait + 10*time.Second
	// maxWatchesPerConnection bounds the streams of health and reflection on one connection, of which a client needs one
	// or two.
	maxWatchesPerConnection = 16
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
		grpc.ForceServerCodecV2(newCodec(s.log)),
		grpc.MaxRecvMsgSize(maxWire),
		grpc.MaxSendMsgSize(maxWire),
		grpc.MaxConcurrentStreams(uint32(s.MaxCallsPerConnection)), //nolint:gosec // bounded by New
		grpc.MaxHeaderListSize(16 << 10),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 20 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time:                  30 * time.Second,
			Timeout:               10 * time.Second,
			MaxConnectionIdle:     15 * time.Minute,
			MaxConnectionAge:      s.ConnectionAge,
			MaxConnectionAgeGrace: ageGrace(s.ConnectionAge),
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
	// watches is of what keeps clients alive and tells them what there is: health and reflection. It is apart, so
	// that what clients do and what clients need to do it do not take each other's room.
	watches limiter
	// tails are the watches of deliveries, attempts and subscriptions, apart from publish streams.
	tails limiter
	// histories are the watches of subscriptions among them, and historiesOf by namespace.
	histories   limiter
	historiesOf shares
	// tailBytes are the messages that wait to be sent to them.
	tailBytes atomic.Int64
	// callsOf, streamsOf and tailsOf are by namespace.
	callsOf, streamsOf, tailsOf shares
}

func newEdge(s *Server) *edge {
	return &edge{
		server:  s,
		log:     s.log,
		metrics: newEdgeMetrics(s.Registerer),
		unaries: limiter{most: int64(s.MaxCalls)},
		streams: limiter{most: int64(s.MaxCalls)},
		watches: limiter{most: int64(s.MaxWatches)},
		tails:   limiter{most: int64(s.MaxCalls)},

		histories: limiter{most: maxHistories}, historiesOf: shares{most: min(maxHistoriesOf, s.MaxCallsPerNamespace)},

		callsOf: shares{most: s.MaxCallsPerNamespace}, streamsOf: shares{most: s.MaxCallsPerNamespace}, tailsOf: shares{most: s.MaxCallsPerNamespace},
	}
}

func (e *edge) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := e.serveUnary(ctx, req, info.FullMethod, handler)
	if m, ok := resp.(proto.Message); ok && err == nil {
		if size := proto.Size(m); size > maxMessage {
			err = messageTooLarge("the answer", size)
		}
	}
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
	calls := &e.unaries
	if !ours(method) {
		calls = &e.watches
	}
	if !calls.enter() {
		return nil, calls.refusal()
	}
	defer calls.leave()
	if ns := namespaceIn(resourceOf(req)); ns != "" {
		if !e.callsOf.enter(ns) {
			return nil, e.callsOf.refusal(ns, "calls")
		}
		defer e.callsOf.leave(ns)
	}
	if _, has := ctx.Deadline(); !has {
		deadline := defaultDeadline
		switch method {
		case grapnelv1.SubscriptionService_TestSubscription_FullMethodName:
			deadline = testDeadline
		case grapnelv1.ReplayService_WaitReplayJob_FullMethodName, grapnelv1.ErasureService_WaitErasure_FullMethodName:
			deadline = waitDeadline
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, deadline)
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
		grapnelv1.SecretService_CreateSecret_FullMethodName, grapnelv1.SecretService_RotateSecret_FullMethodName,
		grapnelv1.EventTypeService_CreateEventType_FullMethodName, grapnelv1.EventTypeService_UpdateEventType_FullMethodName:
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
	streams := &e.streams
	switch {
	case !ours(method):
		streams = &e.watches
	case method == grapnelv1.DeliveryService_WatchDeliveries_FullMethodName, method == grapnelv1.DeliveryService_WatchAttempts_FullMethodName,
		method == grapnelv1.SubscriptionService_WatchSubscriptions_FullMethodName:
		streams = &e.tails
	}
	if !streams.enter() {
		return streams.refusal()
	}
	defer streams.leave()
	if c := callerOf(stream.Context()); c != nil {
		own, most := &c.streams, int64(e.server.MaxStreamsPerConnection)
		if !ours(method) {
			own, most = &c.watches, maxWatchesPerConnection
		}
		if !own.enterOf(most) {
			return rateLimited("connection", "this connection has "+strconv.FormatInt(most, 10)+" streams of this kind open, which is all it may have at a time; close some", time.Second)
		}
		defer own.leave()
	}
	checked := &checkedStream{ServerStream: stream}
	if checkedByInterceptor(method) {
		checked.check = e.server.validate
	}
	return handler(srv, checked)
}

// checkedStream refuses what cannot be read, as a *badFrame, and what check refuses.
type checkedStream struct {
	grpc.ServerStream
	in    received
	check func(any) error
}

// badFrame is a message of a stream that was refused, as the item with this sequence when there is one.
type badFrame struct {
	refusal *Error
	item    uint64
}

func (b *badFrame) Error() string { return b.refusal.Error() }

// Unwrap makes it an *Error.
func (b *badFrame) Unwrap() error { return b.refusal }

func (c *checkedStream) RecvMsg(m any) error {
	c.in.message = m
	if err := c.ServerStream.RecvMsg(&c.in); err != nil {
		return err
	}
	if c.in.refusal != nil {
		return &badFrame{c.in.refusal, c.in.item}
	}
	if c.check == nil {
		return nil
	}
	return c.check(m)
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
			if lacksID(req) {
				wait = "-1" // a repeat would be refused for that, and hide why this one was
			}
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
	if v := metadata.ValueFromIncomingContext(ctx, requestIDKey); len(v) == 1 && isToken(v[0]) && len(v[0]) <= 64 {
		return v[0]
	}
	var raw [8]byte
	for i, n := 0, rand.Uint64(); i < len(raw); i++ {
		raw[i] = byte(n >> (8 * i))
	}
	return hex.EncodeToString(raw[:])
}

// namespaceIn is the namespace of a resource name as a caller sent it; empty when it is not of one.
func namespaceIn(name string) string {
	rest, ok := strings.CutPrefix(name, "namespaces/")
	ns, _, _ := strings.Cut(rest, "/")
	if !ok || !isResourceID(ns) {
		return ""
	}
	return ns
}

func (s *shares) refusal(ns, what string) *Error {
	return rateLimited(namespaceName(ns), "namespace "+ns+" has "+strconv.Itoa(s.most)+" "+what+" in progress, which is all it may have at a time", 200*time.Millisecond)
}

// limiter bounds calls in progress.
type limiter struct {
	most int64
	now  atomic.Int64
}

func (l *limiter) enter() bool { return l.enterOf(l.most) }

func (l *limiter) enterOf(most int64) bool {
	if l.now.Add(1) > most {
		l.now.Add(-1)
		return false
	}
	return true
}

func (l *limiter) leave() { l.now.Add(-1) }

func (l *limiter) refusal() *Error {
	return rateLimited("server", "the server has "+strconv.FormatInt(l.most, 10)+" calls in progress, which is all it takes at a time", 200*time.Millisecond)
}
