package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// description is what an OpenAPI or AsyncAPI file says of the events that it describes.
type description struct {
	// version is the file's, fit for a name; 1 where it has none.
	version string
	types   []describedType
	skipped []skipped
}

// describedType is one webhook or message.
type describedType struct {
	id, where   string
	description string
	deprecated  bool
	// schema and example are JSON, or empty.
	schema, example string
	notes           []string
}

// skipped is one that cannot be taken.
type skipped struct{ where, why string }

// object is a JSON object of a file.
type object = map[string]any

// describedTypes reads a file.
func describedTypes(text []byte) (description, error) {
	tree, err := treeOf(text)
	if err != nil {
		return description{}, err
	}
	root, ok := tree.(object)
	if !ok {
		return description{}, errors.New("it is no object; want OpenAPI or AsyncAPI, in JSON or YAML")
	}
	f := apiFile{root: root, out: description{version: "1"}}
	if info, ok := root["info"].(object); ok {
		if v := scalar(info["version"]); regexp.MustCompile(`^[A-Za-z0-9._~-]{1,64}$`).MatchString(v) {
			f.out.version = v
		}
	}
	openAPI, asyncAPI := scalar(root["openapi"]), scalar(root["asyncapi"])
	switch {
	case strings.HasPrefix(openAPI, "3.0"):
		f.old = true
		f.webhooks("x-webhooks")
	case strings.HasPrefix(openAPI, "3."):
		f.webhooks("webhooks")
		f.webhooks("x-webhooks")
	case strings.HasPrefix(asyncAPI, "2."), strings.HasPrefix(asyncAPI, "3."):
		f.draft7 = true
		f.messages()
	case openAPI != "" || asyncAPI != "":
		return description{}, fmt.Errorf("it is of version %q; want OpenAPI 3.0 or 3.1, or AsyncAPI 2 or 3", openAPI+asyncAPI)
	default:
		return description{}, errors.New("it has neither openapi nor asyncapi; want OpenAPI 3.0 or 3.1, or AsyncAPI 2 or 3")
	}
	return f.out, nil
}

// treeOf reads JSON or YAML. Numbers of JSON stay as they are written.
func treeOf(text []byte) (any, error) {
	if trimmed := bytes.TrimSpace(text); len(trimmed) > 0 && trimmed[0] == '{' {
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		var tree any
		if err := d.Decode(&tree); err == nil {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				return tree, nil
			}
		}
	}
	tree, err := oneDocument(text)
	if err != nil {
		return nil, err
	}
	// YAML has keys that are no texts, and numbers that JSON has not.
	plain, err := json.Marshal(tree)
	if err != nil {
		return nil, fmt.Errorf("it has what JSON has not: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(plain))
	d.UseNumber()
	err = d.Decode(&tree)
	return tree, err
}

// scalar is a text, or a number as it is written.
func scalar(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	}
	return ""
}

// apiFile is a file that is being read.
type apiFile struct {
	root object
	// old: schemas are OpenAPI 3.0's own. draft7: they are of draft-07.
	old, draft7 bool
	out         description
	// seen are the messages that have been taken, by what they are, and ids the types, by where they are.
	seen map[string]bool
	ids  map[string]string
}

func (f *apiFile) skip(where, format string, args ...any) {
	f.out.skipped = append(f.out.skipped, skipped{where, fmt.Sprintf(format, args...)})
}

// resolve follows $ref within the file, and returns where it ends, as a JSON Pointer.
func (f *apiFile) resolve(v any, at string) (object, string, error) {
	for range 32 {
		o, ok := v.(object)
		if !ok {
			return nil, at, errors.New("it is no object")
		}
		ref, ok := o["$ref"].(string)
		if !ok {
			return o, at, nil
		}
		var err error
		if v, err = f.find(ref); err != nil {
			return nil, at, err
		}
		at = strings.TrimPrefix(ref, "#")
	}
	return nil, at, errors.New("its $ref goes round in circles")
}

