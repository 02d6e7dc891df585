package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"gopkg.in/yaml.v3"
)

// decodeJSON reads one JSON document into m, and says which field is wrong, what it wants and what it was given. What is no
// JSON at all, or not an object, is not repeated: the file may have been another than was meant, and hold a key.
func decodeJSON(document []byte, m proto.Message) error {
	if !json.Valid(document) {
		var tree any
		if err := json.Unmarshal(document, &tree); err != nil {
			return err
		}
	}
	err := protojson.Unmarshal(document, m)
	if err == nil {
		return nil
	}
	if fault := faultOf(document, m.ProtoReflect().Type(), ""); fault != nil {
		return fault
	}
	return errors.New(withoutPosition(protoText(err)))
}

// faultOf is what is wrong with the object that document should be; nil where that cannot be told from its fields alone.
func faultOf(document json.RawMessage, of protoreflect.MessageType, path string) error {
	var given map[string]json.RawMessage
	if err := json.Unmarshal(document, &given); err != nil || given == nil {
		return fmt.Errorf("want an object of fields, not %s", jsonKind(document))
	}
	fields := of.Descriptor().Fields()
	for _, name := range slices.Sorted(maps.Keys(given)) {
		field := fields.ByJSONName(name)
		if field == nil {
			field = fields.ByTextName(name)
		}
		if field == nil {
			return unknownField(path, name, fields)
		}
		if !fits(of, name, given[name]) {
			return fieldFault(of, field, name, given[name], path)
		}
	}
	return nil
}

func unknownField(path, name string, fields protoreflect.FieldDescriptors) error {
	if path != "" {
		path = strings.TrimSuffix(path, ".") + ": "
	}
	if len(name) > longestGiven {
		return fmt.Errorf("%sunknown field of %d bytes", path, len(name))
	}
	var words []string
	for i := range fields.Len() {
		words = append(words, strings.ReplaceAll(fields.Get(i).TextName(), "_", "-"))
	}
	if near := closest(name, words); near != "" {
		return fmt.Errorf("%sunknown field %q; did you mean %q?", path, name, strings.ReplaceAll(near, "-", "_"))
	}
	return fmt.Errorf("%sunknown field %q", path, name)
}

// fits reports whether protojson takes value for the field.
func fits(of protoreflect.MessageType, name string, value json.RawMessage) bool {
	alone, err := json.Marshal(map[string]json.RawMessage{name: value})
	return err == nil && protojson.Unmarshal(alone, of.New().Interface()) == nil
}

func fieldFault(of protoreflect.MessageType, field protoreflect.FieldDescriptor, name string, value json.RawMessage, path string) error {
	here := path + name
	switch {
	case field.IsMap():
		var entries map[string]json.RawMessage
		if json.Unmarshal(value, &entries) != nil {
			return fmt.Errorf("%s: want an object, not %s", here, jsonKind(value))
		}
		for _, key := range slices.Sorted(maps.Keys(entries)) {
			one, err := json.Marshal(map[string]json.RawMessage{key: entries[key]})
			if err == nil && !fits(of, name, one) {
				return fmt.Errorf("%s[%q]: want %s, not %s", here, key, fieldWants(field.MapValue()), jsonGiven(entries[key], field))
			}
		}
	case field.IsList():
		var elements []json.RawMessage
		if json.Unmarshal(value, &elements) != nil {
			return fmt.Errorf("%s: want a list, not %s", here, jsonKind(value))
		}
		for i, element := range elements {
			if one, err := json.Marshal([]json.RawMessage{element}); err == nil && !fits(of, name, one) {
				return elementFault(of.New().NewField(field).List().NewElement, field, fmt.Sprintf("%s[%d]", here, i), element)
			}
		}
	default:
		return elementFault(func() protoreflect.Value { return of.New().NewField(field) }, field, here, value)
	}
	return fmt.Errorf("%s: want %s", here, fieldWants(field))
}

// elementFault is about one value, which may be an object of fields.
func elementFault(empty func() protoreflect.Value, field protoreflect.FieldDescriptor, here string, value json.RawMessage) error {
	if m := field.Message(); m != nil && m.ParentFile().Package() != "google.protobuf" {
		if jsonKind(value) != "an object" {
			return fmt.Errorf("%s: want an object, not %s", here, jsonKind(value))
		}
		if fault := faultOf(value, empty().Message().Type(), here+"."); fault != nil {
			return fault
		}
	}
	return fmt.Errorf("%s: want %s, not %s", here, fieldWants(field), jsonGiven(value, field))
}

