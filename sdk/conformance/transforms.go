package conformance

import (
	"context"
	"fmt"
	"io"

	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// newEvent is an event for transformers.
func newEvent(messageID string, data []byte) *pluginv1.Event {
	return &pluginv1.Event{
		MessageId: messageID, Id: messageID, Source: "//conformance", Type: "conformance.test", Time: timestamppb.New(signTime()),
		ContentType: "application/json", Data: data,
	}
}

// transformOne has one event transformed over a stream of its own.
func (ses *session) transformOne(e *pluginv1.Event, ref uint32) (*pluginv1.TransformResult, error) {
	ctx, cancel := context.WithTimeout(ses.t.ctx, callLimit)
	defer cancel()
	stream, err := pluginv1.NewTransformerServiceClient(ses.conn).Transform(ctx)
	if err != nil {
		return nil, fmt.Errorf("open transform stream: %w", err)
	}
	item := &pluginv1.TransformItem{Seq: ses.nextSeq(), InstanceRef: ref, TimeoutMs: 2000}
	if err := stream.Send(&pluginv1.TransformRequest{Events: []*pluginv1.Event{e}, Items: []*pluginv1.TransformItem{item}}); err != nil && err != io.EOF { //nolint:errorlint // grpc's own
		return nil, fmt.Errorf("transform stream: %w%s", err, ses.ending())
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, fmt.Errorf("transform stream: %w%s", err, ses.ending())
	}
	_ = stream.CloseSend()
	if n := len(resp.GetResults()); n != 1 || resp.GetResults()[0].GetSeq() != item.GetSeq() {
		return nil, fmt.Errorf("transform stream: %d results, or another's, for one item", n)
	}
	return resp.GetResults()[0], nil
}
