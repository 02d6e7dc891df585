package plugin

import (
	"context"
	"errors"
	"io"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Sign signs batch by batch. Signers do no I/O, so they run on the stream's own goroutine, but for those that have to wait
// for their turns: no other waits for them. The host bounds how many are open.
func (s *server) Sign(stream grpc.BidiStreamingServer[pluginv1.SignRequest, pluginv1.SignResponse]) error {
	var sending sync.Mutex
	send := func(results ...*pluginv1.SignResult) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(&pluginv1.SignResponse{Results: results})
	}
	var aside sync.WaitGroup
	defer aside.Wait()
	ctx := stream.Context()
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		contents := make([]content, len(req.GetContents()))
		for i, c := range req.GetContents() {
			contents[i] = content{
				messageID: c.GetMessageId(), body: c.GetBody(), headers: headersOf(c.GetHeaders()), eventType: c.GetEventType(),
			}
		}
		results := make([]*pluginv1.SignResult, 0, len(req.GetItems()))
		slow := map[uint32][]*pluginv1.SignItem{} // by instance, whose items stay in their order
		for _, item := range req.GetItems() {
			if ref := item.GetInstanceRef(); len(slow[ref]) > 0 || s.signsSlowly(contents, item) {
				slow[ref] = append(slow[ref], item)
				continue
			}
			results = append(results, s.signItem(ctx, contents, item))
		}
		for _, items := range slow {
			aside.Go(func() {
				for _, item := range items {
					if send(s.signItem(ctx, contents, item)) != nil {
						return // the stream has ended
					}
				}
			})
		}
		if len(results) == 0 {
			continue
		}
		if err := send(results...); err != nil {
			return err
		}
	}
}

// signsSlowly reports whether an item would hold up those behind it.
func (s *server) signsSlowly(contents []content, item *pluginv1.SignItem) bool {
	inst := s.instances.get(item.GetInstanceRef())
	return inst != nil && int(item.GetContent()) < len(contents) && inst.effort.slow(len(contents[item.GetContent()].body))
}

func (s *server) signItem(ctx context.Context, contents []content, item *pluginv1.SignItem) (out *pluginv1.SignResult) {
	out = &pluginv1.SignResult{Seq: item.GetSeq()}
	fail := func(f failure) *pluginv1.SignResult {
		out.Failure = f.pb()
		return out
	}
	inst := s.instances.get(item.GetInstanceRef())
	if inst == nil || inst.built.sign == nil || !inst.life.enter() {
		return fail(stale(item.GetInstanceRef()).failure)
	}
	defer inst.life.leave()
	if int(item.GetContent()) >= len(contents) {
		return fail(failure{source: SourcePlugin, code: CodeProtocol, message: "no such content", wire: NotSent})
	}
	defer func() {
		if p := recover(); p != nil {
			s.log().Error("panic in signer", "stack", string(debug.Stack()))
			out = fail(failure{source: SourcePlugin, code: CodePanic, message: "the signer panicked", wire: NotSent})
		}
	}()
	t := &task{
		attempt: attempt{
			created: item.GetCreated().AsTime().UnixNano(), nonce: item.GetNonce(), headers: headersOf(item.GetHeaders()),
			uri: item.GetUri(), traceparent: item.GetTraceparent(), tracestate: item.GetTracestate(),
		},
		content: contents[item.GetContent()], received: time.Now(),
	}
	r := (&scratch{}).prepare(t, inst)
	// Only what is added goes back, so a header that was changed in place would be lost without a word.
	before := slices.Clone(r.Headers)
	err := s.turns.sign(ctx, inst, len(r.Body), func() error { return inst.built.sign(r) })
	if err == nil {
		err = r.clash(0, before, before[len(before)-len(t.headers):])
	}
	if err != nil {
		return fail(signFailure(err, inst.secrets))
	}
	out.Headers = wireHeaders(r.Headers[len(before):])
	if r.URL != inst.target.URL {
		out.Uri = r.URL
	}
	return out
}
