package conformance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// rawCodec sends bytes as they are.
type rawCodec struct{ encoding.CodecV2 }

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.([]byte); ok {
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	return c.CodecV2.Marshal(v)
}

func malformedFrames(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	var methods []string // not Control, whose end would tell the plugin to go
	if t.s.offers(carrying) && t.s.can("attempt.stream") {
		methods = append(methods, "/grapnel.plugin.v1.TransportService/Attempt")
	}
	if t.s.offers(signs) {
		methods = append(methods, "/grapnel.plugin.v1.SignerService/Sign")
	}
	if t.s.offers(transforming) {
		methods = append(methods, "/grapnel.plugin.v1.TransformerService/Transform")
	}
	for _, method := range methods {
		if err := ses.sendBytes(method, []byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f, 1, 2, 3}); err != nil {
			return err
		}
		if err := ses.alive(); err != nil {
			return fmt.Errorf("after bytes that are no message, on %s: %w", method, err)
		}
	}
	u := t.anyTransport()
	if u == nil || !t.s.can("attempt.stream") || t.s.noWelcome {
		return nil
	}
	a, err := ses.openAttempts()
	if err != nil {
		return err
	}
	bad := newAttempt(1, attemptTimeout)
	bad.Content = 7
	if p, err := a.submit(twoContents(), bad); err == nil {
		res, err := a.waitFor(p[0], 5*time.Second)
		a.mu.Lock()
		ended := a.ended
		a.mu.Unlock()
		if res.GetResponse() != nil {
			return errors.New("an attempt that names content 7 of 2 has a response")
		}
		if err != nil && !ended {
			return fmt.Errorf("an attempt that names content 7 of 2: %w", err)
		}
	}
	if err := ses.alive(); err != nil {
		return fmt.Errorf("after an attempt that names content 7 of 2: %w", err)
	}
	again, err := ses.openAttempts()
	if err != nil {
		return fmt.Errorf("a new stream after a malformed frame: %w", err)
	}
	_, err = again.one(newContent("evt_after", []byte(`{}`)), newAttempt(1<<20, attemptTimeout))
	return err
}

// sendBytes opens a stream, sends bytes as a message and waits for the stream's end.
func (ses *session) sendBytes(method string, b []byte) error {
	ctx, cancel := context.WithTimeout(ses.t.ctx, callLimit)
	defer cancel()
	stream, err := ses.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method,
		grpc.ForceCodecV2(rawCodec{encoding.GetCodecV2(proto.Name)}))
	if err != nil {
		return err
	}
	if err := stream.SendMsg(b); err != nil {
		return nil //nolint:nilerr // it was refused already
	}
	_ = stream.CloseSend()
	for stream.RecvMsg(&pluginv1.AttemptResponse{}) == nil {
	}
	if ctx.Err() != nil {
		return latef("%s: a stream with bytes that are no message is not ended within %v", method, callLimit)
	}
	return nil
}

func laterFrames(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	strange := &pluginv1.ControlRequest{}
	strange.ProtoReflect().SetUnknown(laterField())
	loud := &pluginv1.ControlRequest{Frame: &pluginv1.ControlRequest_SetLogLevel{SetLogLevel: &pluginv1.SetLogLevel{Level: "DEAFENING"}}}
	if err := errors.Join(ses.control.send(strange), ses.control.send(loud), ses.control.send(&pluginv1.ControlRequest{})); err != nil {
		return err
	}
	if _, err := ses.control.beat(t.ctx, callLimit); err != nil {
		return fmt.Errorf("after an unknown frame on Control: %w", err)
	}
	u := t.anyTransport()
	if u == nil || !t.s.can("attempt.stream") || t.s.noWelcome {
		return nil
	}
	a, err := ses.openAttempts()
	if err != nil {
		return err
	}
	frame := &pluginv1.AttemptRequest{}
	frame.ProtoReflect().SetUnknown(laterField())
	if err := errors.Join(a.send(frame), a.send(&pluginv1.AttemptRequest{})); err != nil {
		return err
	}
	c, at := newContent("evt_later", []byte(`{}`)), newAttempt(1<<20, attemptTimeout)
	c.ProtoReflect().SetUnknown(laterField())
	at.ProtoReflect().SetUnknown(laterField())
	if _, err := a.one(c, at); err != nil {
		return fmt.Errorf("after an unknown frame on Attempt: %w", err)
	}
	return nil
}

