package conformance

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/grapnel/grapnel/internal/wire"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	// callLimit is what the server allows for Configure and the like.
	callLimit = 10 * time.Second
	// describeLimit is what the protocol allows for Describe.
	describeLimit = 2 * time.Second
	// hostMinor is the protocol minor that the suite speaks.
	hostMinor = wire.ProtocolMinor
	userAgent = "grapnel-conformance"
	loopback4 = "127.0.0.0/8"
	loopback6 = "::1/128"
)

// trial is one case at work: what it has started ends with it.
type trial struct {
	ctx context.Context //nolint:containedctx // the life of the case
	s   *suite

	mu      sync.Mutex // guards cleanup
	cleanup []func()
}

// atEnd has f called when the case is over, the latest first.
func (t *trial) atEnd(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cleanup = append(t.cleanup, f)
}

func (t *trial) end() {
	t.mu.Lock()
	cleanup := t.cleanup
	t.cleanup = nil
	t.mu.Unlock()
	for i := len(cleanup) - 1; i >= 0; i-- {
		cleanup[i]()
	}
}

// session is one process and the connection to it.
type session struct {
	t       *trial
	proc    *process
	line    []string
	conn    *grpc.ClientConn
	plugin  pluginv1.PluginServiceClient
	control *control

	mu         sync.Mutex // guards what follows
	refs       uint32
	seqs       uint64
	sign       *signing
	attempts   *attempts
	transforms *transforms
}

// launch starts the plugin without talking to it.
func (t *trial) launch(l launch) (*process, error) {
	p, err := t.s.newProcess(l)
	if err != nil {
		return nil, err
	}
	t.atEnd(p.kill)
	return p, nil
}

// start starts the plugin and connects to it, as go-plugin's client does; no call of Grapnel's is made yet.
func (t *trial) start(l launch) (*session, error) {
	p, err := t.launch(l)
	if err != nil {
		return nil, err
	}
	line, err := p.handshake(t.ctx)
	if err != nil {
		return nil, err
	}
	if line[2] != "unix" {
		return nil, fmt.Errorf("it listens on %q, want unix", line[2])
	}
	conn, err := grpc.NewClient("passthrough:///unused",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", line[3])
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)),
		grpc.WithIdleTimeout(0))
	if err != nil {
		return nil, err
	}
	t.atEnd(func() { _ = conn.Close() })
	ses := &session{t: t, proc: p, line: line, conn: conn, plugin: pluginv1.NewPluginServiceClient(conn)}
	ses.openCompanions()
	return ses, nil
}