// fieldWants says what a field takes.
func fieldWants(field protoreflect.FieldDescriptor) string {
	switch field.Kind() {
	case protoreflect.StringKind:
		return "text, in quotes where it looks like something else"
	case protoreflect.BoolKind:
		return "true or false"
	case protoreflect.BytesKind:
		return `base64 in quotes ("json" takes a payload as it is, "text" a text)`
	case protoreflect.DoubleKind, protoreflect.FloatKind:
		return "a number"
	case protoreflect.Int32Kind, protoreflect.Uint32Kind:
		return "a whole number of 32 bits"
	case protoreflect.Int64Kind, protoreflect.Uint64Kind:
		return "a whole number"
	case protoreflect.EnumKind:
		var names []string
		for i := range field.Enum().Values().Len() {
			names = append(names, string(field.Enum().Values().Get(i).Name()))
		}
		return "one of " + strings.Join(names, ", ")
	case protoreflect.MessageKind:
		switch field.Message().FullName() {
		case "google.protobuf.Duration":
			return "seconds with an s, such as 90s"
		case "google.protobuf.Timestamp":
			return "a time as in RFC 3339, such as 2026-11-20T08:00:00Z"
		}
	}
	return "an object"
}

// jsonGiven is a value as it was given, where it is short and no secret, and else what kind of value it is.
func jsonGiven(value json.RawMessage, field protoreflect.FieldDescriptor) string {
	if len(value) > longestGiven || mayBeSecret(field) {
		return jsonKind(value)
	}
	return string(value)
}

// jsonKind is what a JSON value is, without what is in it.
func jsonKind(value json.RawMessage) string {
	value = bytes.TrimSpace(value)
	if len(value) == 0 {
		return "nothing"
	}
	switch value[0] {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a text"
	case 't', 'f':
		return "true or false"
	case 'n':
		return "nothing"
	}
	return "a number"
}

// maxRepeated is how many bytes the aliases of a YAML stream may repeat: as many as the event types of a namespace may have.
const maxRepeated = 32 << 20

// valueBytes is what a value counts for beside its text.
const valueBytes = 64

// yamlStream reads the documents of a text in YAML. What aliases repeat is bounded over all of them: a few bytes of alias stand
// for a text of any length.
type yamlStream struct {
	decoder  *yaml.Decoder
	repeated int
}

func newYAMLStream(text []byte) *yamlStream {
	return &yamlStream{decoder: yaml.NewDecoder(bytes.NewReader(text))}
}

// next reads the next document; io.EOF is the end. What looks like a date stays the text that it is: no field of the API takes
// YAML's own dates, which would be another text in a label.
func (s *yamlStream) next() (any, error) {
	var document yaml.Node
	if err := s.decoder.Decode(&document); err != nil {
		return nil, err
	}
	if _, err := s.look(&document, map[*yaml.Node]int{}); err != nil {
		return nil, err
	}
	var tree any
	err := document.Decode(&tree)
	return tree, err
}

// look returns how many bytes a node has with all that its aliases repeat. anchored are the sizes of those with an anchor.
func (s *yamlStream) look(node *yaml.Node, anchored map[*yaml.Node]int) (int, error) {
	if node.Kind == yaml.AliasNode {
		n := anchored[node.Alias] // none yet of one that contains itself, which is refused when it is decoded
		if s.repeated += n; s.repeated > maxRepeated {
			return 0, fmt.Errorf("line %d: with the alias *%s, what aliases repeat has more than %d MiB", node.Line, clipText(node.Value, 64), maxRepeated>>20)
		}
		return n, nil
	}
	if node.Kind == yaml.ScalarNode && node.ShortTag() == "!!timestamp" {
		node.Tag = "!!str"
	}
	size := valueBytes + len(node.Value)
	for _, child := range node.Content {
		n, err := s.look(child, anchored)
		if err != nil {
			return 0, err
		}
		size += n
	}
	if node.Anchor != "" {
		anchored[node] = size
	}
	return size, nil
}

// oneDocument reads the only document of a text in YAML.
func oneDocument(text []byte) (any, error) {
	stream := newYAMLStream(text)
	tree, err := stream.next()
	if errors.Is(err, io.EOF) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for {
		more, err := stream.next()
		if errors.Is(err, io.EOF) {
			return tree, nil
		}
		if err != nil {
			return nil, err
		}
		if more != nil {
			return nil, errors.New("it has several documents; want one here, and grapnel apply takes many")
		}
	}
}

// badText is the path of the first field of m that holds what is not UTF-8, which no message can carry; or "".
func badText(m protoreflect.Message) string {
	found := ""
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		name := string(field.Name())
		look := func(field protoreflect.FieldDescriptor, value protoreflect.Value) {
			switch {
			case field.Kind() == protoreflect.StringKind && !utf8.ValidString(value.String()):
				found = name
			case field.Message() != nil:
				if inner := badText(value.Message()); inner != "" {
					found = name + "." + inner
				}
			}
		}
		switch {
		case field.IsMap():
			value.Map().Range(func(key protoreflect.MapKey, element protoreflect.Value) bool {
				look(field.MapKey(), key.Value())
				look(field.MapValue(), element)
				return found == ""
			})
		case field.IsList():
			for i := range value.List().Len() {
				look(field, value.List().Get(i))
			}
		default:
			look(field, value)
		}
		return found == ""
	})
	return found
}
