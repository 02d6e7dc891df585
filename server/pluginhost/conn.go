package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grapnel/grapnel/internal/redact"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/pluginhost/process"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

var errHangs = errors.New("it hangs")

// conn is one life of a plugin process: the child, the connection and the streams. It is used by many
// and owned by its process's supervisor, which alone ends it.
type conn struct {
	host   *Host
	proc   *supervisor
	log    *slog.Logger
	ctx    context.Context //nolint:containedctx // the life of the process
	cancel context.CancelFunc
	child  *process.Child
	client *goplugin.Client
	grpc   *grpc.ClientConn
	plugin pluginv1.PluginServiceClient
	out    *process.Output
	name   string
	// version, protocol and kinds are as described.
	version  string
	kinds    []*kind
	protocol string

	attempts *link // nil without a transport
	signs    *link // nil without a signer
	// transforms is nil without a transformer.
	transforms *link
	control    pluginv1.PluginService_ControlClient
	stopping   atomic.Bool
	// release is closed to end the control stream, by the goroutine that sends on it.
	release chan struct{}
	// drained is closed when the attempt stream has ended after a stop.
	drained    chan struct{}
	workers    sync.WaitGroup
	refs       atomic.Uint32
	unanswered atomic.Int64
	// secrets are those that the process holds: what it says is cleaned of them.
	secrets   held
	overhead  latency
	answered  atomic.Bool // an attempt or a signature, at least once
	breakOnce sync.Once
	broken    chan struct{}
	cause     error // set before broken is closed

	mu      sync.Mutex // guards what follows
	retired []retired
	// fading are secrets that the process was told to forget.
	fading []fading
}

func (c *conn) nextRef() uint32 { return c.refs.Add(1) }

// fail ends this life of the process; the supervisor does the rest.
func (c *conn) fail(err error) {
	c.breakOnce.Do(func() {
		c.cause = err
		close(c.broken)
	})
}

// openStreams starts what the described kinds need.
func (c *conn) openStreams(desc *pluginv1.DescribeResponse) error {
	roles := map[string]bool{}
	for _, k := range c.kinds {
		roles[k.Role()] = true
	}
	can := map[string]bool{}
	for _, capability := range desc.GetCapabilities() {
		can[capability] = true
	}
	late := time.AfterFunc(c.host.timing.call, c.cancel)
	err := c.open(roles, can)
	if !late.Stop() && err != nil {
		return fmt.Errorf("it does not open its streams, or grants no credits, within %v", c.host.timing.call)
	}
	return err
}

func (c *conn) open(roles, can map[string]bool) error {
	if err := c.openControl(); err != nil {
		return err
	}
	if roles["signer"] {
		if !can["sign.stream"] {
			return errors.New(`it offers a signer without the capability "sign.stream"`)
		}
		if err := c.openSigns(); err != nil {
			return err
		}
	}
	if roles["transformer"] {
		if !can["transform.stream"] {
			return errors.New(`it offers a transformer without the capability "transform.stream"`)
		}
		if err := c.openTransforms(); err != nil {
			return err
		}
	}
	switch {
	case !roles["transport"]:
		close(c.drained)
		return nil
	case can["attempt.stream"]:
		return c.openAttempts()
	case can["attempt.unary"]:
		c.openUnary()
		return nil
	}
	return errors.New(`it offers a transport without the capability "attempt.stream" or "attempt.unary"`)
}

func (c *conn) openAttempts() error {
	client := pluginv1.NewTransportServiceClient(c.grpc)
	stream, err := client.Attempt(c.ctx, wire.CallOption())
	if err != nil {
		return fmt.Errorf("open attempt stream: %s", c.said(err.Error()))
	}
	err = stream.SendMsg(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Hello{
		Hello: &pluginv1.Hello{MaxResponseBody: wire.MaxResponse},
	}})
	if err != nil {
		return fmt.Errorf("send hello: %s", c.said(err.Error()))
	}
	var first wire.Response
	if err := stream.RecvMsg(&first); err != nil {
		return fmt.Errorf("receive welcome: %s", c.said(err.Error()))
	}
	credits := first.Other.GetWelcome().GetCredits()
	if credits == 0 {
		return errors.New("the first frame of the attempt stream is no welcome, or has no credits")
	}
	var frame attemptFrame
	c.attempts = newLink(int(min(credits, maxWindow)), func(batch []*pending) error {
		for _, p := range batch {
			frame.Add(&p.Attempt)
		}
		defer frame.Reset()
		return stream.SendMsg(&frame)
	})
	c.attempts.last, frame.link = true, c.attempts
	c.workers.Go(func() { c.sendAttempts(stream) })
	c.workers.Go(func() { c.receiveAttempts(stream) })
	return nil
}