// openCompanions opens the streams of go-plugin's own that its client opens on every connection, and reads
// them to the end. A plugin need not serve them.
func (ses *session) openCompanions() {
	for _, method := range []string{"/plugin.GRPCBroker/StartStream", "/plugin.GRPCStdio/StreamStdio"} {
		stream, err := ses.conn.NewStream(ses.t.ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		if err != nil {
			continue
		}
		if method == "/plugin.GRPCStdio/StreamStdio" {
			_ = stream.SendMsg(&emptypb.Empty{})
			_ = stream.CloseSend()
		}
		go func() {
			for stream.RecvMsg(&emptypb.Empty{}) == nil { // what is in it stays unknown fields
			}
		}()
	}
}

// session starts the plugin and brings it to where attempts can come: Configure with the settings, then
// Control. Loopback is open to it.
func (t *trial) session() (*session, error) {
	return t.sessionWith(launch{}, loopbackOpen())
}

func loopbackOpen() *pluginv1.HostSettings {
	return &pluginv1.HostSettings{EgressAllow: []string{loopback4, loopback6}}
}

func (t *trial) sessionWith(l launch, set *pluginv1.HostSettings) (*session, error) {
	ses, err := t.start(l)
	if err != nil {
		return nil, err
	}
	if _, err := ses.describe(t.ctx); err != nil {
		return nil, err
	}
	if err := ses.settle(set); err != nil {
		return nil, err
	}
	return ses, ses.openControl()
}

// settle is the first Configure: settings, to which it adds the user agent, and no instance.
func (ses *session) settle(set *pluginv1.HostSettings) error {
	set.UserAgent = userAgent
	ctx, cancel := context.WithTimeout(ses.t.ctx, callLimit)
	defer cancel()
	_, err := ses.plugin.Configure(ctx, &pluginv1.ConfigureRequest{Settings: set})
	if err != nil {
		return fmt.Errorf("configure with settings alone: %w", err)
	}
	return nil
}

func (ses *session) describe(ctx context.Context) (*pluginv1.DescribeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	desc, err := ses.plugin.Describe(ctx, &pluginv1.DescribeRequest{HostVersion: userAgent, HostProtocolMinor: hostMinor})
	if err != nil {
		return nil, fmt.Errorf("describe: %w%s", err, ses.ending())
	}
	return desc, nil
}

// ending says how the process ended, when it did and should not have.
func (ses *session) ending() string {
	if !ses.proc.hasEnded(ses.t.ctx, 50*time.Millisecond) {
		return ""
	}
	return "; the process has ended" + ses.proc.lastWords()
}

// nextRef is a number for an instance that was not used before.
func (ses *session) nextRef() uint32 {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	ses.refs++
	return ses.refs
}

func (ses *session) nextSeq() uint64 {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	ses.seqs++
	return ses.seqs<<16 | ses.seqs&0xff // as the server's: rising, with gaps
}

// configure hands over instances and returns their statuses, of which there is one for each.
func (ses *session) configure(instances ...*pluginv1.Instance) ([]*pluginv1.InstanceStatus, error) {
	ctx, cancel := context.WithTimeout(ses.t.ctx, callLimit)
	defer cancel()
	resp, err := ses.plugin.Configure(ctx, &pluginv1.ConfigureRequest{Instances: instances})
	if err != nil {
		return nil, fmt.Errorf("configure: %w%s", err, ses.ending())
	}
	if n := len(resp.GetStatuses()); n != len(instances) {
		return nil, fmt.Errorf("configure: %d statuses for %d instances", n, len(instances))
	}
	return resp.GetStatuses(), nil
}

// take configures instances that must be taken.
func (ses *session) take(instances ...*pluginv1.Instance) error {
	statuses, err := ses.configure(instances...)
	if err != nil {
		return err
	}
	for i, st := range statuses {
		if found := complaints(st.GetDiagnostics()); len(found) > 0 {
			return fmt.Errorf("configure %s: it was not taken: %s", instances[i].GetKind(), diagnosticsText(found))
		}
	}
	return nil
}

func (ses *session) remove(refs ...uint32) error {
	ctx, cancel := context.WithTimeout(ses.t.ctx, callLimit)
	defer cancel()
	if _, err := ses.plugin.Remove(ctx, &pluginv1.RemoveRequest{Refs: refs}); err != nil {
		return fmt.Errorf("remove: %w%s", err, ses.ending())
	}
	return nil
}

func (ses *session) validate(in *pluginv1.Instance) ([]*pluginv1.Diagnostic, error) {
	resp, err := ses.verdict(in)
	return resp.GetDiagnostics(), err
}

// declaredHeaders are those that a signer may set with the subject's config.
func (ses *session) declaredHeaders(u *subject) ([]string, error) {
	resp, err := ses.verdict(ses.instance(u, ""))
	if err != nil || len(resp.GetEmitsHeaders()) > 0 {
		return resp.GetEmitsHeaders(), err
	}
	return u.kind.GetSigner().GetEmitsHeaders(), nil
}

func (ses *session) verdict(in *pluginv1.Instance) (*pluginv1.ValidateResponse, error) {
	ctx, cancel := context.WithTimeout(ses.t.ctx, callLimit)
	defer cancel()
	resp, err := ses.plugin.Validate(ctx, &pluginv1.ValidateRequest{Instance: in})
	if err != nil {
		return nil, fmt.Errorf("validate: %w%s", err, ses.ending())
	}
	return resp, nil
}

func (ses *session) prepareSecret(req *pluginv1.PrepareSecretRequest) (*pluginv1.PrepareSecretResponse, error) {
	ctx, cancel := context.WithTimeout(ses.t.ctx, callLimit)
	defer cancel()
	resp, err := ses.plugin.PrepareSecret(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("prepare secret: %w%s", err, ses.ending())
	}
	return resp, nil
}

// complaints are the diagnostics that are errors.
func complaints(ds []*pluginv1.Diagnostic) []*pluginv1.Diagnostic {
	var found []*pluginv1.Diagnostic
	for _, d := range ds {
		if d.GetSeverity() != pluginv1.Diagnostic_SEVERITY_WARNING {
			found = append(found, d)
		}
	}
	return found
}

func diagnosticsText(ds []*pluginv1.Diagnostic) string {
	if len(ds) == 0 {
		return "no diagnostic"
	}
	words := make([]string, len(ds))
	for i, d := range ds {
		words[i] = fmt.Sprintf("%s %q %s", d.GetCode(), d.GetPointer(), d.GetSummary())
	}
	return strings.Join(words, "; ")
}

// control is the stream whose end tells the plugin that its host is gone.
type control struct {
	stream pluginv1.PluginService_ControlClient
	cancel context.CancelFunc

	mu    sync.Mutex // guards what follows; and sends
	beats map[uint64]chan *pluginv1.Heartbeat
	logs  strings.Builder
	ended chan struct{}
	err   error
	count uint64
}

func (ses *session) openControl() error {
	ctx, cancel := context.WithCancel(ses.t.ctx)
	ses.t.atEnd(cancel)
	stream, err := ses.plugin.Control(ctx)
	if err != nil {
		return fmt.Errorf("open control stream: %w", err)
	}
	c := &control{stream: stream, cancel: cancel, beats: map[uint64]chan *pluginv1.Heartbeat{}, ended: make(chan struct{})}
	ses.control = c
	go c.receive()
	// The server's first frame; without one, servers of some languages would not begin the call.
	return c.send(&pluginv1.ControlRequest{Frame: &pluginv1.ControlRequest_Heartbeat{Heartbeat: &pluginv1.Heartbeat{Number: c.next()}}})
}

func (c *control) next() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	return c.count
}

