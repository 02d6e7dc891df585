package wire

import (
	"bytes"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grapnel/grapnel/internal/wire"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

// CallOption is what a stream that carries Batches and Responses is opened with.
func CallOption() grpc.CallOption { return grpc.ForceCodecV2(wire.NewCodec()) }

// SignRequest is a batch for signers in another process than the transport's; each attempt's Ref names its signer.
func (f *Batch) SignRequest() *pluginv1.SignRequest {
	req := &pluginv1.SignRequest{Items: make([]*pluginv1.SignItem, len(f.attempts))}
	for _, c := range f.contents {
		req.Contents = append(req.Contents, c.message())
	}
	for i, a := range f.attempts {
		req.Items[i] = &pluginv1.SignItem{
			Seq: a.Seq, InstanceRef: a.Ref, Content: f.index[i],
			Created: timestamppb.New(a.Created), Nonce: bytes.Clone(a.Nonce[:]), Headers: headers(a.Headers), Uri: a.URI,
		}
		req.Items[i].Traceparent, req.Items[i].Tracestate = a.Trace.forPlugin()
	}
	return req
}

// TransformRequest is a batch for transformers; each attempt's Ref names its own.
func (f *Batch) TransformRequest() *pluginv1.TransformRequest {
	req := &pluginv1.TransformRequest{Items: make([]*pluginv1.TransformItem, len(f.attempts))}
	for _, c := range f.contents {
		req.Events = append(req.Events, eventMessage(c.event))
	}
	for i, a := range f.attempts {
		req.Items[i] = &pluginv1.TransformItem{Seq: a.Seq, InstanceRef: a.Ref, Event: f.index[i], TimeoutMs: uint32(a.Timeout.Milliseconds())}
		req.Items[i].Traceparent, req.Items[i].Tracestate = a.Trace.forPlugin()
	}
	return req
}

// forPlugin is what signers and transformers are told; nothing of an event that is not sampled.
func (t *Trace) forPlugin() (parent, state string) {
	if t == nil {
		return "", ""
	}
	return string(t.Plugin.Append(nil)), t.State
}

func eventMessage(ev *delivery.Event) *pluginv1.Event {
	at := ev.Time
	if at.IsZero() {
		at = ev.AcceptTime
	}
	return &pluginv1.Event{
		MessageId: ev.UID, Id: ev.ID, Source: ev.Source, Type: ev.Type, Subject: ev.Subject, Time: timestamppb.New(at),
		ContentType: ev.ContentType, DataSchema: ev.Schema, Attributes: ev.Attributes, Data: ev.Payload,
	}
}

// message is appendContent for messages off the hot path.
func (c Content) message() *pluginv1.Content {
	out := &pluginv1.Content{MessageId: c.event.UID, Body: c.Body(), EventType: c.event.Type}
	for name, value := range c.headers {
		out.Headers = append(out.Headers, &pluginv1.Header{Name: name, Value: value})
	}
	return out
}

func headers(in []delivery.Header) []*pluginv1.Header {
	out := make([]*pluginv1.Header, len(in))
	for i, h := range in {
		out[i] = &pluginv1.Header{Name: h.Name, Value: h.Value}
	}
	return out
}

// One is the attempt by itself.
func (a *Attempt) One() *pluginv1.AttemptOneRequest {
	out := &pluginv1.Attempt{
		Seq: a.Seq, InstanceRef: a.Ref, AttemptNumber: a.Number, TimeoutMs: uint32(a.Timeout.Milliseconds()),
		CreatedUnixNano: a.Created.UnixNano(), SignHere: a.SignHere, Headers: headers(a.Headers), Uri: a.URI,
		OwnershipCheck: a.Ownership, Nonce: bytes.Clone(a.Nonce[:]),
	}
	if !a.Ownership {
		out.Traceparent = string(a.appendTraceparent(nil))
		out.Tracestate = a.tracestate()
	}
	one := &pluginv1.AttemptOneRequest{Attempt: out, Content: a.Content.message(), MaxResponseBody: MaxResponse}
	if a.Answer {
		out.MaxResponseBody, one.MaxResponseBody = MaxAnswer, MaxAnswer
	}
	return one
}

// ResultOf reads a result that came by itself.
func ResultOf(in *pluginv1.AttemptResult) Result {
	r := Result{
		Seq: in.GetSeq(), Failure: in.GetFailure(), Peer: in.GetPeer(), Sent: headersOf(in.GetSentHeaders()),
		Total: time.Duration(in.GetTotalUs()) * time.Microsecond,
	}
	r.Peer = r.Peer[:min(len(r.Peer), maxPeer)]
	t := in.GetTimings()
	r.Timings = Timings{t.GetSignUs(), t.GetDnsUs(), t.GetConnectUs(), t.GetTlsUs(), t.GetFirstByteUs(), t.GetBodyUs()}
	if resp := in.GetResponse(); resp != nil {
		r.Answered, r.Status, r.Headers = true, int(resp.GetStatus()), headersOf(resp.GetHeaders())
		r.Body, r.Truncated = resp.GetBody(), resp.GetBodyTruncated()
		r.Note = strings.ToValidUTF8(resp.GetNote()[:min(len(resp.GetNote()), maxNote)], "")
		if len(r.Body) > MaxAnswer {
			r.Body, r.Truncated = r.Body[:MaxAnswer], true
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
