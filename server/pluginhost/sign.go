package pluginhost

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

const signWindow = 1024

// openSigns opens the stream for signers whose transport is in another process.
func (c *conn) openSigns() error {
	stream, err := pluginv1.NewSignerServiceClient(c.grpc).Sign(c.ctx)
	if err != nil {
		return fmt.Errorf("open sign stream: %w", err)
	}
	c.signs = newLink(signWindow, func(batch []*pending) error { return stream.Send(signRequest(batch)) })
	c.workers.Go(func() {
		err := c.signs.run()
		if err == nil && c.stopping.Load() {
			err = stream.CloseSend()
		}
		if err != nil {
			c.fail(fmt.Errorf("sign stream: %w", err))
		}
	})
	c.workers.Go(func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				if !c.stopping.Load() {
					c.fail(fmt.Errorf("sign stream: %w", err))
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

func signRequest(batch []*pending) *pluginv1.SignRequest {
	var table batchFrame
	table.fill(batch)
	req := &pluginv1.SignRequest{Items: make([]*pluginv1.SignItem, len(batch))}
	for _, c := range table.contents {
		req.Contents = append(req.Contents, contentOf(c))
	}
	for i, p := range batch {
		req.Items[i] = &pluginv1.SignItem{
			Seq: p.seq, InstanceRef: p.plan.remote[p.stage].ref, Content: table.index[i],
			Created: timestamppb.New(p.created), Nonce: p.nonce[:], Headers: wireHeaders(p.headers), Uri: p.uri,
		}
	}
	return req
}

// contentOf is appendContent for messages off the hot path.
func contentOf(c content) *pluginv1.Content {
	out := &pluginv1.Content{MessageId: c.event.UID, Body: c.body(), EventType: c.event.Type}
	for name, value := range c.headers {
		out.Headers = append(out.Headers, &pluginv1.Header{Name: name, Value: value})
	}
	return out
}

func wireHeaders(headers []delivery.Header) []*pluginv1.Header {
	out := make([]*pluginv1.Header, len(headers))
	for i, h := range headers {
		out[i] = &pluginv1.Header{Name: h.Name, Value: h.Value}
	}
	return out
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
	for i, p := range taken {
		r := resp.GetResults()[i]
		if r.GetFailure() != nil {
			c.failed(p, r.GetFailure(), &result{}, time.Now())
			continue
		}
		if why := p.addSigned(r.GetHeaders()); why != "" {
			c.host.refused(p, why)
			continue
		}
		if r.GetUri() != "" {
			p.uri = r.GetUri()
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
		for i, have := range p.headers {
			if have.Name == name && p.setBy[i] != p.stage {
				return fmt.Sprintf("signer plugins/%s set the header %s, which signer plugins/%s before it has set",
					p.plan.remote[p.stage].id, name, p.plan.remote[p.setBy[i]].id)
			}
		}
		p.headers = append(p.headers, delivery.Header{Name: name, Value: h.GetValue()})
		p.setBy = append(p.setBy, p.stage)
	}
	return ""
}

// unaryRequest is an attempt by itself.
func unaryRequest(p *pending) *pluginv1.AttemptOneRequest {
	a := &pluginv1.Attempt{
		Seq: p.seq, InstanceRef: p.plan.ref, AttemptNumber: uint32(p.job.Attempts + 1),
		TimeoutMs: uint32(p.plan.timeout.Milliseconds()), CreatedUnixNano: p.created.UnixNano(),
		SignHere: p.plan.local, Headers: wireHeaders(p.headers), Uri: p.uri, OwnershipCheck: p.ownership,
	}
	if !p.ownership {
		a.Nonce, a.Traceparent = p.nonce[:], string(appendTraceparent(nil, p.job.Event))
	}
	return &pluginv1.AttemptOneRequest{Attempt: a, Content: contentOf(p.content()), MaxResponseBody: maxResponse}
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
		c.settle(p, &result{seq: seq, failure: &pluginv1.Failure{
			Source: pluginv1.Failure_SOURCE_PLUGIN, Code: "call", Message: s.Code().String() + ": " + s.Message(),
			WireState: pluginv1.Failure_WIRE_STATE_MAYBE_SENT,
		}}, time.Now())
	}
	return true
}

// resultOf reads a result that came by itself.
func resultOf(in *pluginv1.AttemptResult) result {
	r := result{
		seq: in.GetSeq(), failure: in.GetFailure(), peer: in.GetPeer(), sent: headersOf(in.GetSentHeaders()),
		total: time.Duration(in.GetTotalUs()) * time.Microsecond,
	}
	if resp := in.GetResponse(); resp != nil {
		r.answered, r.status, r.headers = true, int(resp.GetStatus()), headersOf(resp.GetHeaders())
		r.body, r.truncated = resp.GetBody(), resp.GetBodyTruncated()
		if len(r.body) > maxResponse {
			r.body, r.truncated = r.body[:maxResponse], true
		}
	}
	return r
}

func headersOf(in []*pluginv1.Header) []delivery.Header {
	out := make([]delivery.Header, len(in))
	for i, h := range in {
		out[i] = delivery.Header{Name: h.GetName(), Value: h.GetValue()}
	}
	return out
}
