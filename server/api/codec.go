package api

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// What grpc refuses by itself, before an interceptor sees the call, has none of our details, the wrong code and no
// entry in log and metrics. So it is left little to refuse: messages are taken up to maxWire, and what cannot be read or
// is larger than we promise is noted in received, which passes as read, and refused by us.

// maxWire is where grpc ends a call itself, because it will not hold more.
const maxWire = 2 * maxMessage

// received is a message on its way in.
type received struct {
	message any
	// refusal is set when there is no message.
	refusal *Error
	// item is the sequence of the frame of a publish stream that is refused; 0 when that cannot be told either.
	item uint64
	// events are the refusals of single events of a batch, by their place; the rest of the batch is read.
	events map[int]*Error
}

// codec is grpc's for protobuf; it reads into received, too.
type codec struct {
	encoding.CodecV2
	log *slog.Logger
}

func newCodec(log *slog.Logger) codec { return codec{encoding.GetCodecV2("proto"), log} }

// Marshal tells the log when an answer cannot be written, which nobody else will.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	data, err := c.CodecV2.Marshal(v)
	if err != nil {
		c.log.Error("an answer cannot be written", "err", err)
	}
	return data, err
}

// Unmarshal fails for messages only that are not in received.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	in, ok := v.(*received)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	in.refusal, in.item, in.events = nil, 0, nil
	if size := data.Len(); size > maxMessage+messageSlack {
		in.refusal = messageTooLarge("the message", size)
	} else if err := c.CodecV2.Unmarshal(data, in.message); err != nil {
		in.refusal = unreadable(err)
	}
	if in.refusal == nil {
		return nil
	}
	switch m := in.message.(type) {
	case *grapnelv1.PublishStreamRequest:
		in.item = sequenceIn(data.Materialize())
	case *grapnelv1.BatchPublishRequest:
		if in.refusal.code == codes.InvalidArgument {
			in.readEach(data.Materialize(), m)
		}
	}
	return nil
}

// readEach reads the events of a batch one by one, so that one that cannot be read is refused by itself.
func (in *received) readEach(data []byte, m *grapnelv1.BatchPublishRequest) {
	proto.Reset(m)
	events := map[int]*Error{}
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return
		}
		size := protowire.ConsumeFieldValue(number, kind, data[n:])
		if size < 0 {
			return
		}
		field, value := data[:n+size], data[n:n+size]
		data = data[n+size:]
		if number != 2 || kind != protowire.BytesType {
			if (proto.UnmarshalOptions{Merge: true}).Unmarshal(field, m) != nil {
				return
			}
			continue
		}
		body, _ := protowire.ConsumeBytes(value)
		event := &grapnelv1.Event{}
		if err := proto.Unmarshal(body, event); err != nil {
			events[len(m.Events)] = unreadable(err)
			event = &grapnelv1.Event{}
		}
		m.Events = append(m.Events, event)
	}
	in.refusal, in.events = nil, events
}

// sequenceIn finds the sequence of an item in a frame that cannot be read as a whole; 0 when there is none.
func sequenceIn(frame []byte) uint64 {
	item := fieldIn(frame, 2, protowire.BytesType)
	body, n := protowire.ConsumeBytes(item)
	if n < 0 {
		return 0
	}
	sequence, n := protowire.ConsumeVarint(fieldIn(body, 1, protowire.VarintType))
	if n < 0 {
		return 0
	}
	return sequence
}

// fieldIn returns what begins with the value of the first field of a number.
func fieldIn(m []byte, number protowire.Number, kind protowire.Type) []byte {
	for len(m) > 0 {
		got, gotKind, n := protowire.ConsumeTag(m)
		if n < 0 {
			return nil
		}
		if m = m[n:]; got == number && gotKind == kind {
			return m
		}
		size := protowire.ConsumeFieldValue(got, gotKind, m)
		if size < 0 {
			return nil
		}
		m = m[size:]
	}
	return nil
}

func messageTooLarge(what string, size int) *Error {
	return &Error{
		code:   codes.ResourceExhausted,
		reason: grapnelv1.ErrorReason_ERROR_REASON_MESSAGE_TOO_LARGE,
		message: what + " is " + strconv.Itoa(size) + " bytes; the most is " + strconv.Itoa(maxMessage) +
			" (4 MiB), and of one event's payload what the namespace's quota max_event_bytes allows",
		metadata: map[string]string{"bytes": strconv.Itoa(size), "maxBytes": strconv.Itoa(maxMessage)},
	}
}

// unreadable refuses a message that is not what its proto says, such as text that is not UTF-8.
func unreadable(err error) *Error {
	return &Error{
		code:    codes.InvalidArgument,
		reason:  grapnelv1.ErrorReason_ERROR_REASON_UNREADABLE_MESSAGE,
		message: "the message cannot be read: " + cut(err.Error(), 300),
		cause:   err,
	}
}

// registrar registers services so that what cannot be read is refused by edge.
type registrar struct {
	grpc.ServiceRegistrar
	edge *edge
}

// RegisterService is for the generated code.
func (r registrar) RegisterService(desc *grpc.ServiceDesc, impl any) {
	wrapped := *desc
	wrapped.Methods = slices.Clone(desc.Methods)
	for i, m := range wrapped.Methods {
		wrapped.Methods[i].Handler = r.edge.reading("/"+desc.ServiceName+"/"+m.MethodName, m.Handler)
	}
	r.ServiceRegistrar.RegisterService(&wrapped, impl)
}

// badEvents is the context's key of received.events.
type badEvents struct{}

// reading reads the request of a unary call before its interceptors run.
func (e *edge) reading(method string, handle grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		var in received
		read := func(v any) error {
			start := time.Now()
			in.message = v
			switch err := dec(&in); {
			case err != nil:
				// grpc has answered already; log and metrics are to know of it.
				return e.finish(ctx, method, start, nil, fromReceive(err))
			case in.refusal != nil:
				return e.finish(ctx, method, start, nil, in.refusal)
			}
			return nil
		}
		intercept := interceptor
		if interceptor != nil && method == grapnelv1.PublishService_BatchPublish_FullMethodName {
			intercept = func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
				if len(in.events) > 0 {
					ctx = context.WithValue(ctx, badEvents{}, in.events)
				}
				return interceptor(ctx, req, info, handler)
			}
		}
		return handle(srv, ctx, read, intercept)
	}
}