func failuresSpareOthers(t *trial) error {
	c, err := t.flowHTTP(func(x *exchange) {
		if x.target == "/reset" {
			reset(x.Conn)
			return
		}
		answer200(x)
	})
	if err != nil {
		return err
	}
	port, err := closedPort()
	if err != nil {
		return err
	}
	refused, err := c.instance(fmt.Sprintf("http://127.0.0.1:%d/", port))
	if err != nil {
		return err
	}
	resets, err := c.instance(c.sink.url + "/reset")
	if err != nil {
		return err
	}
	list := c.attempts(60, attemptTimeout)
	for i, at := range list {
		switch i % 4 {
		case 1:
			at.InstanceRef = refused
		case 2:
			at.InstanceRef = resets
		case 3:
			at.InstanceRef = 1 << 20
		}
	}
	sent, err := c.a.submit(twoContents(), list...)
	if err != nil {
		return err
	}
	for i, p := range sent {
		res, err := c.a.wait(p)
		if err != nil {
			return err
		}
		if good := i%4 == 0; good && res.GetResponse() == nil {
			return fmt.Errorf("beside failing ones, a good attempt fails too: %s", failureText(res.GetFailure()))
		}
	}
	return nil
}

func unknownRef(t *trial) error {
	c, err := t.flow(answer200)
	if err != nil {
		return err
	}
	for _, ref := range []uint32{0, 1 << 20, 1<<32 - 1} {
		res, err := c.a.one(newContent("evt_ref", []byte(`{}`)), newAttempt(ref, attemptTimeout))
		if err != nil {
			return err
		}
		f, err := mustFail(res)
		if err != nil {
			return fmt.Errorf("ref %d: %w", ref, err)
		}
		if err := outcome(f, pluginv1.Failure_SOURCE_CONFIG, nil, notSent); err != nil {
			return fmt.Errorf("ref %d: %w", ref, err)
		}
	}
	return nil
}

func heartbeats(t *trial) error {
	const limit = 5 * time.Second // how often the server sends them
	ses, err := t.session()
	if err != nil {
		return err
	}
	for range 3 {
		if _, err := ses.control.beat(t.ctx, limit); err != nil {
			return err
		}
	}
	done := make(chan error, 1)
	go func() { done <- ses.load(1000) }()
	for {
		if _, err := ses.control.beat(t.ctx, limit); err != nil {
			return fmt.Errorf("under load: %w", err)
		}
		select {
		case err := <-done:
			return err
		default:
		}
	}
}

func attemptOne(t *trial) error {
	if t.s.offers(carrying) && !t.s.can("attempt.unary") {
		return skipf(`it does not have the capability "attempt.unary"`)
	}
	c, err := t.flow(answer200)
	if err != nil {
		return err
	}
	single := &attempts{
		ses: c.ses, ctx: t.ctx, client: c.a.client, credits: 64, free: 64,
		changed: make(chan struct{}), waiting: map[uint64]*pending{}, done: map[uint64]bool{},
	}
	sent, err := single.submit(twoContents(), append(c.attempts(100, attemptTimeout), newAttempt(1<<20, attemptTimeout))...)
	if err != nil {
		return err
	}
	for i, p := range sent {
		res, err := single.wait(p)
		if err != nil {
			return err
		}
		if i == len(sent)-1 {
			f, err := mustFail(res)
			if err != nil {
				return err
			}
			return outcome(f, pluginv1.Failure_SOURCE_CONFIG, nil, notSent)
		}
		if answers(c.u) && res.GetResponse().GetStatus() != 200 {
			return fmt.Errorf("a receiver that answers 200: the outcome is %v", res)
		}
	}
	return nil
}

// pausedHost lets answers pile up without reading them.
func pausedHost(t *trial) error {
	if err := t.streaming(); err != nil {
		return err
	}
	c, err := t.flow(answer200)
	if err != nil {
		return err
	}
	sent, err := c.a.submit(twoContents(), c.attempts(min(500, c.a.credits), attemptTimeout)...)
	if err != nil {
		return err
	}
	// Reading goes on in the background; holding the lock that it takes stops it.
	c.a.mu.Lock()
	c.ses.proc.hasEnded(t.ctx, time.Second)
	c.a.mu.Unlock()
	for _, p := range sent {
		if _, err := c.a.wait(p); err != nil {
			return err
		}
	}
	return nil
}

func largeBatch(t *trial) error {
	c, err := t.flow(answer200)
	if err != nil {
		return err
	}
	contents := twoContents()
	for _, content := range contents {
		content.Body = make([]byte, 1<<20-1024)
	}
	if limit := c.u.kind.GetTransport().GetMaxBodyBytes(); limit > 0 && limit < 1<<20 {
		return skipf("its max_body_bytes is %d", limit)
	}
	sent, err := c.a.submit(contents, c.attempts(4, attemptTimeout)...)
	if err != nil {
		return err
	}
	for _, p := range sent {
		res, err := c.a.wait(p)
		if err != nil {
			return err
		}
		if answers(c.u) && res.GetResponse() == nil {
			return fmt.Errorf("an attempt with 1 MiB fails: %s", failureText(res.GetFailure()))
		}
	}
	return nil
}
