package plugin

import (
	"errors"
	"io"
	"runtime/debug"
	"slices"
	"time"

	"google.golang.org/grpc"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Sign signs batch by batch. Signers do no I/O, so they run on the stream's own goroutine.
func (s *server) Sign(stream grpc.BidiStreamingServer[pluginv1.SignRequest, pluginv1.SignResponse]) error {
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
		out := &pluginv1.SignResponse{Results: make([]*pluginv1.SignResult, len(req.GetItems()))}
		for i, item := range req.GetItems() {
			out.Results[i] = s.signItem(contents, item)
		}
		if err := stream.Send(out); err != nil {
			return err
		}
	}
}

func (s *server) signItem(contents []content, item *pluginv1.SignItem) (out *pluginv1.SignResult) {
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
			uri: item.GetUri(),
		},
		content: contents[item.GetContent()], received: time.Now(),
	}
	r := (&scratch{}).prepare(t, inst)
	// Only what is added goes back, so a header that was changed in place would be lost without a word.
	before := slices.Clone(r.Headers)
	err := inst.built.sign(r)
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
