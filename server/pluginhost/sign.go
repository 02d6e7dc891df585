package pluginhost

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/tracing"
)

const signWindow = 1024

// openSigns opens the stream for signers whose transport is in another process.
func (c *conn) openSigns() error {
	stream, err := pluginv1.NewSignerServiceClient(c.grpc).Sign(c.ctx)
	if err != nil {
		return fmt.Errorf("open sign stream: %s", c.said(err.Error()))
	}
	c.signs = newLink(signWindow, func(batch []*pending) error {
		var b wire.Batch
		for _, p := range batch {
			b.Add(&p.Attempt)
		}
		req := b.SignRequest()
		c.signs.read()
		return stream.Send(req)
	})
	c.workers.Go(func() {
		err := c.signs.run()
		if err == nil && c.stopping.Load() {
			err = stream.CloseSend()
		}
		if err != nil {
			c.lost("sign stream", err)
		}
	})
	c.workers.Go(func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				if !c.stopping.Load() {
					c.lost("sign stream", err)
				}
				return
			}
			if err := c.signed(resp); err != nil {
				c.fault(err)
				return
			}
		}
	})
	return nil
}

// signed sends what was signed on to its next signer or to its transport.
func (c *conn) signed(resp *pluginv1.SignResponse) error {
	seqs := make([]uint64, len(resp.GetResults()))
	for i, r := range resp.GetResults() {
		seqs[i] = r.GetSeq()
	}
	taken, err := c.signs.take(seqs, nil)
	if len(taken) > 0 {
		c.answered.Store(true)
	}
	now := time.Now()
	for i, p := range taken {
		c.host.metrics.phases.observe(phaseSign, now.Sub(p.written))
		if p.traced != nil {
			p.traced.Hop(tracing.Step{Name: "sign", Plugin: p.plan.remote[p.stage].id, From: p.written, Took: now.Sub(p.written)})
		}
		r := resp.GetResults()[i]
		if r.GetFailure() != nil {
			c.failed(p, r.GetFailure(), &wire.Result{}, now)
			continue
		}
		if why := p.addSigned(r.GetHeaders()); why != "" {
			c.host.refused(p, why)
			continue
		}
		if r.GetUri() != "" {
			p.URI = r.GetUri()
		}
		p.stage++
		c.host.submit(p, p.plan)
	}
	return err
}

// addSigned adds what the signer of this stage set, or says why that cannot be.
func (p *pending) addSigned(headers []*pluginv1.Header) string {
	for _, h := range headers {
		name := strings.ToLower(h.GetName())
		for i, have := range p.Headers {
			switch {
			case have.Name != name || p.setBy[i] == p.stage:
			case p.setBy[i] == setBySubscription:
				return fmt.Sprintf("signer plugins/%s set the header %s, which the subscription makes of the event", p.plan.remote[p.stage].id, name)
			default:
				return fmt.Sprintf("signer plugins/%s set the header %s, which signer plugins/%s before it has set",
					p.plan.remote[p.stage].id, name, p.plan.remote[p.setBy[i]].id)
			}
		}
		p.Headers = append(p.Headers, delivery.Header{Name: name, Value: h.GetValue()})
		p.setBy = append(p.setBy, p.stage)
	}
	return ""
}

// failedOne ends an attempt whose call failed; false when it is the process or the connection that failed. The
// author's exception, or a handler that does not end in time, costs the attempt only.
func (c *conn) failedOne(seq uint64, err error) bool {
	s := status.Convert(err)
	switch {
	case c.ctx.Err() != nil, s.Code() == codes.Unavailable, s.Code() == codes.Canceled,
		s.Code() == codes.ResourceExhausted && strings.Contains(s.Message(), "larger than max"),
		s.Code() == codes.Internal && strings.Contains(s.Message(), "unmarshal"):
		return false
	}
	taken, _ := c.attempts.take([]uint64{seq}, nil)
	for _, p := range taken {
		c.settle(p, &wire.Result{Seq: seq, Failure: &pluginv1.Failure{
			Source: pluginv1.Failure_SOURCE_PLUGIN, Code: "call", Message: s.Code().String() + ": " + s.Message(),
			WireState: pluginv1.Failure_WIRE_STATE_MAYBE_SENT,
		}}, time.Now())
	}
	return true
}
