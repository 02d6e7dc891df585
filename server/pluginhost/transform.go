package pluginhost

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/internal/redact"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/check"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/subscription"
	"github.com/grapnel/grapnel/server/tracing"
)

// What is sent of a subscription with a transformer is made once for each delivery, kept, and only then sent:
//
//	transformFirst ── kept before ────────────────────▶ shaped, signed, sent
//	      └─────────▶ transforms ──▶ transformed ──▶ keep ────────▲
//
// Where the transformer is not there, what was kept is sent all the same, and the rest waits; the payload is never sent.
// A transformer's failures are the plugin's: attempts that say nothing of the receiver.

const (
	// transformWindow is how many transformations a process has unanswered at a time, which bounds what comes back at once.
	transformWindow = 128
	// defaultMadeBytes is the default of Options.MadeBytes.
	defaultMadeBytes = 32 << 20
	// jsonType is what a transformer makes that says nothing else.
	jsonType = "application/json"
)

// madeBytes is what transformers have made and attempts at hand carry.
type madeBytes struct {
	used  atomic.Int64
	limit int64
}

func newMadeBytes(limit int64) *madeBytes {
	return &madeBytes{limit: cmp.Or(max(0, limit), defaultMadeBytes)}
}

func (m *madeBytes) add(n int64) {
	if n != 0 {
		m.used.Add(n)
	}
}

// hold has p carry what was made.
func (h *Host) hold(p *pending, made *delivery.Made) {
	p.made = made
	h.count(p, made)
}

// count counts what was made for p, also while it waits to be kept, until p is completed.
func (h *Host) count(p *pending, made *delivery.Made) {
	size := int64(len(made.Body))
	h.made.add(size - p.held)
	p.held = size
}

// transformFirst finds what was kept for p, or has it made.
func (h *Host) transformFirst(p *pending, pl *plan) {
	if h.made.used.Load() > h.made.limit {
		h.unspent(p, "there is no memory for what transformers make until earlier attempts have ended")
		return
	}
	if h.opts.Bodies != nil && !p.job.Trial() {
		made, err := h.opts.Bodies.Made(p.job)
		if err != nil {
			h.log.Error("what a transformer has made cannot be read", "delivery_id", p.job.ID.String(), "err", err)
			h.unspent(p, "what the transformer has made cannot be read")
			return
		}
		if made != nil {
			h.hold(p, made)
			h.submit(p, pl)
			return
		}
	}
	if pl.transformer == nil {
		h.awaitTransformer(p, pl)
		return
	}
	p.plan, p.Timeout = pl, pl.timeout
	p.Ref = pl.transformer.ref
	if pl.transformer.conn.transforms.enqueue(p) != accepted { // the process is gone, or going
		h.plans.drop(h, pl)
		h.restart(p)
	}
}

// awaitTransformer has p wait for the process that its plan was made without, unless it has come up meanwhile.
func (h *Host) awaitTransformer(p *pending, pl *plan) {
	pb := p.sub.Proto().GetTransformer()
	id := check.TransformerID(pb)
	_, err := h.resolve("transformer", id, pb)
	switch {
	case err == nil:
		h.plans.drop(h, pl)
		h.restart(p)
	case h.above != nil && h.above.kinds.absent(id) != "": // a ward is not to be held up by those who wait
		h.unspent(p, h.absence(p.sub.Proto()))
	default:
		h.park(p)
	}
}

// openTransforms opens the stream for transformers.
func (c *conn) openTransforms() error {
	stream, err := pluginv1.NewTransformerServiceClient(c.grpc).Transform(c.ctx)
	if err != nil {
		return fmt.Errorf("open transform stream: %s", c.said(err.Error()))
	}
	c.transforms = newLink(transformWindow, func(batch []*pending) error {
		var b wire.Batch
		for _, p := range batch {
			b.Add(&p.Attempt)
		}
		req := b.TransformRequest()
		c.transforms.read()
		return stream.Send(req)
	})
	c.workers.Go(func() {
		err := c.transforms.run()
		if err == nil && c.stopping.Load() {
			err = stream.CloseSend()
		}
		if err != nil {
			c.lost("transform stream", err)
		}
	})
	c.workers.Go(func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				if !c.stopping.Load() {
					c.lost("transform stream", err)
				}
				return
			}
			if err := c.transformed(resp); err != nil {
				c.fault(err)
				return
			}
		}
	})
	return nil
}