// find returns what a reference within the file means.
func (f *apiFile) find(ref string) (any, error) {
	pointer, local := strings.CutPrefix(ref, "#/")
	if !local {
		return nil, fmt.Errorf("it refers to %q, which is not within the file: bundle it into one, for nothing is fetched", clipText(ref, 100))
	}
	var v any = f.root
	for token := range strings.SplitSeq(pointer, "/") {
		token = unescapeToken(token)
		switch here := v.(type) {
		case object:
			next, ok := here[token]
			if !ok {
				return nil, fmt.Errorf("it refers to %q, which the file does not have", clipText(ref, 100))
			}
			v = next
		case []any:
			i, err := strconv.Atoi(token)
			if err != nil || i < 0 || i >= len(here) {
				return nil, fmt.Errorf("it refers to %q, which the file does not have", clipText(ref, 100))
			}
			v = here[i]
		default:
			return nil, fmt.Errorf("it refers to %q, which the file does not have", clipText(ref, 100))
		}
	}
	return v, nil
}

func unescapeToken(token string) string {
	token = strings.NewReplacer("~1", "/", "~0", "~").Replace(token)
	return percentDecoded(token)
}

// percentDecoded reads %XX, as fragments of URIs have them.
func percentDecoded(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	return eventID("/" + s)
}

func escapeToken(s string) string { return strings.NewReplacer("~", "~0", "/", "~1").Replace(s) }

func clipText(s string, most int) string {
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// webhooks takes the path items under a member of the file.
func (f *apiFile) webhooks(member string) {
	all, ok := f.root[member].(object)
	if !ok {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		where := member + "/" + name
		item, _, err := f.resolve(all[name], "")
		if err != nil {
			f.skip(where, "%v", err)
			continue
		}
		operation := object(nil)
		for _, method := range []string{"post", "put", "patch", "delete", "get"} {
			if o, ok := item[method].(object); ok {
				operation = o
				break
			}
		}
		if operation == nil {
			f.skip(where, "it has no post")
			continue
		}
		t := describedType{id: name, where: where, description: f.words(operation, item)}
		t.deprecated, _ = operation["deprecated"].(bool)
		f.add(t, func(t *describedType) error { return f.body(t, operation["requestBody"]) })
	}
}

// words are what a thing is for.
func (f *apiFile) words(of ...object) string {
	for _, o := range of {
		for _, member := range []string{"description", "summary", "title"} {
			if text := strings.TrimSpace(scalar(o[member])); text != "" {
				if utf8.RuneCountInString(text) > 2048 {
					text = string([]rune(text)[:2047]) + "…"
				}
				return text
			}
		}
	}
	return ""
}

// add takes a type, unless another one has its name.
func (f *apiFile) add(t describedType, fill func(*describedType) error) {
	if f.ids == nil {
		f.ids = map[string]string{}
	}
	if other := f.ids[t.id]; other != "" {
		f.skip(t.where, "%s is of the same name", other)
		return
	}
	if err := fill(&t); err != nil {
		f.skip(t.where, "%v", err)
		return
	}
	f.ids[t.id] = t.where
	f.out.types = append(f.out.types, t)
}

// body takes schema and example of a request body.
func (f *apiFile) body(t *describedType, body any) error {
	if body == nil {
		t.notes = append(t.notes, "it has no body, and so no schema")
		return nil
	}
	b, _, err := f.resolve(body, "")
	if err != nil {
		return err
	}
	content, _ := b["content"].(object)
	media := ""
	for _, name := range slices.Sorted(maps.Keys(content)) {
		kind, _, _ := strings.Cut(strings.ToLower(name), ";")
		if kind = strings.TrimSpace(kind); kind == "application/json" {
			media = name
			break
		} else if media == "" && (strings.HasSuffix(kind, "+json") || kind == "*/*") {
			media = name
		}
	}
	if media == "" {
		return fmt.Errorf("its body is not JSON, but %s", strings.Join(slices.Sorted(maps.Keys(content)), ", "))
	}
	m, _, err := f.resolve(content[media], "")
	if err != nil {
		return err
	}
	if examples, ok := m["examples"].(object); ok {
		for _, name := range slices.Sorted(maps.Keys(examples)) {
			if e, _, err := f.resolve(examples[name], ""); err == nil && e["value"] != nil {
				t.exampleOf(e["value"])
				break
			}
		}
	}
	if e, ok := m["example"]; ok {
		t.exampleOf(e)
	}
	if m["schema"] == nil {
		t.notes = append(t.notes, "it has no schema")
		return nil
	}
	t.schema, err = f.bundle(m["schema"])
	return err
}

// exampleOf takes an example, if it is small enough.
func (t *describedType) exampleOf(v any) {
	if text, err := compactJSON(v); err == nil && len(text) <= 64<<10 {
		t.example = text
	} else {
		t.notes = append(t.notes, "its example is left out: it has more than 64 KiB")
	}
}

func compactJSON(v any) (string, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return strings.TrimSpace(b.String()), err
}

// messages takes the messages of channels, and those that no channel has.
func (f *apiFile) messages() {
	f.seen = map[string]bool{}
	channels, _ := f.root["channels"].(object)
	for _, name := range slices.Sorted(maps.Keys(channels)) {
		at := "/channels/" + escapeToken(name)
		channel, at, err := f.resolve(channels[name], at)
		if err != nil {
			f.skip("channels/"+name, "%v", err)
			continue
		}
		for _, operation := range []string{"publish", "subscribe"} { // of AsyncAPI 2
			o, ok := channel[operation].(object)
			if !ok || o["message"] == nil {
				continue
			}
			at := at + "/" + operation + "/message"
			m, at, err := f.resolve(o["message"], at)
			if alternatives, ok := m["oneOf"].([]any); err == nil && ok {
				for i, one := range alternatives {
					f.message(one, fmt.Sprintf("%s/oneOf/%d", at, i), "")
				}
				continue
			}
			f.message(o["message"], at, "")
		}
		f.messagesIn(channel["messages"], at+"/messages") // of AsyncAPI 3
	}
	components, _ := f.root["components"].(object)
	f.messagesIn(components["messages"], "/components/messages")
}

func (f *apiFile) messagesIn(v any, at string) {
	all, _ := v.(object)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		f.message(all[name], at+"/"+escapeToken(name), name)
	}
}

