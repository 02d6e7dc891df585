package api_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// wire sends []byte as they are.
type wire struct{ encoding.CodecV2 }

func (w wire) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.([]byte); ok {
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	return w.CodecV2.Marshal(v)
}

func raw() grpc.CallOption { return grpc.ForceCodecV2(wire{encoding.GetCodecV2("proto")}) }

// badText is a message with one field that is text and not UTF-8, put where marshal has the given text.
func badText(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, []byte("caf\u00e9")) {
		t.Fatal("no place for it")
	}
	return bytes.ReplaceAll(b, []byte("caf\u00e9"), []byte("caf\xe9!"))
}

func calls(t *testing.T, st *station, method, code, reason string) float64 {
	t.Helper()
	families, err := st.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "grapnel_api_calls_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			var values []string
			for _, l := range m.GetLabel() {
				values = append(values, l.GetValue())
			}
			if slices.Equal(values, []string{code, "grapnel.v1." + method, reason}) {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// TestUnreadableRequests: what does not parse, or is too large, is refused like everything else: the right code, a
// reason, and an entry in metrics and log.
func TestUnreadableRequests(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	bad := publishText("acme", "e", "x")
	bad.Event.Subject = "café"
	large := publishText("acme", "e", strings.Repeat("x", 5<<20))
	for _, c := range []struct {
		name   string
		in     any
		code   codes.Code
		reason string
	}{
		{"not UTF-8", badText(t, bad), codes.InvalidArgument, "UNREADABLE_MESSAGE"},
		{"garbage", []byte("\xff\xff\xff"), codes.InvalidArgument, "UNREADABLE_MESSAGE"},
		{"5 MiB", large, codes.ResourceExhausted, "MESSAGE_TOO_LARGE"},
	} {
		err := st.conn.Invoke(t.Context(), "/grapnel.v1.PublishService/Publish", c.in, &grapnelv1.PublishResponse{}, raw())
		refused(t, err, c.code, c.reason)
	}
	if n := calls(t, st, "PublishService/Publish", "INVALID_ARGUMENT", "UNREADABLE_MESSAGE"); n != 2 {
		t.Errorf("%v calls are counted, want 2", n)
	}
	// What grpc ends by itself has no details, but is counted.
	err := st.conn.Invoke(t.Context(), "/grapnel.v1.PublishService/Publish", publishText("acme", "e", strings.Repeat("x", 9<<20)), &grapnelv1.PublishResponse{})
	if err == nil {
		t.Error("9 MiB are taken")
	}
	if n := calls(t, st, "PublishService/Publish", "RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE"); n != 2 {
		t.Errorf("%v calls are counted, want 2", n)
	}
	for _, want := range []string{"reason=UNREADABLE_MESSAGE", "reason=MESSAGE_TOO_LARGE"} {
		if !strings.Contains(st.log.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
}

// TestUnreadableEventIsRefusedAlone: an event that cannot be read, or is too large, says nothing about its company.
func TestUnreadableEventIsRefusedAlone(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	event := func(id, subject string) *grapnelv1.Event {
		return &grapnelv1.Event{Id: id, Type: "order.created", Subject: subject, Payload: &grapnelv1.Event_Text{Text: "x"}}
	}
	t.Run("batch", func(t *testing.T) {
		in := badText(t, &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme", Events: []*grapnelv1.Event{event("b1", ""), event("b2", "café"), event("b3", "")}})
		out := &grapnelv1.BatchPublishResponse{}
		if err := st.conn.Invoke(t.Context(), "/grapnel.v1.PublishService/BatchPublish", in, out, raw()); err != nil {
			t.Fatal(err)
		}
		if out.GetFailedCount() != 1 || out.GetResults()[1].GetError().GetReason() != "UNREADABLE_MESSAGE" || out.GetResults()[2].GetName() != "namespaces/acme/events/b3" {
			t.Errorf("results = %v", out)
		}
	})
	t.Run("stream", func(t *testing.T) {
		stream, err := st.conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/grapnel.v1.PublishService/PublishStream", raw())
		if err != nil {
			t.Fatal(err)
		}
		item := func(n uint64, e *grapnelv1.Event) *grapnelv1.PublishStreamRequest {
			return &grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Item_{Item: &grapnelv1.PublishStreamRequest_Item{Sequence: n, Event: e}}}
		}
		large := event("s3", "")
		large.Payload = &grapnelv1.Event_Text{Text: strings.Repeat("x", 5<<20)}
		for _, frame := range []any{
			&grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Open_{Open: &grapnelv1.PublishStreamRequest_Open{Parent: "namespaces/acme"}}},
			item(1, event("s1", "")), badText(t, item(2, event("s2", "café"))), item(3, large), item(4, event("s4", "")),
		} {
			if err := stream.SendMsg(frame); err != nil {
				t.Fatal(err)
			}
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		got := map[uint64]string{}
		for {
			frame := &grapnelv1.PublishStreamResponse{}
			if err := stream.RecvMsg(frame); err != nil {
				if err.Error() != "EOF" {
					t.Error(err)
				}
				break
			}
			for _, a := range frame.GetAcks() {
				got[a.GetSequence()] = a.GetResult().GetError().GetReason()
			}
		}
		if len(got) != 4 || got[1] != "" || got[2] != "UNREADABLE_MESSAGE" || got[3] != "MESSAGE_TOO_LARGE" || got[4] != "" {
			t.Errorf("acks = %v", got)
		}
	})
}

// TestUnknownFieldsAreRefused: what this server does not know it neither drops nor stores, on no level.
func TestUnknownFieldsAreRefused(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	unknown := protowire.AppendVarint(protowire.AppendTag(nil, 127, protowire.VarintType), 1)
	for name, spoil := range map[string]func(*grapnelv1.CreateSubscriptionRequest) proto.Message{
		"CreateSubscriptionRequest": func(r *grapnelv1.CreateSubscriptionRequest) proto.Message { return r },
		"Subscription":              func(r *grapnelv1.CreateSubscriptionRequest) proto.Message { return r.GetSubscription() },
		"RetryPolicy": func(r *grapnelv1.CreateSubscriptionRequest) proto.Message {
			return r.GetSubscription().GetRetryPolicy()
		},
		"PluginBinding": func(r *grapnelv1.CreateSubscriptionRequest) proto.Message { return r.GetSubscription().GetSigners()[0] },
	} {
		r := &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", SubscriptionId: "a", Subscription: plainSubscription("acme")}
		r.Subscription.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 3}
		spoil(r).ProtoReflect().SetUnknown(unknown)
		_, err := st.subscriptions.CreateSubscription(t.Context(), r)
		if got := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(got.message, "unknown field 127 in grapnel.v1."+name) {
			t.Errorf("%s: %q", name, got.message)
		}
	}
	for name, spoil := range map[string]func(*grapnelv1.PublishRequest) proto.Message{
		"PublishRequest": func(r *grapnelv1.PublishRequest) proto.Message { return r },
		"Event":          func(r *grapnelv1.PublishRequest) proto.Message { return r.GetEvent() },
	} {
		r := publishText("acme", "e", "x")
		spoil(r).ProtoReflect().SetUnknown(unknown)
		_, err := st.publish.Publish(t.Context(), r)
		if got := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(got.message, "unknown field 127 in grapnel.v1."+name) {
			t.Errorf("%s: %q", name, got.message)
		}
	}
}
