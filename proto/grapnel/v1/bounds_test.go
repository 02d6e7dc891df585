package grapnelv1_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// baseline is what has been promised: the protos without comments, written by `make baseline`.
const baseline = "../../baseline.binpb"

// TestNoTighterBound: what the baseline lets through is let through, and what it hides from logs is hidden. buf breaking
// sees neither.
func TestNoTighterBound(t *testing.T) {
	raw, err := os.ReadFile(baseline)
	if err != nil {
		t.Fatal(err)
	}
	before, after := files(t, raw), files(t, grapnelv1.Descriptors())
	n := 0
	for _, f := range fieldsOf(before) {
		if strings.HasPrefix(string(f.FullName()), "grapnel.") {
			n++
		}
	}
	if n < 300 {
		t.Errorf("the baseline has only %d fields", n)
	}
	for _, fault := range tightened(before, after) {
		t.Error(fault)
	}
}

// TestTighterBoundsAreSeen: the comparison finds what it is for.
func TestTighterBoundsAreSeen(t *testing.T) {
	before := files(t, grapnelv1.Descriptors())
	for name, c := range map[string]struct {
		field  string
		change func(o *descriptorpb.FieldOptions)
		want   string
	}{
		"redaction":  {"grapnel.v1.Event.data", func(o *descriptorpb.FieldOptions) { o.DebugRedact = nil }, "debug_redact"},
		"items":      {"grapnel.v1.BatchPublishRequest.events", set("repeated.max_items", uint64(100)), "max_items"},
		"length":     {"grapnel.v1.Event.source", set("string.max_len", uint64(10)), "max_len"},
		"a new rule": {"grapnel.v1.ListEventsRequest.page_token", set("string.max_len", uint64(10)), "max_len"},
		"number":     {"grapnel.v1.RetryPolicy.max_attempts", set("int32.lte", int32(99)), "lte"},
		"least":      {"grapnel.v1.RetryPolicy.multiplier", set("double.gte", float64(1)), "gte"},
		"duration":   {"grapnel.v1.Event.ttl", set("duration.gte", durationpb.New(2e9)), "gte"},
		"required":   {"grapnel.v1.PauseSubscriptionRequest.reason", set("required", true), "required"},
		"expression": {"grapnel.v1.Event.id", func(o *descriptorpb.FieldOptions) {
			r := rulesIn(o)
			list := r.Mutable(r.Descriptor().Fields().ByName("cel")).List()
			m := list.Get(0).Message()
			m.Set(m.Descriptor().Fields().ByName("expression"), protoreflect.ValueOfString("this == ''"))
		}, "cel"},
	} {
		set := &descriptorpb.FileDescriptorSet{}
		if err := proto.Unmarshal(grapnelv1.Descriptors(), set); err != nil {
			t.Fatal(err)
		}
		c.change(optionsOf(t, set, c.field))
		raw, err := proto.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		faults := tightened(before, files(t, raw))
		if len(faults) != 1 || !strings.Contains(faults[0], c.field) || !strings.Contains(faults[0], c.want) {
			t.Errorf("%s: %q", name, faults)
		}
		if faults := tightened(files(t, raw), before); name != "redaction" && name != "expression" && len(faults) != 0 {
			t.Errorf("%s: the other way it is wider, but %q", name, faults)
		}
	}
}

func files(t *testing.T, raw []byte) *protoregistry.Files {
	t.Helper()
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(raw, set); err != nil {
		t.Fatal(err)
	}
	out, err := protodesc.FileOptions{AllowUnresolvable: true}.NewFiles(set)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func fieldsOf(files *protoregistry.Files) map[protoreflect.FullName]protoreflect.FieldDescriptor {
	out := map[protoreflect.FullName]protoreflect.FieldDescriptor{}
	var walk func(protoreflect.MessageDescriptors)
	walk = func(list protoreflect.MessageDescriptors) {
		for i := range list.Len() {
			for j := range list.Get(i).Fields().Len() {
				f := list.Get(i).Fields().Get(j)
				out[f.FullName()] = f
			}
			walk(list.Get(i).Messages())
		}
	}
	files.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if strings.HasPrefix(string(f.Package()), "grapnel.") {
			walk(f.Messages())
		}
		return true
	})
	return out
}

