package plugintest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Sign has the instance sign a request and returns it with what was added. The error of a signer that
// could not is a *plugin.Failure. Method and URL are those of the instance's target; a Nonce is always there.
func (c *Configured) Sign(req plugin.Request) (plugin.Request, error) {
	res, err := c.h.signers.sign(&pluginv1.SignRequest{
		Contents: []*pluginv1.Content{contentOf(&req)},
		Items: []*pluginv1.SignItem{{
			Seq: uint64(c.h.refs.Add(1)), InstanceRef: c.ref, Created: timestamppb.New(req.Created), Nonce: nonceOf(&req),
		}},
	})
	if err != nil {
		return req, err
	}
	if res.GetFailure() != nil {
		return req, failureOf(res.GetFailure(), "")
	}
	signed := req
	signed.Headers = append(slices.Clone(req.Headers), headersOf(res.GetHeaders())...)
	if res.GetUri() != "" {
		signed.URL = res.GetUri()
	}
	return signed, nil
}

// Attempt has the instance send a request over the batched stream, after the signers have signed it in
// the same hop. The attempt's timeout is ctx's deadline, and when ctx is cancelled the harness sends a
// Cancel. The error of an attempt without an answer is a *plugin.Failure.
func (c *Configured) Attempt(ctx context.Context, req plugin.Request, signers ...*Configured) (*plugin.Response, error) {
	timeout := attemptTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(time.Until(deadline), time.Millisecond)
	}
	created := req.Created
	if created.IsZero() {
		created = time.Now()
	}
	a := &pluginv1.Attempt{
		InstanceRef: c.ref, AttemptNumber: uint32(cmp.Or(req.AttemptNumber, 1)), TimeoutMs: uint32(timeout.Milliseconds()),
		CreatedUnixNano: created.UnixNano(), Traceparent: req.Traceparent, Tracestate: req.Tracestate, Nonce: nonceOf(&req), Uri: req.URL, OwnershipCheck: req.OwnershipCheck,
	}
	if req.Batch {
		a.MaxResponseBody = uint32(cmp.Or(req.MaxResponseBody, MaxResponseBody))
	}
	for _, s := range signers {
		a.SignHere = append(a.SignHere, s.ref)
	}
	res, err := c.h.stream.attempt(ctx, cmp.Or(req.MaxResponseBody, MaxResponseBody), a, contentOf(&req))
	if err != nil {
		return nil, err
	}
	if f := res.GetFailure(); f != nil || res.GetResponse() == nil {
		return nil, failureOf(f, res.GetPeer())
	}
	r := res.GetResponse()
	return &plugin.Response{
		Status: int(r.GetStatus()), Headers: headersOf(r.GetHeaders()), Body: r.GetBody(),
		Truncated: r.GetBodyTruncated(), Note: r.GetNote(), Peer: res.GetPeer(),
	}, nil
}

// Transform has the instance transform an event. The time it has is ctx's deadline. The error of an event that it drops is
// plugin.Drop's, that of a transformer that could not a *plugin.Failure.
func (c *Configured) Transform(ctx context.Context, e plugin.Event) (*plugin.Transformed, error) {
	timeout := attemptTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(time.Until(deadline), time.Millisecond)
	}
	stream, err := pluginv1.NewTransformerServiceClient(c.h.conn).Transform(ctx)
	if err != nil {
		return nil, fmt.Errorf("open transform stream: %w", err)
	}
	event := &pluginv1.Event{
		MessageId: e.MessageID, Id: e.ID, Source: e.Source, Type: e.Type, Subject: e.Subject, DataSchema: e.Schema, Attributes: e.Attributes,
		ContentType: e.ContentType, Data: e.Data,
	}
	if !e.Time.IsZero() {
		event.Time = timestamppb.New(e.Time)
	}
	if err := stream.Send(&pluginv1.TransformRequest{
		Events: []*pluginv1.Event{event},
		Items:  []*pluginv1.TransformItem{{Seq: 1, InstanceRef: c.ref, TimeoutMs: uint32(timeout.Milliseconds())}},
	}); err != nil {
		return nil, fmt.Errorf("send: %w", err)
	}
	resp, err := stream.Recv()
	if err == nil && len(resp.GetResults()) != 1 {
		err = fmt.Errorf("%d results for one item", len(resp.GetResults()))
	}
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	_ = stream.CloseSend()
	r := resp.GetResults()[0]
	switch {
	case r.GetDropped() != nil:
		return nil, plugin.Drop(r.GetDropped().GetReason())
	case r.GetTransformed() == nil:
		return nil, failureOf(r.GetFailure(), "")
	}
	t := r.GetTransformed()
	return &plugin.Transformed{Body: t.GetBody(), ContentType: t.GetContentType(), Headers: headersOf(t.GetHeaders())}, nil
}

// nonceOf is the request's, or one that is there as the host's always is, and the same in each test.
func nonceOf(req *plugin.Request) []byte {
	if len(req.Nonce) > 0 {
		return req.Nonce
	}
	return []byte("plugintest-nonce")
}

func contentOf(req *plugin.Request) *pluginv1.Content {
	return &pluginv1.Content{MessageId: req.MessageID, EventType: req.EventType, Body: req.Body, Headers: wireHeaders(req.Headers)}
}