// transformed goes on with what was made, and ends what was dropped or has failed.
func (c *conn) transformed(resp *pluginv1.TransformResponse) error {
	seqs := make([]uint64, len(resp.GetResults()))
	for i, r := range resp.GetResults() {
		seqs[i] = r.GetSeq()
	}
	taken, err := c.transforms.take(seqs, nil)
	if len(taken) > 0 {
		c.answered.Store(true)
	}
	now := time.Now()
	for i, p := range taken {
		c.host.metrics.phases.observe(phaseTransform, now.Sub(p.written))
		if p.traced != nil && p.plan.transformer != nil {
			p.traced.Hop(tracing.Step{Name: "transform", Plugin: p.plan.transformer.id, From: p.written, Took: now.Sub(p.written)})
		}
		switch r := resp.GetResults()[i]; {
		case r.GetTransformed() != nil:
			made := madeOf(r.GetTransformed())
			c.host.count(p, made)
			go c.host.keep(p, made) // it waits for the disk
		case r.GetDropped() != nil:
			c.host.dropped(p, r.GetDropped().GetReason())
		default:
			c.failed(p, transformerFailure(r.GetFailure()), &wire.Result{}, now)
		}
	}
	return err
}

// transformerFailure is what is taken of a failure: a transformer knows no receiver, and nothing was sent.
func transformerFailure(f *pluginv1.Failure) *pluginv1.Failure {
	out := &pluginv1.Failure{
		Source: pluginv1.Failure_SOURCE_PLUGIN, Code: f.GetCode(), Message: f.GetMessage(), WireState: pluginv1.Failure_WIRE_STATE_NOT_SENT,
	}
	if f.GetSource() == pluginv1.Failure_SOURCE_CONFIG {
		out.Source = f.GetSource()
	}
	if out.Code == codeShortage { // of what attempts need
		out.Code = codeTransform
	}
	return out
}

// codeTransform is what a plugin says when it could not transform.
const codeTransform = "transform"

func madeOf(t *pluginv1.Transformed) *delivery.Made {
	made := &delivery.Made{Body: t.GetBody(), ContentType: cmp.Or(t.GetContentType(), jsonType)}
	for _, h := range t.GetHeaders() {
		made.Headers = append(made.Headers, delivery.Header{Name: strings.ToLower(h.GetName()), Value: h.GetValue()})
	}
	return made
}

// shownMade is what was made as callers are shown it: without the subscription's secrets.
func (p *pending) shownMade() *delivery.Made {
	own := &p.plan.own
	shown := &delivery.Made{Body: []byte(own.Clean(string(p.made.Body))), ContentType: p.made.ContentType}
	for _, h := range p.made.Headers {
		shown.Headers = append(shown.Headers, delivery.Header{Name: h.Name, Value: own.Clean(h.Value)})
	}
	return shown
}

// madeFault says why what was made cannot be sent; empty when it can.
func (pl *plan) madeFault(made *delivery.Made) string {
	if n := len(made.Body); n > delivery.MaxMade {
		return fmt.Sprintf("the body has %d bytes; at most %d can be sent", n, delivery.MaxMade)
	}
	headers := make([][2]string, len(made.Headers))
	for i, h := range made.Headers {
		headers[i] = [2]string{h.Name, h.Value}
	}
	return subscription.MadeFault(made.ContentType, headers, pl.signed)
}

// keep stores what was made for p, and goes on with what is stored.
func (h *Host) keep(p *pending, made *delivery.Made) {
	if why := p.plan.madeFault(made); why != "" {
		h.refused(p, redact.Line(&p.plan.own, codeTransform+": "+why, maxSaid))
		return
	}
	if h.opts.Bodies != nil && !p.job.Trial() {
		ctx, cancel := context.WithTimeout(context.Background(), p.plan.timeout+p.plan.grace)
		defer cancel()
		var err error
		if made, err = h.opts.Bodies.KeepMade(ctx, p.job, made); err != nil {
			h.unspent(p, "what the transformer has made cannot be stored: "+err.Error())
			return
		}
	}
	h.hold(p, made)
	if p.tried {
		h.complete(p, delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeSucceeded, Start: p.Created}})
		return
	}
	p.Created = time.Time{} // the attempt begins now
	h.submit(p, p.plan)
}

// dropped ends a delivery of which nothing is to be sent.
func (h *Host) dropped(p *pending, reason string) {
	h.complete(p, delivery.Result{Cause: delivery.CauseDropped, Attempt: delivery.Attempt{
		Error: redact.Line(&p.plan.own, reason, maxSaid),
	}})
}
