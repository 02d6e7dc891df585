package api

import (
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protopath"
	"google.golang.org/protobuf/reflect/protorange"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// redacted stands where a value was.
const redacted = "[redacted]"

// redact returns a copy of m without the values of fields that carry debug_redact, and without fields that
// this binary does not know. It is the only way in which a message may reach a log: Go's own formatting
// ignores the option.
func redact(m proto.Message) proto.Message {
	c := proto.Clone(m)
	clearUnknown := func(v protoreflect.Value) {
		if msg, ok := v.Interface().(protoreflect.Message); ok {
			msg.SetUnknown(nil)
		}
	}
	err := protorange.Range(c.ProtoReflect(), func(p protopath.Values) error {
		last := p.Index(-1)
		clearUnknown(last.Value)
		if last.Step.Kind() != protopath.FieldAccessStep {
			return nil
		}
		f := last.Step.FieldDescriptor()
		options, _ := f.Options().(*descriptorpb.FieldOptions)
		if !options.GetDebugRedact() {
			return nil
		}
		parent := p.Index(-2).Value.Message()
		if f.Kind() == protoreflect.StringKind && f.Cardinality() != protoreflect.Repeated {
			parent.Set(f, protoreflect.ValueOfString(redacted))
		} else {
			parent.Clear(f)
		}
		return nil // not Break, which would leave the fields after this one unseen
	})
	if err != nil {
		// Better nothing than a leak.
		return m.ProtoReflect().New().Interface()
	}
	return c
}

// redactedText is the text of m for a log, cut to a bounded length.
func redactedText(m proto.Message) string {
	const most = 2048
	text, err := prototext.Marshal(redact(m))
	if err != nil {
		return ""
	}
	if len(text) > most {
		return string(text[:most]) + "…"
	}
	return string(text)
}
