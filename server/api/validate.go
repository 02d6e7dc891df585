package api

import (
	"errors"
	"strings"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"
)

func newRules() protovalidate.Validator {
	v, err := protovalidate.New()
	if err != nil {
		panic("api: protovalidate does not start: " + err.Error())
	}
	return v
}

// validate checks a request against the rules in its proto and tells all faults at once.
func (s *Server) validate(req any) error {
	m, ok := req.(proto.Message)
	if !ok {
		return nil
	}
	err := s.rules.Validate(m)
	if err == nil {
		return nil
	}
	bad, ok := errors.AsType[*protovalidate.ValidationError](err)
	if !ok {
		return internal(err)
	}
	faults := make([]Violation, 0, len(bad.Violations))
	for _, v := range bad.Violations {
		faults = append(faults, Violation{
			Field:       protovalidate.FieldPathString(v.Proto.GetField()),
			Description: words(v),
			Reason:      v.Proto.GetRuleId(),
		})
	}
	return invalid(faults...)
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
