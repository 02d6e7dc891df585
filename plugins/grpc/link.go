package grpcplugin

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/meter"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	maxResponse = 64 << 10
	maxHeader   = 64 << 10
	// grant is what may come for a call: a message, headers and trailers, and the frames around them.
	grant = 4 * (maxResponse + maxHeader)
)

var (
	// errSpent is the answer to gRPC's wish to connect again: a link is for one connection, whose end the
	// pool answers with a new link. So every attempt learns of its own dial, with the error as it was.
	errSpent   = errors.New("the link's connection has ended")
	errNoHTTP2 = errors.New("no HTTP/2")
)

// dialler makes links of one settings.
type dialler struct {
	settings settings
	egress   *plugin.Egress
	// tls is nil for plaintext.
	tls *tls.Config
	// gates are for what receivers have this process do.
	gates gates
}

// gates are a process's: of what is read beyond what is ordinary, and of handshakes.
type gates struct{ reading, shaking *gate.Gate }

// link is one HTTP/2 connection, as a grpc.ClientConn that never connects again.
type link struct {
	client *grpc.ClientConn
	conn   *outbound.Watched
	meter  *meter.Conn
	calls  atomic.Int64 // under way
}

// call notes that a call begins; its end is to be told to what it returns.
func (l *link) call() (ended func()) {
	l.calls.Add(1)
	l.meter.Grant()
	return func() { l.meter.Settle(int(l.calls.Add(-1))) }
}

// Usable reports whether calls can begin on it: not when it broke or the receiver said GOAWAY.
func (l *link) Usable() bool { return l.client.GetState() == connectivity.Ready }

// Close ends it, and the calls on it.
func (l *link) Close() { _ = l.client.Close() }

// dial connects, shakes hands and waits until the receiver has begun HTTP/2.
func (d *dialler) dial() (*link, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d.settings.connect)
	defer cancel()
	conn, err := outbound.Dialer{Egress: d.egress}.Dial(ctx, d.settings.address)
	if err != nil {
		return nil, err
	}
	refusal := func() string { return "" }
	shaken := handshaken{protocol: "insecure", info: insecureInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}}
	if d.tls != nil {
		config, offer := outbound.Offering(d.tls)
		secure, err := outbound.Secure(ctx, conn, config, d.gates.shaking)
		if err != nil {
			return nil, err
		}
		state := secure.ConnectionState()
		if state.NegotiatedProtocol != "h2" {
			_ = secure.Close()
			return nil, &outbound.Error{Code: plugin.CodeTLS, Err: errNoHTTP2, Message: "the receiver does not offer HTTP/2 (ALPN h2), which gRPC needs"}
		}
		conn, refusal = secure, offer.Refusal
		shaken = handshaken{protocol: "tls", info: credentials.TLSInfo{
			State: state, CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		}}
	}
	l := &link{meter: meter.New(conn, grant, d.gates.reading)}
	l.meter.Begin()
	l.conn = outbound.Watch(l.meter)
	if l.client, err = d.client(l.conn, shaken); err != nil {
		_ = conn.Close()
		return nil, &outbound.Error{Code: plugin.CodeProtocol, Err: err, Message: "gRPC refuses the address"}
	}
	if err := l.begin(ctx); err != nil {
		l.Close()
		if why := refusal(); why != "" {
			return nil, &outbound.Error{Code: plugin.CodeTLS, Err: err, Message: why}
		}
		return nil, err
	}
	return l, nil
}

func (d *dialler) client(conn net.Conn, shaken handshaken) (*grpc.ClientConn, error) {
	var taken atomic.Bool
	once := func(context.Context, string) (net.Conn, error) {
		if taken.Swap(true) {
			return nil, errSpent
		}
		return conn, nil
	}
	return grpc.NewClient("passthrough:///"+d.settings.address,
		grpc.WithContextDialer(once), grpc.WithTransportCredentials(shaken), grpc.WithNoProxy(),
		grpc.WithAuthority(d.settings.authority), grpc.WithUserAgent(d.settings.agent),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithDisableHealthCheck(), grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: d.settings.connect}),
		grpc.WithMaxHeaderListSize(maxHeader), grpc.WithStatsHandler(follower{}),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxResponse), grpc.MaxCallSendMsgSize(maxBody+maxOverhead), grpc.WaitForReady(false)),
	)
}

// begin waits for the receiver's HTTP/2 settings; without them nothing must be sent (RFC 9113, 3.4).
func (l *link) begin(ctx context.Context) error {
	l.client.Connect()
	for {
		state := l.client.GetState()
		switch {
		case state == connectivity.Ready:
			return nil
		case over(ctx): // also where gRPC, whose time is up as well, has closed the connection first
			return &outbound.Error{Code: plugin.CodeConnect, Err: context.DeadlineExceeded, Message: "the receiver did not begin HTTP/2 in time"}
		case state != connectivity.Idle && state != connectivity.Connecting, state == connectivity.Idle && l.conn.Broke() != nil:
			if err := l.conn.Broke(); err != nil {
				return &outbound.Error{Code: plugin.CodeConnect, Err: err, Message: "the receiver closed the connection at once"}
			}
			return &outbound.Error{Code: plugin.CodeProtocol, Err: errNoHTTP2, Message: "the receiver does not speak HTTP/2, which gRPC needs"}
		}
		l.client.WaitForStateChange(ctx, state)
	}
}

// over reports whether ctx has ended, or would if its timer were on time.
func over(ctx context.Context) bool {
	deadline, has := ctx.Deadline()
	return ctx.Err() != nil || has && !time.Now().Before(deadline)
}

// handshaken is credentials.TransportCredentials for a connection whose handshake is over: gRPC would
// flatten its errors into text.
type handshaken struct {
	protocol string
	info     credentials.AuthInfo
}

func (h handshaken) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return conn, h.info, nil
}

func (h handshaken) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a server's credentials")
}

func (h handshaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: h.protocol}
}

func (h handshaken) Clone() credentials.TransportCredentials { return h }

func (h handshaken) OverrideServerName(string) error { return nil }

// insecureInfo says that there was no handshake.
type insecureInfo struct{ credentials.CommonAuthInfo }

func (insecureInfo) AuthType() string { return "insecure" }