// attemptFrame is a batch of a link, which learns when it has been read.
type attemptFrame struct {
	wire.Batch
	link *link
}

// Append implements wire.Writer of internal/wire.
func (f *attemptFrame) Append(b []byte) []byte {
	b = f.Batch.Append(b)
	f.link.read()
	return b
}

func (c *conn) sendAttempts(stream grpc.ClientStream) {
	err := c.attempts.run()
	if err == nil && c.stopping.Load() {
		err = stream.SendMsg(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Drain{
			Drain: &pluginv1.Drain{Grace: durationpb.New(c.host.closing.left(c.host.timing.drain))},
		}})
		if err == nil {
			err = stream.CloseSend()
		}
	}
	if err != nil {
		c.lost("attempt stream", err)
	}
}

func (c *conn) receiveAttempts(stream grpc.ClientStream) {
	defer close(c.drained)
	var frame wire.Response
	var seqs []uint64
	var taken []*pending
	for {
		if err := stream.RecvMsg(&frame); err != nil {
			if !errors.Is(err, io.EOF) || !c.stopping.Load() {
				c.lost("attempt stream", err)
			}
			return
		}
		if frame.Other != nil {
			if err := c.otherFrame(frame.Other); err != nil {
				c.fault(err)
				return
			}
			continue
		}
		seqs = seqs[:0]
		for i := range frame.Results {
			seqs = append(seqs, frame.Results[i].Seq)
		}
		var err error
		taken, err = c.attempts.take(seqs, taken[:0])
		now := time.Now()
		for i, p := range taken {
			c.settle(p, &frame.Results[i], now)
		}
		clear(taken)
		if err != nil {
			c.fault(err)
			return
		}
	}
}

func (c *conn) otherFrame(f *pluginv1.AttemptResponse) error {
	switch f := f.GetFrame().(type) {
	case *pluginv1.AttemptResponse_Credit:
		c.attempts.widen(int(min(f.Credit.GetAdd(), maxWindow)))
	case *pluginv1.AttemptResponse_Drained:
		returned, err := c.attempts.take(f.Drained.GetReturned(), nil)
		for _, p := range returned {
			c.host.restart(p)
		}
		return err
	}
	return nil // a frame of a later minor
}

// lost ends this life of the process because a stream or call broke off; what a plugin sends that cannot be taken
// is its fault.
func (c *conn) lost(what string, err error) {
	switch s := status.Convert(err); {
	case s.Code() == codes.ResourceExhausted && strings.Contains(s.Message(), "larger than max"):
		c.fault(fmt.Errorf("%w: %s: a message is larger than %d MiB", errProtocol, what, replyMax>>20))
	case s.Code() == codes.Internal && strings.Contains(s.Message(), "unmarshal"):
		c.fault(fmt.Errorf("%w: %s: a message cannot be read", errProtocol, what)) // or it says so, in words of its own
	default:
		c.fail(&brokenError{what: what, why: c.said(s.Message())})
	}
}

// brokenError is the end of a stream or call. What the plugin said of it is for the log alone: it may quote anybody.
type brokenError struct{ what, why string }

func (e *brokenError) Error() string { return e.what + ": " + e.why }

// told is why a process has ended, in the host's own words, for the records of all whose attempts it held.
func (c *conn) told() string {
	broken := new(brokenError)
	switch {
	case !errors.As(c.cause, &broken):
		return c.cause.Error()
	case c.ended():
		return c.child.Why()
	}
	return "its " + broken.what + " broke off"
}

