package main

import (
	"context"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"
)

// limit bounds one call by --timeout, and keeps its request, so that an answer about one of its fields can be told with what
// was given there.
func (c *cli) limit(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	c.mu.Lock()
	c.began = time.Now()
	c.asked, _ = req.(proto.Message)
	c.mu.Unlock()
	if m, ok := req.(proto.Message); ok {
		if field := badText(m.ProtoReflect()); field != "" { // gRPC would not say which, and call it its own fault
			return status.Errorf(codes.InvalidArgument, "%s: is not UTF-8 text", field)
		}
	}
	if c.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	return invoke(ctx, method, req, reply, cc, opts...)
}

// longestGiven bounds what is repeated of a request, in bytes.
const longestGiven = 80

// givenText is what a request has in a field, such as subscription.event_types[1], where that is short and no secret; or "".
func givenText(request proto.Message, path string) string {
	if request == nil || path == "" {
		return ""
	}
	m := request.ProtoReflect()
	form := regexp.MustCompile(`^([a-z0-9_]+)(?:\[(\d+)\])?$`)
	parts := strings.Split(path, ".")
	for i, part := range parts {
		match := form.FindStringSubmatch(part)
		if match == nil {
			return ""
		}
		field := m.Descriptor().Fields().ByName(protoreflect.Name(match[1]))
		if field == nil || !m.Has(field) || field.IsMap() || mayBeSecret(field) {
			return ""
		}
		value := m.Get(field)
		if field.IsList() != (match[2] != "") {
			return ""
		}
		if field.IsList() {
			n, err := strconv.Atoi(match[2])
			if err != nil || n >= value.List().Len() {
				return ""
			}
			value = value.List().Get(n)
		}
		if i == len(parts)-1 {
			return scalarGiven(field, value)
		}
		if field.Message() == nil {
			return ""
		}
		m = value.Message()
	}
	return ""
}

// mayBeSecret reports whether a field can hold what nobody should read in a terminal's history.
func mayBeSecret(field protoreflect.FieldDescriptor) bool {
	options, ok := field.Options().(*descriptorpb.FieldOptions)
	return !ok || options.GetDebugRedact() || field.Name() == "uri" || field.Name() == "config"
}

func scalarGiven(field protoreflect.FieldDescriptor, value protoreflect.Value) string {
	switch field.Kind() {
	case protoreflect.StringKind:
		text := value.String()
		if len(text) > longestGiven || !utf8.ValidString(text) {
			return ""
		}
		return strconv.Quote(text)
	case protoreflect.Int32Kind, protoreflect.Int64Kind, protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.DoubleKind:
		return value.String()
	case protoreflect.MessageKind:
		if d, ok := value.Message().Interface().(*durationpb.Duration); ok {
			return shortDuration(d.AsDuration())
		}
	}
	return ""
}
