package api

import (
	"errors"
	"iter"
	"strconv"
	"strings"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// rules are those of the protos.
type rules struct {
	protovalidate.Validator
	// most is how many elements a list or a map takes, by the full name of its field.
	most map[protoreflect.FullName]uint64
}

func newRules() rules {
	v, err := protovalidate.New()
	if err != nil {
		panic("api: protovalidate does not start: " + err.Error())
	}
	r := rules{v, map[protoreflect.FullName]uint64{}}
	for _, file := range servedFiles() {
		for m := range messagesOf(file.Messages()) {
			for i := range m.Fields().Len() {
				f := m.Fields().Get(i)
				limits, err := protovalidate.ResolveFieldRules(f)
				if err != nil {
					panic("api: the rules of " + string(f.FullName()) + " cannot be read: " + err.Error())
				}
				switch {
				case limits.GetMap().GetMaxPairs() > 0:
					r.most[f.FullName()] = limits.GetMap().GetMaxPairs()
				case limits.GetRepeated().GetMaxItems() > 0:
					r.most[f.FullName()] = limits.GetRepeated().GetMaxItems()
				}
			}
		}
	}
	return r
}

// messagesOf goes through messages and those declared in them.
func messagesOf(list protoreflect.MessageDescriptors) iter.Seq[protoreflect.MessageDescriptor] {
	return func(yield func(protoreflect.MessageDescriptor) bool) {
		for i := range list.Len() {
			if !yield(list.Get(i)) {
				return
			}
			for m := range messagesOf(list.Get(i).Messages()) {
				if !yield(m) {
					return
				}
			}
		}
	}
}

// validate checks a request against the rules in its proto and tells all faults at once. Lists that are too long are
// refused before anything in them is looked at, so that what a refusal costs is bounded by the rules.
func (s *Server) validate(req any) error {
	m, ok := req.(proto.Message)
	if !ok {
		return nil
	}
	form := form{most: s.rules.most}
	form.look("", m.ProtoReflect())
	if len(form.faults) > 0 {
		return invalidAnd(form.more, form.faults...)
	}
	err := s.rules.Validate(m)
	if err == nil {
		return nil
	}
	bad, ok := errors.AsType[*protovalidate.ValidationError](err)
	if !ok {
		return internal(err)
	}
	// Beyond what can be told no words are made.
	told := bad.Violations[:min(len(bad.Violations), maxTold)]
	faults := make([]Violation, 0, len(told))
	for _, v := range told {
		faults = append(faults, Violation{
			Field:       protovalidate.FieldPathString(v.Proto.GetField()),
			Description: words(v),
			Reason:      v.Proto.GetRuleId(),
		})
	}
	return invalidAnd(len(bad.Violations)-len(told), faults...)
}

// form looks at what a message is made of: lists that are too long, and fields that nobody here knows, which come from
// a client that is newer, or mistaken. Neither may be dropped in silence, nor stored.
type form struct {
	most   map[protoreflect.FullName]uint64
	faults []Violation
	more   int
}

func (c *form) fault(field, rule, description string) {
	if len(c.faults) == maxTold {
		c.more++
		return
	}
	c.faults = append(c.faults, Violation{field, description, rule})
}

func (c *form) look(at string, m protoreflect.Message) {
	if unknown := m.GetUnknown(); len(unknown) > 0 {
		c.fault(at, "unknown_field", unknownField(m))
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		path := string(f.Name())
		if at != "" {
			path = at + "." + path
		}
		switch most := c.most[f.FullName()]; {
		case f.IsMap() && most > 0 && uint64(v.Map().Len()) > most:
			c.fault(path, "map.max_pairs", tooMany(v.Map().Len(), most))
		case f.IsList() && most > 0 && uint64(v.List().Len()) > most:
			c.fault(path, "repeated.max_items", tooMany(v.List().Len(), most))
		case f.IsMap():
			if f.MapValue().Message() == nil {
				break
			}
			v.Map().Range(func(key protoreflect.MapKey, v protoreflect.Value) bool {
				c.look(path+"["+quote(key.String())+"]", v.Message())
				return true
			})
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				c.look(path+"["+strconv.Itoa(i)+"]", v.List().Get(i).Message())
			}
		default:
			c.look(path, v.Message())
		}
		return true
	})
}

func tooMany(n int, most uint64) string {
	return "has " + strconv.Itoa(n) + " entries; at most " + strconv.FormatUint(most, 10) + " are allowed"
}

// unknownField says which field of m is not known, the first of them.
func unknownField(m protoreflect.Message) string {
	number, _, _ := protowire.ConsumeTag(m.GetUnknown())
	return "unknown field " + strconv.Itoa(int(number)) + " in " + string(m.Descriptor().FullName()) +
		": the client is newer than this server, or sends another message"
}

// words says what a field must be. Rules with a message of their own keep it; what would show a regular
// expression or a bare length of one gets plain words.
func words(v *protovalidate.Violation) string {
	text := v.Proto.GetMessage()
	switch id := v.Proto.GetRuleId(); {
	case id == "required":
		return "is required"
	case id == "string.min_len" && v.RuleValue.IsValid() && v.RuleValue.Uint() == 1:
		return "is required"
	case id == "string.pattern":
		return "has a form or characters that are not allowed here"
	case text == "":
		return "breaks the rule " + id
	}
	text = strings.TrimPrefix(text, "value ")
	if v.Proto.GetForKey() {
		text = "key " + text
	}
	return text
}