// tightened says what after refuses, or shows, that before does not.
func tightened(before, after *protoregistry.Files) []string {
	var faults []string
	now := fieldsOf(after)
	for name, was := range fieldsOf(before) {
		is := now[name]
		if is == nil {
			continue // buf breaking sees that
		}
		if redacted(was) && !redacted(is) {
			faults = append(faults, fmt.Sprintf("%s has lost debug_redact", name))
		}
		old, err := protovalidate.ResolveFieldRules(was)
		if err != nil {
			faults = append(faults, err.Error())
			continue
		}
		rules, err := protovalidate.ResolveFieldRules(is)
		if err != nil {
			faults = append(faults, err.Error())
			continue
		}
		for _, fault := range compare("", old.ProtoReflect(), rules.ProtoReflect()) {
			faults = append(faults, fmt.Sprintf("%s: %s", name, fault))
		}
	}
	slices.Sort(faults)
	return faults
}

func redacted(f protoreflect.FieldDescriptor) bool {
	o, _ := f.Options().(*descriptorpb.FieldOptions)
	return o.GetDebugRedact()
}

// compare goes through rules: what bounds from above may rise, what bounds from below may fall, and everything else that
// refuses may go away, but not come or change, since only people can tell whether an expression is wider than another.
func compare(at string, old, now protoreflect.Message) (faults []string) {
	now.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := strings.TrimPrefix(at+"."+string(f.Name()), ".")
		was := old.Get(f)
		switch {
		case f.Message() != nil && !f.IsList() && f.Message().FullName() != "google.protobuf.Duration" && f.Message().FullName() != "google.protobuf.Timestamp":
			faults = append(faults, compare(name, was.Message(), v.Message())...)
			return true
		case old.Has(f) && v.Equal(was):
			return true
		case old.Has(f) && wider(string(f.Name()), was, v):
			return true
		case !old.Has(f) && f.Kind() == protoreflect.BoolKind && !v.Bool():
			return true
		}
		faults = append(faults, fmt.Sprintf("%s is %v and was %v: a tighter bound, or one that must be looked at; when it is wider, `make baseline`", name, v, was))
		return true
	})
	return faults
}

func wider(name string, was, is protoreflect.Value) bool {
	c := order(was, is)
	switch name {
	case "max_len", "max_bytes", "max_items", "max_pairs", "lte", "lt":
		return c < 0
	case "min_len", "min_bytes", "min_items", "min_pairs", "gte", "gt":
		return c > 0
	}
	return false
}

// order compares two bounds of one kind.
func order(a, b protoreflect.Value) int {
	x, y := number(a), number(b)
	switch {
	case x < y:
		return -1
	case x > y:
		return 1
	}
	return 0
}

func number(v protoreflect.Value) float64 {
	switch v := v.Interface().(type) {
	case int32:
		return float64(v)
	case int64:
		return float64(v)
	case uint32:
		return float64(v)
	case uint64:
		return float64(v)
	case float32:
		return float64(v)
	case float64:
		return v
	case protoreflect.Message:
		switch m := v.Interface().(type) {
		case *durationpb.Duration:
			return m.AsDuration().Seconds()
		case *timestamppb.Timestamp:
			return float64(m.AsTime().Unix())
		}
	}
	return 0
}

// optionsOf finds the options of a field in a set.
func optionsOf(t *testing.T, set *descriptorpb.FileDescriptorSet, name string) *descriptorpb.FieldOptions {
	t.Helper()
	for _, file := range set.GetFile() {
		for _, m := range file.GetMessageType() {
			for _, f := range m.GetField() {
				if file.GetPackage()+"."+m.GetName()+"."+f.GetName() == name {
					if f.Options == nil {
						f.Options = &descriptorpb.FieldOptions{}
					}
					return f.Options
				}
			}
		}
	}
	t.Fatalf("no field %s", name)
	return nil
}

// rulesIn are the rules of a field's options, to be changed.
func rulesIn(o *descriptorpb.FieldOptions) protoreflect.Message {
	m := o.ProtoReflect()
	var ext protoreflect.ExtensionType
	protoregistry.GlobalTypes.RangeExtensionsByMessage("google.protobuf.FieldOptions", func(x protoreflect.ExtensionType) bool {
		if x.TypeDescriptor().FullName() == "buf.validate.field" {
			ext = x
		}
		return ext == nil
	})
	return m.Mutable(ext.TypeDescriptor()).Message()
}

// set changes a rule, dots go into messages.
func set(path string, value any) func(*descriptorpb.FieldOptions) {
	return func(o *descriptorpb.FieldOptions) {
		m := rulesIn(o)
		names := strings.Split(path, ".")
		for _, name := range names[:len(names)-1] {
			m = m.Mutable(m.Descriptor().Fields().ByName(protoreflect.Name(name))).Message()
		}
		if d, ok := value.(*durationpb.Duration); ok {
			value = d.ProtoReflect()
		}
		m.Set(m.Descriptor().Fields().ByName(protoreflect.Name(names[len(names)-1])), protoreflect.ValueOf(value))
	}
}
