package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// Option changes how Dial connects.
type Option func(*settings)

// maxAnswer is the largest message that is read. Servers send up to 4 MiB and a little.
const maxAnswer = 8 << 20

type settings struct {
	insecure  bool
	tls       *tls.Config
	token     TokenSource
	userAgent string
	wait      bool
	failFast  bool
	extra     []grpc.DialOption
}

// TokenSource returns the bearer token for a call. It is called for every call, concurrently, and
// should cache; its error fails the call with UNAUTHENTICATED.
type TokenSource func(ctx context.Context) (string, error)

// WithInsecure connects without TLS. Fit for loopback and for networks that encrypt by themselves.
func WithInsecure() Option { return func(s *settings) { s.insecure = true } }

// WithTLS connects with TLS by cfg; nil means the system's roots. The config is copied.
func WithTLS(cfg *tls.Config) Option {
	return func(s *settings) {
		if cfg == nil {
			cfg = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		s.tls = cfg.Clone()
	}
}

// WithTokenSource sends "authorization: Bearer TOKEN" with every call. It needs WithTLS: a token is
// never sent in the clear.
func WithTokenSource(ts TokenSource) Option { return func(s *settings) { s.token = ts } }

// WithUserAgent puts text such as "billing/1.2" before the SDK's own user agent.
func WithUserAgent(text string) Option { return func(s *settings) { s.userAgent = text } }

// WithWait makes Dial wait until a connection stands or its ctx ends.
func WithWait() Option { return func(s *settings) { s.wait = true } }

// WithFailFast makes publishing fail with ErrUnavailable when no server can be reached, instead of
// waiting for one until the call's deadline. Meant for tools that people wait for.
func WithFailFast() Option { return func(s *settings) { s.failFast = true } }

// WithDialOptions adds gRPC dial options after the SDK's own, for example a stats handler for tracing.
func WithDialOptions(opts ...grpc.DialOption) Option {
	return func(s *settings) { s.extra = append(s.extra, opts...) }
}

func (s *settings) dialOptions() ([]grpc.DialOption, error) {
	var creds credentials.TransportCredentials
	switch {
	case s.insecure && s.tls != nil:
		return nil, errors.New("WithInsecure and WithTLS exclude each other")
	case s.insecure && s.token != nil:
		return nil, errors.New("WithTokenSource needs WithTLS: a token is never sent in the clear")
	case s.insecure:
		creds = insecure.NewCredentials()
	case s.tls != nil:
		creds = credentials.NewTLS(s.tls)
	default:
		return nil, errors.New("one of WithInsecure and WithTLS is required")
	}
	agent := "grapnel-go/" + Version
	if s.userAgent != "" {
		agent = s.userAgent + " " + agent
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithKeepaliveParams(keepaliveParams()),
		grpc.WithUserAgent(agent),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithChainUnaryInterceptor(unaryErrors, repeatPublish(s.failFast)),
		grpc.WithChainStreamInterceptor(streamErrors),
	}
	if s.token != nil {
		opts = append(opts, grpc.WithPerRPCCredentials(bearer{s.token}))
	}
	if s.failFast {
		opts = append(opts, grpc.WithDefaultCallOptions(grpc.WaitForReady(false)))
	}
	return append(opts, s.extra...), nil
}

// bearer attaches the token; the gRPC library refuses to use it without TLS.
type bearer struct{ source TokenSource }

func (b bearer) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	token, err := b.source(ctx)
	if err != nil {
		return nil, fmt.Errorf("get token: %w", err)
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

func (b bearer) RequireTransportSecurity() bool { return true }

func waitReady(ctx context.Context, conn *grpc.ClientConn) error {
	for {
		conn.Connect()
		state := conn.GetState()
		if state == connectivity.Ready {
			return nil
		}
		if !conn.WaitForStateChange(ctx, state) {
			return fmt.Errorf("wait for a connection (%s): %w", state, ctx.Err())
		}
	}
}