// message takes one; key is what the file calls it where it has no name.
func (f *apiFile) message(v any, at, key string) {
	m, at, err := f.resolve(v, at)
	where := strings.TrimPrefix(at, "/")
	if err != nil {
		f.skip(where, "%v", err)
		return
	}
	if f.seen[at] {
		return
	}
	f.seen[at] = true
	if key == "" || strings.HasPrefix(at, "/components/messages/") {
		key = unescapeToken(at[strings.LastIndexByte(at, '/')+1:])
	}
	id := scalar(m["name"])
	if id == "" {
		id = scalar(m["messageId"])
	}
	if id == "" {
		id = key
	}
	t := describedType{id: id, where: where, description: f.words(m)}
	t.deprecated, _ = m["deprecated"].(bool)
	if !t.deprecated {
		t.deprecated, _ = m["x-deprecated"].(bool)
	}
	f.add(t, func(t *describedType) error { return f.payload(t, m) })
}

// payload takes schema and example of a message.
func (f *apiFile) payload(t *describedType, m object) error {
	if kind := scalar(m["contentType"]); kind != "" && !strings.Contains(strings.ToLower(kind), "json") {
		return fmt.Errorf("its payload is not JSON, but %s", clipText(kind, 80))
	}
	payload, format := m["payload"], scalar(m["schemaFormat"])
	if o, ok := payload.(object); ok && o["schemaFormat"] != nil && o["schema"] != nil { // of AsyncAPI 3
		payload, format = o["schema"], scalar(o["schemaFormat"])
	}
	if format != "" && !strings.Contains(format, "aai.asyncapi") && !strings.Contains(format, "schema+") {
		return fmt.Errorf("its schema is not JSON Schema, but %s", clipText(format, 80))
	}
	if examples, ok := m["examples"].([]any); ok && len(examples) > 0 {
		if e, ok := examples[0].(object); ok && e["payload"] != nil {
			t.exampleOf(e["payload"])
		}
	}
	if payload == nil {
		t.notes = append(t.notes, "it has no payload, and so no schema")
		return nil
	}
	var err error
	t.schema, err = f.bundle(payload)
	return err
}

// bundle is a schema with all that it refers to within the file, under $defs.
func (f *apiFile) bundle(v any) (string, error) {
	b := bundler{file: f, names: map[string]string{}, defs: object{}, under: "$defs"}
	if f.draft7 {
		b.under = "definitions"
	}
	root, err := b.schema(v, 0)
	if err != nil {
		return "", err
	}
	o, ok := root.(object)
	if !ok {
		o = object{"allOf": []any{root}}
	}
	if f.draft7 && o["$schema"] == nil {
		o["$schema"] = "http://json-schema.org/draft-07/schema#"
		if o["$ref"] != nil { // beside which draft-07 ignores all
			o = object{"$schema": o["$schema"], "allOf": []any{object{"$ref": o["$ref"]}}}
		}
	}
	if len(b.defs) > 0 {
		own, _ := o[b.under].(object)
		for name, def := range own {
			if b.defs[name] == nil {
				b.defs[name] = def
			}
		}
		o[b.under] = b.defs
	}
	return compactJSON(o)
}

