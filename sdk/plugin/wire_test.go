package plugin

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

func TestRequestFrameReadsWhatProtobufWrites(t *testing.T) {
	msg := &pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Batch{Batch: &pluginv1.AttemptBatch{
		Contents: []*pluginv1.Content{
			{MessageId: "m1", Body: []byte("body"), Headers: []*pluginv1.Header{{Name: "a", Value: "1"}, {Name: "b"}}},
			{Body: bytes.Repeat([]byte("x"), 3<<20)},
		},
		Attempts: []*pluginv1.Attempt{{
			Seq: 1 << 60, Content: 1, InstanceRef: 7, AttemptNumber: 3, TimeoutMs: 1500, CreatedUnixNano: 12345,
			Traceparent: "00-x", SignHere: []uint32{4, 500}, Headers: []*pluginv1.Header{{Name: "h", Value: "v"}},
			Uri: "https://x", Nonce: []byte("n"), Tracestate: "a=b",
		}, {Seq: 2}},
	}}}
	b, err := proto.Marshal(msg)
	if err != nil {
		t.Fatal(err)
	}
	var f requestFrame
	for range 2 { // a frame is used again
		if err := f.Parse(b); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.contents) != 2 || len(f.attempts) != 2 || len(f.contents[1].body) != 3<<20 {
		t.Fatalf("%d contents, %d attempts", len(f.contents), len(f.attempts))
	}
	clear(b) // what was read does not refer to the message
	want := attempt{
		seq: 1 << 60, content: 1, ref: 7, number: 3, timeout: 1500 * time.Millisecond, created: 12345, traceparent: "00-x",
		signHere: []uint32{4, 500}, headers: []Header{{Name: "h", Value: "v"}}, uri: "https://x", nonce: []byte("n"), tracestate: "a=b",
	}
	if diff := cmp.Diff(want, f.attempts[0], cmp.AllowUnexported(attempt{})); diff != "" {
		t.Errorf("attempt (-want +got):\n%s", diff)
	}
	wantContent := content{messageID: "m1", body: []byte("body"), headers: []Header{{Name: "a", Value: "1"}, {Name: "b"}}}
	if diff := cmp.Diff(wantContent, f.contents[0], cmp.AllowUnexported(content{})); diff != "" {
		t.Errorf("content (-want +got):\n%s", diff)
	}
}

func TestResultsFrameIsReadByProtobuf(t *testing.T) {
	f := resultsFrame{results: []result{
		{seq: 5, total: 3 * time.Millisecond, peer: "h:1", response: &Response{Status: 200, Body: []byte("dropped?"), Headers: []Header{{"x", "y"}, {"Retry-After", "3"}}}},
		{seq: 6, response: &Response{Status: 503, Headers: []Header{{"X", "y\xff"}}, Truncated: true}, sent: []Header{{"s", "t"}}},
		{seq: 7, failure: failure{source: SourcePolicy, code: "egress", message: "no", wire: NotSent}},
		{seq: 8, response: &Response{Status: 500, Body: bytes.Repeat([]byte("x"), 3<<20)}},
	}}
	var got pluginv1.AttemptResponse
	if err := proto.Unmarshal(f.Append(nil), &got); err != nil {
		t.Fatal(err)
	}
	// Compared by length: the general comparison takes half a minute over it.
	if big := got.GetResults().GetResults()[3].GetResponse(); len(big.GetBody()) != 3<<20 {
		t.Errorf("large body has %d bytes", len(big.GetBody()))
	} else {
		big.Body = nil
	}
	want := &pluginv1.AttemptResponse{Frame: &pluginv1.AttemptResponse_Results{Results: &pluginv1.AttemptResults{Results: []*pluginv1.AttemptResult{
		{Seq: 5, TotalUs: 3000, Peer: "h:1", Outcome: &pluginv1.AttemptResult_Response{Response: &pluginv1.Response{
			Status: 200, Body: []byte("dropped?"), Headers: []*pluginv1.Header{{Name: "retry-after", Value: "3"}},
		}}},
		{Seq: 6, SentHeaders: []*pluginv1.Header{{Name: "s", Value: "t"}}, Outcome: &pluginv1.AttemptResult_Response{Response: &pluginv1.Response{
			Status: 503, BodyTruncated: true, Headers: []*pluginv1.Header{{Name: "x", Value: "y\uFFFD"}},
		}}},
		{Seq: 7, Outcome: &pluginv1.AttemptResult_Failure{Failure: &pluginv1.Failure{
			Source: pluginv1.Failure_SOURCE_POLICY, Code: "egress", Message: "no", WireState: pluginv1.Failure_WIRE_STATE_NOT_SENT,
		}}},
		{Seq: 8, Outcome: &pluginv1.AttemptResult_Response{Response: &pluginv1.Response{Status: 500}}},
	}}}}
	if diff := cmp.Diff(want, &got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func FuzzRequestFrame(f *testing.F) {
	f.Add([]byte{0x12, 0x04, 0x0a, 0x02, 0x0a, 0x00})
	f.Add([]byte(strings.Repeat("\x12\x02", 20)))
	f.Fuzz(func(t *testing.T, b []byte) {
		var frame requestFrame
		if frame.Parse(b) != nil {
			return
		}
		var msg pluginv1.AttemptRequest
		if proto.Unmarshal(b, &msg) == nil && frame.other == nil && len(msg.GetBatch().GetAttempts()) != len(frame.attempts) {
			t.Errorf("read %d attempts, protobuf %d", len(frame.attempts), len(msg.GetBatch().GetAttempts()))
		}
	})
}