// ended reports whether the process has ended, or does in a moment: a stream mostly ends a little before it.
func (c *conn) ended() bool { return wait(100*time.Millisecond, c.child.Exited()) }

// fault ends the process's life because it broke the protocol.
func (c *conn) fault(err error) {
	c.host.metrics.faults.Inc()
	c.fail(err)
}

// openUnary adapts a plugin that takes attempts one by one.
func (c *conn) openUnary() {
	const window = 256
	client := pluginv1.NewTransportServiceClient(c.grpc)
	var calls sync.WaitGroup
	c.attempts = newLink(window, func(batch []*pending) error {
		begin := make([]func(), len(batch))
		for i, p := range batch {
			req := p.One()
			timeout := p.plan.timeout + p.plan.grace*3/4 // before the attempt is overdue
			begin[i] = func() { c.attemptOne(client, req, timeout) }
		}
		c.attempts.read()
		for _, attempt := range begin {
			calls.Go(attempt)
		}
		return nil
	})
	c.attempts.last = true
	c.workers.Go(func() {
		defer close(c.drained)
		_ = c.attempts.run() // send never fails
		calls.Wait()
	})
}

func (c *conn) attemptOne(client pluginv1.TransportServiceClient, req *pluginv1.AttemptOneRequest, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	defer cancel()
	resp, err := client.AttemptOne(ctx, req)
	if err != nil {
		if !c.failedOne(req.GetAttempt().GetSeq(), err) {
			c.lost("attempt", err)
		}
		return
	}
	r := wire.ResultOf(resp.GetResult())
	taken, err := c.attempts.take([]uint64{r.Seq}, nil)
	for _, p := range taken {
		c.settle(p, &r, time.Now())
	}
	if err == nil && r.Seq != req.GetAttempt().GetSeq() {
		err = fmt.Errorf("%w: an answer to %d instead of %d", errProtocol, r.Seq, req.GetAttempt().GetSeq())
	}
	if err != nil {
		c.fault(err)
	}
}

// openControl starts the stream whose end tells the plugin that the host is gone.
func (c *conn) openControl() error {
	var err error
	if c.control, err = c.plugin.Control(c.ctx); err != nil {
		return fmt.Errorf("open control stream: %s", c.said(err.Error()))
	}
	c.workers.Go(c.beat)
	c.workers.Go(c.receiveControl)
	return nil
}

func (c *conn) beat() {
	tick := time.NewTicker(c.host.timing.heartbeat)
	defer tick.Stop()
	for n := uint64(1); ; n++ {
		err := c.control.Send(&pluginv1.ControlRequest{Frame: &pluginv1.ControlRequest_Heartbeat{
			Heartbeat: &pluginv1.Heartbeat{Number: n},
		}})
		if err != nil && !c.stopping.Load() {
			c.lost("control stream", err)
		}
		if err != nil {
			return
		}
		if c.unanswered.Add(1) == silentAfter {
			c.log.Warn("plugin does not answer; it is ended if that goes on", "pid", c.child.Pid())
		}
		select {
		case <-c.ctx.Done():
			return
		case <-c.release:
			_ = c.control.CloseSend()
			return
		case <-tick.C:
		}
		// Counted in beats, not in time, so that a host that was itself stopped accuses nobody.
		if c.unanswered.Load() > 3 {
			c.fail(fmt.Errorf("%w: three heartbeats without an answer", errHangs))
			return
		}
	}
}

func (c *conn) receiveControl() {
	for {
		resp, err := c.control.Recv()
		if err != nil {
			if !c.stopping.Load() {
				c.lost("control stream", err)
			}
			return
		}
		switch f := resp.GetFrame().(type) {
		case *pluginv1.ControlResponse_Heartbeat:
			c.unanswered.Store(0)
		case *pluginv1.ControlResponse_Logs:
			c.proc.logRecords(c, f.Logs)
		}
	}
}

// maxSaid is the most bytes of a text that a plugin gives.
const maxSaid = 512

// said is the one door through which a plugin's texts come in: bounded, on one line, and without the secrets of any of the
// tenants that the process works for.
func (c *conn) said(text string) string { return redact.Line(&c.secrets.Set, text, maxSaid) }