// bundler copies one schema.
type bundler struct {
	file *apiFile
	// names are those under which what is referred to is kept, by reference.
	names map[string]string
	defs  object
	under string
}

// maxSchemaNesting is deeper than a server takes.
const maxSchemaNesting = 100

// schema copies a schema, and has its references go to the copy.
func (b *bundler) schema(v any, depth int) (any, error) {
	o, ok := v.(object)
	if !ok {
		return v, nil // true, false, or what the server says is wrong
	}
	if depth > maxSchemaNesting {
		return nil, errors.New("its schema is nested too deep")
	}
	out := object{}
	for _, name := range slices.Sorted(maps.Keys(o)) {
		value, err := b.keyword(name, o[name], depth)
		if err != nil {
			return nil, err
		}
		switch {
		case name == "$ref":
			if b.file.old {
				return object{"$ref": value}, nil // beside which OpenAPI 3.0 ignores all
			}
			out[name] = value
		case name == "discriminator" || name == "xml" || name == "externalDocs" || strings.HasPrefix(name, "x-"):
		case name == "example":
			if out["examples"] == nil && o["examples"] == nil {
				out["examples"] = []any{value}
			}
		default:
			out[name] = value
		}
	}
	if b.file.old {
		modernise(out)
	}
	return out, nil
}

// keyword copies the value of a keyword, which holds schemas or does not.
func (b *bundler) keyword(name string, v any, depth int) (any, error) {
	switch name {
	case "$ref":
		ref, ok := v.(string)
		if !ok {
			return v, nil
		}
		return b.reference(ref, depth)
	case "items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames",
		"unevaluatedItems", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "prefixItems":
		if list, ok := v.([]any); ok {
			out := make([]any, len(list))
			for i, one := range list {
				var err error
				if out[i], err = b.schema(one, depth+1); err != nil {
					return nil, err
				}
			}
			return out, nil
		}
		return b.schema(v, depth+1)
	case "properties", "patternProperties", "$defs", "definitions", "dependentSchemas":
		all, ok := v.(object)
		if !ok {
			return v, nil
		}
		out := object{}
		for key, one := range all {
			var err error
			if out[key], err = b.schema(one, depth+1); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	return v, nil
}

// reference keeps what is referred to, once, and returns the reference to it.
func (b *bundler) reference(ref string, depth int) (string, error) {
	if name, ok := b.names[ref]; ok {
		return "#/" + b.under + "/" + escapeToken(name), nil
	}
	found, err := b.file.find(ref)
	if err != nil {
		return "", err
	}
	last := unescapeToken(ref[strings.LastIndexByte(ref, '/')+1:])
	// In the reference the name stands in a URI.
	name := strings.Map(func(r rune) rune {
		if r < 0x80 && unreserved(byte(r)) {
			return r
		}
		return '_'
	}, last)
	for i := 2; b.defs[name] != nil; i++ {
		name = fmt.Sprintf("%s_%d", strings.TrimSuffix(name, fmt.Sprintf("_%d", i-1)), i)
	}
	b.names[ref] = name
	b.defs[name] = true // its place, for what refers back
	if b.defs[name], err = b.schema(found, depth+1); err != nil {
		return "", err
	}
	return "#/" + b.under + "/" + name, nil
}

// unreserved reports whether a byte needs no escape in a URI.
func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
}

// modernise turns what OpenAPI 3.0 has of its own into JSON Schema.
func modernise(s object) {
	if nullable, _ := s["nullable"].(bool); nullable {
		if kind, ok := s["type"].(string); ok {
			s["type"] = []any{kind, "null"}
		}
		if values, ok := s["enum"].([]any); ok && !slices.Contains(values, nil) {
			s["enum"] = append(slices.Clone(values), nil)
		}
	}
	delete(s, "nullable")
	for exclusive, bound := range map[string]string{"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"} {
		if is, ok := s[exclusive].(bool); ok {
			if delete(s, exclusive); is && s[bound] != nil {
				s[exclusive] = s[bound]
				delete(s, bound)
			}
		}
	}
}