// signing is the Sign stream, opened at first use; one request at a time.
type signing struct {
	ctx    context.Context //nolint:containedctx // the harness's life
	client pluginv1.SignerServiceClient

	mu     sync.Mutex // guards stream and serialises use of it
	stream pluginv1.SignerService_SignClient
}

func (s *signing) init(ctx context.Context, client pluginv1.SignerServiceClient) {
	s.ctx, s.client = ctx, client
}

func (s *signing) sign(req *pluginv1.SignRequest) (*pluginv1.SignResult, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stream == nil {
		stream, err := s.client.Sign(s.ctx)
		if err != nil {
			return nil, fmt.Errorf("open sign stream: %w", err)
		}
		s.stream = stream
	}
	if err := s.stream.Send(req); err != nil {
		return nil, fmt.Errorf("send: %w", err)
	}
	resp, err := s.stream.Recv()
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	if n := len(resp.GetResults()); n != 1 || resp.GetResults()[0].GetSeq() != req.GetItems()[0].GetSeq() {
		return nil, fmt.Errorf("%d results, or another's, for one item", n)
	}
	return resp.GetResults()[0], nil
}

// attempts are the Attempt streams, one per max_response_body, opened at first use.
type attempts struct {
	ctx     context.Context //nolint:containedctx // the harness's life
	client  pluginv1.TransportServiceClient
	readers sync.WaitGroup

	mu      sync.Mutex // guards what follows, and serialises sends
	streams map[int]pluginv1.TransportService_AttemptClient
	waiting map[uint64]chan *pluginv1.AttemptResult
	seq     uint64
	broken  error
}

func (s *attempts) init(ctx context.Context, client pluginv1.TransportServiceClient) {
	s.ctx, s.client = ctx, client
	s.streams = map[int]pluginv1.TransportService_AttemptClient{}
	s.waiting = map[uint64]chan *pluginv1.AttemptResult{}
}

func (s *attempts) attempt(ctx context.Context, maxBody int, a *pluginv1.Attempt, c *pluginv1.Content) (*pluginv1.AttemptResult, error) {
	stream, answer, err := s.send(maxBody, a, c)
	if err != nil {
		return nil, err
	}
	done := ctx.Done()
	for {
		select {
		case res, ok := <-answer:
			if !ok {
				s.mu.Lock()
				defer s.mu.Unlock()
				return nil, fmt.Errorf("attempt stream: %w", s.broken)
			}
			return res, nil
		case <-done:
			done = nil
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				continue // the plugin keeps the time itself
			}
			s.mu.Lock()
			err := stream.Send(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Cancel{
				Cancel: &pluginv1.Cancel{Seqs: []uint64{a.GetSeq()}},
			}})
			s.mu.Unlock()
			if err != nil {
				return nil, fmt.Errorf("send cancel: %w", err)
			}
		}
	}
}

func (s *attempts) send(maxBody int, a *pluginv1.Attempt, c *pluginv1.Content) (pluginv1.TransportService_AttemptClient, chan *pluginv1.AttemptResult, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stream := s.streams[maxBody]
	if stream == nil {
		var err error
		if stream, err = s.open(maxBody); err != nil {
			return nil, nil, err
		}
		s.streams[maxBody] = stream
	}
	s.seq++
	a.Seq = s.seq
	answer := make(chan *pluginv1.AttemptResult, 1)
	s.waiting[a.Seq] = answer
	err := stream.Send(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Batch{
		Batch: &pluginv1.AttemptBatch{Contents: []*pluginv1.Content{c}, Attempts: []*pluginv1.Attempt{a}},
	}})
	if err != nil {
		return nil, nil, fmt.Errorf("send: %w", err)
	}
	return stream, answer, nil
}

func (s *attempts) open(maxBody int) (pluginv1.TransportService_AttemptClient, error) {
	stream, err := s.client.Attempt(s.ctx)
	if err != nil {
		return nil, fmt.Errorf("open attempt stream: %w", err)
	}
	hello := &pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Hello{
		Hello: &pluginv1.Hello{MaxResponseBody: uint32(maxBody)},
	}}
	if err := stream.Send(hello); err != nil {
		return nil, fmt.Errorf("send hello: %w", err)
	}
	welcome, err := stream.Recv()
	if err != nil {
		return nil, fmt.Errorf("receive welcome: %w", err)
	}
	if welcome.GetWelcome().GetCredits() == 0 {
		return nil, errors.New("the first frame is no welcome, or has no credits")
	}
	s.readers.Go(func() { s.read(stream) })
	return stream, nil
}

func (s *attempts) read(stream pluginv1.TransportService_AttemptClient) {
	for {
		resp, err := stream.Recv()
		s.mu.Lock()
		if err != nil {
			s.broken = err
			for seq, answer := range s.waiting {
				close(answer)
				delete(s.waiting, seq)
			}
			s.mu.Unlock()
			return
		}
		for _, res := range resp.GetResults().GetResults() {
			if answer := s.waiting[res.GetSeq()]; answer != nil {
				answer <- res
				delete(s.waiting, res.GetSeq())
			}
		}
		s.mu.Unlock()
	}
}