func (c *control) send(req *pluginv1.ControlRequest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.stream.Send(req); err != nil {
		return fmt.Errorf("control stream: %w", err)
	}
	return nil
}

func (c *control) receive() {
	for {
		resp, err := c.stream.Recv()
		c.mu.Lock()
		if err != nil {
			c.err = err
			close(c.ended)
			c.mu.Unlock()
			return
		}
		switch f := resp.GetFrame().(type) {
		case *pluginv1.ControlResponse_Heartbeat:
			if ch := c.beats[f.Heartbeat.GetNumber()]; ch != nil {
				ch <- f.Heartbeat
				delete(c.beats, f.Heartbeat.GetNumber())
			}
		case *pluginv1.ControlResponse_Logs:
			for _, r := range f.Logs.GetRecords() {
				if c.logs.Len() < keepOutput {
					fmt.Fprintln(&c.logs, r.GetLevel(), r.GetMessage(), r.GetAttributes())
				}
			}
		}
		c.mu.Unlock()
	}
}

func (c *control) logged() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.logs.String()
}

// beat sends a heartbeat and waits for the answer to it.
func (c *control) beat(ctx context.Context, limit time.Duration) (*pluginv1.Heartbeat, error) {
	n := c.next()
	answer := make(chan *pluginv1.Heartbeat, 1)
	c.mu.Lock()
	c.beats[n] = answer
	c.mu.Unlock()
	err := c.send(&pluginv1.ControlRequest{Frame: &pluginv1.ControlRequest_Heartbeat{Heartbeat: &pluginv1.Heartbeat{Number: n}}})
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case hb := <-answer:
		return hb, nil
	case <-timer.C:
		return nil, latef("heartbeat %d was not answered within %v", n, limit)
	case <-c.ended:
		c.mu.Lock()
		defer c.mu.Unlock()
		return nil, fmt.Errorf("control stream: %w", c.err)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// alive reports whether the process still answers; it is asked where a plugin may have been hurt.
func (ses *session) alive() error {
	if ses.proc.hasEnded(ses.t.ctx, 0) {
		return errors.New("the process has ended" + ses.proc.lastWords())
	}
	_, err := ses.describe(ses.t.ctx)
	return err
}