// fading are an instance's secrets from when its process was told to forget them until it must have.
type fading struct {
	until   time.Time
	release func()
}

// forget has secrets fade: attempts that hold them may still be at work, and what was written about them on its way.
func (c *conn) forget(release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fading = append(c.fading, fading{time.Now().Add(c.host.timing.fade), release})
}

// retire remembers an instance that is to be removed.
func (c *conn) retire(r retired) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retired = append(c.retired, r)
}

// sweep is called now and then; spare says that the host itself has just been away, and accuses nobody.
func (c *conn) sweep(now time.Time, spare bool) {
	for _, l := range []*link{c.attempts, c.signs, c.transforms} {
		if n, longest := l.overdue(now); n > 0 && !spare {
			c.fail(fmt.Errorf("%w: attempts without an answer long after their timeout: %d, the longest %v after it was written",
				errHangs, n, longest.Round(time.Millisecond)))
			return
		}
	}
	var refs []uint32
	c.mu.Lock()
	keep := c.retired[:0]
	for _, r := range c.retired {
		if now.Before(r.at) {
			keep = append(keep, r)
		} else {
			refs = append(refs, r.ref)
			c.fading = append(c.fading, fading{now.Add(c.host.timing.fade), r.release})
		}
	}
	clear(c.retired[len(keep):])
	c.retired = keep
	for len(c.fading) > 0 && now.After(c.fading[0].until) {
		c.fading[0].release()
		c.fading = c.fading[1:]
	}
	c.mu.Unlock()
	if len(refs) > 0 {
		go func() { // ends with the process, if not before
			ctx, cancel := context.WithTimeout(c.ctx, c.host.timing.call)
			defer cancel()
			if _, err := c.plugin.Remove(ctx, &pluginv1.RemoveRequest{Refs: refs}); err != nil && c.ctx.Err() == nil {
				c.log.Warn("remove instances", "count", len(refs), "err", c.said(err.Error()))
			}
		}()
	}
}

// stop ends the process in an orderly way: what was taken is finished, within limits.
func (c *conn) stop() {
	t := c.host.timing
	c.stopping.Store(true)
	if c.signs != nil {
		c.signs.stop()
	}
	if c.transforms != nil {
		c.transforms.stop()
	}
	if c.attempts != nil {
		c.attempts.stop()
	}
	over := c.host.closing.over
	wait(t.drain, c.drained, c.broken, over)
	close(c.release)
	if !wait(t.term, c.child.Exited(), over) {
		c.child.Signal(false)
		wait(t.term, c.child.Exited(), over)
	}
	c.end("it was stopped")
}

// wait reports whether done was closed in time; over, of which there may be two, end the wait as well.
func wait(longest time.Duration, done <-chan struct{}, over ...<-chan struct{}) bool {
	timer := time.NewTimer(longest)
	defer timer.Stop()
	ends := [2]<-chan struct{}{}
	copy(ends[:], over)
	select {
	case <-done:
		return true
	case <-ends[0]:
	case <-ends[1]:
	case <-timer.C:
	}
	return false
}

// end kills what is left of the process, and completes or sends elsewhere what it held.
func (c *conn) end(why string) {
	c.fail(errors.New(why))
	c.child.Signal(true)
	<-c.child.Exited()
	c.cancel()
	var written, queued []*pending
	for _, l := range []*link{c.attempts, c.signs, c.transforms} {
		if l == nil {
			continue
		}
		held, waited := l.kill()
		if l != c.attempts && c.stopping.Load() {
			queued = append(queued, held...) // signing and transforming reach nobody
		} else {
			written = append(written, held...)
		}
		queued = append(queued, waited...)
	}
	c.workers.Wait() // the sender may still be reading what it was about to send
	guilt := c.guilts(written)
	for _, p := range written {
		c.host.interrupted(p, why, guilt(p))
	}
	for _, p := range queued {
		c.host.plans.drop(c.host, p.plan)
		c.host.restart(p)
	}
	go c.client.Kill() // has no deadline of its own; here it only removes the socket's directory
}
